"""The public functions: arrays at the door, all checks, a backend's plan, and results in the caller's library.

Every attention call is a plan and a run. The two Batch... classes keep the plan for many runs (once a step, then once a
layer); the one-shot functions make one and drop it. Their arguments, common to all:

    q            decode [batch, num_qo_heads, head_dim] or [batch, q_len, num_qo_heads, head_dim];
                 prefill [qo_indptr[-1], num_qo_heads, head_dim]; of the dtype and on the device of kv
    kv           PagedKV, one layer's pool
    table        PageTable, on kv's device or of NumPy arrays (then its values are checked)
    sm_scale     None: 1 / sqrt(head_dim). Scores, sm_scale * <q, k>, may be up to 2**23 in size (in decode they, and
                 <q, k>, up to 2**127)
    window_left  w: a query sees the w keys to the left of its position, and its own; -1: all
    logits_soft_cap  c: scores become c * tanh(score / c) after sm_scale; 0: off
    out          array like q, of q's dtype or float32, that is written and returned; None: a new one like q. out and
                 lse overlap neither each other nor q, k, v or the pool
    lse          float32 array of q's shape without head_dim that is written: the natural logarithm of the sum of the
                 exponentials of a query's scores, -inf (and out = 0) where it sees no key
    return_lse   return (out, lse) instead of out

They raise LayoutMismatchError, PageTableError and ValueError for layouts, tables, shapes and values, TypeError for
dtypes and devices, NotImplementedError for what a backend lacks (`supports` says it beforehand), before any launch.

On a GPU work is asynchronous, on CuPy's current stream of kv's device. Any argument may be a temporary: what came by
DLPack is kept until the kernels that read it are over (lifetimes.py). Functions may be called from any thread.
"""

import functools
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import backends
from .checks import arrays, calls, overlaps, pools, scalars, states, tables, tokens
from .interop import (
    FLOAT_DTYPES,
    any_dtype,
    as_dtype,
    cupy_for,
    device_of,
    native,
    parse_device,
    resolve_device,
    to_caller,
)
from .layout import Layout, as_layout
from .lifetimes import Loan, loan_of, reading, used
from .page_table import PageTable
from .paged_kv import PagedKV
from .spec import AttentionSpec, RunArrays, Scoring

_FLOAT32 = FLOAT_DTYPES["float32"]
# The arguments in their order, for messages.
_DECODE, _PREFILL, _APPEND = "decode(q, kv, table)", "prefill(q, qo_indptr, kv, table)", "append(kv, slots, k, v)"
_PLAN_DECODE, _PLAN_PREFILL = "plan(kv, table, num_qo_heads)", "plan(kv, table, qo_indptr, num_qo_heads)"
_DECODE_AXES = ("[batch, num_qo_heads, head_dim]", "[batch, q_len, num_qo_heads, head_dim]")
_PREFILL_AXES = ("[rows, num_qo_heads, head_dim]",)


# --------------------------------------------------------------------------------------------------------------------
# What a backend can do


@dataclass(frozen=True)
class Support:
    """The answer of `supports`: true or false, and why not."""

    supported: bool
    reason: str = ""

    def __bool__(self) -> bool:
        return self.supported


@dataclass(frozen=True)
class _Limits:
    dtypes: tuple[str, ...]
    head_dim_multiple: int = 1
    max_head_dim: int | None = None


_OPS = ("append", "decode", "prefill", "merge")
_LIMITS = {("cpu", op): _Limits(tuple(FLOAT_DTYPES)) for op in _OPS} | {
    ("cuda", "append"): _Limits(("float16", "bfloat16"), 16, 256),
    ("cuda", "decode"): _Limits(("float16", "bfloat16"), 16, 256),
    ("cuda", "prefill"): _Limits(("float16", "bfloat16"), 16, 256),
    ("cuda", "merge"): _Limits(("float16", "bfloat16", "float32")),
}
_MIN_COMPUTE_CAPABILITY = 80


