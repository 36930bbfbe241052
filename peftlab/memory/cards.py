"""Common cards, and which of them has room for so many bytes."""

from .messages import shown

GIB = 2**30
# What torch can see of a card, in GiB, as its own out-of-memory messages say it ("has a
# total capacity of 23.52 GiB"), the smallest that is reported. It is less than the name
# says, and a name's GB is sometimes a GiB. Where the memory corrects errors, as in the
# L4 and the L40S, a part is gone for that.
CARDS = {
    "T4 (16 GB)": 14.56,
    "L4 or A10G (24 GB)": 21.95,
    "RTX 3090 or 4090 (24 GB)": 23.52,
    "RTX 5090 (32 GB)": 31.36,
    "A100 (40 GB)": 39.38,
    "L40S (48 GB)": 44.34,
    "RTX A6000 (48 GB)": 47.40,
    "A100 or H100 (80 GB)": 79.10,
    "H200 (141 GB)": 139.72,
    "B200 (180 GB)": 178.35,
}
NO_BFLOAT16 = {"T4 (16 GB)"}
CONTEXT = 1e9  # bytes: CUDA's context takes 0.5 to 0.65 GB, cuBLAS and others some
HOLES = 0.05  # a guess: the allocator rounds up and leaves holes


def fits(total, bfloat16=False):
    """The smallest common card that has room for so many bytes.

    CUDA's context and a twentieth of the bytes come on top.

    Args:
        total: bytes, a number of at least 0.
        bfloat16: whether they are computed with in bfloat16. A card that has none
            computes in float16 instead, of the same size, and its name says so.

    Returns:
        The card's name in CARDS; None where none has room.

    Raises:
        ValueError: for anything else.
    """
    if type(total) not in (int, float) or not total >= 0:
        raise ValueError(f"bytes are a number of at least 0, not {shown(total)}")

    for card, size in CARDS.items():
        room = (size * GIB - CONTEXT) / (1 + HOLES)
        if total <= room:
            if bfloat16 and card in NO_BFLOAT16:
                return f"{card[:-1]}, no bfloat16: use float16)"
            return card
    return None
