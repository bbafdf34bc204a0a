"""Attention over paged K and V: decode, prefill, the same for one request without a cache, and plans for many layers.

Every call is a plan and a run (plans.py). The two Batch... classes keep the plan for many runs; the one-shot functions
take one that an earlier call left. What the options mean is said in full by spec.Scoring; the docstring of decode is
where the words of the others' come from.

They raise LayoutMismatchError, PageTableError and ValueError for layouts, tables, shapes and values, TypeError for
dtypes and devices, NotImplementedError for what a backend lacks (`supports` says it beforehand), before any launch.

On a GPU work is asynchronous, on CuPy's current stream of kv's device. Any argument may be a temporary: what came by
DLPack is kept until the kernels that read it are over (lifetimes.py). Functions may be called from any thread.
"""

import threading
from typing import Any

import numpy as np

from . import backends
from .checks import calls, pools, scalars
from .interop import Array, device_of, native, resolve_device, to_caller
from .layout import Layout, as_layout
from .lifetimes import loan_of
from .page_table import PageTable
from .paged_kv import PagedKV
from .plans import AttentionPlan, attend_once, borrow, with_results
from .spec import RunArrays, Scoring

# What q may be, by its number of axes.
_DECODE_AXES = {3: "[batch, num_qo_heads, head_dim]", 4: "[batch, q_len, num_qo_heads, head_dim]"}
_PREFILL_AXES = {3: "[rows, num_qo_heads, head_dim]"}


def decode(
    q: Array,
    kv: PagedKV,
    table: PageTable,
    *,
    sm_scale: float | None = None,
    window_left: int = -1,
    logits_soft_cap: float = 0.0,
    sinks: Array | None = None,
    out: Array | None = None,
    lse: Array | None = None,
    return_lse: bool = False,
) -> Any:
    """Attention of the last query, or the last q_len ones, of every request: out, or (out, lse) with return_lse.

    Parameters
    ----------
    q: [batch, num_qo_heads, head_dim], or [batch, q_len, num_qo_heads, head_dim] for q_len causal queries a request; of
        the dtype and on the device of kv.
    kv: PagedKV, one layer's pool.
    table: PageTable, on kv's device or of NumPy arrays, whose values are checked.
    sm_scale: float, the factor of the products <q, k>. Default None: 1 / sqrt(head_dim).
    window_left: int, how many keys left of its position a query sees, beside its own. Default -1: all.
    logits_soft_cap: float c: scores become c * tanh(score / c), after sm_scale. Default 0.0: off.
    sinks: float32 [num_qo_heads], natural log: exp(sinks[h]) joins every denominator of head h. Default None: none.
    out: array to write and return, q's shape with v_head_dim, q's dtype or float32. Default None: a new one.
    lse: float32 array to write, q's shape without head_dim. Default None: a new one where return_lse asks for it.
    return_lse: bool, whether to return (out, lse). Default False.

    lse is the natural logarithm of the sum of the exponentials of a query's scores and its sink (in the same units);
    where there are none it is -inf, and out is 0. out and lse overlap no other argument. Results are arrays of q's
    library.
    """
    pools.check_operands(kv, table, "decode(q, kv, table)")
    given = RunArrays(q, out, lse, sinks)
    arrays, loan = borrow(given)
    calls.check_q(kv, arrays.q, _DECODE_AXES, "decode(q, kv, table)")
    q_len = arrays.q.shape[1] if arrays.q.ndim == 4 else 1
    scoring = Scoring(sm_scale, True, window_left, logits_soft_cap)
    return _results(given, attend_once(arrays, kv, table, scoring, loan, return_lse, q_len=q_len), return_lse)


