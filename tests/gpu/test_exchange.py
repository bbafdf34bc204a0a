"""PeerRanks on a card: ranks that share it, by streams and by processes; and on two cards."""

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import paged_attn as pa
from bench.exchange import Exchange
from paged_attn import parallel
from tests.gpu.capture import captured
from tests.parallel.test_sockets import free_address

cupy = pytest.importorskip("cupy")
ROOT = Path(__file__).parents[2]
F32, F16, BF16 = np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)
TOLERANCE = {F32: 2e-6, F16: 1e-3, BF16: 6e-3}


@pytest.fixture(params=[2, 4])
def comm(request: pytest.FixtureRequest) -> Iterator[Any]:
    with parallel.PeerRanks(0, request.param, devices=[0] * request.param) as comm:
        yield comm


def assert_merged(exchange: Exchange, v: np.ndarray, s: np.ndarray, sinks: np.ndarray | None = None) -> None:
    """Each rank has what NumPy gives, and all have the same bits."""
    out, lse = pa.merge_states(
        v.swapaxes(0, 1).astype(np.float32), s.swapaxes(0, 1), sinks=sinks, out=np.empty(v.shape[1:], np.float32)
    )
    results = exchange.results()
    for rank, (found, found_lse) in enumerate(results):
        part = found.shape[1]
        heads = slice(None) if exchange.shape.shard is None else slice(rank * part, (rank + 1) * part)
        error = np.linalg.norm(found.astype(np.float64) - out[:, heads], axis=-1)
        limit = TOLERANCE[found.dtype] * np.linalg.norm(out[:, heads], axis=-1) + 1e-6  # of a float16 below 2^-14
        assert (error <= limit).all(), (error - limit).max()
        np.testing.assert_allclose(found_lse, lse[:, heads], rtol=1e-5, atol=1e-5)
        if exchange.shape.shard is None:
            np.testing.assert_array_equal(found, results[0][0])
            np.testing.assert_array_equal(found_lse, results[0][1])


@pytest.mark.parametrize("shard", [None, "heads"])
@pytest.mark.parametrize(("partial", "out"), [(F32, F16), (F32, F32), (F16, F16), (BF16, BF16)])
@pytest.mark.parametrize(("rows", "dim"), [(1, 128), (70, 64), (37, 256), (300, 80)])
def test_steps(comm: Any, rows: int, dim: int, partial: np.dtype, out: np.dtype, shard: str | None) -> None:
    """With sinks and without; empty states, whose v is NaN."""
    sinks = np.linspace(-3, 4, 8).astype(np.float32)
    for given in (None, sinks):
        exchange = Exchange(
            comm, rows, given, heads=8, dim=dim, partial_dtype=partial, out_dtype=out, shard=shard
        )  # fmt: skip
        for epoch in range(3):
            v, s = exchange.random(epoch)
            empty = np.random.default_rng(epoch).random(s.shape) < 0.3
            empty[:, 0, 0] = True
            s[empty] = [-np.inf, np.inf][epoch % 2]
            v[empty] = 0
            poisoned = v.copy()
            poisoned[empty] = np.nan
            exchange.write(poisoned, s)
            exchange.step()
            assert_merged(exchange, v, s, given)
    comm.status()


def test_the_bits_are_those_of_merge_states(comm: Any) -> None:
    exchange = Exchange(comm, 50)
    v, s = exchange.random(0)
    exchange.write(v, s)
    exchange.step()
    out, lse = pa.merge_states(
        cupy.asarray(v.swapaxes(0, 1)), cupy.asarray(s.swapaxes(0, 1)), out=cupy.empty(v.shape[1:], np.float16)
    )
    for found, found_lse in exchange.results():
        np.testing.assert_array_equal(found, out.get())
        np.testing.assert_array_equal(found_lse, lse.get())


