"""Problem set 4, six classes: a starter that runs and has no points.

    python set4.py

Change what stands between the two lines. Your task is on the page "Problem sets".
"""

import problem_sets
import torch

from peftlab import lora, peft_files
from peftlab.kit import icd
from peftlab.kit.train import batches

ID = "your-id"

classes = problem_sets.variant(ID, 4)
model, tokenizer = problem_sets.base(4)
torch.manual_seed(problem_sets.seed(ID, 4))
place = {icd.CHAPTERS.index(name): k for k, name in enumerate(classes)}
pairs = [(t, place[c]) for t, c in icd.diagnoses("train") if c in place]

# ---- yours, from here
lora.add(model, ["query"], r=1, alpha=1)
model.classifier.requires_grad_(True)
trained = [p for p in model.parameters() if p.requires_grad]
optimizer = torch.optim.AdamW(trained, lr=1e-5)
source = batches(pairs, size=8)
for _ in range(5):
    texts, labels = zip(*next(source), strict=True)
    batch = tokenizer(list(texts), padding=True, return_tensors="pt")
    loss = model.train()(**batch, labels=torch.tensor(labels)).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
# ---- to here

peft_files.save(model, "set4", heads=["classifier"])
problem_sets.main(["check", "set4", "--id", ID, "--set", "4"])
