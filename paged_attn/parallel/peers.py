"""PeerRanks: GPUs of one machine that write into each other's memory, and merge in the kernel that receives.

kernels/exchange.cu says how. Memory that waits for states is allocated apart from CuPy's pool, since CUDA gives whole
allocations alone to other processes (by handles of IPC; within a process by peer access), and stays until close().
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .. import compile, lifetimes
from ..card import card_of
from ..checks import scalars
from ..checks.arrays import check_base
from ..interop import cupy_for, current_stream, device_index, resolve_device
from ..recipes import exchange_recipe
from .ranks import Merge, MergeShape, Ranks
from .sockets import Sockets

MOST_RANKS = 8  # exchange.cu
BLOCKS_PER_SM = 2  # of all ranks on a card, as __launch_bounds__ has it: blocks that wait keep no others from running
RECEIVED_BYTES = 64 << 20  # that wait for a Merge's states, at most: steps of more rows are several exchanges
_ALLOCATION = 2 << 20  # bytes: CUDA puts smaller ones together, and other processes would get all of them
_HALVES = 2
_LAZY_PEER_ACCESS = 1  # cudaIpcMemLazyEnablePeerAccess
_IS_ENABLED = 704  # cudaErrorPeerAccessAlreadyEnabled

_abandoned: list[Any] = []  # memory that a lost rank may still write to
_returned: list[list[Any]] = []  # of merges that are gone; a later call frees it, since in a capture CUDA cannot


def _give_back(idle: list[Any], memory: Any) -> None:
    """A finaliser's work, which may be done in the middle of a capture."""
    idle.append(memory)
    _returned.append(idle)  # which nobody else may hold any more