@pytest.mark.parametrize("rows", [1, 64])
def test_a_graph_of_a_step_is_replayed(comm: Any, rows: int) -> None:
    """One graph holds the parts of all ranks."""
    exchange = Exchange(comm, rows)
    exchange.step()
    graph = captured(exchange.step)
    for epoch in range(100):
        if epoch % 10 == 0:
            v, s = exchange.random(epoch)
            exchange.write(v, s)
        graph.launch()
        if epoch % 10 == 9:
            assert_merged(exchange, v, s)
    comm.status()


@pytest.mark.parametrize("rows", [1, 64])
def test_graphs_of_many_steps_are_replayed_each_on_its_stream(comm: Any, rows: int) -> None:
    """Ranks that are an epoch apart, and launches that wait for a rank whose graph comes later."""
    exchange = Exchange(comm, rows)
    graphs = exchange.graphs(32)
    for epoch in range(100):
        v, s = exchange.random(epoch)
        exchange.write(v, s)
        order = range(comm.num_ranks) if epoch % 2 else reversed(range(comm.num_ranks))
        for i in order:
            graphs[i].launch(exchange.streams[i])
            time.sleep(0.001 * (epoch % 5 == 0))
        assert_merged(exchange, v, s)
    comm.status()


def test_attention_over_ranks_that_share_a_card(comm: Any) -> None:
    from tests.parallel.peer_ranks import check_results

    check_results(comm)


def test_a_rank_that_does_not_come() -> None:
    """The launches that wait for it end, and say so; those behind them do not wait."""
    with pytest.raises(TimeoutError, match="rank 1 did not come to rank 0"):
        with parallel.PeerRanks(0, 2, devices=[0, 0], timeout=0.5) as comm:
            exchange = Exchange(comm, 40)
            v, s = exchange.random(0)
            exchange.write(v, s)
            for i in (0, 1):
                exchange.one(i)
            comm.status()
            assert_merged(exchange, v, s)
            begin = time.monotonic()
            for _ in range(10):
                exchange.one(0)
            with pytest.raises(TimeoutError, match="rank 1 did not come to rank 0"):
                comm.status()
            assert 0.5 <= time.monotonic() - begin < 2
            out, lse = exchange.results()[0]
            assert not out.any() and (lse == -np.inf).all()
            with pytest.raises(TimeoutError, match="rank 1 did not come to rank 0"):
                exchange.step()
            cupy.cuda.runtime.deviceSynchronize()
            comm.close()  # which raises, too


def test_lengths_that_differ(comm: Any) -> None:
    exchange = Exchange(comm, 3)
    exchange.write(*exchange.random(0))
    exchange.checksums[1].fill(5)
    exchange.step()
    with pytest.raises(ValueError, match="the lengths of rank 0 are not those of rank 1"):
        comm.status()
    exchange.checksums[1].fill(0)
    exchange.step()
    comm.status()


def run_processes(mode: str) -> list[str]:
    """The last lines of two processes of tests/parallel/peer_ranks.py."""
    command, address = [sys.executable, "-m", "tests.parallel.peer_ranks", mode], free_address()
    running = [
        subprocess.Popen([*command, str(rank), address], cwd=ROOT, stdout=subprocess.PIPE, text=True) for rank in (0, 1)
    ]
    try:
        return [(process.communicate(timeout=240)[0].splitlines() or [""])[-1] for process in running]
    finally:
        for process in running:
            process.kill()


def test_two_processes() -> None:
    """On one card they take turns."""
    assert run_processes("process") == ["{}", "{}"]


def test_a_process_that_ends() -> None:
    """The other one raises TimeoutError, and its card goes on."""
    assert run_processes("lose")[0] == "{}"


@pytest.mark.two_gpus
def test_two_cards_of_one_process() -> None:
    from tests.parallel.peer_ranks import check_results

    with parallel.PeerRanks(0, 2, devices=[0, 1]) as comm:
        check_results(comm)
        exchange = Exchange(comm, 64)
        graphs = exchange.graphs(32)
        for epoch in range(20):
            v, s = exchange.random(epoch)
            exchange.write(v, s)
            for i in (0, 1):
                with exchange.on_device(i):
                    graphs[i].launch(exchange.streams[i])
            assert_merged(exchange, v, s)
        comm.status()
