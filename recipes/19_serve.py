"""Many LoRA adapters on one base, each request of a batch with its own.

    python 19_serve.py --adapters fi tr --prompt "A prompt like those"
    python 19_serve.py --adapters fi tr --requests requests.jsonl

requests.jsonl has one request a row, {"prompt": "...", "adapter": "fi"}. An
adapter goes by its folder's name; a request without one is answered by the
base. All requests of a file are one batch, and then the script ends: it is no
service that waits for requests. Keep qlora_llm.py beside it. The base may be
packed into 4 bits; nothing is merged, and no weight of it is touched. Plain
LoRA on linear layers, one batch at a time.

Each row of a batch gets a copy of its adapter's factors: 2.7 GB for 32 rows on
an 8B model at rank 16. For large batches use a server with its own kernels.
"""

import json
import threading
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

import qlora_llm


class Slots:
    """One layer's adapters: A[k] and B[k] are number k's, A[0] is zeros."""

    def __init__(self, linear, r, size, dtype):
        new = dict(dtype=dtype, device=linear.weight.device)
        self.A = torch.zeros(size + 1, r, linear.in_features, **new)
        self.B = torch.zeros(size + 1, linear.out_features, r, **new)
        self.a = self.b = None
        linear.register_forward_hook(self.add)

    def choose(self, which):
        """Gather each row's factors, once for a whole answer."""
        self.a = self.b = None
        if which is not None:
            self.a = self.A[which].mT.contiguous()  # (batch, in, r)
            self.b = self.B[which].mT.contiguous()  # (batch, r, out)

    def add(self, linear, inputs, y):
        if self.a is None:
            return y
        x = inputs[0].to(self.a.dtype)  # (batch, t, in)
        if len(x) != len(self.a):
            raise ValueError(f"{len(x)} rows, but {len(self.a)} names")
        low = torch.bmm(x, self.a)  # (batch, t, r)
        return torch.baddbmm(y.to(low.dtype), low, self.b).to(y.dtype)


class Server:
    """A model and up to `size` adapters, of rank r at most."""

    def __init__(self, model, r=8, size=8):
        self.model, self.r, self.size = model, r, size
        self.layers, self.numbers = {}, {None: 0}  # None: the base alone
        self.one = threading.Lock()

    @contextmanager
    def using(self, names):
        """Inside, row i of a batch is answered with the adapter names[i]."""
        unknown = [n for n in names if n not in self.numbers]
        if unknown:
            raise ValueError(f"no adapter is named {unknown[0]!r}")
        if not self.one.acquire(blocking=False):
            raise RuntimeError("the last batch is not done: one at a time")
        try:
            which = torch.tensor([self.numbers[n] for n in names])
            for slots in self.layers.values():
                slots.choose(which.to(slots.A.device))
            yield self.model
        finally:
            for slots in self.layers.values():
                slots.choose(None)
            self.one.release()


KNOWN = """r lora_alpha lora_dropout use_rslora init_lora_weights
target_modules exclude_modules peft_type peft_version task_type inference_mode
base_model_name_or_path revision auto_mapping ensure_weight_tying eva_config
fan_in_fan_out layers_pattern loftq_config megatron_core qalora_group_size
runtime_config""".split()
STARTS = (True, False, None, "gaussian", "eva", "orthogonal")


def check(folder, config, ours):
    """Refuse what is more than A, B and a scaling, or for another base."""
    odd = [] if config.get("peft_type") == "LORA" else ["peft_type"]
    for setting, value in config.items():
        unset = value is None or value is False or value in ([], {}, "none")
        odd += [] if unset or setting in KNOWN else [setting]
    if config.get("init_lora_weights", True) not in STARTS:
        odd.append("init_lora_weights")  # some starts change the base itself
    if odd:
        said = f"{odd[0]} is {config.get(odd[0])!r:.80}"
        raise ValueError(f"{folder} is no plain LoRA: {said}")
    its = config.get("base_model_name_or_path") or "(none)"
    hub = [n.count("/") == 1 and not Path(n).exists() for n in (its, ours)]
    last = Path(its).name == Path(ours).name  # all that counts of a folder
    if not (its == ours if all(hub) else last):
        raise ValueError(f"{folder} is for the base {its}, this is {ours}")


