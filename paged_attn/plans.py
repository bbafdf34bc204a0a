"""A plan and a run: how every attention call is checked, planned by a backend, and launched.

    check_decode, check_prefill    what a step computes, from its pool, table and options     -> Step
    check_run                      the arrays of a run                                        -> signature, addresses
    update                         a backend's plan takes over the step's metadata
    launch                         attention over one layer

The Batch... classes keep an AttentionPlan: the first and update once a step, the others once a layer. A one-shot call
does all of it, with a plan that the last such call left (attend_once).
"""

import threading
from typing import Any, NamedTuple

import numpy as np

from . import backends
from .checks import calls, overlaps, tables
from .checks.arrays import signatures_of
from .holders import KVPages, TableArrays
from .interop import FLOAT32, Array, address_of, current_stream, native, native_types
from .lifetimes import Loan, loan_of, used
from .spec import RUN_ARRAYS, AttentionSpec, RunArrays, Scoring
from .support import check_supported

MOST_KEPT = 16  # plans of one-shot calls that a thread keeps

Rows = tuple[int, ...] | range  # the extents that axis 0 of q may have


class Step(NamedTuple):
    """What runs need to know of the step that was planned last."""

    spec: AttentionSpec
    rows: Rows
    is_split: bool  # the table's rows are chunks of requests


# A step, and what a plan copies of it: the table, qo_indptr (None: decode), and the loan of that.
Planned = tuple[Step, TableArrays, Any, Loan | None]


