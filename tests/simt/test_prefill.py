"""The prefill kernel, run on a CPU by the SIMT shim, against a float64 loop over dense keys and values."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

import paged_attn as pa
from tests.cases import DTYPES, LSE_TOLERANCE, LSE_TOLERANCE_SOFT_CAP, OUT_TOLERANCE, Case, Inputs, assert_close, build
from tests.simt.plans import HostPlan


def expected(inputs: Inputs, sinks: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(out, lse) in float64, one query head at a time."""
    case = inputs.case
    q = inputs.q.astype(np.float64)
    sinks = np.full(case.num_qo_heads, -np.inf) if sinks is None else sinks.astype(np.float64)
    out, lse = np.zeros((*q.shape[:2], case.v_head_dim)), np.full(q.shape[:2], -np.inf)
    for request, queries in enumerate(case.queries):
        positions, total_len, first = case.positions(request), case.total_len(request), inputs.qo_indptr[request]
        own = total_len - queries + np.arange(queries)[:, None]
        seen = positions <= own if case.causal else np.broadcast_to(positions < total_len, (queries, len(positions)))
        if case.window_left >= 0:
            seen = seen & (positions >= own - case.window_left)
        for head in range(case.num_qo_heads):
            kv_head = head // (case.num_qo_heads // case.num_kv_heads)
            k, v = (dense[request][:, kv_head].astype(np.float64) for dense in (inputs.k, inputs.v))
            scores = q[first : first + queries, head] @ k.T * case.sm_scale
            if case.logits_soft_cap:
                scores = case.logits_soft_cap * np.tanh(scores / case.logits_soft_cap)
            scores = np.where(seen, scores, -np.inf)
            some = seen.any(axis=1) | np.isfinite(sinks[head])
            top = scores[some].max(axis=1, initial=sinks[head])
            weights = np.exp(scores[some] - top[:, None])
            total = weights.sum(axis=1) + np.exp(sinks[head] - top)
            out[first : first + queries, head][some] = (weights @ v) / total[:, None]
            lse[first : first + queries, head][some] = np.log(total) + top
    return out, lse


@dataclass
class Run:
    """One launch after its step was planned: what that made is open to changes before `go`."""

    plan: HostPlan
    q: np.ndarray
    kv: pa.PagedKV
    out: np.ndarray
    lse: np.ndarray | None
    sinks: np.ndarray | None

    @property
    def requests(self) -> np.ndarray:
        return self.plan.buffers["requests"]

    def go(self) -> tuple[np.ndarray, Any]:
        self.plan.run(self.q, self.kv, self.out, self.lse, self.sinks)
        return self.out, self.lse


def prepare(
    inputs: Inputs,
    *,
    spare_requests: int = 0,
    spare_rows: int = 0,
    float32: bool = False,
    reverse: bool = False,
    q: np.ndarray | None = None,
    out: np.ndarray | None = None,
    kv: pa.PagedKV | None = None,
    sinks: np.ndarray | None = None,
    **constants: int,
) -> Run:
    """A case, planned. A plan may have room for more requests, and q more rows, than the batch has."""
    plan = HostPlan(inputs, spare_requests=spare_requests, reverse=reverse, **constants)
    plan.plan()
    q = np.pad(inputs.q, ((0, spare_rows), (0, 0), (0, 0)), constant_values=np.nan) if q is None else q
    if out is None:
        dtype = np.float32 if float32 else DTYPES[inputs.case.dtype]
        out = np.full((*q.shape[:2], inputs.case.v_head_dim), np.nan, dtype)
    lse = np.full(q.shape[:2], np.nan, np.float32)
    return Run(plan, q, inputs.kv() if kv is None else kv, out, lse, sinks)


def check(inputs: Inputs, out: np.ndarray, lse: np.ndarray, sinks: np.ndarray | None = None) -> None:
    """out and lse against the float64 loop; rows behind the planned ones are empty."""
    rows, case = len(inputs.q), inputs.case
    right_out, right_lse = expected(inputs, sinks)
    lse_tolerance = LSE_TOLERANCE_SOFT_CAP if case.logits_soft_cap else LSE_TOLERANCE
    assert_close(
        out[:rows], right_out, lse[:rows], right_lse, tolerance=OUT_TOLERANCE[case.dtype], lse_tolerance=lse_tolerance
    )
    assert (out[rows:] == 0).all()
    assert np.isneginf(lse[rows:]).all()


