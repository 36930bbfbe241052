"""Bytes alive and their highest point, of a step that runs on shapes alone.

A `Tracker` sees every operation while it is active, and follows each storage from birth
to death. On torch's meta device no number is ever computed, so two things need help,
which `as_on` and the tracker give: code that asks about values, and operations whose
meta version takes another path than hardware does.
"""

import contextlib
import functools
import itertools
import weakref
from unittest import mock

import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from peftlab import int8

aten = torch.ops.aten
# Without values a question gets the answer that fits whole sequences and small numbers:
# "are all?" yes, "is any?" no, "below?" yes, "above?" no.
ANSWERS = {aten.all: True, aten.any: False, aten.lt: True, aten.gt: False}
ARITHMETIC = {aten.add, aten.add_, aten.sub, aten.sub_}
ARITHMETIC |= {aten.mul, aten.mul_, aten.div, aten.div_}
INTO_ZEROS = {aten.scatter_add, aten.index_put, aten.index_add}


class Tracker(TorchDispatchMode):
    """Counts the bytes of all storages that operations return while it is active.

    Args:
        device: "cpu" or "cuda", whose arithmetic is counted (see `_copies`).

    Attributes:
        live: bytes that are alive now.
        peak: the most bytes that ever were alive at once.
        course: the bytes alive at each moment that was looked at, a list.
    """

    def __init__(self, device="cpu"):
        super().__init__()
        self.device = device
        self.live = 0
        self.peak = 0
        self.course = []
        self.storages = {}  # {address: a reference that keeps nothing alive}
        self.born = {}  # {address: how many moments came before}

    def enter(self, values):
        """Count the storages of those values that are tensors, each storage once."""
        for tensor in values:
            if not isinstance(tensor, torch.Tensor):
                continue
            storage = tensor.untyped_storage()
            address = storage._cdata
            if address in self.storages:
                continue

            size = storage.nbytes()
            leave = functools.partial(self._leave, address, size)
            self.storages[address] = weakref.ref(storage, leave)
            self._come(address, size)

    def _come(self, address, size):
        self.live += size
        self.born[address] = len(self.course)

    def _leave(self, address, size, _):
        self.live -= size
        del self.storages[address], self.born[address]

    def look(self, more=0):
        """Take this moment into the course, with so many bytes more."""
        self.course.append(self.live + more)
        self.peak = max(self.peak, self.course[-1])

    def peak_without(self, tensors):
        """The most bytes alive at once, less those of `tensors` that were there before.

        A tensor counts at the moment at which it is made, and never again.
        """
        made = [0] * (len(self.course) + 1)
        for tensor in tensors:
            storage = tensor.untyped_storage()
            made[self.born[storage._cdata] + 1] += storage.nbytes()
        before = itertools.accumulate(made)
        return max(live - gone for live, gone in zip(self.course, before, strict=False))

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation is aten._local_scalar_dense.default and hasattr(args[0], "answer"):
            return args[0].answer

        self.look()
        result = operation(*args, **(kwargs or {}))
        name = operation.overloadpacket
        if name in ANSWERS:
            result.answer = ANSWERS[name]
        single = isinstance(result, torch.Tensor)  # nearly always, and it is quicker
        self.enter([result] if single else tree_leaves(result))

        # In the backward pass autograd adds a second gradient to the first in place, if
        # that is no view, and what was picked out to zeros. Where it is watched it does
        # not: so the peak is taken at the next operation, once the two are gone.
        in_place = operation is aten.add.Tensor or name in INTO_ZEROS
        if torch.is_grad_enabled() or not in_place or args[0]._is_view():
            self.look(self._copies(name, args, result))
        return result

    def _copies(self, name, args, result):
        """Bytes of a CPU's copies of what has another dtype than the arithmetic has.

        A GPU has none: it converts as it reads.
        """
        if self.device != "cpu" or name not in ARITHMETIC:
            return 0
        operands = [t for t in args if isinstance(t, torch.Tensor) and t.dim()]
        if len(operands) < 2:
            return 0

        common = torch.promote_types(*(t.dtype for t in operands))
        copied = [t.numel() for t in (*operands, result) if t.dtype != common]
        return sum(copied) * common.itemsize


def nbytes(values):
    """Bytes of those values that are tensors, each storage once."""
    tracker = Tracker()
    tracker.enter(values)
    return tracker.live


