"""The CUDA backend: CuPy arrays, and the kernels of kernels/ on CuPy's current stream.

Nothing here waits for the device, and nothing looks at what device arrays hold: kernels clean metadata, and store what
is wrong with it in a status word until a caller asks (Plan.raise_status, raise_device_status).
"""

from .memory import empty, zeros
from .merge import merge_state, merge_states
from .plan import Plan
from .pool import append, copy_pages
from .status import raise_device_status, raise_word
from .tables import (
    check_table,
    compare_checksums,
    from_block_table,
    seq_lens,
    split_table,
    table_checksum,
    table_slots,
    to_block_table,
    update_table,
)
from .uploads import to_backend, uploader

__all__ = [
    "Plan", "append", "check_table", "compare_checksums", "copy_pages", "empty", "from_block_table", "merge_state",
    "merge_states", "raise_device_status", "raise_word", "seq_lens", "split_table", "table_checksum", "table_slots",
    "to_backend", "to_block_table", "update_table", "uploader", "zeros",
]  # fmt: skip
