"""Seconds until the first result in a new process, with an empty and with a filled compile cache.

Each figure is of child processes (first_result.py), and begins after `import cupy` and the making of a context.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from typing import Any

from . import record
from .first_result import CALLS
from .session import Session
from .timing import spread

CHILDREN = 3  # of each kind
TIMEOUT_SECONDS = 120


@dataclass(frozen=True)
class ColdStart:
    """A first call, by its name in first_result.py."""

    name: str

    def __str__(self) -> str:
        return self.name


COLD = tuple(map(ColdStart, CALLS))


def measure_cold(start: ColdStart, _: Session) -> dict[str, Any]:
    """Seconds with a fresh CUPY_CACHE_DIR, and then again with what is now in it."""
    times: dict[str, list[dict[str, float]]] = {"cold": [], "warm": []}
    for _child in range(CHILDREN):
        with tempfile.TemporaryDirectory() as folder:
            for kind in times:
                times[kind].append(first_result(start.name, folder))
    figures: dict[str, Any] = {
        f"{kind}_s": seconds([child["first_result"] for child in children]) for kind, children in times.items()
    }
    imports = [child["import_cupy_and_context"] for children in times.values() for child in children]
    return {**figures, "import_cupy_and_context_s": seconds(imports)}


def first_result(name: str, cache_folder: str) -> dict[str, float]:
    """What one child says."""
    child = subprocess.run(
        [sys.executable, "-m", "bench.first_result", name],
        cwd=record.ROOT, env=os.environ | {"CUPY_CACHE_DIR": cache_folder},
        capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False,
    )  # fmt: skip
    if child.returncode:
        raise AssertionError(f"a child ended with status {child.returncode}: {child.stderr[-500:]}")
    return json.loads(child.stdout.splitlines()[-1])


def seconds(times: list[float]) -> dict[str, float]:
    """Their spread, with the milliseconds kept."""
    return {name: round(value / 1e6, 3) for name, value in spread([time * 1e6 for time in times]).items()}