def supports(
    op: str = "decode",
    *,
    device: Any = None,
    dtype: Any = None,
    head_dim: int | None = None,
    num_qo_heads: int | None = None,
    num_kv_heads: int | None = None,
    page_size: int | None = None,
    layout: Layout | str | None = None,
) -> Support:
    """Whether a call would be served on this machine: true or false, with a `.reason` that says why not.

    op: "append", "decode", "prefill" or "merge". device: "cpu", "cuda", "cuda:1", ...; None: as everywhere, the current
    CUDA device where there is one, else the CPU. What is not named is not asked about. Nothing limits page sizes,
    layouts, group sizes, q_len, windows, soft caps and positions. ValueError, TypeError: what is no question, as a
    head_dim of 0 or a dtype that NumPy does not know.
    """
    if not isinstance(op, str) or op not in _OPS:
        raise ValueError(f"op is {op!r}, which is none of {', '.join(_OPS)}; pass one of them")
    named = {"head_dim": head_dim, "page_size": page_size, "num_qo_heads": num_qo_heads, "num_kv_heads": num_kv_heads}
    for name, value in named.items():
        if value is not None:
            scalars.as_int(value, name, minimum=1)
    if layout is not None:
        as_layout(layout)
    kind, _ = parse_device(device)
    dtype_name = None if dtype is None else any_dtype(dtype).name
    try:
        if dtype is not None:
            as_dtype(dtype)
        if num_qo_heads is not None and num_kv_heads is not None and num_qo_heads % num_kv_heads:
            raise ValueError(f"num_qo_heads={num_qo_heads} is not a multiple of num_kv_heads={num_kv_heads}")
        _check_limits(op, kind or _kind(resolve_device(None)), dtype_name, head_dim)
        _check_compute_capability(resolve_device(device))
    except (ValueError, TypeError, ImportError, NotImplementedError) as error:
        return Support(False, str(error))
    return Support(True)


@functools.cache
def _check_supported(op: str, device: str, dtype: np.dtype, head_dim: int) -> None:
    _check_limits(op, _kind(device), dtype.name, head_dim)
    _check_compute_capability(device)


def _kind(device: str) -> str:
    return device.partition(":")[0]


def _check_limits(op: str, kind: str, dtype: str | None, head_dim: int | None) -> None:
    limits = _LIMITS[kind, op]
    if dtype is not None and dtype not in limits.dtypes:
        raise NotImplementedError(
            f"{op} on a GPU takes {', '.join(limits.dtypes)}, not {dtype}; pass .astype(np.float16) arrays, or NumPy "
            f"arrays to compute on the CPU in {dtype}"
        )
    multiple, most = limits.head_dim_multiple, limits.max_head_dim
    if head_dim is not None and (head_dim % multiple or (most is not None and head_dim > most)):
        raise NotImplementedError(
            f"{op} on a GPU takes a head_dim that is a multiple of {multiple} up to {most}, not {head_dim}; pad it "
            f"with zeros and pass sm_scale=1/sqrt({head_dim}), or pass NumPy arrays to compute on the CPU"
        )


def _check_compute_capability(device: str) -> None:
    if device == "cpu":
        return
    found = int(cupy_for(f"{device} is asked for").cuda.Device(int(device.partition(":")[2])).compute_capability)
    if found < _MIN_COMPUTE_CAPABILITY:
        raise NotImplementedError(
            f"{device} has compute capability {found / 10}, and the kernels need {_MIN_COMPUTE_CAPABILITY / 10}; "
            f"use a newer GPU, or pass NumPy arrays to compute on the CPU"
        )


# --------------------------------------------------------------------------------------------------------------------
# A plan and a run


# The checked metadata of one step: what a backend's plan takes over (a qo_indptr of None is decode), the rows that q
# may have, and the loan of qo_indptr.
_Rows = tuple[int, ...] | range
_Step = tuple[AttentionSpec, PageTable, Any, _Rows, Loan | None]


def _new_plan(device: str, **options: Any) -> Any:
    return backends.of(device).Plan(device, **options)


