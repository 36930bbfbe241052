"""What a method costs and what it reaches: exact match, parameters, bytes, time,
memory."""

import contextlib
import copy
import itertools
import os
import platform
import statistics
import time
import warnings
from importlib.metadata import PackageNotFoundError, version

import torch

LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes")


@torch.no_grad()
def exact_match(model, tokenizer, records, batch_size=100):
    """Share of records whose greedy answer is right to the letter, a float in [0,
    1]."""
    return sum(answered(model, tokenizer, records, batch_size)) / len(records)


@torch.no_grad()
def answered(model, tokenizer, records, batch_size=100):
    """For each record, whether the model's greedy answer is right to the letter
    (bools)."""
    given = answers(model, tokenizer, [r.prompt for r in records], batch_size)
    return [text == record.answer for text, record in zip(given, records, strict=True)]


@torch.no_grad()
def answers(model, tokenizer, prompts, batch_size=100):
    """The model's greedy continuation of each prompt, or what its decoder writes for
    it, up to the end token, as strings."""
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
        pairs = getattr(model.config, "is_encoder_decoder", False)
        new = tokens if pairs else tokens[:, inputs["input_ids"].shape[1] :]
        texts = tokenizer.batch_decode(new, skip_special_tokens=True)
        out.update(zip(batch, (text.strip(" ") for text in texts), strict=True))
    model.train(training)
    return [out[prompt] for prompt in prompts]


def parameters(model):
    """(trainable, all) parameter counts of a model, on any device, also on meta."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, trains in sizes if trains), sum(n for n, _ in sizes)


def count(config, add=None, *args, dtype=torch.float32, kind=None, **settings):
    """What a method would train on a model of a given shape: none of its memory is
    used and nothing is downloaded, as the model is built on torch's meta device.

    Args:
        config: a transformers config with the sizes filled in, e.g. LlamaConfig(...).
        add: a method's function, called as add(model, *args, **settings), e.g.
            `lora.add`; without one everything trains.
        *args: for `add`.
        dtype: of the base's weights.
        kind: the model's head, "causal", "seq2seq", "masked" or "base" for none, by
            default what the config's `architectures` or class says (BERT and its kin:
            "base").
        **settings: for `add`.

    Returns:
        {trainable, base, total: numbers of parameters, total with what was added;
        trainable_bytes; share: trainable / base}.

    Raises:
        ValueError: what is not a config, a head that the model does not come with, an
            add that gives no model, and whatever `add` refuses.
    """
    if add is not None and not callable(add):
        raise ValueError(f"add must be a function such as lora.add, not {add!r}")
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype must be one such as torch.bfloat16, not {dtype!r}")
    model = _on_meta(config, dtype, kind)
    base = parameters(model)[1]
    model = add(model, *args, **settings) if add else model
    if not isinstance(model, torch.nn.Module):
        raise ValueError(f"add must return a model, not {type(model).__name__}")
    trainable, total = parameters(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    size = sum(p.numel() * p.element_size() for p in trained)
    counts = dict(trainable=trainable, base=base, total=total)
    return counts | dict(trainable_bytes=size, share=trainable / base)


def _on_meta(config, dtype, kind):
    """A model of that config, without a byte of weights."""
    import transformers as tf

    if not isinstance(config, tf.PreTrainedConfig):
        raise ValueError(f"count needs a config such as LlamaConfig(), not {config!r}")
    heads = dict(seq2seq=tf.AutoModelForSeq2SeqLM, causal=tf.AutoModelForCausalLM)
    heads |= dict(masked=tf.AutoModelForMaskedLM, base=tf.AutoModel)
    if kind not in (None, *heads):
        raise ValueError(f"kind must be one of {', '.join(heads)}, not {kind!r}")
    fits = [k for k, auto in heads.items() if type(config) in auto._model_mapping]
    named = getattr(tf, str((config.architectures or [""])[0]), None)
    if named and not isinstance(config, getattr(named, "config_class", None) or ()):
        name = type(config).__name__
        raise ValueError(f"no {config.architectures[0]} is built from a {name}")
    if kind is None and named is None:
        # BERT comes with a causal head too, but is seldom meant with it.
        guesses = [k for k in fits if k != "causal" or "masked" not in fits]
        kind = next((k for k in guesses if k != "masked"), "base")
    if kind is not None and kind not in fits:
        name = type(config).__name__
        raise ValueError(f"a {name} has no {kind!r} model; it has {fits or 'none'}")
    config = copy.deepcopy(config)  # building a model writes into its config
    with torch.device("meta"):
        build = heads[kind].from_config if kind else named
        return build(config).to(dtype)


def nbytes(tensors):
    """Bytes that tensors take, each storage counted once.

    Args:
        tensors: a module (its parameters and buffers), a dict or an iterable of
            tensors.
    """
    if isinstance(tensors, torch.nn.Module):
        tensors = [*tensors.parameters(), *tensors.buffers()]
    elif isinstance(tensors, dict):
        tensors = tensors.values()
    stores = {}
    for t in tensors:
        store = t.untyped_storage()
        # On meta every address is 0: there each tensor counts as a storage of its own.
        key = id(t) if t.device.type == "meta" else (t.device, store.data_ptr())
        stores[key] = store.nbytes()
    return sum(stores.values())


def peak_memory(work):
    """Bytes that `work()` allocates at its highest point, above what was there before.

    On a GPU, CUDA's own counter; on the CPU, the running maximum of the allocations and
    releases that torch's profiler reports (not the process's RSS, which never
    shrinks)."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    return max(_levels(work))


