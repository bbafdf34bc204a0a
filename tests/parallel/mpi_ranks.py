"""What a rank of MPI does in test_mpi.py. Each prints "wrong: ..." for what was wrong, and at its end "rank r is done".

mpiexec -n 4 python -m tests.parallel.mpi_ranks right         results, and bytes that were sent
mpiexec -n 4 python -m tests.parallel.mpi_ranks disagreeing   rank 1 says something else
mpiexec -n 4 python -m tests.parallel.mpi_ranks late          rank 2 comes late
"""

import contextlib
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from mpi4py import MPI

import paged_attn as pa
from paged_attn import parallel
from tests.cases import Case
from tests.parallel.spread import Spread, int32
from tests.parallel.test_attention import FEATURES

RANK = MPI.COMM_WORLD.Get_rank()
CASE = Case("plain", (130, 0, 77), num_qo_heads=8)


# -- results -----------------------------------------------------------------------------------------------------------


class Counting(parallel.MpiRanks):
    """Counts what it gives MPI for others."""

    sent = 0

    def all_gather(self, buffers: list[np.ndarray]) -> None:
        self.sent += buffers[0][0].nbytes * (self.num_ranks - 1)
        super().all_gather(buffers)

    def all_to_all(self, sent: list[np.ndarray], received: list[np.ndarray]) -> None:
        self.sent += sent[0][0].nbytes * (self.num_ranks - 1)
        super().all_to_all(sent, received)


def right() -> Iterator[str]:
    with Counting(device="cpu") as comm:
        messages = comm.all_gather_bytes([b"x" * RANK])
        if messages != [b"x" * rank for rank in range(comm.num_ranks)]:
            yield f"messages {messages}"
        for case in FEATURES:
            spread = Spread(comm, case)
            for shard in (None, "heads"):
                spread.assert_right(spread.run(shard=shard), shard)
                plan = spread.plan(shard=shard, batch_invariant=True)
                for _ in range(2):
                    comm.sent = 0
                    spread.assert_right(
                        spread.lists(plan.run(spread.q, spread.kv, sinks=spread.sinks, return_lse=True)), shard
                    )
                    if comm.sent != plan.bytes_a_step:
                        yield f"{case} sent {comm.sent} bytes, and the plan says {plan.bytes_a_step}"
        large = spread.plan(max_batch_size=1 << 14, max_pages=99)
        if large.way != "all-to-all by heads, then all-gather":
            yield f"the way of {large!r}"
        spread.assert_right(spread.lists(large.run(spread.q, spread.kv, sinks=spread.sinks, return_lse=True)))


# -- ranks that disagree -----------------------------------------------------------------------------------------------