class _Specs:
    """The spec of a call; the last one again, unchecked, while nothing that it was made from has changed."""

    def __init__(self) -> None:
        self._made_from: tuple[Any, ...] | None = None
        self._spec: AttentionSpec
        self._offsets: tuple[Any, ...] | None = None  # the form of a device qo_indptr that was last found right

    def get(
        self, kv: PagedKV, table: PageTable, num_qo_heads: int, scoring: Scoring, q_len: int | None
    ) -> AttentionSpec:
        numbers = (num_qo_heads, q_len, *scoring)
        # Types first: 8.0 == 8, but is no count, and an array is not to be compared.
        made_from = (kv.signature, table.page_size, table.device, *map(type, numbers), numbers)
        if made_from != self._made_from:
            call = calls.attention_spec(kv, table, num_qo_heads, scoring, q_len)
            _check_supported("prefill" if q_len is None else "decode", call.device, call.dtype, call.head_dim)
            is_constant = not any(hasattr(number, "__dlpack__") for number in numbers)
            self._made_from, self._spec = made_from if is_constant else None, call
        tables.check_table_values(table, self._spec.num_pages)
        return self._spec

    def check_qo_indptr(self, qo_indptr: Any, batch_size: int, total_rows: int | None, device: str) -> None:
        """A host array in full; one on a device, whose values are not seen, while its form is new."""
        found = None if isinstance(qo_indptr, np.ndarray) else (arrays.signature_of(qo_indptr), batch_size, device)
        if found is None or found != self._offsets:
            calls.check_qo_indptr(qo_indptr, batch_size, total_rows, device)
            self._offsets = found


class _CheckedCall:
    """Signatures of the last call that passed the checks; a call with equal ones skips them.

    remedy: what else a caller with a q of another shape can do.
    """

    def __init__(self, remedy: str = "plan anew for it") -> None:
        # The signatures, and the extents of arrays that have them: one tuple, because threads share what append keeps.
        self._passed: tuple[tuple[Any, ...] | None, tuple[int, ...]] = None, ()
        self._remedy = remedy

    def check_run(self, call: AttentionSpec, given: RunArrays, kv: PagedKV, rows: _Rows) -> tuple[Any, ...]:
        """The run's signature."""
        signature = (getattr(kv, "signature", None), *map(arrays.signature_of, given), call, rows)
        passed, extents = self._passed
        if signature != passed:
            calls.check_layer(call, kv)
            calls.check_arrays(call, given, rows, self._remedy)
            extents = overlaps.extents_of(given.q, kv.k_pages, kv.v_pages, given.out, given.lse)
            self._passed = signature, extents
        if given.out is not None or given.lse is not None:
            overlaps.check_apart_of_run(given.q, kv, given.out, given.lse, extents)
        return signature

    def check_append(self, kv: PagedKV, slots: Any, k: Any, v: Any) -> tuple[Any, ...]:
        """The append's signature."""
        signature = (kv.signature, *map(arrays.signature_of, (slots, k, v)), kv.writable)
        passed, extents = self._passed
        if signature == passed:
            overlaps.check_apart_of_append(kv, slots, k, v, extents)
            return signature
        tokens.check_append(kv, slots, k, v)
        _check_supported("append", kv.device, kv.dtype, kv.head_dim)
        if not isinstance(slots, np.ndarray):  # whose values count, too
            self._passed = signature, overlaps.extents_of(k, v, slots, kv.k_pages, kv.v_pages)
        return signature


_appended = _CheckedCall()  # of all pools and threads


def _decode_step(
    specs: _Specs,
    kv: PagedKV,
    table: PageTable,
    num_qo_heads: int,
    scoring: Scoring,
    q_len: int,
    max_batch_size: int | None = None,
) -> _Step:
    call = specs.get(kv, table, num_qo_heads, scoring, q_len)
    rows = (table.batch_size,) if max_batch_size is None else (table.batch_size, max_batch_size)
    return call, table, None, rows, None


