"""This checkout beside another: `python -m bench compare OTHER_CHECKOUT`, on a machine with an NVIDIA GPU.

Both packages are loaded into one process (checkout.py) and work on the same arrays. Calls are timed in turns, as in all
of bench: cold L2 cache, events behind a spin. A figure is the median of five alternations' medians, and the exit status
is 1 where this checkout is slower by more than 1% or 0.3 us, the larger, or wrong. Times of the host scatter more:
there the bar is 10% or 1 us. OTHER_CHECKOUT is a folder with paged_attn/ and kernels/, older or newer than this one.
"""

from __future__ import annotations

import argparse
import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
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
    AppendCase,
    Case,
    MergeCase,
)

from . import record
from .attention import Call
from .check import Expected
from .checkout import Checkout
from .host import HOST_CALLS, HostCall, host_times
from .pools import Append, Merge
from .session import Session, require_gpu
from .timing import Stopwatch
from .workload import Workload

ALTERNATIONS, REPS = 5, 8
HOST_CALLS_A_ROUND = 200
OTHER, THIS = "other", "this"
FAILURES = ("slower", "wrong")  # verdicts
REFUSALS = (AssertionError, NotImplementedError, TypeError, ValueError)  # a wrong result, or a case that is not served


@dataclass(frozen=True)
class Plan:
    """What plan() costs the device: a case, of which run() is not timed."""

    case: Case

    @property
    def name(self) -> str:
        return f"plan_{self.case.name}"


Comparable = Case | Plan | MergeCase | AppendCase | HostCall
Timed = Mapping[str, Callable[[], Any]]  # a call by each library, by OTHER and THIS


def _in_bfloat16(cases: Sequence[Case]) -> tuple[Case, ...]:
    return tuple(replace(case, dtype="bfloat16") for case in cases)


def _on_large_pages(cases: Sequence[Case]) -> tuple[Case, ...]:
    return tuple(replace(case, name=f"{case.name}_page64_HND", layout="HND", page_size=64) for case in cases)


_GPT_OSS = (*BENCH_DECODE_MORE["gpt_oss"], *BENCH_PREFILL_MORE["gpt_oss"])
_PREFILL = _in_bfloat16(BENCH_PREFILL)
GROUPS: dict[str, tuple[Comparable, ...]] = {
    "decode": BENCH_DECODE,
    "prefill": (*_PREFILL, *_on_large_pages(_PREFILL)),
    "decode_more": tuple(
        itertools.chain.from_iterable(BENCH_DECODE_MORE[name] for name in ("heads", "q_len", "window", "hostile"))
    ),
    "prefill_more": _in_bfloat16(
        tuple(
            case
            for name in ("group", "short", "head_dim", "window")
            for case in BENCH_PREFILL_MORE[name]
            if case not in BENCH_PREFILL
        )
    ),
    "gpt_oss": (
        *(replace(case, name=f"{case.name}_without_sinks", sinks=False) for case in _GPT_OSS),
        *_GPT_OSS,
    ),
    "plan": tuple(map(Plan, (*BENCH_DECODE, *_PREFILL))),
    "merge": tuple(replace(case, name=f"merge_{case.name}") for case in BENCH_MERGE),
    "append": tuple(replace(case, name=f"append_{case.name}") for case in BENCH_APPEND),
    "host": HOST_CALLS,
}
DEFAULT = ("decode", "prefill")


# -- verdicts ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bar:
    """What a difference has to exceed, the larger of both, to count."""

    share: float
    microseconds: float

    def verdict(self, other_us: float, this_us: float) -> str:
        allowed = max(self.share * other_us, self.microseconds)
        if this_us - other_us > allowed:
            return "slower"
        return "faster" if other_us - this_us > allowed else "as fast"


DEVICE_BAR, HOST_BAR = Bar(0.01, 0.3), Bar(0.1, 1.0)


def compare(case: Comparable, other: Checkout, session: Session, alternations: int) -> dict[str, Any]:
    """Median microseconds of both, of each alternation and of all; their ratio; the verdict.

    Where the other checkout has no right result, the reason; where this one has none, one of REFUSALS is raised.
    """
    call_of = _on_inputs(case, session)
    calls = {THIS: call_of(pa)}  # first: what is expected is computed, and imported, while no other package is active
    try:
        with other.active() as library:
            call = call_of(library)
    except REFUSALS as error:
        return {"verdict": "not compared", "none": _first_line(error)}
    on_host = isinstance(case, HostCall)
    calls = {OTHER: call if on_host else other.inside(call), **calls}
    rounds: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(alternations):
        in_turn = dict(reversed(calls.items())) if i % 2 else calls
        for name, time in (_host_round(in_turn, other) if on_host else _device_round(in_turn, session)).items():
            rounds[name].append(time)
    medians = {name: round(float(np.median(times)), 2) for name, times in rounds.items()}
    return {
        **{f"{name}_us": {"median": median, "alternations": rounds[name]} for name, median in medians.items()},
        "ratio": round(medians[THIS] / medians[OTHER], 4),
        "verdict": (HOST_BAR if on_host else DEVICE_BAR).verdict(medians[OTHER], medians[THIS]),
    }


