"""The book's static pictures, drawn from what is stored; nothing is measured again.

python -m experiments.pictures               # all
python -m experiments.pictures learn_forget  # one
"""

import sys

from experiments.benches import methods, quantization
from experiments.sweeps import atlas, families, memory, outliers

PICTURES = {  # each writes book/_static/NAME.svg
    "bench": methods.draw,
    "families": families.draw,
    "learn_forget": atlas.draw,
    "memory": memory.draw,
    "outliers": outliers.draw,
    "outliers_inserted": outliers.draw_runs,
    "packing": quantization.draw,
}

if __name__ == "__main__":
    for name in sys.argv[1:] or PICTURES:
        PICTURES[name]()
