"""`python -m bench decode` and `prefill`: check each case against the NumPy backend, time it, record it, print a table.

decode   microseconds of run() beside the read floor: the fastest plain kernel that reads as many bytes as K and V have
prefill  microseconds and TFLOP/s of run(), causal
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import rich
from rich.markup import escape
from rich.table import Table

import paged_attn as pa
from tests.cases import BENCH_DECODE, BENCH_PREFILL, Case

from . import record
from .check import check
from .timing import Stopwatch
from .workload import Workload, causal_flops, kv_bytes

CASES = {"decode": BENCH_DECODE, "prefill": BENCH_PREFILL}

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


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmarks that the command line names. The exit status is 1 where a result was wrong."""
    options = parse(arguments)
    try:
        import cupy
    except ImportError as error:
        raise SystemExit('bench needs CuPy: pip install -e ".[cuda12]" or ".[cuda13]"') from error
    if not cupy.cuda.is_available():
        raise SystemExit("bench needs an NVIDIA GPU, and CuPy sees none")

    stopwatch, environment = Stopwatch(), record.environment()
    table = Table(title=f"{options.bench}, {environment['card']}, {describe(options)}")
    for name in ("case", *COLUMNS[options.bench]):
        table.add_column(name, no_wrap=name == "case")
    wrong = False
    for case in select(CASES[options.bench], options):
        try:
            figures = MEASURE[options.bench](Workload.build(case, cupy), stopwatch, options.reps)
        except AssertionError as error:
            wrong = True
            rich.print(f"[red]{case}: wrong result, no time.[/] {escape(str(error))}")
            continue
        settings = {name: getattr(options, name) for name in ("layout", "page_size", "dtype", "reps")}
        line = {"bench": options.bench, "case": case.name, **settings, **figures, **environment}
        record.append(options.json, line)
        if is_noisy(line):
            rich.print(f"[yellow]{case}: the read floor is more than {NOISE} x that of a quiet card; run again[/]")
        table.add_row(case.name, *(cell(figures) for cell in COLUMNS[options.bench].values()))
    rich.print(table)
    rich.print(f"{len(table.rows)} lines appended to {options.json}")
    return int(wrong)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("bench", choices=CASES)
    parser.add_argument("--cases", nargs="+", metavar="NAME", help="only these cases (default: all)")
    parser.add_argument("--layout", choices=[layout.value for layout in pa.Layout], default="NHD")
    parser.add_argument("--page-size", type=int, default=16)
    parser.add_argument("--dtype", choices=["float16", "bfloat16"], default="float16")
    parser.add_argument("--reps", type=int, default=30, help="timed calls a case (default: 30)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="append here (default: bench/results/BENCH.jsonl)")
    options = parser.parse_args(arguments)
    names = [case.name for case in CASES[options.bench]]
    unknown = sorted(set(options.cases or ()) - set(names))
    if unknown:
        parser.error(f"unknown case {', '.join(unknown)}; the cases of {options.bench} are {', '.join(names)}")
    if options.reps < 1 or options.page_size < 1:
        parser.error(f"--reps and --page-size are 1 or more, not {options.reps} and {options.page_size}")
    options.json = options.json or record.RESULTS / f"{options.bench}.jsonl"
    return options


def select(cases: Sequence[Case], options: argparse.Namespace) -> list[Case]:
    """The chosen cases in the chosen layout, page size and dtype."""
    settings = {"layout": options.layout, "page_size": options.page_size, "dtype": options.dtype}
    return [replace(case, **settings) for case in cases if not options.cases or case.name in options.cases]


def describe(options: argparse.Namespace) -> str:
    return f"page {options.page_size}, {options.layout}, {options.dtype}, median of {options.reps}"


def measure_decode(workload: Workload, stopwatch: Stopwatch, reps: int) -> dict[str, Any]:
    """Microseconds of run() and of the read floor, in turns."""
    case = workload.case
    plan = pa.BatchDecodeWithPagedKVCache()
    plan.plan(workload.kv, workload.table, case.num_qo_heads)
    run = checked_run(workload, plan.run)
    floor = stopwatch.read_floor(workload.storage, kv_bytes(case))
    times = stopwatch.interleave({"read_floor_us": floor, "run_us": run}, reps)
    plan.status()
    figures: dict[str, Any] = {name: samples.summary() for name, samples in times.items()}
    return {
        "kv_mb": round(kv_bytes(case) / 1e6, 1),
        **figures,
        "ratio": round(figures["run_us"]["median"] / figures["read_floor_us"]["median"], 4),
    }


def measure_prefill(workload: Workload, stopwatch: Stopwatch, reps: int) -> dict[str, Any]:
    """Microseconds and TFLOP/s of a causal run()."""
    case = workload.case
    plan = pa.BatchPrefillWithPagedKVCache()
    plan.plan(workload.kv, workload.table, workload.qo_indptr, case.num_qo_heads, causal=True)
    run = checked_run(workload, plan.run)
    figures = stopwatch.interleave({"run_us": run}, reps)["run_us"].summary()
    plan.status()
    return {"run_us": figures, "tflops": round(causal_flops(case) / figures["median"] / 1e6, 1)}


def checked_run(workload: Workload, run: Callable[..., Any]) -> Callable[[], Any]:
    """`run` with its arrays bound, the results of which are right."""
    out, lse = run(workload.q, workload.kv, return_lse=True)
    check(workload, out, lse)
    return partial(run, workload.q, workload.kv, out=out)


def is_noisy(line: dict[str, Any]) -> bool:
    """Whether a decode line of an H100 shows a read floor that a quiet card does not."""
    if line["bench"] != "decode" or "H100" not in line["card"]:
        return False
    return line["read_floor_us"]["median"] > NOISE * H100_READ_FLOOR[line["case"]]


def spread(figures: dict[str, Any], name: str) -> str:
    times = figures[name]
    return f"{times['median']:.1f} ({times['p10']:.1f} - {times['p90']:.1f})"


MEASURE: dict[str, Callable[[Workload, Stopwatch, int], dict[str, Any]]] = {
    "decode": measure_decode,
    "prefill": measure_prefill,
}
COLUMNS: dict[str, dict[str, Callable[[dict[str, Any]], str]]] = {
    "decode": {
        "KV MB": lambda figures: f"{figures['kv_mb']:.0f}",
        "read floor us (p10 - p90)": lambda figures: spread(figures, "read_floor_us"),
        "run us (p10 - p90)": lambda figures: spread(figures, "run_us"),
        "run / floor": lambda figures: f"{figures['ratio']:.3f}",
        "host us": lambda figures: f"{figures['run_us']['host']:.1f}",
    },
    "prefill": {
        "run us (p10 - p90)": lambda figures: spread(figures, "run_us"),
        "TFLOP/s": lambda figures: f"{figures['tflops']:.0f}",
        "host us": lambda figures: f"{figures['run_us']['host']:.1f}",
    },
}

if __name__ == "__main__":
    raise SystemExit(main())
