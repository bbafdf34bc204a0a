"""The parts of bench/ that need no GPU: counts of work, checks of results, peers, figures, records and pictures."""

import itertools
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import paged_attn as pa
from bench import cold, first_result, layers, parallel, peers, plot, record
from bench.__main__ import (
    BENCHES,
    describe,
    is_noisy,
    label,
    lacking,
    main,
    parse,
    peer_cells,
    remarks,
    select,
    settings,
    tabulate,
)
from bench.attention import measure, measure_point
from bench.bases import over_bases
from bench.check import MOST_KEYS, Expected
from bench.pools import Append, Merge
from bench.session import Session
from bench.timing import Stopwatch, Times
from bench.workload import TILE, Workload, causal_flops, kv_bytes, random_normal, sampled_queries
from tests.cases import (
    BENCH_BASES,
    BENCH_DECODE,
    BENCH_DECODE_MORE,
    AppendCase,
    Case,
    MergeCase,
    with_sinks,
)

ATTENTION = ("decode", "grid", "layers", "prefill")
SMALL = Case("small", (70, 33, 16), q_lens=(9, 33, 1), num_qo_heads=4, num_kv_heads=2, head_dim=32)


def attend(workload: Workload) -> tuple[np.ndarray, np.ndarray]:
    window = workload.case.window_left
    return pa.prefill(workload.q, workload.qo_indptr, workload.kv, workload.table, window_left=window, return_lse=True)


def line(case: str = "bs1_4k_g4", **changes: Any) -> dict[str, Any]:
    """A line of decode, as main() writes it."""
    settings = {"bench": "decode", "case": case, "layout": "NHD", "page_size": 16, "dtype": "float16"}
    figures = {"kv_mb": 16.8, "gflop": 0.067, "run_us": {"median": 14.0}, "read_floor_us": {"median": 11.0}}
    return settings | figures | {"card": "H100", "date": "2026-01-01"} | changes


@pytest.mark.parametrize("window_left", [-1, 0, 7, 40, 1000])
def test_work_counts_the_visible_keys(window_left: int) -> None:
    case = replace(SMALL, kv_lens=(70, 33, 0, 16), q_lens=(9, 33, 0, 1), window_left=window_left)
    pairs = tokens = 0
    for q_len, kv_len in zip(case.queries, case.kv_lens, strict=True):
        query, key = np.ogrid[kv_len - q_len : kv_len, :kv_len]
        visible = (key <= query) & ((window_left < 0) | (key >= query - window_left))
        pairs, tokens = pairs + visible.sum(), tokens + visible.any(axis=0).sum()
    assert causal_flops(case) == 4 * case.head_dim * case.num_qo_heads * pairs
    assert kv_bytes(case) == 2 * 2 * case.head_dim * case.num_kv_heads * tokens


@pytest.mark.parametrize("bench", ATTENTION)
def test_a_name_is_one_case(bench: str) -> None:
    for case in itertools.chain.from_iterable(BENCHES[bench].groups.values()):
        assert BENCHES[bench].cases()[case.name] == case
        assert all(q_len <= kv_len or not kv_len for q_len, kv_len in zip(case.queries, case.kv_lens, strict=True))
        assert case.is_decode or bench == "prefill"


def test_the_bases_of_a_case_are_measured_before_it() -> None:
    for group in (*BENCHES["decode"].groups.values(), *BENCHES["prefill"].groups.values()):
        names = [case.name for case in group]
        for i, name in enumerate(names):
            assert set(BENCH_BASES.get(name, ())) <= set(names[:i])


def test_sampled_queries_lie_in_the_case() -> None:
    for case in (case for name in ("decode", "prefill") for case in BENCHES[name].cases().values()):
        queries = list(sampled_queries(case))
        assert {0, case.batch_size - 1} <= {request for request, _ in queries}
        assert all(0 <= query < case.queries[request] for request, query in queries)