class AttentionPlan:
    """A backend's plan, and what was last found right: a call like the one before skips the checks.

    remedy: what a caller can do about a q of another shape.
    """

    def __init__(
        self,
        *,
        max_batch_size: int | None = None,
        max_pages: int | None = None,
        max_tokens: int | None = None,
        batch_invariant: bool = False,
        one_shot: bool = False,
        remedy: str = "plan anew for it",
    ) -> None:
        self.capacities = {"max_batch_size": max_batch_size, "max_pages": max_pages, "max_tokens": max_tokens}
        self.batch_invariant = batch_invariant
        self.step: Step | None = None  # of the last update
        self.backend_plan: Any = None  # made by the first update
        self._one_shot, self._remedy = one_shot, remedy
        self._made_from: tuple[Any, ...] | None = None  # what the spec was made from
        self._spec: AttentionSpec
        self._qo_indptr: tuple[Any, ...] | None = None  # the signature of the last qo_indptr on a device
        self._signature: tuple[Any, ...] | None = None  # of the last run
        self._compared: overlaps.Compared = ()  # its arrays that must not overlap

    def check_decode(self, kv: KVPages, table: TableArrays, num_qo_heads: int, q_len: int, scoring: Scoring) -> Planned:
        """A step of decode. q_len: queries a request."""
        spec = self._check_spec(kv, table, num_qo_heads, scoring, q_len)
        capacity = self.capacities["max_batch_size"]
        rows = (table.batch_size,) if capacity is None else (table.batch_size, capacity)
        return self._step_of(spec, rows, table), table, None, None

    def check_prefill(
        self,
        kv: KVPages,
        table: TableArrays,
        qo_indptr: Array,
        num_qo_heads: int,
        scoring: Scoring,
        total_rows: int | None = None,
    ) -> Planned:
        """A step of prefill. total_rows: the rows of q where they are known, at which a host's qo_indptr ends."""
        spec = self._check_spec(kv, table, num_qo_heads, scoring, None)
        indptr, capacity = native(qo_indptr, "qo_indptr"), self.capacities["max_tokens"]
        if isinstance(indptr, np.ndarray):
            calls.check_qo_indptr(indptr, table.batch_size, total_rows)
            rows = (int(indptr[-1]),) if capacity is None else (int(indptr[-1]), capacity)
            return self._step_of(spec, rows, table), table, indptr, None
        signature = signatures_of((indptr,))[0], table.batch_size, spec.device
        if signature != self._qo_indptr:
            calls.check_qo_indptr(indptr, table.batch_size, total_rows, spec.device)
            self._qo_indptr = signature
        any_rows = range(2**31 if capacity is None else capacity + 1)  # only the device knows how many rows q has
        return self._step_of(spec, any_rows, table), table, indptr, loan_of((indptr, qo_indptr))

    def _step_of(self, spec: AttentionSpec, rows: Rows, table: TableArrays) -> Step:
        """The step; the same object as before where it is equal, which is quick to compare."""
        step = spec, rows, table.is_split
        return self.step if self.step == step else Step(*step)

    def _check_spec(
        self, kv: KVPages, table: TableArrays, num_qo_heads: int, scoring: Scoring, q_len: int | None
    ) -> AttentionSpec:
        made_from = spec_key(kv, table, num_qo_heads, scoring, q_len)
        if made_from != self._made_from:
            self._made_from, self._spec = None, calls.attention_spec(kv, table, num_qo_heads, scoring, q_len)
            op, spec = "prefill" if q_len is None else "decode", self._spec
            check_supported(op, spec.device, spec.dtype, spec.head_dim, spec.v_head_dim)
            if not any(hasattr(number, "__dlpack__") for number in (num_qo_heads, q_len, *scoring)):  # they can change
                self._made_from = made_from
        tables.check_table_values(table, self._spec.num_pages)
        return self._spec

    def check_run(self, step: Step, arrays: RunArrays, kv: KVPages) -> tuple[tuple[Any, ...], list[int]]:
        """Check a run; what its signature decides only where it is not that of the run before.

        Returns the signature and the addresses of RUN_NAMES, 0 on the host and for what is not given.
        """
        signatures, addresses = signatures_of(arrays)
        signature = kv.signature, signatures, step
        addresses[:0] = kv.k_address, kv.v_address
        if signature != self._signature:
            self._signature = None
            calls.check_layer(step.spec, kv)
            calls.check_arrays(step.spec, arrays, step.rows, self._remedy)
            calls.check_once(arrays, step.is_split)
            self._compared = overlaps.compared((kv.k_pages, kv.v_pages, *arrays), RUN_PAIRS)
            self._signature = signature
        if self._compared and (not kv.k_address or overlaps.may_overlap(addresses, self._compared)):
            overlaps.check_pairs((kv.k_pages, kv.v_pages, *arrays), RUN_NAMES, self._compared)
        return self._signature, addresses  # the same object while nothing differs, which is quick to compare

    def update(self, step: Step, table: TableArrays, qo_indptr: Any, loan: Loan | None) -> None:
        """Have the backend's plan take over a step. Where that raises, the step before stays."""
        spec = step.spec
        tables.check_capacities(table, qo_indptr, spec.q_len, **self.capacities)
        plan = self.backend_plan
        if self.step is None or self.step.spec.device != spec.device:
            plan = backends.of(spec.device).Plan(
                spec.device, **self.capacities, batch_invariant=self.batch_invariant, one_shot=self._one_shot
            )
        try:
            plan.update(spec, table, qo_indptr)
        finally:
            if loan is not None or table.loan is not None:
                used(loan, table.loan)
        self.backend_plan, self.step = plan, step

    def launch(self, arrays: RunArrays, kv: KVPages, addresses: list[int], signature: Any, loan: Loan | None) -> None:
        """Attend by the step of the last update. loan: what was lent of the arrays."""
        assert self.step is not None
        if arrays.q.ndim == 4:
            arrays = arrays.with_rows(_as_rows)
        try:
            self.backend_plan.run(self.step.spec, arrays, kv, addresses, signature)
        finally:
            if loan is not None or kv.loan is not None:
                used(loan, kv.loan)


RUN_NAMES = ("kv.k_pages", "kv.v_pages", *RUN_ARRAYS)
_WRITTEN = [i for i, array in enumerate(RUN_ARRAYS.values(), start=2) if array.is_written]
RUN_PAIRS = [(i, j) for i in _WRITTEN for j in range(len(RUN_NAMES)) if j > i or j not in _WRITTEN]


def _as_rows(array: Any) -> Any:
    """[batch, q_len, ...] as [batch * q_len, ...]."""
    return array.reshape(-1, *array.shape[2:])


def spec_key(
    kv: KVPages, table: TableArrays, num_qo_heads: int, scoring: Scoring, q_len: int | None
) -> tuple[Any, ...]:
    """What a spec is made from. Types come first: 8.0 == 8, but is no count, and arrays are not to be compared."""
    numbers = (num_qo_heads, q_len, *scoring)
    return kv.signature, table.page_size, table.device, *map(type, numbers), numbers


