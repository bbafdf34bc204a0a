"""Arrays at the door: any array library's array becomes a NumPy or CuPy view of the same memory, and back again.

Nothing here copies or moves data on the way in. NumPy and CuPy arrays pass through; everything else comes by DLPack.
"""

import contextlib
import ctypes
import functools
import math
import sys
import time
from types import ModuleType
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from . import install

FLOAT_DTYPES = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
}
BFLOAT16, FLOAT32 = FLOAT_DTYPES["bfloat16"], FLOAT_DTYPES["float32"]
_METADATA = {
    **dict.fromkeys(("indptr", "indices", "last_page_len", "page_offset", "total_len", "qo_indptr"), "int32"),
    **dict.fromkeys(("block_table", "seq_lens", "batch_indices", "positions"), "int32"),
    **dict.fromkeys(("lse", "sinks", "s", "s_a", "s_b"), "float32"),
    "slots": "int64",
}
"""The dtypes of arguments that always have the same one; others are of FLOAT_DTYPES."""

_HOST_DEVICES = (1, 3)  # kDLCPU, kDLCUDAHost
_CUDA_DEVICES = (2, 13)  # kDLCUDA, kDLCUDAManaged


# -- DLPack: reading one flag and relabelling one dtype --------------------------------------------------------------

# NumPy refuses the bfloat16 of a capsule, and CuPy does not look at its READ_ONLY flag.


class _DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("byte_offset", ctypes.c_uint64),
    )


class _ManagedVersioned(ctypes.Structure):
    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", _DLTensor),
    )


_READ_ONLY = 1
_CODE_UINT, _CODE_BFLOAT = 1, 4
_is_capsule_named = ctypes.pythonapi.PyCapsule_IsValid
_is_capsule_named.restype, _is_capsule_named.argtypes = ctypes.c_int, (ctypes.py_object, ctypes.c_char_p)
_capsule_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_capsule_pointer.restype, _capsule_pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)


class _Bfloat16AsUint16:
    """A DLPack producer that hands out another one's capsule with bfloat16 relabelled as uint16: no copy.

    The capsule owns its description of the tensor until it is consumed, so that changing the label in it is safe.
    """

    def __init__(self, producer: Any) -> None:
        self._producer = producer
        self.was_bfloat16 = False
        self.read_only = False

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._producer.__dlpack_device__()

    def __dlpack__(self, **options: Any) -> Any:
        try:
            capsule = self._producer.__dlpack__(**options)
        except TypeError:  # a producer of DLPack before 1.0 knows `stream` only
            capsule = self._producer.__dlpack__(**{name: options[name] for name in options if name == "stream"})
        if _is_capsule_named(capsule, b"dltensor_versioned"):
            managed = _ManagedVersioned.from_address(_capsule_pointer(capsule, b"dltensor_versioned"))
            tensor, self.read_only = managed.tensor, bool(managed.flags & _READ_ONLY)
        else:  # an unversioned DLManagedTensor begins with its DLTensor
            tensor = _DLTensor.from_address(_capsule_pointer(capsule, b"dltensor"))
        if (tensor.code, tensor.bits) == (_CODE_BFLOAT, 16):
            tensor.code, self.was_bfloat16 = _CODE_UINT, True
        return capsule


# -- in and out ------------------------------------------------------------------------------------------------------


class Array(Protocol):
    """An array of any library that paged_attn takes: NumPy, CuPy, JAX, or another with DLPack."""

    def __dlpack__(self, *args: Any, **options: Any) -> Any: ...