def _prefill_step(
    specs: _Specs,
    kv: PagedKV,
    table: PageTable,
    qo_indptr: Any,
    num_qo_heads: int,
    scoring: Scoring,
    *,
    total_rows: int | None = None,
    max_tokens: int | None = None,
) -> _Step:
    call = specs.get(kv, table, num_qo_heads, scoring, None)
    indptr = native(qo_indptr, "qo_indptr")
    specs.check_qo_indptr(indptr, table.batch_size, total_rows, call.device)
    if not isinstance(indptr, np.ndarray):  # then only the device knows how many rows q has
        rows = range(2**31 if max_tokens is None else max_tokens + 1)
        return call, table, indptr, rows, loan_of((indptr, qo_indptr))
    capacity = () if max_tokens is None else (max_tokens,)
    return call, table, indptr, (int(indptr[-1]), *capacity), None


def _run(
    call: AttentionSpec,
    rows: _Rows,
    checked: _CheckedCall,
    attend: Callable[..., None],
    q: Any,
    kv: PagedKV,
    out: Any,
    lse: Any,
    return_lse: bool,
) -> Any:
    """Check one run, and have it done by `attend`, a plan's run."""
    native_q = native(q, "q")
    native_out = None if out is None else native(out, "out", writable=True)
    native_lse = None if lse is None else native(lse, "lse", writable=True)
    signature = checked.check_run(call, RunArrays(native_q, native_out, native_lse), kv, rows)
    loan = None
    if native_q is not q or native_out is not out or native_lse is not lse:
        loan = loan_of((native_q, q), (native_out, out), (native_lse, lse))
    if native_out is None:
        native_out = backends.of(call.device).empty(call.out_shape(native_q.shape), call.dtype, call.device)
    if native_lse is None and return_lse:
        native_lse = backends.of(call.device).empty(native_q.shape[:-1], _FLOAT32, call.device)
    if native_q.size:
        q_rows, out_rows, lse_rows = native_q, native_out, native_lse
        if native_q.ndim == 4:
            q_rows, out_rows, lse_rows = _as_rows(native_q), _as_rows(native_out), _as_rows(native_lse)
        try:
            attend(call, RunArrays(q_rows, out_rows, lse_rows), kv, signature)
        finally:  # (not by `reading`, for the host's time)
            if loan is not None or kv.loan is not None:
                used(loan, kv.loan)
    result = to_caller(native_out, q) if out is None else out
    if not return_lse:
        return result
    return result, to_caller(native_lse, q) if lse is None else lse


def _as_rows(array: Any) -> Any:
    """[batch, q_len, ...] as [batch * q_len, ...]."""
    return None if array is None else array.reshape(-1, *array.shape[2:])


def _run_once(step: _Step, q: Any, kv: PagedKV, out: Any, lse: Any, return_lse: bool) -> Any:
    call, table, qo_indptr, rows, loan = step

    def attend(call: AttentionSpec, rows: RunArrays, *arguments: Any) -> None:
        # A device qo_indptr must not point behind q.
        plan = _new_plan(call.device, one_shot=True, max_tokens=None if qo_indptr is None else rows.q.shape[0])
        with reading(table.loan, loan):
            plan.update(call, table, qo_indptr)
        plan.run(call, rows, *arguments)

    checked = _CheckedCall("pass a table of that batch" if qo_indptr is None else "pass a qo_indptr that ends there")
    return _run(call, rows, checked, attend, q, kv, out, lse, return_lse)


