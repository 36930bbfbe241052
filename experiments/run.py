"""All long sweeps, one after the other: `make results` (three hours on two cores)."""

from experiments import (
    adam8bit,
    atlas,
    bench,
    bench_quantization,
    families,
    finnish,
    memory,
    one_language,
    paper_tables,
    plant,
    qlora,
    six_languages,
)

SWEEPS = (finnish, six_languages, one_language, bench, bench_quantization, atlas)
SWEEPS += (families, paper_tables, adam8bit, plant, qlora, memory)

if __name__ == "__main__":
    for sweep in SWEEPS:
        sweep.main()
