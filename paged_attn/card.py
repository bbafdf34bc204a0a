"""What recipes know of a GPU."""

from __future__ import annotations

import functools
from dataclasses import dataclass


@dataclass(frozen=True)
class Card:
    """A GPU in three numbers."""

    num_sms: int
    shared_bytes: int  # of an SM
    compute_capability: int  # 90 is 9.0

    @property
    def is_hopper(self) -> bool:
        """Whether it runs wgmma and has neighbouring CTAs start together."""
        return self.compute_capability == 90

    @property
    def arch(self) -> str | None:
        """The architecture that NVRTC must be told, where it is not the one that CuPy names."""
        return "sm_90a" if self.is_hopper else None


A100 = Card(108, 164 * 1024, 80)
H100 = Card(132, 228 * 1024, 90)


@functools.cache
def card_of(device: str) -> Card:
    """The card of `device` ("cuda:<i>")."""
    import cupy

    gpu = cupy.cuda.Device(int(device.removeprefix("cuda:")))
    attributes = gpu.attributes
    num_sms, shared_bytes = attributes["MultiProcessorCount"], attributes["MaxSharedMemoryPerMultiprocessor"]
    return Card(int(num_sms), int(shared_bytes), int(gpu.compute_capability))