CASES = [
    Case("pages_of_one", (70, 5), q_lens=(40, 7), page_size=1),
    Case("pages_of_three", (100, 64), q_lens=(19, 64), num_qo_heads=7, num_kv_heads=1, page_size=3, layout="HND"),
    Case("pages_of_16", (130, 16), q_lens=(130, 16), num_qo_heads=4, layout="HND"),
    Case("pages_of_48", (150, 1), q_lens=(33, 1), num_qo_heads=4, page_size=48, dtype="bfloat16"),
    Case("group1", (140,), q_lens=(140,), num_qo_heads=2, head_dim=32),
    Case("group5", (64, 65), q_lens=(30, 5), num_qo_heads=10, head_dim=32, dtype="bfloat16"),
    Case("group7", (90,), q_lens=(40,), num_qo_heads=7, num_kv_heads=1, layout="HND"),
    Case("group12", (77, 20), q_lens=(25, 20), num_qo_heads=24, head_dim=32, page_size=8),
    Case("group160", (40,), q_lens=(3,), num_qo_heads=160, num_kv_heads=1, head_dim=16),
    *(
        Case(
            f"dim{head_dim}",
            (100, 33),
            q_lens=(21, 33),
            num_qo_heads=4,
            head_dim=head_dim,
            dtype=("float16", "bfloat16")[i % 2],
            layout=("NHD", "HND")[i // 2 % 2],
        )
        for i, head_dim in enumerate((16, 32, 48, 80, 96, 112, 128, 144, 256))
    ),
    Case("more_queries_than_keys", (20, 3, 0), q_lens=(70, 9, 5), num_qo_heads=4),
    Case("empty_rows_and_requests", (0, 50, 0, 1, 17), q_lens=(3, 0, 0, 1, 17), num_qo_heads=4),
    Case("not_causal", (100, 3), q_lens=(40, 9), num_qo_heads=4, causal=False),
    Case("not_causal_window", (100, 30), q_lens=(40, 50), num_qo_heads=4, causal=False, window_left=12),
    Case("window0", (150,), q_lens=(150,), num_qo_heads=4, window_left=0),
    Case("window20", (200, 40), q_lens=(90, 40), num_qo_heads=4, window_left=20, page_size=3, layout="HND"),
    Case("window70_dim256", (200,), q_lens=(90,), num_qo_heads=2, num_kv_heads=1, window_left=70, head_dim=256),
    Case("soft_cap", (100, 10), q_lens=(50, 30), num_qo_heads=4, logits_soft_cap=1.5),
    Case("soft_cap_window", (150,), q_lens=(60,), num_qo_heads=4, logits_soft_cap=30, window_left=40, dtype="bfloat16"),
    Case("soft_cap_dim128", (100,), q_lens=(50,), num_qo_heads=4, head_dim=128, logits_soft_cap=5),
    Case(
        "middle_chunk",
        (48, 64, 16),
        q_lens=(60, 30, 20),
        num_qo_heads=4,
        page_offsets=(2, 1, 0),
        total_lens=(130, 65, 16),
    ),
    Case(
        "every_third_page",
        (72, 16, 0, 1),
        q_lens=(100, 33, 1, 9),
        num_qo_heads=4,
        page_size=8,
        page_offsets=(1, 1, 1, 1),
        page_stride=3,
        total_lens=(200, 45, 3, 9),
        window_left=90,
        layout="HND",
    ),
    Case("many_requests", tuple(i % 7 for i in range(70)), q_lens=tuple(i % 3 for i in range(70)), num_qo_heads=2),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_the_float64_loop(case: Case) -> None:
    inputs = build(case)
    check(inputs, *prepare(inputs).go())


def some_sinks(case: Case) -> np.ndarray:
    """About as large as a row's lse; in turn none, negligible, and above all scores."""
    sinks = np.random.default_rng(5).normal(3, 2, case.num_qo_heads).astype(np.float32)
    for first, sink in ((1, -np.inf), (3, -30), (5, 8)):
        sinks[first::8] = sink
    return sinks


SINK_CASES = [
    Case("causal", (130, 0, 1, 33), q_lens=(70, 3, 1, 33), num_qo_heads=8, page_size=3),
    Case("group8_window", (300, 140), q_lens=(40, 140), num_qo_heads=16, window_left=127, layout="HND",
         dtype="bfloat16"),
    Case("rows_that_see_nothing", (20, 3, 0), q_lens=(70, 9, 5), num_qo_heads=8, dtype="bfloat16"),
    Case("not_causal_cap", (100, 3), q_lens=(40, 9), num_qo_heads=8, causal=False, logits_soft_cap=2.0),
    Case("middle_chunk", (48, 64, 16), q_lens=(60, 30, 20), num_qo_heads=8, page_offsets=(2, 1, 0),
         total_lens=(130, 65, 16)),
]  # fmt: skip


@pytest.mark.parametrize("case", SINK_CASES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 256])
def test_a_sink_joins_the_denominator_of_its_head(case: Case, head_dim: int) -> None:
    inputs, sinks = build(replace(case, head_dim=head_dim)), some_sinks(case)
    check(inputs, *prepare(inputs, sinks=sinks, spare_requests=3, spare_rows=20).go(), sinks=sinks)


def test_sinks_of_any_size_and_none_at_all() -> None:
    inputs = build(Case("sizes", (90, 0), q_lens=(20, 3), num_qo_heads=8))
    sinks = np.array([1e4, -1e4, 2e38, -2e38, 0, -np.inf, 60, -60], np.float32)
    out, lse = prepare(inputs, sinks=sinks, float32=True).go()
    right_out, right_lse = expected(inputs, sinks=sinks)
    assert_close(out, right_out, tolerance=OUT_TOLERANCE["float16"])
    np.testing.assert_allclose(lse, right_lse, rtol=1e-6, atol=LSE_TOLERANCE)
    none = np.full(8, -np.inf, np.float32)
    with_none, without = prepare(inputs, sinks=none).go(), prepare(inputs).go()
    assert all(a.tobytes() == b.tobytes() for a, b in zip(with_none, without, strict=True))


def test_rows_of_a_faulty_request_have_no_sink() -> None:
    inputs = build(Case("faulty", (90, 70, 33), q_lens=(20, 15, 9), num_qo_heads=8))
    run = prepare(inputs, sinks=some_sinks(inputs.case))
    for name, value in (("num_pages", 0), ("kv_len", 0), ("total_len", -1)):
        run.requests[name][1] = value
    out, lse = run.go()
    right_out, right_lse = expected(inputs, sinks=some_sinks(inputs.case))
    right_out[20:35], right_lse[20:35] = 0, -np.inf
    assert_close(out, right_out, lse, right_lse, tolerance=OUT_TOLERANCE["float16"])


DIMS = [(192, 128), (64, 128), (128, 192), (256, 64), (208, 16), (16, 256), (192, 112), (48, 32)]


@pytest.mark.parametrize(("head_dim", "v_head_dim"), DIMS)
@pytest.mark.parametrize("float32", [False, True])
def test_values_of_another_dim(head_dim: int, v_head_dim: int, float32: bool) -> None:
    case = Case("dims", (130, 0, 20), q_lens=(70, 3, 9), num_qo_heads=4, head_dim=head_dim, v_dim=v_head_dim,
                layout="HND" if float32 else "NHD")  # fmt: skip
    inputs, sinks = build(case), some_sinks(case)
    check(inputs, *prepare(inputs, sinks=sinks, float32=float32, reverse=float32).go(), sinks=sinks)


BASE = Case("base", (90, 0, 33), q_lens=(50, 2, 20), num_qo_heads=4)


@pytest.mark.parametrize("head_dim", [64, 256])
def test_float32_out(head_dim: int) -> None:
    inputs = build(replace(BASE, head_dim=head_dim))
    out, lse = prepare(inputs, float32=True).go()
    assert out.dtype == np.float32
    check(inputs, out, lse)


def test_blocks_of_later_cards() -> None:
    """From sm_100 on a block has fewer tokens at head_dim 128."""
    for window_left in (-1, 40):
        inputs = build(replace(BASE, head_dim=128, window_left=window_left))
        check(inputs, *prepare(inputs, __CUDA_ARCH__=1000).go())


def test_bits_do_not_depend_on_the_order_of_threads_or_the_batch() -> None:
    inputs = build(BASE)
    out, lse = prepare(inputs).go()
    reversed_out, reversed_lse = prepare(inputs, reverse=True).go()
    assert out.tobytes() == reversed_out.tobytes() and lse.tobytes() == reversed_lse.tobytes()

    run = prepare(inputs)
    run.requests[0] = run.requests[2]  # the last request alone, in rows that stay where they are
    run.requests["first_tile"][:4] = 0, 1, 1, 1
    run.requests["first_query"][1:] = len(inputs.q)
    alone, _ = run.go()
    assert alone[52:72].tobytes() == out[52:72].tobytes()


@pytest.mark.parametrize("scores", ["jump_by_5.2", "jump_by_23.3"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_token_that_makes_up_a_row_has_a_weight_of_1(dtype: str, scores: str) -> None:
    """Which no rounding changes: any other one would be off by up to 2^-9 in bfloat16, 2^-12 in float16."""
    inputs = build(Case("jump", (300,), q_lens=(40,), num_qo_heads=2, dtype=dtype, causal=False), scores=scores)
    out, _ = prepare(inputs, float32=True).go()
    assert_close(out, expected(inputs)[0], tolerance=2e-5)


def test_scores_that_grow_and_shrink_from_block_to_block() -> None:
    """The running maximum has to move several times, by more than fp16 could hold, and to stand still."""
    inputs = build(Case("steps", (250,), q_lens=(40,), num_qo_heads=2, num_kv_heads=1, given_scale=0.3))
    for start, factor in ((0, 1), (64, 6), (128, 0.1), (192, 10)):
        inputs.k[0][start : start + 64] *= factor
    for page in range(16):
        tokens = inputs.k[0][page * 16 : page * 16 + 16]
        inputs.k_pages[inputs.indices[page], : len(tokens)] = tokens
    check(inputs, *prepare(inputs).go())


@pytest.mark.parametrize("needle", [0, 15, 16, 63, 64, 127, 128, 129])
def test_no_token_is_skipped(needle: int) -> None:
    inputs = build(Case("needle", (130, 70), q_lens=(66, 5), num_qo_heads=4, layout="HND"), needle=needle)
    check(inputs, *prepare(inputs).go())


def test_pages_outside_every_window_are_not_read() -> None:
    inputs = build(Case("window", (300,), q_lens=(20,), num_qo_heads=4, window_left=30))
    first_seen = 300 - 20 - 30
    for page in inputs.indices[: first_seen // 16]:
        inputs.k_pages[page] = inputs.v_pages[page] = np.nan
    # A page id that is read at all is turned into an address: these would leave the pool by far.
    run = prepare(inputs)
    run.plan.buffers["page_ids"][: first_seen // 16] = 2**32 - 2**30
    check(inputs, *run.go())


def test_rows_behind_the_plan_are_empty() -> None:
    inputs = build(BASE)
    check(inputs, *prepare(inputs, spare_requests=40, spare_rows=150).go())


def test_every_row_is_empty_where_nothing_is_planned() -> None:
    inputs = build(Case("nothing", (), q_lens=(), num_qo_heads=4))
    check(inputs, *prepare(inputs, spare_requests=3, spare_rows=70).go())


def test_lse_may_be_left_out() -> None:
    inputs = build(BASE)
    run = prepare(inputs)
    run.lse = None
    out, _ = run.go()
    check(inputs, out, prepare(inputs).go()[1])


def test_strided_q_out_and_combined_pools() -> None:
    inputs = build(BASE)
    case = inputs.case
    packed = np.full((len(inputs.q), case.num_qo_heads + 4, case.head_dim + 8), np.nan, np.float16)
    q = packed[:, 2:6, :64]
    q[:] = inputs.q
    holder = np.full((len(inputs.q), case.num_qo_heads + 1, case.head_dim + 16), 7, np.float16)
    pool = np.stack([inputs.k_pages, inputs.v_pages], axis=1)
    v_pages = np.full((*inputs.v_pages.shape[:-1], 128), np.nan, np.float16)[..., :64]
    v_pages[:] = inputs.v_pages
    run = prepare(inputs, q=q, out=holder[:, 1:, :64], kv=pa.PagedKV(pool[:, 0], v_pages, layout="NHD"))
    check(inputs, *run.go())
    assert (holder[:, 0] == 7).all() and (holder[:, 1:, 64:] == 7).all()


@pytest.mark.parametrize(
    ("first_query", "num_queries"), [(10, 200), (-5, 20), (71, 2**30), (2**31 - 1, 60), (1000, 60), (0, 0)]
)
def test_rows_outside_q_are_never_written(first_query: int, num_queries: int) -> None:
    inputs = build(Case("rows", (90,), q_lens=(72,), num_qo_heads=4))
    guarded_out = np.full((3 * 72, 4, 64), 7, np.float16)
    guarded_lse = np.full((3 * 72, 4), 7, np.float32)
    run = prepare(inputs, out=guarded_out[72:144])
    run.lse = guarded_lse[72:144]
    run.requests["first_query"][0], run.requests["num_queries"][0] = first_query, num_queries
    run.requests["first_tile"][1] = 1000
    run.go()
    for guarded in (guarded_out, guarded_lse):
        assert (guarded[:72] == 7).all() and (guarded[144:] == 7).all()
