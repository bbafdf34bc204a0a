"""A stand-in for CuPy whose cards are the SIMT shim: the CUDA backend, host code and kernels, on a CPU.

`install()` makes it the module `cupy` of this process (one that does nothing else: a child process). It has what
paged_attn/backends/cuda/ and the tests of corrupted inputs use. Every array stands in guarded memory of its own:
whoever leaves it ends the process (behind it) or is found by `check` (before it). New arrays are full of 0xFF bytes:
-1 as page ids, NaN as floats. Launches are done when they return, so streams and events have nothing to do, but for
those of `exchange`, which wait for each other: each runs in a thread until its stream, an event there or its card is
waited for. `launched` says where each went, and `current` which card and streams are the current ones, as CuPy has it
for each thread.
"""

import ctypes
import re
import sys
import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from types import MappingProxyType, ModuleType, SimpleNamespace
from typing import Any

import numpy as np

from paged_attn import compile as kernels
from paged_attn import lifetimes, tensor_map

from . import driver
from .guarded import Guarded

ALIGNMENT = 16  # of an array's first byte; cudaMalloc gives more, the kernels need no more

_guarded = Guarded()
_functions: dict[int, tuple[str, str, dict[str, int]]] = {}  # by "address": text, kernel, constants


class ndarray:
    """What the backend uses of cupy.ndarray, around a NumPy array."""

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, host: np.ndarray, device: int | None = None) -> None:
        self.host = host
        self.device = _Device(current.device if device is None else device)

    def __getattr__(self, name: str) -> Any:
        if name in ("shape", "dtype", "strides", "ndim", "size", "nbytes", "flags", "itemsize"):
            return getattr(self.host, name)
        raise AttributeError(name)

    def __len__(self) -> int:
        return len(self.host)

    def __getitem__(self, key: Any) -> "ndarray":
        return ndarray(self.host[key], self.device.id)

    def view(self, dtype: Any) -> "ndarray":
        return ndarray(self.host.view(dtype), self.device.id)

    def reshape(self, *shape: Any) -> "ndarray":
        return ndarray(self.host.reshape(*shape), self.device.id)

    def __setitem__(self, key: Any, value: "ndarray") -> None:
        assert not isinstance(value, np.ndarray), "CuPy does not copy from the host by itself"
        self.host[key] = value.host

    def fill(self, value: Any) -> None:
        _finish(self.device.id)
        self.host.fill(value)

    def swapaxes(self, a: int, b: int) -> "ndarray":
        return ndarray(self.host.swapaxes(a, b), self.device.id)

    def get(self) -> np.ndarray:
        _finish(self.device.id)
        return self.host.copy()

    @property
    def data(self) -> "_Pointer":
        return _Pointer(self.host.ctypes.data, self.device.id)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {"data": (self.host.ctypes.data, False), "shape": self.host.shape, "version": 3}


class _Pointer:
    def __init__(self, ptr: int, device: int = 0) -> None:
        self.ptr, self.device_id = ptr, device

    def memset_async(self, value: int, num_bytes: int, stream: Any = None) -> None:
        ctypes.memset(self.ptr, value, num_bytes)

    def copy_from_host_async(self, source: int, num_bytes: int, stream: Any) -> None:
        ctypes.memmove(self.ptr, source, num_bytes)


def empty(shape: Any, dtype: Any) -> ndarray:
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    given = np.full(size, 0xFF, np.uint8)
    return ndarray(_guarded.output(given, min(ALIGNMENT, np.dtype(dtype).itemsize)).view(dtype).reshape(shape))


def alloc(num_bytes: int) -> "_Pointer":
    return empty(num_bytes, np.uint8).data


def asarray(array: np.ndarray) -> ndarray:
    copy = empty(array.shape, array.dtype)
    copy.host[...] = array
    return copy


class _RawModule:
    def __init__(self, code: str, options: Sequence[str]) -> None:
        found = (re.fullmatch(r"-D(\w+)=(\d+)", option) for option in options)
        self._text, self._defines = code, {define[1]: int(define[2]) for define in found if define}

    def get_function(self, name: str) -> Any:
        address = len(_functions) + 1
        _functions[address] = (self._text, name, self._defines)
        return SimpleNamespace(kernel=SimpleNamespace(ptr=address), max_dynamic_shared_size_bytes=0)


def _launch(config_address: int, function: int, arguments_address: int, extra: None) -> int:
    """cuLaunchKernelEx."""
    text, name, defines = _functions[function]
    config = kernels._LaunchConfig.from_address(config_address)
    launched.append((name, current.device, config.stream or 0))
    dtype = kernels.params_dtype(text, kernels.params_name(text, name))
    params = ctypes.c_void_p.from_address(arguments_address).value
    assert params is not None
    where = current.device, config.stream or 0
    run = partial(
        driver.launch,
        name,
        (config.grid_x, config.grid_y, config.grid_z),
        (config.block_x, config.block_y, config.block_z),
        np.frombuffer((ctypes.c_char * dtype.itemsize).from_address(params), dtype)[0:1].reshape(()).copy(),
        config.shared_bytes,
        source=text,
        reverse=reverse,
        **defines,
    )
    if name == "exchange":
        worker, under_way = _streams.setdefault(where, (ThreadPoolExecutor(1), deque()))
        under_way.append(worker.submit(run, instance=list(_streams).index(where)))
    else:
        _finish(*where)
        with _one_at_a_time:
            run()
    return 0