# Meta tensors on the paths of hardware


@contextlib.contextmanager
def as_on(device):
    """Inside, meta tensors take the paths that tensors on that device take.

    Args:
        device: "cpu" or "cuda".
    """
    from transformers import masking_utils

    with contextlib.ExitStack() as stack:

        def patch(module, name, new):
            change = mock.patch.object(module, name, new, create=True)
            stack.enter_context(change)

        attention = functional.scaled_dot_product_attention
        on_device = functools.partial(_attention, attention, device)
        patch(functional, "scaled_dot_product_attention", on_device)
        if device == "cuda":
            on_device = functools.partial(_dropout, functional.dropout)
            patch(functional, "dropout", on_device)
        patch(torch, "autocast", functools.partial(_autocast, torch.autocast))
        patch(int8, "decompose", functools.partial(_decompose, int8.decompose))
        patch(int8, "_multiply", functools.partial(_multiply, int8._multiply, device))
        # It sums and compares; a tracker knows an answer to `all` alone.
        patch(masking_utils, "fast_all", torch.all)
        # On meta torch has it for bfloat16 alone; experts share the tokens evenly.
        patch(functional, "grouped_mm", _grouped_mm)
        yield


def _attention(original, device, q, k, v, attn_mask=None, dropout_p=0.0, *a, **more):
    """On meta torch would store the matrix of scores; hardware seldom does."""
    learned = attn_mask is not None and attn_mask.requires_grad
    stores = device == "cpu" and (dropout_p or learned or q.shape[-1] != v.shape[-1])
    shared = q.shape[:-2] != k.shape[:-2] and not more.get("enable_gqa")  # Falcon's
    if stores or shared or not q.is_meta or q.dim() != 4:
        return original(q, k, v, attn_mask, dropout_p, *a, **more)

    kernel = _learned if learned else _flash
    return kernel(q, k, v, attn_mask, *a, **more)


def _flash(q, k, v, mask, is_causal=False, scale=None, enable_gqa=False):
    """Stores the result and one float32 a row, and makes the scores again later."""
    if mask is not None and mask.dtype == torch.bool:
        ends = torch.zeros(2, dtype=q.dtype, device=q.device)  # 0 and -inf
        mask = torch.where(mask, ends[0], ends[1])
    flash = aten._scaled_dot_product_flash_attention_for_cpu
    return flash(q, k, v, 0.0, is_causal, attn_mask=mask, scale=scale)[0]


def _learned(q, k, v, bias, is_causal=False, scale=None, enable_gqa=False):
    """The kernel that has a gradient for a bias on the scores, such as T5's."""
    bias = bias.expand(*q.shape[:3], k.shape[2])
    efficient = aten._scaled_dot_product_efficient_attention
    return efficient(q, k, v, bias, True, 0.0, is_causal, scale=scale)[0]


def _dropout(original, input, p=0.5, training=True, inplace=False):
    """A GPU stores its mask in booleans."""
    if inplace or not (input.is_meta and training and p):
        return original(input, p, training, inplace)
    return torch.native_dropout(input, p, True)[0]


def _autocast(original, device_type, *args, **more):
    """Meta has none, and is asked for none but to turn it off."""
    if device_type == "meta":
        return contextlib.nullcontext()
    return original(device_type, *args, **more)


def _decompose(original, x, threshold):
    """No column of x is an outlier; in large models a few of thousands are."""
    if not x.is_meta:
        return original(x, threshold)
    size = x.abs()
    is_small = size < threshold
    absmax = size.amax(-1, keepdim=True).float()
    codes = int8._codes(x, absmax)
    del size, is_small  # only now, as in the original
    return int8.Quantized(codes, absmax, x.dtype), x.new_empty(0, dtype=torch.long)


def _multiply(original, device, a, b):
    """A GPU's kernel gives int32, (n, out), and so does that of a CPU with AVX512."""
    direct = device == "cuda" or torch.backends.cpu.get_cpu_capability() == "AVX512"
    if a.is_meta and direct:
        return a.new_empty(len(a), len(b), dtype=torch.int32)
    return original(a, b)


def _grouped_mm(x, weights, offs=None, **more):
    """A mixture's product, (n, in) and (experts, in, out) -> (n, out): of that size."""
    return x @ weights[0]
