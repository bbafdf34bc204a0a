"""MpiRanks: a rank a process, which talk by MPI. Arrays on a GPU go by way of the host."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from .. import install
from ..interop import current_stream, device_of, resolve_device
from .messages import MessageRanks

_BUSY = 1e-3  # seconds of a wait without a pause
_PAUSE = 1e-4

_owned_by_mpi: list[Any] = []  # requests that nobody answered, and their buffers, which a late rank still writes


class MpiRanks(MessageRanks):
    """The processes of an MPI communicator, each a rank: `mpiexec -n 4 python script.py`.

    Every wait is polled. Behind a TimeoutError MPI still owns what was under way, and MPI_Finalize may wait for it: end
    such a process by comm.Abort(). CUDA graphs cannot hold an exchange, which is the host's.

    Parameters
    ----------
    comm: mpi4py.MPI.Intracomm, which is duplicated. Default None: COMM_WORLD.
    device: where this rank's arrays live: "cpu", "cuda", "cuda:1", ... Default None: the current CUDA device where
        there is one, else the CPU.
    timeout: float, seconds that a rank is waited for. Default 10.0.
    """

    def __init__(self, comm: Any = None, *, device: Any = None, timeout: float = 10.0) -> None:
        try:
            from mpi4py import MPI
        except (ImportError, RuntimeError) as error:  # RuntimeError: no MPI library
            raise ImportError(
                f"MpiRanks needs mpi4py and an MPI, and importing them failed ({error}); "
                f"install both with {install.pip('install', *install.MPI)}"
            ) from error
        world = MPI.COMM_WORLD if comm is None else comm
        if not isinstance(world, MPI.Intracomm):
            raise TypeError(f"comm is {world!r}, and MpiRanks takes an mpi4py.MPI.Intracomm; pass MPI.COMM_WORLD, say")
        super().__init__(world.Get_size(), (world.Get_rank(),), (resolve_device(device),), timeout)
        self._mpi: Any = MPI
        self._is_lost = False  # a rank did not come
        # One for what hosts say and one for states, which must never be taken for each other.
        self._comm, self._states_comm = self._do(world.Idup), self._do(world.Idup)

    def all_gather_bytes(self, messages: list[bytes]) -> list[bytes]:
        mine = np.frombuffer(messages[0], np.uint8)
        sizes = np.empty(self.num_ranks, np.int64)
        sizes[self.ranks[0]] = mine.size
        self._do(self._comm.Iallgather, self._mpi.IN_PLACE, sizes)
        every = np.empty(sizes.sum(), np.uint8)
        begins = np.cumsum(sizes) - sizes
        self._do(self._comm.Iallgatherv, mine, [every, sizes, begins, self._mpi.BYTE])
        return [every[begin : begin + size].tobytes() for begin, size in zip(begins, sizes, strict=True)]

    def all_gather(self, buffers: list[Any]) -> None:
        (buffer,), rank = buffers, self.ranks[0]
        host = buffer
        if device_of(buffer) != "cpu":
            host = np.empty(buffer.shape, np.uint8)
            host[rank] = self._on_host(buffer[rank])
        self._do(self._states_comm.Iallgather, self._mpi.IN_PLACE, host)
        if host is not buffer:
            buffer.set(host)

    def all_to_all(self, sent: list[Any], received: list[Any]) -> None:
        (source,), (target,) = sent, received
        host = target
        if device_of(target) != "cpu":
            source, host = self._on_host(source), np.empty(target.shape, np.uint8)
        self._do(self._states_comm.Ialltoall, source, host)
        if host is not target:
            target.set(host)

    def _on_host(self, array: Any) -> np.ndarray:
        """A copy of a GPU array, which waits for what writes it on the current stream."""
        import cupy

        if cupy.cuda.runtime.streamIsCapturing(current_stream(self.devices[0])[1]):
            raise ValueError(
                "MpiRanks was called while the stream is capturing a CUDA graph, and it exchanges by way of the host; "
                "use NcclRanks or PeerRanks"
            )
        copy: np.ndarray = array.get()
        return copy

    def _do(self, start: Callable[..., Any], *arguments: Any) -> Any:
        """A call of MPI from its start to its end; what Idup makes."""
        self.check_usable()
        made, begin = start(*arguments), time.monotonic()
        made, request = made if isinstance(made, tuple) else (None, made)
        while not request.Test():
            waited = time.monotonic() - begin
            if waited > self.timeout:
                self._is_lost = True
                _owned_by_mpi.append((request, arguments))
                raise TimeoutError(f"a rank did not come to rank {self.ranks[0]} of {self!r} within {self.timeout} s")
            time.sleep(0 if waited < _BUSY else _PAUSE)
        return made

    def check_usable(self) -> None:
        super().check_usable()
        if self._is_lost:
            raise TimeoutError(f"a rank was lost before, in {self!r}; end the processes, or make another communicator")

    def status(self) -> None:
        if self._is_lost:
            self.check_usable()
        super().status()

    def close(self) -> None:
        if self.is_closed:
            return
        try:
            if not self._is_lost:
                self._do(self._comm.Ibarrier)
                self._comm.Free()
                self._states_comm.Free()
        finally:
            super().close()