class _BatchAttention:
    """What the two classes share: a backend's plan with its capacities, and run()."""

    def __init__(self, *, batch_invariant: bool, **capacities: int | None) -> None:
        for name, value in capacities.items():
            if value is not None:
                scalars.as_int(value, name, minimum=1)
        self._capacities, self._batch_invariant = capacities, batch_invariant
        self._specs, self._checked = _Specs(), _CheckedCall()
        self._plan: Any = None
        self._step: tuple[AttentionSpec, _Rows] | None = None
        self._in_use = threading.Lock()  # held by the call that a thread is in

    def _take(self, step: _Step) -> None:
        """Have the plan take over a step; where that raises, the step before stays."""
        call, table, qo_indptr, rows, loan = step
        tables.check_capacities(table, qo_indptr, call.q_len, **self._capacities)
        moved = self._step is None or self._step[0].device != call.device
        plan = self._new_plan(call.device) if moved else self._plan
        try:
            plan.update(call, table, qo_indptr)
        finally:
            if loan is not None or table.loan is not None:
                used(loan, table.loan)
        self._plan, self._step = plan, (call, rows)

    def _new_plan(self, device: str) -> Any:
        return _new_plan(device, **self._capacities, batch_invariant=self._batch_invariant)

    def _is_in_use(self, call: str) -> RuntimeError:
        return RuntimeError(
            f"{call}() was called while another call of this plan is under way in another thread, and a plan serves "
            f"one thread at a time; make a plan for each thread, or put a lock around its calls"
        )

    def run(self, q: Any, kv: PagedKV, *, out: Any = None, lse: Any = None, return_lse: bool = False) -> Any:
        """Attend over one layer by the last plan.

        q has as many rows as the plan's batch (for prefill, qo_indptr[-1]), or as its capacity max_batch_size (for
        prefill, max_tokens); rows past the batch become out = 0, lse = -inf. kv: any layer like the one planned with.
        The other arguments, the results and the errors are those at the top of this module. With `out` (and `lse`,
        where it is wanted) nothing is allocated.
        """
        if not self._in_use.acquire(False):
            raise self._is_in_use("run")
        try:
            if self._step is None:
                raise RuntimeError("run() was called before plan(); call plan(kv, table, ...) once a step, then run()")
            call, rows = self._step
            return _run(call, rows, self._checked, self._plan.run, q, kv, out, lse, return_lse)
        finally:
            self._in_use.release()

    def status(self) -> None:
        """Raise the PageTableError that a kernel recorded since the last plan, if one did.

        On whatever stream the plan ran: this waits for all work of the device.
        """
        if self._plan is not None:
            self._plan.raise_status()


class BatchDecodeWithPagedKVCache(_BatchAttention):
    """Decode for many layers and steps: plan() once a step, run() once a layer.

    max_batch_size, max_pages: capacity; max_pages counts the pages of all requests together. With both, the plan's
        buffers never move and CUDA graphs may capture plan() and run(); without, they grow by doubling.
    batch_invariant: a request's result is bitwise the same alone or in any batch.

    A plan serves one stream and one thread at a time (a call while another thread is in one is a RuntimeError); two
    plans share nothing. A graph that captured plan() or run() keeps the buffers that they read, also when the plan is
    gone; q, pools, tables, out and lse are the caller's to keep for as long as it is replayed.
    """

    def __init__(
        self, *, max_batch_size: int | None = None, max_pages: int | None = None, batch_invariant: bool = False
    ) -> None:
        super().__init__(max_batch_size=max_batch_size, max_pages=max_pages, batch_invariant=batch_invariant)

    def plan(
        self,
        kv: PagedKV,
        table: PageTable,
        num_qo_heads: int,
        *,
        q_len: int = 1,
        sm_scale: float | None = None,
        window_left: int = -1,
        logits_soft_cap: float = 0.0,
    ) -> None:
        """Copy a step's table. kv: any layer; it gives layout, heads, dims, dtype. q_len: causal queries a request."""
        pools.check_operands(kv, table, _PLAN_DECODE)
        if not self._in_use.acquire(False):
            raise self._is_in_use("plan")
        try:
            scoring = Scoring(sm_scale, True, window_left, logits_soft_cap)
            capacity = self._capacities["max_batch_size"]
            self._take(_decode_step(self._specs, kv, table, num_qo_heads, scoring, q_len, capacity))
        finally:
            self._in_use.release()


