"""Whether a text is caught in a loop."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

LONGEST_PERIOD = 64
"""Tokens of a piece of text that is looked for again after itself."""


_LOOP_TOKENS = 32
"""Tokens that a piece of text and its repetitions cover, at least, in a loop."""


_LOOP_TIMES = 3
"""Times that the piece is there, at least."""


def repeats(tokens: Sequence[int] | NDArray[np.int64]) -> bool:
    """Whether tokens get stuck in a loop: a piece of them comes again and again after itself.

    Somewhere, a piece of 1 to 64 tokens must stand three times or more in a row, and cover 32
    tokens or more; the last one may be cut short.
    """
    text = np.asarray(tokens)
    for period in range(1, min(LONGEST_PERIOD, len(text) // 2) + 1):
        different = np.flatnonzero(text[period:] != text[:-period])
        borders = np.concatenate([[-1], different, [len(text) - period]])
        longest = int(np.diff(borders).max()) - 1
        if longest + period >= max(_LOOP_TOKENS, _LOOP_TIMES * period):
            return True
    return False
