"""All long sweeps, one after the other: `make results` (about an hour on two cores)."""

from experiments import (
    atlas,
    finnish,
    one_language,
    paper_tables,
    six_languages,
    step_time,
)

if __name__ == "__main__":
    for sweep in (finnish, six_languages, one_language, step_time, atlas, paper_tables):
        sweep.main()
