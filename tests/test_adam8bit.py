"""8-bit Adam's laws, the library's numbers, and the run that follows 32-bit Adam.

A law that takes only `adam8bit`, the module, is run again by tests/test_mutations.py on
broken copies of adam8bit.py. bitsandbytes packs states on the CPU by a table of 65,536
even bins, BIN wide, so its codes near 0 are not the nearest; the exact kernel that it
has for other devices gives our bits.
"""

import copy
import io
import math
import pickle

import pytest
import torch
from bitsandbytes import functional
from bitsandbytes.optim import Adam8bit as LibraryAdam
from bitsandbytes.optim import AdamW8bit
from common import assert_one_sentence
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from experiments.sweeps import adam8bit as experiment
from peftlab import adam8bit as reference
from peftlab import nf4
from peftlab.kit import base_models, measure, results

BIN = 2 / 65535  # the width of the library's bins, over a block's largest magnitude
EVERY = settings(
    max_examples=400, deadline=None, derandomize=True, report_multiple_bugs=False
)
BOTH = pytest.mark.parametrize("signed", [True, False], ids=["m", "v"])


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
    """m and v of a packed state, float32."""
    return [
        module.dequantize(
            state[x], state[f"{x}_absmax"], module.dynamic_map(x == "m"), blocksize
        )
        for x in "mv"
    ]


def same_bits(one, two):
    one, two = torch.as_tensor(one), torch.as_tensor(two)
    return one.dtype == two.dtype and torch.equal(one, two)


def assert_same_states(got, want, what=""):
    """Of two state dicts: settings and states to the bit."""
    assert got["param_groups"] == want["param_groups"], what
    assert got["state"].keys() == want["state"].keys(), what
    for i, state in want["state"].items():
        assert state.keys() == got["state"][i].keys(), what
        for x, value in state.items():
            assert same_bits(got["state"][i][x], value), f"{what}: {x} is another"


# The laws of the map


def test_each_decade_of_the_map_is_cut_twice_as_fine(adam8bit):
    for signed in (True, False):
        code = adam8bit.dynamic_map(signed)
        assert code.shape == (256,) and (code.diff() > 0).all(), "256 values, rising"
        assert 0 in code and code[-1] == 1, "0 and 1 are on the map"
        tail = code[(code > 0) & (code < 1)]
        for e in range(7):
            low, high = 0.1 * 10.0 ** (e - 6), 10.0 ** (e - 6)
            decade = tail[(tail > low) & (tail < high)].double()
            parts = 2 ** (e + (not signed))
            assert len(decade) == parts, f"{len(decade)} values from {low} to {high}"
            width = (high - low) / parts
            middles = low + width * (0.5 + torch.arange(parts, dtype=torch.float64))
            assert torch.allclose(decade, middles, rtol=1e-6, atol=0), "not the middles"
        mirror = -tail.flip(0) if signed else tail[:0]
        assert torch.equal(code[code < 0], mirror), "the negatives of all but 1"


def test_the_map_heeds_no_default(adam8bit):
    try:
        torch.set_default_dtype(torch.float64)
        with torch.device("meta"):
            got = adam8bit.dynamic_map()
    finally:
        torch.set_default_dtype(torch.float32)
    assert got.device.type == "cpu" and same_bits(got, adam8bit.SIGNED)


# The laws of packing

FLOATS = st.floats(-(2.0**66), 2.0**66, width=32, allow_subnormal=False)
FLOATS = FLOATS.map(lambda x: x if abs(x) > 1e-20 else 0.0)


@st.composite
def tensors(draw):
    """A tensor, whether it may be signed, a block size: any floats, or many."""
    blocksize = draw(st.sampled_from([1, 2, 3, 7, 16, 64, 256]))
    if draw(st.booleans()):
        x = torch.tensor(draw(st.lists(FLOATS, min_size=1, max_size=20)))
    else:
        n, seed = draw(st.integers(1, 600)), draw(st.integers(0, 10**6))
        x = noise(n, seed=seed, decades=draw(st.sampled_from([0.0, 2.0, 8.0])))
        x *= 10.0 ** draw(st.integers(-10, 10))
    signed = draw(st.booleans())
    return (x if signed else x.abs()), signed, blocksize


@EVERY
@given(case=tensors())
def test_every_code_is_the_nearest(adam8bit, case):
    x, signed, blocksize = case
    code = adam8bit.dynamic_map(signed)
    codes, absmax = adam8bit.quantize(x, code, blocksize)
    want = [block.abs().max() for block in x.split(blocksize)]
    assert torch.equal(absmax, torch.stack(want)), "absmax: each block's largest"
    assert codes.dtype == torch.uint8 and codes.shape == x.shape
    largest = absmax.double().repeat_interleave(blocksize)[: x.numel()]
    exact = x.double() / largest.where(largest > 0, 1.0)
    distance = (exact[:, None] - code.double()).abs()  # (n, 256)
    chosen = distance.gather(1, codes.long()[:, None])[:, 0]
    excess = chosen - distance.min(1).values
    assert (excess <= 1e-6 * exact.abs()).all(), "a nearer value is on the map"


def around(x):
    """Floats, and up to three neighbours of each on either side."""
    bits = x.view(torch.int32)[:, None] + torch.arange(-3, 4, dtype=torch.int32)
    return bits.flatten().view(torch.float32)


