"""KV sequence parallelism: `python -m bench parallel`, on a machine with one or more NVIDIA GPUs.

split      one card: a table cut into chunks, attended in one call and merged, beside the call that is not cut
decode     long contexts on one card; the part of them that one of 2, 4 or 8 ranks has; and, where there are more cards,
           over all of them, with each communicator
exchange   exchange and merge of partial states by each communicator; on one card between two ranks that share it
model      1M to 16M tokens on 8, 64 and 512 ranks: a MODEL, made of what was measured here, of bandwidths that others
           publish and of a latency that is assumed (SOURCES), not a measurement

Steps are CUDA graphs of several layers, whose time is divided by their number; all ranks begin together. A figure is
the slowest card's. Keys and values are larger than the L2 cache. Each line of JSON has card, versions, date, source
hash and command; the picture is drawn beside them.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

import paged_attn as pa
from paged_attn import parallel
from tests.cases import Case
from tests.gpu.capture import captured

from . import record
from .check import Expected
from .exchange import STEPS, Exchange, measure_exchange
from .session import require_gpu
from .timing import SPIN_CYCLES, Memory, Stopwatch, spread
from .workload import Workload

HEADS, KV_HEADS, DIM = 32, 8, 128
SPLITS = ((1, 131072, 8), (1, 131072, 2), (1, 131072, 32), (1, 16384, 8), (16, 4096, 4))  # requests, tokens, chunks
CONTEXTS = ((1, 131072), (1, 524288), (8, 524288))  # requests, tokens
ROWS = (32, 512, 2048)  # batch * heads of an exchange
LAYERS = 8  # in a graph
PARTS = (2, 4, 8)  # ranks of which one's part is measured on one card
WARM_UPS = 3

SOURCES = """NVLink 4: 450 GB/s each way (H200 data sheet); one 400 Gb/s InfiniBand port a GPU, 50 GB/s (DGX H200 user
guide); ASSUMED, not published or measured: a small all-gather between nodes takes 20 us a doubling of nodes"""
NVLINK, NETWORK = 450e3, 50e3  # bytes a microsecond
NETWORK_LATENCY = 20.0  # microseconds, times log2 of the nodes; assumed
RANKS_A_NODE = 8
MODEL_RANKS, MODEL_TOKENS = (8, 64, 512), tuple(2**power for power in range(20, 25))

Line = dict[str, Any]


def case_of(requests: int, tokens: int) -> Case:
    name = f"{requests}x{tokens // 1024}k"
    return Case(name, (tokens,) * requests, num_qo_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=DIM)


# -- one card: split and merge -----------------------------------------------------------------------------------------


def split_lines(stopwatch: Stopwatch, reps: int) -> Iterator[Line]:
    """A layer; and what is done once a step for all layers: the plan, in chunks with the split of the table."""
    import cupy

    for requests, tokens, chunks in SPLITS:
        work = Workload.build(case_of(requests, tokens), cupy)
        most = len(work.indices)
        whole = pa.BatchDecodeWithPagedKVCache(max_batch_size=requests, max_pages=most)
        parts = pa.BatchDecodeWithPagedKVCache(max_batch_size=requests * chunks, max_pages=most)
        table, tiled = work.table.split(chunks), cupy.concatenate([work.q] * chunks)
        v = cupy.empty((chunks, *work.q.shape), np.float32)
        s = cupy.empty(v.shape[:-1], np.float32)
        out, merged, lse = cupy.empty_like(work.q), cupy.empty_like(work.q), cupy.empty(s.shape[1:], np.float32)

        steps = split_steps(work, whole, parts, table, (tiled, v, s, merged, lse), out, chunks)
        for step in steps.values():
            step()
        for result in (out, merged):
            Expected(work).check(result)
        graphs = {name: captured(step) for name, step in steps.items()}
        times = stopwatch.interleave({name: graph.launch for name, graph in graphs.items()}, reps)
        figures = {name: samples.summary() for name, samples in times.items()}
        ratio = figures["split_run_us"]["median"] / figures["run_us"]["median"]
        yield {"part": "split", "case": work.case.name, "chunks": chunks, **figures, "ratio": round(ratio, 4)}


def split_steps(
    work: Workload, whole: Any, parts: Any, table: pa.PageTable, arrays: Sequence[Any], out: Any, chunks: int
) -> dict[str, Callable[[], None]]:
    """The plan and a layer's run, whole and in chunks."""
    tiled, v, s, merged, lse = arrays

    def plan_parts() -> None:
        work.table.split(chunks, out=table)
        parts.plan(work.kv, table, HEADS)

    def run_parts() -> None:
        parts.run(tiled, work.kv, out=v.reshape(tiled.shape), lse=s.reshape(tiled.shape[:-1]))
        pa.merge_states(v.swapaxes(0, 1), s.swapaxes(0, 1), out=merged, lse=lse)

    return {
        "plan_us": lambda: whole.plan(work.kv, work.table, HEADS),
        "split_plan_us": plan_parts,
        "run_us": lambda: whole.run(work.q, work.kv, out=out),
        "split_run_us": run_parts,
    }


