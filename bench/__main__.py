"""`python -m bench NAME`: check each case against the NumPy backend, time it, record it, print a table.

decode    microseconds of run() beside two floors: the fastest plain kernels that read as many contiguous bytes as the
          keys and values seen have, and that read their pages in the order of the table
grid      the same for 206 points of batch size, KV heads and kv_len, against 1.5 x floor + 8 us
layers    a step of 32 layers, plan, append and decode in one CUDA graph, beside the sum of the floors
prefill   microseconds and TFLOP/s of run(), causal
merge     microseconds of merge_states beside the read floor of the states
append    microseconds of append beside a plain copy of as many bytes
host      what plan(), run(), one-shot calls and a cache's step cost the host; eager wall time of a layer
cold      seconds until the first result in a new process, with an empty and with a filled compile cache
numerics  the study of errors (its own options: python -m bench numerics --help)
exchange  microseconds of an exchange of partial results between ranks (python -m bench exchange --help)
compare   this checkout beside another one, in turns, case by case (python -m bench compare --help)

On the device, all is timed by events in turns, after a clean flush of the L2 cache and behind a spin of the stream that
hides the host's part, peers included. Each case is one line of JSON with card, versions, date, source hash and command.

"run / bases" is our time over the one that other cases of the run predict: BENCH_BASES of tests/cases.py names those at
whose rate (bytes of decode, operations of prefill) a case should do its work; any other case is compared with itself in
the first of several pools. "run / plain" is the time with --combined, --batch-invariant, --lse or sinks over that of a
run without.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

import paged_attn as pa
from tests.cases import (
    BENCH_APPEND,
    BENCH_DECODE,
    BENCH_DECODE_MORE,
    BENCH_GRID,
    BENCH_LAYERS,
    BENCH_MERGE,
    BENCH_PREFILL,
    BENCH_PREFILL_MORE,
)

from . import compare, exchange, numerics, plot, record
from .attention import BOUND_FLOORS, BOUND_US, measure, measure_point
from .bases import POOL, over_bases
from .cold import COLD, measure_cold
from .host import HOST, measure_host
from .layers import ALLOWED_US, measure_layers
from .peers import PEERS, load
from .session import Session, require_gpu
from .states import measure_append, measure_merge
from .timing import Stopwatch

HEADLINE = "headline"
COMMANDS = {"compare": compare, "exchange": exchange, "numerics": numerics}  # with options of their own
FLAGS = ("combined", "batch_invariant", "lse", "sinks")  # in a line only where they are set
Figures = Mapping[str, Any]

# Read floors of quiet H100 80GB cards, microseconds. A run there whose floor takes NOISE times as long was disturbed.
H100_READ_FLOOR = {
    "bs1_4k_g4": 11.1,
    "bs1_32k_g4": 51.0,
    "bs64_4k_mqa16": 51.0,
    "bs16_4k_g4": 95.1,
    "bs64_2k_g4": 182.6,
    "bs64_4k_g7": 182.6,
    "bs256_512_g8": 182.6,
    "bs64_4k_g8": 355.4,
    "bs64_4k_g5": 355.4,
    "bs128_4k_g4": 701.1,
    "bs32_4k_mha": 701.1,
    "ragged64_g4": 709.0,
}
NOISE = 1.03
WIDTH_OF_FILES = 180


def _spread(name: str) -> Callable[[Figures], str]:
    """A cell with median (10th - 90th percentile) of one of the figures."""

    def cell(figures: Figures) -> str:
        times = figures[name]
        digits = 3 if name.endswith("_s") else 1
        return f"{times['median']:.{digits}f} ({times['p10']:.{digits}f} - {times['p90']:.{digits}f})"

    return cell


def _median(name: str) -> Callable[[Figures], str]:
    """The cell of a median that not every case has."""

    def cell(figures: Figures) -> str:
        return f"{figures[name]['median']:.1f}" if name in figures else ""

    return cell


def _ratio(name: str) -> Callable[[Figures], str]:
    """The cell of a ratio that not every case has."""

    def cell(figures: Figures) -> str:
        return f"{figures[name]:.3f}" if name in figures else ""

    return cell


def _host(figures: Figures) -> str:
    return f"{figures['run_us']['host']:.1f}"


def _kv_mb(figures: Figures) -> str:
    return f"{figures['kv_mb']:.1f}"


COMPARED = {
    "run / bases": _ratio("over_bases"),
    "plain us": _median("plain_us"),
    "run / plain": _ratio("over_plain"),
    "plan us": _median("plan_us"),
    "host us": _host,
}


@dataclass(frozen=True)
class Bench:
    """One benchmark: groups of cases by name, what measures a case, and the columns of its table."""

    groups: Mapping[str, Sequence[Any]]
    measure: Callable[[Any, Session], dict[str, Any]]
    columns: Mapping[str, Callable[[Figures], str]]
    dtype: str = "float16"
    reps: int = 30
    work: str | None = None  # the figure that counts a case's work, for comparison with its bases
    flags: tuple[str, ...] = ()  # those of FLAGS that it knows
    has_peers: bool = True

    def cases(self) -> dict[str, Any]:
        """All cases by name; a case may be in several groups."""
        return {case.name: case for group in self.groups.values() for case in group}


BENCHES = {
    "decode": Bench(
        {HEADLINE: BENCH_DECODE, **BENCH_DECODE_MORE},
        measure,
        {
            "KV MB": _kv_mb,
            "floor us (p10 - p90)": _spread("read_floor_us"),
            "pages us": _median("page_floor_us"),
            "run us (p10 - p90)": _spread("run_us"),
            "run / floor": _ratio("ratio"),
            **COMPARED,
        },
        work="kv_mb",
        flags=FLAGS,
    ),
    "grid": Bench(
        {HEADLINE: BENCH_GRID},
        measure_point,
        {
            "KV MB": _kv_mb,
            "floor us": _median("read_floor_us"),
            "run us (p10 - p90)": _spread("run_us"),
            "run / floor": _ratio("ratio"),
            f"run / ({BOUND_FLOORS} floor + {BOUND_US:.0f} us)": _ratio("over_bound"),
        },
        reps=7,
        flags=FLAGS,
    ),
    "layers": Bench(
        {HEADLINE: BENCH_LAYERS},
        measure_layers,
        {
            "KV MB": _kv_mb,
            "floor of a layer us": _median("read_floor_us"),
            "floors us": lambda figures: f"{figures['floors_us']:.1f}",
            "reads in a graph us": _median("reads_us"),
            "run us (p10 - p90)": _spread("run_us"),
            "run / floors": _ratio("ratio"),
            f"(run - {ALLOWED_US:.0f} us a layer) / floors": _ratio("over_allowed"),
        },
        flags=("combined", "batch_invariant"),
        has_peers=False,
    ),
    "prefill": Bench(
        {HEADLINE: BENCH_PREFILL, **BENCH_PREFILL_MORE},
        measure,
        {
            "run us (p10 - p90)": _spread("run_us"),
            "TFLOP/s": lambda figures: f"{figures['tflops']:.0f}",
            "floor us": _median("read_floor_us"),
            **COMPARED,
        },
        dtype="bfloat16",
        work="gflop",
        flags=FLAGS,
    ),
    "merge": Bench(
        {HEADLINE: BENCH_MERGE},
        measure_merge,
        {
            "read MB": lambda figures: f"{figures['read_mb']:.1f}",
            "floor us (p10 - p90)": _spread("read_floor_us"),
            "run us (p10 - p90)": _spread("run_us"),
            "run / floor": _ratio("ratio"),
            "host us": _host,
        },
    ),
    "append": Bench(
        {HEADLINE: BENCH_APPEND},
        measure_append,
        {
            "written MB": lambda figures: f"{figures['written_mb']:.3f}",
            "copy us (p10 - p90)": _spread("copy_us"),
            "run us (p10 - p90)": _spread("run_us"),
            "run / copy": _ratio("ratio"),
            "host us": _host,
        },
    ),
    "host": Bench({HEADLINE: HOST}, measure_host, {"host us (p10 - p90)": _spread("host_us")}, has_peers=False),
    "cold": Bench(
        {HEADLINE: COLD},
        measure_cold,
        {
            "cold cache s": _spread("cold_s"),
            "warm cache s": _spread("warm_s"),
            "import cupy + context s": _spread("import_cupy_and_context_s"),
        },
        has_peers=False,
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark that the command line names. The exit status is 1 where a result of ours was wrong."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given and given[0] in COMMANDS:
        return COMMANDS[given[0]].main(given[1:])
    options = parse(given)
    if options.plot:
        return draw(options)
    cupy = require_gpu()

    console = Console(width=None if sys.stdout.isatty() else WIDTH_OF_FILES)
    bench = BENCHES[options.bench]
    peers, missing = load(options.peer)
    for name, reason in missing.items():
        console.print(f"[yellow]{name} is left out:[/] {escape(reason)}")
    session = Session(Stopwatch(), peers, options.reps, options.combined, options.batch_invariant, options.lse)
    environment = record.environment()
    for peer in peers:
        environment["versions"] |= peer.versions
    cases = select(bench, options)
    names = [peer.name for peer in peers]
    lines: list[dict[str, Any]] = []
    rows: dict[str, list[str]] = {}
    wrong = 0
    with Progress(console=console, transient=True) as progress:
        for case in progress.track(cases, description=options.bench):
            try:
                figures = bench.measure(case, session)
            except AssertionError as error:
                wrong += 1
                progress.console.print(f"[red]{label(case, options)}: wrong result, no time.[/] {escape(str(error))}")
                continue
            finally:
                cupy.get_default_memory_pool().free_all_blocks()  # what a peer allocates comes from elsewhere
            line = {"bench": options.bench, "case": case.name, **settings(case, options), **figures, **environment}
            if bench.work:
                line |= over_bases(line, lines, bench.work)
            record.append(options.json, line)
            lines.append(line)
            for remark in remarks(line):
                progress.console.print(f"[yellow]{label(case, options)}:[/] {escape(remark)}")
            rows[label(case, options)] = [*(cell(line) for cell in bench.columns.values()), *peer_cells(line, names)]
    headers = [*bench.columns, *(f"{name} us" for name in names), *(f"run / {name}" for name in names)]
    title = f"{options.bench}, {environment['card']}, {describe(cases[0], options)}"
    console.print(tabulate(title, headers, rows))
    if points := [line for line in lines if "over_bound" in line]:
        worst = max(points, key=lambda line: line["over_bound"])
        console.print(f"the worst of {len(points)} points: {worst['case']}, {worst['over_bound']:.3f} x the bound")
    console.print(f"{len(lines)} lines appended to {options.json}")
    return int(wrong > 0)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    groups = "\n".join(f"  {name}: {', '.join(bench.groups)}" for name, bench in BENCHES.items())
    parser.add_argument("bench", choices=BENCHES)
    parser.add_argument(
        "--cases",
        nargs="+",
        metavar="NAME",
        default=[HEADLINE],
        help=f"cases or groups of cases (default: headline)\n{groups}",
    )
    layouts, dtypes = [layout.value for layout in pa.Layout], ["float16", "bfloat16"]
    parser.add_argument("--layout", nargs="+", choices=layouts, default=layouts[:1], help="default: NHD")
    parser.add_argument("--page-size", nargs="+", type=int, default=[16], metavar="TOKENS", help="default: 16")
    parser.add_argument("--dtype", nargs="+", choices=dtypes, help="default: float16, for prefill bfloat16")
    parser.add_argument("--combined", action="store_true", help="one pool with K and V of a page side by side")
    parser.add_argument("--batch-invariant", action="store_true", help="plans with batch_invariant=True")
    parser.add_argument("--lse", action="store_true", help="have lse written, too")
    parser.add_argument("--sinks", action="store_true", help="give every case sinks, as those of gpt_oss have")
    parser.add_argument(
        "--peer", type=lambda text: text.split(","), default=[], metavar="NAME,...",
        help=f"time these beside ours, where they can be imported: {', '.join(PEERS)}",
    )  # fmt: skip
    parser.add_argument("--reps", type=int, help="timed calls a case (default: 30, for the grid 7)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="append here (default: bench/results/BENCH.jsonl)")
    parser.add_argument(
        "--plot", action="store_true", help="measure nothing; draw what is recorded, beside it, as .png"
    )
    options = parser.parse_args(arguments)
    bench = BENCHES[options.bench]
    for what, chosen, known in (
        ("case or group", options.cases, [*bench.groups, *bench.cases()]),
        ("peer", options.peer, list(PEERS)),
    ):
        if unknown := sorted(set(chosen) - set(known)):
            parser.error(f"unknown {what} {', '.join(unknown)}; there are {', '.join(known)}")
    unknown = [f"--{name.replace('_', '-')}" for name in FLAGS if getattr(options, name) and name not in bench.flags]
    unknown += ["--peer"] if options.peer and not bench.has_peers else []
    if unknown:
        parser.error(f"{options.bench} knows no {', '.join(unknown)}")
    options.reps = bench.reps if options.reps is None else options.reps
    options.dtype = options.dtype or [bench.dtype]
    if min(options.reps, *options.page_size) < 1:
        parser.error(f"--reps and --page-size are 1 or more, not {options.reps} and {options.page_size}")
    if options.plot and options.bench not in plot.FIGURES:
        parser.error(f"--plot draws {' and '.join(plot.FIGURES)}, not {options.bench}")
    options.json = options.json or record.RESULTS / f"{options.bench}.jsonl"
    return options


def select(bench: Bench, options: argparse.Namespace) -> list[Any]:
    """The chosen cases, each once in each of the chosen pools (layout, page size and dtype, where a case has them)."""
    named = bench.cases()
    chosen = {case.name: case for name in options.cases for case in bench.groups.get(name, ()) or [named[name]]}
    if options.sinks:
        chosen = {name: replace(case, sinks=True) for name, case in chosen.items()}
    pools = [dict(zip(POOL, values, strict=True)) for values in itertools.product(*(getattr(options, x) for x in POOL))]
    placed = (
        replace(case, **{name: pool[name] for name in pool_of(case)}) for case in chosen.values() for pool in pools
    )
    return list(dict.fromkeys(placed))


def pool_of(case: Any) -> dict[str, Any]:
    """What a case says of its pool."""
    names = {field.name for field in fields(case)}
    return {name: getattr(case, name) for name in POOL if name in names}


def settings(case: Any, options: argparse.Namespace) -> dict[str, Any]:
    """What a line says about how it was measured."""
    flags = {name: True for name in FLAGS if _flag(options, name) or getattr(case, name, False)}
    return {**pool_of(case), **flags, "reps": options.reps}


def _flag(options: argparse.Namespace, name: str) -> bool | None:
    """True or None, as a line has the flag or not."""
    return getattr(options, name) or None


def _varies(options: argparse.Namespace, name: str) -> bool:
    return name in POOL and len(getattr(options, name)) > 1


def describe(case: Any, options: argparse.Namespace) -> str:
    """The settings that all cases share, for a title."""
    found = settings(case, options)
    return ", ".join(f"{name} {value}" for name, value in found.items() if not _varies(options, name))


def label(case: Any, options: argparse.Namespace) -> str:
    """A case's name, and what tells its pool from the others."""
    return ", ".join([case.name, *(f"{value}" for name, value in pool_of(case).items() if _varies(options, name))])


