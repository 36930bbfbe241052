"""A trained adapter made ready for strangers: checked, measured, described.

    python 22_ship.py --out my-adapter --data records.jsonl \\
        --held-out held-out.jsonl --steps 500 --rate 2e-4 --seed 42 \\
        --model Qwen/Qwen2.5-7B-Instruct --base-licence apache-2.0 \\
        --revision a09a35458c702b33eeacc393d103063234e8bc28 \\
        --licence apache-2.0 --data-licence cc-by-4.0
    python 22_ship.py --out my-adapter --verify

--revision is the commit of the base on the hub that you trained beside: 40
digits, never "main", which moves. A config that names another commit is
refused. The base answers the held-out records with the adapter and without;
--data is the file that was trained on, and a held-out prompt that is in it is
refused. README.md is written from what was scored: no row of it stays blank,
what is not known is left out. --verify compares the SHA-256 of both files with
the card's. It finds damage; someone who changes a file on purpose can change
the card too.
"""

import hashlib
import json
import os
import re
from importlib.metadata import version
from pathlib import Path

import torch
from huggingface_hub import ModelCard, ModelCardData
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import qlora_llm

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
RUNS_CODE = (".bin", ".pt", ".pth", ".pkl", ".ckpt", ".py")
COMMIT = re.compile("[0-9a-f]{40}")


def check(folder):
    """The config of a folder that is fit to ship; else SystemExit says why."""
    for name in (CONFIG, WEIGHTS):
        if not Path(folder, name).is_file():
            raise SystemExit(f"{folder} has no {name}")
    names = sorted(path.name for path in Path(folder).rglob("*"))
    if code := [name for name in names if name.endswith(RUNS_CODE)]:
        raise SystemExit(f"{code[0]} may run code where it is loaded: not it")

    tensors = load_file(Path(folder, WEIGHTS))
    for name, t in tensors.items():
        if not t.isfinite().all():
            raise SystemExit(f"{name} holds NaN or infinity")
    ends = [t for name, t in tensors.items() if ".lora_B." in name]
    if ends and not any(t.any() for t in ends):
        raise SystemExit("B is zero in all layers: it was never trained")
    return json.loads(Path(folder, CONFIG).read_text("utf8"))


def about_the_base(args, config):
    """What is known of the base's commit; SystemExit for another's."""
    folder, name = Path(args.model), args.base_name or args.model
    if folder.is_dir() and not args.base_name:
        raise SystemExit("--model is a folder: give its hub name, --base-name")
    named = config.get("base_model_name_or_path") or name
    if named not in (args.model, name) and not Path(named).is_absolute():
        raise SystemExit(f"the adapter's config names the base {named}")
    saved = config.get("revision") or "main"
    if saved not in ("main", args.revision):
        raise SystemExit(f"the adapter's config names the commit {saved}")

    if not folder.is_dir():
        words = "Scored beside the hub's files at this commit."
    elif folder.resolve().name == args.revision:  # snapshots/COMMIT
        words = "Scored beside this commit as it lies in the hub's cache."
    elif COMMIT.fullmatch(folder.resolve().name):
        raise SystemExit(f"{folder} is the hub's cache of another commit")
    else:
        words = "Scored beside a folder, whose commit was not checked."
    if saved == "main":
        words += " The adapter was saved without a commit."
    return words


def records(file, keys):
    """The rows of a file, objects with a text under each of the keys."""
    try:
        rows = Path(file).read_text("utf8").split("\n")
        found = [json.loads(row) for row in rows if row.strip()]
    except (OSError, ValueError) as error:
        raise SystemExit(f"{file} cannot be read: {error}") from None
    for number, row in enumerate(found, 1):
        texts = row if isinstance(row, dict) else {}
        for key in keys:
            if not isinstance(texts.get(key), str):
                raise SystemExit(f"{file}: record {number} has no {key}")
    return found


def held_out(args):
    """The held-out records, and the number of those that were trained on."""
    for name in ("data", "held_out"):
        if not getattr(args, name):
            raise SystemExit(f"give a file as --{name.replace('_', '-')}")
    rows = records(args.held_out, ("prompt", "answer"))
    trained = records(args.data, ("prompt",))
    seen = {record["prompt"].strip() for record in trained}
    both = sum(record["prompt"].strip() in seen for record in rows)
    if both or not rows:
        raise SystemExit(
            f"{both} of the {len(rows)} held-out prompts are in {args.data}"
        )
    return rows, len(trained)


