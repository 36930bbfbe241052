r"""What an adapter's folder holds, and what is wrong with it: `peft_files.inspect`.

Nothing is loaded into a model. The config is read as JSON, the tensors one by one, only
to see whether they are zero, NaN or infinite; pickle is never opened. Every fault is
one sentence. All that comes from a file is shown as Python's `repr` shows it, and cut,
so that no control character reaches a terminal.

    python -m peftlab.peft_files FOLDER
"""

import json
import os
import re
import subprocess
import sys
from collections import defaultdict
from dataclasses import dataclass, field
from typing import NamedTuple

import safetensors

from . import adapter_folder, peft_files, surgery

PICKLE = "adapter_model.bin"
WHOLE = ("model.safetensors", "pytorch_model.bin", "model.safetensors.index.json")
LARGEST_HEADER = 100_000_000  # bytes, safetensors' own limit
AT_A_TIME = 2**22  # entries of a tensor that are looked at together
PATIENCE = 10  # seconds for a regular expression
EMBEDDED = {"lora_embedding_A": "lora_A", "lora_embedding_B": "lora_B"}
LEAVES = {  # how an adapter's tensor is named in a file, and here
    **{
        theirs: ours
        for m in peft_files.METHODS.values()
        for ours, theirs in m.keys.items()
    },
    **EMBEDDED,
}
OF_TYPE = {  # the tensors that tell one kind of file from another
    "LORA": {"lora_A", "lora_B", "dora_m"},
    "VERA": {"vera_d", "vera_b"},
    "IA3": {"ia3_l"},
    "PROMPT_TUNING": {"prompt_embeddings"},
    "PREFIX_TUNING": {"prompt_embeddings"},
}
NAMES = dict(LORA="LoRA", VERA="VeRA", IA3="IA3", PROMPT_TUNING="prompt")
NAMES |= dict(PREFIX_TUNING="prefix")
WRAPPED = {  # what stands in a name, and who has put it there
    "_orig_mod": "torch.compile",
    "_fsdp_wrapped_module": "FSDP",
    "_checkpoint_wrapped_module": "a checkpoint wrapper",
    "module": "DataParallel or DistributedDataParallel",
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
    heads: tuple = field(default=())  # modules saved whole

    @property
    def ok(self):
        return not self.problems

    def __bool__(self):
        return self.ok

    def __str__(self):
        rows = [
            f"{_shown(self.folder)}: {self.method or 'no adapter that can be read'}"
        ]
        if self.r is not None:
            rank = f"rank {self.r}"
            if self.alpha is not None:
                rank += f", alpha {self.alpha:g}"
            if self.scaling is not None:
                rank += f", the change is scaled by {self.scaling:g}"
            rows.append(f"  {rank}")
        if self.targets:
            rows.append(f"  on {_listed(self.targets)}")
        if self.heads:
            rows.append(f"  saved whole: {_listed(self.heads)}")
        if self.parameters:
            layers = f"{self.layers} layers, " if self.layers else ""
            rows.append(
                f"  {layers}{self.parameters:,} parameters, {self.nbytes:,} bytes"
            )
        if self.method:
            rows.append(
                f"  base model: {_shown(self.base) if self.base else 'not named'}"
            )
        rows += [f"  note: {note}" for note in self.notes]
        rows += [f"wrong: {problem}" for problem in self.problems]
        return "\n".join(rows if self.problems else [*rows, "nothing wrong was found"])


class Tensor(NamedTuple):
    """What is known of a tensor once it has been looked at."""

    shape: tuple
    floats: bool
    finite: bool
    zero: bool
    one: bool


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
    if seen.config is not None:
        seen.settings()
    if seen.tensors:
        seen.contents()
    return seen.report()


class Inspection:
    """One look at one folder: what was read, and the sentences so far."""

    def __init__(self, folder, model):
        self.folder, self.model = folder, model
        self.config = None
        self.kind = None  # peft_type, a known one
        self.tensors = {}  # {our name: Tensor}
        self.metadata = {}
        self.nbytes = 0
        self.problems, self.notes = [], []

    def wrong(self, sentence):
        self.problems.append(sentence)

    # The two files

    def read(self):
        names = {entry.name for entry in os.scandir(self.folder)}
        if not names:
            return self.wrong("the folder is empty")
        self._read_config()
        found = self._file(adapter_folder.WEIGHTS)
        if found is None:
            if PICKLE in names:
                self.wrong(
                    f"the weights are only there as a pickle, {PICKLE}, which can run"
                    " any code when it is loaded: ask for safetensors"
                )
            elif names & set(WHOLE):
                self.wrong("this is a whole model's folder, not an adapter's")
            else:
                self.wrong(f"there is no {adapter_folder.WEIGHTS}")
        elif found:
            self._read_tensors(found)

    def _file(self, name):
        """A file's path; None where there is none, "" where one was complained of."""
        path = self.folder / adapter_folder.NEW / name
        path = path if os.path.exists(path) else self.folder / name
        if not os.path.lexists(path):
            return None
        if not os.path.isfile(path):  # to open a FIFO would be to wait for ever
            self.wrong(f"{name} is no plain file")
        elif os.path.getsize(path) == 0:
            self.wrong(f"{name} is empty: it has no bytes")
        else:
            return path
        return ""

    def _read_config(self):
        path = self._file(adapter_folder.CONFIG)
        if path is None:
            self.wrong(f"there is no {adapter_folder.CONFIG}")
        if not path:
            return
        try:
            with open(path, encoding="utf8") as file:
                config = json.loads(file.read(adapter_folder.LARGEST_CONFIG))
        except (ValueError, RecursionError):
            return self.wrong(f"{path.name} is not valid JSON of at most 10 MB")
        except OSError as error:
            return self.wrong(f"{path.name} cannot be read: {error.strerror}")
        if isinstance(config, dict):
            self.config = config
        else:
            self.wrong(f"{path.name} is JSON, but no object with settings")

    def _read_tensors(self, path):
        self.nbytes = os.path.getsize(path)
        try:
            if _is_pointer(path):
                return self.wrong(
                    f"{path.name} is a pointer of Git LFS, not the weights: run"
                    " `git lfs pull`"
                )
            short = _missing_bytes(path, self.nbytes)
            if short:
                return self.wrong(f"{path.name} is truncated: it lacks {short:,} bytes")
            with safetensors.safe_open(path, "pt") as file:
                self.metadata = file.metadata() or {}
                raw = {key: _look(file.get_tensor(key)) for key in file.keys()}
        except (OSError, safetensors.SafetensorError, *_DAMAGE) as error:
            return self.wrong(f"{path.name} is damaged: {_shown(str(error))}")
        if not raw:
            self.wrong(f"{path.name} holds no tensor: the adapter is empty")
        self.tensors = self._plain_names(raw)

    def _plain_names(self, raw):
        """The tensors by our names. What does not belong into a name is said once."""
        wrapped, named, bare = defaultdict(list), [], []
        tensors = {}
        soft = ("base_model.", "prompt_e")
        for key, t in raw.items():
            plain = key
            for word, who in WRAPPED.items():
                front = (
                    r"^((?:base_model\.)?(?:model\.)?)" if word == "module" else r"()\b"
                )
                shorter = re.sub(rf"{front}{word}\.", r"\1", plain, count=8)
                if shorter != plain:
                    wrapped[who].append(key)
                plain = shorter
            match = peft_files.WITH_ADAPTERS_NAME.search(plain)
            if match:
                named.append(key)
                name = match[1] or match[2]
                plain = plain.replace(f".{name}.", ".", 1).removesuffix(f".{name}")
                if plain.startswith("prompt_encoder"):
                    plain = "prompt_embeddings"
            if _leaf(plain) in LEAVES.values() and not plain.startswith(soft):
                bare.append(key)
            tensors[_ours(plain)] = t
        for who, keys in wrapped.items():
            self.wrong(
                f"{_count(keys, raw)} carry a wrapper's name, as in {_shown(keys[0])}:"
                f" the model was saved inside {who}, and peft finds no such layer"
            )
        if named:
            self.wrong(
                f"{_count(named, raw)} have the adapter's name in them, as in"
                f" {_shown(named[0])}: this is a peft model's state_dict, which peft"
                " loads under that name alone"
            )
        if bare:
            self.wrong(
                f"{_count(bare, raw)} lack peft's prefix {peft_files.PREFIX!r}, as in"
                f" {_shown(bare[0])}: peft finds no such layer"
            )
        return tensors

    # The settings

    def settings(self):
        config = self.config
        kind = config.get("peft_type")
        if not isinstance(kind, str):
            return self.wrong(f"{adapter_folder.CONFIG} names no peft_type")
        if kind not in peft_files.DEFAULTS:
            known = ", ".join(peft_files.DEFAULTS)
            return self.wrong(
                f"the peft_type {_shown(kind)} is unknown here: known are {known}"
            )
        self.kind = kind
        if kind == "LORA":
            self._check_scaling()

        own = {"r", "lora_alpha", "num_virtual_tokens"}
        rest = {key: value for key, value in config.items() if key not in own}
        rest |= {key: 1 for key in own & peft_files.DEFAULTS[kind].keys()}
        if kind in ("LORA", "VERA", "IA3") and rest.get("target_modules") is None:
            if rest.get("target_parameters"):
                rest["target_modules"] = []
        try:
            peft_files._method_of(peft_files._checked(rest))
        except ValueError as error:
            unsupported = "not supported" in str(error)
            (self.notes if unsupported else self.problems).append(_one_line(error))

    def _check_scaling(self):
        alpha = self.config.get("lora_alpha")
        if alpha is None:
            self.wrong(
                "the config names no lora_alpha: peft takes 8, whatever the adapter"
                " was trained with"
            )
        elif not _is_size(alpha):
            self.wrong(f"lora_alpha is {_shown(alpha)}: it must be a positive number")
        elif alpha == 0:
            self.wrong("lora_alpha is 0: the change is multiplied by zero")
        r = self.config.get("r", 8)
        if type(r) is not int or r < 1:
            self.wrong(f"r is {_shown(r)}: the rank must be a whole number from 1 on")

    # The tensors

    def contents(self):
        self._check_finite()
        heads = self._heads()
        adapter = {
            key: t
            for key, t in self.tensors.items()
            if _leaf(key) in LEAVES.values() and not peft_files._under(key, heads)
        }
        layers = defaultdict(dict)  # {path: {leaf: Tensor}}
        for key, t in adapter.items():
            path, _, leaf = key.rpartition(".")
            layers[path][leaf] = t
        self.layers = layers

        leaves = {leaf for own in layers.values() for leaf in own}
        if not self._check_kind(leaves):
            return
        self._check_heads(heads)
        self._check_digest()
        if leaves == {"prompt_embeddings"}:
            return self._check_prompt(layers[""]["prompt_embeddings"])
        self._check_dead(leaves)
        whole = self._check_halves()
        if self.kind in ("LORA", "VERA"):
            self._check_rank()
        if self.kind is None:
            return
        targets = self._targets()
        self._check_targets(targets)
        self._check_gaps()
        if self.model is not None:
            self._check_model(targets, heads, whole)

    def _heads(self):
        heads = (self.config or {}).get("modules_to_save") or ()
        names = isinstance(heads, list) and all(isinstance(h, str) and h for h in heads)
        return heads if names else ()

    def _check_finite(self):
        other = [key for key, t in self.tensors.items() if not t.floats]
        if other:
            self.wrong(
                f"{_count(other, self.tensors)} are no floating-point numbers,"
                f" {_shown(other[0])} first"
            )
        bad = [key for key, t in self.tensors.items() if not t.finite]
        if bad:
            self.wrong(
                f"{_count(bad, self.tensors)} hold NaN or infinity, {_shown(bad[0])}"
                " first"
            )

    def _check_kind(self, leaves):
        """Whether the tensors are those of the method that the config names."""
        found = [kind for kind, own in OF_TYPE.items() if own & leaves]
        if not found:
            self.wrong("none of the tensors is an adapter's: the adapter is empty")
            return False
        if self.kind is None:
            return True
        what = " and ".join(NAMES[kind] for kind in found if kind != "PREFIX_TUNING")
        if self.kind not in found:
            self.wrong(f"the config says {NAMES[self.kind]}, the tensors are {what}'s")
            return False
        says, has = self.config.get("use_dora") is True, "dora_m" in leaves
        if self.kind == "LORA" and says != has:
            one, other = ("DoRA", "LoRA") if says else ("LoRA", "DoRA")
            self.wrong(f"the config says {one}, the tensors are {other}'s")
        return True

    def _check_heads(self, heads):
        task = (self.config or {}).get("task_type")
        of_task = peft_files.HEADS.get(task, ()) if isinstance(task, str) else ()
        there = {h for h in (*heads, *of_task) if self._tensors_under(h)}
        lost = [h for h in heads if h not in there and h not in of_task]
        if of_task and not there & set(of_task):
            self.wrong(
                f"the task is {task}, and the file has no head"
                f" ({' or '.join(of_task)}): a reloaded model would answer with a"
                " random one"
            )
        if lost:
            self.wrong(
                f"modules_to_save names {_listed(lost)}, and the file holds no such"
                " tensor: a reloaded model would keep its own"
            )
        self.heads = tuple(sorted(there))

    def _tensors_under(self, head):
        return [key for key in self.tensors if peft_files._under(key, [head])]

    def _check_digest(self):
        stored = self.metadata.get("settings")
        try:
            own = peft_files._digest(self.config) if stored else None
        except (ValueError, TypeError):
            return
        if stored and stored != own:
            self.wrong(
                "the config is another adapter's, or was changed after the weights were"
                " saved"
            )

    def _check_prompt(self, t):
        config = self.config or {}
        n, width = config.get("num_virtual_tokens"), config.get("token_dim")
        layers = config.get("num_layers")
        if len(t.shape) != 2:
            return self.wrong(
                f"prompt_embeddings has the shape {t.shape}, not two sides"
            )
        if self.kind and t.shape[0] not in (n, 2 * n if type(n) is int else n):
            self.wrong(
                f"num_virtual_tokens is {_shown(n)}, the file has {t.shape[0]} rows"
            )
        sizes = type(width) is int and type(layers) is int and width > 0 < layers
        if not sizes:
            return
        as_prefix = t.shape[1] == 2 * layers * width
        if self.kind == "PROMPT_TUNING" and t.shape[1] != width:
            other = "a prefix's" if as_prefix else f"{t.shape[1]} wide"
            self.wrong(f"the config says prompt, {width} wide; the tensor is {other}")
        if self.kind == "PREFIX_TUNING" and not as_prefix:
            other = "a prompt's" if t.shape[1] == width else f"{t.shape[1]} wide"
            self.wrong(f"the config says prefix, the tensor is {other}")
        embed = getattr(self.model, "get_input_embeddings", lambda: None)()
        if self.kind == "PROMPT_TUNING" and hasattr(embed, "weight"):
            wide = embed.weight.shape[1]
            if wide != t.shape[1]:
                self.wrong(
                    "made for a base of another size: the prompt's vectors have"
                    f" {t.shape[1]} entries, the model's {wide}"
                )

    def _check_dead(self, leaves):
        def of(leaf, test):
            found = [own[leaf] for own in self.layers.values() if leaf in own]
            return sum(getattr(t, test) for t in found), len(found)

        for leaf, test, what in (
            ("lora_B", "zero", "B is zero"),
            ("lora_A", "zero", "A is zero"),
            ("vera_b", "zero", "b is zero"),
            ("ia3_l", "one", "the scale is 1"),
        ):
            dead, n = of(leaf, test)
            if dead and dead == n:
                self.wrong(f"{what} in all {n} layers: the adapter changes nothing")
            elif dead:
                self.notes.append(f"{what} in {dead} of {n} layers")

    def _check_halves(self):
        """{path: its tensors} of the layers that are whole."""
        pair = {"LORA": ("lora_A", "lora_B"), "VERA": ("vera_d", "vera_b")}
        want = pair.get(self.kind, ())
        if self.kind == "LORA" and self.config.get("use_dora") is True:
            if any("dora_m" in own for own in self.layers.values()):
                want = (*want, "dora_m")
        half = {p: set(want) - own.keys() for p, own in self.layers.items()}
        half = {path: lost for path, lost in half.items() if lost}
        if half:
            path, lost = next(iter(half.items()))
            self.wrong(
                f"{len(half)} of {len(self.layers)} layers lack a tensor:"
                f" {_shown(path)} has no {min(lost)}"
            )
        shared = all(key in self.tensors for key in peft_files.SHARED)
        if self.kind == "VERA" and not shared:
            if self.config.get("save_projection", True) is True:
                self.wrong(
                    "save_projection is true, and the shared A and B are missing"
                )
        return {p: own for p, own in self.layers.items() if p not in half}

    def _check_rank(self):
        r = self.config.get("r", peft_files.DEFAULTS[self.kind]["r"])
        patterns = self.config.get("rank_pattern")
        others = [*patterns.values()] if isinstance(patterns, dict) else []
        if self.config.get("target_parameters") or type(r) is not int or r < 1:
            return
        side = {"lora_A": 0, "lora_B": 1, "vera_d": 0}
        ranks = {}
        for path, own in self.layers.items():
            for leaf, k in side.items():
                if leaf in own:
                    shape = own[leaf].shape
                    ranks[f"{path}.{leaf}"] = shape[k] if k < len(shape) else None
        off = {key: found for key, found in ranks.items() if found not in (r, *others)}
        if off:
            key, found = next(iter(off.items()))
            self.wrong(
                f"the config says rank {r}, and {_count(off, ranks)} have another:"
                f" {_shown(key)} has {found}"
            )

    def _targets(self):
        """What target_modules says: a list of names, a text, or None."""
        targets = self.config.get("target_modules")
        if isinstance(targets, str):
            return targets
        sound = isinstance(targets, list) and all(isinstance(t, str) for t in targets)
        return targets if sound else None

    def _check_targets(self, targets):
        paths = list(self.layers)
        if isinstance(targets, list):
            lost = [t for t in targets if not peft_files._named(paths, [t])]
            if lost:
                self.wrong(
                    f"target_modules names {_listed(lost)}, and no tensor belongs to it"
                )
        elif targets is not None and targets != "all-linear":
            found = _matching(targets, paths)
            if found is None:
                self.wrong("target_modules is no regular expression that can be used")
            elif not found:
                self.wrong(f"no tensor belongs to target_modules={_shown(targets)}")

    def _check_gaps(self):
        """Numbered blocks in which layers are missing that other blocks have."""
        if self.config.get("layers_to_transform") is not None or self.model is not None:
            return
        blocks = defaultdict(set)  # {the path without its first number: the numbers}
        for path in self.layers:
            match = re.search(r"\.(\d{1,6})\.", path)
            if match:
                blocks[path[: match.start()], path[match.end() :]].add(int(match[1]))
        by_stack = defaultdict(dict)
        for (front, back), found in blocks.items():
            by_stack[front][back] = found
        missing = []
        for front, stack in by_stack.items():
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

    def _check_model(self, targets, heads, whole):
        modules = dict(self.model.named_modules())
        strange = [path for path in self.layers if path not in modules]
        if strange:
            self.wrong(
                f"made for another base: it has no {_shown(strange[0])},"
                f" nor {len(strange) - 1} more of the file's {len(self.layers)} layers"
            )
        chosen = self._chosen(targets, heads, modules)
        lost = sorted(chosen - self.layers.keys())
        if lost:
            self.wrong(
                f"{len(lost)} of the {len(chosen)} layers that target_modules selects"
                f" are not in the file, {_shown(lost[0])} first"
            )
        wrong_size = []
        for path in self.layers.keys() - set(strange):
            size = surgery.shape(modules[path])
            for leaf, t in self.layers[path].items() if size else ():
                if not _fits(leaf, t.shape, *size):
                    wrong_size.append((path, leaf, t.shape, tuple(size)))
        if wrong_size:
            path, leaf, shape, size = min(wrong_size)
            self.wrong(
                f"made for a base of another size: {leaf} of {_shown(path)} is {shape},"
                f" the layer (out, in) is {size}, and so in"
                f" {len({w[0] for w in wrong_size})} of {len(self.layers)} layers"
            )
        of_task = peft_files._all_heads(self.model, [], peft_files._task(self.model))
        if of_task and not heads and not any(map(self._tensors_under, of_task)):
            self.wrong(
                f"the model has a head, {_listed(of_task)}, and the file holds none: a"
                " reloaded model would answer with whatever head it has"
            )
        state = self.model.state_dict()
        for key, t in self.tensors.items():
            if peft_files._under(key, heads) and key in state:
                if tuple(state[key].shape) != t.shape:
                    own = tuple(state[key].shape)
                    self.wrong(f"the head's {_shown(key)} is {t.shape}, here {own}")

    def _chosen(self, targets, heads, modules):
        """The layers of the model that the config selects."""
        if targets is None or self.config.get("layers_to_transform") is not None:
            return set()
        inside = {f"{path}." for path in self.layers}  # of a layer that is wrapped
        paths = {
            p for p in modules if p and not any(f"{q}." in inside for q in _above(p))
        }
        if targets == "all-linear":
            linears = set(surgery.select(self.model, "all-linear"))
            chosen = {path for path in paths if modules[path] in linears}
        elif isinstance(targets, list):
            chosen = peft_files._named(paths, targets)
        else:
            chosen = set(_matching(targets, sorted(paths)) or ())
        excluded = self.config.get("exclude_modules") or []
        if isinstance(excluded, list):
            excluded = peft_files._named(paths, [e for e in excluded if e])
        else:
            excluded = set(_matching(str(excluded), sorted(paths)) or ())
        return {p for p in chosen - excluded if not peft_files._under(p, heads)}

    # What is told

    def report(self):
        config, layers = self.config or {}, getattr(self, "layers", {})
        base = config.get("base_model_name_or_path")
        targets = config.get("target_modules")
        targets = [targets] if isinstance(targets, str) else targets or ()
        sound = isinstance(targets, list) and all(isinstance(t, str) for t in targets)
        told = dict(targets=tuple(sorted(targets)) if sound else ())
        if self.kind in ("LORA", "VERA"):
            r = config.get("r", peft_files.DEFAULTS[self.kind]["r"])
            told["r"] = r if type(r) is int else None
        if self.kind == "LORA" and told["r"]:
            alpha = config.get("lora_alpha", 8)
            if _is_size(alpha):
                root = 0.5 if config.get("use_rslora") is True else 1
                told |= dict(alpha=alpha, scaling=alpha / told["r"] ** root)
        name = NAMES.get(self.kind)
        if self.kind == "LORA" and config.get("use_dora") is True:
            name = "DoRA"
        elif self.kind == "LORA" and config.get("init_lora_weights") == "pissa":
            name = "PiSSA"
        return Report(
            folder=str(self.folder),
            problems=tuple(self.problems),
            notes=tuple(self.notes),
            method=name,
            layers=len([path for path in layers if path]),
            parameters=sum(_numel(t.shape) for t in self.tensors.values()),
            nbytes=self.nbytes,
            base=base if isinstance(base, str) and base else None,
            heads=getattr(self, "heads", ()),
            **told,
        )


# Tensors and names

_DAMAGE = (KeyError, ValueError, TypeError, RuntimeError, MemoryError, OverflowError)


def _look(t):
    """What there is to know of a tensor, a piece at a time."""
    finite = zero = one = True
    for part in t.flatten().split(AT_A_TIME):
        part = part.float() if part.is_floating_point() else part
        finite = finite and bool(part.isfinite().all())
        zero = zero and not part.any()
        one = one and bool((part == 1).all())
    some = t.numel() > 0
    return Tensor(
        tuple(t.shape), t.is_floating_point(), finite, zero and some, one and some
    )


def _is_pointer(path):
    with open(path, "rb") as file:
        return file.read(40).startswith(b"version https://git-lfs")


def _missing_bytes(path, size):
    """How many bytes a safetensors file lacks by its own header, or 0."""
    with open(path, "rb") as file:
        start = file.read(8)
        if len(start) < 8:
            return 8 - len(start)
        length = int.from_bytes(start, "little")
        if length > LARGEST_HEADER:
            raise ValueError("its header is longer than safetensors allows")
        if 8 + length > size:
            return 8 + length - size
        try:
            header = json.loads(file.read(length))
        except RecursionError:
            raise ValueError("its header is no JSON") from None
    rows = [row for key, row in header.items() if key != "__metadata__"]
    return max(
        0, 8 + length + max((row["data_offsets"][1] for row in rows), default=0) - size
    )


def _ours(key):
    """Our name of a tensor in a file, whatever its method."""
    if key in peft_files.SHARED:
        return key
    plain = key.removeprefix("base_model.").removeprefix("model.")
    if not key.startswith("base_model."):
        plain = key
    plain = re.sub(r"\.base_layer\.(bias|weight)$", r".\1", plain)
    for theirs, ours in LEAVES.items():
        if plain == theirs or plain.endswith(f".{theirs}"):
            return plain.removesuffix(theirs) + ours
    return plain


def _leaf(key):
    return _ours(key).rpartition(".")[2]


def _fits(leaf, shape, n_out, n_in):
    """Whether a tensor's shape goes with a layer's, whatever the rank."""
    if leaf in ("lora_A", "lora_B"):
        return (
            len(shape) == 2
            and shape[leaf == "lora_A"] == (n_out, n_in)[leaf == "lora_A"]
        )
    if leaf in ("vera_b", "dora_m"):
        return _numel(shape) == n_out
    return leaf != "ia3_l" or _numel(shape) in (n_out, n_in)


def _above(path):
    """The paths of the modules that a module is in."""
    parts = path.split(".")
    return [".".join(parts[:k]) for k in range(1, len(parts))]


def _regular(numbers):
    """Whether block numbers follow a plan: a run, or evenly spaced, three at least."""
    ordered = sorted(numbers)
    steps = {b - a for a, b in zip(ordered, ordered[1:], strict=False)}
    return steps <= {1} or (len(steps) == 1 and len(ordered) > 2)


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


def _numel(shape):
    n = 1
    for side in shape:
        n *= side
    return n


def _is_size(value):
    return surgery.is_number(value) and 0 <= value < 1e300


# Words


def _shown(value):
    """A value of the file in a sentence: no control characters, and not all of it."""
    text = value if isinstance(value, str) else repr(value)[:200]
    text = text if len(text) <= 120 else f"{text[:60]}...{text[-50:]}"
    return ascii(text) if isinstance(value, str) else ascii(text)[1:-1]


def _one_line(error):
    return " ".join(ascii(str(error))[1:-1].split())[:300]


def _listed(names, most=8):
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(_shown(name)[1:-1] for name in names[:most]) + more


def _count(some, every):
    return (
        f"all {len(every)} tensors"
        if len(some) == len(every)
        else (f"{len(some)} of {len(every)} tensors")
    )


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
