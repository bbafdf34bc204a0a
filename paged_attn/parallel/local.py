"""LocalRanks: all ranks in one process, on one device."""

from __future__ import annotations

from typing import Any

from ..checks import scalars
from ..interop import resolve_device
from .messages import ALL_GATHER, MessageRanks, empty_bytes
from .ranks import MergeShape


class LocalRanks(MessageRanks):
    """Ranks of one process on one device, NumPy or one GPU: nothing travels, since every rank writes its states beside
    those of the others and merges them where they are.

    For tests, and to try on one device what many will do.

    Parameters
    ----------
    num_ranks: int, at least 1.
    device: "cpu", "cuda", "cuda:1", ... Default None: the current CUDA device where there is one, else the CPU.
    """

    def __init__(self, num_ranks: int, device: Any = None) -> None:
        count = scalars.as_int(num_ranks, "num_ranks", minimum=1)
        super().__init__(count, tuple(range(count)), (resolve_device(device),) * count, timeout=10.0)

    def all_gather_bytes(self, messages: list[bytes]) -> list[bytes]:
        return list(messages)

    def buffers(self, num_messages: int, num_bytes: int) -> list[Any]:
        """One buffer, which all ranks have in common."""
        return [empty_bytes(num_messages * num_bytes, self.devices[0])] * self.num_ranks

    def all_gather(self, buffers: list[Any]) -> None:
        """All is there."""

    def way(self, shape: MergeShape) -> str:
        return ALL_GATHER
