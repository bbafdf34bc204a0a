"""Cases of tests/cases.py whose pages are spread over ranks, and what one device answers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

import paged_attn as pa
from paged_attn import parallel
from tests.cases import LSE_TOLERANCE, LSE_TOLERANCE_SOFT_CAP, OUT_TOLERANCE, Case, Inputs, assert_close, build


def int32(numbers: Any) -> np.ndarray:
    return np.array(numbers, np.int32)


@dataclass(frozen=True)
class Rank:
    """What one rank holds of a case: a pool in which all other pages are NaN, and the arrays of its table."""

    inputs: Inputs
    k_pages: np.ndarray
    v_pages: np.ndarray
    arrays: tuple[np.ndarray, ...]  # indptr, indices, last_page_len
    page_offset: np.ndarray
    num_ranks: int

    def kv(self, to: Callable[[np.ndarray], Any] = np.asarray) -> pa.PagedKV:
        return pa.PagedKV(to(self.k_pages), to(self.v_pages), layout=self.inputs.case.layout)

    def table(self, to: Callable[[np.ndarray], Any] = np.asarray) -> pa.PageTable:
        return pa.PageTable(
            *map(to, self.arrays),
            page_size=self.inputs.case.page_size,
            page_offset=to(self.page_offset),
            page_stride=self.num_ranks,
            total_len=to(int32(self.inputs.case.kv_lens)),
        )


def spread(inputs: Inputs, num_ranks: int, first: Sequence[int] | None = None) -> list[Rank]:
    """Page j of request i to rank (j + first[i]) % num_ranks. first: by default the requests' own numbers."""
    case = inputs.case
    starts = np.arange(case.batch_size) if first is None else np.array(first)
    ranks = []
    for rank in range(num_ranks):
        offsets = (rank - starts) % num_ranks
        pages = [inputs.indices[begin:end] for begin, end in zip(inputs.indptr, inputs.indptr[1:], strict=False)]
        mine = [ids[offset::num_ranks] for ids, offset in zip(pages, offsets, strict=True)]
        holds_last = [len(own) and own[-1] == ids[-1] for own, ids in zip(mine, pages, strict=True)]
        last = np.where(holds_last, inputs.last_page_len, [case.page_size if len(own) else 0 for own in mine])
        ids = np.concatenate([*mine, int32([])])
        others = np.setdiff1d(np.arange(len(inputs.k_pages)), ids)
        pools = inputs.k_pages.copy(), inputs.v_pages.copy()
        for pool in pools:
            pool[others] = np.nan
        arrays = int32(np.append(0, np.cumsum([len(own) for own in mine]))), int32(ids), int32(last)
        ranks.append(Rank(inputs, *pools, arrays, int32(offsets), num_ranks))
    return ranks