class BatchPrefillWithPagedKVCache(_BatchAttention):
    """Ragged prefill for many layers and steps: plan() once a step, run() once a layer.

    max_batch_size, max_pages, batch_invariant: as for decode. max_tokens: capacity for the rows of q. What is said
    there of streams, threads and graphs holds here, too.
    """

    def __init__(
        self,
        *,
        max_batch_size: int | None = None,
        max_pages: int | None = None,
        max_tokens: int | None = None,
        batch_invariant: bool = False,
    ) -> None:
        super().__init__(
            max_batch_size=max_batch_size, max_pages=max_pages, max_tokens=max_tokens, batch_invariant=batch_invariant
        )

    def plan(
        self,
        kv: PagedKV,
        table: PageTable,
        qo_indptr: Any,
        num_qo_heads: int,
        *,
        causal: bool = True,
        sm_scale: float | None = None,
        window_left: int = -1,
        logits_soft_cap: float = 0.0,
    ) -> None:
        """Copy a step's table. qo_indptr int32 [batch + 1]: request i has rows qo_indptr[i] to qo_indptr[i+1] of q."""
        pools.check_operands(kv, table, _PLAN_PREFILL)
        if not self._in_use.acquire(False):
            raise self._is_in_use("plan")
        try:
            scoring = Scoring(sm_scale, causal, window_left, logits_soft_cap)
            capacity = self._capacities["max_tokens"]
            self._take(_prefill_step(self._specs, kv, table, qo_indptr, num_qo_heads, scoring, max_tokens=capacity))
        finally:
            self._in_use.release()


def decode(
    q: Any,
    kv: PagedKV,
    table: PageTable,
    *,
    sm_scale: float | None = None,
    window_left: int = -1,
    logits_soft_cap: float = 0.0,
    out: Any = None,
    lse: Any = None,
    return_lse: bool = False,
) -> Any:
    """Attention of one query (or q_len causal ones) a request: out, or (out, lse) with return_lse.

    Arguments, results and errors are those at the top of this module.
    """
    pools.check_operands(kv, table, _DECODE)
    native_q = native(q, "q")
    calls.check_q(kv, native_q, _DECODE_AXES, _DECODE)
    q_len = native_q.shape[1] if native_q.ndim == 4 else 1
    scoring = Scoring(sm_scale, True, window_left, logits_soft_cap)
    step = _decode_step(_Specs(), kv, table, native_q.shape[-2], scoring, q_len)
    return _run_once(step, q, kv, out, lse, return_lse)


def prefill(
    q: Any,
    qo_indptr: Any,
    kv: PagedKV,
    table: PageTable,
    *,
    causal: bool = True,
    sm_scale: float | None = None,
    window_left: int = -1,
    logits_soft_cap: float = 0.0,
    out: Any = None,
    lse: Any = None,
    return_lse: bool = False,
) -> Any:
    """Attention of any number of queries a request: out, or (out, lse) with return_lse.

    qo_indptr int32 [batch + 1]: request i has rows qo_indptr[i] to qo_indptr[i+1] of q. causal: its query i of n sees
    the positions up to total_len - n + i. Other arguments, results and errors are those at the top of this module.
    """
    pools.check_operands(kv, table, _PREFILL)
    native_q = native(q, "q")
    calls.check_q(kv, native_q, _PREFILL_AXES, _PREFILL)
    scoring = Scoring(sm_scale, causal, window_left, logits_soft_cap)
    step = _prefill_step(_Specs(), kv, table, qo_indptr, native_q.shape[1], scoring, total_rows=native_q.shape[0])
    return _run_once(step, q, kv, out, lse, return_lse)


# --------------------------------------------------------------------------------------------------------------------
# One request with contiguous K and V


def single_decode(
    q: Any,
    k: Any,
    v: Any,
    *,
    layout: Layout | str,
    sm_scale: float | None = None,
    window_left: int = -1,
    logits_soft_cap: float = 0.0,
    out: Any = None,
    lse: Any = None,
    return_lse: bool = False,
) -> Any:
    """decode for one request without a cache: the same kernels over a pool of one page, no copy.

    q, out [num_qo_heads, head_dim], lse [num_qo_heads]; k, v [len, num_kv_heads, head_dim] (NHD) or
    [num_kv_heads, len, head_dim] (HND). Other arguments, results and errors are those at the top of this module.
    """
    kv, table, loan = _one_request(k, v, layout)
    native_q = native(q, "q")
    calls.check_q(kv, native_q, ("[num_qo_heads, head_dim]",), "single_decode(q, k, v)")
    native_out = None if out is None else native(out, "out", writable=True)
    native_lse = None if lse is None else native(lse, "lse", writable=True)
    calls.check_single_q(kv, native_q, native_out, native_lse)
    with reading(loan, loan_of((native_q, q), (native_out, out), (native_lse, lse))):
        results = decode(
            native_q[None],
            kv,
            table,
            sm_scale=sm_scale,
            window_left=window_left,
            logits_soft_cap=logits_soft_cap,
            out=None if native_out is None else native_out[None],
            lse=None if native_lse is None else native_lse[None],
            return_lse=return_lse,
        )
    given, results = (out, lse), results if return_lse else (results,)
    unpacked = tuple(to_caller(x[0], q) if mine is None else mine for x, mine in zip(results, given, strict=False))
    return unpacked if return_lse else unpacked[0]


