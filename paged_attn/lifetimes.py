"""Who keeps what alive: memory that a kernel reads or writes stays until the kernel is over, without a wait.

Launches are asynchronous, so an argument may lose its last reference while a kernel still reads it. Memory of CuPy's
pool is safe: the pool gives a block to later work of the same stream only. Two kinds are not, and are kept here:

- What another library lent us by DLPack (`Loan`). JAX gives a temporary's memory to its next operation, on a stream
  that does not wait for ours.
- What a CUDA graph holds the addresses of (`keep_with_graph`). Its kernels run again at every replay, for as long as
  the graph exists.

CuPy and the driver are looked up inside functions only; nothing here runs for arrays on the CPU.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import sys
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np

MOST_BUSY = 8  # of those that wait, how many are found busy before no more are asked
_PER_THREAD_STREAM = 2  # the address of cudaStreamPerThread


class PerThread(threading.local):
    """A dict for each thread, which goes when the thread ends.

    Parameters of a launch and pinned memory are written before they are used: no other thread may write them meanwhile.
    """

    def __init__(self) -> None:
        self.items: dict[Any, Any] = {}


# --- 1. memory that is lent -------------------------------------------------------------------------------------------


class Loan:
    """Views of GPU memory that belongs to another library, all on one device.

    Each launch that reads them is followed by `used`. When the loan itself is dropped, the views stay until the last
    such launch is over; a later call of ours that takes a loan finds out, without waiting.
    """

    __slots__ = ("_events", "_last_capture", "_views")

    def __init__(self, views: list[Any]) -> None:
        self._views = views
        # By stream: the stream, held so that no other gets its address, and an event behind the last work there that
        # reads the views.
        self._events: dict[tuple[int, int], tuple[Any, Any]] = {}
        self._last_capture = -1  # whose graph keeps the views

    def used(self) -> None:
        """Work that reads the views is on the current stream of their device."""
        cuda = sys.modules["cupy"].cuda
        release_finished()
        with cuda.Device(self._views[0].device.id) as device:
            stream = cuda.get_current_stream(device.id)
            if cuda.runtime.streamIsCapturing(stream.ptr):
                capture = capture_id(stream.ptr)
                if capture != self._last_capture:
                    keep_with_graph(stream.ptr, self._views)
                    self._last_capture = capture
                return
            # Each thread has another default stream, and all of these have one address.
            key = stream.ptr, threading.get_ident() if stream.ptr == _PER_THREAD_STREAM else 0
            if key not in self._events:
                with capture_of_others():
                    busy = {other: held for other, held in self._events.items() if not held[1].done}
                self._events = busy | {key: (stream, cuda.Event(disable_timing=True))}
            self._events[key][1].record(stream)

    def __del__(self) -> None:
        if self._events and not sys.is_finalizing():
            _waiting.append(([event for _, event in self._events.values()], self._views))
            release_finished()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(None), ()  # the arrays of a deep copy, or of a pickle, are not lent


_waiting: deque[tuple[list[Any], list[Any]]] = deque()  # events, and what is dropped when all of them are over


def loan_of(*arrays: tuple[Any, Any]) -> Loan | None:
    """The loan of those arrays on a GPU that came by DLPack, or None where none did.

    arrays: pairs of what `interop.native` made, and what it was given. Where it made a view, the two differ.
    """
    views = [view for view, given in arrays if view is not given and not isinstance(view, np.ndarray)]
    return Loan(views) if views else None


@contextmanager
def reading(*loans: Loan | None) -> Iterator[None]:
    """`with reading(...)`: what is launched inside reads these loans, also where something raises behind a launch."""
    try:
        yield
    finally:
        used(*loans)


def used(*loans: Loan | None) -> None:
    """`used` of those loans that there are."""
    for loan in loans:
        if loan is not None:
            loan.used()


def release_finished() -> None:
    """Drop what no kernel and no graph needs any more. It only asks; it does not wait."""
    if _waiting:
        busy: list[Any] = []
        with capture_of_others():
            for events, views in popped(_waiting):
                if not all(event.done for event in events):
                    busy.append((events, views))
                if len(busy) == MOST_BUSY:
                    break
        _waiting.extend(busy)  # behind the others, so that one stream that is stuck holds up no other
    for semaphore, kept in itertools.islice(popped(_kept), MOST_BUSY):
        if _libc().sem_trywait(semaphore):  # it has not been posted: the graph exists
            _kept.append((semaphore, kept))
        else:
            _idle_semaphores.append(semaphore)


Item = TypeVar("Item")


def popped(queue: deque[Item]) -> Iterator[Item]:
    """Takes out what a queue holds now, the first one first, while other threads may take out some, too."""
    for _ in range(len(queue)):
        try:
            yield queue.popleft()
        except IndexError:
            return


# --- 2. memory that a graph knows -------------------------------------------------------------------------------------

# CUDA calls a function when the last graph that holds a "user object" is gone, on another thread, where neither
# Python nor CUDA may be called. sem_post of the C library is such a function: it leaves a mark that we find later.
_kept: deque[tuple[int, Any]] = deque()  # the address of a semaphore, and what stays until it is posted
_idle_semaphores: list[int] = []

_GRAPH_OWNS_REFERENCE = 1  # CU_GRAPH_USER_OBJECT_MOVE
_NO_DESTRUCTOR_SYNC = 1  # CU_USER_OBJECT_NO_DESTRUCTOR_SYNC, which has to be given
_RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED
_SEMAPHORE_BYTES = 64  # sem_t has 32 at most


def capture_id(stream: int) -> int:
    """A number that identifies the capture that the stream is in."""
    return _capture(stream)[0]


def keep_with_graph(stream: int, kept: Any) -> None:
    """`kept` stays until the graph that the stream is capturing is destroyed, and all that was instantiated of it."""
    release_finished()
    _, graph = _capture(stream)
    try:
        semaphore = _idle_semaphores.pop()
    except IndexError:  # it is never freed, as a graph may outlive this interpreter, but used again
        semaphore = int(_libc().malloc(_SEMAPHORE_BYTES))
        _libc().sem_init(semaphore, 0, 0)
    user_object = ctypes.c_void_p()
    destroy = ctypes.cast(_libc().sem_post, ctypes.c_void_p)
    _check(_cuda().cuUserObjectCreate(ctypes.byref(user_object), semaphore, destroy, 1, _NO_DESTRUCTOR_SYNC))
    _kept.append((semaphore, kept))
    error = _cuda().cuGraphRetainUserObject(graph, user_object, 1, _GRAPH_OWNS_REFERENCE)
    if error:
        _cuda().cuUserObjectRelease(user_object, 1)  # which posts the semaphore
    _check(error)


def _capture(stream: int) -> tuple[int, int]:
    """The id and the graph of the capture that the stream is in."""
    status, number, graph = ctypes.c_int(), ctypes.c_uint64(), ctypes.c_void_p()
    results = map(ctypes.byref, (status, number, graph))
    _check(_cuda().cuStreamGetCaptureInfo_v2(stream, *results, None, None))
    return number.value, graph.value or 0


@contextmanager
def capture_of_others() -> Iterator[None]:
    """Inside, what has nothing to do with a captured stream does no harm to the capture, however strict its mode is."""
    mode = ctypes.c_int(_RELAXED)
    _check(_cuda().cuThreadExchangeStreamCaptureMode(ctypes.byref(mode)))
    try:
        yield
    finally:
        _check(_cuda().cuThreadExchangeStreamCaptureMode(ctypes.byref(mode)))


def _check(error: int) -> None:
    if error:
        raise sys.modules["cupy"].cuda.driver.CUDADriverError(error)


@functools.cache
def _libc() -> Any:
    library = ctypes.CDLL(None)
    library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, (ctypes.c_size_t,)
    library.sem_init.argtypes = ctypes.c_void_p, ctypes.c_int, ctypes.c_uint
    library.sem_trywait.argtypes = (ctypes.c_void_p,)
    return library


@functools.cache
def _cuda() -> Any:
    """The driver. A stream is its address, 0 the default one."""
    library = ctypes.CDLL("libcuda.so.1")
    pointer = ctypes.c_void_p
    library.cuStreamGetCaptureInfo_v2.argtypes = (pointer,) * 6
    library.cuUserObjectCreate.argtypes = pointer, pointer, pointer, ctypes.c_uint, ctypes.c_uint
    library.cuGraphRetainUserObject.argtypes = pointer, pointer, ctypes.c_uint, ctypes.c_uint
    library.cuUserObjectRelease.argtypes = pointer, ctypes.c_uint
    library.cuThreadExchangeStreamCaptureMode.argtypes = (pointer,)
    return library
