"""Attention over K and V that are spread over ranks: decode, prefill, and plans for many layers.

Page j of a sequence belongs to rank (j + first) % num_ranks, where `first` is the sequence's: each rank's table has the
pages of that rank, with page_offset, page_stride = num_ranks and total_len (PagedKVCache(rank=, num_ranks=) makes such
tables). Every rank has all queries, attends to its keys, and gets the merged results of all ranks, or, with
shard="heads", its equal part of the heads.

What a rank sends to all others together, n ranks, a layer of a step, each number rounded up to 16 bytes:

    all-gather             (n - 1) * rows * heads * (v_head_dim * bytes of partial_dtype + 4)
    all-to-all by heads    1 / n of that; and, where every rank is to have all heads, as much of out and lse behind it

A plan says which way its communicator chose (`way`) and how many bytes a step of its capacity sends (`bytes_a_step`).

A process with one rank gives and gets plain arrays. One with several (LocalRanks, or several GPUs of one process)
gives q, kv, table, qo_indptr, sinks, out and lse as lists, one entry for each of its ranks in rank order, and gets
lists. All ranks make the same calls in the same order, with the same queries, options and sinks, and an out of the same
dtype: what run() is given is not compared.

What the ranks must plan alike is compared by plan(): layout, page_size, heads, dims, dtype, options and capacities each
time they change, and the lengths, where tables are on the host, every time. Where they differ, or where a rank cannot
plan, every rank raises ValueError (LayoutMismatchError for what a pool is like), which says which rank said what, and
has to plan again. Lengths of tables on devices are compared there, in graphs, too, and status() raises the ValueError.
TimeoutError is raised where a rank does not come within the communicator's timeout: by plan(), status() and close(),
and by run() where the exchange is on the host.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Self

import numpy as np

from .. import attention, backends, lifetimes
from ..checks import calls, overlaps, pools
from ..checks.arrays import check_whole
from ..interop import FLOAT32, Array, any_dtype, current_stream, native, on_device_of, to_caller
from ..lifetimes import reading
from ..page_table import PageTable
from ..paged_kv import PagedKV
from ..plans import Step, borrow
from ..spec import RUN_ARRAYS, AttentionSpec, RunArrays
from .agreement import SEPARATOR, check_agreement, failure, lengths_statement, static_statement
from .ranks import Merge, MergeShape, Ranks

Arrays = Array | Sequence[Array]  # one, or one for each rank of this process

_ANY_ROWS = 2**31 - 1  # of a step whose qo_indptr only the device knows, in a plan without max_tokens


def decode(
    comm: Ranks,
    q: Arrays,
    kv: PagedKV | Sequence[PagedKV],
    table: PageTable | Sequence[PageTable],
    *,
    shard: str | None = None,
    partial_dtype: Any = "float32",
    sm_scale: float | None = None,
    window_left: int = -1,
    logits_soft_cap: float = 0.0,
    sinks: Arrays | None = None,
    out: Arrays | None = None,
    lse: Arrays | None = None,
    return_lse: bool = False,
) -> Any:
    """paged_attn.decode over K and V of all ranks: a plan and a run of BatchDecodeWithPagedKVCache.

    Parameters
    ----------
    comm: LocalRanks, MpiRanks, NcclRanks, ...; every rank makes this call.
    q: [batch, num_qo_heads, head_dim], or [batch, q_len, num_qo_heads, head_dim] for q_len causal queries a request:
        all queries, on every rank.
    kv: PagedKV, one layer's pool of this rank.
    table: PageTable of this rank's pages, with page_offset, page_stride and total_len.
    shard: None, all heads of out on every rank, or "heads", where rank r gets the r-th of num_ranks equal parts of the
        heads. Default None.
    partial_dtype: dtype in which partial results travel, float32 or that of q, whose cost BatchDecodeWithPagedKVCache
        states. Default "float32".
    sm_scale: float, the factor of the products <q, k>. Default None: 1 / sqrt(head_dim).
    window_left: int, how many keys left of its position a query sees, beside its own. Default -1: all.
    logits_soft_cap: float c: scores become c * tanh(score / c), after sm_scale. Default 0.0: off.
    sinks: float32 [num_qo_heads], natural log: exp(sinks[h]) joins every denominator of head h. Default None: none.
    out: array to write and return, q's shape with v_head_dim (and with shard="heads" this rank's heads), q's dtype or
        float32. Default None: a new one.
    lse: float32 array to write, out's shape without v_head_dim. Default None: a new one where return_lse asks for it.
    return_lse: bool, whether to return (out, lse). Default False.

    What a kernel finds wrong with a table is raised by comm.status().
    """
    plan = _checked(comm).kept(
        ("decode", str(shard), str(partial_dtype)),
        lambda: BatchDecodeWithPagedKVCache(comm, shard=shard, partial_dtype=partial_dtype),
    )
    shape = _shape_of(_each(comm, q, "q")[0], (3, 4), "[batch, (q_len,) num_qo_heads, head_dim]")
    options: dict[str, Any] = {
        "sm_scale": sm_scale, "window_left": window_left, "logits_soft_cap": logits_soft_cap,
    }  # fmt: skip
    plan.plan(kv, table, shape[-2], q_len=shape[1] if len(shape) == 4 else 1, **options)
    return plan.run(q, kv, sinks=sinks, out=out, lse=lse, return_lse=return_lse)


def prefill(
    comm: Ranks,
    q: Arrays,
    qo_indptr: Arrays,
    kv: PagedKV | Sequence[PagedKV],
    table: PageTable | Sequence[PageTable],
    *,
    shard: str | None = None,
    partial_dtype: Any = "float32",
    causal: bool = True,
    sm_scale: float | None = None,
    window_left: int = -1,
    logits_soft_cap: float = 0.0,
    sinks: Arrays | None = None,
    out: Arrays | None = None,
    lse: Arrays | None = None,
    return_lse: bool = False,
) -> Any:
    """paged_attn.prefill over K and V of all ranks: a plan and a run of BatchPrefillWithPagedKVCache.

    Parameters
    ----------
    comm: LocalRanks, MpiRanks, NcclRanks, ...; every rank makes this call.
    q: [qo_indptr[-1], num_qo_heads, head_dim], the rows of all requests, on every rank.
    qo_indptr: int32 [batch + 1], NumPy or on kv's device; request i has rows qo_indptr[i] to qo_indptr[i+1] of q.
    kv: PagedKV, one layer's pool of this rank.
    table: PageTable of this rank's pages, with page_offset, page_stride and total_len.
    shard: None, all heads of out on every rank, or "heads", where rank r gets the r-th of num_ranks equal parts of the
        heads. Default None.
    partial_dtype: dtype in which partial results travel, float32 or that of q, whose cost BatchDecodeWithPagedKVCache
        states. Default "float32".
    causal: bool, whether a query sees no later position; query i of n is at total_len - n + i. Default True.
    sm_scale: float, the factor of the products <q, k>. Default None: 1 / sqrt(head_dim).
    window_left: int, how many keys left of its position a query sees, beside its own. Default -1: all.
    logits_soft_cap: float c: scores become c * tanh(score / c), after sm_scale. Default 0.0: off.
    sinks: float32 [num_qo_heads], natural log: exp(sinks[h]) joins every denominator of head h. Default None: none.
    out: array to write and return, q's shape with v_head_dim (and with shard="heads" this rank's heads), q's dtype or
        float32. Default None: a new one.
    lse: float32 array to write, out's shape without v_head_dim. Default None: a new one where return_lse asks for it.
    return_lse: bool, whether to return (out, lse). Default False.

    What a kernel finds wrong with a table is raised by comm.status().
    """
    plan = _checked(comm).kept(
        ("prefill", str(shard), str(partial_dtype)),
        lambda: BatchPrefillWithPagedKVCache(comm, shard=shard, partial_dtype=partial_dtype),
    )
    shape = _shape_of(_each(comm, q, "q")[0], (3,), "[rows, num_qo_heads, head_dim]")
    options: dict[str, Any] = {
        "sm_scale": sm_scale, "window_left": window_left, "logits_soft_cap": logits_soft_cap,
    }  # fmt: skip
    plan.plan(kv, table, qo_indptr, shape[-2], causal=causal, **options)
    return plan.run(q, kv, sinks=sinks, out=out, lse=lse, return_lse=return_lse)


class _BatchAttention:
    """What the two classes share: a plan of each rank of this process, and the merges of their results."""

    def __init__(
        self,
        comm: Ranks,
        make_plan: Callable[..., Any],
        capacities: dict[str, int | None],
        batch_invariant: bool,
        shard: str | None,
        partial_dtype: Any,
    ) -> None:
        if shard is not None and shard != "heads":
            raise ValueError(f"shard is {shard!r}; pass None (all heads on every rank) or 'heads' (each rank its part)")
        self._comm, self._shard, self._partial_dtype = _checked(comm), shard, any_dtype(partial_dtype, "partial_dtype")
        self._plans = [make_plan(**capacities, batch_invariant=batch_invariant) for _ in comm.ranks]
        options = {"shard": shard, "partial_dtype": self._partial_dtype.name, "batch_invariant": bool(batch_invariant)}
        self._said_of_plan: dict[str, Any] = options | {
            name: None if size is None else int(size) for name, size in capacities.items()
        }
        # By rank of this process: what it says of steps like the last one, and which those are.
        self._statements: list[tuple[Any, bytes]] = [(None, b"")] * len(comm.ranks)
        self._agreed: list[bytes] = []  # what they said that all ranks agreed on
        self._step: Step | None = None  # of the last plan, where no rank refused it
        self._is_idle: list[bool] = []  # by rank of this process: it holds no page of the step
        # By their shapes, rows left out: merges, and where each rank of this process writes an lse that nobody wants.
        self._merges: dict[MergeShape, tuple[Merge, list[Any]]] = {}
        self._latest: Merge | None = None
        self._lengths = comm.lengths() if comm.devices[0] != "cpu" else None
        self._captures: dict[str, tuple[int, int]] = {}  # by device: the last capture, and the id of what it keeps

    # -- once a step ---------------------------------------------------------------------------------------------------

    def _plan(self, kv: Any, table: Any, qo_indptr: Any, plan_one: Callable[[Any, Any, Any, Any], None]) -> None:
        """Plan on each rank of this process, and agree with all others."""
        comm = self._comm
        comm.check_usable()
        kvs, tables, indptrs = _each(comm, kv, "kv"), _each(comm, table, "table"), _each(comm, qo_indptr, "qo_indptr")
        self._step, error = None, None
        static, lengths = [], []
        for i, rank in enumerate(comm.ranks):
            try:
                self._check_operands(kvs[i], tables[i], comm.devices[i])
                plan_one(self._plans[i], kvs[i], tables[i], indptrs[i])
                step = self._plans[i]._plan.step
                like = step, tables[i].batch_size, tables[i].device
                if self._statements[i][0] != like:
                    self._check_spec(step.spec)
                    self._statements[i] = like, static_statement(step.spec, tables[i], **self._said_of_plan)
                said = self._statements[i][1]
                indptr = None if indptrs[i] is None else native(indptrs[i], "qo_indptr")
                told = lengths_statement(tables[i], indptr, rank, comm.num_ranks)
            except Exception as found:
                error = error or found
                said, told = failure(found), b""
            static.append(said)
            lengths.append(told)
        # What the host knows is compared every time; of tables on a GPU hosts say nothing while nothing else changes.
        if error is not None or static != self._agreed or any(table.device == "cpu" for table in tables):
            self._agree(static, lengths, error)
        if self._lengths is not None:
            self._lengths.update(tables)
            self._keep_with_graph(self._lengths)
        step = self._plans[0]._plan.step
        most = step.rows[-1] * (step.spec.q_len or 1)  # the capacity, where there is one
        if 0 < most < _ANY_ROWS:
            self._merge_of(step.spec, most, step.spec.dtype)
        self._is_idle = [x.device == "cpu" and x.indptr[0] == x.indptr[-1] for x in tables]
        self._step = step

    def _check_operands(self, kv: Any, table: Any, device: str) -> None:
        pools.check_operands(kv, table, "plan(kv, table, ...)")
        if kv.device != device:
            raise TypeError(f"kv lives on {kv.device}, and its rank on {device} ({self._comm!r}); make the pool there")
        num_ranks = self._comm.num_ranks
        if num_ranks > 1 and (table.page_stride != num_ranks or table.page_offset is None or table.total_len is None):
            raise ValueError(
                f"table has page_stride={table.page_stride}, and the pages of a sequence go to {num_ranks} ranks in "
                f"turn; pass a table with page_stride={num_ranks}, page_offset and total_len, as "
                f"PagedKVCache(rank=, num_ranks={num_ranks}) makes it"
            )

    def _check_spec(self, spec: AttentionSpec) -> None:
        num_ranks = self._comm.num_ranks
        if self._shard is not None and spec.num_qo_heads % num_ranks:
            raise ValueError(
                f"num_qo_heads={spec.num_qo_heads} is not a multiple of the {num_ranks} ranks, and shard='heads' gives "
                f"each an equal part; pass shard=None"
            )
        if self._partial_dtype not in (FLOAT32, spec.dtype):
            raise TypeError(
                f"partial_dtype is {self._partial_dtype}, and it must be float32 or the dtype of kv, {spec.dtype}; "
                f"make the plan with one of them"
            )

    def _agree(self, static: list[bytes], lengths: list[bytes], error: Exception | None) -> None:
        """Compare with all ranks. error: that of a rank of this process, which goes before all others' words."""
        self._agreed = []
        try:
            statements = self._comm.all_gather_bytes([x + SEPARATOR + y for x, y in zip(static, lengths, strict=True)])
        except TimeoutError:
            if error is None:
                raise
        if error is not None:
            raise error
        check_agreement(statements)
        self._agreed = static

    def _merge_of(self, spec: AttentionSpec, rows: int, out_dtype: np.dtype) -> tuple[Merge, list[Any]]:
        """The merge for steps of up to `rows` rows. Where it has to grow, it does so by doubling."""
        key = MergeShape(0, spec.num_qo_heads, spec.v_head_dim, self._partial_dtype, out_dtype, self._shard)
        merge, lses = self._merges.get(key, (None, []))
        if merge is None or merge.shape.rows < rows:
            most = rows if merge is None else max(rows, 2 * merge.shape.rows)
            merge = self._comm.prepare(replace(key, rows=most))
            shape = most, self._heads(spec)
            lses = [backends.of(device).empty(shape, FLOAT32, device) for device in self._comm.devices]
            self._merges[key] = merge, lses
        self._latest = merge
        return merge, lses

    def _heads(self, spec: AttentionSpec) -> int:
        """Heads that a rank gets."""
        return spec.num_qo_heads if self._shard is None else spec.num_qo_heads // self._comm.num_ranks

    # -- once a layer --------------------------------------------------------------------------------------------------

    def run(
        self,
        q: Arrays,
        kv: PagedKV | Sequence[PagedKV],
        *,
        sinks: Arrays | None = None,
        out: Arrays | None = None,
        lse: Arrays | None = None,
        return_lse: bool = False,
    ) -> Any:
        """Attend over one layer of all ranks by the last plan: out, or (out, lse) with return_lse.

        Parameters
        ----------
        q: as paged_attn's plans take it, the same on every rank; rows past the batch become out = 0, lse = -inf, or the
            sink where there are sinks.
        kv: PagedKV, any layer of this rank's like the one planned with.
        sinks: float32 [num_qo_heads], natural log: exp(sinks[h]) joins every denominator of head h. Default None: none.
        out: array to write and return, q's shape with v_head_dim (and with shard="heads" this rank's heads), q's dtype
            or float32. Default None: a new one.
        lse: float32 array to write, out's shape without v_head_dim. Default None: a new one where return_lse asks for
            it.
        return_lse: bool, whether to return (out, lse). Default False.
        """
        comm = self._comm
        if self._step is None:
            raise RuntimeError(
                "run() was called before plan(), or behind one that raised; call plan(kv, table, ...) once a step, on "
                "every rank, then run()"
            )
        lists = (_each(comm, x, name) for x, name in zip(RunArrays(q, out, lse, sinks), RUN_ARRAYS, strict=True))
        given = [RunArrays(*row) for row in zip(*lists, strict=True)]
        kvs = _each(comm, kv, "kv")
        borrowed = [borrow(row) for row in given]
        try:
            with reading(*(loan for _, loan in borrowed)):
                arrays = [self._with_results(i, row, kvs[i], return_lse) for i, (row, _) in enumerate(borrowed)]
                if arrays[0].q.size:
                    self._attend(arrays, kvs)
        except Exception:
            if len(comm.ranks) < comm.num_ranks:  # the others wait in this layer's exchange: the next must not meet it
                self._step = None
            raise
        outs, lses = (
            [to_caller(getattr(x, name), mine.q) if getattr(mine, name) is None else getattr(mine, name)
             for x, mine in zip(arrays, given, strict=True)]
            for name in ("out", "lse")
        )  # fmt: skip
        results = (outs, lses) if len(outs) > 1 else (outs[0], lses[0])
        return results if return_lse else results[0]

    def _with_results(self, i: int, arrays: RunArrays, kv: Any, return_lse: bool) -> RunArrays:
        """The checked arrays of local rank i, with new ones for results that are wanted and were not given."""
        q, out, lse, *_ = arrays
        step, device = self._plans[i]._plan.step, self._comm.devices[i]
        pools.check_kv(kv, "run(q, kv)")
        calls.check_layer(step.spec, kv)
        calls.check_arrays(step.spec, arrays._replace(out=None, lse=None), step.rows)
        shape, make = (*q.shape[:-2], self._heads(step.spec), step.spec.v_head_dim), backends.of(device).empty
        why = "as q gives it" if self._shard is None else f"as q and shard={self._shard!r} give it"
        if out is not None:
            check_whole(out, "out", shape, why, (step.spec.dtype, FLOAT32), device, "q")
        if lse is not None:
            check_whole(lse, "lse", shape[:-1], "as out without its last axis", (FLOAT32,), device, "q")
        read = [(x, name) for x, (name, rule) in zip(arrays, RUN_ARRAYS.items(), strict=True) if not rule.is_written]
        read += [(kv.k_pages, "kv.k_pages"), (kv.v_pages, "kv.v_pages")]
        overlaps.check_apart([(out, "out"), (lse, "lse")], read)
        out = make(shape, step.spec.dtype, device) if out is None else out
        lse = make(shape[:-1], FLOAT32, device) if lse is None and return_lse else lse
        return arrays._replace(out=out, lse=lse)

    def _attend(self, arrays: list[RunArrays], kvs: list[PagedKV]) -> None:
        """Attend on each rank of this process, and merge with all others."""
        shape, dtype = arrays[0].q.shape, arrays[0].out.dtype
        for x in arrays:
            if x.q.shape != shape or x.out.dtype != dtype:
                raise ValueError(
                    f"q and out must be alike on all ranks, got q.shape={x.q.shape} and {shape}, out of {x.out.dtype} "
                    f"and {dtype}; pass the same queries to every rank"
                )
        rows = math.prod(shape[:-2])
        merge, unwanted = self._merge_of(self._plans[0]._plan.step.spec, rows, dtype)
        states = merge.states(rows)
        for plan, is_idle, x, kv, (v, s) in zip(self._plans, self._is_idle, arrays, kvs, states, strict=True):
            if is_idle:
                with on_device_of(s):
                    s.fill(-np.inf)
            else:
                scored_by = x.scored_by(is_once=False)
                plan.run(x.q, kv, out=v.reshape(*shape[:-1], -1), lse=s.reshape(shape[:-1]), **scored_by)
        outs = [x.out.reshape(rows, *x.out.shape[-2:]) for x in arrays]
        lses = [
            spare[:rows] if x.lse is None else x.lse.reshape(spare[:rows].shape)
            for x, spare in zip(arrays, unwanted, strict=True)
        ]
        checksums = [None] * len(arrays) if self._lengths is None else self._lengths.checksums
        merge(states, outs, lses, [x.sinks for x in arrays], checksums)
        self._keep_with_graph(merge, unwanted)

    def _keep_with_graph(self, *used: Any) -> None:
        """A graph that captured a step uses these buffers at every replay, also when this plan is gone."""
        for device in self._comm.devices:
            _, stream = current_stream(device)
            if device != "cpu" and sys.modules["cupy"].cuda.runtime.streamIsCapturing(stream):
                capture = lifetimes.capture_id(stream), id(used[0])
                if self._captures.get(device) != capture:
                    lifetimes.keep_with_graph(stream, used)
                    self._captures[device] = capture

    # -- what became of it ---------------------------------------------------------------------------------------------

    @property
    def way(self) -> str | None:
        """How the states of the last step travel, as the communicator chose by their size; None before a plan."""
        return None if self._latest is None else self._latest.way

    @property
    def bytes_a_step(self) -> int | None:
        """What a rank sends to all n - 1 others together in a layer of a step as large as the plan has room for:
        (n - 1) * rows * heads * (v_head_dim * bytes of partial_dtype + 4) by all-gather, 1 / n of it by heads, and then
        as much in out's dtype if every rank is to have all heads; v and lse are rounded up to 16 bytes each."""
        return None if self._latest is None else self._latest.bytes_a_step

    def status(self) -> None:
        """Raise what went wrong since the last plan: TimeoutError, ValueError where ranks disagree, PageTableError.

        This waits for all work of the device, and for a rank that does not come as long as the communicator's timeout.
        """
        for merge, _ in self._merges.values():
            merge.status()
        if self._lengths is not None:
            self._lengths.status()
        for plan in self._plans:
            plan.status()

    def close(self) -> None:
        """Give back the buffers. TimeoutError where work that is under way waits for a rank that does not come."""
        merges, self._merges, self._latest, self._step = self._merges, {}, None, None
        for merge, _ in merges.values():
            merge.status()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        said = ", ".join(f"{name}={value}" for name, value in self._said_of_plan.items() if value is not None)
        step = "not planned" if self._step is None else f"{self.way}, {self.bytes_a_step} bytes, {self._step.spec}"
        return f"{type(self).__name__}({self._comm!r}, {said}): {step}"


