"""8-bit Adam's laws, the library's numbers, and the run that follows 32-bit Adam.

A law that takes only `adam8bit`, the module, is run again by tests/test_mutations.py on
broken copies of adam8bit.py. bitsandbytes packs states on the CPU by a table of 65,536
even bins, BIN wide, so its codes near 0 are not the nearest; the exact kernel that it
keeps for other devices gives our bits.
"""

import copy
import io
import math
import pickle

import pytest
import torch
from bitsandbytes import functional
from bitsandbytes.optim import AdamW8bit
from common import assert_one_sentence
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from experiments.sweeps import adam8bit as experiment
from peftlab import adam8bit as reference
from peftlab import nf4
from peftlab.kit import measure, results, base_models

BIN = 2 / 65535  # the width of the library's bins, over a block's largest magnitude
EVERY = settings(
    max_examples=500, deadline=None, derandomize=True, report_multiple_bugs=False
)
MAPS = {"m, signed": True, "v, unsigned": False}


@pytest.fixture(scope="module")
def adam8bit():
    return reference


def noise(*shape, seed=0, decades=0.0):
    """Gaussian, each number smaller by up to so many decades."""
    dice = torch.Generator().manual_seed(seed)
    scale = 10 ** (-decades * torch.rand(shape, generator=dice))
    return torch.randn(shape, generator=dice) * scale


def parameter(*shape, seed=0, dtype=torch.float32):
    return nn.Parameter(noise(*shape, seed=seed).to(dtype))


def steps(optimizer, weights, gradients):
    """A step for each list of gradients, one for each weight (None: no gradient)."""
    for row in gradients:
        for w, g in zip(weights, row, strict=True):
            w.grad = None if g is None else g.to(w.dtype, copy=True)
        optimizer.step()
    return [w.detach().clone() for w in weights]


def unpacked(module, state, blocksize=256):
    """m and v of a state, float32, whichever way they are kept."""
    if state["m"].dtype == torch.float32:
        return state["m"], state["v"]
    maps = module.dynamic_map(True), module.dynamic_map(False)
    return [
        module.dequantize(state[x], state[f"{x}_absmax"], code, blocksize)
        for x, code in zip("mv", maps, strict=True)
    ]


def same_bits(one, two):
    return one.dtype == two.dtype and torch.equal(one, two)


# The laws of the map


def test_each_decade_of_the_map_is_cut_twice_as_fine(adam8bit):
    for signed in (True, False):
        code = adam8bit.dynamic_map(signed)
        assert code.shape == (256,) and (code.diff() > 0).all(), "256 values, rising"
        assert 0 in code and code[-1] == 1, "0 and 1 are on the map"
        tail = code[(code > 0) & (code < 1)]
        for e in range(7):
            low, high = 0.1 * 10.0 ** (e - 6), 10.0 ** (e - 6)
            found = tail[(tail > low) & (tail < high)].double()
            parts = 2 ** (e + (not signed))
            assert len(found) == parts, f"{len(found)} values from {low} to {high}"
            width = (high - low) / parts
            first = low + width / 2  # the middle of the first part
            want = first + width * torch.arange(parts, dtype=torch.float64)
            assert torch.allclose(found, want, rtol=1e-6, atol=0), "middles of parts"
        below = code[code < 0]
        mirror = -tail.flip(0) if signed else tail[:0]
        assert torch.equal(below, mirror), "the negatives of all but 1, if signed"


def test_the_map_heeds_no_default(adam8bit):
    want = adam8bit.dynamic_map()
    try:
        torch.set_default_dtype(torch.float64)
        with torch.device("meta"):
            got = adam8bit.dynamic_map()
    finally:
        torch.set_default_dtype(torch.float32)
    assert got.device.type == "cpu" and same_bits(got, want)


# The laws of packing

FLOATS = st.floats(-(2.0**66), 2.0**66, width=32, allow_subnormal=False)
FLOATS = FLOATS.map(lambda x: x if abs(x) > 1e-20 else 0.0)


@st.composite
def tensors(draw, least=None):
    """A tensor and a block size: any floats, or many over some decades."""
    blocksize = draw(st.sampled_from([1, 2, 3, 7, 16, 64, 256]))
    if draw(st.booleans()):
        x = torch.tensor(draw(st.lists(FLOATS, min_size=1, max_size=20)))
    else:
        n, seed = draw(st.integers(1, 600)), draw(st.integers(0, 10**6))
        x = noise(n, seed=seed, decades=draw(st.sampled_from([0.0, 2.0, 8.0])))
        x *= 10.0 ** draw(st.integers(-10, 10))
    return (x if least is None else x.abs()), blocksize


def scaled(x, absmax, blocksize):
    """x over its block's largest, in float64; blocks of zeros give zeros."""
    largest = absmax.double().repeat_interleave(blocksize)[: x.numel()]
    return x.double() / largest.where(largest > 0, 1.0), largest


@EVERY
@given(case=tensors(), signed=st.booleans())
def test_every_code_is_the_nearest(adam8bit, case, signed):
    (x, blocksize), code = case, adam8bit.dynamic_map(signed)
    x = x if signed else x.abs()
    codes, absmax = adam8bit.quantize(x, code, blocksize)
    want = [block.abs().max() for block in x.split(blocksize)]
    assert torch.equal(absmax, torch.stack(want)), "absmax: each block's largest"
    assert codes.dtype == torch.uint8 and codes.shape == x.shape
    exact, _ = scaled(x, absmax, blocksize)
    distance = (exact[:, None] - code.double()).abs()  # (n, 256)
    chosen = distance.gather(1, codes.long()[:, None])[:, 0]
    excess = chosen - distance.min(1).values
    assert (excess <= 1e-6 * exact.abs()).all(), "a nearer value is on the map"


@EVERY
@given(case=tensors(), signed=st.booleans())
def test_the_error_is_within_half_the_gap_times_absmax(adam8bit, case, signed):
    (x, blocksize), code = case, adam8bit.dynamic_map(signed)
    x = x if signed else x.abs()
    codes, absmax = adam8bit.quantize(x, code, blocksize)
    back = adam8bit.dequantize(codes, absmax, code, blocksize)
    exact, largest = scaled(x, absmax, blocksize)
    below = code.double() if not signed else torch.cat([-code[-1:], code]).double()
    above = torch.bucketize(exact, below).clamp(1, len(below) - 1)
    half = (below[above] - below[above - 1]) / 2
    edge = exact < code[0]  # from -1 to the lowest value: half a gap lies beyond it
    half = torch.where(edge, 2 * half, half)
    error = (back.double() - x.double()).abs()
    assert (error <= largest * (half + 1e-6 * exact.abs())).all()
    assert (error <= largest * (0.00704 if signed else 0.00353)).all()
    assert (back[x == 0] == 0).all(), "zero must come back as zero"


@EVERY
@given(case=tensors(), signed=st.booleans())
def test_a_packed_tensor_packs_to_itself(adam8bit, case, signed):
    (x, blocksize), code = case, adam8bit.dynamic_map(signed)
    x = x if signed else x.abs()
    for block in x.split(blocksize):
        if block.min() < -block.max():  # its largest is negative: see the next law
            block.neg_()
    codes, absmax = adam8bit.quantize(x, code, blocksize)
    back = adam8bit.dequantize(codes, absmax, code, blocksize)
    again, largest = adam8bit.quantize(back, code, blocksize)
    assert torch.equal(largest, absmax), "the largest must come back as it is"
    some = absmax.repeat_interleave(blocksize)[: x.numel()] > 0
    assert torch.equal(again[some], codes[some]), "packing twice must change nothing"


@EVERY
@given(case=tensors(), signed=st.booleans(), power=st.integers(-20, 20))
def test_a_power_of_two_changes_no_code(adam8bit, case, signed, power):
    (x, blocksize), code = case, adam8bit.dynamic_map(signed)
    x, factor = x if signed else x.abs(), 2.0**power
    codes, absmax = adam8bit.quantize(x, code, blocksize)
    again, largest = adam8bit.quantize(x * factor, code, blocksize)
    assert torch.equal(again, codes), "the code depends on the scale"
    assert torch.equal(largest, absmax * factor)
    back, twin = (
        adam8bit.dequantize(codes, a, code, blocksize) for a in (absmax, largest)
    )
    assert torch.equal(twin, back * factor)


