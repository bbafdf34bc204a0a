"""Plain processes that meet by TCP: threads here, each with the ranks of one process."""

import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest

from paged_attn.parallel.sockets import Sockets

TIMEOUT = 4.0


def free_address() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


def together(*processes: Callable[[], Any]) -> list[Any]:
    """What each returned, or raised, and after how many seconds."""
    found: list[Any] = [None] * len(processes)

    def run(i: int) -> None:
        begin = time.monotonic()
        try:
            result = processes[i]()
        except Exception as error:
            result = error
        found[i] = result, time.monotonic() - begin

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(processes))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def raise_errors(found: list[tuple[Any, float]]) -> None:
    for error, _ in found:
        if error is not None:
            raise error


_made: list[Sockets] = []


@pytest.fixture(autouse=True)
def close_all() -> Iterator[None]:
    yield
    while _made:
        _made.pop().close()


def meet(ranks: tuple[int, ...], num_ranks: int, address: str, timeout: float = 10.0) -> Callable[[], Sockets]:
    def make() -> Sockets:
        made = Sockets(ranks, num_ranks, address, timeout)
        _made.append(made)
        return made

    return make


def meeting(*processes: tuple[int, ...], timeout: float = TIMEOUT) -> list[Sockets]:
    address, num_ranks = free_address(), sum(map(len, processes))
    return [made for made, _ in together(*(meet(ranks, num_ranks, address, timeout) for ranks in processes))]


@pytest.mark.parametrize("processes", [[(0,)], [(0, 1, 2)], [(0,), (1,)], [(2, 3), (0,), (1,), (4, 5)]], ids=str)
def test_every_rank_gets_the_messages_of_all_in_rank_order(processes: list[tuple[int, ...]]) -> None:
    sockets = meeting(*processes)
    for size in (0, 1, 100_000):
        calls = [
            partial(mine.all_gather, [b"%d" % rank * size * rank for rank in ranks])
            for mine, ranks in zip(sockets, processes, strict=True)
        ]
        expected = [b"%d" % rank * size * rank for rank in range(sum(map(len, processes)))]
        assert [messages for messages, _ in together(*calls)] == [expected] * len(processes)
    for mine in sockets:
        mine.close()


def test_what_comes_from_others_is_passed_over() -> None:
    """Rank 0 is asked for a web page, and by somebody who says nothing and goes."""
    address = free_address()
    host, port = address.split(":")

    def somebody() -> None:
        for words in (b"GET / HTTP/1.1\r\n\r\n" * 9, b"\3" + b"\0" * 7 + b"Mabc", b""):
            time.sleep(0.1)
            with socket.create_connection((host, int(port))) as other:
                other.sendall(words)

    def late() -> Sockets:
        time.sleep(0.6)
        return meet((1,), 2, address)()

    (first, _), _, (second, _) = together(meet((0,), 2, address), somebody, late)
    assert [x for x, _ in together(lambda: first.all_gather([b"a"]), lambda: second.all_gather([b"b"]))] == [
        [b"a", b"b"]
    ] * 2


def assert_timeout(found: tuple[Any, float], message: str, least: float = 0.0) -> None:
    error, seconds = found
    assert isinstance(error, TimeoutError) and re.search(message, str(error)), repr(error)
    assert least <= seconds < TIMEOUT + 5


def test_a_rank_that_does_not_come_is_named_on_all_others() -> None:
    address = free_address()
    for found in together(*(meet((rank,), 4, address, TIMEOUT) for rank in (0, 1, 3))):
        assert_timeout(found, "rank 2 did not come to 127.0.0.1:[0-9]+ within 4.0 s", 0.9 * TIMEOUT)
    assert_timeout(*together(meet((1,), 2, free_address(), TIMEOUT)), "rank 0 did not answer at")
    zero, one, two = meeting((0,), (1,), (2,))
    for found in together(partial(zero.all_gather, [b""]), partial(one.all_gather, [b""])):
        assert_timeout(found, "rank 2 did not come to rank 0 within 4.0 s", 0.9 * TIMEOUT)
    for late in (two, zero, one):
        assert_timeout(*together(partial(late.all_gather, [b""])), "rank 2 did not come")
    zero, one, two = meeting((0,), (1,), (2,))
    for found in together(partial(two.all_gather, [b""]), partial(one.all_gather, [b""])):
        assert_timeout(found, "rank 0 did not answer rank [12] within 4.0 s", 0.9 * TIMEOUT)


def test_a_process_that_ends_is_noticed_at_once() -> None:
    zero, one, two = meeting((0,), (1,), (2,), timeout=60.0)
    two.close()
    for found in together(partial(zero.all_gather, [b""]), partial(one.all_gather, [b""])):
        assert_timeout(found, "rank 2 did not come to rank 0.*its process has ended")
    zero, one, two = meeting((0,), (1,), (2,), timeout=60.0)
    zero.close()
    for found in together(partial(two.all_gather, [b""]), partial(one.all_gather, [b""])):
        assert_timeout(found, "rank 0 did not answer rank [12]")


@pytest.mark.parametrize(("rank", "num_ranks"), [(1, 4), (7, 3)])
def test_processes_that_count_ranks_differently_are_refused(rank: int, num_ranks: int) -> None:
    address = free_address()
    for error, _ in together(meet((0,), 3, address), meet((rank,), num_ranks, address)):
        assert isinstance(error, ValueError)
        assert f"as rank {rank} of {num_ranks}, where ranks 1, 2 of 3 are missing" in str(error)


@pytest.mark.parametrize("address", [None, "node0", "node0:", ":29500", "node0:port"])
def test_an_address_that_is_none_is_refused(address: str | None) -> None:
    with pytest.raises(ValueError, match=r"pass (address=)?'host:port' of"):
        Sockets((1,), 2, address, TIMEOUT)