def prefill(
    q: Array,
    qo_indptr: Array,
    kv: PagedKV,
    table: PageTable,
    *,
    causal: bool = True,
    sm_scale: float | None = None,
    window_left: int = -1,
    logits_soft_cap: float = 0.0,
    sinks: Array | None = None,
    out: Array | None = None,
    lse: Array | None = None,
    return_lse: bool = False,
) -> Any:
    """Attention of any number of queries a request: out, or (out, lse) with return_lse.

    Parameters
    ----------
    q: [qo_indptr[-1], num_qo_heads, head_dim], the rows of all requests; of the dtype and on the device of kv.
    qo_indptr: int32 [batch + 1], NumPy or on kv's device; request i has rows qo_indptr[i] to qo_indptr[i+1] of q.
    kv: PagedKV, one layer's pool.
    table: PageTable, on kv's device or of NumPy arrays, whose values are checked.
    causal: bool, whether a query sees no later position; query i of n is at total_len - n + i. Default True.
    sm_scale: float, the factor of the products <q, k>. Default None: 1 / sqrt(head_dim).
    window_left: int, how many keys left of its position a query sees, beside its own. Default -1: all.
    logits_soft_cap: float c: scores become c * tanh(score / c), after sm_scale. Default 0.0: off.
    sinks: float32 [num_qo_heads], natural log: exp(sinks[h]) joins every denominator of head h. Default None: none.
    out: array to write and return, q's shape with v_head_dim, q's dtype or float32. Default None: a new one.
    lse: float32 array to write, q's shape without head_dim. Default None: a new one where return_lse asks for it.
    return_lse: bool, whether to return (out, lse). Default False.

    What decode says of its results holds here.
    """
    pools.check_operands(kv, table, "prefill(q, qo_indptr, kv, table)")
    given = RunArrays(q, out, lse, sinks)
    arrays, loan = borrow(given)
    calls.check_q(kv, arrays.q, _PREFILL_AXES, "prefill(q, qo_indptr, kv, table)")
    scoring = Scoring(sm_scale, causal, window_left, logits_soft_cap)
    return _results(given, attend_once(arrays, kv, table, scoring, loan, return_lse, qo_indptr=qo_indptr), return_lse)


def _results(given: RunArrays, arrays: RunArrays, return_lse: bool) -> Any:
    """out, or (out, lse): what the caller gave, or else what was made, as arrays of q's library."""
    out = to_caller(arrays.out, given.q) if given.out is None else given.out
    if not return_lse:
        return out
    return out, to_caller(arrays.lse, given.q) if given.lse is None else given.lse


# --------------------------------------------------------------------------------------------------------------------
# One request with contiguous K and V


def single_decode(
    q: Array,
    k: Array,
    v: Array,
    *,
    layout: Layout | str,
    sm_scale: float | None = None,
    window_left: int = -1,
    logits_soft_cap: float = 0.0,
    sinks: Array | None = None,
    out: Array | None = None,
    lse: Array | None = None,
    return_lse: bool = False,
) -> Any:
    """decode for one request without a cache: the same kernels over a pool of one page, no copy.

    Parameters
    ----------
    q: [num_qo_heads, head_dim], of the dtype and on the device of k.
    k: [len, num_kv_heads, head_dim] (NHD) or [num_kv_heads, len, head_dim] (HND).
    v: the same with v_head_dim for head_dim.
    layout: Layout or "NHD" or "HND"; it has no default.
    sm_scale: float, the factor of the products <q, k>. Default None: 1 / sqrt(head_dim).
    window_left: int, how many keys left of its position a query sees, beside its own. Default -1: all.
    logits_soft_cap: float c: scores become c * tanh(score / c), after sm_scale. Default 0.0: off.
    sinks: float32 [num_qo_heads], natural log: exp(sinks[h]) joins every denominator of head h. Default None: none.
    out: array to write and return, q's shape with v_head_dim, q's dtype or float32. Default None: a new one.
    lse: float32 array to write, q's shape without head_dim. Default None: a new one where return_lse asks for it.
    return_lse: bool, whether to return (out, lse). Default False.

    What decode says of its results holds here.
    """
    kv, table = _one_request(k, v, layout)
    given = RunArrays(q, out, lse, sinks)
    arrays, loan = borrow(given)
    calls.check_q(kv, arrays.q, {2: "[num_qo_heads, head_dim]"}, "single_decode(q, k, v)")
    calls.check_single_q(kv, arrays)
    batch = arrays.with_rows(lambda array: array[None])
    scoring = Scoring(sm_scale, True, window_left, logits_soft_cap)
    batch = attend_once(batch, kv, table, scoring, loan, return_lse, q_len=1)
    return _results(given, batch.with_rows(lambda array: array[0]), return_lse)


