"""Int8Linear beside torch's own linear layer, in seconds of the processor.

    python -m experiments.benches.int8_linear

One thread, a layer 2048 wide without a bias, 64 rows, evaluating; the ratio of each to
`nn.Linear` in float32, the median of five repeats. On a processor with AVX512 it can be
run as on one without: ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2
MKL_ENABLE_INSTRUCTIONS=AVX2. Some ten seconds.
"""

import statistics
import time

import torch
from torch import nn

from peftlab.int8 import Int8Linear
from peftlab.kit import measure, results

WIDTH, ROWS, TURNS, REPEATS = 2048, 64, 20, 5


def seconds(work):
    begun = time.process_time()
    for _ in range(TURNS):
        work()
    return (time.process_time() - begun) / TURNS


def works():
    """{name: a forward pass}; float32 is what the others are compared with."""
    torch.manual_seed(0)
    base, x = nn.Linear(WIDTH, WIDTH, bias=False), torch.randn(ROWS, WIDTH)
    x = x.clamp(-5, 5)
    wide, half = x.clone(), nn.Linear(WIDTH, WIDTH, bias=False).bfloat16()
    wide[3, 5] = 40.0
    naive, threshold = Int8Linear(base, 0), Int8Linear(base, 6.0)
    return {
        "float32": lambda: base(x),
        "bfloat16": lambda: half(x.bfloat16()),
        "naive int8": lambda: naive(x),
        "LLM.int8(), one outlier column": lambda: threshold(wide),
    }


@torch.no_grad()
def main():
    torch.set_num_threads(1)
    pieces = works()
    for work in pieces.values():
        seconds(work)
    repeats = [
        {name: seconds(work) for name, work in pieces.items()} for _ in range(REPEATS)
    ]
    figures = {}
    for name in pieces:
        ratios = [times[name] / times["float32"] for times in repeats]
        middle, ends = statistics.median(ratios), (min(ratios), max(ratios))
        figures[name] = dict(value=middle, tolerance=0.5 * middle)
        figures[name] |= dict(lowest=ends[0], highest=ends[1])
        print(f"{name:32} {middle:.2f} ({ends[0]:.2f} to {ends[1]:.2f})")
    stored = dict(machine=measure.machine(), figures=figures, repeats=repeats)
    vectors = torch.backends.cpu.get_cpu_capability()
    results.save(f"bench_int8_linear_{vectors.lower()}", stored)


if __name__ == "__main__":
    main()
