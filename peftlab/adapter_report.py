r"""What an adapter's folder holds, and what is wrong with it: `peft_files.inspect`.

Nothing is loaded into a model. The config is read as JSON, the tensors one by one, only
to see whether they are zero, NaN or infinite; pickle is never opened. Every fault is
one sentence. All that comes from a file is shown as Python's `repr` shows it, and cut,
so that no control character reaches a terminal.

    python -m peftlab.peft_files FOLDER
"""

import contextlib
import json
import math
import os
import re
import subprocess
import sys
from collections import defaultdict
from dataclasses import dataclass
from typing import NamedTuple

import safetensors

from . import adapter_folder, peft_files, surgery

PICKLE = "adapter_model.bin"
WHOLE = {"model.safetensors", "pytorch_model.bin", "model.safetensors.index.json"}
LARGEST_HEADER = 100_000_000  # bytes, safetensors' own limit
AT_A_TIME = 2**22  # entries of a tensor that are looked at together
PATIENCE = 10  # seconds for a regular expression
LEAVES = {  # how an adapter's tensor is named in a file, and here
    theirs: ours
    for method in peft_files.METHODS.values()
    for ours, theirs in method.keys.items()
}
LEAVES |= dict(lora_embedding_A="lora_A", lora_embedding_B="lora_B")
NAMES = {  # of the methods by peft's types: LORA is LoRA, which comes first
    method.peft_type: name for name, method in reversed(peft_files.METHODS.items())
}
WRAPPERS = {  # what each puts into a name, and a pattern of it where it may stand
    "torch.compile": ("_orig_mod.", r"\b()_orig_mod\."),
    "FSDP": ("_fsdp_wrapped_module.", r"\b()_fsdp_wrapped_module\."),
    "a checkpoint wrapper": (
        "_checkpoint_wrapped_module.",
        r"\b()_checkpoint_wrapped_module\.",
    ),
    "DataParallel or DistributedDataParallel": (
        "module.",
        r"^((?:base_model\.)?(?:model\.)?)module\.",
    ),
}


@dataclass(frozen=True)
class Report:
    """What `peft_files.inspect` found. `str` tells it all; `bool` is `ok`.

    `r`, `alpha` and `scaling` are None for a method that has none, and all but
    `folder` and `problems` where the folder did not say.
    """

    folder: str
    problems: tuple = ()  # a sentence for each fault
    notes: tuple = ()  # what is no fault, and may surprise
    method: str | None = None
    r: int | None = None
    alpha: float | None = None
    scaling: float | None = None
    targets: tuple = ()
    layers: int = 0
    parameters: int = 0  # in all tensors of the file, heads too
    nbytes: int = 0  # of adapter_model.safetensors
    base: str | None = None  # the base model that the config names
    heads: tuple = ()  # modules saved whole

    @property
    def ok(self):
        return not self.problems

    def __bool__(self):
        return self.ok

    def __str__(self):
        method = self.method or "no adapter that can be read"
        rows = [f"{_shown(self.folder)}: {method}"]
        if self.r is not None:
            scaling = ""
            if self.scaling is not None:
                scaling = f", alpha {self.alpha:g}"
                scaling += f", the change is scaled by {self.scaling:g}"
            rows.append(f"  rank {self.r}{scaling}")

        if self.targets:
            rows.append(f"  on {_listed(self.targets)}")
        if self.heads:
            rows.append(f"  saved whole: {_listed(self.heads)}")
        if self.parameters:
            layers = f"{self.layers} layers, " if self.layers else ""
            size = f"{self.parameters:,} parameters, {self.nbytes:,} bytes"
            rows.append(f"  {layers}{size}")
        if self.method:
            base = _shown(self.base) if self.base else "not named"
            rows.append(f"  base model: {base}")

        rows += [f"  note: {note}" for note in self.notes]
        rows += [f"wrong: {problem}" for problem in self.problems]
        return "\n".join(rows if self.problems else [*rows, "nothing wrong was found"])


