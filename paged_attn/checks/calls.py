"""Attention calls: the options, q, qo_indptr, and the arrays of a run."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..errors import LayoutMismatchError, PageTableError
from ..holders import KVPages, TableArrays
from ..layout import Layout
from ..spec import RUN_ARRAYS, AttentionSpec, RunArrays, Scoring
from .arrays import (
    INT32,
    check_base,
    check_device,
    check_dtype,
    check_float,
    check_metadata_device,
    check_shape,
    check_strides,
    check_vector,
    check_whole,
    entry,
    first_true,
)
from .pools import check_page_size, refuse_heads
from .scalars import as_bool, as_float, as_int

FLOAT_RANGE = 2.0**-126, 2.0**127  # normal float32 numbers, the largest of them even times log2(e)


def attention_spec(
    kv: KVPages, table: TableArrays, num_qo_heads: Any, scoring: Scoring, q_len: Any = None
) -> AttentionSpec:
    """The checked spec of one attention call over `kv` by `table` (check_operands has seen both).

    Parameters
    ----------
    scoring: the options as the caller gave them.
    q_len: queries a request (decode), or None (prefill, where qo_indptr says).

    Raises
    ------
    LayoutMismatchError: the pool's shape under its tag has another page_size than the table.
    ValueError, TypeError: as the package says. Values of a host table are for check_table_values.
    """
    check_page_size(kv, table.page_size)
    if table.device not in ("cpu", kv.device):
        raise TypeError(
            f"table lives on {table.device} and kv on {kv.device}; a table is made of NumPy arrays or lives on kv's "
            f"device: make it from arrays there"
        )
    heads = as_int(num_qo_heads, "num_qo_heads", minimum=1)
    if heads % kv.num_kv_heads:
        refuse_heads(kv, heads, f"num_qo_heads={heads}")
    return AttentionSpec(
        num_qo_heads=heads,
        num_kv_heads=kv.num_kv_heads,
        head_dim=kv.head_dim,
        v_head_dim=kv.v_head_dim,
        page_size=kv.page_size,
        num_pages=kv.num_pages,
        dtype=kv.dtype,
        layout=str(kv.layout),
        device=kv.device,
        scoring=check_scoring(scoring, kv.head_dim),
        q_len=None if q_len is None else as_int(q_len, "q_len", minimum=1),
    )


def check_scoring(scoring: Scoring, head_dim: int) -> Scoring:
    """The options as numbers of their types, sm_scale's default included."""
    sm_scale = 1.0 / math.sqrt(head_dim) if scoring.sm_scale is None else _as_scale(scoring.sm_scale)
    return Scoring(
        sm_scale=sm_scale,
        causal=as_bool(scoring.causal, "causal"),
        window_left=as_int(scoring.window_left, "window_left", minimum=-1),
        logits_soft_cap=_as_soft_cap(scoring.logits_soft_cap, sm_scale),
    )


def _as_scale(sm_scale: Any) -> float:
    scale = as_float(sm_scale, "sm_scale", rule="pass None for 1/sqrt(head_dim)")
    if scale <= 0:  # a kernel's running maximum would be a minimum
        raise ValueError(f"sm_scale is {scale:g}, and it must be positive; negate q, or pass None for 1/sqrt(head_dim)")
    _check_range(scale, "sm_scale", "multiply q by a part of it, or pass None for 1/sqrt(head_dim)")
    return scale


def _as_soft_cap(logits_soft_cap: Any, sm_scale: float) -> float:
    cap = as_float(logits_soft_cap, "logits_soft_cap", minimum=0.0, rule="pass 0.0 to switch it off")
    if cap > 0:
        _check_range(cap, "logits_soft_cap", "pass 0.0 to switch it off")
        _check_range(sm_scale / cap, "sm_scale / logits_soft_cap", f"pass a logits_soft_cap nearer to {sm_scale=:g}")
    return cap


def _check_range(number: float, name: str, remedy: str) -> None:
    """Positive numbers that are 0 or infinite in float32 would be so in the kernels; every backend refuses them."""
    least, most = FLOAT_RANGE
    if not least <= number <= most:
        raise ValueError(f"{name} is {number:g}, and it must be in [2**-126, 2**127], as float32 holds it; {remedy}")


def check_q(kv: KVPages, q: Any, axes: Mapping[int, str], call: str) -> None:
    """A q from which a one-shot call takes its heads and batch: rank (`axes` has those that may be) and heads."""
    if q.ndim not in axes:
        raise ValueError(f"q must be {' or '.join(axes.values())}, got q.shape={q.shape}; reshape q, and pass {call}")
    if q.shape[-2] == 0:
        raise ValueError(f"q has no heads (q.shape={q.shape}); pass a q with {kv.num_kv_heads} heads or a multiple")
    if q.shape[-2] % kv.num_kv_heads:
        refuse_heads(kv, q.shape[-2], f"q.shape={q.shape}")


