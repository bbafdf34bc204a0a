"""Our calls, the floors and the peers on the same inputs, in turns: what the benchmarks on the device share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

from paged_attn import install

from .peers import Peer, Run
from .timing import Stopwatch


def require_gpu() -> ModuleType:
    """CuPy; SystemExit with what to do where it, or a GPU, is missing."""
    try:
        import cupy
    except ImportError as error:
        commands = install.for_cuda(install.CUPY, install.TOOLKIT)
        raise SystemExit(f"bench needs CuPy ({error}); install it with {commands}") from error
    if not cupy.cuda.is_available():
        raise SystemExit("bench needs an NVIDIA GPU, and CuPy sees none")
    return cupy


@dataclass(frozen=True)
class Session:
    """What all measurements of one command have in common."""

    stopwatch: Stopwatch
    peers: Sequence[Peer] = ()
    reps: int = 30
    combined: bool = False  # pools with K and V of a page side by side
    batch_invariant: bool = False
    with_lse: bool = False

    @property
    def plain(self) -> Session:
        """The same with separate pools, no promise of bits, no lse."""
        return replace(self, combined=False, batch_invariant=False, with_lse=False)

    def measure(
        self, operation: str, inputs: Any, check: Callable[[Any], object], ours: Mapping[str, Run]
    ) -> dict[str, Any]:
        """Summaries of our calls by their names, and under "peers" what each peer did on the same inputs.

        operation: the method of Peer. check: raises AssertionError where a peer's result, a CuPy array, is wrong. A
        peer's figure is that of its fastest kernel; where it has none that is right, there is the reason instead.
        """
        found = {peer.name: right_kernels(peer, operation, inputs, check) for peer in self.peers}
        calls: dict[tuple[str | None, str], Run] = {(None, name): run for name, run in ours.items()}
        calls |= {(peer, kernel): run for peer, (kernels, _) in found.items() for kernel, run in kernels.items()}
        times = self.stopwatch.interleave({"\0".join(map(str, key)): run for key, run in calls.items()}, self.reps)
        summaries = dict(zip(calls, (samples.summary() for samples in times.values()), strict=True))
        figures: dict[str, Any] = {name: summaries[None, name] for name in ours}
        if found:
            figures["peers"] = {
                name: fastest({kernel: summaries[name, kernel] for kernel in kernels}) if kernels else {"none": reason}
                for name, (kernels, reason) in found.items()
            }
        return figures


def right_kernels(
    peer: Peer, operation: str, inputs: Any, check: Callable[[Any], object]
) -> tuple[dict[str, Run], str]:
    """The peer's kernels whose results are right; and why others are not among them."""
    try:
        offered = getattr(peer, operation)(inputs)
    except NotImplementedError as error:
        return {}, str(error)
    right, reasons = {}, []
    for kernel, prepare in offered.items():
        try:
            run = prepare()
            check(peer.to_cupy(run()))
        except AssertionError as error:
            reasons.append(f"{kernel}: wrong result, {error}")
        except Exception as error:  # peers refuse by exceptions of all kinds
            reasons.append(f"{kernel}: {type(error).__name__}: {error}".splitlines()[0][:300])
        else:
            right[kernel] = run
    return right, "; ".join(reasons)


def fastest(summaries: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """The summary of the fastest kernel with its name, and the medians of all."""
    medians = {kernel: summary["median"] for kernel, summary in summaries.items()}
    best = min(medians, key=lambda kernel: medians[kernel])
    return {**summaries[best], "kernel": best, "medians": medians}
