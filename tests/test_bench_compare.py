"""Two checkouts in one process (bench/compare.py), on NumPy: loading, sharing of arrays, verdicts, exit status."""

import shutil
import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import paged_attn as pa
from bench import compare, record
from bench.checkout import Checkout
from bench.compare import Bar, Plan
from bench.host import HostCall
from bench.session import Session
from bench.timing import Stopwatch, Times
from tests.cases import BENCH_DECODE, AppendCase, Case, MergeCase, build

DECODE = Case("small decode", (70, 0, 33), num_qo_heads=4, num_kv_heads=2, head_dim=32, q_len=2)
PREFILL = Case("small prefill", (70, 33), q_lens=(9, 33), num_qo_heads=4, num_kv_heads=2, head_dim=32, window_left=20)
MERGE = MergeCase("small merge", 70, 3, num_heads=3, head_dim=16)
APPEND = AppendCase("small append", 42, 3, num_kv_heads=2, head_dim=16, page_size=5)


class ScriptedStopwatch(Stopwatch):
    """Calls everything once, and says how long it took by a script: one round of times for each alternation."""

    def __init__(self, **rounds: list[float]) -> None:
        self.rounds, self.orders = rounds, []  # type: ignore[var-annotated]

    def interleave(self, calls: Mapping[str, Callable[[], object]], reps: int) -> dict[str, Times]:
        for call in calls.values():
            call()
        self.orders.append(tuple(calls))
        return {name: Times((self.rounds[name][len(self.orders) - 1],) * reps, (0.0,)) for name in calls}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkout of its own with our sources."""
    for name in record.SOURCES:
        shutil.copytree(record.ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


@pytest.fixture
def numpy_as_cupy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", np)


def append(path: Path, line: str) -> None:
    with path.open("a") as file:
        file.write(f"{line}\n")


# -- loading -----------------------------------------------------------------------------------------------------------


def test_another_checkout_works_beside_ours(folder: Path) -> None:
    append(folder / "paged_attn/__init__.py", '__version__ = "0.0.0+other"')
    ours = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "paged_attn"}
    inputs = build(Case("beside", (20, 3)))
    right = pa.decode(inputs.q, inputs.kv(), inputs.table())
    with Checkout(folder).active() as other:
        assert other.__version__ == "0.0.0+other" != pa.__version__
        assert import_module("paged_attn.compile").kernel_dir() == folder / "kernels"
        kv = other.PagedKV(inputs.k_pages, inputs.v_pages, layout="NHD")
        table = other.PageTable(inputs.indptr, inputs.indices, inputs.last_page_len, page_size=16)
        np.testing.assert_array_equal(other.decode(inputs.q, kv, table), right)
    assert ours.items() <= sys.modules.items()


def test_what_another_checkout_imports_late_is_its_own(folder: Path) -> None:
    append(folder / "paged_attn/backends/reference.py", 'raise ImportError("the other one")')
    inputs = build(Case("late", (20, 3)))
    pa.decode(inputs.q, inputs.kv(), inputs.table())  # ours has long been imported
    other = Checkout(folder)
    with other.active() as library:
        kv = library.PagedKV(inputs.k_pages, inputs.v_pages, layout="NHD")
        table = library.PageTable(inputs.indptr, inputs.indices, inputs.last_page_len, page_size=16)
    with pytest.raises(ImportError, match="the other one"):
        other.inside(lambda: library.decode(inputs.q, kv, table))()
    pa.decode(inputs.q, inputs.kv(), inputs.table())


def test_a_folder_without_the_package_is_no_checkout(tmp_path: Path) -> None:
    with pytest.raises(ImportError, match="is no checkout"):
        Checkout(tmp_path)


# -- comparing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("other_us", "this_us", "verdict"),
    [
        (100.0, 101.0, "as fast"),
        (100.0, 101.1, "slower"),
        (100.0, 98.9, "faster"),
        (10.0, 10.2, "as fast"),  # below 30 us, 0.3 us is more than 1%
        (10.0, 10.5, "slower"),
        (10.0, 9.5, "faster"),
    ],
)
def test_a_difference_counts_beyond_the_larger_bar(other_us: float, this_us: float, verdict: str) -> None:
    assert Bar(0.01, 0.3).verdict(other_us, this_us) == verdict


@pytest.mark.usefixtures("numpy_as_cupy")
@pytest.mark.parametrize("case", [DECODE, PREFILL, Plan(DECODE), MERGE, APPEND], ids=lambda case: case.name)
def test_two_checkouts_in_turns(case: Any, folder: Path) -> None:
    stopwatch = ScriptedStopwatch(other=[40.0, 90.0, 50.0], this=[80.0, 50.0, 40.0])
    found = compare.compare(case, Checkout(folder), Session(stopwatch, reps=2), alternations=3)
    assert stopwatch.orders == [("other", "this"), ("this", "other"), ("other", "this")]
    assert found["other_us"] == {"median": 50.0, "alternations": [40.0, 90.0, 50.0]}
    assert (found["this_us"]["median"], found["ratio"], found["verdict"]) == (50.0, 1.0, "as fast")


@pytest.mark.usefixtures("numpy_as_cupy")
def test_a_wrong_result_has_no_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    append(folder / "paged_attn/__init__.py", "append = lambda *arrays: None")
    other, session = Checkout(folder), Session(ScriptedStopwatch(other=[1.0], this=[1.0]), reps=1)
    found = compare.compare(APPEND, other, session, alternations=1)
    assert found["verdict"] == "not compared" and "AssertionError" in found["none"]
    monkeypatch.setattr(pa, "append", other.library.append)
    with pytest.raises(AssertionError):
        compare.compare(APPEND, other, session, alternations=1)


def test_calls_of_the_host_have_a_bar_of_their_own(
    folder: Path, monkeypatch: pytest.MonkeyPatch, numpy_as_cupy: None
) -> None:
    times = iter([20.0, 21.5, 21.5, 20.0])
    monkeypatch.setattr(compare, "host_times", lambda call, calls: [next(times)])
    call = HostCall("a call", lambda library: lambda: library)
    found = compare.compare(call, Checkout(folder), Session(ScriptedStopwatch()), alternations=2)
    assert (found["other_us"]["median"], found["this_us"]["median"], found["verdict"]) == (20.0, 21.5, "as fast")


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("this_us", "status"), [(10.2, 0), (10.4, 1)])
def test_the_exit_status_says_whether_a_case_is_slower(
    this_us: float, status: int, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "cupy", np)
    pool = SimpleNamespace(free_all_blocks=lambda: None)
    monkeypatch.setattr(compare, "require_gpu", lambda: SimpleNamespace(get_default_memory_pool=lambda: pool))
    monkeypatch.setattr(record, "environment", lambda: {"card": "a card", "source_hash": record.source_hash()})
    monkeypatch.setattr(compare, "Stopwatch", lambda: ScriptedStopwatch(other=[10.0] * 5, this=[this_us] * 5))
    monkeypatch.setattr(compare, "GROUPS", {"decode": (DECODE,), "merge": (MERGE,)})
    path = folder / "compare.jsonl"
    assert compare.main([f"{folder}", "--cases", "decode", "--json", f"{path}"]) == status
    said = capsys.readouterr().out
    assert f"1 {'slower' if status else 'as fast'}" in said and "small decode" in said
    (line,) = record.read(path)
    assert (line["case"], line["ratio"]) == ("small decode", this_us / 10)
    assert line["source_hash"] == line["other_source_hash"]  # a copy of this checkout


def test_the_command_line_takes_cases_and_groups() -> None:
    chosen = compare.select(compare.parse(["x", "--cases", "decode", "merge_64x16", "bs1_4k_g4"]).cases)
    assert chosen == [*BENCH_DECODE, compare.GROUPS["merge"][0]]
    by_name: dict[str, Any] = {}
    for group in compare.GROUPS.values():
        for case in group:
            assert by_name.setdefault(case.name, case) == case, "two cases have one name"
    assert compare.select(["all"]) == list(by_name.values())
    for arguments in (["x", "--cases", "nobody"], ["x", "--reps", "0"], []):
        with pytest.raises(SystemExit) as stopped:
            compare.parse(arguments)
        assert stopped.value.code == 2
