"""PeerRanks in what a test may not do in its process. Prints what was wrong, by name.

python -m tests.parallel.peer_ranks shim                  cards of the SIMT shim
python -m tests.parallel.peer_ranks process RANK ADDRESS  one of two processes, on GPU RANK or on the only one
python -m tests.parallel.peer_ranks lose RANK ADDRESS     the same, and rank 1 ends while rank 0 waits for it
"""

import contextlib
import gc
import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from paged_attn import parallel
from paged_attn.parallel import peers
from paged_attn.parallel.ranks import MergeShape

if sys.argv[1:2] == ["shim"]:
    from tests.simt import card

    card.install("80")

import cupy
import numpy as np

from tests.cases import Case
from tests.parallel.spread import OnCards
from tests.parallel.test_sockets import free_address, raise_errors, together

CASE = Case("peers", (130, 0, 77, 9), num_qo_heads=8, sinks=True)
TIMEOUT = 4.0  # seconds; a step on the shim takes less


def check_results(comm: Any) -> None:
    """Both shards, tables on the host and on the GPU, both dtypes of partial results, more than one exchange a step."""
    for host in (False, True):
        spread = OnCards(comm, CASE, host)
        for shard in (None, "heads"):
            spread.assert_right(spread.run(shard=shard), shard)
    plan = spread.plan(partial_dtype="float16")
    spread.assert_right(spread.lists(plan.run(spread.q, spread.kv, sinks=spread.sinks, return_lse=True)))
    assert plan.way == "peer memory"
    assert plan.bytes_a_step == (comm.num_ranks - 1) * (4 * 8 * (64 * 2 + 4) + 8)
    plan.status()


# -- on the shim -------------------------------------------------------------------------------------------------------


def one_rank() -> None:
    with parallel.PeerRanks(0, 1) as comm:
        check_results(comm)


def one_process_with_two_gpus() -> None:
    with parallel.PeerRanks(0, 2, devices=["cuda:0", 1]) as comm:
        assert comm.all_gather_bytes([b"a", b"bc"]) == [b"a", b"bc"]
        check_results(comm)


def ranks_that_share_a_gpu() -> None:
    for devices in ([0, 0], [1, 0, 1, 1]):
        with parallel.PeerRanks(0, len(devices), devices=devices) as comm:
            check_results(comm)


def processes(make: Callable[[int], Any], then: Callable[[Any], Any]) -> list[tuple[Any, float]]:
    """then(communicator) in two threads, each on a card."""

    def process(rank: int) -> Any:
        with cupy.cuda.Device(rank):
            return then(make(rank))

    return together(lambda: process(0), lambda: process(1))


def by_address(**options: Any) -> Callable[[int], Any]:
    address = free_address()
    return lambda rank: parallel.PeerRanks(rank, 2, address=address, **options)


def two_processes_that_meet_at_an_address() -> None:
    def work(comm: Any) -> None:
        with comm:
            check_results(comm)

    raise_errors(processes(by_address(), work))


def two_processes_that_exchange_by_a_call() -> None:
    barrier, said = threading.Barrier(2), {}

    def allgather(rank: int, message: bytes) -> list[bytes]:
        said[rank] = message
        barrier.wait()
        every = [said[0], said[1]]
        barrier.wait()
        return every

    def make(rank: int) -> Any:
        return parallel.PeerRanks(rank, 2, exchange=lambda message: allgather(rank, message))

    def work(comm: Any) -> None:
        with comm:
            check_results(comm)

    raise_errors(processes(make, work))


def steps_of_many_rows() -> None:
    """As many exchanges as fit into the memory that waits."""
    before, peers.RECEIVED_BYTES = peers.RECEIVED_BYTES, 2 * 2 * 3 * 8 * 260  # 3 rows
    try:
        one_process_with_two_gpus()
        ranks_that_share_a_gpu()
    finally:
        peers.RECEIVED_BYTES = before


def the_memory_of_plans_that_are_gone() -> None:
    """It waits for the next plan; close() gives it back, at once or when the last plan goes."""
    with parallel.PeerRanks(0, 2, devices=[0, 1]) as comm:
        spread = OnCards(comm, CASE)
        for _ in range(5):
            plan = spread.plan()
            plan.run(spread.q, spread.kv, sinks=spread.sinks)
            del plan
            gc.collect()
        assert [len(idle) for idle in comm._idle.values()] == [1, 1]
        kept = spread.plan()
        kept.run(spread.q, spread.kv)
    try:
        kept.run(spread.q, spread.kv)
    except RuntimeError as error:
        assert "is closed" in str(error), error
    else:
        raise AssertionError("a closed communicator goes on")
    assert not comm._idle


def what_fails_on_one_rank_fails_on_all() -> None:
    def fail(handle: bytes, flags: int) -> int:
        raise OSError("mapping resources failed")

    def work(comm: Any) -> None:
        with comm:
            for _ in range(2):
                comm._map = comm._map if comm.ranks[0] else fail
                try:
                    comm.prepare(MergeShape(4, 8, 64, np.dtype("float32"), np.dtype("float16"), None))
                except RuntimeError as error:
                    assert re.match(r"rank 0 of PeerRanks.*OSError: mapping resources failed", str(error)), error
                else:
                    raise AssertionError(f"rank {comm.ranks[0]} has not heard of it")
            if not comm.ranks[0]:
                del comm._map
            check_results(comm)

    raise_errors(processes(by_address(), work))