def native(x: Any, name: str, dtype: np.dtype | None = None, *, writable: bool = False) -> Any:
    """A NumPy or CuPy array over the memory of `x`, without a copy.

    Parameters
    ----------
    x: numpy.ndarray, cupy.ndarray, jax.Array, or any object with `__dlpack__`.
    name: how messages call the argument.
    dtype: the one that `x` must have, for messages. Default None: a float format, or what _METADATA says of the name.
    writable: whether paged_attn is going to write into it.

    Raises
    ------
    TypeError: `x` is no array (a list, say), is traced by jax.jit, is sharded over devices, or has a dtype that NumPy
        does not know.
    ValueError: the array was deleted; or `writable`, and it may not be written.
    ImportError: a GPU array, and CuPy is not installed.
    """
    if type(x) in native_types and x is not None:  # the usual one, and a launch waits for this
        return x
    if not is_native(x):
        return _from_dlpack(x, name, _METADATA.get(name, "") if dtype is None else dtype.name, writable)
    if writable and isinstance(x, np.ndarray) and not x.flags.writeable:
        raise ValueError(f"{name} is a read-only NumPy array; pass {name}.copy(), or an array with flags.writeable")
    return x


native_types: set[type] = {type(None)}  # of what may stay as it is: no array, and the types of CuPy's that came before


def is_native(x: Any) -> bool:
    """Whether `x` is a NumPy or CuPy array already."""
    if isinstance(x, np.ndarray):
        return True
    cupy = sys.modules.get("cupy")
    if cupy is None or not isinstance(x, cupy.ndarray):
        return False
    native_types.add(type(x))
    return True


def _from_dlpack(x: Any, name: str, metadata: str, writable: bool) -> Any:
    wanted = metadata or "float16"
    if not hasattr(x, "__dlpack__"):
        kind = type(x).__name__
        remedy = f"pass np.asarray({name}, dtype=np.{wanted}) or its like"
        if type(x).__module__.startswith("paged_attn."):
            remedy = (
                "pass the arguments in their order: decode(q, kv, table), prefill(q, qo_indptr, kv, table), "
                "run(q, kv), append(kv, slots, k, v)"
            )
        raise TypeError(f"{name} must be an array (NumPy, CuPy, JAX or another with __dlpack__), got {kind}; {remedy}")
    check_readable(x, name)
    if writable and is_jax(x):
        raise ValueError(
            f"{name} is a JAX array, which is immutable, and paged_attn writes into {name}; pass a NumPy array "
            f"(on the CPU) or a CuPy array (on a GPU) and read it from JAX through jax.dlpack.from_dlpack"
        )
    device_type, device_id = x.__dlpack_device__()
    if device_type not in _HOST_DEVICES + _CUDA_DEVICES:
        raise TypeError(
            f"{name} lives on a device of DLPack type {device_type}, and paged_attn knows the CPU and CUDA; "
            f"move {name} to one of them"
        )
    producer, device, take = _Bfloat16AsUint16(x), contextlib.nullcontext(), np.from_dlpack
    if device_type in _CUDA_DEVICES:
        cupy = cupy_for(f"{name} lives on a GPU")
        device, take = cupy.cuda.Device(device_id), cupy.from_dlpack
        if cupy.cuda.runtime.streamIsCapturing(cupy.cuda.get_current_stream(device_id).ptr):
            raise TypeError(
                f"{name} ({type(x).__module__}.{type(x).__qualname__}) is to be taken by DLPack while the stream is "
                f"capturing a CUDA graph, and its library would have the stream wait for another, which ends the "
                f"capture; take it before, {name} = cupy.from_dlpack({name}), and keep that"
            )
    try:
        with device:
            array = take(producer)
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        dtype = str(getattr(x, "dtype", "")).rpartition(".")[2]
        if dtype and dtype not in (*FLOAT_DTYPES, wanted):
            rule = metadata or f"one of {', '.join(FLOAT_DTYPES)}"
            raise TypeError(f"{name} must be {rule}, got {dtype}; pass {name}.astype(np.{wanted})") from error
        raise TypeError(f"{name} cannot be taken by DLPack ({error}); pass a NumPy or CuPy array") from error
    if writable and (producer.read_only or (isinstance(array, np.ndarray) and not array.flags.writeable)):
        raise ValueError(
            f"{name} ({type(x).__module__}.{type(x).__qualname__}) does not say by DLPack that it may be written; "
            f"pass a NumPy or CuPy array"
        )
    return array.view(BFLOAT16) if producer.was_bfloat16 else array