def single_prefill(
    q: Array,
    k: Array,
    v: Array,
    *,
    layout: Layout | str,
    causal: bool = True,
    sm_scale: float | None = None,
    window_left: int = -1,
    logits_soft_cap: float = 0.0,
    sinks: Array | None = None,
    out: Array | None = None,
    lse: Array | None = None,
    return_lse: bool = False,
) -> Any:
    """prefill for one request without a cache: the same kernels over a pool of one page, no copy.

    Parameters
    ----------
    q: [n, num_qo_heads, head_dim], of the dtype and on the device of k.
    k: [len, num_kv_heads, head_dim] (NHD) or [num_kv_heads, len, head_dim] (HND).
    v: the same with v_head_dim for head_dim.
    layout: Layout or "NHD" or "HND"; it has no default.
    causal: bool, whether a query sees no later position; query i of n is at total_len - n + i. Default True.
    sm_scale: float, the factor of the products <q, k>. Default None: 1 / sqrt(head_dim).
    window_left: int, how many keys left of its position a query sees, beside its own. Default -1: all.
    logits_soft_cap: float c: scores become c * tanh(score / c), after sm_scale. Default 0.0: off.
    sinks: float32 [num_qo_heads], natural log: exp(sinks[h]) joins every denominator of head h. Default None: none.
    out: array to write and return, q's shape with v_head_dim, q's dtype or float32. Default None: a new one.
    lse: float32 array to write, q's shape without head_dim. Default None: a new one where return_lse asks for it.
    return_lse: bool, whether to return (out, lse). Default False.

    What decode says of its results holds here.
    """
    kv, table = _one_request(k, v, layout)
    given = RunArrays(q, out, lse, sinks)
    arrays, loan = borrow(given)
    calls.check_q(kv, arrays.q, _PREFILL_AXES, "single_prefill(q, k, v)")
    qo_indptr = np.array([0, arrays.q.shape[0]], np.int32)
    scoring = Scoring(sm_scale, causal, window_left, logits_soft_cap)
    return _results(given, attend_once(arrays, kv, table, scoring, loan, return_lse, qo_indptr=qo_indptr), return_lse)


def _one_request(given_k: Array, given_v: Array, layout: Layout | str) -> tuple[PagedKV, PageTable]:
    """Contiguous K and V as a pool of one page, and the table of one request that fills it."""
    layout = as_layout(layout)
    k, v = native(given_k, "k"), native(given_v, "v")
    loan = loan_of((k, given_k), (v, given_v))
    calls.check_single_kv(k, v, layout)
    length_axis = layout.slot_axis - 1
    length = k.shape[length_axis]
    if length == 0:  # a page has at least one slot: an unused one
        zeros = backends.of(device_of(k)).zeros
        k, v = (zeros((*x.shape[:length_axis], 1, *x.shape[length_axis + 1 :]), x.dtype, device_of(x)) for x in (k, v))
    kv = PagedKV(k[None], v[None], layout=layout)
    kv._set(loan=loan)
    indptr, last_page_len = np.array([0, length > 0], np.int32), np.array([length], np.int32)
    return kv, PageTable(indptr, np.zeros(1, np.int32), last_page_len, page_size=kv.page_size)


# --------------------------------------------------------------------------------------------------------------------
# Plans


