"""Merging on the card: every order of the grid, and more rows than one of its axes holds, against the NumPy backend."""

from typing import Any

import numpy as np
import pytest

import paged_attn as pa
from tests.cases import LSE_TOLERANCE, OUT_TOLERANCE, assert_close

cupy = pytest.importorskip("cupy")


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("num_states", [2, 3, 4, 9])
@pytest.mark.parametrize(("rows", "heads"), [(1, 9), (500, 5), (65535, 1), (65536, 2), (140002, 1)])
def test_rows_of_any_number(rows: int, heads: int, num_states: int, dtype: str) -> None:
    random = np.random.default_rng(rows)
    v = random.standard_normal((rows, num_states, heads, 16), np.float32).astype(dtype)
    s = random.standard_normal((rows, num_states, heads), np.float32)
    expected = pa.merge_states(v, s)
    v, s = cupy.asarray(v), cupy.asarray(s)
    assert_right(pa.merge_states(v, s), expected, dtype)
    if num_states == 2:
        assert_right(pa.merge_state(v[:, 0], s[:, 0], v[:, 1], s[:, 1]), expected, dtype)


def assert_right(result: tuple[Any, Any], expected: tuple[Any, Any], dtype: str) -> None:
    (out, lse), (right, right_lse) = map(cupy.asnumpy, result), expected
    assert_close(out, right, lse, right_lse, tolerance=OUT_TOLERANCE[dtype], lse_tolerance=LSE_TOLERANCE)
