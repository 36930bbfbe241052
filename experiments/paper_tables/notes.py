"""The words of the page of the papers' tables: introductions by title, notes by name.

A note gives the arithmetic of a figure that does not come out as printed.
"""

PAGE = """\
:::{{div}} saw
**What it means for you**

- **Most printed counts are right.** Of {count}, {equal} are equal to the count
  and {rounds} are its rounding; {cut} were cut off where rounding would go up.
- **Shares depend on rank and targets.** LoRA trains 0.0027% of GPT-3 (r=1 on queries
  and values) to 2.37% of LLaMA 7B (r=64 on all linears): "0.1 to 2%" leaves these out.
  The "10,000 times fewer" of LoRA's paper is 9,251 times.
- **Adapters train 0.8 to 1.6% of BERT-base** at a bottleneck of 48, without the norms.
- **A prompt is small, not "a few KB"**: in float32 on T5-XXL, 80 KiB for five tokens,
  2.3 MiB for 150.
- **Where a figure is off, a note says why**, for {differs} of them: digits changed
  places, a count of another rank, frozen matrices counted. For {open} we know no
  reason.
:::

The papers say how many parameters their methods train. Here each of those figures is
counted again: the model is built at its full size on torch's meta device, where weights
have shapes and no memory, the method of this book is added, and what would train is
counted. You can count a model of your own with `measure.count` from `peftlab.kit`:

```python
from transformers import LlamaConfig

from peftlab import lora
from peftlab.kit import measure

measure.count(LlamaConfig(), lora.add, ["q_proj", "v_proj"], r=8)
```

Each table below unfolds. *Ours* is the number of trained parameters. A second or third
figure in a cell is what the paper prints beside it: all parameters, or a share. Heads
for a task are not counted.
"""

INTRODUCTIONS = {
    "Models: encoders": """
        With the pooler, without a head. BERT by {cite:t}`devlin2018bert`; the others as
        Table 2 of {cite:t}`hu2021lora` prints them.""",
    "Models: GPT": """
        A tied matrix counts once. Table 2 of {cite:t}`radford2019gpt2`, Table 3 of
        {cite:t}`hu2021lora` (two rows), and {cite:t}`brown2020gpt3`.""",
    "Models: Llama": """
        Table 2 of {cite:t}`touvron2023llama`, and the names of Llama 2
        {cite:p}`touvron2023llama2` and Llama 3 {cite:p}`grattafiori2024llama3`.""",
    "LoRA on encoders and GPT-2": """
        Tables 2 and 3 of {cite:t}`hu2021lora`, on query and value: r(in + out) for each
        matrix. GPT-2 has query, key and value in one matrix; r(d+3d) on that one is
        as many as r(d+d) on each of two.""",
    "LoRA on GPT-3": """
        Tables 4, 5 and 15, section 4.2 and Appendix D.4 of {cite:t}`hu2021lora`: 96
        layers, d = 12,288, and 2dr for each adapted matrix.""",
    "LoRA on Llama and T5": """
        LLaMA on all linears is QLoRA's setting {cite:p}`dettmers2023qlora`, counted in
        Table 4 of {cite:t}`kopiczko2023vera`. T5-XL is a baseline in the appendix of
        {cite:t}`liu2022tfew`. Llama 3.1 is from {cite:t}`schulman2025regret`, who count
        the output head: without it the first of these rows would be 452,984,832, which
        is 0.45B.""",
    "DoRA": """
        Table 1 of {cite:t}`liu2024dora` prints shares of all parameters, the new ones
        included: as a share of the base, its 0.84% would be 0.85%. Query, key, value,
        up and down; DoRA adds a value for each output. Llama 2 7B has the sizes and
        the shares of LLaMA 7B.""",
    "VeRA": """
        Tables 1, 2 and 4 of {cite:t}`kopiczko2023vera`: r + out for each matrix. Where
        nothing else is said, query and key (Table 1). For LLaMA the rank is the one
        that gives what is printed; the first version of the paper had 1.4M.""",
    "Bottleneck adapters": """
        Each has 2md + d + m parameters, biases included. A layer has one of Pfeiffer's
        {cite:p}`pfeiffer2020fusion` or two of Houlsby's {cite:p}`houlsby2019adapters`.
        Printed in Tables 2, 9 and 15 of {cite:t}`hu2021lora`. GPT-3's rows are built at
        its width and depth in Llama's modules, which have the same places.""",
    "BitFit, norms and IA3": """
        {cite:t}`zaken2021bitfit` print shares of the base, {cite:t}`hu2021lora` the row
        on RoBERTa (Table 2), {cite:t}`liu2022tfew` those on T5-XL. IA3 has a value for
        each key, each value and each unit inside the MLP.""",
    "Prompt tuning: T5 Small": """
        Table 4 of {cite:t}`lester2021prompt`: the prompt, the model with its prompt,
        and the share of the one in the other. A prompt of n tokens is n·d parameters,
        before the encoder only. T5 1.1 has an output head of its own; `transformers` 5
        ties it to the embeddings, and so counts 32,128·d fewer. Here the head is put
        back.""",
    "Prompt tuning: T5 Base": "Table 4 of {cite:t}`lester2021prompt`, d = 768.",
    "Prompt tuning: T5 Large": "Table 4 of {cite:t}`lester2021prompt`, d = 1,024.",
    "Prompt tuning: T5 XL": "Table 4 of {cite:t}`lester2021prompt`, d = 2,048.",
    "Prompt tuning: T5 XXL": """
        Table 4 of {cite:t}`lester2021prompt`, d = 4,096. "A prompt is a few KB" is said
        of this table: in float32 five tokens are 80 KiB and 150 are 2.3 MiB.""",
    "Prompt and prefix tuning elsewhere": """
        GPT-3's prompts are in Table 15 of {cite:t}`hu2021lora`. {cite:t}`liu2022tfew`
        give the decoder a prompt of its own. {cite:t}`li2021prefix` say 0.1%; a prefix
        is 2·layers·d parameters a token.""",
    "What does not come out": """
        Figures for GPT-3 in Tables 4 and 15 of {cite:t}`hu2021lora` that no counting we
        know gives. No test compares ours with these. For PreLayer ours is the formula
        of the paper's section 5.1, layers·d·tokens.""",
}