class _BatchAttention:
    """What the two classes share: a plan, run(), and the rule that one thread at a time is in it."""

    def __init__(self, plan: AttentionPlan) -> None:
        for name, value in plan.capacities.items():
            if value is not None:
                scalars.as_int(value, name, minimum=1)
        scalars.as_bool(plan.batch_invariant, "batch_invariant")
        self._plan = plan
        self._in_use = threading.Lock()  # held by the call that a thread is in

    def _is_in_use(self, call: str) -> RuntimeError:
        return RuntimeError(
            f"{call}() was called while another call of this plan is under way in another thread, and a plan serves "
            f"one thread at a time; make a plan for each thread, or put a lock around its calls"
        )

    def run(
        self,
        q: Array,
        kv: PagedKV,
        *,
        sinks: Array | None = None,
        out: Array | None = None,
        lse: Array | None = None,
        return_lse: bool = False,
    ) -> Any:
        """Attend over one layer by the last plan: out, or (out, lse) with return_lse.

        With `out` (and `lse`, where it is wanted) nothing is allocated. RuntimeError before the first plan.

        Parameters
        ----------
        q: as many rows as the plan's batch (for prefill, qo_indptr[-1]) or as its capacity max_batch_size (for prefill,
            max_tokens); rows past the batch become out = 0, lse = -inf.
        kv: PagedKV, any layer like the one planned with.
        sinks: float32 [num_qo_heads], natural log: exp(sinks[h]) joins every denominator of head h. Default None: none.
        out: array to write and return, q's shape with v_head_dim, q's dtype or float32. Default None: a new one.
        lse: float32 array to write, q's shape without head_dim. Default None: a new one where return_lse asks for it.
        return_lse: bool, whether to return (out, lse). Default False.

        What decode says of its results holds here.
        """
        if not self._in_use.acquire(False):
            raise self._is_in_use("run")
        try:
            plan = self._plan
            if plan.step is None:
                raise RuntimeError("run() was called before plan(); call plan(kv, table, ...) once a step, then run()")
            given = RunArrays(q, out, lse, sinks)
            arrays, loan = borrow(given)
            if type(kv) is not PagedKV:
                pools.check_kv(kv, "run(q, kv)")
            signature, addresses = plan.check_run(plan.step, arrays, kv)
            if out is None or return_lse:
                arrays = with_results(arrays, addresses, plan.step.spec, return_lse)
            if arrays.q.size:
                plan.launch(arrays, kv, addresses, signature, loan)
            return out if out is not None and not return_lse else _results(given, arrays, return_lse)
        finally:
            self._in_use.release()

    def status(self) -> None:
        """Raise the PageTableError that a kernel recorded since the last plan, if one did.

        On whatever stream the plan ran: this waits for all work of the device.
        """
        if self._plan.backend_plan is not None:
            self._plan.backend_plan.raise_status()

    def __repr__(self) -> str:
        capacities = "".join(f"{name}={size}, " for name, size in self._plan.capacities.items() if size is not None)
        step = "not planned" if self._plan.step is None else str(self._plan.step.spec)
        return f"{type(self).__name__}({capacities}batch_invariant={self._plan.batch_invariant}): {step}"


class BatchDecodeWithPagedKVCache(_BatchAttention):
    """Decode for many layers and steps: plan() once a step, run() once a layer.

    A plan serves one stream and one thread at a time (a call while another thread is in one is a RuntimeError); two
    plans share nothing. A graph that captured plan() or run() keeps the buffers that they read, also when the plan is
    gone; q, pools, tables, sinks, out and lse are the caller's to keep for as long as it is replayed.

    Parameters
    ----------
    max_batch_size: int, the most requests of a step. Default None: any number.
    max_pages: int, the most pages of all requests of a step together. With both, the plan's buffers never move and CUDA
        graphs may capture plan() and run(). Default None: any number, and the buffers grow by doubling.
    batch_invariant: bool, whether a request's result is bitwise the same alone or in any batch. Default False.
    """

    def __init__(
        self, *, max_batch_size: int | None = None, max_pages: int | None = None, batch_invariant: bool = False
    ) -> None:
        super().__init__(
            AttentionPlan(max_batch_size=max_batch_size, max_pages=max_pages, batch_invariant=batch_invariant)
        )

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
        """Copy a step's table. PageTableError where it exceeds a capacity; the step before then stays.

        Parameters
        ----------
        kv: PagedKV, any layer; it gives layout, heads, dims, dtype and device.
        table: PageTable, on kv's device or of NumPy arrays, whose values are checked.
        num_qo_heads: int, a multiple of the KV heads.
        q_len: int, causal queries a request. Default 1.
        sm_scale: float, the factor of the products <q, k>. Default None: 1 / sqrt(head_dim).
        window_left: int, how many keys left of its position a query sees, beside its own. Default -1: all.
        logits_soft_cap: float c: scores become c * tanh(score / c), after sm_scale. Default 0.0: off.
        """
        pools.check_operands(kv, table, "plan(kv, table, num_qo_heads)")
        if not self._in_use.acquire(False):
            raise self._is_in_use("plan")
        try:
            scoring = Scoring(sm_scale, True, window_left, logits_soft_cap)
            self._plan.update(*self._plan.check_decode(kv, table, num_qo_heads, q_len, scoring))
        finally:
            self._in_use.release()


