"""Problem set 5, a broken base: a starter that runs and has no points.

    python set5.py

Change what stands between the two lines. Your task is on the page "Problem sets".
"""

import problem_sets
import torch

from peftlab import lora, peft_files
from peftlab.kit import data
from peftlab.kit.train import train

ID = "your-id"

(language,) = problem_sets.variant(ID, 5)
model, tokenizer = problem_sets.base(5)
torch.manual_seed(problem_sets.seed(ID, 5))

# ---- yours, from here
lora.add(model, ["q_proj"], r=1, alpha=1)
records = data.records("dates", language, 400, "train")
train(model, tokenizer, records, steps=10, lr=1e-4)
# ---- to here

peft_files.save(model, "set5")
problem_sets.main(["check", "set5", "--id", ID, "--set", "5"])
