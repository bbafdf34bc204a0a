"""Scalars: ints, floats and bases of logarithms."""

import math
import operator
from typing import Any

import numpy as np

INT_MAX = 2**31 - 1


def as_int(value: Any, name: str, *, minimum: int, maximum: int = INT_MAX) -> int:
    """`value` as an int of [minimum, maximum]; TypeError for floats, bools and arrays."""
    if type(value) is int and minimum <= value <= maximum:  # the usual one, and a table waits for this
        return value
    try:
        number = None if isinstance(value, (bool, np.bool_)) else operator.index(value)
    except TypeError:
        number = None
    if number is None:
        raise _wrong_kind(value, name, "an int")
    if not minimum <= number <= maximum:
        raise ValueError(
            f"{name} is {number}, which is not in [{minimum}, {maximum}]; pass {name} of at least {minimum}"
            if number < minimum
            else f"{name} is {number}, which is more than {maximum}; pass a smaller {name}"
        )
    return number


def as_index(value: Any, name: str, size: int) -> int:
    """`value` as an int of [0, size), where num_<name>s=size is an argument, too."""
    number = as_int(value, name, minimum=-INT_MAX)
    if not 0 <= number < size:
        raise ValueError(f"{name} is {number}, and there are num_{name}s={size}; pass an int in [0, {size})")
    return number


def as_float(value: Any, name: str, *, rule: str = "", minimum: float = -math.inf) -> float:
    """`value` as a finite float of at least `minimum`; TypeError for strings, bools and arrays."""
    try:
        number = None if isinstance(value, (bool, str, bytes)) or _is_array(value) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = None
    if number is None:
        raise _wrong_kind(value, name, "a float")
    if not math.isfinite(number) or number < minimum:
        bound = f" and at least {minimum:g}" if minimum > -math.inf else ""
        raise ValueError(f"{name} is {number}, and it must be finite{bound}; {rule or f'pass another {name}'}")
    return number


def as_bool(value: Any, name: str) -> bool:
    if not isinstance(value, (bool, np.bool_)):
        raise _wrong_kind(value, name, "a bool", "True or False")
    return bool(value)


def _wrong_kind(value: Any, name: str, kind: str, remedy: str = "") -> TypeError:
    """What came instead of a number is shown; of an array its shape, as its values may be many."""
    came = f"an array of shape {tuple(value.shape)}" if _is_array(value) else repr(value)
    return TypeError(f"{name} must be {kind}, got {came} ({type(value).__name__}); pass {remedy or kind}")


def _is_array(value: Any) -> bool:
    return getattr(value, "ndim", 0) > 0


def as_base(base: Any) -> float:
    """The base of a logarithm: "e" (or math.e) or 2."""
    if isinstance(base, str) and base == "e":
        return math.e
    if isinstance(base, (int, float, np.number)) and not isinstance(base, bool) and base in (2, math.e):
        return float(base)
    raise ValueError(
        f"base is {base!r}; pass base='e' for natural-log states (paged_attn, JAX, FlashAttention) or base=2"
    )