# -- ranks -------------------------------------------------------------------------------------------------------------


class Cards:
    """Cards of this process, each with a stream on which its part of a step is captured and replayed."""

    def __init__(self, indices: Sequence[int]) -> None:
        import cupy

        self.indices = tuple(indices)
        self._streams = []
        for index in self.indices:
            with cupy.cuda.Device(index):
                self._streams.append(cupy.cuda.Stream(non_blocking=True))

    @contextmanager
    def on(self, *numbers: int) -> Iterator[None]:
        """The streams of these cards are the current ones; the last card is the current device."""
        import cupy

        with ExitStack() as stack:
            for number in numbers or range(len(self.indices)):
                stack.enter_context(cupy.cuda.Device(self.indices[number]))
                stack.enter_context(self._streams[number])
            yield

    def times(self, step: Callable[[], object], reps: int) -> dict[str, float]:
        """Microseconds of a step on the slowest card: it is run, captured on all cards, and replayed."""
        import cupy

        with self.on():
            step()
        self.synchronize()
        for number, stream in enumerate(self._streams):
            with self.on(number):
                stream.begin_capture(mode=cupy.cuda.runtime.streamCaptureModeRelaxed)  # as NCCL needs it
        graphs = []
        try:
            with self.on():
                step()
        finally:
            for number, stream in enumerate(self._streams):
                with self.on(number):
                    graphs.append(stream.end_capture())
        samples = []
        with self.on(0):
            memory = Memory()
            memory.spin(1)
        for _ in range(WARM_UPS + reps):
            events = []
            with self.on(0):  # all begin together, behind a spin that hides the host's launches
                memory.spin(SPIN_CYCLES * len(self.indices))
                gate = cupy.cuda.Event(disable_timing=True)
                gate.record()
            for number, (graph, stream) in enumerate(zip(graphs, self._streams, strict=True)):
                with self.on(number):
                    start, end = cupy.cuda.Event(), cupy.cuda.Event()
                    stream.wait_event(gate)
                    start.record()
                    graph.launch(stream)
                    end.record()
                    events.append((start, end))
            self.synchronize()
            samples.append(max(cupy.cuda.get_elapsed_time(*pair) * 1e3 for pair in events))
        return spread(samples[WARM_UPS:])

    def synchronize(self) -> None:
        for number, stream in enumerate(self._streams):
            with self.on(number):
                stream.synchronize()


def rank_tables(work: Workload, num_ranks: int) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(indptr, pages of the pool, last_page_len) of each rank: the pages of a request go to the ranks in turn."""
    pages = [work.indices[i:j] for i, j in itertools.pairwise(work.indptr)]
    tables = []
    for rank in range(num_ranks):
        mine = [ids[rank::num_ranks] for ids in pages]
        counts = np.array([len(ids) for ids in mine])
        holds_last = np.array([(len(ids) - 1) % num_ranks == rank for ids in pages])
        last = np.where(holds_last, work.last_page_len, np.minimum(counts, 1) * work.case.page_size)
        tables.append((np.append(0, np.cumsum(counts)), np.concatenate(mine), last))
    return tables


def place(work: Workload, tables: Any, rank: int, num_ranks: int) -> tuple[pa.PagedKV, pa.PageTable]:
    """A rank's pages in a pool of the current card, and its table."""
    import cupy

    indptr, pages, last = tables[rank]
    storage = (
        cupy.asarray(work.storage[:, cupy.asarray(pages)]) if rank == 0 else cupy.asarray(work.storage.get()[:, pages])
    )

    def to(values: Any) -> Any:
        return cupy.asarray(np.broadcast_to(values, work.case.batch_size).astype(np.int32))

    table = pa.PageTable(
        cupy.asarray(indptr.astype(np.int32)),
        cupy.arange(len(pages), dtype=np.int32),
        to(last),
        page_size=work.case.page_size,
        page_offset=to(rank),
        page_stride=num_ranks,
        total_len=to(work.case.kv_lens[0]),
    )
    return pa.PagedKV(storage[0], storage[1], layout=work.case.layout), table


def a_layer_of(cards: Cards, reps: int, plan: Callable[[], object], run: Callable[[], object]) -> dict[str, float]:
    """Microseconds a layer of a step of LAYERS layers over the same keys, which the L2 cache does not hold."""

    def step() -> None:
        plan()
        for _ in range(LAYERS):
            run()

    return share(cards.times(step, reps), LAYERS)


