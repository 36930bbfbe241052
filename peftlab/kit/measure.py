"""What a method costs and what it reaches: exact match, parameters, bytes, time, memory."""

import torch


@torch.no_grad()
def exact_match(model, tokenizer, records, batch_size=100):
    """Share of records whose greedy answer is right to the letter, a float in [0, 1]."""
    return sum(answered(model, tokenizer, records, batch_size)) / len(records)


@torch.no_grad()
def answered(model, tokenizer, records, batch_size=100):
    """For each record, whether the model's greedy answer is right to the letter (bools)."""
    given = answers(model, tokenizer, [r.prompt for r in records], batch_size)
    return [text == record.answer for text, record in zip(given, records, strict=True)]


@torch.no_grad()
def answers(model, tokenizer, prompts, batch_size=100):
    """The model's greedy continuation of each prompt, up to the end token, as strings."""
    if not prompts:
        raise ValueError("no prompts: there is nothing to answer")
    training, out = model.training, {}
    model.eval()
    order = sorted(prompts, key=len)  # prompts of about one length share a batch
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        inputs = tokenizer(batch, return_tensors="pt", padding=True).to(model.device)
        inputs.pop("token_type_ids", None)
        tokens = model.generate(**inputs, max_new_tokens=24, do_sample=False)
        new = tokens[:, inputs["input_ids"].shape[1] :]
        texts = tokenizer.batch_decode(new, skip_special_tokens=True)
        out.update(zip(batch, (text.strip(" ") for text in texts), strict=True))
    model.train(training)
    return [out[prompt] for prompt in prompts]