class Tensor(NamedTuple):
    """What we know of a tensor that was read."""

    shape: tuple
    floats: bool  # whether its numbers are floating-point ones
    ends: set  # the least and the largest number of each piece


def report(folder, model=None):
    """The `Report` on a folder: see `peft_files.inspect`."""
    path = adapter_folder._path(folder)
    if not os.path.isdir(path):
        raise ValueError(f"there is no folder {_shown(str(folder))}")
    if model is not None:
        model = surgery.uncompiled(model)
        surgery.refuse_containers(model)

    seen = Inspection(path, model)
    try:
        with adapter_folder._alone_in(path):
            seen.read()
    except OSError as error:
        seen.wrong(f"the folder cannot be read: {error.strerror}")
    if seen.tensors:
        seen.check_tensors()
    return seen.report()


class Inspection:
    """One look at one folder: what was read, and the sentences so far."""

    def __init__(self, folder, model):
        self.folder, self.model = folder, model
        self.config = {}
        self.kind = None  # peft_type, a known one
        self.tensors = {}  # {our name: Tensor}
        self.layers = {}  # {path: {leaf: Tensor}}, the adapter's alone
        self.heads = ()  # those that the file holds
        self.metadata = {}
        self.nbytes = 0
        self.problems, self.notes = [], []

    def wrong(self, sentence):
        self.problems.append(sentence)

    def _wrong_tensors(self, found, every, what, why=""):
        if found:
            self.wrong(f"{_count(found, every)} {what}, as in {_shown(found[0])}{why}")

    # The two files

    def read(self):
        names = set(os.listdir(self.folder))
        if not names:
            return self.wrong("the folder is empty")
        self._refuse_unfinished()

        config = self._file(
            adapter_folder.CONFIG, f"there is no {adapter_folder.CONFIG}"
        )
        if config:
            self._read_config(config)
        weights = self._file(adapter_folder.WEIGHTS, _why_no_weights(names))
        if weights:
            self._read_tensors(weights)

    def _refuse_unfinished(self):
        """A save of ours that was killed: `load` reads its files, and peft others."""
        new = self.folder / adapter_folder.NEW
        files = (adapter_folder.CONFIG, adapter_folder.WEIGHTS)
        if any(os.path.lexists(new / name) for name in files):
            self.wrong(
                f"a save was interrupted: peft does not read {adapter_folder.NEW}/, and"
                " `peft_files.load` does; load it so and save it again, if you trust it"
            )

    def _file(self, name, missing):
        """The path of a plain file that has bytes; None for another, which is wrong.

        It is the file that peft would load."""
        path = self.folder / name
        if not os.path.lexists(path):
            self.wrong(missing)
        elif not os.path.isfile(path):  # to open a FIFO would be to wait for ever
            self.wrong(f"{name} is no plain file")
        elif os.path.getsize(path) == 0:
            self.wrong(f"{name} is empty: it has no bytes")
        else:
            return path
        return None

    def _read_config(self, path):
        try:
            with open(path, encoding="utf8") as file:
                config = json.loads(file.read(adapter_folder.LARGEST_CONFIG))
        except (ValueError, RecursionError):
            return self.wrong(f"{path.name} is not valid JSON of at most 10 MB")
        except OSError as error:
            return self.wrong(f"{path.name} cannot be read: {error.strerror}")

        if not isinstance(config, dict):
            return self.wrong(f"{path.name} is JSON, but no object with settings")
        self.config = config
        self._check_settings()

    def _read_tensors(self, path):
        self.nbytes = os.path.getsize(path)
        try:
            if _is_pointer(path):
                return self.wrong(
                    f"{path.name} is a pointer of Git LFS, not the weights: run"
                    " `git lfs pull`"
                )
            short = _missing_bytes(path, self.nbytes)
            if short > 0:
                return self.wrong(f"{path.name} is truncated: it lacks {short:,} bytes")

            with safetensors.safe_open(path, "pt") as file:
                self.metadata = file.metadata() or {}
                raw = {key: _look(file.get_tensor(key)) for key in file.keys()}
        except Exception as error:  # there is no end to what damage brings about
            return self.wrong(f"{path.name} is damaged: {_shown(str(error))}")

        if not raw:
            self.wrong(f"{path.name} holds no tensor: the adapter is empty")
        self.tensors = self._plain_names(raw)

    def _plain_names(self, raw):
        """The tensors by our names. What does not belong into a name is said once."""
        names = {key: key for key in raw}
        for who, (word, part) in WRAPPERS.items():
            wrapped = [key for key, name in names.items() if re.search(part, name)]
            names |= {key: re.sub(part, r"\1", names[key]) for key in wrapped}
            why = (
                f": {who} was around the model or a part of it, and peft finds no such"
                f" layer until {word!r} is taken out of the names"
            )
            self._wrong_tensors(wrapped, raw, "carry a wrapper's name", why)

        adapters = peft_files.WITH_ADAPTERS_NAME
        named = [key for key, name in names.items() if adapters.search(name)]
        names |= {key: _without_adapters_name(names[key]) for key in named}
        why = (
            ": this is a peft model's state_dict, which peft loads under that name"
            " alone"
        )
        self._wrong_tensors(named, raw, "have the adapter's name in them", why)

        bare = [key for key, name in names.items() if _lacks_prefix(name)]
        what = f"lack peft's prefix {peft_files.PREFIX!r}"
        self._wrong_tensors(bare, raw, what, ": peft finds no such layer")
        return {_ours(name): raw[key] for key, name in names.items()}

    # The settings

    def _check_settings(self):
        config, kind = self.config, self.config.get("peft_type")
        if not isinstance(kind, str):
            return self.wrong(f"{adapter_folder.CONFIG} names no peft_type")
        if kind not in peft_files.DEFAULTS:
            known = ", ".join(peft_files.DEFAULTS)
            return self.wrong(
                f"the peft_type {_shown(kind)} is unknown here: known are {known}"
            )

        self.kind, self.config = kind, peft_files.DEFAULTS[kind] | config
        if kind == "LORA":
            self._check_scaling(config.get("lora_alpha"))

        own = {"r", "lora_alpha", "num_virtual_tokens"}  # what we check ourselves
        rest = self.config | dict.fromkeys(own & peft_files.DEFAULTS[kind].keys(), 1)
        if rest.get("target_parameters") and rest.get("target_modules") is None:
            rest["target_modules"] = []
        try:
            peft_files._method_of(peft_files._checked(rest))
        except ValueError as error:
            unsupported = "not supported" in str(error)
            sentences = self.notes if unsupported else self.problems
            sentences.append(ascii(str(error))[1:-1][:300])

    def _check_scaling(self, alpha):
        if alpha is None:
            self.wrong(
                "the config names no lora_alpha: peft takes 8, whatever the adapter"
                " was trained with"
            )
        elif not _is_size(alpha):
            self.wrong(f"lora_alpha is {_shown(alpha)}: it must be a positive number")
        elif alpha == 0:
            self.wrong("lora_alpha is 0: the change is multiplied by zero")

        r = self.config["r"]
        if not _is_count(r):
            self.wrong(f"r is {_shown(r)}: the rank must be a whole number from 1 on")

    def _method(self):
        if self.kind == "LORA" and self.config["use_dora"] is True:
            return "DoRA"
        if self.kind == "LORA" and self.config["init_lora_weights"] == "pissa":
            return "PiSSA"
        return NAMES.get(self.kind)

    def _targets(self):
        """What target_modules says: a text, or a list of names."""
        targets = self.config.get("target_modules")
        return targets if isinstance(targets, str) else _names(targets)

    # The tensors

    def check_tensors(self):
        self._check_numbers()
        heads = _names(self.config.get("modules_to_save"))
        layers = self.layers = defaultdict(dict)
        for key, t in self.tensors.items():
            path, _, leaf = key.rpartition(".")
            if leaf in LEAVES.values() and not peft_files._under(key, heads):
                layers[path][leaf] = t

        leaves = {leaf for own in layers.values() for leaf in own}
        if not self._is_of_one_kind(leaves):
            return
        self._check_heads(heads)
        self._check_digest()
        if leaves == {"prompt_embeddings"}:
            (prompt, *_) = layers.values()
            return self._check_prompt(prompt["prompt_embeddings"].shape)

        self._check_dead()
        if self.kind is None:
            return
        self._check_halves()
        self._check_rank()
        self._check_targets()
        self._check_gaps()
        if self.model is not None:
            modules = dict(self.model.named_modules())
            self._check_layers_of_the_model(modules, heads)
            self._check_sizes(modules)
            self._check_heads_of_the_model(heads)

    def _check_numbers(self):
        every = self.tensors
        other = [key for key, t in every.items() if not t.floats]
        self._wrong_tensors(other, every, "are no floating-point numbers")
        bad = [key for key, t in every.items() if not all(map(math.isfinite, t.ends))]
        self._wrong_tensors(bad, every, "hold NaN or infinity")

    def _is_of_one_kind(self, leaves):
        """Whether the tensors are those of the method that the config names."""
        methods = peft_files.METHODS.values()
        found = dict.fromkeys(m.peft_type for m in methods if m.keys.keys() & leaves)
        if not found:
            self.wrong("none of the tensors is an adapter's: the adapter is empty")
            return False
        if self.kind is None:
            return True

        says, is_dora = self._method(), "dora_m" in leaves
        if self.kind in found and is_dora == (says == "DoRA"):
            return True
        names = {**NAMES, "LORA": "DoRA" if is_dora else "LoRA"}
        has = " and ".join(names[kind] for kind in found if kind != "PREFIX_TUNING")
        self.wrong(f"the config says {says}, the tensors are {has}'s")
        return False

    def _check_heads(self, heads):
        task = self.config.get("task_type")
        of_task = peft_files.HEADS.get(task, ()) if isinstance(task, str) else ()
        there = {head for head in (*heads, *of_task) if self._holds(head)}
        self.heads = tuple(sorted(there))
        if of_task and not there & set(of_task):
            self.wrong(
                f"the task is {task}, and the file has no head"
                f" ({' or '.join(of_task)}): a reloaded model would answer with a"
                " random one"
            )

        lost = [head for head in heads if head not in there and head not in of_task]
        if lost:
            self.wrong(
                f"modules_to_save names {_listed(lost)}, and the file holds no such"
                " tensor: a reloaded model would keep its own"
            )

    def _holds(self, head):
        return any(peft_files._under(key, [head]) for key in self.tensors)

    def _check_digest(self):
        stored = self.metadata.get("settings")
        with contextlib.suppress(ValueError, TypeError):  # of the settings
            if stored and stored != peft_files._digest(self.config):
                self.wrong(
                    "the config is another adapter's, or was changed after the weights"
                    " were saved"
                )

    def _check_prompt(self, shape):
        if len(shape) != 2:
            return self.wrong(f"prompt_embeddings has the shape {shape}, not two sides")
        rows, width = shape
        n = self.config.get("num_virtual_tokens")
        if self.kind and n not in (rows, rows / 2):
            self.wrong(f"num_virtual_tokens is {_shown(n)}, the file has {rows} rows")
        self._check_width(width)

        embed = getattr(self.model, "get_input_embeddings", lambda: None)()
        if self.kind == "PROMPT_TUNING" and hasattr(embed, "weight"):
            own = embed.weight.shape[1]
            if own != width:
                self.wrong(
                    "made for a base of another size: the prompt's vectors have"
                    f" {width} entries, the model's {own}"
                )

    def _check_width(self, width):
        size, layers = self.config.get("token_dim"), self.config.get("num_layers")
        if self.kind is None or not _is_count(size) or not _is_count(layers):
            return
        widths = dict(PROMPT_TUNING=size, PREFIX_TUNING=2 * layers * size)
        wanted = widths.pop(self.kind)
        ((other, others),) = widths.items()
        if width != wanted:
            wide = f"{width} wide, not {wanted}"
            found = f"a {NAMES[other]}'s" if width == others else wide
            self.wrong(f"the config says {NAMES[self.kind]}, the tensor is {found}")

    def _check_dead(self):
        for leaf, value, what in (
            ("lora_B", 0, "B is zero"),
            ("lora_A", 0, "A is zero"),
            ("vera_b", 0, "b is zero"),
            ("ia3_l", 1, "the scale is 1"),
        ):
            found = [own[leaf] for own in self.layers.values() if leaf in own]
            n, dead = len(found), sum(t.ends == {value} for t in found)
            if dead and dead == n:
                self.wrong(f"{what} in all {n} layers: the adapter changes nothing")
            elif dead:
                self.notes.append(f"{what} in {dead} of {n} layers")

    def _check_halves(self):
        wanted = peft_files.METHODS[self._method()].keys.keys()
        half = [path for path, own in self.layers.items() if wanted - own.keys()]
        if half:
            lost = min(wanted - self.layers[half[0]].keys())
            self.wrong(
                f"{len(half)} of {len(self.layers)} layers lack a tensor:"
                f" {_shown(half[0])} has no {lost}"
            )
        if self.kind == "VERA" and self.config["save_projection"] is True:
            if not self.tensors.keys() >= set(peft_files.SHARED):
                self.wrong(
                    "save_projection is true, and the shared A and B are missing"
                )

    def _check_rank(self):
        r = self.config.get("r")
        if self.config.get("target_parameters") or not _is_count(r):
            return
        sides = {"lora_A": 0, "lora_B": 1, "vera_d": 0}
        ranks = {
            f"{path}.{leaf}": (*own[leaf].shape, None, None)[side]
            for path, own in self.layers.items()
            for leaf, side in sides.items()
            if leaf in own
        }

        patterns = self.config.get("rank_pattern")
        others = patterns.values() if isinstance(patterns, dict) else ()
        off = [key for key, found in ranks.items() if found not in (r, *others)]
        if off:
            self.wrong(
                f"the config says rank {r}, and {_count(off, ranks)} have another:"
                f" {_shown(off[0])} has {ranks[off[0]]}"
            )

    def _check_targets(self):
        targets, paths = self._targets(), list(self.layers)
        if isinstance(targets, list):
            lost = [t for t in targets if not peft_files._named(paths, [t])]
            if lost:
                self.wrong(
                    f"target_modules names {_listed(lost)}, and no tensor belongs to it"
                )
        elif targets != "all-linear":
            found = _matching(targets, paths)
            if found is None:
                self.wrong("target_modules is no regular expression that can be used")
            elif not found:
                self.wrong(f"no tensor belongs to target_modules={_shown(targets)}")

    def _check_gaps(self):
        """Numbered blocks in which layers are missing that other blocks have."""
        if self.config.get("layers_to_transform") is not None or self.model is not None:
            return
        stacks = defaultdict(lambda: defaultdict(set))  # {front: {back: the numbers}}
        for path in self.layers:
            match = re.search(r"\.(\d{1,6})\.", path)
            if match:
                front, back = path[: match.start()], path[match.end() :]
                stacks[front][back].add(int(match[1]))

        missing = []
        for front, stack in stacks.items():
            every = set.union(*stack.values())
            whole = every if _regular(every) else set(range(max(every) + 1))
            for back, found in stack.items():
                lost = whole - found
                spaced = _regular(lost) and len(lost) > 2  # each third block differs
                if lost and not _regular(found) and not spaced:
                    missing += [f"{front}.{k}.{back}" for k in sorted(lost)]

        if missing:
            n = len(missing)
            layers = f"{n} layers are" if n > 1 else "a layer is"
            self.wrong(
                f"{layers} missing that other blocks have, {_shown(missing[0])} first"
            )

    # Beside the model

    def _check_layers_of_the_model(self, modules, heads):
        strange = [path for path in self.layers if path not in modules]
        if strange:
            self.wrong(
                f"made for another base: it has no {_shown(strange[0])},"
                f" nor {len(strange) - 1} more of the file's {len(self.layers)} layers"
            )
        chosen = self._chosen(modules, heads)
        lost = sorted(chosen - self.layers.keys())
        if lost:
            self.wrong(
                f"{len(lost)} of the {len(chosen)} layers that target_modules selects"
                f" are not in the file, {_shown(lost[0])} first"
            )

    def _chosen(self, modules, heads):
        """The layers of the model that the config selects."""
        if self.config.get("layers_to_transform") is not None:
            return set()
        inside = tuple(f"{path}." for path in self.layers)  # of a layer that is wrapped
        paths = sorted(p for p in modules if p and not p.startswith(inside))
        targets = self._targets()
        if targets == "all-linear":
            linears = set(surgery.select(self.model, "all-linear"))
            chosen = {path for path in paths if modules[path] in linears}
        else:
            chosen = _named_by(targets, paths)
        chosen -= _named_by(self.config.get("exclude_modules"), paths)
        return {path for path in chosen if not peft_files._under(path, heads)}

    def _check_sizes(self, modules):
        there = self.layers.keys() & modules.keys()
        sizes = {path: surgery.shape(modules[path]) for path in sorted(there)}
        off = [
            (path, leaf)
            for path, size in sizes.items()
            for leaf, t in self.layers[path].items()
            if size and not _fits(leaf, t.shape, *size)
        ]
        if off:
            path, leaf = off[0]
            self.wrong(
                f"made for a base of another size: {leaf} of {_shown(path)} is"
                f" {self.layers[path][leaf].shape}, the layer (out, in) is"
                f" {tuple(sizes[path])}, and so in {len({path for path, _ in off})} of"
                f" {len(self.layers)} layers"
            )

    def _check_heads_of_the_model(self, heads):
        of_task = peft_files._all_heads(self.model, [], peft_files._task(self.model))
        if of_task and not heads and not any(map(self._holds, of_task)):
            self.wrong(
                f"the model has a head, {_listed(of_task)}, and the file holds none: a"
                " reloaded model would answer with whatever head it has"
            )
        for key, own in self.model.state_dict().items():
            if key in self.tensors and peft_files._under(key, heads):
                shape, here = self.tensors[key].shape, tuple(own.shape)
                if shape != here:
                    self.wrong(f"the head's {_shown(key)} is {shape}, here {here}")

    # What is told

    def report(self):
        targets = self._targets()
        targets = [targets] if isinstance(targets, str) else targets
        base = self.config.get("base_model_name_or_path")
        r, alpha = self.config.get("r"), self.config.get("lora_alpha")
        ranked = self.kind in ("LORA", "VERA") and _is_count(r)
        scaled = self.kind == "LORA" and ranked and _is_size(alpha)

        return Report(
            folder=str(self.folder),
            problems=tuple(self.problems),
            notes=tuple(self.notes),
            method=self._method(),
            r=r if ranked else None,
            alpha=alpha if scaled else None,
            scaling=peft_files._scaling(self.config) if scaled else None,
            targets=tuple(sorted(targets)),
            layers=len([path for path in self.layers if path]),
            parameters=sum(math.prod(t.shape) for t in self.tensors.values()),
            nbytes=self.nbytes,
            base=base if isinstance(base, str) and base else None,
            heads=self.heads,
        )


