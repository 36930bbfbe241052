"""Many LoRA adapters on one base, each request of a batch with its own.

    python 19_serve.py --adapters fi tr --prompt "A prompt like those"
    python 19_serve.py --adapters fi tr --requests requests.jsonl

requests.jsonl has one request a row, {"prompt": "...", "adapter": "fi"}. An
adapter goes by its folder's name; a request without one is answered by the
base. All requests of a file are one batch. The base may be packed into 4 bits;
nothing is merged, and no weight of it is touched. Plain LoRA on linear layers.

Each row of a batch gets a copy of its adapter's factors: 2.7 GB for 32 rows on
an 8B model at rank 16. For large batches use a server with its own kernels.
"""

import json
from contextlib import contextmanager
from pathlib import Path

import torch
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
        self.layers = {}  # {path: Slots}
        self.numbers = {None: 0}  # no name: the base alone

    @contextmanager
    def using(self, names):
        """Inside, row i of a batch is answered with the adapter names[i]."""
        unknown = [n for n in names if n not in self.numbers]
        if unknown:
            raise ValueError(f"no adapter is named {unknown[0]!r}")
        which = torch.tensor([self.numbers[n] for n in names])
        try:
            for slots in self.layers.values():
                slots.choose(which.to(slots.A.device))
            yield self.model
        finally:
            for slots in self.layers.values():
                slots.choose(None)


def read(folder, model):
    """A plain LoRA's folder -> {path: (A, B)}, the scaling put into B."""
    config = json.loads(Path(folder, "adapter_config.json").read_text("utf8"))
    tensors = load_file(Path(folder, "adapter_model.safetensors"))
    plain = (".lora_A.weight", ".lora_B.weight")
    odd = [n for n in ("use_dora", "alpha_pattern") if config.get(n)]
    odd += [n for n in tensors if not n.endswith(plain)]
    odd += [] if config.get("peft_type") == "LORA" else ["peft_type"]
    if odd:
        raise ValueError(f"{folder} is no plain LoRA: {odd[0]}")
    its = config.get("base_model_name_or_path")
    ours = model.config.name_or_path
    if Path(its or "").name != Path(ours).name:
        raise ValueError(f"{folder} is for the base {its}, this is {ours}")
    factors, power = {}, 0.5 if config.get("use_rslora") else 1
    for name, A in tensors.items():
        front, found, _ = name.partition(".lora_A.")
        if found:
            B = tensors[f"{front}.lora_B.weight"].float()
            path = front.removeprefix("base_model.model.")
            scaling = config["lora_alpha"] / len(A) ** power
            factors[path] = A.float(), scaling * B
    return factors


def put(server, name, factors):
    """Put {path: (A, B)} into a free slot. Or raise, and change nothing."""
    free = set(range(server.size + 1)) - set(server.numbers.values())
    if name in server.numbers or not free:
        raise ValueError(f"{name!r} is taken" if free else "no slot is free")
    linears = {}
    for path, m in server.model.named_modules():
        if isinstance(m, torch.nn.Linear):
            linears[path] = m, (m.out_features, m.in_features)
    for path, (A, B) in factors.items():
        _, shape = linears.get(path, (None, None))
        if len(A) > server.r or (len(B), A.shape[1]) != shape:
            raise ValueError(f"{name!r} does not fit: {path}, rank {len(A)}")
    k, dtype = min(free), server.model.dtype
    for path, (A, B) in factors.items():
        if path not in server.layers:
            new = Slots(linears[path][0], server.r, server.size, dtype)
            server.layers[path] = new
        server.layers[path].A[k, : len(A)] = A  # a lower rank leaves zeros
        server.layers[path].B[k, :, : len(A)] = B
    server.numbers[name] = k


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


def main(args):
    base, tokenizer = qlora_llm.load(args.model)
    adapters = {Path(f).resolve().name: f for f in args.adapters}
    if len(adapters) < len(args.adapters):
        raise SystemExit("two of the adapters' folders have one name")
    requests = [{"prompt": args.prompt, "adapter": n} for n in adapters]
    requests += [{"prompt": args.prompt}]
    if args.requests:
        rows = Path(args.requests).read_text("utf8").splitlines()
        requests = [json.loads(row) for row in rows]
    try:
        factors = {n: read(f, base) for n, f in adapters.items()}
        r = max(len(A) for f in factors.values() for A, _ in f.values())
        server = Server(base, r, len(factors))
        for name in factors:
            put(server, name, factors[name])
        names = [request.get("adapter") for request in requests]
        texts = [qlora_llm.chat(tokenizer, q["prompt"]) for q in requests]
        answers = answer(server, tokenizer, texts, names, args.tokens)
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(str(error)) from None
    for name, text in zip(names, answers, strict=True):
        print(f"{name or 'none'}: {text}")


if __name__ == "__main__":
    parser = qlora_llm.options()
    parser.add_argument("--adapters", nargs="+", required=True)
    parser.add_argument("--requests", help="a file, one request a row")
    main(parser.parse_args())