class BatchDecodeWithPagedKVCache(_BatchAttention):
    """Decode over K and V of all ranks for many layers and steps: plan() once a step, run() once a layer.

    What paged_attn.BatchDecodeWithPagedKVCache says of streams, threads and graphs holds here, too. A rank that holds
    no page of a step (as a table on the host says) launches no attention.

    With partial_dtype="float32" results are those of one device but for the order of float32 additions. In the model's
    dtype each partial result is rounded once more: with u = 2**-11 (float16) or 2**-8 (bfloat16) out is off by up to
    u * sum_r weight_r * |partial result of rank r|, weights that add up to 1; lse is the same.

    Parameters
    ----------
    comm: LocalRanks, MpiRanks, NcclRanks, ...
    max_batch_size: int, the most requests of a step. Default None: any number.
    max_pages: int, the most pages of all requests of a step together on one rank. With both, buffers never move and
        CUDA graphs may capture plan() and run(). Default None: any number, and the buffers grow by doubling.
    batch_invariant: bool, whether a request's result is bitwise the same alone or in any batch, for one number of
        ranks. Default False.
    shard: None, all heads of out on every rank, or "heads", where rank r gets the r-th of num_ranks equal parts of the
        heads. Default None.
    partial_dtype: dtype in which partial results travel, float32 or that of q. Default "float32".
    """

    def __init__(
        self,
        comm: Ranks,
        *,
        max_batch_size: int | None = None,
        max_pages: int | None = None,
        batch_invariant: bool = False,
        shard: str | None = None,
        partial_dtype: Any = "float32",
    ) -> None:
        capacities = {"max_batch_size": max_batch_size, "max_pages": max_pages}
        super().__init__(
            comm, attention.BatchDecodeWithPagedKVCache, capacities, batch_invariant, shard, partial_dtype
        )  # fmt: skip

    def plan(
        self,
        kv: PagedKV | Sequence[PagedKV],
        table: PageTable | Sequence[PageTable],
        num_qo_heads: int,
        *,
        q_len: int = 1,
        sm_scale: float | None = None,
        window_left: int = -1,
        logits_soft_cap: float = 0.0,
    ) -> None:
        """Copy a step's table and agree with all ranks. Behind an error every rank has to plan again.

        Parameters
        ----------
        kv: PagedKV, any layer of this rank's; it gives layout, heads, dims, dtype and device.
        table: PageTable of this rank's pages, with page_offset, page_stride and total_len.
        num_qo_heads: int, a multiple of the KV heads.
        q_len: int, causal queries a request. Default 1.
        sm_scale: float, the factor of the products <q, k>. Default None: 1 / sqrt(head_dim).
        window_left: int, how many keys left of its position a query sees, beside its own. Default -1: all.
        logits_soft_cap: float c: scores become c * tanh(score / c), after sm_scale. Default 0.0: off.
        """
        options = {"sm_scale": sm_scale, "window_left": window_left, "logits_soft_cap": logits_soft_cap}
        self._plan(
            kv, table, None, lambda plan, kv, table, _: plan.plan(kv, table, num_qo_heads, q_len=q_len, **options)
        )  # fmt: skip