def to_caller(result: Any, like: Any) -> Any:
    """A NumPy or CuPy `result` as an array of the library of `like`: JAX if `like` is a JAX array, else unchanged."""
    if not is_jax(like):
        return result
    import jax

    if isinstance(result, np.ndarray):
        (device,) = like.devices()
        return jax.device_put(result, device)
    with on_device_of(result):  # JAX makes the array's device the current one, and leaves it so
        return jax.dlpack.from_dlpack(result)


def is_writable(given: Any, array: Any) -> bool:
    """Whether the NumPy or CuPy array made of `given` may be written: JAX arrays are immutable, also on a GPU, where
    their CuPy view does not show it."""
    return not is_jax(given) and (not isinstance(array, np.ndarray) or array.flags.writeable)


def is_jax(x: Any) -> bool:
    """Whether `x` is a jax.Array; JAX is not imported for the question."""
    jax = sys.modules.get("jax")
    return jax is not None and isinstance(x, jax.Array)


def check_readable(x: Any, name: str) -> None:
    """A jax.Array has memory to read, all of it on one device; anything else passes."""
    if not is_jax(x):
        return
    if isinstance(x, sys.modules["jax"].core.Tracer):
        raise TypeError(
            f"{name} is a JAX array that is being traced (jax.jit, vmap or grad): it has no memory to read; "
            f"call paged_attn outside the transformation"
        )
    if x.is_deleted():
        raise ValueError(
            f"{name} is a JAX array that was deleted, as donate_argnums of jax.jit does ({name}.shape={x.shape}, "
            f"{x.dtype}); pass the array that the jitted function returned, or do not donate {name}"
        )
    if len(devices := x.sharding.device_set) > 1:
        raise TypeError(
            f"{name} is a JAX array on {len(devices)} devices, sharded or replicated ({name}.shape={x.shape}), and "
            f"paged_attn takes arrays on one device; pass a shard, {name}.addressable_shards[i].data, or all of it on "
            f"one device, jax.device_put({name}, jax.devices()[0])"
        )


# -- devices and dtypes ----------------------------------------------------------------------------------------------


def device_of(array: Any) -> str:
    """Where a NumPy or CuPy array lives: "cpu" or "cuda:<i>"."""
    return "cpu" if isinstance(array, np.ndarray) else f"cuda:{array.device.id}"


def address_of(array: Any) -> int:
    """Where a CuPy array begins; 0 for a NumPy array, and for None."""
    return 0 if array is None or isinstance(array, np.ndarray) else int(array.data.ptr)


def on_device_of(array: Any) -> Any:
    """`with on_device_of(array)`: its GPU is the current one; nothing for an array on the CPU."""
    return contextlib.nullcontext() if isinstance(array, np.ndarray) else array.device


@functools.cache
def device_index(device: str) -> int:
    """i of "cuda:<i>"."""
    return int(device.removeprefix("cuda:"))


def current_stream(device: str) -> tuple[Any, int]:
    """CuPy's current stream of a GPU and its address; None and 0 on the CPU, where a call returns when its work is
    done."""
    if device == "cpu":
        return None, 0
    stream = sys.modules["cupy"].cuda.get_current_stream(device_index(device))
    return stream, stream.ptr


def namespace(array: Any) -> ModuleType:
    """The module numpy or cupy, by the array."""
    return np if isinstance(array, np.ndarray) else sys.modules["cupy"]


def cupy_for(reason: str) -> ModuleType:
    """The module cupy, or an ImportError that gives the reason, why it cannot be imported, and what to do."""
    try:
        import cupy
    except Exception as error:  # of any type: a cache folder that cannot be made raises OSError
        remedy = "see to it that `import cupy` works (CUPY_CACHE_DIR names the folder of its kernel cache)"
        if isinstance(error, ImportError):
            remedy = f"install it with {install.for_cuda(install.CUPY, install.TOOLKIT)}"
        raise ImportError(f"{reason}, and CuPy cannot be imported ({_described(error)}); {remedy}") from error
    return cupy


def _described(error: Exception) -> str:
    return str(error) if isinstance(error, ImportError) else f"{type(error).__name__}: {error}"