def test_random_numbers_fill_more_than_a_tile() -> None:
    numbers = random_normal(np, (2, TILE // 2 + 5, 1), np.dtype(np.float16), seed=0)
    assert numbers.shape == (2, TILE // 2 + 5, 1) and numbers.dtype == np.float16
    flat = numbers.reshape(-1).astype(np.float32)
    assert np.array_equal(flat[TILE:], flat[: len(flat) - TILE])
    assert abs(flat.mean()) < 0.01 and abs(flat.std() - 1) < 0.01


@pytest.mark.parametrize("layout", pa.Layout)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("combined", [False, True])
def test_pieces_are_the_pages_of_k_and_v_in_the_order_of_the_table(layout: str, dtype: str, combined: bool) -> None:
    case = Case("pieces", (70, 0, 33), layout=layout, dtype=dtype)
    workload = Workload.build(case, np, combined=combined)
    order, piece_bytes = workload.pieces()
    pieces = workload.storage.view(np.uint8).reshape(-1, piece_bytes)[order]
    pages = [pool[page] for page in workload.indices for pool in (workload.kv.k_pages, workload.kv.v_pages)]
    np.testing.assert_array_equal(pieces, [np.ascontiguousarray(page).view(np.uint8).ravel() for page in pages])


@pytest.mark.parametrize("layout", pa.Layout)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("combined", [False, True])
def test_right_results_pass_the_check(layout: str, dtype: str, combined: bool) -> None:
    case = replace(SMALL, layout=layout, dtype=dtype)
    workload = Workload.build(case, np, combined=combined)
    assert Expected(workload).check(*attend(workload)) == len(list(sampled_queries(SMALL)))
    dense = workload.contiguous()
    for request, (start, kv_len) in enumerate(zip((0, 70, 103), case.kv_lens, strict=True)):
        for array, tokens in zip(dense, workload.tokens(request, kv_len), strict=True):
            np.testing.assert_array_equal(array[start : start + kv_len], tokens)


def test_empty_requests_and_windows_pass_the_check() -> None:
    workload = Workload.build(Case("mixed", (0, 70, 0, 33), q_lens=(1, 9, 1, 1), window_left=10), np)
    out, lse = attend(workload)
    assert Expected(workload).check(out, lse) > 3
    lse[0] = 0.0
    with pytest.raises(AssertionError, match="-inf"):
        Expected(workload).check(out, lse)


def test_a_long_request_is_checked_for_some_of_its_heads() -> None:
    workload = Workload.build(Case("long", (MOST_KEYS // 2,), num_qo_heads=12, num_kv_heads=6, head_dim=16), np)
    out, lse = attend(workload)
    Expected(workload).check(out, lse)
    with pytest.raises(AssertionError, match="request 0, query 0"):
        Expected(workload).check(out * 1.01)


def test_pages_are_shuffled() -> None:
    indices = Workload.build(SMALL, np).table.indices
    assert sorted(indices) == list(range(len(indices))) != indices.tolist()


def test_a_case_with_sinks_is_checked_for_them() -> None:
    workload = Workload.build(replace(SMALL, q_lens=(9, 3, 1), kv_lens=(70, 0, 16), sinks=True), np)
    out, lse = attend(workload)
    with pytest.raises(AssertionError):
        Expected(workload).check(out, lse)
    Expected(workload).check(*with_sinks(out, lse, workload.sinks))


@pytest.mark.parametrize("wrong", ["one row", "every lse", "one lse"])
def test_wrong_results_fail_the_check(wrong: str) -> None:
    workload = Workload.build(SMALL, np)
    out, lse = attend(workload)
    if wrong == "one row":
        out[-1] *= 1.01
    elif wrong == "every lse":
        lse += 1e-3
    else:
        lse[5, 1] = np.nan
    with pytest.raises(AssertionError):
        Expected(workload).check(out, lse)


def test_times_are_summarised_by_their_spread() -> None:
    times = Times(device=(*range(1, 101), 10_000.0), host=(3.0, 1.0, 2.0))
    assert times.summary() == {"median": 51, "p10": 11, "p90": 91, "min": 1, "host": 2}


# -- pools -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_states", [2, 5])
def test_merges_are_checked(num_states: int) -> None:
    inputs = Merge.build(MergeCase("small", 70, num_states, num_heads=3, head_dim=16), np)
    out, lse = inputs.run()()
    inputs.check(out, lse)
    out[-1, 1] *= 1.01
    with pytest.raises(AssertionError, match="rows are off"):
        inputs.check(out)


@pytest.mark.parametrize("layout", pa.Layout)
def test_appends_are_checked(layout: str) -> None:
    inputs = Append.build(AppendCase("small", 42, 3, num_kv_heads=2, head_dim=16, page_size=5, layout=layout), np)
    np.testing.assert_array_equal(inputs.slots, inputs.table.slots(inputs.batch_indices, inputs.positions))
    with pytest.raises(AssertionError, match="42 of 42 tokens of k"):
        inputs.check()
    pa.append(inputs.kv, inputs.slots, inputs.k, inputs.v)
    inputs.check()
    with pytest.raises(AssertionError, match="42 of 42"):  # what the check found is gone for the next one
        inputs.check()
    pa.append(inputs.kv, inputs.slots, inputs.k, inputs.v)
    unused = np.setdiff1d(np.arange(inputs.kv.num_pages * 5), inputs.slots)[:1]
    pa.append(inputs.kv, unused, inputs.k[:1], inputs.v[:1])
    with pytest.raises(AssertionError, match="32 elements of k were written beside"):
        inputs.check()


# -- peers -------------------------------------------------------------------------------------------------------------


class FakePeer(peers.Peer):
    """Doubles its input, as a right, a wrong and a refusing kernel."""

    name, versions = "fake", {"fake": "1"}

    def decode(self, workload: Any) -> peers.Kernels:
        return {
            "slow": lambda: lambda: 2 * workload,
            "fast": lambda: lambda: 2 * workload,
            "wrong": lambda: lambda: 3 * workload,
            "refusing": self.refuse,
        }

    def refuse(self) -> peers.Run:
        raise RuntimeError("no kernel for this\nand a long story")

    def to_cupy(self, result: Any) -> Any:
        return result


class FakeStopwatch(Stopwatch):
    """Says that everything takes as long as its name has letters."""

    def __init__(self) -> None: ...

    def read_floor(self, *buffer: Any, **options: Any) -> Callable[[], None]:
        return lambda: None

    def interleave(self, calls: Mapping[str, Callable[[], object]], reps: int) -> dict[str, Times]:
        for call in calls.values():
            call()
        return {name: Times((float(len(name.rpartition("\0")[2])),) * reps, (1.0,) * reps) for name in calls}


@pytest.fixture
def numpy_as_cupy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measurements take NumPy for CuPy, and the NumPy backend for ours."""
    monkeypatch.setitem(sys.modules, "cupy", np)
    monkeypatch.setattr(layers, "captured", lambda work: SimpleNamespace(launch=work))
    monkeypatch.setattr(pa, "status", lambda: None)


@pytest.mark.usefixtures("numpy_as_cupy")
@pytest.mark.parametrize("case", [SMALL, replace(SMALL, q_lens=None, q_len=2), replace(SMALL, q_lens=None)], ids=str)
def test_a_session_with_options_is_timed_beside_a_plain_one(case: Case) -> None:
    plain = measure(case, Session(FakeStopwatch()))
    assert plain.keys() >= {"read_floor_us", "run_us", "plan_us", "ratio", "tflops"}
    assert ("page_floor_us" in plain) == case.is_decode and "plain_us" not in plain
    found = measure(case, Session(FakeStopwatch(), with_lse=True, combined=True))
    assert (found["plain_us"]["median"], found["run_us"]["median"], found["over_plain"]) == (8, 6, 0.75)


@pytest.mark.usefixtures("numpy_as_cupy")
def test_a_case_with_sinks_is_timed_beside_one_without(monkeypatch: pytest.MonkeyPatch) -> None:
    given = []

    class TakesSinks(pa.BatchDecodeWithPagedKVCache):
        def run(self, q: Any, kv: pa.PagedKV, *, sinks: Any = None, **options: Any) -> Any:
            given.append(sinks is not None)
            result = super().run(q, kv, **options)
            if sinks is None or not options.get("return_lse"):
                return result
            return tuple(map(np.ndarray.astype, with_sinks(*result, sinks), (q.dtype, np.float32)))

    monkeypatch.setattr(pa, "BatchDecodeWithPagedKVCache", TakesSinks)
    found = measure(replace(SMALL, q_lens=None, sinks=True), Session(FakeStopwatch(), reps=1))
    assert given == [True, False, True, False]  # checked, then timed
    assert found["over_plain"] == 0.75


@pytest.mark.usefixtures("numpy_as_cupy")
def test_a_point_is_set_against_its_bound() -> None:
    figures = measure_point(replace(SMALL, q_lens=None), Session(FakeStopwatch(), reps=1))
    assert figures["over_bound"] == round(6 / (1.5 * len("read_floor_us") + 8), 4)


@pytest.mark.usefixtures("numpy_as_cupy")
def test_layers_are_set_against_the_sum_of_their_floors() -> None:
    case = Case("layers", (33, 70), num_qo_heads=4, num_kv_heads=2, head_dim=32)
    figures = layers.measure_layers(case, Session(FakeStopwatch(), reps=1))
    assert figures["floors_us"] == layers.LAYERS * len("read_floor_us")
    assert figures["over_allowed"] == round((6 - 2 * layers.LAYERS) / figures["floors_us"], 4)


@pytest.mark.usefixtures("numpy_as_cupy")
def test_a_wrong_layer_has_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stale(pa.BatchDecodeWithPagedKVCache):
        runs = 0

        def run(self, q: Any, kv: pa.PagedKV, **options: Any) -> Any:
            Stale.runs += 1
            return None if Stale.runs == 6 else super().run(q, kv, **options)

    monkeypatch.setattr(pa, "BatchDecodeWithPagedKVCache", Stale)
    with pytest.raises(AssertionError, match="layer 5: request 0"):
        layers.measure_layers(Case("layers", (33,), num_kv_heads=8, head_dim=16), Session(FakeStopwatch()))


def is_six(result: int) -> None:
    assert result == 6, f"{result} is not 6"


def test_a_peer_is_as_fast_as_its_fastest_right_kernel() -> None:
    session = Session(FakeStopwatch(), [FakePeer()], reps=3)
    figures = session.measure("decode", 3, is_six, {"run_us": lambda: None})
    assert figures["run_us"]["median"] == 6
    assert figures["peers"]["fake"]["kernel"] == "slow"
    assert figures["peers"]["fake"]["medians"] == {"slow": 4, "fast": 4}
    assert peer_cells(figures, ["fake"]) == ["4.0", "1.500"]
    assert lacking(figures) == {}


def test_a_peer_without_a_right_kernel_has_a_reason_instead_of_a_time() -> None:
    session = Session(FakeStopwatch(), [FakePeer()], reps=3)
    figures = session.measure("decode", 1, is_six, {"run_us": lambda: None})
    reason = lacking(figures)["fake"]
    assert "slow: wrong result, 2 is not 6" in reason and "refusing: RuntimeError: no kernel for this" in reason
    assert peer_cells(figures, ["fake"]) == ["-", "-"]
    assert lacking(session.measure("prefill", 1, is_six, {"run_us": lambda: None})) == {"fake": "no prefill"}
    assert "peers" not in Session(FakeStopwatch()).measure("decode", 1, is_six, {"run_us": lambda: None})


def test_peers_that_cannot_be_imported_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setitem(peers.PEERS, "jax", FakePeer)
    found, missing = peers.load(["flashinfer", "jax", "fa3", "cudnn"])
    assert [peer.name for peer in found] == ["fake"]
    assert missing.keys() == {"flashinfer", "fa3", "cudnn"} and "torch" in missing["fa3"]


def test_bench_imports_no_peer_and_no_plotting() -> None:
    code = "import sys, bench.__main__; print({'torch', 'jax', 'flashinfer', 'matplotlib'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], cwd=record.ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"


@pytest.mark.parametrize(
    ("peer", "case", "reason"),
    [
        (peers.FlashAttention3, replace(SMALL, dtype="bfloat16", window_left=3), "windows"),
        (peers.CudnnDense, SMALL, "dense"),
        (peers.FlashAttention3Jax, replace(SMALL, head_dim=128, layout="HND"), "NHD"),
        (peers.FlashInfer, replace(SMALL, sinks=True), "without sinks"),
    ],
)
def test_peers_say_what_they_lack(peer: type[peers.Peer], case: Case, reason: str) -> None:
    with pytest.raises(NotImplementedError, match=reason):
        peer.prefill(object.__new__(peer), SimpleNamespace(case=case))


# -- the command line, records and pictures ----------------------------------------------------------------------------


def test_a_slow_floor_is_noise_on_the_card_that_was_measured() -> None:
    slow = line(card="NVIDIA H100 80GB HBM3", read_floor_us={"median": 12.0})
    assert is_noisy(slow)
    assert not is_noisy(slow | {"read_floor_us": {"median": 11.2}})
    assert not is_noisy(slow | {"card": "NVIDIA A100"})
    assert not is_noisy(slow | {"case": "1x128"})


def test_the_recorded_command_leaves_out_where_lines_are_written() -> None:
    for given in (["decode", "--json", "a b.jsonl", "--reps", "3"], ["decode", "--json=x", "--reps", "3"]):
        assert record.command(given) == "python -m bench decode --reps 3"


def test_the_command_line_chooses_cases_and_settings() -> None:
    options = parse(["prefill", "--cases", "1x8192", "--page-size", "64", "--layout", "HND", "--dtype", "float16"])
    (case,) = select(BENCHES["prefill"], options)
    assert (case.name, case.page_size, case.layout, case.dtype) == ("1x8192", 64, "HND", "float16")
    assert options.json == record.RESULTS / "prefill.jsonl"
    assert select(BENCHES["decode"], parse(["decode"])) == list(BENCH_DECODE)
    assert {case.dtype for case in select(BENCHES["prefill"], parse(["prefill"]))} == {"bfloat16"}


def test_the_command_line_takes_several_pools() -> None:
    options = parse(["decode", "--cases", "bs1_4k_g4", "window", "--page-size", "16", "1", "--layout", "NHD", "HND"])
    chosen = select(BENCHES["decode"], options)
    pools = [("NHD", 16), ("NHD", 1), ("HND", 16), ("HND", 1)]
    assert [(case.layout, case.page_size) for case in chosen] == 2 * pools
    assert label(chosen[3], options) == "bs1_4k_g4, HND, 1"
    assert describe(chosen[3], options) == "dtype float16, reps 30"
    assert settings(chosen[3], options) == {"layout": "HND", "page_size": 1, "dtype": "float16", "reps": 30}
    merges = select(BENCHES["merge"], parse(["merge", "--page-size", "16", "1"]))  # they have no pages
    assert len(merges) == len(BENCHES["merge"].cases())
    assert (parse(["grid"]).reps, parse(["grid", "--reps", "3"]).reps) == (BENCHES["grid"].reps, 3)


def test_sinks_are_of_a_case_or_given_to_all() -> None:
    plain, given, of_gpt_oss = (
        parse(["decode", "--cases", *arguments])
        for arguments in (["bs1_4k_g4"], ["bs1_4k_g4", "--sinks"], ["gpt_oss_1x4096"])
    )
    for options, sinks in ((plain, False), (given, True), (of_gpt_oss, True)):
        (case,) = select(BENCHES["decode"], options)
        assert case.sinks == sinks
        assert settings(case, options).get("sinks", False) == sinks


def test_our_time_over_that_of_the_bases() -> None:
    def timed(case: str, gflop: float, time: float, **changes: Any) -> dict[str, Any]:
        return line(case, gflop=gflop, run_us={"median": time}, **changes)

    base = timed("1x16384", 100.0, 1000.0)
    window = timed("1x16384_window1024", 12.0, 150.0)
    assert over_bases(window, [base], "gflop")["over_bases"] == 1.25  # 12 of 100 are left
    assert over_bases(timed("1x512_on_32768", 0.1, 22.0), [base], "gflop")["over_bases"] == 2  # reading takes 11 us
    assert over_bases(window, [base | {"layout": "HND"}], "gflop") == {}
    parts = [timed("64_on_4096_by_decode", 1.0, 300.0), timed("4x1024", 9.0, 100.0)]
    mixed = over_bases(timed("64x1_on_4096_and_4x1024", 10.0, 420.0), parts, "gflop")
    assert mixed["over_bases"] == 1.05 and [part["case"] for part in mixed["bases"]] == [
        "64_on_4096_by_decode",
        "4x1024",
    ]
    assert over_bases(mixed | timed("64x1_on_4096_and_4x1024", 10.0, 420.0), parts[:1], "gflop") == {}


def test_a_case_without_bases_is_compared_with_itself_in_the_first_pool() -> None:
    first, second = line("1x8192"), line("1x8192", page_size=64)
    found = over_bases(line("1x8192", page_size=1, run_us={"median": 21.0}), [first, second], "gflop")
    assert found["over_bases"] == 1.5
    assert found["bases"] == [{"case": "1x8192", "layout": "NHD", "page_size": 16, "dtype": "float16"}]
    assert over_bases(first, [line("4x4096")], "gflop") == {}


def test_remarks() -> None:
    fine = line(over_bound=1.0)
    assert list(remarks(fine)) == []
    assert "1.5 x floor + 8 us" in next(iter(remarks(fine | {"over_bound": 1.01})))
    assert list(remarks(line(peers={"fa3": {"none": "no decode"}}))) == ["no time of fa3: no decode"]


def test_a_table_has_no_empty_columns() -> None:
    table = tabulate("title", ["a", "b"], {"x": ["1", ""], "y": ["", ""]})
    assert [column.header for column in table.columns] == ["case", "a"]
    assert tabulate("title", ["a"], {}).row_count == 0


def test_the_command_line_takes_groups_and_each_case_once() -> None:
    chosen = select(BENCHES["decode"], parse(["decode", "--cases", "kv_len", "batch", "1x2048"]))
    names = [case.name for case in chosen]
    assert len(names) == len(set(names)) == len(BENCH_DECODE_MORE["kv_len"]) + len(BENCH_DECODE_MORE["batch"]) - 1
    assert [probe.name for probe in select(BENCHES["host"], parse(["host"]))][:1] == ["decode run()"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["decode", "--cases", "16x1024"],
        ["decode", "--reps", "0"],
        ["decode", "--peer", "flashinfer,nobody"],
        ["merge", "--plot"],
        ["merge", "--combined"],
        ["layers", "--lse"],
        ["layers", "--peer", "flashinfer"],
        ["sort"],
    ],
)
def test_the_command_line_refuses_what_it_does_not_know(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse(arguments)
    assert stopped.value.code == 2


def test_the_newest_line_of_a_case_counts() -> None:
    lines = [
        line("a", card="old"), line("b", reps=1), line("a"), line("b", reps=2), line("b", page_size=64),
        line("b", lse=True), line("b", layout="HND", card="other"),
    ]  # fmt: skip
    found = plot.newest(lines, {"layout": "NHD", "lse": None})
    kept = {(x["case"], x["page_size"]): x.get("reps") for x in found}
    assert kept == {("a", 16): None, ("b", 16): 2, ("b", 64): None} and len(found) == 3
    assert plot.newest([], {"layout": "NHD"}) == []


def test_of_a_case_the_line_with_the_most_peers_is_drawn() -> None:
    two, one = {"fa3": {"median": 1.0}, "flashinfer": {"median": 2.0}}, {"fa3": {"median": 1.0}}
    lines = [line("a", peers=peers, reps=i) for i, peers in enumerate((two, one, {}, two), 1)]
    assert [x["reps"] for x in plot.newest(lines, {})] == [4]
    assert [x["reps"] for x in plot.newest(lines[:3], {})] == [1]
    assert [x["reps"] for x in plot.newest([*lines, line("a", card="other", reps=5)], {})] == [5]


@pytest.mark.parametrize("recorded", ["headline", "everything"])
@pytest.mark.parametrize("bench", ["decode", "prefill"])
def test_pictures_are_drawn_from_what_is_recorded(bench: str, recorded: str, tmp_path: Path) -> None:
    path, named = tmp_path / f"{bench}.jsonl", BENCHES[bench]
    arguments = [bench, "--plot", "--json", f"{path}"]
    with pytest.raises(SystemExit, match="measure first"):
        main(arguments)
    groups = ["headline", "kv_len", "batch", "length"] if recorded == "everything" else ["headline"]
    cases = itertools.chain.from_iterable(named.groups.get(group, ()) for group in groups)
    for i, case in enumerate(cases):
        found = {} if i % 2 else {"flashinfer": {"median": 20.0 + i, "kernel": "x"}, "fa3": {"none": "no"}}
        record.append(path, line(case.name, bench=bench, dtype=named.dtype, peers=found))
    assert main(arguments) == 0
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_a_first_result_is_right_on_the_reference() -> None:
    """The child's one-shot calls, on NumPy instead of CuPy."""
    assert not first_result.decode(np).any() and not first_result.prefill(np).any()


def test_cold_reports_children_that_fail(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"KeyError: 'nothing'|No module named 'cupy'|cudaError"):
        cold.first_result("nothing", f"{tmp_path}")
    monkeypatch.setattr(
        cold, "first_result", lambda name, folder: {"first_result": 1.2346, "import_cupy_and_context": 2}
    )
    figures = cold.measure_cold(cold.COLD[0], Session(FakeStopwatch()))
    assert figures["cold_s"] == figures["warm_s"] == {"median": 1.235, "p10": 1.235, "p90": 1.235, "min": 1.235}


def test_numerics_is_handed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.numerics.main", lambda arguments: 7 if arguments == ["--no-peers"] else 8)
    assert main(["numerics", "--no-peers"]) == 7


def test_the_source_hash_is_of_names_and_contents(tmp_path: Path) -> None:
    def hash_of(**files: str) -> str:
        for folder in record.SOURCES:
            (tmp_path / folder).mkdir(exist_ok=True)
            for old in (tmp_path / folder).iterdir():
                old.unlink()
        for name, text in files.items():
            (tmp_path / "kernels" / f"{name}.cu").write_text(text)
        return record.source_hash(tmp_path)

    hashes = [hash_of(), hash_of(a="x"), hash_of(b="x"), hash_of(a="y"), hash_of(a="", b="x")]
    assert len(set(hashes)) == len(hashes)
    assert hash_of(a="x") == hashes[1]


def test_lines_are_appended(tmp_path: Path) -> None:
    path = tmp_path / "new" / "lines.jsonl"
    record.append(path, {"case": "a", "tflops": 1.5})
    record.append(path, {"case": "b"})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"case": "a", "tflops": 1.5}, {"case": "b"}]
    assert record.read(path) == [{"case": "a", "tflops": 1.5}, {"case": "b"}]
    assert record.read(tmp_path / "none.jsonl") == []


# -- ranks -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 7])
def test_ranks_of_the_benchmark_share_the_pages_of_each_request(num_ranks: int) -> None:
    work = Workload.build(Case("ragged", (100, 16, 5)), np)
    tables = parallel.rank_tables(work, num_ranks)
    for i, (begin, end) in enumerate(itertools.pairwise(work.indptr)):
        shares = [pages[indptr[i] : indptr[i + 1]] for indptr, pages, _ in tables]
        for rank, share in enumerate(shares):
            np.testing.assert_array_equal(share, work.indices[begin:end][rank::num_ranks])
        lens = [(len(x) - 1) * 16 + last[i] for x, (_, _, last) in zip(shares, tables, strict=True) if len(x)]
        assert sum(lens) == work.case.kv_lens[i]


def test_the_model_of_many_ranks_follows_what_was_measured() -> None:
    def measured(tokens: float) -> dict[str, float]:
        return {"median": 7.0 + tokens * 1e-3}

    parts = {f"part_of_{ranks}_us": ranks for ranks in parallel.PARTS}
    lines = [
        {"part": "decode", "case": f"1x{tokens >> 10}k", "one_card_us": measured(tokens)}
        | {name: measured(tokens / ranks) for name, ranks in parts.items()}
        for tokens in (1 << 17, 1 << 19)
    ]
    for found in parallel.model_lines(lines):
        tokens = int(found["case"][2:-1]) << 20
        assert found["one_card_us"] == pytest.approx(7 + tokens * 1e-3, abs=0.1)
        assert found["local_us"] == pytest.approx(7 + tokens / found["ranks"] * 1e-3, abs=0.1)
        assert (found["between_us"] > 0) == (found["ranks"] > 8) and "NVLink" in found["sources"]