def one_card_us(cards: Cards, reps: int, work: Workload, kv: Any, table: Any, **results: Any) -> dict[str, float]:
    plan = pa.BatchDecodeWithPagedKVCache(max_batch_size=work.case.batch_size, max_pages=len(work.indices))
    return a_layer_of(
        cards, reps, lambda: plan.plan(kv, table, HEADS), lambda: plan.run(work.q, kv, **results)
    )  # fmt: skip


def ranks_us(comm: Any, cards: Cards, reps: int, work: Workload) -> tuple[dict[str, float], str]:
    """The same over all ranks, whose results are checked; and how their partial results travel."""
    import cupy

    tables = rank_tables(work, comm.num_ranks)
    placed, queries, outs = [], [], []
    for rank in comm.ranks:
        with cards.on(rank):
            placed.append(place(work, tables, rank, comm.num_ranks))
            queries.append(cupy.asarray(work.q.get()))
            outs.append(cupy.empty_like(queries[-1]))
    kvs, rank_page_tables = [kv for kv, _ in placed], [table for _, table in placed]
    with parallel.BatchDecodeWithPagedKVCache(
        comm, max_batch_size=work.case.batch_size, max_pages=len(work.indices)
    ) as plan:
        figures = a_layer_of(
            cards, reps, lambda: plan.plan(kvs, rank_page_tables, HEADS), lambda: plan.run(queries, kvs, out=outs)
        )  # fmt: skip
        plan.status()
        way = plan.way
    for out in outs:
        Expected(work).check(cupy.asarray(out.get()))
    return figures, str(way)


def decode_lines(communicators: dict[str, Any], cards: Cards, reps: int) -> Iterator[Line]:
    import cupy

    first = Cards(cards.indices[:1])
    for requests, tokens in CONTEXTS:
        with first.on():
            work = Workload.build(case_of(requests, tokens), cupy)
            out, partial = cupy.empty_like(work.q), cupy.empty(work.q.shape, np.float32)
            lse = cupy.empty(work.q.shape[:-1], np.float32)
        line: Line = {"part": "decode", "case": work.case.name, "cards": len(cards.indices), "layers": LAYERS}
        line["one_card_us"] = one_card_us(first, reps, work, work.kv, work.table, out=out)
        Expected(work).check(out)
        for num_ranks in PARTS:
            with first.on():
                kv, table = place(work, rank_tables(work, num_ranks), 0, num_ranks)
            line[f"part_of_{num_ranks}_us"] = one_card_us(first, reps, work, kv, table, out=partial, lse=lse)
            del kv, table
        for name, comm in communicators.items():
            figures, line[f"{name}_way"] = ranks_us(comm, cards, reps, work)
            line[f"{name}_us"] = figures
            line[f"{name}_speed_up"] = round(line["one_card_us"]["median"] / figures["median"], 3)
        yield line
        del work
        cupy.get_default_memory_pool().free_all_blocks()