def cuda_available() -> bool:
    """Whether CuPy can be imported and sees a CUDA device."""
    return not _why_no_cuda()


_has_cuda = False  # once seen, a device stays
_no_cuda = (-math.inf, "")  # what is missing may be put right: when it was last asked for, and why there was none
_ASK_AGAIN = 5.0  # seconds: an import that fails may take a while, and calls without a device are many


def _why_no_cuda() -> str:
    """Why there is no CUDA device for CuPy; nothing where there is one."""
    global _has_cuda, _no_cuda
    if _has_cuda:
        return ""
    asked, why = _no_cuda
    if time.monotonic() - asked < _ASK_AGAIN:
        return why
    try:
        _has_cuda = bool(cupy_for("CuPy is needed").cuda.is_available())
        why = "" if _has_cuda else "there is none"
    except Exception as error:  # a driver that does not answer, say
        why = _described(error)
    _no_cuda = time.monotonic(), why
    return why


def parse_device(device: Any) -> tuple[str | None, int | None]:
    """What a caller says, whether it is there or not: "cpu" or "cuda" (None: whichever there is), and the index."""
    if device is None:
        return None, None
    index: int | None = None
    if isinstance(device, str):
        if device == "cpu":
            return "cpu", None
        kind, _, number = device.partition(":")
        known = kind == "cuda" and (device == "cuda" or number.isdecimal())
        index = int(number) if known and number else None
    elif isinstance(device, bool):
        known = False
    elif isinstance(device, (int, np.integer)):
        known, index = bool(device >= 0), int(device)
    else:
        index = getattr(device, "id", None)
        known = isinstance(index, int)
    if not known:
        raise ValueError(
            f"device must be 'cpu', 'cuda', 'cuda:<i>', an index or a cupy.cuda.Device, got {device!r}; "
            f"pass None for the current CUDA device where there is one"
        )
    return "cuda", index


def resolve_device(device: Any) -> str:
    """ "cpu" or "cuda:<i>" for what a caller may say.

    None is the current CUDA device where CuPy sees one, else the CPU; besides "cpu", "cuda" (the current one),
    "cuda:1", 1 and a cupy.cuda.Device are understood.
    """
    kind, index = parse_device(device)
    if kind is None:
        return f"cuda:{_current_device()}" if cuda_available() else "cpu"
    if kind == "cpu":
        return "cpu"
    cupy = cupy_for(f"device={device!r} needs CuPy")
    if why := _why_no_cuda():
        raise ValueError(f"device={device!r}, but CuPy sees no CUDA device ({why}); pass 'cpu'")
    if index is None:
        return f"cuda:{_current_device()}"
    count = cupy.cuda.runtime.getDeviceCount()
    if index >= count:
        raise ValueError(f"device={device!r}, but CuPy sees {count} CUDA devices; pass 'cpu' or an index below {count}")
    return f"cuda:{index}"


def _current_device() -> int:
    return sys.modules["cupy"].cuda.runtime.getDevice()


def as_dtype(dtype: Any) -> np.dtype:
    """The np.dtype of "float16", "bfloat16", "float32", "float64" or of any spelling of them (np, ml_dtypes, jnp)."""
    if isinstance(dtype, str) and dtype not in FLOAT_DTYPES:
        raise _no_dtype(dtype)
    found = any_dtype(dtype)
    if found not in FLOAT_DTYPES.values():
        raise _no_dtype(dtype)
    return found


def any_dtype(dtype: Any, name: str = "dtype") -> np.dtype:
    """The np.dtype of a name or a NumPy dtype, those of ml_dtypes included: whatever paged_attn computes in."""
    try:
        if dtype is not None:  # np.dtype(None) is float64
            return np.dtype(dtype)
    except TypeError:
        pass
    raise _no_dtype(dtype, name)


def _no_dtype(dtype: Any, name: str = "dtype") -> TypeError:
    return TypeError(f"{name} must be one of {', '.join(FLOAT_DTYPES)} (a name or a NumPy dtype), got {dtype!r}")