def remarks(line: Figures) -> Iterable[str]:
    """What is to be said about a measurement."""
    if is_noisy(line):
        yield f"the read floor is more than {NOISE} x that of a quiet card; run again"
    if line.get("over_bound", 0) > 1:
        yield f"{line['run_us']['median']} us are above {BOUND_FLOORS} x floor + {BOUND_US:.0f} us"
    for name, reason in lacking(line).items():
        yield f"no time of {name}: {reason}"


def tabulate(title: str, headers: Sequence[str], rows: Mapping[str, Sequence[str]]) -> Table:
    """A table of rows by their names, without the columns that are empty in all of them."""
    filled = [i for i in range(len(headers)) if any(row[i] for row in rows.values())]
    table = Table("case", *(headers[i] for i in filled), title=title)
    table.columns[0].no_wrap = True
    for name, row in rows.items():
        table.add_row(name, *(row[i] for i in filled))
    return table


def lacking(figures: Figures) -> dict[str, str]:
    """The peers that have no time, and why."""
    return {name: found["none"] for name, found in figures.get("peers", {}).items() if "none" in found}


def peer_cells(figures: Figures, names: Sequence[str]) -> list[str]:
    """Each peer's microseconds, then our time over each peer's."""
    medians = [figures["peers"][name].get("median") if name in figures.get("peers", {}) else None for name in names]
    times = ["-" if median is None else f"{median:.1f}" for median in medians]
    return times + ["-" if median is None else f"{figures['run_us']['median'] / median:.3f}" for median in medians]


def is_noisy(line: Figures) -> bool:
    """Whether a decode line of an H100 shows a read floor that a quiet card does not."""
    if line["bench"] != "decode" or "H100" not in line["card"] or line["case"] not in H100_READ_FLOOR:
        return False
    return line["read_floor_us"]["median"] > NOISE * H100_READ_FLOOR[line["case"]]


def draw(options: argparse.Namespace) -> int:
    """Draw the recorded lines of a benchmark, in the first of the chosen pools."""
    wanted = {"layout": options.layout[0], "dtype": options.dtype[0]} | {name: _flag(options, name) for name in FLAGS}
    lines = plot.newest(record.read(options.json), wanted)
    if not lines:
        raise SystemExit(f"{options.json} has no line with {wanted}; measure first, without --plot")
    path = options.json.with_suffix(".png")
    plot.save(plot.FIGURES[options.bench](lines, BENCHES[options.bench].groups, options.page_size[0]), path)
    Console().print(f"{path}: drawn from {len(lines)} lines")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
