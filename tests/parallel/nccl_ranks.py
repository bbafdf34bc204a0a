"""NcclRanks in what a test may not do in its process. Prints what was wrong, by name.

python -m tests.parallel.nccl_ranks shim                  two cards of the SIMT shim, with a stand-in for NCCL
python -m tests.parallel.nccl_ranks process RANK ADDRESS  one of two processes, on GPU RANK
"""

import json
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from paged_attn import compile, parallel

if sys.argv[1:2] == ["shim"]:
    from tests.parallel import fake_nccl
    from tests.simt import card

    card.install("80")
    fake_nccl.install()

import cupy

from tests.cases import Case
from tests.parallel.spread import OnCards
from tests.parallel.test_sockets import free_address, raise_errors, together

CASE = Case("nccl", (130, 0, 77, 9), num_qo_heads=8, sinks=True)
LARGE = {"max_batch_size": 1 << 13, "max_pages": 99}  # so that two calls send less


def check_results(comm: Any, host: bool = False) -> None:
    spread = OnCards(comm, CASE, host)
    for shard in (None, "heads"):
        spread.assert_right(spread.run(shard=shard), shard)
    for capacities, way in (({}, "all-gather"), (LARGE, "all-to-all by heads, then all-gather")):
        plan = spread.plan(**capacities)
        assert plan.way == way or comm.num_ranks == 1, plan.way
        spread.assert_right(spread.lists(plan.run(spread.q, spread.kv, sinks=spread.sinks, return_lse=True)))
        plan.status()


# -- on the shim -------------------------------------------------------------------------------------------------------


def processes(rank_of: Callable[[int], Any], then: Callable[[Any], Any]) -> list[tuple[Any, float]]:
    """then(communicator) in two threads, with what rank_of(rank) makes."""

    def process(rank: int) -> Any:
        with cupy.cuda.Device(rank):
            return then(rank_of(rank))

    return together(partial(process, 0), partial(process, 1))


def by_address(**options: Any) -> Callable[[int], Any]:
    address = free_address()
    return lambda rank: parallel.NcclRanks(rank, 2, address=address, **options)


def one_process_with_two_gpus() -> None:
    with parallel.NcclRanks(0, 2, devices=["cuda:0", 1]) as comm:
        assert comm.all_gather_bytes([b"a", b"bc"]) == [b"a", b"bc"]
        check_results(comm)
        check_results(comm, host=True)


def one_rank() -> None:
    with parallel.NcclRanks(0, 1) as comm:
        check_results(comm)


def two_processes_that_meet_at_an_address() -> None:
    def work(comm: Any) -> None:
        with comm:
            check_results(comm, host=True)
            check_results(comm)

    raise_errors(processes(by_address(), work))


def two_processes_with_a_unique_id() -> None:
    def work(comm: Any) -> None:
        with comm:
            mine = b"x" * 1000 * comm.ranks[0]
            assert comm.all_gather_bytes([mine]) == [b"", b"x" * 1000]
            assert comm.all_gather_bytes([b""]) == [b"", b""]
            check_results(comm)

    unique_id = fake_nccl.get_unique_id()
    raise_errors(processes(lambda rank: parallel.NcclRanks(rank, 2, unique_id=unique_id), work))


def ranks_that_disagree() -> None:
    def work(comm: Any) -> None:
        with comm:
            spread = OnCards(comm, CASE)
            plan = spread.plan()
            for _ in range(2):
                try:
                    spread.replan(plan, window_left=comm.ranks[0])
                except ValueError as error:
                    assert re.match("window_left differs between ranks: rank 0 said 0; rank 1 said 1", str(error)), (
                        error
                    )
                else:
                    raise AssertionError("nothing was raised")
            spread.replan(plan)
            spread.assert_right(spread.lists(plan.run(spread.q, spread.kv, sinks=spread.sinks, return_lse=True)))

    raise_errors(processes(by_address(), work))


def lengths_that_differ_on_the_gpus() -> None:
    """Another length, and a page that two ranks own: status() says it on both ranks, until a step is right again."""

    def work(comm: Any) -> None:
        with comm:
            spread = OnCards(comm, CASE)
            table, plan, rank = spread.table, spread.plan(), comm.ranks[0]
            for name in ("total_len", "page_offset"):
                spread.replan(plan)
                plan.status()
                spread.table = spread.with_array(name, [0, 0, rank, 0])
                spread.replan(plan)
                plan.run(spread.q, spread.kv)
                try:
                    plan.status()
                except ValueError as error:
                    assert f"the lengths of rank {rank} are not those of rank {1 - rank}" in str(error), error
                else:
                    raise AssertionError(f"{name}: nothing was raised")
                spread.table = table
            spread.replan(plan)
            plan.status()

    raise_errors(processes(by_address(), work))


TIMEOUT = 3.0


