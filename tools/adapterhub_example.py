"""A bottleneck adapter with the `adapters` library, from records to an answer.

    pip install adapters==1.3.0 transformers==4.57.6 accelerate
    python adapterhub_example.py peftlab/models/tiny-decoder

The library needs an older transformers than the book: an environment of its
own. `make adapterhub` runs this script there and stores what it prints.
"""

import random
import sys

import adapters
import torch
from adapters import AdapterTrainer
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForSeq2Seq,
    PreTrainedTokenizerFast,
    TrainingArguments,
)

MONTHS = "tammi helmi maalis huhti touko kesä heinä elo syys loka marras joulu"
TEXT = "5. toukokuuta 2031 ="


def draw(dice):
    """A Finnish date and how it is written by ISO 8601."""
    day, month = dice.randint(1, 28), dice.randint(1, 12)
    year = dice.randint(1950, 2049)
    text = f"{day}. {MONTHS.split()[month - 1]}kuuta {year} ="
    return text, f" {year}-{month:02}-{day:02}"


def encode(text, answer):
    prompt = tokenizer(text)["input_ids"]
    answer = tokenizer(answer, add_special_tokens=False)["input_ids"]
    answer.append(tokenizer.eos_token_id)
    labels = [-100] * len(prompt) + answer
    return {"input_ids": prompt + answer, "labels": labels}


def answer(text):
    inputs = tokenizer(text, return_tensors="pt", return_token_type_ids=False)
    tokens = model.generate(
        **inputs,
        max_new_tokens=12,
        do_sample=False,
        use_cache=False,  # with it a Llama answers nonsense in these versions
    )
    new = tokens[0, inputs["input_ids"].shape[1] :]
    return tokenizer.decode(new, skip_special_tokens=True).strip()


folder = sys.argv[1]
tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
adapters.init(model)
config = adapters.SeqBnConfig(reduction_factor=2)  # Pfeiffer's, 128 / 2 wide
model.add_adapter("fi", config=config)
model.train_adapter("fi")  # freezes the rest, and has the adapter work

settings = TrainingArguments(
    "trained",
    max_steps=200,
    per_device_train_batch_size=16,
    learning_rate=0.01,  # for this tiny model
    warmup_steps=20,
    report_to="none",
    save_strategy="no",
    logging_strategy="no",
    disable_tqdm=True,
)
dice = random.Random(0)
trainer = AdapterTrainer(
    model=model,
    args=settings,
    train_dataset=[encode(*draw(dice)) for _ in range(3200)],
    data_collator=DataCollatorForSeq2Seq(tokenizer),
)
trainer.train()
model.save_adapter("fi-adapter", "fi")

# As on another day: the base model and the saved adapter.
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
adapters.init(model)
model.load_adapter("fi-adapter", set_active=True)
print("with the adapter:", answer(TEXT))
model.set_active_adapters(None)
print("turned off:", answer(TEXT))