def test_the_look_up_finds_what_a_search_finds(adam8bit):
    """To the bit, ties too: of every cell both ends, of every midpoint the neighbours,
    of zero, of one and of the least floats."""
    upper = torch.arange(2**16, dtype=torch.int32) << 16
    ends = torch.stack([upper, upper | 0x7FFF, upper | 0xFFFF]).view(torch.float32)
    edges = torch.tensor([1e-45, -1e-45, 2**-126, -(2**-126), 0.5, -0.5])
    dice = torch.Generator().manual_seed(0)
    many = torch.randint(-(2**31), 2**31, (2**19,), generator=dice)
    many = many.to(torch.int32).view(torch.float32)
    for signed in (True, False):
        code = adam8bit.dynamic_map(signed)
        midpoints = (code[:-1] + code[1:]) / 2
        x = [ends.flatten(), many, around(midpoints), around(-midpoints)]
        x += [around(code), around(edges), torch.tensor([0.0, -0.0, 1.0, -1.0])]
        x = torch.cat(x)
        x = torch.cat([x[x.abs() <= 1], torch.linspace(-1, 1, 2**18 + 1)])
        for part in x.split(4096):  # a block each, with 1: divided by 1
            one = torch.cat([part, torch.ones(1)])
            codes, _ = adam8bit.quantize(one, code, 5000)
            want = torch.bucketize(one, midpoints).to(torch.uint8)
            wrong = one[codes != want]
            assert not wrong.numel(), f"{len(wrong)} of a block, such as {wrong[0]}"
        tie = midpoints[[3, 200]]
        codes, _ = adam8bit.quantize(torch.cat([tie, torch.ones(1)]), code)
        assert codes.tolist() == [3, 200, 255], "halfway the lower value is taken"


def test_any_map_of_256_values_is_searched_or_refused(adam8bit):
    x = noise(5000)
    for code in (torch.linspace(-1, 1, 256), adam8bit.dynamic_map().flip(0).neg()):
        codes, absmax = adam8bit.quantize(x, code)
        rows = x / absmax.repeat_interleave(256)[:5000]
        distance = (rows[:, None] - code).abs()
        chosen = distance.gather(1, codes.long()[:, None])[:, 0]
        assert (chosen <= distance.min(1).values + 1e-6).all(), "another map's codes"
    fine = adam8bit.dynamic_map()
    fine[200:202] = fine[199] + torch.tensor([1e-6, 2e-6])
    with pytest.raises(ValueError, match="too fine") as error:
        adam8bit.quantize(x, fine)
    assert_one_sentence(error)