class PeerRanks(Ranks):
    """GPUs of one machine with peer access to each other, a rank each, that exchange through their memory.

    CUDA graphs may capture steps, once a step has run. A graph must not be replayed behind close(). Several ranks may
    share a card, for tests: those of one process run on streams of their own beside the current one, those of several
    processes take turns, so that a step takes milliseconds.

    Steps of one device are on one stream, or ordered by events: exchanges of two streams may fill two GPUs in different
    orders, and then wait for each other until `timeout`.

    Each rank allocates up to 64 MB for each plan and dtype of results, beside buffers for its own partial results.

    Parameters
    ----------
    rank: int, that of this process, or the first of its ranks.
    num_ranks: int, ranks of all processes, at most 8.
    address: "host:port", where the process of rank 0 listens and the others find it. Default None: exchange tells how,
        or all ranks are in this process.
    exchange: callable that takes bytes of this process and returns a list of those of all processes, in rank order, as
        mpi4py's comm.allgather does, where each process has one rank; what it waits for is its own. Default None.
    timeout: float, seconds that a rank is waited for, on a GPU, too. Default 10.0.
    devices: list of "cuda:<i>", indices or cupy.cuda.Devices, for ranks rank, rank + 1, ... Default None: one rank, on
        the current device.

    Raises
    ------
    TimeoutError: a rank does not come. ValueError: ranks or devices that do not fit. ImportError: no CuPy.
    NotImplementedError: GPUs of this process without peer access. RuntimeError: what went wrong on any rank, on all.
    """

    def __init__(
        self,
        rank: int,
        num_ranks: int,
        *,
        address: str | None = None,
        exchange: Callable[[bytes], list[bytes]] | None = None,
        timeout: float = 10.0,
        devices: Sequence[Any] | None = None,
    ) -> None:
        self._cuda: Any = cupy_for("PeerRanks needs CuPy").cuda
        found = tuple(resolve_device(device) for device in (["cuda"] if devices is None else devices))
        if "cpu" in found or not found:
            raise ValueError(f"devices is {devices}, and each rank is on a GPU; pass one GPU for each")
        if exchange is not None and len(found) > 1:
            raise ValueError(f"exchange is for one rank a process, and devices has {len(found)}; pass address")
        count = scalars.as_int(num_ranks, "num_ranks", minimum=len(found), maximum=MOST_RANKS)
        first = scalars.as_int(rank, "rank", minimum=0, maximum=count - len(found))
        super().__init__(count, tuple(range(first, first + len(found))), found, timeout)
        self._lost = ""  # why the ranks are of no more use
        self._idle: dict[tuple[str, int], list[Any]] = {}  # by device and bytes: memory of merges that are gone
        self._mapped: dict[tuple[str, bytes], int] = {}  # by device and handle: where memory of other processes is
        self._enable_peer_access()
        # [lost, lengths differ] of each rank here; and streams for ranks whose device is that of a rank before.
        self.status_words = [self.zeros(device, 2) for device in found]
        self._sides = [_Side(self._cuda, x, i) if x in found[:i] else None for i, x in enumerate(found)]
        self._exchange = exchange
        self._sockets = None if exchange is not None else Sockets(self.ranks, count, address, timeout)
        try:
            said = [json.loads(x) for x in self._together(self._describe_card)]
            cards = [card for card, _ in said]
            self.most_blocks = min(BLOCKS_PER_SM * num_sms // cards.count(card) for card, num_sms in said)
        except BaseException:
            self._disconnect()
            raise

    def _describe_card(self, i: int) -> bytes:
        device = self.devices[i]
        bus = self._cuda.runtime.deviceGetPCIBusId(device_index(device))
        return json.dumps((bus, card_of(device).num_sms)).encode()

    def _enable_peer_access(self) -> None:
        runtime, indices = self._cuda.runtime, sorted(set(map(device_index, self.devices)))
        for index in indices:
            for peer in indices:
                if peer == index:
                    continue
                if not runtime.deviceCanAccessPeer(index, peer):
                    raise NotImplementedError(
                        f"cuda:{index} cannot access the memory of cuda:{peer}, which PeerRanks needs; use NcclRanks"
                    )
                with self._cuda.Device(index):
                    try:
                        runtime.deviceEnablePeerAccess(peer)
                    except runtime.CUDARuntimeError as error:
                        if error.status != _IS_ENABLED:
                            raise

    def zeros(self, device: str, count: int) -> Any:
        """uint32 [count], for kernels on any stream."""
        from ..backends import cuda

        zeros = cuda.zeros((count,), np.dtype(np.uint32), device)
        current_stream(device)[0].synchronize()
        return zeros

    # -- messages ------------------------------------------------------------------------------------------------------

    def all_gather_bytes(self, messages: list[bytes]) -> list[bytes]:
        if self._lost:
            raise TimeoutError(self._lost)
        if self._sockets is None:
            assert self._exchange is not None
            return list(self._exchange(messages[0]))
        try:
            return self._sockets.all_gather(messages)
        except TimeoutError as error:
            self._lose(str(error))
            raise

    def _together(self, work: Callable[[int], bytes]) -> list[bytes]:
        """What work(i) of each rank of this process gives, and those of all others: or, on all of them, RuntimeError
        where one raises."""
        said, mine = [], None
        for i, rank in enumerate(self.ranks):
            try:
                said.append(b"\0" + work(i))
            except Exception as error:
                mine = error
                said.append(f"rank {rank} of {self!r}: {type(error).__name__}: {error}".encode())
        every = self.all_gather_bytes(said)
        for words in every:
            if not words.startswith(b"\0"):
                raise RuntimeError(words.decode()) from mine
        return [words[1:] for words in every]

    # -- memory --------------------------------------------------------------------------------------------------------

    def prepare(self, shape: MergeShape) -> Merge:
        return PeerMerge(self, shape)

    def waiting_memory(self, num_bytes: int, user: Any) -> list[list[int]]:
        """Memory on every rank that is full of 0xFF: for each rank of this process the addresses at which it finds
        those of all ranks. It is given back when `user`, of which this is a part, is gone."""
        size = -(-num_bytes // _ALLOCATION) * _ALLOCATION
        own: list[Any] = []

        def allocate(i: int) -> bytes:
            device, runtime = self.devices[i], self._cuda.runtime
            idle = self._idle.setdefault((device, size), [])
            with self._cuda.Device(device_index(device)), lifetimes.capture_of_others():
                if runtime.streamIsCapturing(current_stream(device)[1]):
                    raise ValueError(
                        "a step needs memory on all ranks while the stream is capturing a CUDA graph; make a plan of "
                        "max_batch_size and max_pages, and run a step with this dtype of out before the capture"
                    )
                _returned.clear()
                memory = idle.pop() if idle else self._cuda.Memory(size)
                weakref.finalize(user, _give_back, idle, memory)
                own.append(memory)
                runtime.deviceSynchronize()  # what was launched for the user before
                runtime.memset(memory.ptr, 0xFF, size)
                runtime.deviceSynchronize()
                return b"" if len(self.ranks) == self.num_ranks else bytes(runtime.ipcGetMemHandle(memory.ptr))

        handles = self._together(allocate)
        addresses: list[list[int]] = []

        def find(i: int) -> bytes:
            addresses.append([
                own[rank - self.ranks[0]].ptr if rank in self.ranks else self._map(self.devices[i], handle)
                for rank, handle in enumerate(handles)
            ])  # fmt: skip
            return b""

        self._together(find)
        return addresses

    def _map(self, device: str, handle: bytes) -> int:
        if (device, handle) not in self._mapped:
            with self._cuda.Device(device_index(device)), lifetimes.capture_of_others():
                self._mapped[device, handle] = self._cuda.runtime.ipcOpenMemHandle(handle, _LAZY_PEER_ACCESS)
        return self._mapped[device, handle]

    # -- streams -------------------------------------------------------------------------------------------------------

    def fork(self, i: int) -> int:
        """The stream of local rank i's exchange, behind what is on the current one of its device."""
        stream, address = current_stream(self.devices[i])
        side = self._sides[i]
        return address if side is None else side.fork(stream)

    def join(self, i: int) -> None:
        """Have the current stream wait for that of `fork`."""
        side = self._sides[i]
        if side is not None:
            side.join(current_stream(self.devices[i])[0])

    # -- ranks that do not come ----------------------------------------------------------------------------------------

    def check_usable(self) -> None:
        super().check_usable()
        if self._lost:
            raise TimeoutError(self._lost)

    def check(self) -> None:
        """Wait for all work of the devices of this process; TimeoutError where a rank did not come, ValueError where
        lengths differ."""
        for device in dict.fromkeys(self.devices):
            with self._cuda.Device(device_index(device)):
                self._cuda.runtime.deviceSynchronize()
        found = []
        for words in self.status_words:
            with words.device:
                found.append(words.get().tolist())
                if found[-1][1]:
                    words[1:].fill(0)
        for rank, (lost, _) in zip(self.ranks, found, strict=True):
            if lost:
                self._lose(f"rank {lost - 1} did not come to rank {rank} of {self!r} within {self.timeout} s")
        for rank, (_, differs) in zip(self.ranks, found, strict=True):
            if differs:
                raise ValueError(
                    f"the lengths of rank {rank} are not those of rank {differs - 1} (total_len, or the rank that "
                    f"holds the first page of a sequence); make the same appends, forks and truncations on every rank"
                )
        if self._lost:
            raise TimeoutError(self._lost)

    def _lose(self, why: str) -> None:
        self._lost = self._lost or f"{why}; end the processes, or make other communicators"

    def status(self) -> None:
        self.check()
        super().status()

    def close(self) -> None:
        if self.is_closed:
            return
        differ = None
        try:
            try:
                self.check()
            except ValueError as error:
                differ = error
            barrier = [b""] * len(self.ranks)
            self.all_gather_bytes(barrier)  # no kernel of any rank is under way
            for (device, _), address in self._mapped.items():
                with self._cuda.Device(device_index(device)):
                    self._cuda.runtime.ipcCloseMemHandle(address)
            self.all_gather_bytes(barrier)  # and nobody has this rank's memory
            self._idle.clear()
            _returned.clear()
        except BaseException:
            _abandoned.append(self._idle)
            raise
        finally:
            super().close()
            self._disconnect()
        if differ is not None:
            raise differ

    def _disconnect(self) -> None:
        if self._sockets is not None:
            self._sockets.close()


class _Side:
    """A stream beside the current one of a device. Each has another priority: CUDA puts streams of one priority into a
    few queues, where a kernel might wait behind one that waits for it."""

    def __init__(self, cuda: Any, device: str, number: int) -> None:
        self._device = cuda.Device(device_index(device))
        with self._device:
            self._stream = cuda.Stream(non_blocking=True, priority=-number)
            self._before, self._behind = cuda.Event(disable_timing=True), cuda.Event(disable_timing=True)

    def fork(self, current: Any) -> int:
        with self._device:
            self._before.record(current)
            self._stream.wait_event(self._before)
        return int(self._stream.ptr)

    def join(self, current: Any) -> None:
        with self._device:
            self._behind.record(self._stream)
            current.wait_event(self._behind)


class PeerMerge(Merge):
    """The launches of an exchange, one a rank of this process, and the memory that they write to on other ranks."""

    ranks: PeerRanks
    way = "peer memory"

    def __init__(self, ranks: PeerRanks, shape: MergeShape) -> None:
        super().__init__(ranks, shape)
        from ..backends.cuda.launch import launch_prepared

        self._launch = launch_prepared
        n = ranks.num_ranks
        part = shape.heads if shape.shard is None else shape.heads // n
        state = shape.dim * shape.partial_dtype.itemsize + 4
        self.bytes_a_step = (n - 1) * (shape.rows * part * state + 8)
        # 1. Rows of one exchange, and the memory that waits for them: v, s, lengths.
        self._rows = min(shape.rows, max(1, RECEIVED_BYTES // (_HALVES * n * part * state)))
        capacity = self._rows * part
        s_begin = _HALVES * n * capacity * (state - 4)
        lengths_begin = s_begin + _HALVES * n * capacity * 4
        addresses = ranks.waiting_memory(lengths_begin + _HALVES * n * 8, self)
        # 2. A launch for each rank here.
        recipe = exchange_recipe(shape.dim, shape.partial_dtype, shape.out_dtype)
        warps = recipe.num_threads // 32
        self._blocks = min(-(-capacity // warps) + 1, ranks.most_blocks)  # the last one compares lengths
        fixed = {
            "heads": shape.heads, "part": part, "num_ranks": n, "capacity": capacity,
            "timeout": int(ranks.timeout * 1e9),
        }  # fmt: skip
        self._epochs = [ranks.zeros(device, self._blocks * warps) for device in ranks.devices]
        self._launches = []
        for i, (rank, device) in enumerate(zip(ranks.ranks, ranks.devices, strict=True)):
            begins = [*addresses[i], *[0] * (MOST_RANKS - n)]
            memory = {
                f"{name}_of": tuple(begin and begin + behind for begin in begins)
                for name, behind in (("v", 0), ("s", s_begin), ("lengths", lengths_begin))
            }
            fields = fixed | memory | {"rank": rank, "epochs": self._epochs[i], "status": ranks.status_words[i]}
            launch = compile.prepare(recipe, device, fields)
            self._launches.append((launch, launch.writer(last="rows")))
            # Loading a kernel may wait for all others on its device: this one has to be there before any of them waits.
            self._launch(launch, current_stream(device)[1], self._blocks)

    def __call__(
        self,
        states: list[tuple[Any, Any]],
        outs: list[Any],
        lses: list[Any],
        sinks: list[Any | None],
        checksums: list[Any | None],
    ) -> None:
        ranks = self.ranks
        ranks.check_usable()
        for out in outs:
            check_base(out, "out")
        streams = [ranks.fork(i) for i in range(len(outs))]
        for i, given in enumerate(zip(states, outs, lses, sinks, checksums, strict=True)):
            self.exchange(i, streams[i], *given)
        for i in range(len(outs)):
            ranks.join(i)

    def exchange(
        self, i: int, stream: int, state: tuple[Any, Any], out: Any, lse: Any, sinks: Any | None, checksum: Any
    ) -> None:
        """Of local rank i alone, on a stream of its device: its work waits there for the other ranks."""
        launch, write = self._launches[i]
        arrays = (*state, out, lse)
        rows = out.shape[0]
        fixed = 0 if sinks is None else sinks.data.ptr, checksum.data.ptr
        for first in range(0, rows, self._rows):
            addresses = (array.data.ptr + first * (array.nbytes // rows) for array in arrays)
            write(*addresses, *fixed, min(self._rows, rows - first))
            self._launch(launch, stream, self._blocks)

    def status(self) -> None:
        self.ranks.check()
