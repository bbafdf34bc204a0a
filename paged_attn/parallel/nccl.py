"""NcclRanks: a rank a GPU, which talk by NCCL, in one process a GPU, one process for all, or anything between.

NCCL's kernels wait for the other ranks on the GPU, and for ever. So a thread watches the exchanges that were launched:
one that is not over `timeout` seconds behind the one before it is ended by aborting the communicators of this process,
and from then on every call raises TimeoutError. Each process finds out by itself, as NCCL demands. A graph's exchanges
cannot be watched: a wait of status() or close() that takes longer than `timeout` ends those.
"""

from __future__ import annotations

import contextlib
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .. import install, lifetimes
from ..checks import scalars
from ..interop import cupy_for, current_stream, device_index, resolve_device
from .messages import MessageRanks
from .sockets import Sockets

_PERIOD = 0.02  # seconds between two looks at what is under way


class NcclRanks(MessageRanks):
    """GPUs that talk by NCCL, a rank each.

    CUDA graphs may capture steps, in streamCaptureModeRelaxed. Close it, on every rank, for it has a thread.

    Parameters
    ----------
    rank: int, that of this process, or the first of its ranks.
    num_ranks: int, ranks of all processes.
    address: "host:port", where the process of rank 0 listens and the others find it. Default None: unique_id tells how,
        or all ranks are in this process.
    unique_id: bytes of cupy.cuda.nccl.get_unique_id(), called by one process and brought to all others by you; what
        ranks say to each other then goes by NCCL, too. Default None: rank 0 makes it.
    timeout: float, seconds that a rank is waited for, and more than any work between two exchanges takes. Default 10.0.
    devices: list of "cuda:<i>", indices or cupy.cuda.Devices, for ranks rank, rank + 1, ... Default None: one rank, on
        the current device.

    Raises
    ------
    TimeoutError: a rank does not come. ValueError: ranks or devices that do not fit. ImportError: no CuPy, or no NCCL.
    """

    def __init__(
        self,
        rank: int,
        num_ranks: int,
        *,
        address: str | None = None,
        unique_id: bytes | None = None,
        timeout: float = 10.0,
        devices: Sequence[Any] | None = None,
    ) -> None:
        cupy_for("NcclRanks needs CuPy")
        from cupy.cuda import nccl

        if not nccl.available:
            raise ImportError(
                f"NcclRanks needs NCCL, and CuPy cannot load it; install it with {install.for_cuda(install.NCCL)}"
            )
        self._nccl: Any = nccl
        found = tuple(resolve_device(device) for device in (["cuda"] if devices is None else devices))
        if "cpu" in found or len(set(found)) < len(found) or not found:
            raise ValueError(f"devices is {devices}, and each rank has a GPU of its own; pass one GPU for each")
        count = scalars.as_int(num_ranks, "num_ranks", minimum=len(found))
        first = scalars.as_int(rank, "rank", minimum=0, maximum=count - len(found))
        super().__init__(count, tuple(range(first, first + len(found))), found, timeout)
        self._lost = ""  # why there are no communicators any more
        self._comms: list[Any] = []
        self._under_way: deque[tuple[list[Any], float]] = deque()  # events behind an exchange, when it was launched
        self._idle_events: list[list[Any]] = []
        self._progress = 0.0  # when the watch last saw an exchange end
        self._stop = threading.Event()
        self._in_use = threading.Lock()  # held while the communicators are asked for errors, or taken away
        self._sockets: Sockets | None = None
        try:
            if unique_id is None:
                self._sockets = Sockets(self.ranks, count, address, timeout)
                made_here = nccl.get_unique_id() if first == 0 else b""
                unique_id = self._sockets.all_gather([made_here, *[b""] * (len(found) - 1)])[0]
            self._finish(lambda: self._make(unique_id), "making the communicators of NCCL")
        except BaseException:
            self._end()
            raise
        threading.Thread(target=_watch, args=(weakref.ref(self), self._stop), daemon=True).start()

    def _make(self, unique_id: Any) -> None:
        comms = self._grouped(lambda i, _: self._nccl.NcclCommunicator(self.num_ranks, unique_id, self.ranks[i]))
        self._comms = comms

    # -- exchanges -----------------------------------------------------------------------------------------------------

    def all_gather(self, buffers: list[Any]) -> None:
        def call(i: int, stream: int) -> None:
            size, begin = buffers[i].shape[1], buffers[i].data.ptr
            mine = begin + self.ranks[i] * size
            self._comms[i].allGather(mine, begin, size, self._nccl.NCCL_UINT8, stream)

        self._launch(call)

    def all_to_all(self, sent: list[Any], received: list[Any]) -> None:
        def call(i: int, stream: int) -> None:
            size, source, target = sent[i].shape[1], sent[i].data.ptr, received[i].data.ptr
            for peer in range(self.num_ranks):
                self._comms[i].send(source + peer * size, size, self._nccl.NCCL_UINT8, peer, stream)
                self._comms[i].recv(target + peer * size, size, self._nccl.NCCL_UINT8, peer, stream)

        self._launch(call)

    def _launch(self, call: Callable[[int, int], None]) -> None:
        """Launch an exchange of each rank of this process, and have it watched."""
        self.check_usable()
        try:
            self._grouped(call)
        except (self._nccl.NcclError, IndexError) as error:  # IndexError: the communicators are taken away
            if self._lost:  # meanwhile
                raise TimeoutError(self._lost) from error
            raise
        cuda = cupy_for("").cuda
        streams = [current_stream(device)[0] for device in self.devices]
        if any(cuda.runtime.streamIsCapturing(stream.ptr) for stream in streams):
            return
        events = self._idle_events.pop() if self._idle_events else self._each(lambda i: cuda.Event(disable_timing=True))
        self._each(lambda i: events[i].record(streams[i]))
        self._under_way.append((events, time.monotonic()))

    def _grouped(self, call: Callable[[int, int], Any]) -> list[Any]:
        """call(i, stream) of each rank of this process, as one group of NCCL."""
        self._nccl.groupStart()
        try:
            return self._each(lambda i: call(i, current_stream(self.devices[i])[1]))
        finally:
            self._nccl.groupEnd()

    def _each(self, call: Callable[[int], Any]) -> list[Any]:
        """call(i) of each rank of this process, with its device as the current one."""
        results = []
        for i, device in enumerate(self.devices):
            with cupy_for("").cuda.Device(device_index(device)):
                results.append(call(i))
        return results

    # -- messages ------------------------------------------------------------------------------------------------------

    def all_gather_bytes(self, messages: list[bytes]) -> list[bytes]:
        if self._lost:
            raise TimeoutError(self._lost)
        if self._sockets is None:
            return self._gather_by_nccl(messages)
        try:
            return self._sockets.all_gather(messages)
        except TimeoutError as error:
            self._abort(str(error))
            raise

    def _gather_by_nccl(self, messages: list[bytes]) -> list[bytes]:
        """First their lengths, then all of them as long as the longest."""
        cupy = cupy_for("")

        def gather(equal: list[bytes]) -> list[bytes]:
            size = len(equal[0])
            buffers = [x.reshape(self.num_ranks, size) for x in self.buffers(self.num_ranks, size)]

            def write(i: int) -> None:
                buffers[i][self.ranks[i]] = cupy.asarray(np.frombuffer(equal[i], np.uint8))

            self._each(write)
            self.all_gather(buffers)
            self.check()
            return [row.tobytes() for row in buffers[0].get()]

        lengths = gather([len(message).to_bytes(8, "little") for message in messages])
        sizes = [int.from_bytes(length, "little") for length in lengths]
        padded = gather([message.ljust(max(1, *sizes), b"\0") for message in messages])
        return [message[:size] for message, size in zip(padded, sizes, strict=True)]

    # -- ranks that do not come ----------------------------------------------------------------------------------------

    def check_usable(self) -> None:
        super().check_usable()
        if self._lost:
            raise TimeoutError(self._lost)

    def check(self) -> None:
        """Wait for all work of the devices of this process; TimeoutError where an exchange does not end."""
        if self.is_closed:
            return
        if not self._lost:
            try:
                self._finish(
                    lambda: self._each(lambda i: cupy_for("").cuda.runtime.deviceSynchronize()),
                    f"the work of {', '.join(self.devices)}",
                )
                self._check_comms()
            except (TimeoutError, self._nccl.NcclError) as error:
                self._abort(str(error))
        self.check_usable()

    def _finish(self, call: Callable[[], Any], what: str) -> None:
        """Make a call that may wait for other ranks, in a thread that is left alone where it does not return."""
        errors: list[BaseException] = []

        def run() -> None:
            try:
                call()
            except BaseException as error:
                errors.append(error)

        thread, begin = threading.Thread(target=run, daemon=True), time.monotonic()
        thread.start()
        while thread.is_alive():
            thread.join(_PERIOD)
            if thread.is_alive() and time.monotonic() - max(begin, self._progress) > self.timeout:
                raise TimeoutError(f"a rank did not come to {self!r}: {what} was not over within {self.timeout} s")
        if errors:
            raise errors[0]

    def _look(self) -> None:
        """What the watch does from time to time."""
        while self._under_way:
            events, launched = self._under_way[0]
            now = time.monotonic()
            if not all(event.done for event in events):
                if now - max(self._progress, launched) > self.timeout:
                    self._abort(f"a rank did not come to {self!r}: an exchange was not over within {self.timeout} s")
                return
            self._under_way.popleft()
            self._idle_events.append(events)
            self._progress = now
        self._check_comms()

    def _check_comms(self) -> None:
        """NcclError where a communicator met one."""
        with self._in_use:
            for comm in self._comms:
                comm.check_async_error()

    def _abort(self, why: str) -> None:
        """End the exchanges of this process, which frees its GPUs; the other processes find out by themselves."""
        if not self._lost:
            self._lost = f"{why}; end the processes, or make other communicators"
            self._end()

    def _end(self) -> None:
        """Give the communicators back: aborted where a rank is lost."""
        self._stop.set()
        with self._in_use:
            comms, self._comms = self._comms, []
        if self._sockets is not None:
            self._sockets.close()
        with contextlib.suppress(TimeoutError):  # NCCL itself is stuck
            self._finish(lambda: [comm.abort() if self._lost else comm.destroy() for comm in comms], "the end of NCCL")

    def close(self) -> None:
        if self.is_closed:
            return
        try:
            if not self._lost:
                self.all_gather_bytes([b""] * len(self.ranks))  # all have come this far
                self.check()
        finally:
            super().close()
            if not self._lost:
                self._end()


def _watch(ranks: weakref.ref[NcclRanks], stop: threading.Event) -> None:
    """Until they are closed, or nobody has them any more."""
    with lifetimes.capture_of_others():  # its questions harm no capture
        while not stop.wait(_PERIOD):
            watched = ranks()
            if watched is None:
                return
            try:
                watched._look()
            except Exception as error:  # of NCCL, or of a device that is lost
                watched._abort(f"{type(error).__name__}: {error}")
            del watched