def _on_inputs(case: Comparable, session: Session) -> Callable[[Any], Callable[[], Any]]:
    """Makes the arrays of a case, and gives what makes a library's call on them; AssertionError if that is wrong."""
    import cupy

    if isinstance(case, HostCall):
        return case.prepare
    if isinstance(case, Case | Plan):
        workload = Workload.build(case.case if isinstance(case, Plan) else case, cupy)
        build = partial(Call.build, workload, Expected(workload), session)
        return lambda library: build(library).plan if isinstance(case, Plan) else build(library).run
    inputs = Merge.build(case, cupy) if isinstance(case, MergeCase) else Append.build(case, cupy)

    def checked(library: Any) -> Callable[[], Any]:
        run = inputs.run(library)
        result = run()
        inputs.check(*result) if isinstance(inputs, Merge) else inputs.check()
        return run

    return checked


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


def _device_round(calls: Timed, session: Session) -> dict[str, float]:
    times = session.stopwatch.interleave(calls, session.reps)
    return {name: float(np.median(of_one.device)) for name, of_one in times.items()}


def _host_round(calls: Timed, other: Checkout) -> dict[str, float]:
    times = {}
    for name, call in calls.items():
        with other.active() if name == OTHER else nullcontext():
            times[name] = float(np.median(host_times(call, HOST_CALLS_A_ROUND)))
    return times


# -- the command -------------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str]) -> int:
    """Compare, print a table, record a line a case."""
    options = parse(arguments)
    cupy = require_gpu()
    try:
        other = Checkout(options.other)
    except ImportError as error:
        raise SystemExit(f"{error}") from error
    environment = record.environment() | {"other_source_hash": record.source_hash(options.other.resolve())}
    session, settings = Session(Stopwatch(), reps=options.reps), {"alternations": options.alternations}
    found: dict[str, dict[str, Any]] = {}
    with Progress(console=(console := Console()), transient=True) as progress:
        for case in progress.track(select(options.cases), description="compare"):
            try:
                found[case.name] = compare(case, other, session, **settings)
            except REFUSALS as error:
                found[case.name] = {"verdict": "wrong", "none": _first_line(error)}
            cupy.get_default_memory_pool().free_all_blocks()
            line = {"bench": "compare", "case": case.name, **settings, "reps": options.reps, **found[case.name]}
            record.append(options.json, line | environment)
    console.print(tabulate(found, environment))
    verdicts = Counter(figures["verdict"] for figures in found.values())
    console.print(", ".join(f"{count} {verdict}" for verdict, count in verdicts.items()))
    console.print(f"{len(found)} lines appended to {options.json}")
    return int(any(verdicts[failure] for failure in FAILURES))


def tabulate(found: Mapping[str, Mapping[str, Any]], environment: Mapping[str, Any]) -> Table:
    """A row a case: both times, or why there is none."""
    other, this = (environment[f"{prefix}source_hash"][:8] for prefix in ("other_", ""))
    headers = ("case", f"other us ({other})", f"this us ({this})", "this / other", "verdict")
    table = Table(*headers, title=f"compare, {environment['card']}")
    for name, figures in found.items():
        verdict = figures["verdict"]
        if "none" in figures:
            cells = ["-", "-", "-", f"{verdict}: {figures['none']}"]
        else:
            times = (f"{figures[f'{which}_us']['median']:.2f}" for which in (OTHER, THIS))
            cells = [*times, f"{figures['ratio']:.3f}", verdict]
        table.add_row(*map(escape, (name, *cells)), style="red" if verdict in FAILURES else None)
    return table


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line behind `python -m bench compare`."""
    parser = argparse.ArgumentParser(
        prog="python -m bench compare", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("other", type=Path, metavar="OTHER_CHECKOUT", help="a folder with paged_attn/ and kernels/")
    parser.add_argument(
        "--cases", nargs="+", metavar="NAME", default=list(DEFAULT),
        help=f"cases, or groups of cases: {', '.join(GROUPS)}; or all (default: {' '.join(DEFAULT)})",
    )  # fmt: skip
    parser.add_argument("--alternations", type=int, default=ALTERNATIONS, help=f"default: {ALTERNATIONS}")
    parser.add_argument("--reps", type=int, default=REPS, help=f"calls of each in an alternation (default: {REPS})")
    parser.add_argument(
        "--json", type=Path, metavar="PATH", default=record.RESULTS / "compare.jsonl",
        help="append here (default: bench/results/compare.jsonl)",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    known = ["all", *GROUPS, *_by_name()]
    if unknown := sorted(set(options.cases) - set(known)):
        parser.error(f"unknown case or group {', '.join(unknown)}; there are {', '.join(known)}")
    if min(options.alternations, options.reps) < 1:
        parser.error(f"--alternations and --reps are 1 or more, not {options.alternations} and {options.reps}")
    return options


def select(names: Sequence[str]) -> list[Comparable]:
    """The cases of the names and groups, each once."""
    groups: dict[str, tuple[Comparable, ...]] = {**GROUPS, "all": tuple(_by_name().values())}
    chosen = itertools.chain.from_iterable(groups.get(name) or (_by_name()[name],) for name in names)
    return list({case.name: case for case in chosen}.values())


def _by_name() -> dict[str, Comparable]:
    return {case.name: case for case in itertools.chain.from_iterable(GROUPS.values())}