@EVERY
@given(case=tensors(), power=st.integers(-20, 20))
def test_unpacking_gives_the_value_times_absmax(adam8bit, case, power):
    x, signed, blocksize = case
    code, factor = adam8bit.dynamic_map(signed), 2.0**power
    codes, absmax = adam8bit.quantize(x, code, blocksize)
    back = adam8bit.dequantize(codes, absmax, code, blocksize)
    largest = absmax.repeat_interleave(blocksize)[: x.numel()]
    assert same_bits(back, code[codes.int()] * largest)
    assert (back[x == 0] == 0).all(), "zero must come back as zero"
    again, twice = adam8bit.quantize(x * factor, code, blocksize)
    assert torch.equal(again, codes), "the code depends on the scale"
    assert torch.equal(twice, absmax * factor)
    positive = (codes == 255) | (largest == 0)  # -1 is not on the map: see its law
    if all(block.any() for block in positive.split(blocksize)):
        again, twice = adam8bit.quantize(back, code, blocksize)
        assert torch.equal(twice, absmax), "the largest must come back as it is"
        codes[largest == 0] = again[largest == 0]
        assert torch.equal(again, codes), "packing twice must change nothing"


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
    for blocksize, block in ((256, slice(256, 512)), (64, slice(256, 320))):
        codes, absmax = adam8bit.quantize(x, code, blocksize)
        others, largest = adam8bit.quantize(spoilt, code, blocksize)
        assert codes.shape == x.shape and absmax.shape == (-(-600 // blocksize),)
        assert absmax.dtype == torch.float32
        changed = (codes != others).flatten()
        assert changed[block].any(), "what shares a block with it loses precision"
        changed[block] = False
        assert not changed.any(), "blocks run row after row, each with its own absmax"
        assert (largest != absmax).sum() == 1
        back = adam8bit.dequantize(codes, absmax, code, blocksize)
        assert back.shape == x.shape and (back - x).abs().max() < 0.03


def test_a_tensor_of_any_length_packs(adam8bit):
    code = adam8bit.dynamic_map()
    codes, absmax = adam8bit.quantize(torch.zeros(0, 5), code)
    assert codes.shape == (0, 5) and absmax.shape == (0,)
    assert adam8bit.dequantize(codes, absmax, code).shape == (0, 5)
    for n in (1, 255, 256, 257, 4097):
        codes, absmax = adam8bit.quantize(noise(n), code)
        assert absmax.shape == (-(-n // 256),), "a full last block gets another"
        stored = codes.untyped_storage().nbytes()  # what a file holds
        assert stored == codes.nbytes == n, "the codes are a view of a padded block"


def test_a_block_is_no_longer_than_the_tensor(adam8bit):
    code, x = adam8bit.dynamic_map(), noise(5000)
    codes, absmax = adam8bit.quantize(x, code, 5000)
    back = adam8bit.dequantize(codes, absmax, code, 5000)
    for blocksize in (2**20, 2**62, 10**30):
        got, largest = adam8bit.quantize(x, code, blocksize)
        assert torch.equal(got, codes) and torch.equal(largest, absmax)
        assert torch.equal(adam8bit.dequantize(got, largest, code, blocksize), back)

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


def test_the_steps_are_the_textbooks(adam8bit):
    for shape, count in (((50, 80), 5), ((64, 128), 1)):  # 8 bits: before it is packed
        w = parameter(*shape)
        gradients = [0.1 * noise(*shape, seed=t, decades=2.0) for t in range(count)]
        want = textbook(w, gradients, **HOW)
        (got,) = steps(adam8bit.Adam8bit([w], **HOW), [w], [[g] for g in gradients])
        assert torch.allclose(got.double(), want, rtol=0, atol=1e-6), (
            f"{(got - want).abs().max():.1e} off: is eps outside the root, is the bias"
            " corrected, does the step count on, is weight decay apart from the"
            " gradient, is what a step uses not packed yet?"
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
            assert state[f"{x}_absmax"].dtype == torch.float32
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
    exact = dict(m=0.2 * g, v=0.05 * g**2)
    for (name, want), got in zip(
        exact.items(), unpacked(adam8bit, optimizer.state[w]), strict=True
    ):
        blocks = want.reshape(-1, 256)
        gap = 0.00704 if name == "m" else 0.00353
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
        start = w.detach().clone()
        optimizer = adam8bit.Adam8bit([w], lr=0.1, weight_decay=0.5)
        (end,) = steps(optimizer, [w], [[torch.zeros(shape)]] * 2)
        assert torch.allclose(end, start * 0.95**2), (
            "not AdamW: w shrinks by lr * decay"
        )
        state = optimizer.state[w]
        assert not state.get("m_absmax", state["m"]).any(), "weight decay went into m"


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
    first = dict(params=weights[:1], lr=0.1, min_8bit_size=math.inf)
    optimizer = adam8bit.Adam8bit(
        [first, dict(params=weights[1:], blocksize=64)], lr=0.01
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
            narrow, wide = (adam8bit.Adam8bit([p], **HOW) for p in (w, twin))
            for seed in range(1, 4):
                g = (0.1 * noise(*shape, seed=seed)).to(dtype)
                steps(narrow, [w], [[g]])
                steps(wide, [twin], [[g]])
                assert same_bits(w, twin.to(dtype)), "not rounded once, at the end"
                twin.data.copy_(w)
            for x, value in narrow.state[w].items():
                assert same_bits(value, wide.state[twin][x]), f"{x}: not in float32"


def test_a_step_needs_the_memory_of_one_tensor_at_a_time(adam8bit):
    weights = [parameter(256, 256, seed=s, dtype=torch.bfloat16) for s in range(20)]
    for w in weights:
        w.grad = torch.ones_like(w)

    def work():  # states included, so that the profiler sees each born and freed
        optimizer = adam8bit.Adam8bit(weights)
        optimizer.step()
        optimizer.step()

    adam8bit.Adam8bit(weights[:1]).step()  # which makes the tables of the look-up
    one = 4 * 256 * 256  # a tensor in float32
    used = measure.peak_memory(work) / one - 20 * 2 * (1 + 4 / 256) / 4
    assert used < 7, f"{used:.1f} tensors in float32 beside the states, of 20"


# The laws of the state dict


def fresh(module, dtype=torch.bfloat16):
    weights = [parameter(*shape, dtype=dtype) for shape in ((64, 128), (10,), (10,))]
    groups = [dict(params=weights[:1], blocksize=64), dict(params=weights[1:], lr=0.1)]
    return weights, module.Adam8bit(groups, **HOW)


def later(times=range(1, 4), shapes=((64, 128), (10,), (10,))):
    return [[noise(*s, seed=10 * t) for s in shapes] for t in times]


def trained(module):
    weights, optimizer = fresh(module)
    steps(optimizer, weights, later())
    return weights, optimizer


def loaded(module, weights, state_dict):
    """A new optimizer of equal weights that took over the states."""
    twins, other = fresh(module)
    for w, twin in zip(weights, twins, strict=True):
        twin.data.copy_(w)
    other.load_state_dict(state_dict)
    return twins, other


def assert_the_same_way(pair, other, times=(4, 5)):
    for got, want in zip(
        *(steps(o, ws, later(times)) for ws, o in (pair, other)), strict=True
    ):
        assert same_bits(got, want), "a copy goes another way: are settings lost?"


def test_the_state_dict_goes_round_to_the_bit(adam8bit):
    weights, optimizer = trained(adam8bit)
    saved = optimizer.state_dict()
    before = copy.deepcopy(saved)
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    for source in (saved, torch.load(file, weights_only=True)):
        twins, other = loaded(adam8bit, weights, source)
        assert_same_states(other.state_dict(), before)
        pair = copy.deepcopy((weights, optimizer))
        assert_the_same_way((twins, other), pair)
        assert_same_states(saved, before, "the loaded optimizer shares a tensor")


def test_a_deep_copy_goes_the_same_way(adam8bit):
    pair = trained(adam8bit)
    assert_the_same_way(copy.deepcopy(pair), pair)


def test_a_group_that_leaves_8_bits_can_be_saved(adam8bit):
    weights, optimizer = trained(adam8bit)
    optimizer.param_groups[0]["min_8bit_size"] = math.inf
    for _ in range(2):  # packed by now, then not any more
        twins, other = loaded(adam8bit, weights, optimizer.state_dict())
        assert_the_same_way((weights, optimizer), (twins, other), times=[4])
        names = optimizer.state[weights[0]].keys()
        assert names == {"step", "m", "v"}, "what packed m and v is left behind"


# Bad input: one sentence each, and nothing changed


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


NUMBERS = [math.nan, math.inf, 10**400, 1e19, -1e-9, True, False, None, "1e-3", 1j]
NUMBERS += [[1e-3], torch.tensor(0.1), torch.ones(3, 3)]
BAD = dict(
    lr=NUMBERS,
    weight_decay=NUMBERS,
    eps=[*NUMBERS, 0, 0.0],
    betas=[(b, 0.9) for b in (*NUMBERS, 1.0, 2)]
    + [(0.9, math.nan), (0.9, 1.0), (0.9,), (0.9, 0.99, 0.999), 0.9, None, "ab"],
    min_8bit_size=[math.nan, True, None, -1, "4096"],
    blocksize=[math.nan, math.inf, True, None, "256", 64.0, 0, -(10**400)],
)
WORST = dict(lr=1e18, weight_decay=1e18, eps=1e18, betas=(1 - 2**-53, 1 - 2**-53))


def test_a_setting_that_a_step_cannot_take_is_refused_at_once(adam8bit):
    optimizer = adam8bit.Adam8bit([parameter(10)])
    for name, values in BAD.items():
        for value in values:
            group = dict(params=[parameter(5)], **{name: value})
            for make in (
                lambda g=group: adam8bit.Adam8bit([g]),
                lambda n=name, v=value: adam8bit.Adam8bit([parameter(5)], **{n: v}),
                lambda g=group: optimizer.add_param_group(g),
            ):
                with pytest.raises(ValueError) as error:
                    make()
                assert_one_sentence(error)
                assert name in str(error.value), "it must say which"
    assert len(optimizer.param_groups) == 1, "a group was added although it raised"
    good = [{k: v} for k, v in WORST.items()] + [WORST, dict(blocksize=10**400)]
    good += [dict(lr=0, eps=1e-30, betas=[0, 0]), dict(min_8bit_size=10**400)]
    for how in good:
        w = parameter(64, 128)
        (end,) = steps(adam8bit.Adam8bit([w], **how), [w], later([1], [(64, 128)]))
        assert end.isfinite().all(), f"{how} is let in and a step fails"


def damaged(saved):
    """{what is wrong: a copy of the state dict `saved` with that}; 0 is packed."""
    wrong = {"None": None, "a list": [saved], "empty": {}}

    def but(what, change):
        wrong[what] = copy.deepcopy(saved)
        change(wrong[what])

    def with_state(i, name, value):
        what = f"state {i}: {name} = {str(value)[:40]}"
        but(what, lambda d: d["state"][i].update({name: value}))

    for k, x in saved["state"][0].items():
        but(f"no {k}", lambda d, k=k: d["state"][0].pop(k))
        with_state(0, k, None)
        if "absmax" in k:
            for value in (x[:-1], x.half(), -x, x * math.nan, x.numpy()):
                with_state(0, k, value)
    for k in "mv":
        for dtype in (torch.float32, torch.int64):
            with_state(0, k, saved["state"][0][k].to(dtype))
        x = saved["state"][1][k]
        for value in (x.half(), x * math.nan, x * math.inf, x.repeat(2), x.to_sparse()):
            with_state(1, k, value)
    with_state(1, "v", -saved["state"][1]["v"])
    with_state(0, "z", torch.ones(3))
    for step in (0, -1, True, 1.5, "3", None, 10**400, torch.tensor(3.0)):
        with_state(1, "step", step)
    for name, values in BAD.items():
        but(f"no {name}", lambda d, k=name: d["param_groups"][1].pop(k))
        for x in values:
            but(
                f"{name} = {str(x)[:40]}",
                lambda d, k=name, x=x: d["param_groups"][1].update({k: x}),
            )
    but("blocksize 128", lambda d: d["param_groups"][0].update(blocksize=128))
    but("no dict", lambda d: d["state"].update({0: [1, 2]}))
    but("a state too many", lambda d: d["state"].update({7: d["state"][1]}))
    but("one tensor twice", lambda d: d["param_groups"][1].update(params=[1, 1]))
    wrong["one tensor twice"]["state"].pop(2)
    but("a group too few", lambda d: d["param_groups"].pop())
    but("a tensor too many", lambda d: d["param_groups"][1].update(params=[1, 2, 3]))
    but("no params", lambda d: d["param_groups"][0].pop("params"))
    but("params None", lambda d: d["param_groups"][0].update(params=None))
    but("params of lists", lambda d: d["param_groups"][0].update(params=[[]]))
    for k in ("param_groups", "state"):
        but(f"no {k}", lambda d, k=k: d.pop(k))
        but(f"{k} None", lambda d, k=k: d.update({k: None}))
        but(f"{k} of numbers", lambda d, k=k: d.update({k: [1, 2]}))
    return wrong


def others(module, weights):
    """{whose: the state dict} of what is no state of these weights in Adam8bit."""

    def of(kind, weights, groups=None):
        twins = [nn.Parameter(w.detach().float()) for w in weights]
        optimizer = kind([dict(params=[w]) for w in twins] if groups is None else twins)
        empty = copy.deepcopy(optimizer.state_dict())
        steps(optimizer, twins, [[torch.ones_like(w) for w in twins]])
        return empty, optimizer.state_dict()

    kinds = dict(AdamW=torch.optim.AdamW, Adam=torch.optim.Adam, SGD=torch.optim.SGD)
    kinds |= dict(Adagrad=torch.optim.Adagrad, bitsandbytes=LibraryAdam)
    found = {}
    for name, kind in kinds.items():
        found[f"{name}'s, before a step"], found[f"{name}'s"] = of(kind, weights)
    turned = [w.detach().mT if w.dim() > 1 else w for w in weights]
    found["another model"] = of(module.Adam8bit, turned)[1]
    found["another block size"] = of(module.Adam8bit, weights)[1]
    found["another block size"]["param_groups"][0]["blocksize"] = 64
    found["one group"] = of(module.Adam8bit, weights, groups=1)[1]
    return found


def test_another_state_is_refused_and_changes_nothing(adam8bit):
    weights, optimizer = trained(adam8bit)
    before = copy.deepcopy(optimizer.state_dict())
    foreign = others(adam8bit, weights)
    for what, state_dict in (foreign | damaged(before)).items():
        try:
            optimizer.load_state_dict(state_dict)
        except ValueError as error:
            assert "\n" not in str(error) and len(str(error)) < 300, what
            if what.partition("'s")[1]:
                assert "another optimizer's state" in str(error), f"{what}: {error}"
        except Exception as error:
            pytest.fail(f"{what}: {error!r} is no sentence")
        else:
            pytest.fail(f"{what}: loaded")
        assert_same_states(optimizer.state_dict(), before, what)
    optimizer.load_state_dict(before)  # whole, as it is
    started = copy.deepcopy(before)
    started["state"].pop(1)  # it had no gradient yet
    optimizer.load_state_dict(started)
    assert optimizer.state.keys() == {weights[0], weights[2]}


@pytest.mark.parametrize(
    "x, blocksize",
    [(torch.tensor([1.0, value]), 4) for value in (math.nan, math.inf, -math.inf)]
    + [(x, 4) for x in (torch.arange(5), None, "floats", [1.0, 2.0])]
    + [(torch.ones(5), n) for n in (0, True, 4.0, None)],
)
def test_what_cannot_be_packed_gets_one_sentence(x, blocksize):
    with pytest.raises(ValueError) as error:
        reference.quantize(x, reference.SIGNED, blocksize)
    assert_one_sentence(error)


@pytest.mark.parametrize("shape", [(), (0,), (0, 5), (1,), (3, 41, 40)])
def test_any_shape_and_layout_trains(shape):
    plain = parameter(*shape)
    turned = plain.detach().mT.contiguous().mT if len(shape) > 1 else plain
    turned = nn.Parameter(turned.detach().clone())  # clone keeps the strides
    assert turned.is_contiguous() == (len(shape) < 3)
    gradients = [[noise(*shape, seed=s)] for s in range(1, 4)]
    (got,) = steps(reference.Adam8bit([turned]), [turned], gradients)
    (want,) = steps(reference.Adam8bit([plain]), [plain], gradients)
    assert torch.equal(got, want), "the blocks must not depend on the strides"


def test_numbers_below_1e_38_come_back_within_their_largest_and_a_graph_stays():
    x = torch.tensor([3e-39, -1e-40, 0.0]).requires_grad_()
    codes, absmax = reference.quantize(x, reference.SIGNED)
    assert not codes.requires_grad and not absmax.requires_grad
    back = reference.dequantize(codes, absmax, reference.SIGNED)
    assert (back - x).abs().max() <= 3e-39 and back[2] == 0


def test_pickling_gives_a_whole_optimizer():
    pair = trained(reference)
    assert_the_same_way(pickle.loads(pickle.dumps(pair)), pair)


# The oracle: bitsandbytes


@BOTH
def test_the_map_is_the_librarys_to_the_bit(signed):
    want = functional.create_dynamic_map(signed=signed)
    assert same_bits(reference.dynamic_map(signed), want)
    assert same_bits((reference.UNSIGNED, reference.SIGNED)[signed], want)
    assert not signed or same_bits(want, nf4.DYNAMIC), "of double quantization"


@BOTH
@pytest.mark.parametrize("decades", [0.0, 3.0, 9.0])
@pytest.mark.parametrize("blocksize", [64, 256, 4096])
def test_codes_are_those_of_the_librarys_exact_kernel(signed, decades, blocksize):
    code = reference.dynamic_map(signed)
    x = noise(16, 4096, decades=decades)
    x[3] = 0
    x = x if signed else x.square()
    got = reference.quantize(x, code, blocksize)
    want = experiment.exact(x, code, blocksize)
    assert same_bits(got[0], want[0]) and same_bits(got[1], want[1])
    back = functional.dequantize_blockwise(
        want[0], absmax=want[1], code=code, blocksize=blocksize
    )
    assert same_bits(reference.dequantize(*got, code, blocksize), back)


@BOTH
def test_the_librarys_cpu_table_is_not_the_nearest(signed):
    """FACTS: about 0.17% of the codes of Gaussian numbers, and 0 is not 0."""
    zero = 2.125e-5 if signed else 1.5625e-5
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
    assert one_step_apart(codes, theirs, code), "by more than a bin"


def pair(shape, dtype=torch.float32, decades=1.0):
    """The same weights twice, ours and the library's, and a source of gradients."""
    how = dict(lr=0.01, betas=(0.9, 0.99), weight_decay=0.1)
    own, lib = (parameter(*shape, dtype=dtype) for _ in range(2))
    optimizers = reference.Adam8bit([own], **how), AdamW8bit([lib], **how)

    def gradients(t):
        return [0.1 * noise(*shape, seed=t + 1, decades=decades)]

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
def test_a_step_from_the_librarys_state_is_the_librarys(dtype, shape, decades):
    own, lib, ours, theirs, gradients = pair(shape, dtype, decades)
    for k in (0, 1, 20):
        done = theirs.state[lib]["step"] if k else 0
        steps(theirs, [lib], map(gradients, range(done, k)))
        if k:
            take_over(own, lib, ours, theirs)
        (got,) = steps(ours, [own], [gradients(k)])
        (want,) = steps(theirs, [lib], [gradients(k)])
        assert same_bits(got, want), "from the same states the weights go the same way"
        state, other = ours.state[own], theirs.state[lib]
        assert state["step"] == other["step"] == k + 1
        for x in "mv":
            assert same_bits(state[f"{x}_absmax"], other[NAMES[f"{x}_absmax"]])
            code = reference.dynamic_map(x == "m")
            assert one_step_apart(state[x], other[NAMES[x]], code), f"{x}: not one step"


def test_all_that_differs_from_the_librarys_exact_codes_is_v_at_0():
    own, lib, ours, theirs, gradients = pair((64, 128), decades=6.0)
    lost = 0
    with experiment.nearest_codes():
        for t in range(20):
            (got,) = steps(ours, [own], [gradients(t)])
            (want,) = steps(theirs, [lib], [gradients(t)])
            assert same_bits(got, want), f"another way at step {t + 1}"
            state, other = ours.state[own], theirs.state[lib]
            for x in ("m", "m_absmax", "v_absmax"):
                assert same_bits(state[x], other[NAMES[x]]), x
            lost += (other["state2"] == 0).sum().item()
            assert same_bits(state["v"], other["state2"].clamp(min=1)), (
                "code 0 becomes 1, and no other changes"
            )
            take_over(own, lib, ours, theirs)
    assert lost > 100, "no v was lost: this proves nothing"


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
    values = {k: f["value"] for k, f in stored["figures"].items()}
    assert values.pop("frozen.countries") == results.share(stored["frozen"])
    assert values == pytest.approx(experiment.derive(stored["runs"]))
    for name in experiment.OPTIMIZERS:
        runs = results.where(stored["runs"], optimizer=name)
        assert [r["seed"] for r in runs] == [0, 1, 2]
        assert all(len(r["learned"]) >= 200 for r in runs)
        assert all(r["curve"][-1] == r["final"] < 0.2 < r["curve"][0] for r in runs)
    # v at 0 destroys what ours retains
    assert values["Adam8bit.largest"] < 10 < 100 < values["nearest.largest"]
    assert values["nearest.countries"] < values["Adam8bit.countries"] / 2


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

ABSMAX = "rows.abs().amax(1)"
NEAR = "_nearest(rows.flatten()[: x.numel()], code)"
STEP = "        _adamw(p, m, v, t, group)\n"
ROOT = 'root = (v.sqrt() / math.sqrt(1 - beta2**t)).add_(group["eps"])'
SHRINK = 'w.mul_(1 - lr * group["weight_decay"])'
MOVE = "w.addcdiv_(m, root, value=-lr / (1 - beta1**t))"
BIG = 'if p.numel() >= group["min_8bit_size"]:'
WIDE = "self.state[p] = dict(step=t, m=m, v=v)"
FLOOR = "v_codes.clamp_(min=(v > 0).byte())"
KINDS = "if kinds not in (wide, packed):"
LOAD = 'super().load_state_dict({**state_dict, "state": {}})'
LOOK = "        for p, _ in pairs:\n            _check_gradient(p)\n"
SIZE = 'blocksize = group["blocksize"]'
ADD = "super().add_param_group(group)"
NONE = " if p.grad is not None]"
DECADES = test_each_decade_of_the_map_is_cut_twice_as_fine
DEFAULT = test_the_map_heeds_no_default
NEAREST = test_every_code_is_the_nearest
SEARCH = test_the_look_up_finds_what_a_search_finds
MAPS = test_any_map_of_256_values_is_searched_or_refused
UNPACK = test_unpacking_gives_the_value_times_absmax
LENGTH = test_a_tensor_of_any_length_packs
SPOILT = test_a_large_number_spoils_its_own_block_alone
TEXTBOOK = test_the_steps_are_the_textbooks
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
MEMORY = test_a_step_needs_the_memory_of_one_tensor_at_a_time
ROUND = test_the_state_dict_goes_round_to_the_bit
COPY = test_a_deep_copy_goes_the_same_way
REFUSED = test_a_bad_gradient_is_refused_before_the_first_weight
FOREIGN = test_another_state_is_refused_and_changes_nothing
LIMITS = test_a_setting_that_a_step_cannot_take_is_refused_at_once

# {what is broken: (the law that goes red, {text: text in its place})}
# fmt: off
MUTATIONS = {
    "every decade has as many values": (DECADES, {"2**e if": "2**6 if"}),
    "values are the ends of the parts":
        (DECADES, {"(edges[:-1] + edges[1:]) / 2": "edges[1:]"}),
    "the bit of the sign is wasted": (DECADES, {"2 * 2**e": "2**e"}),
    "-1 is on the map and 1 is not":
        (DECADES, {"torch.arange(2, **like)": "torch.arange(-1, 1, **like)"}),
    "the map heeds the default dtype":
        (DEFAULT, {"dtype=torch.float32, device": "device"}),
    "the map heeds the default device": (DEFAULT, {', device="cpu")': ")"}),
    "codes are rounded down":
        (NEAREST, {"codes.add_(above.view(torch.uint8))": "codes"}),
    "codes are rounded to even bins":
        (NEAREST, {NEAR: NEAR.replace("rows.f", "((rows * 127).round() / 127).f")}),
    "the largest is not taken by magnitude": (NEAREST, {ABSMAX: "rows.amax(1)"}),
    "absmax is a root of squares": (NEAREST, {ABSMAX: "rows.norm(dim=1)"}),
    "a block of zeros is divided by zero": (NEAREST, {".clamp(min=1e-38)": ""}),
    "absmax is in 16 bits":
        (NEAREST, {"view(x.shape), absmax": "view(x.shape), absmax.half().float()"}),
    "halfway the upper value is taken": (SEARCH, {"x > midpoint": "x >= midpoint"}),
    "the sign is no part of the cell": (SEARCH, {"0xFFFF)\n": "0x7FFF)\n"}),
    "a cell is known by one of its ends":
        (SEARCH, {"out_int32=True).aminmax(dim=0)": "out_int32=True)"}),
    "the midpoint is the one above":
        (SEARCH, {
            "value=math.inf)[least]": "value=math.inf)[(least + 1).clamp(max=255)]"}),
    "all maps have one table":
        (MAPS, {"(tuple(code.tolist()),": "((*SIGNED.tolist(),),"}),
    "a map that is too fine is searched":
        (MAPS, {"(most - least > 1)": "(most < least)"}),
    "unpacking forgets absmax": (UNPACK, {".mul_(absmax.view(len(indices), 1))": ""}),
    "unpacking is one code off":
        (UNPACK, {"index_select(0, indices": "roll(1).index_select(0, indices"}),
    "unpacking shrinks a little":
        (UNPACK, {"index_select(0, indices": "mul(0.999).index_select(0, indices"}),
    "small blocks are not scaled": (UNPACK, {"clamp(min=1e-38)": "clamp(min=1.0)"}),
    "the lowest value is made -1":
        (test_minus_one_is_not_on_the_map, {
            "arange(2, **like)]": "arange(-1 * signed, 2, **like)]",
            "2**e if signed": "2**e - (e == 6) if signed"}),
    "the block size is ignored": (SPOILT, {"min(blocksize, x.numel())": "x.numel()"}),
    "blocks run down the columns":
        (SPOILT, {"flat = x.flatten()": "flat = x.T.flatten()"}),
    "a full last block gets another":
        (LENGTH, {"-x.numel() % size": "size - x.numel() % size"}),
    "the codes are a view":
        (LENGTH, {NEAR: "_nearest(rows.flatten(), code)[: x.numel()]"}),
    "a short tensor is filled up to a block":
        (test_a_block_is_no_longer_than_the_tensor, {
            "max(1, min(blocksize, x.numel()))": "blocksize"}),
    "eps is inside the root":
        (TEXTBOOK, {ROOT: 'root = (v / (1 - beta2**t)).add_(group["eps"]).sqrt()'}),
    "eps is added before the correction":
        (TEXTBOOK, {
            ROOT: 'root = v.sqrt().add_(group["eps"]) / math.sqrt(1 - beta2**t)'}),
    "the betas are swapped": (TEXTBOOK, {"beta1, beta2 =": "beta2, beta1 ="}),
    "v takes the gradient's size":
        (TEXTBOOK, {"addcmul_(g, g,": "addcmul_(g.sign(), g,"}),
    "a step uses what it has packed":
        (TEXTBOOK, {
            ROOT:
                "m = m if t > 1 else dequantize(*quantize(m, SIGNED), SIGNED)\n"
                f"    {ROOT}"}),
    "m's bias is not corrected": (TEXTBOOK, {"-lr / (1 - beta1**t)": "-lr"}),
    "v's bias is not corrected": (TEXTBOOK, {" / math.sqrt(1 - beta2**t)": ""}),
    "a step goes uphill": (TEXTBOOK, {"value=-lr": "value=lr"}),
    "the step does not count on": (EVEN, {"dict(step=t,": "dict(step=0,"}),
    "the states are packed once and never again":
        (EVEN, {
            STEP:
                f'{STEP}        if t > 1 and "m_absmax" in state:\n'
                '            state["step"] = t\n            return\n'}),
    "the states stay unpacked after a step":
        (BYTES, {BIG: BIG.replace("if ", "if t == 1 and ")}),
    "one absmax serves two blocks": (BYTES, {SIZE: SIZE.replace("= ", "= 2 * ")}),
    "small tensors are packed too": (SMALL, {BIG: "if True:"}),
    "4,096 weights are small": (SMALL, {BIG: BIG.replace(">=", ">")}),
    "m is on the unsigned map":
        (HALF, {"quantize(m, SIGNED,": "quantize(m, UNSIGNED,"}),
    "v is on the signed map":
        (HALF, {
            "quantize(v, UNSIGNED,": "quantize(v, SIGNED,",
            'state["v_absmax"], UNSIGNED': 'state["v_absmax"], SIGNED'}),
    "v's root is packed":
        (HALF, {"quantize(v, UNSIGNED,": "quantize(v.sqrt(), UNSIGNED,"}),
    "m is packed under v's absmax":
        (SECOND, {'state["m_absmax"], SIGNED': 'state["v_absmax"], SIGNED'}),
    "each step begins anew":
        (SECOND, {"blocksize) if state else": "blocksize) if {} else"}),
    "v is rounded to zero": (LOST, {FLOOR: "pass"}),
    "no v is zero": (LOST, {FLOOR: "v_codes.clamp_(min=1)"}),
    "weight decay is in the gradient":
        (DECAY, {
            "g = p.grad.float()": 'g = p.grad.float() + group["weight_decay"] * p',
            SHRINK: "pass"}),
    "weight decay is not times lr": (DECAY, {SHRINK: SHRINK.replace("lr * ", "")}),
    "weight decay is forgotten": (DECAY, {SHRINK: "pass"}),
    "no gradient counts as zero":
        (test_what_has_no_gradient_is_left_alone, {
            NONE: "]",
            LOOK:
                "        for p, _ in pairs:\n            p.grad = torch.zeros_like(p)"
                " if p.grad is None else p.grad\n"}),
    "all groups have one rate":
        (GROUPS, {STEP: STEP.replace("group", "group | dict(lr=0.01)")}),
    "all groups have one block size":
        (GROUPS, {SIZE: SIZE.replace("group", "self.defaults")}),
    "only the first group steps":
        (GROUPS, {
            "for group in self.param_groups:": "for group in self.param_groups[:1]:"}),
    "the last group's settings serve all":
        (GROUPS, {"self._update(p, group)": "self._update(p, pairs[-1][1])"}),
    "the closure runs without gradients":
        (CLOSURE, {"with torch.enable_grad():": "with torch.no_grad():"}),
    "the closure's loss is lost": (CLOSURE, {"        return loss\n": ""}),
    "16-bit weights are counted in 16 bits":
        (IN_16_BITS, {
            "w = p.float()": "w = p",
            MOVE: "w.add_((m / root).to(w.dtype), alpha=-lr / (1 - beta1**t))"}),
    "the states of 16-bit weights are in 16 bits":
        (IN_16_BITS, {
            "zeros_like(p, dtype=torch.float32)": "zeros_like(p)",
            "dtype == torch.float32:": "dtype.is_floating_point:"}),
    "all tensors are unpacked at once":
        (MEMORY, {
            STEP:
                STEP + '        self.__dict__.setdefault("all", []).append((m, v))\n'}),
    "a step's root lives until all is packed":
        (MEMORY, {
            "    p.copy_(w)\n": "    p.copy_(w)\n    return g, w, root\n",
            STEP: STEP.replace("_adamw", "alive = _adamw")}),
    "loading casts to the weights' dtype":
        (ROUND, {
            LOAD: "super().load_state_dict(state_dict)",
            "self.state.update(copies)": "pass"}),
    "loading shares the tensors": (ROUND, {", copy=True": ""}),
    "loading forgets the step": (ROUND, {'dict(step=state["step"],': "dict(step=1,"}),
    "a setting is where a copy loses it":
        (COPY, {
            "super().__init__(params, defaults)":
                "super().__init__(params, defaults)\n        self.scale = 0.5",
            STEP:
                STEP.replace("p)\n", 'p | dict(lr=getattr(self, "scale", 1.0)))\n')}),
    "absmax is left behind":
        (test_a_group_that_leaves_8_bits_can_be_saved, {
            WIDE: "state.update(step=t, m=m, v=v)"}),
    "gradients are looked at one by one":
        (REFUSED, {
            LOOK: "",
            "self._update(p, group)": "_check_gradient(p), self._update(p, group)"}),
    "NaN slips through the comparison":
        (REFUSED, {
            "not torch.maximum(": "torch.maximum(",
            "least) < 1e18": "least) >= 1e18"}),
    "a large negative gradient is let in":
        (REFUSED, {"torch.maximum(most, -least)": "most"}),
    "a sparse gradient is not refused":
        (REFUSED, {"g.layout != torch.strided or ": ""}),
    "float64 is not refused": (REFUSED, {" or p.itemsize not in (2, 4)": ""}),
    "another model's state is loaded": (FOREIGN, {KINDS: "if False:"}),
    "the groups are loaded before the look at the states":
        (FOREIGN, {
            f'        {LOAD}\n': "",
            "        try:\n": f'        {LOAD}\n        try:\n'}),
    "saved settings are not looked at":
        (FOREIGN, {"            _check(name, saved[name])": "            pass"}),
    "another optimizer is called a bad number":
        (FOREIGN, {"        if missing:": "        if False:"}),
    "only shapes are looked at":
        (FOREIGN, {
            "torch.uint8, p.shape)": "None, p.shape)",
            "torch.float32, p.shape)": "None, p.shape)",
            "torch.float32, (blocks,))": "None, (blocks,))",
            "(t.dtype, t.shape)": "(None, t.shape)"}),
    "the step is not looked at": (FOREIGN, {" or not 0 < step < 2**53": ""}),
    "a step of any kind is let in": (FOREIGN, {"type(step) is not int or ": ""}),
    "NaN is loaded":
        (FOREIGN, {"t.isfinite() & (t >= least)": "t.nan_to_num(1).abs() >= least"}),
    "a negative v is loaded": (FOREIGN, {'if name == "m" else 0': "if True else 0"}),
    "a state that no group names is dropped":
        (FOREIGN, {" or states.keys() - {*indices}": ""}),
    "one state serves two tensors":
        (FOREIGN, {"len({*indices}) < len(indices) or ": ""}),
    "a lost key raises what it raises":
        (FOREIGN, {
            "(AttributeError, KeyError, NotImplementedError, TypeError)":
                "ZeroDivisionError"}),
    "a rate may be infinite": (LIMITS, {"lr=(0, 1e18)": "lr=(0, math.inf)"}),
    "True is a number": (LIMITS, {" and type(n) is not bool": ""}),
    "a block may be 64.0 long": (LIMITS, {'int if name == "blocksize" else ': ""}),
    "three betas are two":
        (LIMITS, {"right != [True] * (2": "right[:2] != [True] * (2"}),
    "a group is added, then looked at":
        (LIMITS, {ADD: "pass", "settings = self": f'{ADD}\n        settings = self'}),
}
# fmt: on