def held_memory(work):
    """Bytes that `work()` has allocated and that are still there when it has ended.

    After a forward pass whose loss is still there: all that waits for the backward, in
    autograd's hands or in anybody's. Measured as in `peak_memory`."""
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.memory_allocated() - before
    return _levels(work)[-1]


def _levels(work):
    """Bytes allocated since the start, after each allocation and release of the CPU."""
    from torch.profiler import ProfilerActivity, profile

    run = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    with _no_stderr():
        run.start()
    try:
        work()
    finally:
        with _no_stderr():
            run.stop()
    events = run.profiler.kineto_results.events()
    memory = sorted(
        (e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"
    )
    return [0, *itertools.accumulate(change for _, change in memory)]


@contextlib.contextmanager
def _no_stderr():
    """The profiler logs to file descriptor 2, and a notebook would store that.

    torch 2.11 warns too that the profiler clears its events with each cycle: here there
    is one."""
    stderr = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(nowhere)


def step_times(steps, rounds=20, warmup=3):
    """Median seconds of several pieces of work, measured turn by turn in one run.

    Taking turns spreads whatever else the machine does over all of them, so the ratios
    are steadier than the seconds.

    Args:
        steps: {name: function without arguments}.
        rounds: how many turns are measured.
        warmup: how many turns come before those.

    Returns:
        {name: seconds}.
    """
    times = {name: [] for name in steps}
    for round_ in range(warmup + rounds):
        for name, step in steps.items():
            _synchronize()
            begun = time.perf_counter()
            step()
            _synchronize()
            if round_ >= warmup:
                times[name].append(time.perf_counter() - begun)
    return {name: statistics.median(some) for name, some in times.items()}


def _synchronize():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def versions(names=LIBRARIES):
    """{name: version} of the libraries that are installed."""
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def machine():
    """What the figures were measured on, for a results file: cores, threads,
    versions."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return dict(
        cores=os.cpu_count(),
        threads=torch.get_num_threads(),
        vectors=torch.backends.cpu.get_cpu_capability(),
        gpu=gpu,
        python=platform.python_version(),
        **versions(),
    )


def interval(a, b, draws=2000, seed=0):
    """Mean difference of two methods and its 95% interval, by a paired bootstrap.

    The seeds and the records are both drawn anew, the same ones for both methods.

    Args:
        a: booleans of shape (seeds, records), right or wrong.
        b: the same for another method and the same test records.
        draws: how often to draw.
        seed: of the draws.

    Returns:
        (mean of a - b, low, high).

    Raises:
        ValueError: other shapes.
    """
    a, b = (torch.as_tensor(x, dtype=torch.float64) for x in (a, b))
    if a.shape != b.shape or a.dim() != 2:
        raise ValueError(
            f"need two (seeds, records) tables, not {a.shape} and {b.shape}"
        )
    dice = torch.Generator().manual_seed(seed)
    gap, means = a - b, []
    for _ in range(draws):
        rows = torch.randint(len(gap), (len(gap),), generator=dice)
        columns = torch.randint(gap.shape[1], (gap.shape[1],), generator=dice)
        means.append(gap[rows][:, columns].mean())
    low, high = torch.quantile(
        torch.stack(means), torch.tensor([0.025, 0.975]).double()
    )
    return gap.mean().item(), low.item(), high.item()


# Student's t, 97.5%, by the number of pairs.
STUDENT_T = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}


def paired_interval(a, b):
    """The mean of a - b over pairs, and its 95% interval by Student's t.

    Args:
        a, b: a number for each seed, the same seeds in the same order, 2 to 8 of them.

    Returns:
        (mean, low, high).

    Raises:
        ValueError: the lists differ in length, or have fewer than 2 or more than 8.
    """
    gaps = [x - y for x, y in zip(a, b, strict=True)]
    if len(gaps) not in STUDENT_T:
        raise ValueError(f"paired_interval takes 2 to 8 pairs, not {len(gaps)}")

    mean = statistics.mean(gaps)
    half = STUDENT_T[len(gaps)] * statistics.stdev(gaps) / len(gaps) ** 0.5
    return mean, mean - half, mean + half