def with_results(arrays: RunArrays, addresses: list[int], spec: AttentionSpec, return_lse: bool) -> RunArrays:
    """The arrays with new ones for the results that were not given, lse only where it is asked for. Their addresses are
    written to `addresses` (of RUN_NAMES)."""
    empty, (q, out, lse, *others) = backends.of(spec.device).empty, arrays
    if out is None:
        out = empty(spec.out_shape(q.shape), spec.dtype, spec.device)
    if lse is None and return_lse:
        lse = empty(q.shape[:-1], FLOAT32, spec.device)
    addresses[3:5] = address_of(out), address_of(lse)
    return RunArrays(q, out, lse, *others)


def borrow(given: RunArrays) -> tuple[RunArrays, Loan | None]:
    """The arrays that a caller gave as NumPy or CuPy arrays, each taken once, and what is lent of them."""
    if given.q is not None and native_types.issuperset(map(type, given)):  # the usual ones: every layer waits for this
        return given, None
    arrays = RunArrays(
        *[
            array if array is None and name != "q" else native(array, name, rule.dtypes[0], writable=rule.is_written)
            for array, (name, rule) in zip(given, RUN_ARRAYS.items(), strict=True)
        ]
    )
    return arrays, loan_of(*zip(arrays, given, strict=True))


# --------------------------------------------------------------------------------------------------------------------
# One-shot calls


class _Kept(threading.local):
    """The plans that one-shot calls of this thread left, the latest last; with each its stream, held so that no other
    gets its address, and what it is a plan of."""

    def __init__(self) -> None:
        self.plans: dict[tuple[Any, ...], tuple[AttentionPlan, Any, Any]] = {}


_kept = _Kept()


def attend_once(
    arrays: RunArrays,
    kv: KVPages,
    table: TableArrays,
    scoring: Scoring,
    loan: Loan | None,
    return_lse: bool,
    *,
    q_len: int | None = None,
    qo_indptr: Any = None,
) -> RunArrays:
    """Plan and run once: decode by q_len, or prefill by qo_indptr. Returns the arrays with results.

    The plan is one that a call like this one left behind: of this thread, on this stream, with buffers of this size.
    It is taken out meanwhile, so that a call from a finaliser gets another. What raises loses it. Where the host's
    metadata is what it was, as in the next layer of a step, nothing is to be planned.
    """
    shape = arrays.q.shape
    # A device's qo_indptr must not point behind q, which that plan's capacity is for.
    max_tokens = None if q_len is not None or isinstance(qo_indptr, np.ndarray) else shape[0]
    stream, stream_address = current_stream(kv.device)
    size = table.batch_size, table.indices.shape[0].bit_length(), table.page_stride, table.is_split, max_tokens
    key = (stream_address, size, *spec_key(kv, table, shape[-2], scoring, q_len))
    try:
        plan, _, planned_of = _kept.plans.pop(key, (None, None, None))
    except TypeError:  # an option is an array, which the checks know
        key, plan, planned_of = (), None, None
    metadata = _host_metadata(table, qo_indptr, shape[0])
    if plan is None:
        remedy = "pass a qo_indptr that ends there" if q_len is None else "pass a table of that batch"
        plan = AttentionPlan(max_tokens=max_tokens, one_shot=True, remedy=remedy)
    planned = None
    if not metadata or metadata != planned_of:
        if q_len is None:
            planned = plan.check_prefill(kv, table, qo_indptr, shape[-2], scoring, shape[0])
        else:
            planned = plan.check_decode(kv, table, shape[-2], q_len, scoring)
    step = planned[0] if planned else plan.step
    assert step is not None
    signature, addresses = plan.check_run(step, arrays, kv)
    arrays = with_results(arrays, addresses, step.spec, return_lse)
    if arrays.q.size:
        if planned:
            plan.update(*planned)
        plan.launch(arrays, kv, addresses, signature, loan)
        if key:
            _kept.plans[key] = plan, stream, metadata
            if len(_kept.plans) > MOST_KEPT:
                del _kept.plans[next(iter(_kept.plans))]
    return arrays


def _host_metadata(table: TableArrays, qo_indptr: Any, num_rows: int) -> tuple[Any, ...]:
    """What a plan copies of a table and qo_indptr, and the rows of q; () where some of it is on a device."""
    arrays = table.indptr, table.indices, table.last_page_len, table.page_offset, table.total_len, qo_indptr
    if table.device != "cpu" or not isinstance(qo_indptr, np.ndarray | None):
        return ()
    return num_rows, *[None if array is None else (array.shape, array.dtype, array.tobytes()) for array in arrays]
