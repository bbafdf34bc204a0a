"""The requests of a case as the attention kernels know them, the work of plan_requests done by NumPy."""

import numpy as np

from paged_attn import compile as kernels
from paged_attn.backends import reference
from tests.cases import Inputs

NO_REQUEST = -1  # total_len, as in page_table.cuh


def requests_of(inputs: Inputs, count: int) -> np.ndarray:
    """`count` Request records, those past the batch of no request; first_query and first_tile are 0."""
    case, batch = inputs.case, inputs.case.batch_size
    requests = np.zeros(count, kernels.params_dtype(kernels.load_source("schedule.cu"), "Request"))
    requests["total_len"] = NO_REQUEST
    requests["first_page"][:batch] = inputs.indptr[:-1]
    requests["num_pages"][:batch] = np.diff(inputs.indptr)
    requests["kv_len"][:batch] = case.kv_lens
    requests["total_len"][:batch] = [case.total_len(request) for request in range(batch)]
    if inputs.page_offset is not None:
        requests["page_offset"][:batch] = inputs.page_offset
    requests["num_queries"][:batch] = case.queries
    return requests


def seen_of(inputs: Inputs, requests: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The tokens [begin, end) of each record that some query of it sees, the work of plan_splits."""
    case = inputs.case
    limits = [
        reference.kv_limits(
            reference.Request(
                page_ids=inputs.indices,
                kv_len=int(request["kv_len"]),
                total_len=int(request["total_len"]),
                page_offset=int(request["page_offset"]),
                page_stride=case.page_stride,
                page_size=case.page_size,
                first_query=0,
                num_queries=int(request["num_queries"]),
            ),
            causal=True,
            window_left=case.window_left,
        )
        for request in requests
    ]
    return np.array([begin[0] for begin, _ in limits]), np.array([end[-1] for _, end in limits])
