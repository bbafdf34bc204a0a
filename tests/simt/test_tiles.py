"""plan_tiles, run on a CPU by the SIMT shim: the same requests, the longest first, and the tiles before each."""

from dataclasses import dataclass

import numpy as np
import pytest

from paged_attn import compile as kernels
from tests.simt.driver import launch
from tests.simt.guarded import Guarded

REQUEST = kernels.params_dtype(kernels.load_source("plan_tiles"), "Request")
SHARED_BYTES = 256 * 4 + 256  # the classes, and SCAN_BYTES
INT_MAX = 2**31 - 1


@dataclass(frozen=True)
class Case:
    requests: int
    longest: int = 5000
    window_left: int = -1
    group_size: int = 1
    tile_rows: int = 128
    block: int = 64
    reverse: bool = False


CASES = [
    *(Case(requests) for requests in (0, 1, 2, 31, 63, 64, 65, 200)),
    Case(1, block=1024),
    Case(1100, block=1024),
    Case(300, block=256, reverse=True),
    *(Case(70, group_size=group_size, reverse=True) for group_size in (4, 5, 7, 12, 200)),
    *(Case(70, window_left=window_left, group_size=3) for window_left in (0, 1, 100, 4000, INT_MAX)),
    Case(90, longest=0),
    Case(90, longest=1),
    Case(90, longest=9),
    Case(90, longest=INT_MAX),
    Case(20, longest=INT_MAX, window_left=INT_MAX, group_size=64, tile_rows=64),
    Case(130, tile_rows=1),
]


def make(case: Case) -> np.ndarray:
    """Requests in any order with the sentinel behind them. Some have no key, some no query."""
    rng = np.random.default_rng(case.requests + case.longest)
    requests = np.zeros(case.requests + 1, REQUEST)
    for field in requests.dtype.names or ():
        requests[field] = rng.integers(0, 1000, requests.size)
    requests["first_page"] = np.arange(requests.size)  # tells them apart
    requests["kv_len"] = rng.integers(0, case.longest, requests.size, endpoint=True)
    requests["kv_len"][::5] = 0
    requests["num_queries"] = rng.integers(0, 300, requests.size)
    requests["num_queries"][::3] = 0
    return requests


def run(case: Case, requests: np.ndarray) -> np.ndarray:
    guarded = Guarded()
    given, out = guarded.input(requests, 16), guarded.output(np.full(requests.size, -1, REQUEST), 16)
    fields = {
        "requests": given,
        "sorted": out,
        "max_batch_size": case.requests,
        "window_left": case.window_left,
        "group_size": case.group_size,
        "tile_rows": case.tile_rows,
    }
    launch("plan_tiles", 1, case.block, fields, SHARED_BYTES, reverse=case.reverse)
    guarded.check()
    return out


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_longest_come_first(case: Case) -> None:
    requests = make(case)
    out = run(case, requests)

    # 1. Every request is there once, as it was; the sentinel keeps its place.
    order = out["first_page"]
    assert sorted(order[:-1].tolist()) == list(range(case.requests)) and order[-1] == case.requests
    for field in out.dtype.names or ():
        if field != "first_tile":
            np.testing.assert_array_equal(out[field], requests[field][order], err_msg=field)

    # 2. Sorted by the tokens that a tile sees, to within an eighth.
    tokens = out["kv_len"][:-1].astype(np.float64)
    if case.window_left >= 0:
        tokens = np.minimum(tokens, case.window_left + case.tile_rows // case.group_size + 1)
    later = np.maximum.accumulate(tokens[::-1])[::-1]  # the most of this and all behind it
    assert (later <= tokens * 1.125).all()

    # 3. Tiles before each, and the totals.
    tiles = -(-out["num_queries"][:-1].astype(np.int64) * case.group_size // case.tile_rows)
    np.testing.assert_array_equal(out["first_tile"], np.concatenate([[0], np.cumsum(tiles)]))


def test_more_tiles_than_an_int() -> None:
    """plan_requests makes no such requests, as their queries would overlap. Even so nothing wraps around."""
    case = Case(3, group_size=64, tile_rows=1)
    requests = make(case)
    requests["num_queries"][:3] = INT_MAX
    assert run(case, requests)["first_tile"].tolist() == [0, INT_MAX, INT_MAX, INT_MAX]
