"""The long sweeps, one after the other: `make results` (eight hours on two cores).

`make results ONLY=finnish` runs one. The benches are `make bench`.
"""

import importlib
import sys

SWEEPS = (
    "finnish",
    "six_languages",
    "one_language",
    "atlas",
    "families",
    "adam8bit",
    "outliers",
    "outlier_size",
    "qlora",
    "merging",
    "qlora_quality",
    "memory",
    "memory_table",
    "icd",
    "rank_alpha_rate",
    "data_faults",
    "problem_sets",
    "medical_questions",
    "medical_capacity",
    "base_moved",
    "preference",
    "reward",
    "six_tasks",
    "library_stack",
)


def main(names):
    """Run the named sweeps; with no name, all. ValueError for an unknown name."""
    unknown = [name for name in names if name not in SWEEPS]
    if unknown:
        raise ValueError(
            f"no sweep is named {unknown[0]}; there are: {', '.join(SWEEPS)}"
        )

    for name in names or SWEEPS:
        importlib.import_module(f"experiments.sweeps.{name}").main()
    importlib.import_module("experiments.paper_tables.count").main()


if __name__ == "__main__":
    main(sys.argv[1:])