def check_single_kv(k: Any, v: Any, layout: Layout) -> None:
    """Contiguous K and V of one request: [len, num_kv_heads, head_dim] (NHD) or [num_kv_heads, len, head_dim] (HND)."""
    axes = ("len", "num_kv_heads", "head_dim") if layout is Layout.NHD else ("num_kv_heads", "len", "head_dim")
    check_float(k, "k")
    check_shape(k, "k", axes, f"[{', '.join(axes)}] for layout={str(layout)!r}")
    check_shape(v, "v", (*k.shape[:2], "v_head_dim"), "as k but for the last axis")
    check_dtype(v, "v", k.dtype, "as k is")


def check_single_q(kv: KVPages, arrays: RunArrays) -> None:
    """q [num_qo_heads, head_dim], out [num_qo_heads, v_head_dim] and lse [num_qo_heads] of single_decode."""
    heads = arrays.q.shape[0]
    check_shape(arrays.q, "q", ("num_qo_heads", kv.head_dim), "[num_qo_heads, head_dim], as k has it")
    if arrays.out is not None:
        check_shape(arrays.out, "out", (heads, kv.v_head_dim), "as q and v give it")
    if arrays.lse is not None:
        check_shape(arrays.lse, "lse", (heads,), "as q without its last axis")


def check_qo_indptr(qo_indptr: Any, batch_size: int, total_rows: int | None, device: str = "cpu") -> None:
    """int32 [batch_size + 1]; host values start at 0, do not decrease and end at total_rows, if that is known."""
    check_vector(qo_indptr, "qo_indptr", INT32, batch_size + 1, "batch_size + 1 offsets into the rows of q")
    if not isinstance(qo_indptr, np.ndarray):
        check_metadata_device(qo_indptr, "qo_indptr", device)
        return
    if qo_indptr[0] != 0:
        raise PageTableError(
            f"qo_indptr[0] = {qo_indptr[0]}, and it must start at 0; pass qo_indptr - qo_indptr[0] and q from there on",
            **entry("qo_indptr", 0, qo_indptr),
        )
    if (bad := first_true(qo_indptr[1:] < qo_indptr[:-1])) is not None:
        raise PageTableError(
            f"qo_indptr[{bad + 1}] = {qo_indptr[bad + 1]} is less than qo_indptr[{bad}] = {qo_indptr[bad]}, so "
            f"request {bad} has a negative number of queries; correct qo_indptr[{bad + 1}]",
            **entry("qo_indptr", bad + 1, qo_indptr),
        )
    if total_rows is not None and qo_indptr[-1] != total_rows:
        raise PageTableError(
            f"qo_indptr ends at {qo_indptr[-1]} and q has {total_rows} rows; pass q[:qo_indptr[-1]] or correct it",
            **entry("qo_indptr", batch_size, qo_indptr),
        )


def check_layer(spec: AttentionSpec, kv: KVPages) -> None:
    """One run of a plan: the layer against the spec."""
    if (
        kv.layout != spec.layout
        or kv.page_size != spec.page_size
        or kv.num_kv_heads != spec.num_kv_heads
        or kv.head_dim != spec.head_dim
        or kv.v_head_dim != spec.v_head_dim
        or kv.num_pages < spec.num_pages
        or kv.dtype != spec.dtype
        or kv.device != spec.device
    ):
        _refuse_layer(spec, kv)