def disagreeing() -> Iterator[str]:
    with parallel.MpiRanks(device="cpu") as comm:
        spread, odd = Spread(comm, CASE), RANK == 1
        table, kv = spread.table, spread.kv

        def plan(
            kv: Any = kv, table: Any = table, heads: int = 8, made: dict[str, Any] | None = None, **options: Any
        ) -> None:
            parallel.BatchDecodeWithPagedKVCache(comm, **made or {}).plan(kv, table, heads, **options)

        def like(**changes: Any) -> Spread:
            return Spread(comm, replace(CASE, **changes)) if odd else spread

        def tabled(**changes: Any) -> Callable[[], None]:
            names = ("indptr", "indices", "last_page_len", "page_size", "page_offset", "page_stride", "total_len")
            given = {name: getattr(table, name) for name in names}
            return lambda: plan(table=pa.PageTable(**given | (changes if odd else {})))

        def pool(**changes: Any) -> Callable[[], None]:
            other = like(**changes)
            return lambda: plan(other.kv, other.table)

        def made(**options: Any) -> Callable[[], None]:
            return lambda: plan(made=options if odd else {})

        def planned(**options: Any) -> Callable[[], None]:
            return lambda: plan(**options if odd else {})

        def differs(name: str, others: Any, mine: Any) -> str:
            return f"{name} differs between ranks: ranks 0, 2, 3 said {others}; rank 1 said {mine}"

        mismatch, total = pa.LayoutMismatchError, table.total_len
        failed = "" if odd else "rank 1 cannot plan this step, and so no rank does: .*Error: "
        twice = (
            r"a page of request 2 belongs to two ranks: page_offset\[2\] % num_ranks: ranks 0, 1 said 2; rank 2 said"
        )
        refused = ValueError if not odd else pa.PageTableError
        faults: list[tuple[Callable[[], None], type[Exception], str]] = [
            (pool(layout="HND"), mismatch, differs("layout", "NHD", "HND")),
            (pool(page_size=8), mismatch, differs("page_size", 16, 8)),
            (pool(num_kv_heads=4), mismatch, differs("num_kv_heads", 2, 4)),
            (pool(dtype="bfloat16"), ValueError, differs("dtype", "float16", "bfloat16")),
            (pool(head_dim=32), ValueError, differs("head_dim", 64, 32)),
            (pool(v_dim=32), ValueError, differs("v_head_dim", 64, 32)),
            (pool(kv_lens=(130, 0)), ValueError, differs("batch_size", 3, 2)),
            (planned(heads=4), ValueError, differs("num_qo_heads", 8, 4)),
            (planned(q_len=2), ValueError, differs("q_len", 1, 2)),
            (planned(window_left=9), ValueError, differs("window_left", -1, 9)),
            (planned(logits_soft_cap=2.0), ValueError, differs("logits_soft_cap", 0.0, 2.0)),
            (planned(sm_scale=1.0), ValueError, differs("sm_scale", 0.125, 1.0)),
            (made(max_batch_size=9), ValueError, differs("max_batch_size", None, 9)),
            (made(max_pages=9), ValueError, differs("max_pages", None, 9)),
            (made(shard="heads"), ValueError, differs("shard", None, "heads")),
            (made(partial_dtype="float16"), ValueError, differs("partial_dtype", "float32", "float16")),
            (made(batch_invariant=True), ValueError, differs("batch_invariant", False, True)),
            (tabled(total_len=total + int32([0, 0, 1])), ValueError, differs(r"total_len\[2\]", 77, 78)),
            (tabled(page_offset=(table.page_offset - int32([0, 0, 1])) % 4), ValueError, twice),
            (tabled(page_stride=2), ValueError, failed + "table has page_stride=2"),
            (tabled(indices=table.indices + 99), refused, failed + "indices"),
        ]
        for fault, kind, message in faults:
            try:
                fault()
                yield f"nothing was raised for {message}"
            except Exception as error:
                if type(error) is not kind or not re.match(message, str(error)):
                    yield f"{type(error).__name__}: {error}"
            spread.assert_right(spread.run())  # and the ranks go on
        indptr = int32([0, 1, 2, 4 if odd else 3])
        try:
            parallel.BatchPrefillWithPagedKVCache(comm).plan(kv, table, indptr, 8)
            yield "qo_indptr: nothing was raised"
        except ValueError as error:
            if not re.search(
                r"qo_indptr differs between ranks: rank 0 said \[0 1 2 3\], rank 1 \[0 1 2 4\]", str(error)
            ):
                yield f"qo_indptr: {error}"


# -- a rank that comes late --------------------------------------------------------------------------------------------

TIMEOUT, LATE = 2.0, 8.0  # seconds


def late() -> Iterator[str]:
    for call in ("plan", "run", "close"):
        MPI.COMM_WORLD.Barrier()
        comm = parallel.MpiRanks(device="cpu", timeout=TIMEOUT)
        spread = Spread(comm, CASE)
        plan = spread.plan()
        calls = {
            "plan": lambda spread=spread, plan=plan: spread.replan(plan),
            "run": lambda spread=spread, plan=plan: plan.run(spread.q, spread.kv),
            "close": comm.close,
        }
        time.sleep(LATE if RANK == 2 else 0)
        begin, error = time.monotonic(), None
        try:
            calls[call]()
        except TimeoutError as found:
            error = found
        seconds = time.monotonic() - begin
        if RANK != 2 and (error is None or not TIMEOUT <= seconds < LATE - 0.5):
            yield f"{call}: {error!r} after {seconds:.1f} s"
        if RANK != 2 and call != "close":
            try:
                spread.replan(plan)
                yield f"{call}: the ranks go on without rank 2"
            except TimeoutError as found:
                if "a rank was lost before" not in str(found):
                    yield f"{call}, then: {found}"
        with contextlib.suppress(TimeoutError):  # of rank 2, whom the others do not meet any more
            comm.close()
        plan.close()


if __name__ == "__main__":
    try:
        for fault in {"right": right, "disagreeing": disagreeing, "late": late}[sys.argv[1]]():
            print(f"wrong: rank {RANK}: {fault}\n", end="", flush=True)
    except Exception:
        traceback.print_exc()
        MPI.COMM_WORLD.Abort(1)  # or the others wait for this rank
    print(f"rank {RANK} is done\n", end="", flush=True)
