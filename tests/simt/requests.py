"""The requests of a case as the attention kernels know them, the work of plan_requests done by NumPy."""

import numpy as np

from paged_attn import compile as kernels
from tests.cases import Inputs


def requests_of(inputs: Inputs, count: int) -> np.ndarray:
    """`count` Request records, those behind the batch empty. Who looks at first_query and first_tile sets them."""
    case, batch = inputs.case, inputs.case.batch_size
    requests = np.zeros(count, kernels.params_dtype(kernels.load_source("schedule.cu"), "Request"))
    requests["first_page"][:batch] = inputs.indptr[:-1]
    requests["num_pages"][:batch] = np.diff(inputs.indptr)
    requests["kv_len"][:batch] = case.kv_lens
    requests["total_len"][:batch] = [case.total_len(request) for request in range(batch)]
    if inputs.page_offset is not None:
        requests["page_offset"][:batch] = inputs.page_offset
    requests["num_queries"][:batch] = case.queries
    return requests
