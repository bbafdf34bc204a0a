"""One array: dtype, shape, strides, device, alignment; and the signature that says when these were checked before."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from ..interop import BFLOAT16, FLOAT_DTYPES, device_of
from ..spec import ALIGNMENT

INT32, INT64 = np.dtype(np.int32), np.dtype(np.int64)


def check_dtype(array: Any, name: str, wanted: np.dtype, why: str = "") -> None:
    if array.dtype != wanted:
        because = f" ({why})" if why else ""
        raise TypeError(f"{name} must be {wanted}{because}, got {array.dtype}; pass {name}.astype({_spelled(wanted)})")


def _spelled(dtype: np.dtype) -> str:
    """A dtype as a caller writes it."""
    return "ml_dtypes.bfloat16" if dtype == BFLOAT16 else f"np.{dtype}"


def check_float(array: Any, name: str) -> None:
    if array.dtype not in FLOAT_DTYPES.values():
        raise TypeError(
            f"{name} must be one of {', '.join(FLOAT_DTYPES)}, got {array.dtype}; pass {name}.astype(np.float16), say"
        )


def check_shape(array: Any, name: str, wanted: tuple[Any, ...], axes: str) -> None:
    """`wanted` has an int for an extent that is fixed and a name for one that is not."""
    shape = array.shape
    if shape == wanted:
        return
    if len(shape) != len(wanted):
        raise ValueError(f"{name} must have {len(wanted)} axes, {axes}, got {name}.shape={shape}; reshape {name}")
    for extent, want in zip(shape, wanted, strict=True):
        if isinstance(want, int) and extent != want:
            named = ", ".join(str(w) for w in wanted)
            raise ValueError(
                f"{name} must have shape [{named}], {axes}, got {name}.shape={shape}; reshape or slice {name}"
            )


def check_device(array: Any, name: str, device: str, other: str) -> None:
    found = device_of(array)
    if found != device:
        raise TypeError(
            f"{name} lives on {found} and {other} on {device}; they must be together (nothing is moved by itself): "
            f"pass {_moved(name, device)}"
        )


def check_metadata_device(array: Any, name: str, device: str, other: str = "kv") -> None:
    """Metadata lives beside the data of `other`, or on the host, from where it is uploaded."""
    found = device_of(array)
    if found not in ("cpu", device):
        raise TypeError(
            f"{name} lives on {found} and {other} on {device}; metadata must be a NumPy array or live on {device}: "
            f"pass {_moved(name, device)}"
        )


def _moved(name: str, device: str) -> str:
    return f"cupy.asnumpy({name})" if device == "cpu" else f"cupy.asarray({name}), made on {device}"


def check_vector(array: Any, name: str, dtype: np.dtype, length: int | None, meaning: str) -> None:
    """A contiguous 1-D array of metadata: `length` entries, if that is known."""
    if array.dtype is not dtype:  # NumPy has one object for each, but not for what comes by DLPack
        check_dtype(array, name, dtype)
    if array.ndim != 1:
        raise ValueError(f"{name} must be 1-D, {meaning}, got {name}.shape={array.shape}; pass {name}.reshape(-1)")
    if length is not None and array.shape[0] != length:
        raise ValueError(
            f"{name} must have {length} entries, {meaning}, got {array.shape[0]}; make {name} of that length"
        )
    if array.shape[0] > 1 and array.strides[0] != array.dtype.itemsize:
        raise ValueError(
            f"{name} must be contiguous, got a stride of {array.strides[0]} bytes for {dtype}; "
            f"pass np.ascontiguousarray({name})"
        )
    check_base(array, name, dtype.itemsize)


def check_strides(array: Any, name: str, *, aligned: bool = True) -> None:
    """The last axis is contiguous. On a GPU base and strides are multiples of 16 bytes where kernels load that much
    at once (`aligned`), else of an element. Strides of axes of extent 1 are free."""
    shape, strides, dtype = array.shape, array.strides, array.dtype
    if 0 in shape:
        return
    if strides[-1] != dtype.itemsize and shape[-1] > 1:
        raise ValueError(
            f"{name} must be contiguous along its last axis: the stride there is {strides[-1]} bytes, and "
            f"{dtype} has {dtype.itemsize} ({name}.shape={shape}); pass a contiguous copy, np.ascontiguousarray({name})"
        )
    unit = 1
    if not isinstance(array, np.ndarray):
        unit = ALIGNMENT if aligned else dtype.itemsize
        check_base(array, name, unit)
    for axis, stride in enumerate(strides[:-1]):
        if (stride >= 0 and stride % unit == 0) or shape[axis] == 1:
            continue
        if stride < 0:
            raise ValueError(
                f"{name} runs backwards along axis {axis}, in steps of {stride} bytes; "
                f"pass a contiguous copy, np.ascontiguousarray({name})"
            )
        raise ValueError(
            f"{name} has a stride of {stride} bytes along axis {axis}, no multiple of {unit} (the kernels load {unit} "
            f"at once; {name}.shape={shape}, {dtype}); pad the axes inside it to multiples of "
            f"{unit // dtype.itemsize} elements, or pass a copy"
        )


def check_base(array: Any, name: str, unit: int = ALIGNMENT) -> None:
    """A GPU array begins at a multiple of `unit` bytes."""
    if not isinstance(array, np.ndarray) and array.data.ptr % unit:
        raise ValueError(
            f"{name} begins at address {array.data.ptr:#x}, which is no multiple of {unit} bytes (the kernels load "
            f"{unit} at once); pass a view that begins at a multiple of it, or a copy"
        )


def check_whole(
    array: Any,
    name: str,
    shape: tuple[int, ...],
    why: str,
    dtypes: Sequence[np.dtype],
    device: str,
    source: str,
    *,
    is_written: bool = True,
) -> None:
    """An array that is written or read as one block: C-contiguous, of `shape` (which `why` explains) and one of
    `dtypes`, on the device of `source`."""
    check_shape(array, name, shape, why)
    if array.dtype not in dtypes:
        allowed = " or ".join(str(dtype) for dtype in dict.fromkeys(dtypes))
        wanted = _spelled(dtypes[0])
        remedy = f"make it empty(shape, dtype={wanted})" if is_written else f"pass {name}.astype({wanted})"
        raise TypeError(f"{name} must be {allowed}, got {array.dtype}; {remedy}")
    check_device(array, name, device, source)
    if not array.flags.c_contiguous:
        block = "an array made by empty_like or a slice of leading rows of one"
        raise ValueError(
            f"{name} must be C-contiguous, got strides {array.strides} for {name}.shape={array.shape}; "
            f"pass {block if is_written else f'np.ascontiguousarray({name})'}"
        )
    check_base(array, name, array.dtype.itemsize)


def signatures_of(arrays: Iterable[Any]) -> tuple[list[tuple[Any, ...] | None], list[int]]:
    """Of each array its signature: shape, strides, dtype, device and alignment, by which arrays pass or fail the checks
    together; and its address, 0 on the host. An array may be None: there is none."""
    signatures: list[tuple[Any, ...] | None] = []
    addresses = []
    for array in arrays:  # one loop for both: every launch waits for it
        address = 0
        if array is None:
            signatures.append(None)
        elif isinstance(array, np.ndarray):
            signatures.append((array.shape, array.strides, array.dtype))
        else:
            pointer = array.data
            address = pointer.ptr
            signatures.append((array.shape, array.strides, array.dtype, pointer.device_id, address % ALIGNMENT))
        addresses.append(address)
    return signatures, addresses


def first_true(wrong: np.ndarray) -> int | None:
    """Index of the first True, or None."""
    if not wrong.size:
        return None
    found = int(wrong.argmax())
    return found if wrong[found] else None


def entry(field: str, index: int, array: np.ndarray) -> dict[str, Any]:
    """For a PageTableError: which entry of which array is wrong, and its value."""
    return {"field": field, "index": index, "value": int(array[index])}
