"""Ranges of different lengths, one behind the other."""

import numpy as np


def ranges(first: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """first[0], first[0] + 1, ... (counts[0] of them), first[1], first[1] + 1, ... as one array [sum(counts)]."""
    if np.count_nonzero(counts == 1) == counts.size:  # a decode step: one of each
        return first
    end = counts.cumsum()
    return np.repeat(first - end + counts, counts) + np.arange(end[-1])
