"""The memory calculator to click through: what training takes, without a kernel.

What `python -m peftlab.memory` counts for common models, in the page, from the table
that Python reads too (peftlab/memory/table.json). `calculator.js` runs in the page and
fetches nothing; a reader without JavaScript has a table of common cases.

    calculator.show()              # in a notebook

The page book/memory.md shows what it made in chapter 15.
"""

from html import escape
from pathlib import Path

from IPython.display import HTML

from peftlab.memory import table

SCRIPT = Path(__file__).with_suffix(".js")
METHODS = {
    "full": "Full fine-tuning, float32",
    "lora": "LoRA, base in bfloat16",
    "lora8bit": "LoRA, base in 8 bits",
    "qlora": "QLoRA, base in 4 bits",
    "inference": "Inference only, bfloat16",
}
OPTIMIZERS = {"adamw": "AdamW", "adamw8bit": "8-bit Adam"}
LEVELS = {
    0: "none: each GPU holds all",
    1: "1: optimizer divided",
    2: "2: and gradients",
    3: "3: and weights (FSDP)",
}
RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
LENGTHS = (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
BATCHES = (1, 2, 4, 8, 16, 32, 64)
GPUS = (1, 2, 4, 8, 16, 32, 64)
START = dict(
    model="llama-2-7b",
    method="qlora",
    r=16,
    seq=512,
    batch=4,
    optimizer="adamw",
    checkpointing=True,
    kbit=False,
    gpus=1,
    zero=0,
)
# What the table without JavaScript has.
COMMON = ("qwen2.5-0.5b", "llama-2-7b", "llama-3-8b", "llama-2-13b", "llama-2-70b")
PARTS = {  # and its colour
    "weights": "grey, #6b7682",
    "gradients": "orange, #c8500f",
    "optimizer": "purple, #8a21a8",
    "activations": "blue, #1261dc",
}
STYLE = """
.calculator-live, .calculator-controls { display: grid; gap: 0.5rem 1.5rem; }
.calculator-controls { align-items: end;
  grid-template-columns: repeat(auto-fill, minmax(min(13rem, 100%), 1fr)); }
.calculator [hidden] { display: none; }
.calculator label { display: block; margin: 0; }
.calculator select { display: block; width: 100%; margin: 0; padding: 0.3rem;
  font: inherit; border: 1px solid; border-radius: 0.3rem; background: transparent;
  color: inherit; }
.calculator select:disabled { opacity: 0.5; }
.calculator option { background: #fefefe; color: #1f2933; }
.calculator input { width: 1.1rem; height: 1.1rem; margin: 0 0.3rem 0 0;
  vertical-align: -0.15rem; accent-color: var(--fig-orange, #c8500f); }
.calculator :is(select, input):focus-visible { outline: 3px solid;
  outline-offset: 2px; }
.calculator p { margin: 0.3rem 0; }
.calculator .bar { display: flex; height: 1.8rem; border: 1px solid;
  border-radius: 0.3rem; overflow: hidden; }
.calculator table { width: 100%; font-size: 0.9rem; }
.calculator :is(td, th) { padding: 0.1rem 0.3rem; text-align: right; }
.calculator th[scope=row] { text-align: left; font-weight: normal; }
.calculator .calculator-parts { max-width: 20rem; margin: 0.5rem 0; }
.calculator-wide { overflow-x: auto; }
.calculator th i { display: inline-block; width: 0.8rem; height: 0.8rem;
  margin-right: 0.5rem; }
"""


def show(start=None):
    """The calculator, with controls where there is JavaScript.

    Args:
        start: {setting: value} in place of those of `START`.

    Returns:
        An IPython `HTML` object.

    Raises:
        ValueError: for a setting or a value that is not among the choices.
    """
    chosen = START | (start or {})

    controls = [
        _menu("model", "Model", {name: name for name in table.content()["models"]}),
        _menu("method", "Method", METHODS),
        _menu("r", "Rank r", {r: r for r in RANKS}),
        _menu("seq", "Tokens of a sequence", {n: f"{n:,}" for n in LENGTHS}),
        _menu("batch", "Batch, on each GPU", {n: n for n in BATCHES}),
        _menu("optimizer", "Optimizer", OPTIMIZERS),
        _menu("gpus", "GPUs", {n: n for n in GPUS}),
        _menu("zero", "ZeRO level", LEVELS),
        _box("checkpointing", "Activation checkpointing"),
        _box("kbit", "Prepared for k-bit training"),
    ]

    names = [name for name, _ in controls]
    for name in chosen:
        if name not in names:
            raise ValueError(f"no setting {name!r:.60}; there are: {', '.join(names)}")
    live = "\n".join(draw(chosen[name]) for name, draw in controls)

    bar = "".join(f'<span class="{part}"></span>' for part in PARTS)
    parts = "\n".join(
        f'<tr><th scope="row"><i class="{part}" aria-hidden="true"></i>{part}</th>'
        f'<td class="{part}"></td></tr>'
        for part in PARTS
    )
    colors = "\n".join(
        f".calculator :is(i, span).{part} {{ background: var(--fig-{color}); }}"
        for part, color in PARTS.items()
    )

    return HTML(
        f"""<div class="calculator">
<style>{STYLE}{colors}
</style>
<div class="calculator-live" hidden>
<div class="calculator-controls">
{live}
</div>
<p role="status"></p>
<div>
<div class="bar" aria-hidden="true">{bar}</div>
<p class="scale"></p>
<table class="calculator-parts">
{parts}
</table>
</div>
</div>
<details open><summary>Common cases as a table</summary>
{_common()}
</details>
<script type="application/json">{table.FILE.read_text("utf8")}</script>
<script>{SCRIPT.read_text("utf8")}</script>
</div>"""
    )


def _menu(name, label, choices):
    """A control's name, and a function that draws it with a value chosen."""

    def draw(chosen):
        if chosen not in choices:
            known = ", ".join(map(str, choices))
            raise ValueError(f"no {name} {chosen!r:.60}; there are: {known}")
        options = "".join(
            f'<option value="{value}"{" selected" if value == chosen else ""}>'
            f"{escape(str(text))}</option>"
            for value, text in choices.items()
        )
        menu = f'<select name="{name}" autocomplete="off">{options}</select>'
        return f"<label>{label} {menu}</label>"

    return name, draw


def _box(name, label):
    def draw(chosen):
        on = " checked" if chosen else ""
        tick = f'<input type="checkbox" name="{name}" autocomplete="off"{on}>'
        return f"<label>{tick}{label}</label>"

    return name, draw


def _common():
    """A table of totals in GB, of common models and every method."""
    heads = "".join(f'<th scope="col">{text}</th>' for text in METHODS.values())
    rows = [f'<tr><th scope="col">model</th>{heads}</tr>']
    for model in COMMON:
        cells = ""
        for method in METHODS:
            settings = dict(seq=512, batch=4, checkpointing=method != "inference")
            total = table.lookup(model, method, **settings)["total"]
            cells += f"<td>{total / 1e9:.1f}</td>"
        rows.append(f'<tr><th scope="row">{model}</th>{cells}</tr>')
    lines = "\n".join(rows)
    return f"""<p>GB on one GPU: four sequences of 512 tokens, rank 16, AdamW,
activation checkpointing.</p>
<div class="calculator-wide" tabindex="0" role="region" aria-label="Common cases">
<table>
{lines}
</table>
</div>"""
