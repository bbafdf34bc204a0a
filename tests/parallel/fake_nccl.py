"""A stand-in for cupy.cuda.nccl on the SIMT shim's cards: ranks are devices, or threads that play processes.

A group of calls is one operation of each communicator. It is done when all ranks have come to it; a launch returns
when it is done, or after `patience` seconds, as if the GPU waited from then on. What is not done, an event shows, and
a device waits for.
"""

import ctypes
import sys
import threading
import time
from types import ModuleType
from typing import Any

NCCL_UINT8 = 1
available = True
patience = 5.0

_changed = threading.Condition()
_operations: dict[tuple[bytes, int], "_Operation"] = {}  # by communicator and number
_group = threading.local()


class NcclError(RuntimeError): ...


class _Operation:
    def __init__(self, num_ranks: int) -> None:
        self.num_ranks = num_ranks
        self.calls: dict[int, list[tuple[Any, ...]]] = {}  # by rank
        self.devices: set[int] = set()
        self.is_over = False

    def come(self, rank: int, device: int, calls: list[tuple[Any, ...]]) -> None:
        self.calls[rank] = calls
        self.devices.add(device)
        if len(self.calls) == self.num_ranks and not self.is_over:
            self._copy()
            self.is_over = True

    def _copy(self) -> None:
        for rank, calls in self.calls.items():
            for kind, *arguments in calls:
                if kind == "allGather":
                    source, _, size = arguments
                    for others in self.calls.values():
                        ((_, _, target, its_size),) = others
                        assert its_size == size
                        if target + rank * size != source:
                            ctypes.memmove(target + rank * size, source, size)
                elif kind == "send":
                    source, size, peer = arguments
                    ((target, its_size),) = [x[1:3] for x in self.calls[peer] if x[0] == "recv" and x[3] == rank]
                    assert its_size == size
                    ctypes.memmove(target, source, size)


class NcclCommunicator:
    def __init__(self, num_ranks: int, unique_id: bytes, rank: int) -> None:
        assert isinstance(unique_id, bytes) and len(unique_id) == 128
        self._num_ranks, self._id, self._rank = num_ranks, unique_id, rank
        self._device = sys.modules["cupy"].cuda.runtime.getDevice()
        self._count, self._is_aborted = 0, False

    def _add(self, *call: Any) -> None:
        if self._is_aborted:
            raise NcclError("NCCL_ERROR_INVALID_ARGUMENT")
        assert sys.modules["cupy"].cuda.runtime.getDevice() == self._device, "the device of another rank is current"
        _group.calls.setdefault(self, []).append(call)

    def allGather(self, source: int, target: int, count: int, dtype: int, stream: int) -> None:
        self._add("allGather", source, target, count)

    def send(self, source: int, count: int, dtype: int, peer: int, stream: int) -> None:
        self._add("send", source, count, peer)

    def recv(self, target: int, count: int, dtype: int, peer: int, stream: int) -> None:
        self._add("recv", target, count, peer)

    def launch(self, calls: list[tuple[Any, ...]]) -> _Operation:
        operation = _operations.setdefault((self._id, self._count), _Operation(self._num_ranks))
        self._count += 1
        operation.come(self._rank, self._device, calls)
        return operation

    def check_async_error(self) -> None: ...

    def destroy(self) -> None:
        self._is_aborted = True

    def abort(self) -> None:
        """Its operations end, on its device alone."""
        self._is_aborted = True
        with _changed:
            for (unique_id, _), operation in _operations.items():
                if unique_id == self._id:
                    operation.devices.discard(self._device)
            _changed.notify_all()


def get_unique_id() -> bytes:
    return (b"%d" % time.monotonic_ns()).ljust(128, b"\0")


def groupStart() -> None:
    _group.calls = {}


def groupEnd() -> None:
    with _changed:
        operations = [comm.launch(calls) for comm, calls in _group.calls.items()]
        _changed.notify_all()
        _changed.wait_for(lambda: all(operation.is_over for operation in operations), patience)


def _waiting(device: int) -> list[_Operation]:
    return [x for x in list(_operations.values()) if device in x.devices and not x.is_over]


class Event:
    def __init__(self, **options: Any) -> None:
        self._device, self._operations = sys.modules["cupy"].cuda.runtime.getDevice(), []

    def record(self, stream: Any) -> None:
        self._operations = _waiting(self._device)

    @property
    def done(self) -> bool:
        return not any(x in _waiting(self._device) for x in self._operations)


def _synchronize() -> None:
    device = sys.modules["cupy"].cuda.runtime.getDevice()
    with _changed:
        _changed.wait_for(lambda: not _waiting(device))


def install() -> None:
    """Make this module cupy.cuda.nccl of the stand-in for CuPy, which is installed."""
    cuda = sys.modules["cupy"].cuda
    cuda.Event, cuda.runtime.deviceSynchronize = Event, _synchronize
    module: ModuleType = sys.modules[__name__]
    sys.modules["cupy.cuda"].nccl = sys.modules["cupy.cuda.nccl"] = module  # type: ignore[attr-defined]