def training(args, config, n):
    """What is known of the training: {what: value}."""
    found = {"records": n, "file's SHA-256": f"`{sha256(args.data)}`"}
    file = Path(args.out, "trainer_state.json")
    state = json.loads(file.read_text("utf8")) if file.is_file() else {}
    logs = state.get("log_history", ())
    rates = [row.get("learning_rate", 0) for row in logs]
    found |= {
        "epochs": args.epochs or state.get("num_train_epochs"),
        "steps": args.steps or state.get("global_step"),
        "learning rate": args.rate or max(rates, default=None),
        "seed": args.seed,
        "saved by peft": config.get("peft_version"),
    }
    lost = [what for what, value in found.items() if value is None]
    if lost:
        print("not in the card, for nobody said it:", ", ".join(lost))
    return {what: value for what, value in found.items() if value is not None}


def sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write(path, text):
    """The whole text, or the file as it was."""
    draft = path.with_name(f".{path.name}.draft")
    try:
        with open(draft, "w", encoding="utf8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def score(model, tokenizer, args, rows):
    """The share of the records that are answered to the letter."""
    right = 0
    for record in rows:
        args.prompt = record["prompt"]
        found = qlora_llm.answer(model, tokenizer, args).strip()
        right += found == record["answer"].strip()
    return right / len(rows)


def describe(args, config, scores, n, trained, base):
    """The card: what a stranger needs, in front what the hub can sort by."""
    hashes = {name: sha256(Path(args.out, name)) for name in (CONFIG, WEIGHTS)}
    about = ModelCardData(
        base_model=args.model,
        base_model_relation="adapter",
        library_name="peft",
        license=args.licence,
        sha256=hashes,
    )
    files = "\n".join(f"- `{name}`: `{h}`" for name, h in hashes.items())
    facts = "\n".join(f"| {what} | {x} |" for what, x in trained.items())
    return ModelCard(f"""---
{about.to_yaml()}
---
# {Path(args.out).resolve().name}

{config["peft_type"]} of rank {config.get("r")} beside `{args.model}`, commit
`{args.revision}`. {base}

| {n} held-out records | right to the letter |
|---|--:|
| with the adapter | {scores[0]:.3f} |
| without it | {scores[1]:.3f} |

None of their prompts is in the training file.

| training | value |
|---|---|
{facts}

Licences: adapter {args.licence}, base {args.base_licence}, data
{args.data_licence}. Scored with peft {version("peft")}, transformers
{version("transformers")}, torch {version("torch")}.

SHA-256:

{files}
""")


def ship(args):
    if not COMMIT.fullmatch(args.revision):
        raise SystemExit("--revision is a commit: 40 digits, not a branch")
    config = check(args.out)
    words = about_the_base(args, config)
    rows, n = held_out(args)
    base = AutoModelForCausalLM.from_pretrained(
        args.model,
        revision=args.revision,
        dtype=torch.bfloat16,
        device_map=qlora_llm.DEVICE,
        use_safetensors=True,
        trust_remote_code=False,
    )
    tokenizer = AutoTokenizer.from_pretrained(
        args.model, revision=args.revision, trust_remote_code=False
    )
    model = PeftModel.from_pretrained(base, args.out)
    on = score(model, tokenizer, args, rows)
    with model.disable_adapter():
        off = score(model, tokenizer, args, rows)

    trained = training(args, config, n)
    args.model = args.base_name or args.model
    about = dict(base_model_name_or_path=args.model, revision=args.revision)
    write(Path(args.out, CONFIG), json.dumps(config | about, indent=2) + "\n")
    card = describe(args, config, (on, off), len(rows), trained, words)
    write(Path(args.out, "README.md"), str(card))
    print(f"{args.out}: {on:.3f} with the adapter, {off:.3f} without")


def verify(folder):
    check(folder)
    said = ModelCard.load(Path(folder, "README.md")).data.to_dict()
    for name in (CONFIG, WEIGHTS):
        if said.get("sha256", {}).get(name) != sha256(Path(folder, name)):
            raise SystemExit(f"{name} is not the file that the card describes")
    print(f"{folder}: both files are those that the card describes")


if __name__ == "__main__":
    parser = qlora_llm.options()
    parser.add_argument("--verify", action="store_true")
    parser.add_argument("--revision", default="main")
    parser.add_argument("--base-name", help="on the hub, if --model is a path")
    parser.add_argument("--held-out", help="records that were not trained on")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--seed", type=int)
    for whose in ("--licence", "--base-licence", "--data-licence"):
        parser.add_argument(whose, default="unknown")
    parser.set_defaults(data=None, epochs=None, rate=None)  # no guesses
    args = parser.parse_args()
    verify(args.out) if args.verify else ship(args)