# The weights' file


def _why_no_weights(names):
    """What is wrong with a folder that has these files, and no safetensors."""
    if PICKLE in names:
        return (
            f"the weights are only there as a pickle, {PICKLE}, which can run any code"
            " when it is loaded: ask for safetensors"
        )
    if names & WHOLE:
        return "this is a whole model's folder, not an adapter's"
    return f"there is no {adapter_folder.WEIGHTS}"


def _is_pointer(path):
    with open(path, "rb") as file:
        return file.read(40).startswith(b"version https://git-lfs")


def _missing_bytes(path, size):
    """How many bytes a safetensors file lacks by its own header, if above 0."""
    if size < 8:
        return 8 - size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > LARGEST_HEADER:
            raise ValueError("its header is longer than safetensors allows")
        header = file.read(length)

    end = 8 + length
    if end <= size:
        rows = json.loads(header)
        rows.pop("__metadata__", None)
        end += max((row["data_offsets"][1] for row in rows.values()), default=0)
    return end - size


def _look(t):
    """What we know of a tensor, looked at a piece at a time."""
    pieces = [piece for piece in t.flatten().split(AT_A_TIME) if len(piece)]
    ends = {float(end) for piece in pieces for end in piece.float().aminmax()}
    return Tensor(tuple(t.shape), t.is_floating_point(), ends)


