"""All long sweeps, one after the other: `make results` (two hours on two cores)."""

from experiments import (
    atlas,
    bench,
    families,
    finnish,
    one_language,
    paper_tables,
    six_languages,
)

SWEEPS = (finnish, six_languages, one_language, bench, atlas, families, paper_tables)

if __name__ == "__main__":
    for sweep in SWEEPS:
        sweep.main()