def read(folder, model):
    """A plain LoRA's folder -> {path: (A, B)}, the scaling put into B."""
    config = json.loads(Path(folder, "adapter_config.json").read_text("utf8"))
    tensors = load_file(Path(folder, "adapter_model.safetensors"))
    check(folder, config, model.config.name_or_path)
    r, alpha = config.get("r", 8), config.get("lora_alpha", 8)
    power, factors = 0.5 if config.get("use_rslora") else 1, {}
    for name in tensors:
        front, _, end = name.rpartition(".lora_")
        A, B = (tensors.get(f"{front}.lora_{m}.weight") for m in "AB")
        lone = A is None or B is None or end not in ("A.weight", "B.weight")
        if lone or {len(A), B.shape[1]} != {r}:
            raise ValueError(f"{folder}: {name} is not of a pair of rank {r}")
        path = front.removeprefix("base_model.model.")
        factors[path] = A.float(), alpha / r**power * B.float()
    if not factors:
        raise ValueError(f"{folder} holds no tensor")
    return factors


def fits(linear, A, B, r):
    """Whether B A has a linear layer's shape, and a rank of r at most."""
    if not isinstance(linear, torch.nn.Linear):
        return False
    shape = linear.out_features, linear.in_features
    return (len(B), A.shape[1]) == shape and len(A) == B.shape[1] <= r


def put(server, name, factors):
    """Put {path: (A, B)} into a free slot. Or raise, and change nothing."""
    free = set(range(server.size + 1)) - set(server.numbers.values())
    if name in server.numbers:
        raise ValueError(f"{name!r} is taken")
    if not free:
        raise ValueError("no slot is free: remove an adapter first")
    modules = dict(server.model.named_modules())
    for path, (A, B) in factors.items():
        if not fits(modules.get(path), A, B, server.r):
            raise ValueError(f"{name!r} does not fit: {path}, rank {len(A)}")
    k, dtype = min(free), server.model.dtype
    for slots in server.layers.values():
        slots.A[k] = slots.B[k] = 0  # nothing is left of the last adapter
    for path, (A, B) in factors.items():
        if path not in server.layers:
            new = Slots(modules[path], server.r, server.size, dtype)
            server.layers[path] = new
        server.layers[path].A[k, : len(A)] = A  # a lower rank leaves zeros
        server.layers[path].B[k, :, : len(A)] = B
    server.numbers[name] = k


def remove(server, name):
    """Free an adapter's slot; the next `put` clears it."""
    if name is None or name not in server.numbers:
        raise ValueError(f"no adapter is named {name!r}")
    del server.numbers[name]


def answer(server, tokenizer, texts, names, tokens):
    """Greedy answers to a batch; each row with an adapter of its own."""
    tokenizer.padding_side = "left"
    inputs = tokenizer(
        texts, add_special_tokens=False, padding=True, return_tensors="pt"
    )
    inputs.pop("token_type_ids", None)
    inputs = inputs.to(server.model.device)
    with server.using(names) as model:
        out = model.eval().generate(
            **inputs, max_new_tokens=tokens, do_sample=False
        )
    new = out[:, inputs["input_ids"].shape[1] :]
    return tokenizer.batch_decode(new, skip_special_tokens=True)


def requests_of(file):
    """A file's requests, one a row, each with a prompt."""
    rows = Path(file).read_text("utf8").split("\n")
    requests = [json.loads(row) for row in rows if row.strip()]
    for k, request in enumerate(requests, 1):
        if not isinstance(request, dict) or "prompt" not in request:
            raise ValueError(f"{file}: request {k} has no prompt")
    return requests


def main(args):
    base, tokenizer = qlora_llm.load(args.model)
    adapters = {Path(f).resolve().name: f for f in args.adapters}
    if len(adapters) < len(args.adapters):
        raise SystemExit("two of the adapters' folders have one name")
    requests = [{"prompt": args.prompt, "adapter": n} for n in adapters]
    requests += [{"prompt": args.prompt}]
    try:
        if args.requests:
            requests = requests_of(args.requests)
        factors = {n: read(f, base) for n, f in adapters.items()}
        r = max(len(A) for f in factors.values() for A, _ in f.values())
        server = Server(base, r, len(factors))
        for name in factors:
            put(server, name, factors[name])
        names = [request.get("adapter") for request in requests]
        texts = [qlora_llm.chat(tokenizer, q["prompt"]) for q in requests]
        answers = answer(server, tokenizer, texts, names, args.tokens)
    except (ValueError, FileNotFoundError, SafetensorError) as error:
        raise SystemExit(str(error)) from None
    for name, text in zip(names, answers, strict=True):
        print(f"{name or 'none'}: {text}")


if __name__ == "__main__":
    parser = qlora_llm.options()
    parser.add_argument("--adapters", nargs="+", required=True)
    parser.add_argument("--requests", help="a file, one request a row")
    main(parser.parse_args())