# Names and shapes


def _without_adapters_name(key):
    match = peft_files.WITH_ADAPTERS_NAME.search(key)
    if match[2]:
        return "prompt_embeddings"
    return key.replace(f".{match[1]}.", ".", 1).removesuffix(f".{match[1]}")


def _lacks_prefix(key):
    if key.startswith(("base_model.", "prompt_e")):
        return False
    return _ours(key).rpartition(".")[2] in LEAVES.values()


def _ours(key):
    """Our name of a tensor in a file, whatever its method."""
    if key in peft_files.SHARED:
        return key
    plain = re.sub(r"^base_model\.(model\.)?", "", key)
    plain = re.sub(r"\.base_layer\.(bias|weight)$", r".\1", plain)
    for theirs, ours in LEAVES.items():
        if f".{plain}".endswith(f".{theirs}"):
            return plain.removesuffix(theirs) + ours
    return plain


def _fits(leaf, shape, n_out, n_in):
    """Whether a tensor's shape goes with a layer's, whatever the rank."""
    if leaf == "lora_A":
        return shape[1:] == (n_in,)
    if leaf == "lora_B":
        return shape[:-1] == (n_out,)
    if leaf in ("vera_b", "dora_m"):
        return math.prod(shape) == n_out
    return leaf != "ia3_l" or math.prod(shape) in (n_out, n_in)


