"""One adapter for each new language, as the company of the story makes them.

LoRA r=8 on all linears, 200 steps of 20 dates at 8e-3, six languages, five seeds; and
for Hungarian, which resists, four times the rank and twice the steps. Some five minutes
on two cores. Gradients are not clipped."""

from experiments.common import scores, store, sweep, tune
from peftlab.kit.data import HELD_BACK

SEEDS, RATE, BATCH = range(5), 8e-3, 20


def one_language(job):
    language, rank, steps, seed = job
    how = dict(lr=RATE, seed=seed, steps=steps, batch=BATCH)
    model, tokenizer = tune([language], f"LoRA r={rank}", **how)
    bits = scores(model, tokenizer, [language], 400)
    return dict(language=language, rank=rank, steps=steps, seed=seed, **bits)


def main():
    settings = [(language, 8, 200) for language in HELD_BACK]
    settings += [("hu", 32, 200), ("hu", 8, 400)]
    jobs = [(*setting, seed) for setting in settings for seed in SEEDS]
    runs = sweep(one_language, jobs, "one language at a time")
    store("one_language", runs, lr=RATE, batch=BATCH)


if __name__ == "__main__":
    main()
