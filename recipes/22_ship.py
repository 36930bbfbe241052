"""A trained adapter made ready for strangers: checked, measured, described.

    python 22_ship.py --out my-adapter --data held-out.jsonl --licence mit \\
        --model meta-llama/Llama-3.1-8B-Instruct --base-licence llama3.1 \\
        --revision 0e9e39f249a16976918f6564b8830bc894c89659
    python 22_ship.py --out my-adapter --verify

--revision is the commit of the base on the hub that you trained beside: 40
digits, never "main", which moves. The base is loaded at that commit, answers
the held-out records with the adapter and without, and README.md is written
from what it scored: the licences, the scores, and the SHA-256 of both files.
--verify compares these with the files. It finds damage; someone who changes a
file on purpose can change the card too.
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


def sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write(path, text):
    """The whole text, or the file as it was."""
    draft = path.with_name(f".{path.name}.draft")
    with open(draft, "w", encoding="utf8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, path)


def score(model, tokenizer, args):
    """The share of the records that are answered to the letter."""
    rows = Path(args.data).read_text("utf8").splitlines()
    right = 0
    for record in map(json.loads, rows):
        args.prompt = record["prompt"]
        found = qlora_llm.answer(model, tokenizer, args).strip()
        right += found == record["answer"].strip()
    return right / len(rows), len(rows)


def describe(args, config, with_adapter, without, n):
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
    return ModelCard(f"""---
{about.to_yaml()}
---
# {Path(args.out).resolve().name}

{config["peft_type"]} of rank {config.get("r")} beside `{args.model}`, commit
`{args.revision}`.

| {n} held-out records | right to the letter |
|---|--:|
| with the adapter | {with_adapter:.3f} |
| without it | {without:.3f} |

Licences: adapter {args.licence}, base {args.base_licence}, data
{args.data_licence}. Made with peft {version("peft")}, transformers
{version("transformers")}, torch {version("torch")}.

SHA-256:

{files}
""")


def ship(args):
    if not re.fullmatch("[0-9a-f]{40}", args.revision):
        raise SystemExit("--revision is a commit: 40 digits, not a branch")
    config = check(args.out)
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
    on, n = score(model, tokenizer, args)
    with model.disable_adapter():
        off, _ = score(model, tokenizer, args)

    name = args.base_name or args.model
    config |= dict(base_model_name_or_path=name, revision=args.revision)
    write(Path(args.out, CONFIG), json.dumps(config, indent=2) + "\n")
    args.model = name
    card = describe(args, config, on, off, n)
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
    for whose in ("--licence", "--base-licence", "--data-licence"):
        parser.add_argument(whose, default="unknown")
    args = parser.parse_args()
    verify(args.out) if args.verify else ship(args)
