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
    given = {"v_a": v_a, "s_a": s_a, "v_b": v_b, "s_b": s_b}
    arrays, results, loan = _borrow(given, out, lse)
    number = states.check_merge_state(arrays, base, *results)
    merged = _with_results(arrays[0].shape, arrays[0], results)
    if merged[0].size:
        with reading(loan):
            backends.of(device_of(arrays[0])).merge_state(*arrays, *merged, number)
    return _to_caller(merged, (out, lse), v_a)


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
    (v_states, s_states, sinks_), results, loan = _borrow({"v": v, "s": s, "sinks": sinks}, out, lse)
    number = states.check_merge_states(v_states, s_states, base, sinks_, *results)
    shape = v_states.shape
    merged = _with_results((shape[0], *shape[2:]), v_states, results)
    if merged[0].size:
        with reading(loan):
            backends.of(device_of(v_states)).merge_states(v_states, s_states, *merged, number, sinks_)
    return _to_caller(merged, (out, lse), v)


def _borrow(given: dict[str, Any], out: Any, lse: Any) -> tuple[list[Any], tuple[Any, Any], Any]:
    """The states and the results as NumPy or CuPy arrays, None where there are none, and what is lent of them."""
    arrays = [None if array is None else native(array, name) for name, array in given.items()]
    results = (
        None if out is None else native(out, "out", writable=True),
        None if lse is None else native(lse, "lse", writable=True),
    )
    return arrays, results, loan_of(*zip((*arrays, *results), (*given.values(), out, lse), strict=True))


def _with_results(shape: tuple[int, ...], v: Any, results: tuple[Any, Any]) -> tuple[Any, Any]:
    """out and lse, new where they were not given. NotImplementedError for what the backend of v cannot merge."""
    out, lse = results
    device, dtype = device_of(v), v.dtype
    check_supported("merge", device, dtype, shape[-1])
    backend = backends.of(device)
    if out is None:
        out = backend.empty(shape, dtype, device)
    else:
        check_supported("merge", device, out.dtype, shape[-1])
        if device != "cpu" and {dtype.name, out.dtype.name} == {"float16", "bfloat16"}:
            raise NotImplementedError(
                f"merge on a GPU does not turn {dtype} states into {out.dtype}; pass out of {dtype} or float32"
            )
    return out, backend.empty(shape[:-1], FLOAT32, device) if lse is None else lse


def _to_caller(merged: tuple[Any, Any], given: tuple[Any, Any], like: Any) -> tuple[Any, Any]:
    """What the caller gave, or else what was made, as arrays of the library of `like`."""
    out, lse = (to_caller(made, like) if mine is None else mine for made, mine in zip(merged, given, strict=True))
    return out, lse