class BatchPrefillWithPagedKVCache(_BatchAttention):
    """Ragged prefill for many layers and steps: plan() once a step, run() once a layer.

    What BatchDecodeWithPagedKVCache says of streams, threads and graphs holds here, too.

    Parameters
    ----------
    max_batch_size: int, the most requests of a step. Default None: any number.
    max_pages: int, the most pages of all requests of a step together. With both, the plan's buffers never move and CUDA
        graphs may capture plan() and run(). Default None: any number, and the buffers grow by doubling.
    max_tokens: int, the most rows of q in a step. Default None: any number.
    batch_invariant: bool, whether a request's result is bitwise the same alone or in any batch. Default False.
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
            AttentionPlan(
                max_batch_size=max_batch_size,
                max_pages=max_pages,
                max_tokens=max_tokens,
                batch_invariant=batch_invariant,
            )
        )

    def plan(
        self,
        kv: PagedKV,
        table: PageTable,
        qo_indptr: Array,
        num_qo_heads: int,
        *,
        causal: bool = True,
        sm_scale: float | None = None,
        window_left: int = -1,
        logits_soft_cap: float = 0.0,
    ) -> None:
        """Copy a step's table. PageTableError where it exceeds a capacity; the step before then stays.

        Parameters
        ----------
        kv: PagedKV, any layer; it gives layout, heads, dims, dtype and device.
        table: PageTable, on kv's device or of NumPy arrays, whose values are checked.
        qo_indptr: int32 [batch + 1], NumPy or on kv's device; request i has rows qo_indptr[i] to qo_indptr[i+1] of q.
        num_qo_heads: int, a multiple of the KV heads.
        causal: bool, whether a query sees no later position; query i of n is at total_len - n + i. Default True.
        sm_scale: float, the factor of the products <q, k>. Default None: 1 / sqrt(head_dim).
        window_left: int, how many keys left of its position a query sees, beside its own. Default -1: all.
        logits_soft_cap: float c: scores become c * tanh(score / c), after sm_scale. Default 0.0: off.
        """
        pools.check_operands(kv, table, "plan(kv, table, qo_indptr, num_qo_heads)")
        if not self._in_use.acquire(False):
            raise self._is_in_use("plan")
        try:
            scoring = Scoring(sm_scale, causal, window_left, logits_soft_cap)
            self._plan.update(*self._plan.check_prefill(kv, table, qo_indptr, num_qo_heads, scoring))
        finally:
            self._in_use.release()


# --------------------------------------------------------------------------------------------------------------------


def status(device: Any = None) -> None:
    """Raise the first fault that `append` and the one-shot functions recorded on a device, once: a PageTableError.

    This synchronises. Plans have a status of their own.

    Parameters
    ----------
    device: "cpu", "cuda", "cuda:1", ... Default None: the current CUDA device where there is one, else the CPU.
    """
    resolved = resolve_device(device)
    backends.of(resolved).raise_device_status(resolved)