def test_minus_one_is_not_on_the_map(adam8bit):
    x, code = torch.tensor([-1.0, 0.5]), adam8bit.dynamic_map()
    back = adam8bit.dequantize(*adam8bit.quantize(x, code), code)
    assert back[0] == code[0] and abs(back[0] + 0.992969) < 1e-6
    unsigned = adam8bit.dynamic_map(False)
    assert adam8bit.quantize(x, unsigned)[0][0] == 0, "nothing below 0 is unsigned"


def test_a_large_number_spoils_its_own_block_alone(adam8bit):
    code, x = adam8bit.dynamic_map(), noise(3, 200)  # 256, 256 and 88 in row order
    spoilt = x.clone()
    spoilt[1, 100] = 1e4  # number 300: in the second block
    for blocksize, own in ((256, slice(256, 512)), (64, slice(256, 320))):
        (codes, absmax), (others, largest) = (
            adam8bit.quantize(t, code, blocksize) for t in (x, spoilt)
        )
        assert codes.shape == x.shape and absmax.shape == (-(-600 // blocksize),)
        assert absmax.dtype == torch.float32
        changed = (codes != others).flatten()
        assert changed[own].any(), "what shares a block with it loses precision"
        changed[own] = False
        assert not changed.any(), "blocks run row after row, each with its own absmax"
        assert (largest != absmax).sum() == 1
        back = adam8bit.dequantize(codes, absmax, code, blocksize)
        assert back.shape == x.shape and (back - x).abs().max() < 0.03


def test_a_tensor_without_numbers_packs(adam8bit):
    code = adam8bit.dynamic_map()
    codes, absmax = adam8bit.quantize(torch.zeros(0, 5), code)
    assert codes.shape == (0, 5) and absmax.shape == (0,)
    assert adam8bit.dequantize(codes, absmax, code).shape == (0, 5)


def test_a_block_is_no_longer_than_the_tensor(adam8bit):
    code, x = adam8bit.dynamic_map(), noise(5000)
    codes, absmax = adam8bit.quantize(x, code, 5000)
    for blocksize in (2**20, 2**62, 10**30):
        got, largest = adam8bit.quantize(x, code, blocksize)
        assert torch.equal(got, codes) and torch.equal(largest, absmax)
        one, two = (
            adam8bit.dequantize(codes, absmax, code, size) for size in (5000, blocksize)
        )
        assert torch.equal(one, two)

    def work():
        adam8bit.dequantize(*adam8bit.quantize(x, code, 2**20), code, 2**20)

    used = measure.peak_memory(work) / x.nbytes
    assert used < 10, f"{used:.0f} times x: is it filled up to a whole block?"


# The laws of the step

HOW = dict(lr=0.01, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.1)


def textbook(w, gradients, lr, betas, eps, weight_decay):
    """AdamW as it is written, in float64 (Loshchilov and Hutter, algorithm 2)."""
    w, m, v = w.detach().double(), 0.0, 0.0
    for t, g in enumerate(gradients, 1):
        m = betas[0] * m + (1 - betas[0]) * g.double()
        v = betas[1] * v + (1 - betas[1]) * g.double() ** 2
        mean, square = m / (1 - betas[0] ** t), v / (1 - betas[1] ** t)
        w = w - lr * (mean / (square.sqrt() + eps) + weight_decay * w)
    return w


def test_a_small_tensor_takes_the_textbooks_steps(adam8bit):
    w = parameter(50, 80)
    gradients = [0.1 * noise(50, 80, seed=t, decades=2.0) for t in range(1, 6)]
    want = textbook(w, gradients, **HOW)
    (got,) = steps(adam8bit.Adam8bit([w], **HOW), [w], [[g] for g in gradients])
    assert torch.allclose(got.double(), want, rtol=0, atol=1e-6), (
        f"{(got - want).abs().max():.1e} off: is eps outside the root, is the bias"
        " corrected, does the step count on, is weight decay apart from the gradient?"
    )


def test_the_first_step_of_8_bits_is_the_textbooks_too(adam8bit):
    w, g = parameter(64, 128), 0.1 * noise(64, 128, seed=1, decades=2.0)
    want = textbook(w, [g], **HOW)
    (got,) = steps(adam8bit.Adam8bit([w], **HOW), [w], [[g]])
    assert torch.allclose(got.double(), want, rtol=0, atol=1e-6), "packed before used?"


def test_the_first_step_is_lr_long_whatever_the_gradient(adam8bit):
    for shape in ((10,), (64, 128)):
        w, g = parameter(*shape), noise(*shape, seed=1, decades=3.0)
        start = w.detach().clone()
        (end,) = steps(adam8bit.Adam8bit([w], lr=0.01, eps=1e-20), [w], [[g]])
        assert torch.allclose(end, start - 0.01 * g.sign(), rtol=0, atol=1e-5), (
            "bias correction missing?"
        )


def test_an_even_gradient_moves_every_weight_by_lr_a_step(adam8bit):
    for shape in ((10,), (64, 128)):
        w = parameter(*shape)
        start, g = w.detach().clone(), torch.full(shape, 0.5)
        (end,) = steps(adam8bit.Adam8bit([w], lr=0.01), [w], [[g]] * 10)
        gone = start - end
        assert torch.allclose(gone, torch.full(shape, 0.1), rtol=0, atol=1e-5), (
            f"{gone.mean():.4f} in 10 steps of 0.01: does the step count on?"
        )


def test_codes_are_no_view_of_the_padding(adam8bit):
    """What is saved is the storage, and the last block is seldom whole."""
    for n in (1, 255, 257, 4097):
        codes, _ = adam8bit.quantize(noise(n), adam8bit.SIGNED)
        assert codes.untyped_storage().nbytes() == codes.nbytes == n


def test_the_states_are_bytes_and_one_number_a_block(adam8bit):
    for shape, blocksize in (((64, 64), 256), ((97, 61), 256), ((64, 128), 64)):
        w = parameter(*shape)
        optimizer = adam8bit.Adam8bit([w], blocksize=blocksize)
        steps(optimizer, [w], [[noise(*shape, seed=s)] for s in (1, 2)])
        state, blocks = optimizer.state[w], -(-w.numel() // blocksize)
        assert state.keys() == {"step", "m", "v", "m_absmax", "v_absmax"}
        assert state["step"] == 2
        for x in "mv":
            assert state[x].dtype == torch.uint8, f"{x} was not packed again"
            assert state[x].shape == w.shape
            assert same_bits(state[f"{x}_absmax"], state[f"{x}_absmax"].float())
            assert state[f"{x}_absmax"].shape == (blocks,), "one absmax for each block"


def test_fewer_than_4096_weights_stay_in_32_bits(adam8bit):
    for n, least, kind in (
        (4095, 4096, torch.float32),
        (4096, 4096, torch.uint8),
        (9, 9, torch.uint8),
        (5000, math.inf, torch.float32),
    ):
        w = parameter(n)
        optimizer = adam8bit.Adam8bit([w], min_8bit_size=least)
        steps(optimizer, [w], [[noise(n)], [noise(n)]])
        kinds = {optimizer.state[w][x].dtype for x in "mv"}
        assert kinds == {kind}, f"{n} weights, 8 bits from {least} on: {kinds}"


def test_the_states_are_adams_within_half_a_gap(adam8bit):
    w, g = parameter(64, 128), noise(64, 128, seed=1, decades=2.0)
    optimizer = adam8bit.Adam8bit([w], betas=(0.8, 0.95))
    steps(optimizer, [w], [[g]])
    m, v = unpacked(adam8bit, optimizer.state[w])
    want = 0.2 * g, 0.05 * g**2
    for name, got, exact, gap in zip(
        "mv", (m, v), want, (0.00704, 0.00353), strict=True
    ):
        blocks = exact.reshape(-1, 256)
        bound = gap * blocks.abs().amax(1, keepdim=True)
        error = (got.reshape(-1, 256) - blocks).abs()
        assert (error <= bound).all(), (
            f"{name}: {(error / bound).max():.1f} times half the widest gap of its map:"
            " m is (1 - beta1) g on the signed map, v (1 - beta2) g^2 on the unsigned"
        )


def test_the_second_step_counts_on_from_the_states(adam8bit):
    w = parameter(64, 128)
    optimizer = adam8bit.Adam8bit([w], **HOW)
    one, two = (0.1 * noise(64, 128, seed=s, decades=1.0) for s in (1, 2))
    (w1,) = steps(optimizer, [w], [[one]])
    m, v = (x.double() for x in unpacked(adam8bit, optimizer.state[w]))
    m, v = 0.8 * m + 0.2 * two.double(), 0.95 * v + 0.05 * two.double() ** 2
    root = (v / (1 - 0.95**2)).sqrt() + HOW["eps"]
    want = w1.double() * (1 - 0.01 * 0.1) - 0.01 * m / (1 - 0.8**2) / root
    (got,) = steps(optimizer, [w], [[two]])
    assert torch.allclose(got.double(), want, rtol=0, atol=1e-6), "not from its states"


def test_a_gradient_lost_in_v_gives_no_giant_step(adam8bit):
    w = parameter(64, 128)
    g = noise(64, 128, seed=1)
    g[:, ::2] *= 1e-4  # squared, 1e-8 of its block's largest: nearest is code 0
    g[0] = 0
    optimizer = adam8bit.Adam8bit([w], lr=0.01)
    (before,) = steps(optimizer, [w], [[g]])
    (after,) = steps(optimizer, [w], [[torch.zeros_like(g)]])
    longest = (after - before).abs().max() / 0.01
    assert longest < 3, (
        f"a step of {longest:.0f} lr: v was rounded to 0 and m was not, so the weight"
        " moved by m / eps"
    )
    v = optimizer.state[w]["v"]
    assert (v[g != 0] > 0).all() and (v[g == 0] == 0).all(), "code 0 means v = 0"


def test_weight_decay_is_apart_from_the_gradient(adam8bit):
    for shape in ((10,), (64, 128)):
        w = parameter(*shape)
        start, none = w.detach().clone(), torch.zeros(shape)
        optimizer = adam8bit.Adam8bit([w], lr=0.1, weight_decay=0.5)
        (end,) = steps(optimizer, [w], [[none]] * 2)
        assert torch.allclose(end, start * 0.95**2), (
            "not AdamW: w shrinks by lr * decay"
        )
        m, v = unpacked(adam8bit, optimizer.state[w])
        assert not m.any() and not v.any(), "weight decay went into m and v"


def test_what_has_no_gradient_is_left_alone(adam8bit):
    frozen = parameter(64, 128).requires_grad_(False)
    idle, used = parameter(64, 128, seed=1), parameter(10)
    optimizer = adam8bit.Adam8bit([frozen, idle, used], weight_decay=0.1)
    start = [w.detach().clone() for w in (frozen, idle, used)]
    end = steps(optimizer, [frozen, idle, used], [[None, None, noise(10)]] * 2)
    assert torch.equal(end[0], start[0]), "a frozen weight moved"
    assert torch.equal(end[1], start[1]), "a weight without a gradient moved"
    assert not torch.equal(end[2], start[2])
    assert optimizer.state.keys() == {used}, "a state for what has no gradient"


def test_each_group_has_its_own_settings_and_a_schedule_its_say(adam8bit):
    weights = [parameter(64, 128, seed=s) for s in range(3)]
    first, second = [weights[0]], weights[1:]
    optimizer = adam8bit.Adam8bit(
        [
            dict(params=first, lr=0.1, min_8bit_size=math.inf),
            dict(params=second, blocksize=64),
        ],
        lr=0.01,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: 0.5**s)
    g, start = torch.full((64, 128), 0.5), [w.detach().clone() for w in weights]
    for length in (1.0, 1.5):  # a step, and then one half as long
        end = steps(optimizer, weights, [[g] * 3])
        for w, old, lr in zip(end, start, (0.1, 0.01, 0.01), strict=True):
            gone = (old - w) / lr
            assert torch.allclose(gone, torch.full_like(gone, length), atol=1e-3), (
                f"{gone.mean():.3f} times its group's rate, not {length}"
            )
        schedule.step()
    states = [optimizer.state[w] for w in weights]
    assert states[0]["m"].dtype == torch.float32 and states[1]["m"].dtype == torch.uint8
    assert states[2]["m_absmax"].shape == (128,), "a block size of its own: 64"


def test_the_order_of_weights_and_groups_does_not_matter(adam8bit):
    def run(turn):
        weights = [parameter(64, 128, seed=s) for s in range(3)]
        groups = [dict(params=weights[:2], lr=0.1), dict(params=weights[2:])]
        if turn:
            groups = [dict(params=weights[2:]), dict(params=weights[1::-1], lr=0.1)]
        gradients = [[noise(64, 128, seed=3 * t + s) for s in range(3)] for t in (1, 2)]
        return steps(adam8bit.Adam8bit(groups), weights, gradients)

    for one, two in zip(run(False), run(True), strict=True):
        assert torch.equal(one, two), "a parameter's step depends on its neighbours"


def test_a_closure_is_called_with_gradients_on(adam8bit):
    w = parameter(10)
    optimizer = adam8bit.Adam8bit([w], lr=0.01)
    start = w.detach().clone()

    def closure():
        optimizer.zero_grad()
        loss = w.square().sum()
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    assert loss == start.square().sum(), "step must return what the closure gives"
    assert torch.allclose(w, start - 0.01 * start.sign(), atol=1e-5)
    assert w.requires_grad and w.is_leaf


def test_16_bit_weights_are_counted_in_float32_and_rounded_once(adam8bit):
    for dtype in (torch.bfloat16, torch.float16):
        for shape in ((10,), (64, 128)):
            w = parameter(*shape, dtype=dtype)
            twin = nn.Parameter(w.detach().float())
            gradients = [(0.1 * noise(*shape, seed=s)).to(dtype) for s in range(1, 4)]
            own, wide = (adam8bit.Adam8bit([p], **HOW) for p in (w, twin))
            for g in gradients:
                steps(own, [w], [[g]])
                steps(wide, [twin], [[g]])
                assert same_bits(w, twin.to(dtype)), "not rounded once, at the end"
                twin.data.copy_(w)
            for x in own.state[w]:
                one, two = (
                    torch.as_tensor(o.state[p][x]) for o, p in ((own, w), (wide, twin))
                )
                assert same_bits(one, two), f"{x} is not kept as for float32 weights"


def fresh(module, dtype=torch.bfloat16):
    weights = [parameter(64, 128, dtype=dtype), parameter(10, dtype=dtype)]
    groups = [dict(params=weights[:1], blocksize=64), dict(params=weights[1:], lr=0.1)]
    return weights, module.Adam8bit(groups, **HOW)


def later(shapes=((64, 128), (10,)), times=range(1, 4)):
    return [[noise(*s, seed=10 * t) for s in shapes] for t in times]


def test_the_state_dict_goes_round_to_the_bit(adam8bit):
    weights, optimizer = fresh(adam8bit)
    steps(optimizer, weights, later())
    held = copy.deepcopy([w.detach() for w in weights])
    saved = optimizer.state_dict()
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    for source in (saved, torch.load(file, weights_only=True)):
        twins, other = fresh(adam8bit)
        for w, value in zip(twins, held, strict=True):
            w.data.copy_(value)
        other.load_state_dict(source)
        again = other.state_dict()
        assert again["param_groups"] == saved["param_groups"]
        kept = copy.deepcopy(saved["state"])
        for i, state in kept.items():
            assert state.keys() == again["state"][i].keys()
            for x, value in state.items():
                got = torch.as_tensor(again["state"][i][x])
                assert same_bits(got, torch.as_tensor(value)), (
                    f"{x} is {got.dtype}: torch casts a state to its parameter's dtype"
                )
        end = steps(other, twins, later(times=(4, 5)))
        for i, state in kept.items():  # training the twin must leave the source alone
            for x, value in state.items():
                now = torch.as_tensor(saved["state"][i][x])
                assert torch.equal(now, torch.as_tensor(value)), f"{x} is shared"
    for got, want in zip(
        end, steps(optimizer, weights, later(times=(4, 5))), strict=True
    ):
        assert same_bits(got, want), "the loaded optimizer goes another way"


def assert_a_copy_goes_the_same_way(module, copied):
    weights, optimizer = fresh(module)
    steps(optimizer, weights, later())
    twins, other = copied((weights, optimizer))
    want = steps(optimizer, weights, later(times=(4, 5)))
    got = steps(other, twins, later(times=(4, 5)))
    for one, two in zip(got, want, strict=True):
        assert same_bits(one, two), "a copy goes another way: are settings lost?"


def test_a_deep_copy_goes_the_same_way(adam8bit):
    assert_a_copy_goes_the_same_way(adam8bit, copy.deepcopy)


def bad_gradients():
    """{what is wrong: (a parameter, its gradient)}"""
    wrong = {}
    for what, value in (("NaN", math.nan), ("infinite", math.inf), ("1e19", -1e19)):
        g = noise(64, 128)
        g[3, 7] = value
        wrong[what] = parameter(64, 128), g
    table = nn.Embedding(100, 64, sparse=True)
    table(torch.tensor([3, 4])).sum().backward()
    wrong["sparse"] = table.weight, table.weight.grad
    for dtype in (torch.complex64, torch.float64, torch.float8_e4m3fn):
        w = nn.Parameter(torch.ones(4).to(dtype))
        wrong[str(dtype)] = w, torch.ones_like(w)
    return wrong


def test_a_bad_gradient_is_refused_before_the_first_weight(adam8bit):
    for what, (bad, g) in bad_gradients().items():
        good = parameter(64, 128, seed=1)
        optimizer = adam8bit.Adam8bit([good, bad])
        good.grad, bad.grad = noise(64, 128), g
        before = good.detach().clone(), bad.detach().clone()
        with pytest.raises(ValueError) as error:
            optimizer.step()
        assert_one_sentence(error)
        assert torch.equal(good, before[0]) and torch.equal(bad, before[1]), what
        assert not optimizer.state, f"{what}: a state was begun although it raised"


def test_a_foreign_state_is_refused_and_changes_nothing(adam8bit):
    weights, optimizer = fresh(adam8bit)
    steps(optimizer, weights, later())
    before = copy.deepcopy(optimizer.state_dict())
    transposed = nn.Parameter(noise(128, 64)), parameter(10)
    theirs = adam8bit.Adam8bit([dict(params=[w]) for w in transposed])
    steps(theirs, transposed, [[noise(128, 64), noise(10)]])
    plain = torch.optim.AdamW([dict(params=[w]) for w in weights])
    steps(plain, weights, later(times=(1,)))
    one = adam8bit.Adam8bit(weights)  # in one group
    for foreign in (theirs, plain, one):
        with pytest.raises(ValueError) as error:
            optimizer.load_state_dict(foreign.state_dict())
        assert_one_sentence(error)
        after = optimizer.state_dict()
        assert after["param_groups"] == before["param_groups"]
        for i, state in before["state"].items():
            for x, value in state.items():
                now = torch.as_tensor(after["state"][i][x])
                assert same_bits(now, torch.as_tensor(value))


WORST = dict(lr=1e18, weight_decay=1e18, eps=1e18, betas=(1 - 2**-53, 1 - 2**-53))
TOO_MUCH = dict(
    lr=[math.inf, 1e19, 10**400, -1e-9, True],
    weight_decay=[math.inf, 1e30, 10**400, False],
    eps=[math.inf, 1e300, True, 0],
    betas=[(1.0, 0.9), (0.9, 2), (True, 0.9), (0.9, math.nan)],
    min_8bit_size=[True, math.nan, -1],
    blocksize=[True, 64.0, math.inf, 0, -(10**30)],
)


def test_a_setting_that_a_step_cannot_take_is_refused_at_once(adam8bit):
    for name, values in TOO_MUCH.items():
        for value in values:
            with pytest.raises(ValueError) as error:
                adam8bit.Adam8bit([parameter(10)], **{name: value})
            assert_one_sentence(error)
            assert name in str(error.value), "it must say which"
    good = [{k: v} for k, v in WORST.items()] + [WORST, dict(blocksize=10**30)]
    good += [dict(lr=0, eps=1e-30, betas=[0, 0]), dict(min_8bit_size=10**400)]
    for how in good:
        w = parameter(64, 128)
        (end,) = steps(adam8bit.Adam8bit([w], **how), [w], later([(64, 128)], [1]))
        assert end.isfinite().all(), f"{how} is let in and a step fails"


def foreign(saved):
    """{what is wrong: a copy of the state dict `saved` with that}; 0 is packed."""
    wrong = {}

    def but(what, change):
        wrong[what] = copy.deepcopy(saved)
        change(wrong[what])

    for k in ("step", "m", "v", "m_absmax", "v_absmax"):
        but(f"no {k}", lambda d, k=k: d["state"][0].pop(k))
        but(f"{k} is None", lambda d, k=k: d["state"][0].update({k: None}))
    for k in ("m_absmax", "v_absmax"):
        short = saved["state"][0][k][:-1]
        but(f"{k} is short", lambda d, k=k, x=short: d["state"][0].update({k: x}))
        half = saved["state"][0][k].half()
        but(f"{k} is 16-bit", lambda d, k=k, x=half: d["state"][0].update({k: x}))
    for k in "mv":
        for dtype in (torch.float32, torch.int64):
            x = saved["state"][0][k].to(dtype)
            but(f"{k}, {dtype}", lambda d, k=k, x=x: d["state"][0].update({k: x}))
        x = saved["state"][1][k]
        but(f"{k} 16-bit", lambda d, k=k, x=x: d["state"][1].update({k: x.half()}))
        but(f"{k} NaN", lambda d, k=k, x=x: d["state"][1].update({k: x * math.nan}))
        but(f"{k} long", lambda d, k=k, x=x: d["state"][1].update({k: x.repeat(2)}))
    for step in (0, -1, True, 1.5, "3", 10**400, torch.tensor(3.0)):
        but(f"step {step!s:.9}", lambda d, t=step: d["state"][1].update(step=t))
    but("one more", lambda d: d["state"][0].update(z=torch.ones(3)))
    but("no dict", lambda d: d["state"].update({0: [1, 2]}))
    for k in ("lr", "betas", "eps", "weight_decay", "min_8bit_size", "blocksize"):
        but(f"a group without {k}", lambda d, k=k: d["param_groups"][1].pop(k))
        for x in ("x", None, *TOO_MUCH[k]):
            but(
                f"{k} = {x!s:.9}",
                lambda d, k=k, x=x: d["param_groups"][1].update({k: x}),
            )
    but("blocksize 128", lambda d: d["param_groups"][0].update(blocksize=128))
    but("no groups", lambda d: d.pop("param_groups"))
    but("no states", lambda d: d.pop("state"))
    but("no params", lambda d: d["param_groups"][0].pop("params"))
    return wrong | {"None": None, "a list": [saved], "empty": {}}


def test_a_state_dict_that_is_not_whole_is_refused_and_changes_nothing(adam8bit):
    weights, optimizer = fresh(adam8bit)
    steps(optimizer, weights, later())
    before = copy.deepcopy(optimizer.state_dict())
    wrong = foreign(before)
    plain = torch.optim.AdamW([dict(params=[w]) for w in weights])
    wrong["AdamW's, before a step"] = plain.state_dict()
    for what, state_dict in wrong.items():
        try:
            optimizer.load_state_dict(state_dict)
        except ValueError as error:
            assert "\n" not in str(error) and len(str(error)) < 500, what
        except (AttributeError, KeyError, TypeError, OverflowError) as error:
            pytest.fail(f"{what}: {error!r} is no sentence")
        else:
            pytest.fail(f"{what}: loaded")
        after = optimizer.state_dict()
        assert after["param_groups"] == before["param_groups"], what
        for i, state in before["state"].items():
            assert state.keys() == after["state"][i].keys(), what
            for x, value in state.items():
                now = torch.as_tensor(after["state"][i][x])
                assert same_bits(now, torch.as_tensor(value)), what
    optimizer.load_state_dict(before)  # whole, as it is


def test_a_group_that_leaves_8_bits_can_be_saved(adam8bit):
    weights, optimizer = fresh(adam8bit)
    steps(optimizer, weights, later())
    optimizer.param_groups[0]["min_8bit_size"] = math.inf
    for _ in range(2):  # packed by now, then not any more
        twins, other = fresh(adam8bit)
        other.load_state_dict(optimizer.state_dict())
        for w, twin in zip(weights, twins, strict=True):
            twin.data.copy_(w)
        pair = ((optimizer, weights), (other, twins))
        ends = [steps(o, ws, later(times=[4])) for o, ws in pair]
        assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
        kept = optimizer.state[weights[0]].keys()
        assert kept == {"step", "m", "v"}, "what packed m and v is left behind"


def test_a_step_needs_the_memory_of_one_tensor_at_a_time(adam8bit):
    weights = [parameter(256, 256, seed=s, dtype=torch.bfloat16) for s in range(20)]
    for w in weights:
        w.grad = torch.ones_like(w)

    def work():  # states included, so that the profiler sees each born and freed
        optimizer = adam8bit.Adam8bit(weights)
        optimizer.step()
        optimizer.step()

    one = 4 * 256 * 256  # a tensor in float32
    used = measure.peak_memory(work) / one - 20 * 2 * (1 + 4 / 256) / 4
    assert used < 10, f"{used:.0f} tensors in float32 beside the states, of 20"


# Bad input: one sentence each, and no group added

BAD = {
    "lr below zero": dict(lr=-1e-3),
    "lr NaN": dict(lr=math.nan),
    "lr a string": dict(lr="1e-3"),
    "lr None": dict(lr=None),
    "lr a tensor": dict(lr=torch.tensor(0.1)),
    "lr of 401 digits": dict(lr=10**400),
    "lr True": dict(lr=True),
    "lr infinite": dict(lr=math.inf),
    "one beta": dict(betas=(0.9,)),
    "three betas": dict(betas=(0.9, 0.99, 0.999)),
    "beta 1": dict(betas=(0.9, 1.0)),
    "beta below zero": dict(betas=(-0.1, 0.9)),
    "betas a number": dict(betas=0.9),
    "betas strings": dict(betas=("0.9", "0.99")),
    "eps zero": dict(eps=0.0),
    "eps below zero": dict(eps=-1e-8),
    "weight decay below zero": dict(weight_decay=-0.1),
    "min_8bit_size below zero": dict(min_8bit_size=-1),
    "min_8bit_size None": dict(min_8bit_size=None),
    "blocksize zero": dict(blocksize=0),
    "blocksize 64.0": dict(blocksize=64.0),
    "blocksize a string": dict(blocksize="256"),
    "blocksize True": dict(blocksize=True),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_setting_gets_one_sentence_and_no_group(case):
    with pytest.raises(ValueError) as error:
        reference.Adam8bit([parameter(10)], **BAD[case])
    assert_one_sentence(error)
    optimizer = reference.Adam8bit([parameter(10)])
    with pytest.raises(ValueError):
        optimizer.add_param_group(dict(params=[parameter(5)], **BAD[case]))
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_no_byte_stands_for_nan_or_infinity(value):
    with pytest.raises(ValueError) as error:
        reference.quantize(torch.tensor([1.0, value]), reference.SIGNED)
    assert_one_sentence(error)


@pytest.mark.parametrize(
    "x, blocksize",
    [(x, 4) for x in (torch.arange(5), None, "floats", [1.0, 2.0])]
    + [(torch.ones(5), n) for n in (0, True, 4.0, None)],
)
def test_what_cannot_be_packed_gets_one_sentence(x, blocksize):
    with pytest.raises(ValueError) as error:
        reference.quantize(x, reference.SIGNED, blocksize)
    assert_one_sentence(error)


@pytest.mark.parametrize("shape", [(), (0,), (0, 5), (1,), (3, 41, 40)])
def test_any_shape_and_layout_trains(shape):
    plain = parameter(*shape)
    turned = nn.Parameter(
        plain.detach().mT.contiguous().mT if len(shape) > 1 else plain
    )
    turned = nn.Parameter(turned.detach().clone())  # clone keeps the strides
    assert turned.is_contiguous() == (len(shape) < 3)
    gradients = [[noise(*shape, seed=s)] for s in range(1, 4)]
    (got,) = steps(reference.Adam8bit([turned]), [turned], gradients)
    (want,) = steps(reference.Adam8bit([plain]), [plain], gradients)
    assert torch.equal(got, want), "the blocks must not depend on the strides"


def test_numbers_below_1e_38_come_back_within_their_largest():
    x = torch.tensor([3e-39, -1e-40, 0.0])
    codes, absmax = reference.quantize(x, reference.SIGNED)
    back = reference.dequantize(codes, absmax, reference.SIGNED)
    assert (back - x).abs().max() <= 3e-39 and back[2] == 0


def test_a_gradient_may_carry_a_graph_and_x_too():
    x = noise(300).requires_grad_()
    codes, absmax = reference.quantize(x, reference.SIGNED)
    assert not codes.requires_grad and not absmax.requires_grad


# The oracle: bitsandbytes


@pytest.mark.parametrize("signed", MAPS.values(), ids=MAPS)
def test_the_map_is_the_librarys_to_the_bit(signed):
    want = functional.create_dynamic_map(signed=signed)
    assert same_bits(reference.dynamic_map(signed), want)
    assert same_bits((reference.UNSIGNED, reference.SIGNED)[signed], want)


def test_the_signed_map_is_the_one_of_double_quantization():
    assert same_bits(reference.SIGNED, nf4.DYNAMIC)


@pytest.mark.parametrize("signed", MAPS.values(), ids=MAPS)
@pytest.mark.parametrize("decades", [0.0, 3.0, 9.0])
@pytest.mark.parametrize("blocksize", [64, 256, 4096])
def test_codes_are_those_of_the_librarys_exact_kernel(signed, decades, blocksize):
    code = reference.dynamic_map(signed)
    x = noise(16, 4096, decades=decades)
    x[3] = 0
    x = x if signed else x.square()
    got, want = (
        reference.quantize(x, code, blocksize),
        experiment.exact(x, code, blocksize),
    )
    assert same_bits(got[0], want[0]) and same_bits(got[1], want[1])
    back = functional.dequantize_blockwise(
        want[0], absmax=want[1], code=code, blocksize=blocksize
    )
    assert same_bits(reference.dequantize(*got, code, blocksize), back)


def test_the_librarys_cpu_table_is_not_the_nearest():
    """FACTS: about 0.17% of the codes of Gaussian numbers, and 0 is not 0."""
    for signed, zero in ((True, 2.125e-5), (False, 1.5625e-5)):
        code, x = reference.dynamic_map(signed), noise(2**20)
        x = x if signed else x.abs()
        x[::1000] = 0
        codes, absmax = reference.quantize(x, code)
        kernel = torch.ops.bitsandbytes.quantize_blockwise.default
        theirs, largest = kernel(x, code, 256)
        assert torch.equal(largest, absmax)
        share = (theirs != codes)[x != 0].float().mean()
        assert 0.0005 < share < 0.004, f"{share:.2%} of the codes differ"
        assert (code[theirs[x == 0].int()] - zero).abs().max() < 1e-9
        gap = (code[theirs.int()] - code[codes.int()]).abs()
        far = (theirs.int() - codes.int()).abs() > 1
        assert (gap[far] <= BIN).all() and not far.all()


def test_pickling_keeps_an_optimizer_whole():
    assert_a_copy_goes_the_same_way(reference, lambda x: pickle.loads(pickle.dumps(x)))


def pair(shape, dtype=torch.float32, decades=1.0, seed=0, **how):
    """The same weights twice, ours and the library's, and a source of gradients."""
    how = dict(lr=0.01, betas=(0.9, 0.99), weight_decay=0.1) | how
    own, lib = (parameter(*shape, seed=seed, dtype=dtype) for _ in range(2))
    optimizers = reference.Adam8bit([own], **how), AdamW8bit([lib], **how)

    def gradients(t):
        return [0.1 * noise(*shape, seed=seed + t + 1, decades=decades)]

    return own, lib, *optimizers, gradients


NAMES = dict(m="state1", v="state2", m_absmax="absmax1", v_absmax="absmax2")


def take_over(own, lib, ours, theirs):
    """Our weights and states become the library's."""
    state = theirs.state[lib]
    own.data.copy_(lib)
    ours.state[own] = {x: state[y].clone() for x, y in NAMES.items() if y in state}
    ours.state[own]["step"] = state["step"]


def one_step_apart(got, want, code):
    """The index one apart at most; near 0, where a bin of the library's table holds
    many codes, a bin."""
    one, two = code[got.int()], code[want.int()]
    far = (got.int() - want.int()).abs() > 1
    near_0 = torch.maximum(one.abs(), two.abs()) < 4 * BIN
    return ((one - two).abs() <= BIN)[far].all() and near_0[far].all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(64, 128), (97, 61)])
@pytest.mark.parametrize("decades", [0.0, 4.0])
@pytest.mark.parametrize("k", [0, 1, 20])
def test_a_step_from_the_librarys_state_is_the_librarys(dtype, shape, decades, k):
    own, lib, ours, theirs, gradients = pair(shape, dtype, decades)
    steps(theirs, [lib], map(gradients, range(k)))
    if k:
        take_over(own, lib, ours, theirs)
    (got,) = steps(ours, [own], [gradients(k)])
    (want,) = steps(theirs, [lib], [gradients(k)])
    assert same_bits(got, want), "from the same states the weights go the same way"
    state, other = ours.state[own], theirs.state[lib]
    assert state["step"] == other["step"] == k + 1
    for x, signed in (("m", True), ("v", False)):
        assert same_bits(state[f"{x}_absmax"], other[NAMES[f"{x}_absmax"]])
        code = reference.dynamic_map(signed)
        assert one_step_apart(state[x], other[NAMES[x]], code), f"{x}: not one step"


def test_weights_with_the_librarys_exact_codes_are_ours_for_50_steps():
    own, lib, ours, theirs, gradients = pair((64, 128), decades=0.0)
    with experiment.nearest_codes():
        for t in range(50):
            (g,) = gradients(t)
            g += 0.01 * g.sign()  # no v so small that its nearest code is 0
            (got,) = steps(ours, [own], [[g]])
            (want,) = steps(theirs, [lib], [[g]])
            assert same_bits(got, want), f"another way from step {t + 1} on"
    for x, y in NAMES.items():
        assert same_bits(ours.state[own][x], theirs.state[lib][y])


def test_all_that_differs_from_the_librarys_exact_codes_is_v_at_0():
    own, lib, ours, theirs, gradients = pair((64, 128), decades=6.0)
    lost = 0
    with experiment.nearest_codes():
        for t in range(20):
            steps(ours, [own], [gradients(t)])
            steps(theirs, [lib], [gradients(t)])
            state, other = ours.state[own], theirs.state[lib]
            for x in ("m", "m_absmax", "v_absmax"):
                assert same_bits(state[x], other[NAMES[x]]), x
            lost += (other["state2"] == 0).sum().item()
            assert same_bits(state["v"], other["state2"].clamp(min=1)), (
                "code 0 becomes 1, and no other changes"
            )
            take_over(own, lib, ours, theirs)
    assert lost > 100, "no v was lost: this proves nothing"


def corners(m, v, dm, dv, g, t, lr, betas, eps):
    """How far a weight's step can be from the one of the states m and v where they may
    be dm and dv off: the step rises with m and, in size, falls with v, so that its
    extremes are at the corners of the box."""

    def step(m, v):
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g**2
        root = (v / (1 - betas[1] ** t)).sqrt() + eps
        return lr * m / (1 - betas[0] ** t) / root

    ends = [
        step(m + a * dm, (v + b * dv).clamp(min=0)) for a in (-1, 1) for b in (-1, 1)
    ]
    return (torch.stack(ends) - step(m, v)).abs().amax(0)


@pytest.mark.parametrize("decades", [0.0, 1.0, 4.0])
@pytest.mark.parametrize("k", [1, 10])
def test_the_step_after_is_as_far_as_one_quantization_step_can_bring(decades, k):
    own, lib, ours, theirs, gradients = pair((64, 128), decades=decades)
    steps(theirs, [lib], map(gradients, range(k)))
    take_over(own, lib, ours, theirs)
    for w, optimizer in ((own, ours), (lib, theirs)):
        steps(optimizer, [w], [gradients(k)])
    state, boxes = ours.state[own], []
    for x, signed in (("m", True), ("v", False)):
        code, index = reference.dynamic_map(signed), state[x].int()
        gaps = code.diff()
        around = torch.maximum(
            gaps[index.clamp(max=254)], gaps[(index - 1).clamp(min=0)]
        )
        absmax = state[f"{x}_absmax"].repeat_interleave(256).view(own.shape)
        boxes.append(around.clamp(min=BIN).double() * absmax)
    m, v = (x.double() for x in unpacked(reference, state))
    (g,), t = gradients(k + 1), k + 2
    bound = corners(m, v, *boxes, g.double(), t, 0.01, (0.9, 0.99), 1e-8)
    (got,) = steps(ours, [own], [[g]])
    (want,) = steps(theirs, [lib], [[g]])
    gap = (got - want).abs().double()
    assert (gap <= bound + 1e-6).all(), f"{(gap - bound).max():.1e} beyond the bound"
    assert gap.max() > 0, "the states are equal: this proves nothing"


def test_a_hundred_steps_stay_close_to_the_librarys():
    own, lib, ours, theirs, gradients = pair((64, 128), weight_decay=0.01)
    start = own.detach().clone()
    for t in range(100):
        (got,) = steps(ours, [own], [gradients(t)])
        (want,) = steps(theirs, [lib], [gradients(t)])
    gap, way = (got - want).norm(), (want - start).norm()
    assert gap < 0.02 * way, f"{gap / way:.3f} of the way apart"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_small_tensors_are_torchs_adamw_and_the_librarys(dtype):
    own, lib, ours, theirs, gradients = pair((50, 80), dtype)
    third = parameter(50, 80, dtype=dtype)
    how = dict(lr=0.01, betas=(0.9, 0.99), weight_decay=0.1, foreach=False)
    torchs = torch.optim.AdamW([third], **how)
    for t in range(10):
        (got,) = steps(ours, [own], [gradients(t)])
        (want,) = steps(theirs, [lib], [gradients(t)])
        (plain,) = steps(torchs, [third], [gradients(t)])
        ulp = torch.finfo(dtype).eps
        assert torch.allclose(got, want, rtol=2 * ulp, atol=1e-7)
        if dtype == torch.float32:  # below, torch keeps m and v in 16 bits
            assert torch.allclose(got, plain, rtol=2 * ulp, atol=2e-7)
    assert ours.state[own]["m"].dtype == theirs.state[lib]["state1"].dtype


def test_the_library_takes_nan_and_infinity_in_silence():
    """Why ours refuses them: the weight is lost, after infinity its block too."""
    for value, lost in ((math.nan, 1), (math.inf, 256)):
        w, g = parameter(4096), noise(4096)
        optimizer = AdamW8bit([w])
        steps(optimizer, [w], [[g.index_fill(0, torch.tensor([5]), value)]])
        (end,) = steps(optimizer, [w], [[g]])
        assert end.isnan().sum() == lost


# The real run: tiny-decoder on Finnish dates, all weights


def test_the_bytes_of_a_real_model_are_a_quarter():
    sizes, classes = {}, experiment.OPTIMIZERS
    for name in ("AdamW", "Adam8bit", "AdamW8bit"):
        model, tokenizer = base_models.load("tiny-decoder", device="cpu")
        optimizer = classes[name](model.parameters())
        ids = tokenizer("12. maaliskuuta 2026 =", return_tensors="pt")["input_ids"]
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        sizes[name] = [experiment.state_bytes(optimizer, n) for n in (1, 4096)]
    counts = [p.numel() for p in model.parameters()]
    large = [n for n in counts if n >= 4096]
    packed = sum(2 * n + 2 * 4 * -(-n // 256) for n in large)
    assert sizes["AdamW"] == [8 * sum(counts), 8 * sum(large)]
    assert sizes["Adam8bit"] == [packed + 8 * (sum(counts) - sum(large)), packed]
    maps = 2 * 256 * 4  # the library keeps its maps among the states
    assert sizes["AdamW8bit"] == [n + maps for n in sizes["Adam8bit"]]
    assert sizes["Adam8bit"][0] <= 0.27 * sizes["AdamW"][0]
    stored = results.load("adam8bit")
    for name, (every, large) in sizes.items():
        for run in results.where(stored["runs"], optimizer=name):
            assert (run["bytes"], run["large"]) == (every, large), "run it again"


def test_the_stored_figures_follow_from_the_stored_runs():
    stored = results.load("adam8bit")
    kept = {k: f["value"] for k, f in stored["figures"].items()}
    frozen = kept.pop("frozen.countries")
    assert frozen == results.share(stored["frozen"])
    assert kept == pytest.approx(experiment.derive(stored["runs"]))
    for name in experiment.OPTIMIZERS:
        runs = results.where(stored["runs"], optimizer=name)
        assert [r["seed"] for r in runs] == [0, 1, 2]
        assert all(len(r["learned"]) >= 200 for r in runs)
        assert all(r["curve"][-1] == r["final"] < 0.2 < r["curve"][0] for r in runs)


@pytest.mark.parametrize("key", ["final", "held_out"])
def test_8_bit_adam_follows_32_bit_adam_within_the_spread_of_seeds(key):
    runs = results.load("adam8bit")["runs"]
    plain, ours, theirs = (
        [r[key] for r in results.where(runs, optimizer=name)]
        for name in ("AdamW", "Adam8bit", "AdamW8bit")
    )
    spread = max(plain) - min(plain)
    for losses in (ours, theirs):
        for a, b in zip(losses, plain, strict=True):
            assert abs(a - b) <= spread, f"{key}: {a:.4f} for {b:.4f}"
    assert abs(sum(ours) - sum(plain)) / 3 <= spread


def test_the_run_keeps_what_v_at_0_destroys():
    figures = results.load("adam8bit")["figures"]

    def value(key):
        return figures[key]["value"]

    assert value("Adam8bit.largest") < 10 < 100 < value("nearest.largest")
    assert value("nearest.countries") < value("Adam8bit.countries") / 2


@pytest.mark.parametrize("name", ["AdamW", "Adam8bit"])
def test_the_first_20_steps_run_again_as_stored(name):
    *_, losses, largest = experiment.tune(name, 0, steps=20)
    stored = results.where(results.load("adam8bit")["runs"], optimizer=name)[0]
    assert sum(losses) / 20 == pytest.approx(stored["curve"][0], abs=0.05)
    assert largest < 10


# adam8bit.py copied alone, for tests/test_standalone.py

ALONE = """
guard = sys.meta_path.pop(0)  # torch's own optimizers import much when first used
torch.optim.SGD([torch.ones(1, requires_grad=True)], 0.1).step()
sys.meta_path.insert(0, guard)
import adam8bit
from torch import nn
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 2))
x, y = torch.randn(256, 64), torch.randint(2, (256,))
optimizer = adam8bit.Adam8bit(model.parameters(), lr=0.01, weight_decay=0.01)
losses = []
for _ in range(30):
    loss = nn.functional.cross_entropy(model(x), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
assert losses[-1] < 0.1 * losses[0], losses
kinds = [optimizer.state[p]["m"].dtype for p in model.parameters()]
assert kinds == [torch.uint8] + 3 * [torch.float32]
other = adam8bit.Adam8bit(model.parameters())
other.load_state_dict(optimizer.state_dict())
assert other.param_groups[0]["lr"] == 0.01
codes, absmax = adam8bit.quantize(x, adam8bit.SIGNED)
back = adam8bit.dequantize(codes, absmax, adam8bit.SIGNED)
assert (back - x).abs().max() <= 0.0071 * x.abs().max()
"""

# Broken copies, for tests/test_mutations.py

SORTED = "return torch.cat([*parts, *mirror, torch.arange(2, **like)]).sort().values"
SIZE = "n, size = x.numel(), max(1, min(blocksize, x.numel()))"
CAP = "max(1, min(blocksize, codes.numel()))"
LARGEST = "torch.linalg.vector_norm(rows, math.inf, 1)"
READ = "g, w = p.grad.float(), p.float()"
ROOT = 'root = (v.sqrt() / math.sqrt(1 - beta2**t)).add_(group["eps"])'
SHRINK = 'w.mul_(1 - lr * group["weight_decay"])'
KEEP = "self.state[p] = state = dict(step=t, m=m, v=v)"
BEGIN = "(state[k] if state else torch.zeros_like(g)"
BIG = 'if p.numel() >= group["min_8bit_size"]:'
FLOOR = 'state["v"].clamp_(min=(v > 0).byte())'
READY = "pairs = [(p, group) for p, group in pairs if p.grad is not None]"
CUT = "(p, group) for group in self.param_groups for p"
LOOP = "        for p, group in pairs:\n            self._update(p, group)\n"
LOAD = 'super().load_state_dict({**state_dict, "state": {}})'
SETTINGS = "super().__init__(params, dict(how, eps=eps, min_8bit_size=min_8bit_size))"
DECADES = test_each_decade_of_the_map_is_cut_twice_as_fine
DEFAULT = test_the_map_heeds_no_default
NEAREST = test_every_code_is_the_nearest
ERROR = test_the_error_is_within_half_the_gap_times_absmax
ITSELF = test_a_packed_tensor_packs_to_itself
POWER = test_a_power_of_two_changes_no_code
SPOILT = test_a_large_number_spoils_its_own_block_alone
TEXTBOOK = test_a_small_tensor_takes_the_textbooks_steps
FIRST = test_the_first_step_is_lr_long_whatever_the_gradient
EVEN = test_an_even_gradient_moves_every_weight_by_lr_a_step
BYTES = test_the_states_are_bytes_and_one_number_a_block
SMALL = test_fewer_than_4096_weights_stay_in_32_bits
HALF = test_the_states_are_adams_within_half_a_gap
SECOND = test_the_second_step_counts_on_from_the_states
LOST = test_a_gradient_lost_in_v_gives_no_giant_step
DECAY = test_weight_decay_is_apart_from_the_gradient
GROUPS = test_each_group_has_its_own_settings_and_a_schedule_its_say
CLOSURE = test_a_closure_is_called_with_gradients_on
IN_16_BITS = test_16_bit_weights_are_counted_in_float32_and_rounded_once
ROUND = test_the_state_dict_goes_round_to_the_bit
REFUSED = test_a_bad_gradient_is_refused_before_the_first_weight
FOREIGN = test_a_foreign_state_is_refused_and_changes_nothing
WHOLE = test_a_state_dict_that_is_not_whole_is_refused_and_changes_nothing
LIMITS = test_a_setting_that_a_step_cannot_take_is_refused_at_once
LEFT = test_a_group_that_leaves_8_bits_can_be_saved

# {what is broken: (the law that goes red, {text: text in its place})}
MUTATIONS = {
    "the codes are a view": (
        test_codes_are_no_view_of_the_padding,
        {"flatten()[:n].to(torch.uint8)": "to(torch.uint8).flatten()[:n]"},
    ),
    "every decade has as many values": (DECADES, {"(e + 1 - signed)": "(7 - signed)"}),
    "values are the ends of the parts": (DECADES, {"(x[:-1] + x[1:]) / 2": "x[1:]"}),
    "the bit of the sign is wasted": (DECADES, {"(e + 1 - signed)": "e"}),
    "-1 is on the map and 1 is not": (
        DECADES,
        {"torch.arange(2, **like)": "torch.arange(-1, 1, **like)"},
    ),
    "the map heeds the default dtype": (DEFAULT, {"dtype=torch.float32, ": ""}),
    "the map heeds the default device": (DEFAULT, {', device="cpu"': ""}),
    "codes are rounded down": (NEAREST, {"(code[:-1] + code[1:])": "2 * code[1:]"}),
    "codes are rounded to even bins": (
        NEAREST,
        {"bucketize(rows,": "bucketize((rows * 127).round() / 127,"},
    ),
    "the largest is not taken by magnitude": (NEAREST, {LARGEST: "rows.amax(1)"}),
    "absmax is a root of squares": (
        NEAREST,
        {LARGEST: "torch.linalg.vector_norm(rows, 2, 1)"},
    ),
    "a block of zeros is divided by zero": (NEAREST, {".clamp(min=1e-38)": ""}),
    "absmax is kept in 16 bits": (
        NEAREST,
        {"view(x.shape), absmax": "view(x.shape), absmax.half().float()"},
    ),
    "unpacking forgets absmax": (
        ERROR,
        {".mul_(scale[: codes.numel()])": ""},
    ),
    "unpacking is one code off": (
        ERROR,
        {"index_select(0, codes": "roll(1).index_select(0, codes"},
    ),
    "unpacking shrinks a little": (
        ITSELF,
        {"index_select(0, codes": "mul(0.999).index_select(0, codes"},
    ),
    "small blocks are not scaled": (POWER, {"clamp(min=1e-38)": "clamp(min=1.0)"}),
    "the lowest value is made -1": (
        test_minus_one_is_not_on_the_map,
        {SORTED: f"code = {SORTED[7:]}\n    code[0] = -1.0 * signed\n    return code"},
    ),
    "the block size is ignored": (SPOILT, {SIZE: "n = size = x.numel()"}),
    "blocks run down the columns": (
        SPOILT,
        {"x.detach().float().flatten()": "x.detach().float().T.flatten()"},
    ),
    "a full last block gets another": (
        test_a_tensor_without_numbers_packs,
        {"(0, -n % size)": "(0, size - n % size)"},
    ),
    "a short tensor is filled up to a block": (
        test_a_block_is_no_longer_than_the_tensor,
        {SIZE: "n, size = x.numel(), blocksize"},
    ),
    "a short tensor is unpacked as a whole block": (
        test_a_block_is_no_longer_than_the_tensor,
        {CAP: "blocksize"},
    ),
    "eps is inside the root": (
        TEXTBOOK,
        {ROOT: 'root = (v / (1 - beta2**t)).add_(group["eps"]).sqrt()'},
    ),
    "eps is added before the correction": (
        TEXTBOOK,
        {ROOT: 'root = v.sqrt().add_(group["eps"]) / math.sqrt(1 - beta2**t)'},
    ),
    "the betas are swapped": (TEXTBOOK, {"(beta1, beta2) =": "(beta2, beta1) ="}),
    "v takes the gradient's size": (
        TEXTBOOK,
        {"addcmul_(g, g,": "addcmul_(g.sign(), g,"},
    ),
    "a step uses what it has packed": (
        test_the_first_step_of_8_bits_is_the_textbooks_too,
        {
            ROOT: "m = dequantize(*quantize(m, SIGNED, size), SIGNED, size)"
            f"\n        {ROOT}"
        },
    ),
    "m's bias is not corrected": (FIRST, {"-lr / (1 - beta1**t)": "-lr"}),
    "v's bias is not corrected": (FIRST, {" / math.sqrt(1 - beta2**t)": ""}),
    "a step goes uphill": (FIRST, {"value=-lr": "value=lr"}),
    "the step does not count on": (EVEN, {KEEP: KEEP.replace("step=t", "step=0")}),
    "the states are packed once and never again": (
        EVEN,
        {
            KEEP: 'state["step"] = t\n        if t == 1:\n            '
            "state.update(m=m, v=v)",
            BIG: BIG.replace("if ", "if t == 1 and "),
        },
    ),
    "the states stay unpacked after a step": (
        BYTES,
        {BIG: BIG.replace("if ", "if t == 1 and ")},
    ),
    "one absmax serves two blocks": (
        BYTES,
        {'group["lr"], group["blocksize"]': 'group["lr"], 2 * group["blocksize"]'},
    ),
    "small tensors are packed too": (SMALL, {BIG: "if True:"}),
    "4,096 weights are small": (SMALL, {BIG: BIG.replace(">=", ">")}),
    "m is on the unsigned map": (
        HALF,
        {"quantize(m, SIGNED, size)": "quantize(m, UNSIGNED, size)"},
    ),
    "v is on the signed map": (
        HALF,
        {
            "quantize(v, UNSIGNED, size)": "quantize(v, SIGNED, size)",
            'state["v_absmax"], UNSIGNED': 'state["v_absmax"], SIGNED',
        },
    ),
    "v's root is packed": (
        HALF,
        {"quantize(v, UNSIGNED, size)": "quantize(v.sqrt(), UNSIGNED, size)"},
    ),
    "m is packed under v's absmax": (
        SECOND,
        {'dequantize(m, state["m_absmax"]': 'dequantize(m, state["v_absmax"]'},
    ),
    "each step begins anew": (SECOND, {BEGIN: BEGIN.replace("if state", "if {}")}),
    "v is rounded to zero": (LOST, {FLOOR: "pass"}),
    "no v is zero": (LOST, {FLOOR: 'state["v"].clamp_(min=1)'}),
    "weight decay is in the gradient": (
        DECAY,
        {
            READ: 'g, w = p.grad.float() + group["weight_decay"] * p, p.float()',
            SHRINK: "pass",
        },
    ),
    "weight decay is not times lr": (DECAY, {SHRINK: SHRINK.replace("lr * ", "")}),
    "weight decay is forgotten": (DECAY, {SHRINK: "pass"}),
    "no gradient counts as zero": (
        test_what_has_no_gradient_is_left_alone,
        {
            READY: f"""for p, _ in pairs:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        {READY}"""
        },
    ),
    "all groups have one rate": (GROUPS, {'group["lr"], g': 'self.defaults["lr"], g'}),
    "all groups have one block size": (
        GROUPS,
        {'group["lr"], group["blocksize"]': 'group["lr"], self.defaults["blocksize"]'},
    ),
    "only the first group steps": (GROUPS, {CUT: CUT.replace("ups", "ups[:1]")}),
    "the last group's settings serve all": (
        test_the_order_of_weights_and_groups_does_not_matter,
        {"self._update(p, group)": "self._update(p, pairs[-1][1])"},
    ),
    "the closure runs without gradients": (
        CLOSURE,
        {"torch.enable_grad()(closure)()": "closure()"},
    ),
    "the closure's loss is lost": (CLOSURE, {"        return loss\n": ""}),
    "16-bit weights are counted in 16 bits": (
        IN_16_BITS,
        {
            READ: "g, w = p.grad.float(), p",
            "w.addcdiv_(m, root,": "w.add_((m / root).to(w.dtype), alpha=-lr /"
            " (1 - beta1**t)) if w.dtype != g.dtype else w.addcdiv_(m, root,",
        },
    ),
    "the states of 16-bit weights are in 16 bits": (
        IN_16_BITS,
        {READ: "g, w = p.grad, p.float()"},
    ),
    "loading casts to the weights' dtype": (
        ROUND,
        {LOAD: "return super().load_state_dict(state_dict)"},
    ),
    "loading shares the tensors": (ROUND, {", copy=True": ""}),
    "loading forgets the step": (
        ROUND,
        {"return state | new": "return state | new | dict(step=0)"},
    ),
    "a setting is kept where a copy loses it": (
        test_a_deep_copy_goes_the_same_way,
        {
            SETTINGS: f"{SETTINGS}\n        self.scale = 0.5",
            'state, lr, size = self.state[p], group["lr"]': "state, lr, size ="
            ' self.state[p], group["lr"] * getattr(self, "scale", 1.0)',
        },
    ),
    "gradients are looked at one by one": (
        REFUSED,
        {
            "for p, _ in pairs:": "for p, group in pairs:",
            LOOP: "            self._update(p, group)\n",
        },
    ),
    "NaN slips through the comparison": (
        REFUSED,
        {"not p.grad.abs().max() < 1e18": "p.grad.abs().max() >= 1e18"},
    ),
    "a sparse gradient is not refused": (REFUSED, {"p.grad.is_sparse or ": ""}),
    "float64 is not refused": (REFUSED, {" or p.itemsize not in (2, 4)": ""}),
    "another model's state is loaded": (
        FOREIGN,
        {"if state and not (": "if False and not ("},
    ),
    "the groups are loaded before the look at the states": (
        FOREIGN,
        {
            f"        {LOAD}  # it compares the lengths\n": "",
            "        try:\n": f"        {LOAD}\n        try:\n",
        },
    ),
    "saved settings are not looked at": (
        WHOLE,
        {"                _check(group)\n": ""},
    ),
    "saved states are not looked at": (
        WHOLE,
        {"if state and not (": "if False and not ("},
    ),
    "only shapes are looked at": (
        WHOLE,
        {
            "for k, x in new.items() if x": "for k, x in new.items() if x.float()",
            "found = {k: (x.dtype, x.shape)": "found = {k: (want(k), x.shape)",
            "    wide =": "    want = lambda k: torch.float32 if 'abs' in k or"
            ' "m_absmax" not in state else torch.uint8\n    wide =',
        },
    ),
    "the step is not looked at": (WHOLE, {" and type(t) is int and 0 < t < 2**53": ""}),
    "NaN is loaded": (WHOLE, {" if x.isfinite().all()}": "}"}),
    "a lost key raises what it raises": (
        WHOLE,
        {"except (AttributeError, KeyError, TypeError):": "except ZeroDivisionError:"},
    ),
    "a rate may be infinite": (LIMITS, {"MOST.get(name, 1e18)": "math.inf"}),
    "True is a number": (LIMITS, {"type(b) is int or": "isinstance(b, int) or"}),
    "a block may be 64.0 long": (LIMITS, {"kind = () if what": "kind = float if what"}),
    "absmax is left behind": (LEFT, {KEEP: "state.update(step=t, m=m, v=v)"}),
    "all tensors are unpacked at once": (
        test_a_step_needs_the_memory_of_one_tensor_at_a_time,
        {READ: f'{READ}\n        self.__dict__.setdefault("held", []).append((g, w))'},
    ),
}