class Spread:
    """A case on the ranks of this process: arguments as lists, or plain where there is one rank."""

    def __init__(
        self,
        comm: Any,
        case: Case,
        to: Callable[[np.ndarray], Any] = np.asarray,
        inputs: Inputs | None = None,
        first: Sequence[int] | None = None,
    ) -> None:
        self.comm, self.case, self.to, self.inputs = comm, case, to, inputs or build(case)
        self.right: tuple[np.ndarray, np.ndarray] | None = None
        every = spread(self.inputs, comm.num_ranks, first)
        self.ranks = [every[rank] for rank in comm.ranks]
        self.q, self.sinks = self.each(self.inputs.q), self.each(self.inputs.sinks)
        self.kv, self.table = self.plain([x.kv(to) for x in self.ranks]), self.plain([x.table(to) for x in self.ranks])
        self.qo_indptr = self.each(self.inputs.qo_indptr)

    def of_requests(self, requests: Sequence[int]) -> "Spread":
        """The same pools, and these requests alone, in this order."""
        inputs = self.inputs
        rows = [slice(*inputs.qo_indptr[i : i + 2]) for i in requests]
        queries, pages = (
            [int(array[i + 1] - array[i]) for i in requests] for array in (inputs.qo_indptr, inputs.indptr)
        )
        ids = [inputs.indices[inputs.indptr[i] :][:count] for i, count in zip(requests, pages, strict=True)]
        part = replace(
            inputs,
            case=replace(self.case, kv_lens=tuple(self.case.kv_lens[i] for i in requests), q_lens=tuple(queries)),
            q=np.concatenate([inputs.q[x] for x in rows]),
            indptr=int32(np.append(0, np.cumsum(pages))),
            indices=int32(np.concatenate(ids)),
            last_page_len=inputs.last_page_len[list(requests)],
            qo_indptr=int32(np.append(0, np.cumsum(queries))),
        )
        return Spread(self.comm, part.case, self.to, part, first=requests)

    def plain(self, values: list[Any]) -> Any:
        return values[0] if len(values) == 1 else values

    def each(self, array: np.ndarray | None) -> Any:
        return None if array is None else self.plain([self.to(array) for _ in self.ranks])

    def run(self, **options: Any) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """The one-shot call: out and lse of each rank of this process, in NumPy."""
        options = self.inputs.options() | {"sinks": self.sinks, "return_lse": True} | options
        if self.case.is_decode:
            return self.lists(parallel.decode(self.comm, self.q, self.kv, self.table, **options))
        return self.lists(parallel.prefill(self.comm, self.q, self.qo_indptr, self.kv, self.table, **options))

    def plan(self, **options: Any) -> Any:
        """A plan of the case, planned. options: of the constructor."""
        kind = parallel.BatchDecodeWithPagedKVCache if self.case.is_decode else parallel.BatchPrefillWithPagedKVCache
        plan = kind(self.comm, **options)
        self.replan(plan)
        return plan

    def replan(self, plan: Any, **options: Any) -> None:
        options = self.inputs.options() | options
        if self.case.is_decode:
            plan.plan(self.kv, self.table, self.case.num_qo_heads, q_len=self.case.q_len, **options)
        else:
            plan.plan(self.kv, self.table, self.qo_indptr, self.case.num_qo_heads, **options)

    def lists(self, results: Any) -> tuple[list[np.ndarray], list[np.ndarray]]:
        out, lse = results if len(self.ranks) > 1 else ([results[0]], [results[1]])
        return [on_host(x) for x in out], [on_host(x) for x in lse]

    def assert_right(self, results: tuple[list[np.ndarray], list[np.ndarray]], shard: str | None = None) -> None:
        """Each rank has what one device answers, in float32 where it can; or its part of the heads."""
        if self.right is None:
            self.right = one_device(self.inputs)
        out, lse = self.right
        tolerance = max(OUT_TOLERANCE[self.case.dtype], 1e-6)  # lse and partial results are float32
        part = self.case.num_qo_heads // self.comm.num_ranks
        for rank, mine, mine_lse in zip(self.comm.ranks, *results, strict=True):
            heads = slice(None) if shard is None else slice(rank * part, (rank + 1) * part)
            assert_close(
                mine, out[..., heads, :], mine_lse, lse[..., heads], tolerance=tolerance,
                lse_tolerance=LSE_TOLERANCE_SOFT_CAP if self.case.logits_soft_cap else LSE_TOLERANCE,
            )  # fmt: skip


class OnCards(Spread):
    """A case whose ranks are on the devices of a communicator. host: whether tables are on the host."""

    def __init__(self, comm: Any, case: Case, host: bool = False) -> None:
        import cupy

        super().__init__(comm, case)
        self.kv, self.q = self.here(lambda x: x.kv(cupy.asarray)), self.here(lambda x: cupy.asarray(x.inputs.q))
        self.sinks = self.here(lambda x: cupy.asarray(x.inputs.sinks))
        if not host:
            self.table = self.here(lambda x: x.table(cupy.asarray))

    def here(self, make: Callable[[Any], Any]) -> Any:
        import cupy

        made = []
        for rank, device in zip(self.ranks, self.comm.devices, strict=True):
            with cupy.cuda.Device(int(device[-1])):
                made.append(make(rank))
        return self.plain(made)

    def with_array(self, name: str, more: Sequence[int]) -> pa.PageTable:
        """The table of the one rank here, an array of it with other numbers."""
        import cupy

        names = ("indptr", "indices", "last_page_len", "page_size", "page_offset", "page_stride", "total_len")
        changed = cupy.asarray(getattr(self.table, name).get() + int32(more))
        return pa.PageTable(**{x: getattr(self.table, x) for x in names} | {name: changed})


def on_host(array: Any) -> np.ndarray:
    return array if isinstance(array, np.ndarray) else array.get()


def one_device(inputs: Inputs) -> tuple[np.ndarray, np.ndarray]:
    """What NumPy answers on one device, of at least float32."""
    case = inputs.case
    dtype = np.float64 if case.dtype == "float64" else np.float32
    options = inputs.options() | {"sinks": inputs.sinks, "return_lse": True}
    options["out"] = np.empty((*inputs.q.shape[:-1], case.v_head_dim), dtype)
    if case.is_decode:
        return pa.decode(inputs.q, inputs.kv(), inputs.table(), **options)
    return pa.prefill(inputs.q, inputs.qo_indptr, inputs.kv(), inputs.table(), **options)
