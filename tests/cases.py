"""The one list of attention cases, for the tests (CPU, SIMT shim, GPU) and for bench/, and how their inputs are made.

Inputs are NumPy arrays and poisoned: NaN in the unused slots of last pages and in unused pages, impossible page ids
behind the end of `indices`, pages in shuffled order. Nothing is built at import.
"""

import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import ml_dtypes
import numpy as np

import paged_attn as pa

DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16)} | {
    name: np.dtype(name) for name in ("float16", "float32", "float64")
}
NEEDLE_SCORE = 20.0
UNUSED_PAGES = 3


@dataclass(frozen=True)
class Case:
    """One call. Decode where q_lens is None: every request has q_len queries. Lengths are tokens a table holds."""

    name: str
    kv_lens: tuple[int, ...]
    q_len: int = 1
    q_lens: tuple[int, ...] | None = None
    num_qo_heads: int = 8
    num_kv_heads: int = 2
    head_dim: int = 64
    page_size: int = 16
    layout: str = "NHD"
    dtype: str = "float16"
    causal: bool = True
    window_left: int = -1
    logits_soft_cap: float = 0.0
    page_offsets: tuple[int, ...] | None = None
    page_stride: int = 1
    total_lens: tuple[int, ...] | None = None
    given_scale: float | None = None  # sm_scale, where it is not the default
    v_dim: int | None = None  # v_head_dim, where it is not head_dim
    sinks: bool = False  # run() gets a sink a head

    def __str__(self) -> str:
        return self.name

    @property
    def batch_size(self) -> int:
        return len(self.kv_lens)

    @property
    def is_decode(self) -> bool:
        return self.q_lens is None

    @property
    def v_head_dim(self) -> int:
        return self.head_dim if self.v_dim is None else self.v_dim

    @property
    def queries(self) -> tuple[int, ...]:
        """Number of queries of each request."""
        return (self.q_len,) * self.batch_size if self.q_lens is None else self.q_lens

    @property
    def sm_scale(self) -> float:
        return self.head_dim**-0.5 if self.given_scale is None else self.given_scale

    def positions(self, request: int) -> np.ndarray:
        """Position in the whole sequence of each local token of a request."""
        page, slot = np.divmod(np.arange(self.kv_lens[request]), self.page_size)
        offset = self.page_offsets[request] if self.page_offsets else 0
        return (offset + page * self.page_stride) * self.page_size + slot

    def total_len(self, request: int) -> int:
        return self.total_lens[request] if self.total_lens else self.kv_lens[request]


# -- inputs ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Inputs:
    """NumPy arrays of one case. k and v are the dense keys and values [kv_len, kv heads, dim] of each request."""

    case: Case
    q: np.ndarray
    k: list[np.ndarray]
    v: list[np.ndarray]
    k_pages: np.ndarray
    v_pages: np.ndarray
    indptr: np.ndarray
    indices: np.ndarray
    last_page_len: np.ndarray
    qo_indptr: np.ndarray
    page_offset: np.ndarray | None = field(default=None)
    total_len: np.ndarray | None = field(default=None)
    sinks: np.ndarray | None = field(default=None)

    def kv(self, to: Callable[[np.ndarray], Any] = np.asarray) -> pa.PagedKV:
        """The tagged pool; `to` brings an array where it is wanted (cupy.asarray, say)."""
        return pa.PagedKV(to(self.k_pages), to(self.v_pages), layout=self.case.layout)

    def table(self, to: Callable[[np.ndarray], Any] = np.asarray) -> pa.PageTable:
        return pa.PageTable(
            to(self.indptr),
            to(self.indices),
            to(self.last_page_len),
            page_size=self.case.page_size,
            page_offset=None if self.page_offset is None else to(self.page_offset),
            page_stride=self.case.page_stride,
            total_len=None if self.total_len is None else to(self.total_len),
        )

    def options(self) -> dict[str, Any]:
        """What plan() and the one-shot functions take by name."""
        options: dict[str, Any] = {"window_left": self.case.window_left, "logits_soft_cap": self.case.logits_soft_cap}
        if self.case.given_scale is not None:
            options["sm_scale"] = self.case.given_scale
        return options if self.case.is_decode else options | {"causal": self.case.causal}

    def layer_options(self, to: Callable[[np.ndarray], Any] = np.asarray) -> dict[str, Any]:
        """What run() and the one-shot functions take by name, as it is a layer's."""
        return {} if self.sinks is None else {"sinks": to(self.sinks)}