def _regular(numbers):
    """Whether block numbers follow a plan: a run, or evenly spaced, three at least."""
    ordered = sorted(numbers)
    steps = {b - a for a, b in zip(ordered, ordered[1:], strict=False)}
    return steps <= {1} or (len(steps) == 1 and len(ordered) > 2)


def _named_by(names, paths):
    """The paths that an expression or a list of names selects, as in a config."""
    if isinstance(names, str):
        return set(_matching(names, paths) or ())
    return peft_files._named(paths, _names(names))


def _matching(expression, paths):
    """The paths that an expression matches, in a process of its own, for there are
    expressions that take for ever; None if it is none, or takes too long."""
    if expression == peft_files._expression(paths):
        return paths

    code = (
        "import json, re, sys\n"
        "expression, paths = json.load(sys.stdin)\n"
        "print(json.dumps([p for p in paths if re.fullmatch(expression, p)]))"
    )
    try:
        found = subprocess.run(
            [sys.executable, "-I", "-c", code],
            input=json.dumps([expression, paths]),
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
        return None if found.returncode else json.loads(found.stdout)
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


# Settings


def _names(value):
    """A list of names; an empty one for all else that a config may hold."""
    if not isinstance(value, list):
        return []
    return value if all(isinstance(name, str) and name for name in value) else []


def _is_count(value):
    return type(value) is int and 0 < value < 2**31


def _is_size(value):
    return surgery.is_number(value) and 0 <= value < 1e300


# Words


def _shown(value):
    """A value of the file in a sentence: no control characters, and not all of it."""
    text = value if isinstance(value, str) else repr(value)
    quoted = ascii(text if len(text) <= 120 else f"{text[:60]}...{text[-50:]}")
    return quoted if isinstance(value, str) else quoted[1:-1]


def _listed(names, most=8):
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(_shown(name)[1:-1] for name in names[:most]) + more


def _count(some, every):
    share = f"{len(some)} of" if len(some) < len(every) else "all"
    return f"{share} {len(every)} tensors"


def main(arguments):
    """`python -m peftlab.peft_files FOLDER`: the exit status is 1 for a fault."""
    if len(arguments) != 1:
        sys.exit("one argument is wanted: the adapter's folder")
    try:
        found = report(arguments[0])
    except ValueError as error:
        sys.exit(str(error))
    print(found)
    sys.exit(0 if found.ok else 1)
