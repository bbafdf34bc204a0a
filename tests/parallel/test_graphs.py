"""Steps over ranks in CUDA graphs: captured once, replayed with other lengths and queries."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import paged_attn as pa
from paged_attn import parallel
from tests.cases import OUT_TOLERANCE, Case, assert_close
from tests.gpu.capture import no_allocation
from tests.parallel.spread import Spread, int32

pytestmark = pytest.mark.gpu

SHORT = Case("graph", (30, 0, 17), num_qo_heads=8, sinks=True)
CASES = (SHORT, replace(SHORT, kv_lens=(130, 1, 17)), replace(SHORT, kv_lens=(700, 90, 0)))
LARGE = 1 << 13  # requests, so that two calls send less


def captured(work: Callable[[], None]) -> Any:
    """NCCL is captured in the relaxed mode alone."""
    import cupy

    stream = cupy.cuda.Stream(non_blocking=True)
    with stream, no_allocation():
        stream.begin_capture(mode=cupy.cuda.runtime.streamCaptureModeRelaxed)
        try:
            work()
        finally:
            graph = stream.end_capture()
    return graph


COMMUNICATORS: dict[str, Callable[[], Any]] = {
    "local": lambda: parallel.LocalRanks(4, "cuda"),
    "nccl": lambda: parallel.NcclRanks(0, 1),
    "peers": lambda: parallel.PeerRanks(0, 2, devices=[0, 0]),
}


class Buffers:
    """What a graph reads and writes: queries, pools and tables with room for any of the steps, and results."""

    def __init__(self, steps: list[Spread], shard: str | None) -> None:
        import cupy

        self.first, comm = steps[0], steps[0].comm
        self.num_pages = max(rank.arrays[1].size for step in steps for rank in step.ranks)
        pool = max(len(rank.k_pages) for step in steps for rank in step.ranks)
        batch, heads = len(SHORT.kv_lens), SHORT.num_qo_heads // (1 if shard is None else comm.num_ranks)
        each = self.first.ranks
        self.q = [cupy.zeros(self.first.inputs.q.shape, "float16") for _ in each]
        self.k, self.v = ([cupy.zeros((pool, 16, 2, 64), "float16") for _ in each] for _ in range(2))
        self.kv = [pa.PagedKV(k, v, layout="NHD") for k, v in zip(self.k, self.v, strict=True)]
        self.tables = [
            pa.PageTable(
                *(cupy.zeros(size, "int32") for size in (batch + 1, self.num_pages, batch)),
                page_size=16,
                page_offset=cupy.zeros(batch, "int32"),
                page_stride=comm.num_ranks,
                total_len=cupy.zeros(batch, "int32"),
            )
            for _ in each
        ]
        self.out = [cupy.zeros((batch, heads, 64), "float16") for _ in each]
        self.lse = [cupy.zeros((batch, heads), "float32") for _ in each]

    def write(self, step: Spread) -> None:
        """The lengths, keys and queries of a step."""
        for i, rank in enumerate(step.ranks):
            on_host, table = rank.table(), self.tables[i]
            for name in ("indptr", "indices", "last_page_len", "page_offset", "total_len"):
                array = getattr(on_host, name)
                getattr(table, name)[: array.size].set(array)
            self.k[i][: len(rank.k_pages)].set(rank.k_pages)
            self.v[i][: len(rank.v_pages)].set(rank.v_pages)
            self.q[i].set(step.inputs.q)
            self.out[i].fill(float("nan"))
            self.lse[i].fill(float("nan"))


@pytest.mark.parametrize("shard", [None, "heads"])
@pytest.mark.parametrize("max_batch_size", [3, LARGE])
@pytest.mark.parametrize("name", COMMUNICATORS)
def test_a_step_replays_with_growing_lengths(name: str, max_batch_size: int, shard: str | None) -> None:
    """plan and run in one graph, which reads tables, pools and queries where they were. Nothing is allocated."""
    import cupy

    with COMMUNICATORS[name]() as comm:
        steps = [Spread(comm, case, cupy.asarray) for case in CASES]
        own, plain = Buffers(steps, shard), steps[0].plain
        plan = parallel.BatchDecodeWithPagedKVCache(
            comm, max_batch_size=max_batch_size, max_pages=own.num_pages, shard=shard
        )

        def step() -> None:
            plan.plan(plain(own.kv), plain(own.tables), SHORT.num_qo_heads)
            plan.run(plain(own.q), plain(own.kv), sinks=steps[0].sinks, out=plain(own.out), lse=plain(own.lse))

        own.write(steps[0])
        step()
        graph = captured(step)
        for now in steps:
            own.write(now)
            graph.launch()
            plan.status()
            now.assert_right(([x.get() for x in own.out], [x.get() for x in own.lse]), shard)
        if comm.num_ranks > 1:
            own.tables[1].total_len.set(int32(CASES[-1].kv_lens) + int32([0, 0, 1]))
            graph.launch()
            with pytest.raises(ValueError, match="the lengths of rank 0 are not those of rank 1"):
                plan.status()


@pytest.mark.parametrize("name", COMMUNICATORS)
def test_whole_steps_replay(name: str) -> None:
    """append, attention, exchange and merge of all ranks in one graph: 60 tokens of two sequences, which take pages on
    one rank after the other."""
    import cupy

    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32).astype(np.float16)

    extents = {"page_size": 16, "num_kv_heads": 2, "head_dim": 64, "layout": "NHD", "dtype": "float16"}
    with COMMUNICATORS[name]() as comm:
        n, several = comm.num_ranks, len(comm.ranks) > 1
        whole = pa.PagedKVCache(32, device="cpu", **extents)
        caches = [pa.PagedKVCache(32, device="cuda", rank=rank, num_ranks=n, **extents) for rank in comm.ranks]
        for cache in (whole, *caches):
            seqs = [cache.new_sequence(), cache.new_sequence()]
        tables = [
            pa.PageTable.empty(2, 64, page_size=16, device="cuda", positions=True, page_stride=n) for _ in caches
        ]  # fmt: skip
        slots = [cupy.full(2, -1, np.int64) for _ in caches]
        k, v = cupy.zeros((2, 2, 64), np.float16), cupy.zeros((2, 2, 64), np.float16)
        q, outs = cupy.zeros((2, 8, 64), np.float16), [cupy.zeros((2, 8, 64), np.float16) for _ in caches]
        plan = parallel.BatchDecodeWithPagedKVCache(comm, max_batch_size=2, max_pages=64)

        def plain(each: list[Any]) -> Any:
            return each if several else each[0]

        def step() -> None:
            kvs = [cache.layers[0] for cache in caches]
            for kv, new in zip(kvs, slots, strict=True):
                pa.append(kv, new, k, v)
            plan.plan(plain(kvs), plain(tables), 8)
            plan.run(plain([q] * len(caches)), plain(kvs), out=plain(outs))

        graph = None
        for number in range(60):
            new_k, new_v, new_q = normal(2, 2, 64), normal(2, 2, 64), normal(2, 8, 64)
            whole.append(seqs, 1, new_k, new_v)
            for cache, mine, table in zip(caches, slots, tables, strict=True):
                mine[...] = cache.reserve(seqs, 1)
                cache.page_table(seqs, out=table)
            for array, values in ((k, new_k), (v, new_v), (q, new_q)):
                array.set(values)
            cupy.cuda.get_current_stream().synchronize()
            if number == 0:
                step()
                graph = captured(step)
            else:
                graph.launch()
            plan.status()
            right = pa.decode(new_q, whole.layers[0], whole.page_table(seqs))
            for out in outs:
                assert_close(out.get(), right, tolerance=OUT_TOLERANCE["float16"])
