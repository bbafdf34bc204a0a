"""merge_state and merge_states: attention over disjoint sets of keys becomes attention over all of them."""

from typing import Any

from . import backends
from .checks import states
from .interop import FLOAT32, Array, device_of, native, to_caller
from .lifetimes import loan_of, reading
from .support import check_supported


def merge_state(
    v_a: Array,
    s_a: Array,
    v_b: Array,
    s_b: Array,
    *,
    base: str | float = "e",
    out: Array | None = None,
    lse: Array | None = None,
) -> tuple[Any, Any]:
    """Merge attention over two disjoint sets of keys into attention over both: (v, s).

    Parameters
    ----------
    v_a, v_b: [rows, heads, dim], the outputs.
    s_a, s_b: float32 [rows, heads], their lse. A state with s = -inf, or +inf as FlashAttention-2 and FlashMLA have it,
        saw no key and changes nothing, whatever its v.
    base: "e" or 2, of the logarithms s and of the result's. Default "e".
    out: array like v_a of any float dtype that is written and returned. It may be v_a, and lse may be s_a; else they
        overlap no other argument. Default None: a new one of v_a's dtype.
    lse: float32 array like s_a that is written and returned. Default None: a new one.

    Results are arrays of v_a's library.
    """
    return _merge("merge_state", {"v_a": v_a, "s_a": s_a, "v_b": v_b, "s_b": s_b, "out": out, "lse": lse}, base)


def merge_states(
    v: Array,
    s: Array,
    *,
    base: str | float = "e",
    sinks: Array | None = None,
    out: Array | None = None,
    lse: Array | None = None,
) -> tuple[Any, Any]:
    """Merge attention over disjoint sets of keys into attention over all of them: (v, s) without axis 1.

    Parameters
    ----------
    v: [rows, num_states, heads, dim], the outputs, of any strides but a contiguous last axis.
    s: float32 [rows, num_states, heads], their lse; -inf or +inf of a state that saw no key, whatever its v.
    base: "e" or 2, of the logarithms s and of the result's. Default "e".
    sinks: float32 [heads], natural logarithms whatever `base` is; exp(sinks[h]) is added to the denominator of every
        row of head h, once. Default None: no sinks.
    out: array [rows, heads, dim] of any float dtype that is written and returned; it overlaps no other argument.
        Default None: a new one of v's dtype.
    lse: float32 array [rows, heads] that is written and returned; it overlaps no other argument. Default None: a new
        one.

    Results are arrays of v's library.
    """
    return _merge("merge_states", {"v": v, "s": s, "sinks": sinks, "out": out, "lse": lse}, base)


def _merge(function: str, given: dict[str, Any], base: str | float) -> tuple[Any, Any]:
    """Check and merge arrays by name, None where there is none; the first is the states' v."""
    arrays: dict[str, Any] = {
        name: None if array is None else native(array, name, writable=name in ("out", "lse"))
        for name, array in given.items()
    }
    loan = loan_of(*zip(arrays.values(), given.values(), strict=True))
    number = getattr(states, f"check_{function}")(**arrays, base=base)
    (v, *_), out, lse = arrays.values(), arrays["out"], arrays["lse"]
    (rows, *_, heads, dim), dtype, device = v.shape, v.dtype, device_of(v)
    check_supported("merge", device, dtype, dim)
    backend = backends.of(device)
    if out is None:
        out = backend.empty((rows, heads, dim), dtype, device)
    else:
        check_supported("merge", device, out.dtype, dim)
        if device != "cpu" and {dtype.name, out.dtype.name} == {"float16", "bfloat16"}:
            raise NotImplementedError(
                f"merge on a GPU does not turn {dtype} states into {out.dtype}; pass out of {dtype} or float32"
            )
    if lse is None:
        lse = backend.empty((rows, heads), FLOAT32, device)
    if out.size:
        with reading(loan):
            getattr(backend, function)(**arrays | {"out": out, "lse": lse}, base=number)
    like = next(iter(given.values()))
    return (
        to_caller(out, like) if given["out"] is None else given["out"],
        to_caller(lse, like) if given["lse"] is None else given["lse"],
    )