def build(case: Case, *, needle: int | None = None, scores: str | None = None) -> Inputs:
    """Inputs of a case, the same at every call.

    With a needle, every query scores NEEDLE_SCORE on that local token of every request that has it, whose values are
    all its own, so that an answer which misses the token (or sees it behind a mask) is wholly wrong. `scores` is one of
    SCORES, LARGE_SCORES or HUGE_SCORES, or "background".
    """
    random = np.random.default_rng(zlib.crc32(case.name.encode()))
    dtype, heads, dim, page_size = DTYPES[case.dtype], case.num_kv_heads, case.head_dim, case.page_size

    def normal(*shape: int) -> np.ndarray:
        return random.standard_normal(shape, np.float32).astype(dtype)

    q = normal(sum(case.queries), case.num_qo_heads, dim)
    k = [normal(kv_len, heads, dim) for kv_len in case.kv_lens]
    v = [normal(kv_len, heads, case.v_head_dim) for kv_len in case.kv_lens]
    if needle is not None:
        q[..., 0] = 4
        for keys, values in zip(k, v, strict=True):
            if needle < len(keys):
                keys[needle] = 0
                keys[needle, :, 0] = NEEDLE_SCORE / (4 * case.sm_scale)
                values[needle] = needle_values(case)

    if scores is not None:
        _shape_scores(case, scores, random, q, k, v)

    pages = [-(-kv_len // page_size) for kv_len in case.kv_lens]
    indptr = np.concatenate([[0], np.cumsum(pages)]).astype(np.int32)
    num_pages = int(indptr[-1]) + UNUSED_PAGES
    page_ids = random.permutation(num_pages)[: indptr[-1]]
    pools = []
    for dense, pool_dim in ((k, dim), (v, case.v_head_dim)):
        pool = np.full((num_pages, page_size, heads, pool_dim), np.nan, dtype)
        for request, tokens in enumerate(dense):
            for page in range(pages[request]):
                piece = tokens[page * page_size : (page + 1) * page_size]
                pool[page_ids[indptr[request] + page], : len(piece)] = piece
        pools.append(pool if case.layout == "NHD" else np.ascontiguousarray(pool.swapaxes(1, 2)))
    last_page_len = [kv_len - (n - 1) * page_size if n else 0 for kv_len, n in zip(case.kv_lens, pages, strict=True)]
    impossible = [np.iinfo(np.int32).max, -1, num_pages]
    return Inputs(
        case=case,
        q=q.reshape(case.batch_size, case.q_len, *q.shape[1:]) if case.is_decode and case.q_len > 1 else q,
        k=k,
        v=v,
        k_pages=pools[0],
        v_pages=pools[1],
        indptr=indptr,
        indices=np.concatenate([page_ids, impossible]).astype(np.int32),
        last_page_len=np.array(last_page_len, np.int32),
        qo_indptr=np.concatenate([[0], np.cumsum(case.queries)]).astype(np.int32),
        page_offset=None if case.page_offsets is None else np.array(case.page_offsets, np.int32),
        total_len=None if case.total_lens is None else np.array(case.total_lens, np.int32),
        sinks=some_sinks(case.num_qo_heads) if case.sinks else None,
    )


def some_sinks(num_qo_heads: int) -> np.ndarray:
    """A sink a head, float32: about as large as a row's lse; in turn none (-inf), negligible, and above all scores."""
    sinks = np.random.default_rng(num_qo_heads).normal(3, 2, num_qo_heads).astype(np.float32)
    for first, sink in ((1, -np.inf), (3, -30), (5, 8)):
        sinks[first::8] = sink
    return sinks


def with_sinks(out: np.ndarray, lse: np.ndarray, sinks: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """What out [..., heads, dim] and lse [..., heads] of a call without sinks are with them: exp(sink) joins each sum.

    Both are float64. A row that sees no key has out 0 and the sink as its lse.
    """
    out, lse = out.astype(np.float64), lse.astype(np.float64)
    if sinks is None:
        return out, lse
    total = np.logaddexp(lse, sinks)
    log_kept = np.subtract(lse, total, out=np.full_like(lse, -np.inf), where=np.isfinite(lse))
    return out * np.exp(log_kept)[..., None], total


# Scores that are hard on a softmax which goes through the keys block by block, from the last to the first.
SCORES = (
    "sigma1", "sigma5", "sigma25", "sigma50", "outlier_a_row", "outlier_in_a_block", "growing", "falling",
    "falling_fast", "equal", "all_low", "jump_by_9",
)  # fmt: skip


def _shape_scores(
    case: Case, scores: str, random: np.random.Generator, q: np.ndarray, k: list[np.ndarray], v: list[np.ndarray]
) -> None:
    """Change queries and keys so that the scores are of a kind; the first column of q and k adds a number a token."""
    first = 0
    for keys, values, queries in zip(k, v, case.queries, strict=True):
        rows, length = q[first : first + queries], len(keys)
        first += queries
        if not length or not queries:
            continue
        token = np.arange(length)
        if scores.startswith(("large", "huge")):
            _shape_far_scores(case, scores, random, rows, keys)
            continue
        if scores.startswith("sigma"):
            keys *= keys.dtype.type(float(scores.removeprefix("sigma")))
            continue
        if scores == "outlier_a_row":  # every row has a key of its own direction somewhere: a score of about 60
            for row in rows:
                for head in range(case.num_kv_heads):
                    like = row[head * case.num_qo_heads // case.num_kv_heads].astype(np.float32)
                    keys[random.integers(length), head] = like * (60 / (case.sm_scale * (like @ like)))
            continue
        kind, _, jump = scores.partition("_by_")  # jump: a token so far above the first and the last, and nothing else
        added = {
            "outlier_in_a_block": np.where(token // 128 == length // 256, 60.0, 0.0),
            "growing": token / length * 300,
            "falling": (length - token) / length * 40 * (length / 128),
            "falling_fast": (length - token) / length * 150 * (length / 128),
            "equal": np.zeros(length),
            "all_low": np.full(length, -1e4),
            "background": np.where(token == length - 1, 12.1, 0.0),
            "jump": np.select([token == length // 3, token % max(length - 1, 1) == 0], [float(jump or 0), 0], -30),
        }[kind]
        if kind in ("equal", "all_low", "background", "jump"):
            keys[...] = 0
        if kind == "background":
            values[...] = needle_values(case)
        rows[..., 0] = 4
        keys[..., 0] = (added / (4 * case.sm_scale))[:, None]


# What README states: the largest |sm_scale * q . k| that is right on every path; with |q . k|, in decode and on NumPy.
LARGEST_OF_ALL, LARGEST_OF_DECODE = 2.0**23, 2.0**127
# Scores that a product with sm_scale * log2(e) rounds by more than 1. "huge": by thousands; "large": up to what all
# kernels can do; "border": in one column as large as they may be, with both signs.
KINDS = ("equal", "low", "one_more", "growing", "falling", "mixed", "last", "jump", "rows", "columns")
LARGE_SCORES = tuple(f"large_{kind}" for kind in (*KINDS, "border", "bump"))
HUGE_SCORES = tuple(f"huge_{kind}" for kind in KINDS)  # and, in bfloat16, "huge_border"
HUGE = {"float16": 61440.0, "bfloat16": 133120.0}  # of few bits: sums of their products are exact in float32


def _shape_far_scores(case: Case, scores: str, random: np.random.Generator, rows: np.ndarray, keys: np.ndarray) -> None:
    family, _, kind = scores.partition("_")
    is_large, token, length = family == "large", np.arange(len(keys)), len(keys)
    if kind == "border":  # nearest to the limit with sm_scale in or out
        most = LARGEST_OF_ALL / case.sm_scale if is_large else LARGEST_OF_DECODE / max(case.sm_scale, 1)
        exponent, least_below_2 = np.floor(np.log2(most)) - 1, 255 / 128
        rows[...], keys[...] = 0, 0
        rows[..., 0] = 2.0 ** np.ceil(exponent / 2) * least_below_2
        keys[..., 0] = (2.0 ** np.floor(exponent / 2) * np.where(token % 3 == 0, -1.0, 1.0))[:, None]
        return
    if kind == "bump":  # all far above 0, and a token by 6.1 above the others, which together weigh as much
        rows[...], keys[...] = 0, 0
        rows[..., 0] = keys[..., 0] = 2.0 ** np.floor(np.log2(LARGEST_OF_ALL / case.sm_scale) / 2 - 0.5)
        rows[..., 1] = 4
        keys[..., 1] = (np.rint(6.1 / (8 * case.sm_scale)) * 2 * (token == length // 3))[:, None]  # sums are exact
        return
    number = HUGE[case.dtype]
    if is_large:  # the largest number of four bits whose square, head_dim times, is within the limit
        most = np.sqrt(LARGEST_OF_ALL / (case.head_dim * case.sm_scale))
        unit = 2.0 ** (np.floor(np.log2(most)) - 3)
        number = np.floor(most / unit) * unit
    if kind in ("rows", "columns"):  # whole numbers, whose sums are exact on every backend, far apart
        unit = number / 16 if is_large else 4096
        for numbers in (rows, keys):
            numbers[...] = np.rint(2 * numbers.astype(np.float32)) * unit
        if kind == "rows":  # only in every third row; the scores of the others are those of sigma1
            ordinary = np.arange(len(rows)) % 3 > 0
            rows[ordinary] = rows[ordinary].astype(np.float32) / (4 * unit * unit)
        return
    factor = {
        "equal": np.ones(length),
        "low": -np.ones(length),
        "one_more": np.ones(length),
        "growing": (token + 1) / length,
        "falling": (length - token) / length,
        "mixed": random.choice([1, -1, 0, 0.5], length),
        "last": -1.0 * (token == length - 1),
        "jump": 1.0 * (token == length // 3),
    }[kind]
    rows[...] = number
    keys[...] = (factor * number)[:, None, None]
    if kind == "one_more":  # by the last bit of one number
        keys[...] = np.nextafter(keys.dtype.type(number), keys.dtype.type(0))
        keys[length // 3, :, 0] = number


def needle_values(case: Case) -> np.ndarray:
    """The values of a needle, [v_head_dim]: unlike those of any other token."""
    return 1 + np.arange(case.v_head_dim) % 7


# -- closeness ---------------------------------------------------------------------------------------------------------

OUT_TOLERANCE = {"float16": 2e-3, "bfloat16": 1e-2, "float32": 2e-5, "float64": 1e-12}
LSE_TOLERANCE, LSE_TOLERANCE_SOFT_CAP = 1e-4, 1e-3


def assert_close(
    out: Any,
    expected: Any,
    lse: Any = None,
    expected_lse: Any = None,
    *,
    tolerance: float | np.ndarray,
    lse_tolerance: float | np.ndarray = 1e-4,
) -> None:
    """Raise unless inf and NaN are in the same elements and every row (last axis) has ||err|| <= tolerance * ||row||.

    Absolute tolerances would hide a skipped page in a long sequence. lse is compared by value, within lse_tolerance.
    Both may be arrays, a number for each row.
    """
    out, expected = np.asarray(out, np.float64), np.asarray(expected, np.float64)
    assert out.shape == expected.shape, f"out has shape {out.shape}, expected {expected.shape}"
    _assert_same_specials(out, expected, "out")
    error = np.linalg.norm(_finite_difference(out, expected), axis=-1)
    norm = np.linalg.norm(np.where(np.isfinite(expected), expected, 0), axis=-1)
    wrong = error > tolerance * norm
    if wrong.any():
        row = np.unravel_index(np.argmax(np.where(wrong, error / np.maximum(norm, 1e-9), 0)), wrong.shape)
        raise AssertionError(
            f"{np.count_nonzero(wrong)} of {wrong.size} rows are off; worst is row {tuple(map(int, row))}: "
            f"||err|| = {error[row]:.3g}, ||expected|| = {norm[row]:.3g}, tolerance {np.max(tolerance):.3g}"
        )
    if lse is None:
        return
    lse, expected_lse = np.asarray(lse, np.float64), np.asarray(expected_lse, np.float64)
    assert lse.shape == expected_lse.shape, f"lse has shape {lse.shape}, expected {expected_lse.shape}"
    _assert_same_specials(lse, expected_lse, "lse")
    error = np.abs(_finite_difference(lse, expected_lse))
    assert (error <= lse_tolerance).all(), f"lse is off by {error.max():.3g}, tolerance {np.max(lse_tolerance):.3g}"


def _finite_difference(actual: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """actual - expected, 0 where that is no number."""
    return np.subtract(actual, expected, out=np.zeros_like(expected), where=np.isfinite(expected))


def _assert_same_specials(actual: np.ndarray, expected: np.ndarray, name: str) -> None:
    for kind, test in (("NaN", np.isnan), ("+inf", np.isposinf), ("-inf", np.isneginf)):
        differ = np.argwhere(test(actual) != test(expected))
        if len(differ):
            place = tuple(map(int, differ[0]))
            raise AssertionError(
                f"{kind} of {name} differ at {len(differ)} places, first {place}: {actual[place]} for {expected[place]}"
            )


# -- the list for correctness ------------------------------------------------------------------------------------------

LAYOUTS = ("NHD", "HND")
PAGE_SIZES = (1, 3, 8, 16, 48, 64)
GROUP_SIZES = (1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 32)
HEAD_DIMS = (16, 32, 64, 80, 96, 112, 128, 256)


def _ragged(page_size: int) -> tuple[int, ...]:
    """Lengths around a page's borders (a full last page, one of a single token), with 0 and 1 among them."""
    return (130, 0, 1, page_size, 2 * page_size + 1, 77)


def _owned(total_len: int, rank: int, num_ranks: int, page_size: int) -> int:
    """Tokens that a rank holds which owns pages rank, rank + num_ranks, ... of a sequence."""
    pages = np.arange(rank, -(-total_len // page_size), num_ranks)
    return int(np.minimum(page_size, total_len - pages * page_size).sum())


def _strided(total_lens: tuple[int, ...], rank: int, num_ranks: int, page_size: int) -> dict[str, Any]:
    return {
        "kv_lens": tuple(_owned(total_len, rank, num_ranks, page_size) for total_len in total_lens),
        "page_offsets": (rank,) * len(total_lens),
        "page_stride": num_ranks,
        "total_lens": total_lens,
        "page_size": page_size,
    }


def _variants() -> Iterable[Case]:
    """What decode and prefill have in common, as decode cases: each feature in turn, the others alternating."""
    for i, page_size in enumerate(PAGE_SIZES):
        for layout in LAYOUTS:
            dtype = ("float16", "bfloat16")[(i + LAYOUTS.index(layout)) % 2]
            yield Case(f"page{page_size}_{layout}", _ragged(page_size), page_size=page_size, layout=layout, dtype=dtype)
    for i, group in enumerate(GROUP_SIZES):
        yield Case(
            f"group{group}", _ragged(16), num_qo_heads=2 * group, layout=LAYOUTS[i % 2],
            dtype=("float16", "bfloat16")[i // 2 % 2],
        )  # fmt: skip
    for i, head_dim in enumerate(HEAD_DIMS):
        yield Case(
            f"dim{head_dim}", _ragged(16), head_dim=head_dim, layout=LAYOUTS[i // 2 % 2],
            dtype=("float16", "bfloat16")[i % 2],
        )  # fmt: skip
    for layout in LAYOUTS:
        yield Case(f"page_is_heads8_{layout}", _ragged(8), num_qo_heads=16, num_kv_heads=8, page_size=8, layout=layout)
        yield Case(f"page_is_heads1_{layout}", (5, 0, 1), num_qo_heads=3, num_kv_heads=1, page_size=1, layout=layout)
    for i, window in enumerate((0, 1, 15, 16, 100)):
        yield Case(f"window{window}", _ragged(16), window_left=window, layout=LAYOUTS[i % 2])
    yield Case("soft_cap", _ragged(16), logits_soft_cap=1.5)
    yield Case("soft_cap_window", _ragged(8), logits_soft_cap=30.0, window_left=20, page_size=8, dtype="bfloat16")
    yield Case("all_empty", (0, 0, 0))
    yield Case("one_token", (1,), page_size=64)
    yield Case("float32", _ragged(16), dtype="float32")
    yield Case("float64", _ragged(3), dtype="float64", page_size=3, layout="HND")
    yield Case("tail", **_chunk((130, 65, 16, 0), first_page=(2, 4, 0, 0)))
    yield Case("middle", **_chunk((130, 65, 16, 1), first_page=(2, 1, 0, 0), held=(48, 16, 16, 1)))
    for rank in range(3):
        yield Case(f"stride3_rank{rank}", **_strided((200, 33, 1, 0, 48), rank, 3, 8), layout="HND", window_left=50)
    yield Case("stride4_page1", **_strided((50, 3, 2), 2, 4, 1))


def _chunk(
    total_lens: tuple[int, ...], first_page: tuple[int, ...], held: tuple[int, ...] | None = None
) -> dict[str, Any]:
    """A chunk of each sequence from page first_page (of 16 tokens) on: all that follows, or `held` tokens."""
    rest = tuple(total - 16 * first for total, first in zip(total_lens, first_page, strict=True))
    return {"kv_lens": held or rest, "page_offsets": first_page, "total_lens": total_lens}


def _decode_cases() -> Iterable[Case]:
    yield from _variants()
    for q_len, layout in ((2, "NHD"), (3, "HND"), (4, "NHD"), (8, "HND"), (17, "NHD")):  # longer than some sequences
        yield Case(f"q_len{q_len}", _ragged(16), q_len=q_len, layout=layout)
    yield Case("q_len4_group3", _ragged(8), q_len=4, num_qo_heads=9, num_kv_heads=3, page_size=8, dtype="bfloat16")
    yield Case("q_len5_window7", _ragged(16), q_len=5, window_left=7)
    yield Case("q_len3_stride", **_strided((200, 33, 1, 0, 48), 1, 3, 8), q_len=3)
    yield Case("q_len4_middle", **_chunk((130, 65, 16), first_page=(2, 1, 0), held=(48, 48, 16)), q_len=4)
    for length in (63, 64, 65, 511, 512, 513):  # borders of tiles and splits
        yield Case(f"length{length}", (length, length - 1), layout=LAYOUTS[length % 2])
    yield Case("long_ragged", (3001, 1, 2048, 700), head_dim=128)
    yield Case("long_window", (3001, 1025), head_dim=128, window_left=300, layout="HND", dtype="bfloat16")
    yield Case("long_group32_page1", (1500, 31), num_qo_heads=32, num_kv_heads=1, page_size=1)


def _prefill_cases() -> Iterable[Case]:
    for i, case in enumerate(_variants()):
        # More queries than keys, as many, fewer, none, and one: which request gets which varies from case to case.
        choices = [33, 1, 0, 5, 70, 18]
        queries = tuple(choices[(i + request) % len(choices)] for request in range(case.batch_size))
        yield replace(case, q_lens=queries)
    for name in ("not_causal", "not_causal_window", "not_causal_stride"):
        base = Case(name, (40, 0, 3, 100), q_lens=(40, 5, 9, 17), causal=False)
        if name == "not_causal_window":
            base = replace(base, window_left=12, layout="HND")
        if name == "not_causal_stride":
            base = replace(base, **_strided((200, 0, 3, 100), 1, 2, 16))
        yield base
    for length in (63, 64, 65, 127, 128, 129):  # borders of tiles: the whole sequence at once, and its tail alone
        yield Case(f"length{length}", (length, length), q_lens=(length, length - 60), layout=LAYOUTS[length % 2])
    yield Case("group5_tail", (300, 20), q_lens=(50, 20), num_qo_heads=10, dtype="bfloat16")
    yield Case("group7_page3", (100, 64), q_lens=(19, 64), num_qo_heads=7, num_kv_heads=1, page_size=3, layout="HND")
    yield Case("many_short", tuple(range(20)), q_lens=tuple(range(20)), page_size=8)
    yield Case("long_window", (1200,), q_lens=(150,), window_left=200, head_dim=128)
    yield Case("long_tail", (1500, 700), q_lens=(33, 100), head_dim=128, layout="HND", dtype="bfloat16")
    yield Case("soft_cap_tail", (200, 90), q_lens=(64, 90), logits_soft_cap=2.0, head_dim=80)


def _v_dim_cases() -> Iterable[Case]:
    for head_dim, v_dim in ((192, 128), (64, 128)):
        for layout, page_size, dtype in (("NHD", 16, "bfloat16"), ("HND", 3, "float16")):
            yield Case(
                f"dim{head_dim}_{v_dim}_{layout}", _ragged(page_size), head_dim=head_dim, v_dim=v_dim, layout=layout,
                page_size=page_size, dtype=dtype, sinks=layout == "HND",
            )  # fmt: skip


V_DIMS = tuple(_v_dim_cases()) + tuple(
    replace(case, name=f"{case.name}_prefill", q_lens=tuple((7, 1, 0, 33)[i % 4] for i in range(case.batch_size)))
    for case in _v_dim_cases()
)

DECODE = tuple(replace(case, name=f"decode_{case.name}") for case in _decode_cases())
PREFILL = tuple(replace(case, name=f"prefill_{case.name}") for case in _prefill_cases())

# gpt-oss: 64 query heads on 8 KV heads of 64 dims, with sinks; in every other layer a query sees itself and 127 tokens.
GPT_OSS: dict[str, Any] = {"num_qo_heads": 64, "num_kv_heads": 8, "head_dim": 64, "dtype": "bfloat16", "sinks": True}
GPT_OSS_WINDOW = 127
_SINKS = (
    Case("full", (300, 0, 1, 129), **GPT_OSS),
    Case("window", (300, 0, 1, 129), window_left=GPT_OSS_WINDOW, layout="HND", **GPT_OSS),
    Case("long", (2100, 600), head_dim=128, sinks=True),  # decode splits it
    Case("long_group32", (1500, 31), num_qo_heads=32, num_kv_heads=1, page_size=1, sinks=True),
    Case("soft_cap", _ragged(8), logits_soft_cap=2.0, page_size=8, sinks=True),
    Case("group3", _ragged(3), num_qo_heads=6, page_size=3, sinks=True),
    Case("dim256", _ragged(16), head_dim=256, layout="HND", sinks=True),
    Case("float32", _ragged(16), dtype="float32", sinks=True),
    Case("empty", (0, 0), sinks=True),
    Case("hidden", (100, 3), window_left=0, layout="HND", dtype="bfloat16", sinks=True),
)
SINKS = (
    *(replace(case, name=f"decode_sinks_{case.name}") for case in _SINKS),
    *(replace(case, name=f"decode_sinks_{case.name}_q_len4", q_len=4) for case in _SINKS[:3]),
    *(
        replace(case, name=f"prefill_sinks_{case.name}", q_lens=tuple((70, 3, 9, 0, 1, 33)[: case.batch_size]))
        for case in _SINKS
    ),
)


# -- needles: one token that decides everything ------------------------------------------------------------------------

_NEEDLE_KV_LENS = (75, 0, 1, 64, 65)
NEEDLE_CASES = tuple(
    replace(case, name=f"{case.name}_{layout}", layout=layout)
    for layout in LAYOUTS
    for case in (
        Case("needle", _NEEDLE_KV_LENS),
        Case("needle_page3", _NEEDLE_KV_LENS, page_size=3),
        Case("needle_window", _NEEDLE_KV_LENS, window_left=33),
        Case("needle_prefill", _NEEDLE_KV_LENS, q_lens=(75, 4, 3, 20, 65)),
        Case("needle_prefill_window", _NEEDLE_KV_LENS, q_lens=(75, 4, 3, 20, 65), window_left=16),
    )
)


def needle_places(case: Case) -> list[int]:
    """First and last slot of every page, and both sides of every decode's window edge."""
    longest = max(case.kv_lens)
    borders = range(0, longest + 1, case.page_size)
    edges = [kv_len - 1 - case.window_left for kv_len in case.kv_lens] if case.window_left >= 0 else []
    places = {border + side for border in (*borders, *edges) for side in (-1, 0)} | {longest - 1}
    return sorted(place for place in places if 0 <= place < longest)


def assert_needle(case: Case, place: int, out: Any, lse: Any) -> None:
    """Raise unless rows `out` and `lse` of build(case, needle=place) show the needle exactly where it is visible."""
    out, lse = np.asarray(out, np.float64), np.asarray(lse, np.float64)
    row = 0
    for kv_len, num_queries in zip(case.kv_lens, case.queries, strict=True):
        for own in range(kv_len - num_queries, kv_len):
            beyond_window = case.window_left >= 0 and place < own - case.window_left
            if place < kv_len and place <= own and not beyond_window:
                assert_close(out[row], np.broadcast_to(needle_values(case), out[row].shape), tolerance=1e-2)
                assert (np.abs(lse[row] - NEEDLE_SCORE) < 0.1).all(), f"row {row} does not see token {place}"
            else:
                assert (lse[row] < 0.75 * NEEDLE_SCORE).all(), f"row {row} sees token {place}, which is hidden"
            row += 1


# -- the lists for bench/: groups by name, the first of which is measured where none is asked for ----------------------


def _bench_decode(
    name: str, kv_lens: tuple[int, ...], num_qo_heads: int = 32, num_kv_heads: int = 8, **options: Any
) -> Case:
    options = {"head_dim": 128, **options}
    return Case(name, kv_lens, num_qo_heads=num_qo_heads, num_kv_heads=num_kv_heads, **options)


def _bench_prefill(
    name: str, batch_size: int, q_len: int, kv_len: int, group_size: int = 4, num_kv_heads: int = 8, **options: Any
) -> Case:
    lengths = {"kv_lens": (kv_len,) * batch_size, "q_lens": (q_len,) * batch_size}
    heads = {"num_qo_heads": group_size * num_kv_heads, "num_kv_heads": num_kv_heads}
    return Case(name, **{**lengths, **heads, "head_dim": 128, **options})


def _even_lengths(batch_size: int, most: int) -> tuple[int, ...]:
    """From 128 to `most` in equal steps, shuffled."""
    return tuple(128 + (most - 128) * (37 * i % batch_size) // (batch_size - 1) for i in range(batch_size))


def _gpt_oss(bench: Callable[..., Case], name: str, *lengths: Any) -> tuple[Case, Case]:
    """A case of gpt-oss as its two kinds of layers have it."""
    full = bench(name, *lengths, **GPT_OSS)
    return full, replace(full, name=f"{name}_window128", window_left=GPT_OSS_WINDOW)


def _of_prefill(name: str) -> Case:
    return next(case for case in BENCH_PREFILL if case.name == name)


def _bench_grid() -> Iterable[Case]:
    """206 points of batch size, KV heads and kv_len; none has more than 2 GB of keys and values."""
    for batch_size in (1, 2, 5, 12, 31, 64, 130, 512):
        for num_kv_heads in (1, 2, 4, 8, 32):
            for kv_len in (64, 500, 1024, 3000, 8192, 32768):
                if batch_size * num_kv_heads * kv_len <= 2**22:
                    name = f"grid_{batch_size}x{kv_len}_{num_kv_heads}h"
                    yield _bench_decode(name, (kv_len,) * batch_size, 4 * num_kv_heads, num_kv_heads)


BENCH_DECODE = (
    _bench_decode("bs1_4k_g4", (4096,), 32, 8),
    _bench_decode("bs1_32k_g4", (32768,), 32, 8),
    _bench_decode("bs64_4k_mqa16", (4096,) * 64, 16, 1),
    _bench_decode("bs16_4k_g4", (4096,) * 16, 32, 8),
    _bench_decode("bs64_2k_g4", (2048,) * 64, 32, 8),
    _bench_decode("bs64_4k_g7", (4096,) * 64, 28, 4),
    _bench_decode("bs256_512_g8", (512,) * 256, 64, 8),
    _bench_decode("bs64_4k_g8", (4096,) * 64, 64, 8),
    _bench_decode("bs64_4k_g5", (4096,) * 64, 40, 8),
    _bench_decode("bs128_4k_g4", (4096,) * 128, 32, 8),
    _bench_decode("bs32_4k_mha", (4096,) * 32, 32, 32),
    _bench_decode("ragged64_g4", tuple(128 + 997 * i % 16000 for i in range(64)), 32, 8),
)
BENCH_DECODE_MORE = {
    "heads": (
        _bench_decode("bs64_4k_9x3_dim64", (4096,) * 64, 9, 3, head_dim=64),
        _bench_decode("bs64_4k_40x40", (4096,) * 64, 40, 40),
        _bench_decode("bs64_4k_32x1", (4096,) * 64, 32, 1),
        _bench_decode("bs64_4k_64x2", (4096,) * 64, 64, 2),
        _bench_decode("bs64_4k_g8_dim80", (4096,) * 64, 64, 8, head_dim=80),
        _bench_decode("bs64_4k_g8_dim256", (4096,) * 64, 64, 8, head_dim=256),
    ),
    "q_len": (
        _bench_decode("bs16_4k_q2", (4096,) * 16, q_len=2),
        _bench_decode("bs16_4k_q4", (4096,) * 16, q_len=4),
    ),
    "window": (_bench_decode("bs64_32k_window512", (32768,) * 64, window_left=511),),  # a query sees 512 keys
    "gpt_oss": (
        *_gpt_oss(_bench_decode, "gpt_oss_1x4096", (4096,)),
        *_gpt_oss(_bench_decode, "gpt_oss_64x4096", (4096,) * 64),
        *_gpt_oss(_bench_decode, "gpt_oss_16x32768", (32768,) * 16),
    ),
    "group": tuple(_bench_decode(f"bs64_4k_4h_g{group}", (4096,) * 64, 4 * group, 4) for group in (4, 5, 7, 12)),
    "hostile": (
        _bench_decode("one_256k_in_255_of_500", (500,) * 100 + (2**18,) + (500,) * 155),
        _bench_decode("log_uniform_1_to_64k", tuple(round(2 ** (16 * (37 * i % 64) / 63)) for i in range(64))),
        _bench_decode("128_empty_in_128_of_4k", (4096, 0) * 128),
    ),
    "ragged": tuple(
        _bench_decode(f"{batch_size}_of_128_to_{most}", _even_lengths(batch_size, most))
        for batch_size, most in ((4, 8000), (16, 8000), (24, 8000), (32, 8000), (32, 2000), (64, 1000), (128, 1000))
    ),
    "kv_len": tuple(_bench_decode(f"1x{2**power}", (2**power,)) for power in range(7, 20)),
    "batch": tuple(_bench_decode(f"{2**power}x2048", (2048,) * 2**power) for power in range(10)),
}
BENCH_GRID = tuple(_bench_grid())
BENCH_LAYERS = tuple(case for case in BENCH_DECODE if case.name in ("bs1_4k_g4", "bs16_4k_g4"))
BENCH_PREFILL = (
    _bench_prefill("1x8192", 1, 8192, 8192),
    _bench_prefill("4x4096", 4, 4096, 4096),
    _bench_prefill("16x1024", 16, 1024, 1024),
    _bench_prefill("8x512_on_8192", 8, 512, 8192),  # 512 queries at the end of 8192 keys
    _bench_prefill("1x16384", 1, 16384, 16384),
    _bench_prefill("64x128_on_2048", 64, 128, 2048),
)
BENCH_PREFILL_MORE = {
    "group": (  # 30 to 36 query heads: about the same work, whose rates compare
        _of_prefill("1x8192"),
        *(
            _bench_prefill(f"1x8192_g{group}", 1, 8192, 8192, group, num_kv_heads)
            for group, num_kv_heads in ((1, 32), (5, 6), (7, 5), (8, 4), (12, 3))
        ),
    ),
    "short": (
        _of_prefill("1x8192"),
        _bench_prefill("256x4_on_2048", 256, 4, 2048),
        _bench_prefill("64x17_on_4096", 64, 17, 4096),
        _bench_prefill("32x64_on_8192", 32, 64, 8192),
    ),
    "head_dim": tuple(
        replace(_of_prefill(name), name=name if head_dim == 128 else f"{name}_dim{head_dim}", head_dim=head_dim)
        for name in ("1x8192", "16x1024")
        for head_dim in (128, 64, 80, 96, 112, 256)
    ),
    "window": (_of_prefill("1x16384"), _bench_prefill("1x16384_window1024", 1, 16384, 16384, window_left=1023)),
    "gpt_oss": (
        *_gpt_oss(_bench_prefill, "gpt_oss_1x8192", 1, 8192, 8192),
        *_gpt_oss(_bench_prefill, "gpt_oss_16x1024", 16, 1024, 1024),
    ),
    "chunk": (_of_prefill("1x16384"), _bench_prefill("1x512_on_32768", 1, 512, 32768)),
    "mixed": (
        _bench_decode("64_on_4096_by_decode", (4096,) * 64),
        _bench_prefill("4x1024", 4, 1024, 1024),
        _bench_prefill(
            "64x1_on_4096_and_4x1024", 68, 0, 0, kv_lens=(4096,) * 64 + (1024,) * 4, q_lens=(1,) * 64 + (1024,) * 4
        ),
    ),
    "length": tuple(_bench_prefill(f"length_{2**power}", 1, 2**power, 2**power) for power in range(9, 16)),
}
# A case should do its work at the rate of these, which are measured before it: the bytes of a decode case, the
# operations of a prefill case. Those of a mixed batch are all its work.
BENCH_BASES = {
    case.name: bases
    for group, bases in (
        (BENCH_DECODE_MORE["group"], ("bs64_4k_4h_g4",)),
        (BENCH_PREFILL_MORE["group"], ("1x8192",)),
        (BENCH_PREFILL_MORE["short"], ("1x8192",)),
        (BENCH_PREFILL_MORE["head_dim"][:6], ("1x8192",)),
        (BENCH_PREFILL_MORE["head_dim"][6:], ("16x1024",)),
        (BENCH_PREFILL_MORE["window"], ("1x16384",)),
        (BENCH_PREFILL_MORE["chunk"], ("1x16384",)),
        (BENCH_PREFILL_MORE["mixed"], ("64_on_4096_by_decode", "4x1024")),
    )
    for case in group
    if case.name not in bases
}


@dataclass(frozen=True)
class MergeCase:
    """num_states states of each row to be merged, by merge_state where they are two."""

    name: str
    rows: int
    num_states: int
    num_heads: int = 32
    head_dim: int = 128
    dtype: str = "float16"

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class AppendCase:
    """New tokens of as many sequences, or all of one sequence where it is a chunk of a prompt."""

    name: str
    tokens: int
    batch_size: int
    num_kv_heads: int = 8
    head_dim: int = 128
    page_size: int = 16
    layout: str = "NHD"
    dtype: str = "float16"

    def __str__(self) -> str:
        return self.name


BENCH_MERGE = (
    MergeCase("64x16", 64, 16),
    MergeCase("4096x8", 4096, 8),
    MergeCase("64x2", 64, 2),
    MergeCase("4096x2", 4096, 2),
)
BENCH_APPEND = (
    AppendCase("1x1", 1, 1),
    AppendCase("64x1", 64, 64),
    AppendCase("256x1", 256, 256),
    AppendCase("1x8192", 8192, 1),
    AppendCase("16x1024", 16 * 1024, 16),
)