def a_rank_that_does_not_come_to(call: str) -> None:
    """Rank 1 plans and then does nothing. The GPU of rank 0 waits for it, until the watch ends that."""
    is_over = threading.Event()

    def work(comm: Any) -> None:
        spread = OnCards(comm, CASE)
        plan = spread.plan()
        plan.run(spread.q, spread.kv, sinks=spread.sinks)
        fake_nccl.patience = 0.05
        if comm.ranks[0] == 1:
            is_over.wait()
            try:
                spread.replan(plan, window_left=3)
            except TimeoutError:
                comm.close()
                return
            raise AssertionError("rank 0 has come")
        calls = {
            "plan": lambda: spread.replan(plan, window_left=3),  # which is compared by sockets
            "status": plan.status,
            "the GPU": lambda: cupy.cuda.runtime.deviceSynchronize(),  # which the watch frees
            "close": comm.close,
        }
        if call in ("status", "the GPU"):
            plan.run(spread.q, spread.kv, sinks=spread.sinks)
        begin, error = time.monotonic(), None
        try:
            calls[call]()
            if call == "the GPU":
                spread.replan(plan)
        except TimeoutError as found:
            error = found
        seconds = time.monotonic() - begin
        is_over.set()
        assert error is not None and 0.9 * TIMEOUT <= seconds < TIMEOUT + 5, (error, seconds)
        assert re.search("a rank did not come to|rank 1 did not come to rank 0", str(error)), error
        if call != "close":
            for again in (lambda: spread.replan(plan), plan.status, comm.status, lambda: comm.all_gather_bytes([b""])):
                try:
                    again()
                except TimeoutError as found:
                    assert str(found).startswith(str(error).partition(";")[0]), found
                else:
                    raise AssertionError("a communicator without ranks goes on")
            comm.close()
        try:
            plan.run(spread.q, spread.kv, sinks=spread.sinks)
        except RuntimeError as found:
            assert "closed" in str(found) or "behind one that raised" in str(found), found

    try:
        raise_errors(processes(by_address(timeout=TIMEOUT), work))
    finally:
        fake_nccl.patience = 5.0


def a_rank_that_makes_no_communicator() -> None:
    """With a unique id NCCL itself waits for it, in a thread that is left alone."""
    make = fake_nccl.NcclCommunicator.__init__
    fake_nccl.NcclCommunicator.__init__ = lambda *arguments: time.sleep(12)  # type: ignore[assignment, misc]
    try:
        parallel.NcclRanks(0, 2, unique_id=fake_nccl.get_unique_id(), timeout=TIMEOUT)
        raise AssertionError("nothing was raised")
    except TimeoutError as error:
        assert "making the communicators of NCCL was not over within 3.0 s" in str(error), error
    finally:
        fake_nccl.NcclCommunicator.__init__ = make  # type: ignore[method-assign]


def arguments_that_do_not_fit() -> None:
    for error, message, given in (
        (ValueError, "devices is .*each rank has a GPU of its own", {"devices": [0, 0]}),
        (ValueError, "devices is .*each rank has a GPU of its own", {"devices": ["cpu"]}),
        (ValueError, "rank is 2", {"rank": 2}),
        (ValueError, "num_ranks is 1", {"num_ranks": 1, "devices": [0, 1]}),
        (ValueError, "pass address='host:port' of rank 0", {}),
    ):
        try:
            parallel.NcclRanks(**{"rank": 0, "num_ranks": 2} | given)  # type: ignore[arg-type]
        except error as found:
            assert re.search(message, str(found)), found
        else:
            raise AssertionError(message)
    fake_nccl.available = False
    try:
        parallel.NcclRanks(0, 1)
    except ImportError as found:
        assert "NcclRanks needs NCCL" in str(found) and "pip install nvidia-nccl-cu12" in str(found), found
    finally:
        fake_nccl.available = True


SCENES: list[Callable[[], None]] = [
    one_rank,
    one_process_with_two_gpus,
    two_processes_that_meet_at_an_address,
    two_processes_with_a_unique_id,
    ranks_that_disagree,
    lengths_that_differ_on_the_gpus,
    *(partial(a_rank_that_does_not_come_to, call) for call in ("plan", "status", "the GPU", "close")),
    a_rank_that_makes_no_communicator,
    arguments_that_do_not_fit,
]


def one_at_a_time() -> None:
    """The shim runs one kernel at a time."""
    lock, launch = threading.Lock(), compile._launch_function()

    def locked(*arguments: Any) -> int:
        with lock:
            return int(launch(*arguments))

    compile._launch_function = lambda: locked  # type: ignore[assignment]


def one_of_two_processes() -> None:
    rank, address = int(sys.argv[2]), sys.argv[3]
    with cupy.cuda.Device(rank), parallel.NcclRanks(rank, 2, address=address) as comm:
        check_results(comm, host=True)
        check_results(comm)


def wrong(scenes: list[Callable[[], None]]) -> Iterator[tuple[str, str]]:
    for scene in scenes:
        try:
            scene()
        except Exception as error:
            yield str(scene), f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    if sys.argv[1] == "shim":
        one_at_a_time()
    print(json.dumps(dict(wrong(SCENES if sys.argv[1] == "shim" else [one_of_two_processes]))))
