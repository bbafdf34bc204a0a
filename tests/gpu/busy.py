"""A stream that is behind: what waits for the device, or leaves its memory too early, is found out."""

import numpy as np

SPIN = r"""
extern "C" __global__ void spin(long long nanoseconds) {
  long long start, now;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(start));
  do asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now)); while (now - start < nanoseconds);
}
"""


class Busy:
    """The current stream waits for a kernel that spins, so that whatever is launched behind it is late."""

    def __init__(self, milliseconds: int = 250) -> None:
        import cupy

        spin = cupy.RawKernel(SPIN, "spin")  # CuPy keeps what it compiled
        spin((1,), (1,), (np.int64(1_000_000 * milliseconds),))
        self._event = cupy.cuda.Event(disable_timing=True)
        self._event.record()

    def is_over(self) -> bool:
        return bool(self._event.done)

    def synchronize(self) -> None:
        self._event.synchronize()