def lengths_that_differ() -> None:
    """On GPUs: status() says it on both ranks, once."""

    def work(comm: Any) -> None:
        with comm:
            rank = comm.ranks[0]
            spread = OnCards(comm, CASE)
            plan, table = spread.plan(), spread.table
            plan.run(spread.q, spread.kv)
            plan.status()
            spread.table = spread.with_array("total_len", [0, 0, rank, 0])
            spread.replan(plan)
            plan.run(spread.q, spread.kv)
            try:
                plan.status()
            except ValueError as error:
                assert f"the lengths of rank {rank} are not those of rank {1 - rank}" in str(error), error
            else:
                raise AssertionError("nothing was raised")
            spread.table = table
            spread.replan(plan)
            plan.run(spread.q, spread.kv)
            plan.status()

    raise_errors(processes(by_address(), work))


def a_rank_that_does_not_come_to(call: str) -> None:
    """Rank 1 plans, and then does nothing."""
    is_over = threading.Event()

    def work(comm: Any) -> None:
        spread = OnCards(comm, CASE)
        plan = spread.plan()
        plan.run(spread.q, spread.kv)
        plan.status()
        if comm.ranks[0] == 1:
            is_over.wait()
            try:
                comm.close()
            except TimeoutError:
                return
            raise AssertionError("rank 0 has come")
        calls = {"plan": lambda: spread.replan(plan, window_left=3), "status": plan.status, "close": comm.close}
        begin, error = time.monotonic(), None
        if call == "status":
            for _ in range(3):
                plan.run(spread.q, spread.kv)
        try:
            calls[call]()
        except TimeoutError as found:
            error = found
        seconds = time.monotonic() - begin
        is_over.set()
        assert error is not None and 0.9 * TIMEOUT <= seconds < TIMEOUT + 8, (error, seconds)
        assert "rank 1 did not come to rank 0" in str(error), error
        if call != "close":
            again = (lambda: spread.replan(plan), plan.status, comm.status, comm.check_usable, comm.close)
            for each in again:
                try:
                    each()
                except TimeoutError as found:
                    assert "rank 1 did not come to rank 0" in str(found), found
                else:
                    raise AssertionError("a communicator without ranks goes on")
        comm.close()  # which nothing comes of

    raise_errors(processes(by_address(timeout=TIMEOUT), work))


def lost_ranks() -> None:
    for call in ("plan", "status", "close"):
        a_rank_that_does_not_come_to(call)


def arguments_that_do_not_fit() -> None:
    for error, message, given in (
        (ValueError, "devices is .*each rank is on a GPU", {"devices": ["cpu"]}),
        (ValueError, "devices is .*each rank is on a GPU", {"devices": []}),
        (ValueError, "rank is 2", {"rank": 2}),
        (ValueError, "num_ranks is 9", {"num_ranks": 9}),
        (ValueError, "num_ranks is 1", {"num_ranks": 1, "devices": [0, 1]}),
        (ValueError, "exchange is for one rank a process", {"devices": [0, 1], "exchange": lambda message: [message]}),
        (ValueError, "pass address='host:port' of rank 0", {}),
    ):
        try:
            parallel.PeerRanks(**{"rank": 0, "num_ranks": 2} | given)  # type: ignore[arg-type]
        except error as found:
            assert re.search(message, str(found)), found
        else:
            raise AssertionError(message)
    can_access = cupy.cuda.runtime.deviceCanAccessPeer
    cupy.cuda.runtime.deviceCanAccessPeer = lambda device, peer: False
    try:
        parallel.PeerRanks(0, 2, devices=[0, 1])
    except NotImplementedError as found:
        assert "cuda:0 cannot access the memory of cuda:1" in str(found), found
    else:
        raise AssertionError("GPUs without peer access")
    finally:
        cupy.cuda.runtime.deviceCanAccessPeer = can_access


SCENES: list[Callable[[], None]] = [
    one_rank,
    one_process_with_two_gpus,
    ranks_that_share_a_gpu,
    two_processes_that_meet_at_an_address,
    two_processes_that_exchange_by_a_call,
    steps_of_many_rows,
    the_memory_of_plans_that_are_gone,
    what_fails_on_one_rank_fails_on_all,
    lengths_that_differ,
    lost_ranks,
    arguments_that_do_not_fit,
]


def in_one_of_two_processes(work: Callable[[Any], None], timeout: float) -> None:
    rank, address = int(sys.argv[2]), sys.argv[3]
    device = rank % cupy.cuda.runtime.getDeviceCount()
    with cupy.cuda.Device(device), parallel.PeerRanks(rank, 2, address=address, timeout=timeout) as comm:
        work(comm)


def one_of_two_processes() -> None:
    in_one_of_two_processes(check_results, 60.0)


def a_process_that_ends() -> None:
    """Rank 1 is gone without a word. What rank 0 has on its GPU is of use."""

    def work(comm: Any) -> None:
        spread = OnCards(comm, CASE)
        plan = spread.plan()
        plan.run(spread.q, spread.kv)
        plan.status()
        if comm.ranks[0]:
            print("{}", flush=True)
            os._exit(0)
        time.sleep(1)
        begin = time.monotonic()
        for _ in range(3):
            plan.run(spread.q, spread.kv)
        try:
            plan.status()
        except TimeoutError as error:
            assert "rank 1 did not come to rank 0" in str(error), error
        else:
            raise AssertionError("nothing was raised")
        assert time.monotonic() - begin < 30
        kv = spread.kv.k_pages.copy()
        assert bool((kv.view("u2") == spread.kv.k_pages.view("u2")).all())

    with contextlib.suppress(TimeoutError):  # of close()
        in_one_of_two_processes(work, 20.0)


def wrong(scenes: list[Callable[[], None]]) -> Iterator[tuple[str, str]]:
    for scene in scenes:
        try:
            scene()
        except Exception as error:
            yield scene.__name__, f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    scenes = {"shim": SCENES, "process": [one_of_two_processes], "lose": [a_process_that_ends]}
    print(json.dumps(dict(wrong(scenes[sys.argv[1]]))))