NOTES = {
    "roberta": """
        The paper's text says 125M and 355M, to which 124.65M and 355.36M do round. The
        table adds a decimal that the number does not have.""",
    "deberta-xxl": "The model is known as 1.5B; 1,564,549,632 is 1,564.5M.",
    "gpt2": """
        The paper's counts were wrong, as the README of the published code says. The
        weights hold 124M, 355M and 774M.""",
    "gpt2-m": """
        354,823,168 is 354.82M, one digit away from the 354.92M that is printed.""",
    "llama-65b": "65.29 is cut off after one decimal; it rounds to 65.3.",
    "deberta-rank": """
        96·2·1,536·16 = 4,718,592, so Table 2 used r=16. Table 10 says r=8, which would
        be 2,359,296.""",
    "tenth": """
        0.1% of 354.92M is 0.35M, and of 774.03M it is 0.77M: this looks like the share
        that prefix tuning is known for, not like a count. LoRA was given r=4 to match
        it (the caption of Table 18), which is 24·16·1,024 = 393,216 and 36·16·1,280 =
        737,280.""",
    "top2": """
        25,192,448 is 24.03 times 1,048,576: probably a million as memory counts it.""",
    "cut": """
        Cut off, not rounded: 18,874,368 is 18.9M or 19M, 301,989,888 is 302.0M. In
        Table 15 the adapters' figures are rounded, LoRA's are cut off.""",
    "twice-cut": """
        384·2·12,288·64 = 603,979,776, which is 604.0M. 603.8M is twice the 301.9M that
        was cut off.""",
    "four": """
        Four matrices at r=2 are 384·2·12,288·2 = 18,874,368. The 37.7M belong to r=4,
        as in Table 15.""",
    "fold": """
        174,604,259,328 / 18,874,368 = 9,251×, and with the paper's own 175,255.8M it is
        9,285×. Both are 10,000× in one digit.""",
    "cut-sum": "37,748,736 + 12·12,288 = 37,896,192, cut off.",
    "tutorial": """
        4,194,304 / 6,738,415,616 = 0.0622%, and the other way round it is 1,607×.
        "1,000 times fewer" and "7B to about 5M" are said of this setting, the one of
        many tutorials.""",
    "range": """
        159,907,840 / 6,738,415,616 = 2.37%. At the other end, GPT-3 with r=1 is
        4,718,592 / 174,604,259,328 = 0.0027%. "LoRA trains 0.1 to 2%" leaves out the
        rank and the targets.""",
    "with-norms": """
        LoRA is 8,847,360. The authors' configuration trains T5's 122 norms along:
        122·2,048 = 249,856, together 9,097,216.""",
    "half-rank": """
        29,097,984 of 8,059,359,232 is 0.361%. 0.35% is the share of LoRA at that rank:
        28,311,552 of 8,058,572,800 is 0.351%.""",
    "vera-cut": """
        Cut off, not rounded: 24·2·768 = 36,864 is 36.9K, 24·(768 + 1) = 18,456 is
        18.5K, and so on.""",
    "vera-16": """
        48·(1,024 + 16) = 49,920 is 49.9K. The 49.5K belong to r=8: 48·(1,024 + 8) =
        49,536.""",
    "vera-shared": """
        192·(12,288 + 16) = 2,362,368 and 192·(12,288 + 256) = 2,408,448 train. With the
        frozen, shared A and B, 2·16·12,288 = 393,216 and 2·256·12,288 = 6,291,456, they
        are 2,755,584 and 8,699,904. RoBERTa's rows do not count A and B.""",
    "mebi": """
        24·(2·64·1,024 + 1,024 + 64) = 3,171,840 and twice that, by the paper's own
        formula: 3.2M and 6.3M. In units of 1,048,576 they are 3.02 and 6.05, so
        probably a million as memory counts it.""",
    "one-percent": """
        894,528 of 109,482,240 is 0.817%, 1,789,056 of 109,482,240 is 1.634%. "Adapters
        train 1 to 2%" is said of this; {cite:t}`houlsby2019adapters` report 0.5 to 8%,
        and train the norms too.""",
    "bitfit": """
        102,912 of 109,482,240 is 0.0940%, 272,384 of 335,141,888 is 0.0813%.""",
    "two-biases": """
        12·(768 + 3,072) = 46,080, and 46,080 of 109,482,240 is 0.042%.""",
    "ia3-cut": """
        24·(2·2,048 + 5,120) + 24·(4·2,048 + 5,120) = 540,672, cut off; the decoder has
        two attentions.""",
    "swapped": """
        20·512 = 10,240: two digits changed places. The paper's total carries the slip,
        76,961,152 + 10,420 = 76,971,572; its share does not.""",
    "nine": "102,400 of 783,252,480 is 0.01307%: a 9 for a 3.",
    "tenfold": """
        11,135,332,352 + 204,800 = 11,135,537,152. The paper's total is 2,048,000 above
        the model, which is ten times the prompt.""",
    "xl-cut": """
        40,960 of 2,849,798,144 is 0.001437% and 204,800 of 2,849,961,984 is 0.007186%:
        both cut off.""",
    "forty": """
        40·12,288 = 491,520, which is 0.5M. 0.4M is 0.49 cut off, or the first 32 tokens
        alone, 393,216.""",
    "stacks-cut": "2·100·2,048 = 409,600, cut off.",
    "mlp": """
        10·1,024 + 1,024·512 + 512 + 512·49,152 + 49,152 = 25,750,016 while training,
        fifty times the prefix. Only the 491,520 stay.""",
    "gpt3-all": """
        50,257 tokens, 2,048 positions and 96 layers are 174,604.3M; with an output head
        of its own, 50,257·12,288 more, it would be 175,221.8M.""",
    "gpt3-biases": """
        Query, key, value, output and the MLP have 3 + 1 + 4 + 1 times 12,288 biases in
        a layer, its two norms 2 times, and one norm ends the model: (96·11 + 1)·12,288
        = 12,988,416. With 12 instead of 11 it is 14.2M: 96·12·12,288 = 14,155,776.""",
    "prelayer": """
        The formula gives 96·12,288·n for n tokens: 4,718,592 for 4, 9,437,184 for 8,
        18,874,368 for 16, 42,467,328 for 36 and 75,497,472 for 64. What is printed is 1
        to 8% more.""",
    "prelayer-sum": "37,748,736 + 96·12,288·12 = 51,904,512.",
}