def _refuse_layer(spec: AttentionSpec, kv: KVPages) -> None:
    other, wanted = kv.layout.other, (spec.page_size, spec.num_kv_heads)
    fits, fits_other = (kv.page_size, kv.num_kv_heads) == wanted, (kv.num_kv_heads, kv.page_size) == wanted
    retag = f"the shape fits layout {other}: if the pool was written so, tag the pool layout='{other}'"
    if kv.layout != spec.layout:
        replan = (
            f"if it was written as {kv.layout}, {f'pass kv.to_layout({spec.layout!r}) or ' * fits}plan with this kv"
        )
        raise LayoutMismatchError(
            f"kv has layout {kv.layout} and the plan was made for {spec.layout} (k_pages.shape={kv.k_pages.shape}); "
            f"{f'{retag}; ' if fits_other else ''}{replan}"
        )
    if fits_other and not fits:
        raise LayoutMismatchError(
            f"kv is tagged {kv.layout}, under which k_pages.shape={kv.k_pages.shape} has page_size={kv.page_size} and "
            f"num_kv_heads={kv.num_kv_heads}, but the plan was made for {spec.page_size} and {spec.num_kv_heads}; "
            f"{retag} and pass kv.to_layout({spec.layout!r}); if it was written as {kv.layout}, plan with this kv and "
            f"a table of page_size={kv.page_size}"
        )
    for name in ("page_size", "num_kv_heads"):
        found, expected = getattr(kv, name), getattr(spec, name)
        if found != expected:
            raise LayoutMismatchError(
                f"kv has {name}={found} (k_pages.shape={kv.k_pages.shape}, layout {kv.layout}) and the plan is for "
                f"{name}={expected}; pass a layer like the one that was planned with, or plan with this kv"
            )
    if kv.dtype != spec.dtype:
        raise TypeError(f"kv is {kv.dtype} and the plan was made for {spec.dtype}; plan with this kv")
    if kv.device != spec.device:
        raise TypeError(f"kv lives on {kv.device} and the plan was made for {spec.device}; plan with this kv")
    dims = [name for name in ("head_dim", "v_head_dim") if getattr(kv, name) != getattr(spec, name)]
    name, least = (dims[0], "") if dims else ("num_pages", "at least ")
    shape = f"v_pages.shape={kv.v_pages.shape}" if name == "v_head_dim" else f"k_pages.shape={kv.k_pages.shape}"
    raise ValueError(
        f"kv has {name}={getattr(kv, name)} ({shape}, layout {kv.layout}) and the plan is "
        f"for {least}{getattr(spec, name)}; pass a layer like the one that was planned with, or plan with this kv"
    )


def check_arrays(
    spec: AttentionSpec, arrays: RunArrays, rows: tuple[int, ...] | range, remedy: str = "plan anew for it"
) -> None:
    """The arrays of one run, as the caller gave them, against the spec and the table RUN_ARRAYS.

    Parameters
    ----------
    arrays: q [rows, num_qo_heads, head_dim], or [rows, q_len, num_qo_heads, head_dim] for decode (which q_len > 1
        demands), with any strides that kernels can count in; the others C-contiguous, or None.
    rows: the extents that axis 0 of q may have.
    remedy: what else could be done about the shape of q.
    """
    q, shape = arrays.q, arrays.q.shape
    q_len, leading = spec.q_len, shape[:-2]
    good = q_len in (None, 1) if len(leading) == 1 else len(leading) == 2 and leading[1] == q_len
    if not good or leading[0] not in rows or shape[-2] != spec.num_qo_heads or shape[-1] != spec.head_dim:
        _refuse_q_shape(spec, q, rows, remedy)
    check_dtype(q, "q", spec.dtype, "q and kv share one dtype, and kv has it")
    check_device(q, "q", spec.device, "kv")
    check_strides(q, "q")
    for array, (name, rule) in zip(arrays, RUN_ARRAYS.items(), strict=True):
        if array is not None and array is not q:
            shape, dtypes = rule.shape(spec, q.shape), [dtype or spec.dtype for dtype in rule.dtypes]
            check_whole(array, name, shape, rule.why, dtypes, spec.device, "q", is_written=rule.is_written)
            if array.size:
                check_base(array, name, rule.alignment)


def check_once(arrays: RunArrays, is_split: bool) -> None:
    """In partial results what counts once a row would be counted once a chunk."""
    if is_split and (given := arrays.scored_by(is_once=True)):
        name = next(iter(given))
        raise ValueError(
            f"{name} were given with a table that split() made, and every chunk of a sequence would count them; "
            f"pass them to merge_states(v, s, {name}={name}) alone"
        )


def _refuse_q_shape(spec: AttentionSpec, q: Any, rows: tuple[int, ...] | range, remedy: str) -> None:
    shape = q.shape
    leading = f"0..{rows.stop - 1}" if isinstance(rows, range) else " or ".join(map(str, dict.fromkeys(rows)))
    forms = []
    if spec.q_len in (None, 1):
        forms.append(f"[{leading}, {spec.num_qo_heads}, {spec.head_dim}]")
    if spec.q_len is not None:
        forms.append(f"[{leading}, {spec.q_len}, {spec.num_qo_heads}, {spec.head_dim}]")
    axes = "[rows, num_qo_heads, head_dim]" if spec.q_len is None else "[batch, (q_len,) num_qo_heads, head_dim]"
    also = f", or {remedy}" if shape[-1] == spec.head_dim else ""
    raise ValueError(f"q must have shape {' or '.join(forms)}, {axes}, got q.shape={shape}; reshape q{also}")
