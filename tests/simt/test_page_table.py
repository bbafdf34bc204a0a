"""What a query sees, by page_table.cuh on a CPU and by the reference, for positions up to the largest there are."""

from typing import Any

import numpy as np
import pytest

from paged_attn import compile as kernels
from paged_attn.backends import reference
from tests.simt.driver import launch

LARGEST = 2**31 - 1
LIMITS = """
struct LimitsParams {
    const Request* requests;
    int* begin;
    int* end;
    Positions positions;
    int num_requests;
};

extern "C" __global__ void limits(const __grid_constant__ LimitsParams p) {
    int at = 0;
    for (int i = 0; i < p.num_requests; ++i)
        for (int query = 0; query < p.requests[i].num_queries; ++query, ++at) {
            const KvLimits seen = kv_limits(query, p.requests[i], p.positions);
            p.begin[at] = seen.begin;
            p.end[at] = seen.end;
        }
}
"""


def around(rng: np.random.Generator, *values: int) -> int:
    """A number at or near one of `values`, or any, of [0, LARGEST]."""
    near = int(rng.choice([*values, 0, LARGEST, int(rng.integers(LARGEST))])) + int(rng.integers(-2, 3))
    return min(max(near, 0), LARGEST)


def random_request(rng: np.random.Generator, page_size: int, stride: int) -> dict[str, int]:
    """A request whose last token stands below 2^31, as every table's does, with any length of the whole sequence."""
    most_offset = LARGEST // page_size - 1
    offset = min(around(rng, most_offset, stride), most_offset)
    num_pages = min(int(rng.integers(4)), 1 + (most_offset - offset) // stride)
    kv_len = (num_pages - 1) * page_size + int(rng.integers(1, page_size + 1)) if num_pages else 0
    last = (offset + (num_pages - 1) * stride) * page_size
    return {
        "kv_len": kv_len,
        "total_len": around(rng, last, last + page_size, offset * page_size),
        "page_offset": offset,
        "num_queries": int(rng.integers(1, 6)),
    }


@pytest.mark.parametrize("page_size", [1, 3, 16, 2**20])
@pytest.mark.parametrize("stride", [1, 2, 3, 2**16, 2**30, LARGEST - 1, LARGEST])
def test_limits_of_large_numbers(stride: int, page_size: int) -> None:
    rng = np.random.default_rng(stride % 1000 + page_size)
    source = kernels.load_source("page_table.cuh") + LIMITS
    made = [random_request(rng, page_size, stride) for _ in range(200)]
    requests = np.zeros(len(made), kernels.params_dtype(source, "Request"))
    for record, values in zip(requests, made, strict=True):
        kernels.fill(record, values)
    for causal in (False, True):
        for window_left in (-1, 0, page_size, around(rng, stride), LARGEST):
            begin, end = (np.full(sum(request["num_queries"] for request in made), -77, np.int32) for _ in range(2))
            positions = {
                "page_size": kernels.fast_divide(page_size),
                "page_stride": stride,
                "causal": causal,
                "window_left": window_left,
            }
            params: dict[str, Any] = {"requests": requests, "begin": begin, "end": end, "positions": positions}
            launch("limits", 1, 1, params | {"num_requests": len(made)}, source=source)
            want = [
                reference.kv_limits(
                    reference.Request(
                        page_ids=np.zeros(0, np.int32),
                        page_stride=stride,
                        page_size=page_size,
                        first_query=0,
                        **request,
                    ),
                    causal=causal,
                    window_left=window_left,
                )
                for request in made
            ]
            np.testing.assert_array_equal(begin, np.concatenate([limits[0] for limits in want]))
            np.testing.assert_array_equal(end, np.concatenate([limits[1] for limits in want]))