class BatchPrefillWithPagedKVCache(_BatchAttention):
    """Ragged prefill over K and V of all ranks for many layers and steps: plan() once a step, run() once a layer.

    What BatchDecodeWithPagedKVCache says holds here, too.

    Parameters
    ----------
    comm: LocalRanks, MpiRanks, NcclRanks, ...
    max_batch_size: int, the most requests of a step. Default None: any number.
    max_pages: int, the most pages of all requests of a step together on one rank. With both, buffers never move and
        CUDA graphs may capture plan() and run(). Default None: any number, and the buffers grow by doubling.
    max_tokens: int, the most rows of q in a step. Default None: any number.
    batch_invariant: bool, whether a request's result is bitwise the same alone or in any batch, for one number of
        ranks. Default False.
    shard: None, all heads of out on every rank, or "heads", where rank r gets the r-th of num_ranks equal parts of the
        heads. Default None.
    partial_dtype: dtype in which partial results travel, float32 or that of q. Default "float32".
    """

    def __init__(
        self,
        comm: Ranks,
        *,
        max_batch_size: int | None = None,
        max_pages: int | None = None,
        max_tokens: int | None = None,
        batch_invariant: bool = False,
        shard: str | None = None,
        partial_dtype: Any = "float32",
    ) -> None:
        capacities = {"max_batch_size": max_batch_size, "max_pages": max_pages, "max_tokens": max_tokens}
        super().__init__(
            comm, attention.BatchPrefillWithPagedKVCache, capacities, batch_invariant, shard, partial_dtype
        )  # fmt: skip

    def plan(
        self,
        kv: PagedKV | Sequence[PagedKV],
        table: PageTable | Sequence[PageTable],
        qo_indptr: Arrays,
        num_qo_heads: int,
        *,
        causal: bool = True,
        sm_scale: float | None = None,
        window_left: int = -1,
        logits_soft_cap: float = 0.0,
    ) -> None:
        """Copy a step's table and agree with all ranks. Behind an error every rank has to plan again.

        Parameters
        ----------
        kv: PagedKV, any layer of this rank's; it gives layout, heads, dims, dtype and device.
        table: PageTable of this rank's pages, with page_offset, page_stride and total_len.
        qo_indptr: int32 [batch + 1], NumPy or on kv's device; request i has rows qo_indptr[i] to qo_indptr[i+1] of q.
        num_qo_heads: int, a multiple of the KV heads.
        causal: bool, whether a query sees no later position; query i of n is at total_len - n + i. Default True.
        sm_scale: float, the factor of the products <q, k>. Default None: 1 / sqrt(head_dim).
        window_left: int, how many keys left of its position a query sees, beside its own. Default -1: all.
        logits_soft_cap: float c: scores become c * tanh(score / c), after sm_scale. Default 0.0: off.
        """
        options = {"sm_scale": sm_scale, "window_left": window_left, "logits_soft_cap": logits_soft_cap}

        def plan_one(plan: Any, kv: Any, table: Any, indptr: Any) -> None:
            plan.plan(kv, table, indptr, num_qo_heads, causal=causal, **options)

        self._plan(kv, table, qo_indptr, plan_one)


def _checked(comm: Any) -> Ranks:
    if not isinstance(comm, Ranks):
        raise TypeError(
            f"comm must be a communicator (LocalRanks, MpiRanks, NcclRanks, ...), got {type(comm).__name__}; pass the "
            f"arguments in their order: decode(comm, q, kv, table), prefill(comm, q, qo_indptr, kv, table)"
        )
    return comm


def _each(comm: Ranks, value: Any, name: str) -> list[Any]:
    """A value for each rank of this process."""
    count = len(comm.ranks)
    if count == 1 or value is None:
        return [value] * count
    if not isinstance(value, (list, tuple)) or len(value) != count:
        came = f"{len(value)} of them" if isinstance(value, (list, tuple)) else type(value).__name__
        raise TypeError(f"{name} must be a list of {count}, one for each rank of this process, got {came} ({comm!r})")
    return list(value)


def _shape_of(q: Any, ndims: tuple[int, ...], axes: str) -> tuple[int, ...]:
    shape: tuple[int, ...] = native(q, "q").shape
    if len(shape) not in ndims:
        raise ValueError(f"q must be {axes}, got q.shape={shape}; reshape q")
    return shape
