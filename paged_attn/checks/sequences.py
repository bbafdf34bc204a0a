"""Sequences of a cache and their numbers of tokens."""

from typing import Any

import numpy as np

from ..interop import check_readable
from .arrays import first_true
from .scalars import INT_MAX


def check_distinct(ids: np.ndarray) -> None:
    """No sequence twice in `seqs`, int64 [n]."""
    ordered = np.sort(ids)
    if (bad := first_true(ordered[1:] == ordered[:-1])) is not None:
        raise ValueError(
            f"seqs holds sequence {ordered[bad]} more than once, and a batch has each sequence once; "
            f"remove the repetition, or fork({ordered[bad]})"
        )


def check_counts(counts: Any, num_sequences: int) -> np.ndarray:
    """Tokens to add to each sequence as int64 [num_sequences], none negative."""
    numbers = int_vector(counts, "counts")
    if numbers.size != num_sequences:
        raise ValueError(f"counts has {numbers.size} entries for {num_sequences} sequences; pass one count for each")
    if (bad := first_true((numbers < 0) | (numbers > INT_MAX))) is not None:
        fault = "negative" if numbers[bad] < 0 else f"more than {INT_MAX}"
        raise ValueError(f"counts[{bad}] = {numbers[bad]} is {fault}; pass the number of new tokens, 0 or more")
    return numbers


def int_vector(values: Any, name: str) -> np.ndarray:
    """A 1-D list or array of ints as int64 [n]."""
    check_readable(values, name)
    array = np.asarray(values)
    if array.ndim != 1:
        raise ValueError(f"{name} must be 1-D, got shape {array.shape}; pass a list of ints, [{values!r}] for one")
    if array.size == 0:
        return np.empty(0, np.int64)
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name} must hold ints, got {array.dtype} ({values!r}); pass ints")
    return array.astype(np.int64)