def single_prefill(
    q: Any,
    k: Any,
    v: Any,
    *,
    layout: Layout | str,
    causal: bool = True,
    sm_scale: float | None = None,
    window_left: int = -1,
    logits_soft_cap: float = 0.0,
    out: Any = None,
    lse: Any = None,
    return_lse: bool = False,
) -> Any:
    """prefill for one request without a cache: the same kernels over a pool of one page, no copy.

    q, out [n, num_qo_heads, head_dim], lse [n, num_qo_heads]; k, v [len, num_kv_heads, head_dim] (NHD) or
    [num_kv_heads, len, head_dim] (HND). Other arguments, results and errors are those at the top of this module.
    """
    kv, table, loan = _one_request(k, v, layout)
    native_q = native(q, "q")
    calls.check_q(kv, native_q, _PREFILL_AXES, "single_prefill(q, k, v)")
    qo_indptr = np.array([0, native_q.shape[0]], np.int32)
    scoring = Scoring(sm_scale, causal, window_left, logits_soft_cap)
    step = _prefill_step(_Specs(), kv, table, qo_indptr, native_q.shape[1], scoring)
    with reading(loan):
        return _run_once(step, q, kv, out, lse, return_lse)


def _one_request(given_k: Any, given_v: Any, layout: Layout | str) -> tuple[PagedKV, PageTable, Loan | None]:
    """Contiguous K and V as a pool of one page, the table of one request that fills it, and what is lent of them."""
    layout = as_layout(layout)
    k, v = native(given_k, "k"), native(given_v, "v")
    loan = loan_of((k, given_k), (v, given_v))
    calls.check_single_kv(k, v, layout)
    length = k.shape[0 if layout is Layout.NHD else 1]
    if length == 0:  # a page has at least one slot: an unused one
        num_heads, head_dim = k.shape[1 if layout is Layout.NHD else 0], k.shape[2]
        page = (1, num_heads, head_dim) if layout is Layout.NHD else (num_heads, 1, head_dim)
        k = v = backends.of(device_of(k)).zeros(page, k.dtype, device_of(k))
    kv = PagedKV(k[None], v[None], layout=layout)
    indptr, last_page_len = np.array([0, length > 0], np.int32), np.array([length], np.int32)
    table = PageTable(indptr, np.zeros(1, np.int32), last_page_len, page_size=kv.page_size)
    return kv, table, loan


# --------------------------------------------------------------------------------------------------------------------
# Writing and merging


def append(kv: PagedKV, slots: Any, k: Any, v: Any) -> None:
    """Write new tokens into the pool, in place.

    Parameters
    ----------
    kv: the pool.
    slots: int64 or int32 [tokens], slot = page * page_size + offset; -1 skips the token. NumPy or beside the pool.
    k, v: [tokens, num_kv_heads, head_dim], whatever the layout of the pool, of its dtype and on its device. They and
        slots do not overlap the pool.

    Raises
    ------
    ValueError: shapes, a pool that cannot be written; TypeError: dtypes, devices; NotImplementedError: see `supports`.
    PageTableError: a NumPy slot outside the pool. One in a device array is skipped and recorded: `status` raises it.
    """
    pools.check_kv(kv, _APPEND)
    native_slots, native_k, native_v = native(slots, "slots"), native(k, "k"), native(v, "v")
    signature = _appended.check_append(kv, native_slots, native_k, native_v)
    if not native_slots.size:
        return
    loan = None
    if native_k is not k or native_v is not v or native_slots is not slots:
        loan = loan_of((native_slots, slots), (native_k, k), (native_v, v))
    backend = backends.of(kv.device)
    try:
        backend.append(kv, backend.to_backend(native_slots, kv.device), native_k, native_v, signature)
    finally:
        if loan is not None or kv.loan is not None:
            used(loan, kv.loan)