def exchange_lines(communicators: dict[str, Any], cards: Cards, reps: int) -> Iterator[Line]:
    """Peer memory, on one card between two ranks; and on several cards what other communicators take."""
    devices = list(cards.indices) if len(cards.indices) > 1 else list(cards.indices) * 2
    for rows in ROWS:
        line = {"part": "exchange", "cards": len(cards.indices), **measure_exchange(rows, devices, reps)}
        for name, comm in communicators.items():
            if name != "PeerRanks":
                exchange = Exchange(comm, rows // HEADS)
                v, s = exchange.random(0)
                exchange.write(v, s)
                times = cards.times(lambda step=exchange.step: [step() for _ in range(STEPS)], reps)  # type: ignore[misc]
                line[f"{name}_us"], line[f"{name}_way"] = share(times, STEPS), exchange.merge.way
                exchange.merge.status()
                right = np.empty(v.shape[1:], np.float32)
                pa.merge_states(v.swapaxes(0, 1), s.swapaxes(0, 1), out=right)
                for out, _ in exchange.results():
                    np.testing.assert_allclose(out, right, rtol=2e-3, atol=2e-3)
        yield line


def share(figures: dict[str, float], count: int) -> dict[str, float]:
    return {name: round(value / count, 2) for name, value in figures.items()}


# -- the model ---------------------------------------------------------------------------------------------------------


def model_lines(measured: Sequence[Line]) -> Iterator[Line]:
    """A layer of decode of one request, MODELLED: a straight line through what parts of contexts took, the exchange in
    a node as it was measured (or, without several cards, as NVLink's rate and 6 us give it), and between nodes an
    all-gather of one merged state a node."""
    sizes, times = [], []
    for line in measured:
        if line["part"] == "decode" and line["case"].startswith("1x"):
            tokens = int(line["case"][2:-1]) * 1024
            for ranks, name in ((1, "one_card_us"), *((ranks, f"part_of_{ranks}_us") for ranks in PARTS)):
                sizes.append(tokens / ranks)
                times.append(line[name]["median"])
    slope, fixed = np.polyfit(sizes, times, 1)
    state = HEADS * (DIM + 1) * 4  # bytes of one request's partial result
    for ranks, tokens in itertools.product(MODEL_RANKS, MODEL_TOKENS):
        nodes = ranks // RANKS_A_NODE
        local = fixed + slope * tokens / ranks
        within = 6.0 + (RANKS_A_NODE - 1) * state / NVLINK
        between = np.log2(nodes) * NETWORK_LATENCY + (nodes - 1) * state / NETWORK if nodes > 1 else 0.0
        one = fixed + slope * tokens
        yield {
            "part": "model", "case": f"1x{tokens >> 20}M", "ranks": ranks, "local_us": round(local, 1),
            "within_us": round(within, 1), "between_us": round(float(between), 1),
            "layer_us": round(local + within + float(between), 1), "one_card_us": round(one, 1),
            "speed_up": round(one / (local + within + float(between)), 1), "sources": " ".join(SOURCES.split()),
        }  # fmt: skip


# -- the command -------------------------------------------------------------------------------------------------------


def communicators_of(indices: Sequence[int]) -> dict[str, Any]:
    """Communicators of these cards in one process, by name; none for one card. A library that is missing is said."""
    made: dict[str, Any] = {}
    if len(indices) > 1:
        devices = [f"cuda:{index}" for index in indices]
        for name in ("PeerRanks", "NcclRanks"):
            try:
                made[name] = getattr(parallel, name)(0, len(devices), devices=devices)
            except ImportError as error:
                Console(stderr=True).print(f"{name} is left out: {error}")
    return made


def figure(line: Line, name: str) -> str:
    value = line.get(name, "")
    return f"{value['median']:.1f}" if isinstance(value, dict) else str(value)


def tabulate(lines: Sequence[Line], part: str) -> Table:
    """The lines of one part; a column for each figure that one of them has."""
    hidden = ("part", "sources")
    names = list(dict.fromkeys(name for line in lines for name in line if name not in hidden))
    table = Table(*(name.replace("_us", " us").replace("_", " ") for name in names), title=part)
    for line in lines:
        table.add_row(*(figure(line, name) for name in names))
    return table


def plot(lines: Sequence[Line], path: Path, title: str) -> None:
    """What was measured on the left, the model on the right."""
    from matplotlib import pyplot

    canvas, (left, right) = pyplot.subplots(1, 2, figsize=(12, 5), layout="constrained")
    measured = [line for line in lines if line["part"] == "decode"]
    ways = {name for line in measured for name in line if name.endswith("_us")}
    for name in sorted(ways):
        points = [(line["case"], line[name]["median"]) for line in measured if name in line]
        left.plot(*zip(*points, strict=True), marker="o", label=name.removesuffix("_us").replace("_", " "))
    left.set(yscale="log", ylabel="us a layer", title="measured")
    left.legend()
    for ranks in MODEL_RANKS:
        points = [
            (line["case"], line["layer_us"]) for line in lines if line.get("ranks") == ranks and line["part"] == "model"
        ]
        right.plot(*zip(*points, strict=True), marker="s", linestyle="--", label=f"{ranks} ranks")
    right.set(yscale="log", ylabel="us a layer", title="a MODEL, not a measurement")
    right.legend()
    canvas.suptitle(title)
    canvas.savefig(path)
    pyplot.close(canvas)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench parallel", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpus", type=int, help="cards to use (default: all)")
    parser.add_argument("--reps", type=int, default=20, help="replays of each graph (default: 20)")
    parser.add_argument("--json", type=Path, default=record.RESULTS / "parallel.jsonl", metavar="PATH")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> int:
    """Measure, print tables, record a line a figure, and draw."""
    options = parse(arguments)
    cupy = require_gpu()
    environment, console = record.environment(), Console()
    indices = range(cupy.cuda.runtime.getDeviceCount() if options.gpus is None else options.gpus)
    cards, communicators = Cards(indices), communicators_of(indices)
    lines: list[Line] = []
    parts: dict[str, Callable[[], Iterator[Line]]] = {
        "split": lambda: split_lines(Stopwatch(), options.reps),
        "decode": lambda: decode_lines(communicators, cards, options.reps),
        "exchange": lambda: exchange_lines(communicators, cards, options.reps),
        "model": lambda: model_lines(lines),
    }
    for part, measure in parts.items():
        found = list(measure())
        lines += found
        console.print(tabulate(found, part))
        for line in found:
            record.append(options.json, {"bench": "parallel", **line, **environment})
    for comm in communicators.values():
        comm.close()
    plot(
        lines,
        options.json.with_suffix(".png"),
        f"decode of one layer, {environment['card']}, {environment['date'][:10]}",
    )
    console.print(f"{len(lines)} lines appended to {options.json}, picture beside it")
    return 0