# By card and stream: a thread, and what it has to do or has done.
_streams: dict[tuple[int, int], tuple[ThreadPoolExecutor, deque[Future[None]]]] = {}
_one_at_a_time = threading.Lock()


def _finish(device: int, stream: int | None = None) -> None:
    """Wait for what is under way on a stream of a card, or on all of them."""
    for where, (_, under_way) in list(_streams.items()):
        if where[0] == device and stream in (None, where[1]):
            while under_way:
                under_way.popleft().result()


NUM_DEVICES = 2
reverse = False  # whether the threads of a block take their turns in the opposite order


class _Current(threading.local):
    device = 0

    def __init__(self) -> None:
        self.streams = [Stream(0), Stream(0)]  # by device: the default one


class Stream:
    """What the backend uses of cupy.cuda.Stream. Its address says which one it is; 0 is the default stream."""

    def __init__(self, address: int | None = None, *, non_blocking: bool = False, priority: int = 0) -> None:
        self.ptr = id(self) if address is None else address

    def __enter__(self) -> "Stream":
        self._before = current.streams[current.device]
        current.streams[current.device] = self
        return self

    def __exit__(self, *error: object) -> None:
        current.streams[current.device] = self._before

    def synchronize(self) -> None:
        _finish(current.device, self.ptr)

    def wait_event(self, event: Any) -> None:
        """What is behind the event is over."""


class _Device:
    compute_capability = "80"
    attributes = MappingProxyType({"MultiProcessorCount": 132, "MaxSharedMemoryPerMultiprocessor": 228 * 1024})

    def __init__(self, index: int = 0) -> None:
        self.id = index

    def __enter__(self) -> "_Device":
        self._before, current.device = current.device, self.id
        return self

    def __exit__(self, *error: object) -> None:
        current.device = self._before


current = _Current()
launched: list[tuple[str, int, int]] = []  # kernel, the current device, the stream's address


class Memory:
    """An allocation apart from others."""

    def __init__(self, size: int) -> None:
        self._array = empty(size, np.uint8)
        self.ptr = self._array.data.ptr


class _PinnedMemory(bytearray):
    @property
    def mem(self) -> Any:
        return SimpleNamespace(size=len(self))

    @property
    def ptr(self) -> int:
        return ctypes.addressof(ctypes.c_char.from_buffer(self))


class GuardPages:
    """What tests/gpu/fuzz.py's Arena is for a card."""

    def keep(self) -> None:
        """What is there now stays for good."""
        global _guarded
        self._kept, _guarded = _guarded, Guarded()

    def start(self) -> None:
        """Forget all arrays but the kept ones."""
        global _guarded
        _guarded = Guarded()

    def check(self) -> None:
        self._kept.check()
        _guarded.check()


def host_map(
    address: int, dims: tuple[int, ...], strides: tuple[int, ...], box: tuple[int, ...], bfloat16: bool
) -> tuple[int, ...]:
    """A HostTensorMap of the shim: address, 4 strides, 5 dims, 5 extents of the box, in 16 words."""
    words = (address, *_padded(strides, 4), *_padded(dims, 5), *_padded(box, 5))
    return _padded(words, 16)


def _padded(numbers: tuple[int, ...], count: int) -> tuple[int, ...]:
    return numbers + (0,) * (count - len(numbers))


def install(compute_capability: str = "80") -> None:
    """compute_capability: that of the cards; Hopper's, "90", takes its own kernel of prefill."""
    _Device.compute_capability = compute_capability
    tensor_map._encode = host_map
    event = SimpleNamespace(record=lambda stream: _finish(current.device, stream.ptr), done=True)
    cuda = SimpleNamespace(
        Device=_Device,
        Event=lambda **options: event,
        Memory=Memory,
        Stream=Stream,
        alloc=alloc,
        alloc_pinned_memory=_PinnedMemory,
        get_current_stream=lambda device=-1: current.streams[current.device if device < 0 else device],
        is_available=lambda: True,
        nvrtc=SimpleNamespace(getVersion=lambda: (12, 9)),
        driver=SimpleNamespace(),
        runtime=SimpleNamespace(
            getDevice=lambda: current.device,
            setDevice=lambda device: setattr(current, "device", device),
            getDeviceCount=lambda: NUM_DEVICES,
            deviceSynchronize=lambda: _finish(current.device),
            deviceGetPCIBusId=lambda device: f"0000:{device}:00.0",
            deviceCanAccessPeer=lambda device, peer: True,
            deviceEnablePeerAccess=lambda peer: None,
            memset=ctypes.memset,
            ipcGetMemHandle=lambda address: address.to_bytes(64, "little"),
            ipcOpenMemHandle=lambda handle, flags: int.from_bytes(handle, "little"),
            ipcCloseMemHandle=lambda address: None,
            streamIsCapturing=lambda stream: False,
        ),
    )
    module = ModuleType("cupy")
    vars(module).update(ndarray=ndarray, empty=empty, asarray=asarray, RawModule=_RawModule, cuda=cuda)
    cuda_module = ModuleType("cupy.cuda")
    vars(cuda_module).update(vars(cuda))
    sys.modules |= {"cupy": module, "cupy.cuda": cuda_module}
    kernels._launch_function = lambda: _launch
    lifetimes._cuda = lambda: SimpleNamespace(cuThreadExchangeStreamCaptureMode=lambda mode: 0)