def merge_state(
    v_a: Any, s_a: Any, v_b: Any, s_b: Any, *, base: Any = "e", out: Any = None, lse: Any = None
) -> tuple[Any, Any]:
    """Merge attention over two disjoint sets of keys into attention over both: (v, s).

    v_a, v_b [rows, heads, dim]: outputs; s_a, s_b float32 [rows, heads]: their lse, to `base` "e" or 2, as is the
    result's. A state with s = -inf, or +inf as FlashAttention-2 and FlashMLA have it, saw no key and changes nothing,
    whatever its v. out (of any float dtype; else one of v's) and lse (float32) are written and returned; out may be v_a
    and lse may be s_a, else they overlap none of the others.
    """
    given = {"v_a": v_a, "s_a": s_a, "v_b": v_b, "s_b": s_b}
    return _merge("merge_state", states.check_merge_state, given, lambda shape: shape, base, out, lse)


def merge_states(v: Any, s: Any, *, base: Any = "e", out: Any = None, lse: Any = None) -> tuple[Any, Any]:
    """Merge attention over disjoint sets of keys into attention over all of them: (v, s) without axis 1.

    v [rows, num_states, heads, dim], any strides but a contiguous last axis; s float32 [rows, num_states, heads],
    -inf or +inf of a state that saw no key. out and lse overlap neither v nor s. The rest is as for merge_state.
    """
    given = {"v": v, "s": s}
    return _merge(
        "merge_states", states.check_merge_states, given, lambda shape: (*shape[:1], *shape[2:]), base, out, lse
    )


def _merge(
    function: str,
    check: Callable[..., float],
    given: dict[str, Any],
    shape_of: Callable[[tuple[int, ...]], tuple[int, ...]],
    base: Any,
    out: Any,
    lse: Any,
) -> tuple[Any, Any]:
    """given: the states by name, v (or v_a) first. shape_of: the result's shape, by that of the first."""
    arrays = [native(array, name) for name, array in given.items()]
    native_out = None if out is None else native(out, "out", writable=True)
    native_lse = None if lse is None else native(lse, "lse", writable=True)
    loan = loan_of(*zip(arrays, given.values(), strict=True), (native_out, out), (native_lse, lse))
    number = check(*arrays, base, native_out, native_lse)
    shape, like = shape_of(arrays[0].shape), next(iter(given.values()))
    device, dtype = device_of(arrays[0]), arrays[0].dtype
    _check_supported("merge", device, dtype, shape[-1])
    backend = backends.of(device)
    if native_out is None:
        native_out = backend.empty(shape, dtype, device)
    else:
        _check_supported("merge", device, native_out.dtype, shape[-1])
        if device != "cpu" and {dtype.name, native_out.dtype.name} == {"float16", "bfloat16"}:
            raise NotImplementedError(
                f"merge on a GPU does not turn {dtype} states into {native_out.dtype}; pass out of {dtype} or float32"
            )
    if native_lse is None:
        native_lse = backend.empty(shape[:-1], _FLOAT32, device)
    if native_out.size:
        with reading(loan):
            getattr(backend, function)(*arrays, native_out, native_lse, number)
    return (
        to_caller(native_out, like) if out is None else out,
        to_caller(native_lse, like) if lse is None else lse,
    )


# --------------------------------------------------------------------------------------------------------------------


def status(device: Any = None) -> None:
    """Raise the first fault that `append` and the one-shot functions recorded on a device, once: a PageTableError.

    device: None is the current CUDA device if there is one, else the CPU. This synchronises. Plans have their own.
    """
    resolved = resolve_device(device)
    backends.of(resolved).raise_device_status(resolved)
