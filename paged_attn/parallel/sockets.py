"""How plain processes find each other and exchange host messages: by TCP, through the process of rank 0.

Rank 0 listens at an address that all know. A frame is its length and the kind of what follows: messages, one for each
rank of the sender (of all ranks, in an answer), or an error that every rank raises.
"""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import time
from collections.abc import Collection
from typing import NoReturn

_HEAD = struct.Struct("<Qc")  # bytes that follow, kind
_LENGTH = struct.Struct("<Q")
_MESSAGES, _TIMEOUT, _VALUE = b"M", b"T", b"V"
_ERRORS: dict[bytes, type[Exception]] = {_TIMEOUT: TimeoutError, _VALUE: ValueError}
_MAGIC = "paged_attn.parallel 1"
_MOST_BYTES = 1 << 30  # of a frame; a longer one does not come from us
_PATIENCE = 0.9  # of the timeout: rank 0 gives up first, and tells those that wait for it who is missing
_RETRY = 0.05  # seconds


class Sockets:
    """Processes that meet at an address.

    ranks: those of this process; the process of rank 0 listens, the others connect, in any order.
    address: "host:port" of rank 0; None where all ranks are in this process.
    timeout: seconds that a process is waited for.

    ValueError: the processes do not make up num_ranks ranks. TimeoutError: some do not come.
    """

    def __init__(self, ranks: tuple[int, ...], num_ranks: int, address: str | None, timeout: float) -> None:
        self._ranks, self._num_ranks, self._address, self._timeout = ranks, num_ranks, address, timeout
        self._peers: dict[tuple[int, ...], socket.socket] = {}  # by their ranks: of rank 0 all others, else rank 0
        self._within = f"within {timeout} s"
        self._broken = ""  # why no further message comes
        if len(ranks) == num_ranks:
            return
        if address is None:
            raise ValueError(f"ranks {list(ranks)} of {num_ranks} are here; pass address='host:port' of rank 0")
        host, _, port = address.rpartition(":")
        if not host or not port.isdecimal():
            raise ValueError(f"address is {address!r}; pass 'host:port' of the process of rank 0")
        try:
            (self._listen if 0 in ranks else self._connect)(host, int(port))
        except BaseException:
            self.close()
            raise

    def _listen(self, host: str, port: int) -> None:
        deadline = time.monotonic() + _PATIENCE * self._timeout
        with socket.create_server((host, port)) as server:
            missing = set(range(self._num_ranks)) - set(self._ranks)
            while missing:
                try:
                    server.settimeout(_left(deadline))
                    peer, _ = server.accept()
                except TimeoutError:
                    self._give_up(_TIMEOUT, f"{_named(missing)} did not come to {self._address} {self._within}")
                try:
                    _, (hello,) = _receive(peer, deadline)
                    said = json.loads(hello)
                    if said["magic"] != _MAGIC:
                        raise ValueError(hello)
                    ranks, num_ranks = tuple(map(int, said["ranks"])), said["num_ranks"]
                except (OSError, ValueError, KeyError, TypeError, struct.error):  # somebody else
                    peer.close()
                    continue
                self._peers[ranks] = peer
                if num_ranks != self._num_ranks or not missing.issuperset(ranks):
                    self._give_up(
                        _VALUE,
                        f"a process came to {self._address} as {_named(ranks)} of {num_ranks}, where "
                        f"{_named(missing)} of {self._num_ranks} are missing; give each process ranks of its own",
                    )
                missing.difference_update(ranks)
        for peer in self._peers.values():
            _send(peer, [])

    def _connect(self, host: str, port: int) -> None:
        deadline = time.monotonic() + self._timeout
        hello = {"magic": _MAGIC, "ranks": self._ranks, "num_ranks": self._num_ranks}
        while True:
            try:
                peer = socket.create_connection((host, port), timeout=_left(deadline))
                break
            except OSError as error:  # rank 0 does not listen yet
                if time.monotonic() + _RETRY > deadline:
                    self._give_up(_TIMEOUT, f"rank 0 did not answer at {self._address} {self._within} ({error})")
                time.sleep(_RETRY)
        self._peers[0,] = peer
        _send(peer, [json.dumps(hello).encode()])
        self._receive_answer(deadline)

    def all_gather(self, messages: list[bytes]) -> list[bytes]:
        """One message for each rank of this process becomes one of each rank of all, in rank order."""
        if self._broken:
            raise TimeoutError(f"{self._broken}, before this call; end the processes, or make other communicators")
        deadline = time.monotonic() + self._timeout
        if 0 not in self._ranks:
            with contextlib.suppress(OSError):  # rank 0 is gone, or has said why it gave up
                _send(self._peers[0,], messages)
            return self._receive_answer(deadline)
        every, deadline = dict(zip(self._ranks, messages, strict=True)), time.monotonic() + _PATIENCE * self._timeout
        missing: list[int] = []
        for ranks, peer in self._peers.items():
            try:
                every |= zip(ranks, _receive(peer, deadline)[1], strict=True)
            except OSError as error:
                missing += ranks
                why = str(error)
        if missing:
            self._give_up(_TIMEOUT, f"{_named(missing)} did not come to rank 0 {self._within} ({why})")
        answer = [every[rank] for rank in range(self._num_ranks)]
        for peer in self._peers.values():
            with contextlib.suppress(OSError):  # it misses the next message
                _send(peer, answer)
        return answer

    def _receive_answer(self, deadline: float) -> list[bytes]:
        try:
            kind, messages = _receive(self._peers[0,], deadline)
        except OSError as error:
            self._give_up(_TIMEOUT, f"rank 0 did not answer rank {self._ranks[0]} {self._within} ({error})")
        if kind != _MESSAGES:
            self._give_up(kind, messages[0].decode())
        return messages

    def _give_up(self, kind: bytes, why: str) -> NoReturn:
        """Raise, here and, where this is rank 0, on all that wait for an answer."""
        self._broken = why
        if 0 in self._ranks:
            for peer in self._peers.values():
                with contextlib.suppress(OSError):
                    _send(peer, [why.encode()], kind)
        raise _ERRORS[kind](why)

    def close(self) -> None:
        for peer in self._peers.values():
            peer.close()


def _left(deadline: float) -> float:
    """Seconds; a moment at least, in which what is there already can be taken."""
    return max(deadline - time.monotonic(), 0.001)


def _named(ranks: Collection[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, sorted(ranks)))}"


def _send(peer: socket.socket, messages: list[bytes], kind: bytes = _MESSAGES) -> None:
    frame = b"".join(_LENGTH.pack(len(message)) + message for message in messages)
    peer.sendall(_HEAD.pack(len(frame), kind) + frame)


def _receive(peer: socket.socket, deadline: float) -> tuple[bytes, list[bytes]]:
    """The kind and the messages of one frame. OSError where none comes."""
    size, kind = _HEAD.unpack(_exactly(peer, _HEAD.size, deadline))
    if size > _MOST_BYTES:
        raise ConnectionError(f"{size} bytes were announced, which no rank sends")
    frame, messages, begin = _exactly(peer, size, deadline), [], 0
    while begin < size:
        (length,) = _LENGTH.unpack_from(frame, begin)
        begin += _LENGTH.size + length
        messages.append(frame[begin - length : begin])
    return kind, messages


def _exactly(peer: socket.socket, size: int, deadline: float) -> bytes:
    received = bytearray()
    while len(received) < size:
        peer.settimeout(_left(deadline))
        part = peer.recv(min(size - len(received), 1 << 20))
        if not part:
            raise ConnectionError("its process has ended")
        received += part
    return bytes(received)
