"""Attention over K and V that are spread over ranks: one long context over several GPUs.

    with NcclRanks(rank, 2, address="node0:29500") as comm:
        out = decode(comm, q, kv, table)

with kv and table of PagedKVCache(..., rank=rank, num_ranks=2). Nothing here is imported by `import paged_attn`.
"""

from .attention import BatchDecodeWithPagedKVCache, BatchPrefillWithPagedKVCache, decode, prefill
from .local import LocalRanks
from .mpi import MpiRanks
from .nccl import NcclRanks
from .peers import PeerRanks

__all__ = [
    "BatchDecodeWithPagedKVCache", "BatchPrefillWithPagedKVCache", "LocalRanks", "MpiRanks", "NcclRanks", "PeerRanks",
    "decode", "prefill",
]  # fmt: skip
