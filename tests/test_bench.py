"""The parts of bench/ that need no GPU: counts of work, sampled queries, checks of results, figures and records."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import paged_attn as pa
from bench import record
from bench.__main__ import CASES, H100_READ_FLOOR, is_noisy, parse, select
from bench.check import check
from bench.timing import Times
from bench.workload import TILE, Workload, causal_flops, kv_bytes, random_normal, sampled_queries
from tests.cases import BENCH_DECODE, BENCH_PREFILL, Case

SMALL = Case("small", (70, 33, 16), q_lens=(9, 33, 1), num_qo_heads=4, num_kv_heads=2, head_dim=32)


def attend(workload: Workload) -> tuple[np.ndarray, np.ndarray]:
    return pa.prefill(workload.q, workload.qo_indptr, workload.kv, workload.table, return_lse=True)


def test_kv_bytes_are_those_of_the_tokens() -> None:
    case = next(case for case in BENCH_DECODE if case.name == "bs64_4k_g8")
    assert kv_bytes(case) == 64 * 4096 * 8 * 128 * 2 * 2


def test_causal_flops_count_the_visible_keys() -> None:
    visible = sum(
        key <= kv_len - q_len + query
        for q_len, kv_len in zip(SMALL.queries, SMALL.kv_lens, strict=True)
        for query, key in itertools.product(range(q_len), range(kv_len))
    )
    assert causal_flops(SMALL) == 4 * 32 * 4 * visible


@pytest.mark.parametrize("case", [*BENCH_DECODE, *BENCH_PREFILL], ids=str)
def test_sampled_queries_lie_in_the_case(case: Case) -> None:
    queries = list(sampled_queries(case))
    assert len(queries) == len(set(queries))
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
def test_right_results_pass_the_check(layout: str, dtype: str) -> None:
    workload = Workload.build(replace(SMALL, layout=layout, dtype=dtype), np)
    assert check(workload, *attend(workload)) == len(list(sampled_queries(SMALL)))


def test_pages_are_shuffled() -> None:
    indices = Workload.build(SMALL, np).table.indices
    assert sorted(indices) == list(range(len(indices))) != indices.tolist()


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
        check(workload, out, lse)


def test_times_are_summarised_by_their_spread() -> None:
    times = Times(device=(*range(1, 101), 10_000.0), host=(3.0, 1.0, 2.0))
    assert times.summary() == {"median": 51, "p10": 11, "p90": 91, "min": 1, "host": 2}


def test_a_slow_floor_is_noise_on_the_card_that_was_measured() -> None:
    line = {"bench": "decode", "case": "bs1_4k_g4", "card": "NVIDIA H100 80GB HBM3", "read_floor_us": {"median": 12.0}}
    assert is_noisy(line)
    assert not is_noisy(line | {"read_floor_us": {"median": 11.2}})
    assert not is_noisy(line | {"card": "NVIDIA A100"})
    assert H100_READ_FLOOR.keys() == {case.name for case in BENCH_DECODE}


def test_the_command_line_chooses_cases_and_settings() -> None:
    options = parse(["prefill", "--cases", "1x8192", "--page-size", "64", "--layout", "HND", "--dtype", "bfloat16"])
    (case,) = select(CASES["prefill"], options)
    assert (case.name, case.page_size, case.layout, case.dtype) == ("1x8192", 64, "HND", "bfloat16")
    assert options.json == record.RESULTS / "prefill.jsonl"
    assert select(CASES["decode"], parse(["decode"])) == list(BENCH_DECODE)


@pytest.mark.parametrize("arguments", [["decode", "--cases", "1x8192"], ["decode", "--reps", "0"], ["merge"]])
def test_the_command_line_refuses_what_it_does_not_know(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse(arguments)
    assert stopped.value.code == 2


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
