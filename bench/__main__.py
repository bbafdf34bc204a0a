"""`python -m bench NAME`: check each case against the NumPy backend, time it, record it, print a table.

decode    microseconds of run() beside two floors: the fastest plain kernels that read as many contiguous bytes as the
          keys and values seen have, and that read their pages in the order of the table
prefill   microseconds and TFLOP/s of run(), causal
merge     microseconds of merge_states beside the read floor of the states
append    microseconds of append beside a plain copy of as many bytes
host      what plan(), run() and a cache's step cost the host; eager wall time of a layer
cold      seconds until the first result in a new process, with an empty and with a filled compile cache
numerics  the study of errors (its own options: python -m bench numerics --help)

On the device, all is timed by events in turns, after a clean flush of the L2 cache and behind a spin of the stream that
hides the host's part, peers included. Each case is one line of JSON with card, versions, date, source hash and command.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
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
    BENCH_MERGE,
    BENCH_PREFILL,
    BENCH_PREFILL_MORE,
)

from . import plot, record
from .attention import measure_decode, measure_prefill
from .cold import COLD, measure_cold
from .host import HOST, measure_host
from .peers import PEERS, load
from .pools import measure_append, measure_merge
from .session import Session
from .timing import Stopwatch

HEADLINE = "headline"
FLAGS = ("combined", "batch_invariant", "lse")  # in a line only where they are set
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


def _ratio(figures: Figures) -> str:
    return f"{figures['ratio']:.3f}"


def _host(figures: Figures) -> str:
    return f"{figures['run_us']['host']:.1f}"


@dataclass(frozen=True)
class Bench:
    """One benchmark: groups of cases by name, what measures a case, and the columns of its table."""

    groups: Mapping[str, Sequence[Any]]
    measure: Callable[[Any, Session], dict[str, Any]]
    columns: Mapping[str, Callable[[Figures], str]]
    dtype: str = "float16"

    def cases(self) -> dict[str, Any]:
        """All cases by name; a case may be in several groups."""
        return {case.name: case for group in self.groups.values() for case in group}


BENCHES = {
    "decode": Bench(
        {HEADLINE: BENCH_DECODE, **BENCH_DECODE_MORE},
        measure_decode,
        {
            "KV MB": lambda figures: f"{figures['kv_mb']:.1f}",
            "floor us (p10 - p90)": _spread("read_floor_us"),
            "pages us": _median("page_floor_us"),
            "run us (p10 - p90)": _spread("run_us"),
            "run / floor": _ratio,
            "host us": _host,
        },
    ),
    "prefill": Bench(
        {HEADLINE: BENCH_PREFILL, **BENCH_PREFILL_MORE},
        measure_prefill,
        {
            "run us (p10 - p90)": _spread("run_us"),
            "TFLOP/s": lambda figures: f"{figures['tflops']:.0f}",
            "floor us": lambda figures: f"{figures['read_floor_us']['median']:.1f}",
            "host us": _host,
        },
        dtype="bfloat16",
    ),
    "merge": Bench(
        {HEADLINE: BENCH_MERGE},
        measure_merge,
        {
            "read MB": lambda figures: f"{figures['read_mb']:.1f}",
            "floor us (p10 - p90)": _spread("read_floor_us"),
            "run us (p10 - p90)": _spread("run_us"),
            "run / floor": _ratio,
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
            "run / copy": _ratio,
            "host us": _host,
        },
    ),
    "host": Bench({HEADLINE: HOST}, measure_host, {"host us (p10 - p90)": _spread("host_us")}),
    "cold": Bench(
        {HEADLINE: COLD},
        measure_cold,
        {
            "cold cache s": _spread("cold_s"),
            "warm cache s": _spread("warm_s"),
            "import cupy + context s": _spread("import_cupy_and_context_s"),
        },
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark that the command line names. The exit status is 1 where a result of ours was wrong."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["numerics"]:
        from . import numerics

        return numerics.main(given[1:])
    options = parse(given)
    if options.plot:
        return draw(options)
    try:
        import cupy
    except ImportError as error:
        raise SystemExit('bench needs CuPy: pip install -e ".[cuda12]" or ".[cuda13]"') from error
    if not cupy.cuda.is_available():
        raise SystemExit("bench needs an NVIDIA GPU, and CuPy sees none")

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
    table = Table(title=f"{options.bench}, {environment['card']}, {describe(cases[0], options)}")
    for name in (
        "case",
        *bench.columns,
        *(f"{peer.name} us" for peer in peers),
        *(f"run / {peer.name}" for peer in peers),
    ):
        table.add_column(name, no_wrap=name == "case")
    wrong = 0
    with Progress(console=console, transient=True) as progress:
        for case in progress.track(cases, description=options.bench):
            try:
                figures = bench.measure(case, session)
            except AssertionError as error:
                wrong += 1
                progress.console.print(f"[red]{case}: wrong result, no time.[/] {escape(str(error))}")
                continue
            finally:
                cupy.get_default_memory_pool().free_all_blocks()  # what a peer allocates comes from elsewhere
            line = {"bench": options.bench, "case": case.name, **settings(case, options), **figures, **environment}
            record.append(options.json, line)
            if is_noisy(line):
                progress.console.print(
                    f"[yellow]{case}: the read floor is more than {NOISE} x that of a quiet card; run again[/]"
                )
            for name, reason in lacking(figures).items():
                progress.console.print(f"[yellow]{case}: no time of {name}:[/] {escape(reason)}")
            cells = [cell(figures) for cell in bench.columns.values()]
            table.add_row(case.name, *cells, *peer_cells(figures, [peer.name for peer in peers]))
    console.print(table)
    console.print(f"{len(table.rows)} lines appended to {options.json}")
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
    parser.add_argument("--layout", choices=[layout.value for layout in pa.Layout], default="NHD")
    parser.add_argument("--page-size", type=int, default=16)
    parser.add_argument("--dtype", choices=["float16", "bfloat16"], help="default: float16, for prefill bfloat16")
    parser.add_argument("--combined", action="store_true", help="one pool with K and V of a page side by side")
    parser.add_argument("--batch-invariant", action="store_true", help="plans with batch_invariant=True")
    parser.add_argument("--lse", action="store_true", help="have lse written, too")
    parser.add_argument(
        "--peer", type=lambda text: text.split(","), default=[], metavar="NAME,...",
        help=f"time these beside ours, where they can be imported: {', '.join(PEERS)}",
    )  # fmt: skip
    parser.add_argument("--reps", type=int, default=30, help="timed calls a case (default: 30)")
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
    if options.reps < 1 or options.page_size < 1:
        parser.error(f"--reps and --page-size are 1 or more, not {options.reps} and {options.page_size}")
    if options.plot and options.bench not in plot.FIGURES:
        parser.error(f"--plot draws {' and '.join(plot.FIGURES)}, not {options.bench}")
    options.dtype = options.dtype or bench.dtype
    options.json = options.json or record.RESULTS / f"{options.bench}.jsonl"
    return options


def select(bench: Bench, options: argparse.Namespace) -> list[Any]:
    """The chosen cases, each once, with the chosen layout, page size and dtype where a case has such a thing."""
    named = bench.cases()
    chosen = {case.name: case for name in options.cases for case in bench.groups.get(name, ()) or [named[name]]}
    return [
        replace(case, **{name: value for name, value in _pool(options).items() if _has(case, name)})
        for case in chosen.values()
    ]


def _pool(options: argparse.Namespace) -> dict[str, Any]:
    return {"layout": options.layout, "page_size": options.page_size, "dtype": options.dtype}


def _has(case: Any, name: str) -> bool:
    return name in {field.name for field in fields(case)}


def settings(case: Any, options: argparse.Namespace) -> dict[str, Any]:
    """What a line says about how it was measured."""
    pool = {name: value for name, value in _pool(options).items() if _has(case, name)}
    return {**pool, **{name: True for name in FLAGS if _flag(options, name)}, "reps": options.reps}


def _flag(options: argparse.Namespace, name: str) -> bool | None:
    """True or None, as a line has the flag or not."""
    return getattr(options, name) or None


def describe(case: Any, options: argparse.Namespace) -> str:
    """The settings of a case, for a title."""
    return ", ".join(f"{name} {value}" for name, value in settings(case, options).items())


def lacking(figures: Figures) -> dict[str, str]:
    """The peers that have no time, and why."""
    return {name: found["none"] for name, found in figures.get("peers", {}).items() if "none" in found}


def peer_cells(figures: Figures, names: Sequence[str]) -> list[str]:
    """Each peer's microseconds, then our time over each peer's."""
    medians = [figures["peers"][name].get("median") if name in figures.get("peers", {}) else None for name in names]
    times = ["-" if median is None else f"{median:.1f}" for median in medians]
    return times + ["-" if median is None else f"{figures['run_us']['median'] / median:.3f}" for median in medians]


def is_noisy(line: dict[str, Any]) -> bool:
    """Whether a decode line of an H100 shows a read floor that a quiet card does not."""
    if line["bench"] != "decode" or "H100" not in line["card"] or line["case"] not in H100_READ_FLOOR:
        return False
    return line["read_floor_us"]["median"] > NOISE * H100_READ_FLOOR[line["case"]]


def draw(options: argparse.Namespace) -> int:
    """Draw the recorded lines of a benchmark."""
    wanted = {"layout": options.layout, "dtype": options.dtype} | {name: _flag(options, name) for name in FLAGS}
    lines = plot.newest(record.read(options.json), wanted)
    if not lines:
        raise SystemExit(f"{options.json} has no line with {wanted}; measure first, without --plot")
    path = options.json.with_suffix(".png")
    plot.save(plot.FIGURES[options.bench](lines, BENCHES[options.bench].groups, options.page_size), path)
    Console().print(f"{path}: drawn from {len(lines)} lines")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
