"""What each backend can do: `supports` answers it beforehand, and the same limits refuse a call."""

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np

from .checks.scalars import as_int
from .interop import any_dtype, as_dtype, cupy_for, parse_device, resolve_device
from .layout import Layout, as_layout


@dataclass(frozen=True)
class Support:
    """The answer of `supports`: true or false, and why not."""

    supported: bool
    reason: str = ""

    def __bool__(self) -> bool:
        return self.supported


OPS = ("append", "decode", "prefill", "merge")
_HEAD_DIM_MULTIPLE, _MAX_HEAD_DIM = 16, 256  # on a GPU; merge takes any
_MIN_COMPUTE_CAPABILITY = 80


def supports(
    op: str = "decode",
    *,
    device: Any = None,
    dtype: Any = None,
    head_dim: int | None = None,
    v_head_dim: int | None = None,
    num_qo_heads: int | None = None,
    num_kv_heads: int | None = None,
    page_size: int | None = None,
    layout: Layout | str | None = None,
) -> Support:
    """Whether a call would be served on this machine: true or false, with a `.reason` that says why not.

    Nothing limits page sizes, layouts, group sizes, q_len, windows, soft caps, sinks and positions.

    Parameters
    ----------
    op: "append", "decode", "prefill" or "merge". Default "decode".
    device: "cpu", "cuda", "cuda:1", ... Default None: the current CUDA device where there is one, else the CPU.
    dtype: "float16", "bfloat16", "float32", "float64", or such a NumPy dtype. Default None: not asked about.
    head_dim, v_head_dim, num_qo_heads, num_kv_heads, page_size: ints. Default None: not asked about; v_head_dim is then
        head_dim.
    layout: Layout or "NHD" or "HND". Default None: not asked about.

    Raises
    ------
    ValueError, TypeError: what is no question, as a head_dim of 0 or a dtype that NumPy does not know.
    """
    check_op(op)
    dims = {"head_dim": head_dim, "v_head_dim": v_head_dim, "page_size": page_size}
    heads = {"num_qo_heads": num_qo_heads, "num_kv_heads": num_kv_heads}
    for name, value in (dims | heads).items():
        if value is not None:
            as_int(value, name, minimum=1)
    if layout is not None:
        as_layout(layout)
    kind, _ = parse_device(device)
    dtype_name = None if dtype is None else any_dtype(dtype).name
    try:
        if dtype is not None:
            as_dtype(dtype)
        if num_qo_heads is not None and num_kv_heads is not None and num_qo_heads % num_kv_heads:
            raise ValueError(f"num_qo_heads={num_qo_heads} is not a multiple of num_kv_heads={num_kv_heads}")
        _check_limits(op, kind or resolve_device(None), dtype_name, head_dim, v_head_dim)
        _check_compute_capability(resolve_device(device))
    except (ValueError, TypeError, ImportError, NotImplementedError) as error:
        return Support(False, str(error))
    return Support(True)


def check_op(op: Any) -> None:
    if not isinstance(op, str) or op not in OPS:
        raise ValueError(f"op is {op!r}, which is none of {', '.join(OPS)}; pass one of them")


@functools.lru_cache(maxsize=1024)
def check_supported(op: str, device: str, dtype: np.dtype, head_dim: int, v_head_dim: int | None = None) -> None:
    """NotImplementedError for what the backend of `device` lacks."""
    _check_limits(op, device, dtype.name, head_dim, v_head_dim)
    _check_compute_capability(device)


def _check_limits(op: str, device: str, dtype: str | None, head_dim: int | None, v_head_dim: int | None) -> None:
    if device == "cpu":
        return
    dtypes = ["float16", "bfloat16"] + ["float32"] * (op == "merge")
    if dtype is not None and dtype not in dtypes:
        raise NotImplementedError(
            f"{op} on a GPU takes {', '.join(dtypes)}, not {dtype}; pass .astype(np.float16) arrays, or NumPy arrays "
            f"to compute on the CPU in {dtype}"
        )
    for name, dim in (("head_dim", head_dim), ("v_head_dim", v_head_dim)):
        if op != "merge" and dim is not None and (dim % _HEAD_DIM_MULTIPLE or dim > _MAX_HEAD_DIM):
            scale = f" and pass sm_scale=1/sqrt({dim})" if name == "head_dim" else ""
            pad = f"pad it with zeros{scale}, or " if dim <= _MAX_HEAD_DIM else ""
            raise NotImplementedError(
                f"{op} on a GPU takes a {name} that is a multiple of {_HEAD_DIM_MULTIPLE} up to {_MAX_HEAD_DIM}, not "
                f"{dim}; {pad}pass NumPy arrays to compute on the CPU"
            )


def _check_compute_capability(device: str) -> None:
    if device == "cpu":
        return
    found = int(cupy_for(f"{device} is asked for").cuda.Device(int(device.partition(":")[2])).compute_capability)
    if found < _MIN_COMPUTE_CAPABILITY:
        raise NotImplementedError(
            f"{device} has compute capability {found / 10}, and the kernels need {_MIN_COMPUTE_CAPABILITY / 10}; "
            f"use a newer GPU, or pass NumPy arrays to compute on the CPU"
        )
