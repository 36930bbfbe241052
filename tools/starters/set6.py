"""Problem set 6, two in one: a starter that runs and has no points.

    python set6.py

Change what stands between the two lines. Your task is on the page "Problem sets".
"""

import problem_sets
import torch

from peftlab import lora, peft_files
from peftlab.kit import data
from peftlab.kit.train import train

ID = "your-id"

first, second = problem_sets.variant(ID, 6)
model, tokenizer = problem_sets.base(6)
torch.manual_seed(problem_sets.seed(ID, 6))

# ---- yours, from here
lora.add(model, ["q_proj"], r=1, alpha=1)
records = data.records("dates", first, 200, "train")
records += data.records("dates", second, 200, "train")
train(model, tokenizer, records, steps=10, lr=1e-4)
# ---- to here

peft_files.save(model, "set6")
problem_sets.main(["check", "set6", "--id", ID, "--set", "6"])
