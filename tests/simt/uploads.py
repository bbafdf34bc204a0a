"""Host arrays on their way to a device that lags behind: every copy is made only when its stream gets there.

Prints how many arrays were sent, how many were not because there was no pinned memory, how many arrived wrong, and how
many blocks of pinned memory that took, for a device that is late and for one that is prompt.
"""

import ctypes
import json
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np

from . import card

card.install()

import cupy  # noqa: E402

from paged_attn.backends.cuda import uploads  # noqa: E402

uploads.SMALLEST_STAGING = 1 << 16  # so that blocks fill up


class Stream:
    def __init__(self, ptr: int) -> None:
        self.ptr = ptr
        self.work: deque[Callable[[], Any]] = deque()

    def advance(self, most: int) -> None:
        for _ in range(min(most, len(self.work))):
            self.work.popleft()()


class Event:
    def __init__(self, **options: Any) -> None:
        self._recorded = self._passed = 0

    def record(self, stream: Stream) -> None:
        self._recorded += 1
        number = self._recorded
        stream.work.append(lambda: setattr(self, "_passed", number))

    @property
    def done(self) -> bool:
        return self._passed == self._recorded


class Pointer(card._Pointer):
    def copy_from_host_async(self, source: int, num_bytes: int, stream: Stream) -> None:
        stream.work.append(lambda: ctypes.memmove(self.ptr, source, num_bytes))


def send(seed: int, *, prompt: bool) -> dict[str, int]:
    """1000 arrays over two streams; a prompt device does everything at once, a late one when it likes."""
    rng = np.random.default_rng(seed)
    streams = Stream(0), Stream(64)
    blocks: list[Any] = []
    uploads._stagings.items.clear()

    def alloc_pinned_memory(size: int) -> Any:
        if not prompt and rng.random() < 0.2:
            raise MemoryError("no pinned memory")
        blocks.append(card._PinnedMemory(size))
        return blocks[-1]

    cupy.cuda.alloc_pinned_memory = alloc_pinned_memory
    sent, refused = [], 0
    for _ in range(1000):
        stream = streams[int(rng.random() < 0.1)]
        cupy.cuda.get_current_stream = lambda device=0, stream=stream: stream
        size = 0 if rng.random() < 0.05 else int(2 ** rng.uniform(0, 8 if prompt else 17))
        array = rng.integers(0, 2**31, size).astype(rng.choice(["int32", "int64"]))
        kept = array.copy()
        try:
            sent.append((kept, uploads.to_backend(array, "cuda:0")))
        except MemoryError:  # what was sent before arrives all the same
            refused += 1
            continue
        array[:] = -1  # the caller's array may change at once
        for each in streams:
            each.advance(10**9 if prompt else int(rng.integers(0, 4)))
    for each in streams:
        each.advance(10**9)
    wrong = sum(not np.array_equal(array, arrived.host) for array, arrived in sent)
    return {"sent": len(sent), "refused": refused, "wrong": wrong, "blocks": len(blocks)}


if __name__ == "__main__":
    cupy.cuda.Event = Event
    card.ndarray.data = property(lambda self: Pointer(self.host.ctypes.data))  # type: ignore[assignment]
    late = [send(seed, prompt=False) for seed in range(5)]
    print(json.dumps({"late": late, "prompt": send(5, prompt=True)}))
