"""A figure counts with its card, versions, date, source hash and command: one JSON line holds them all."""

from __future__ import annotations

import hashlib
import json
import platform
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

import paged_attn as pa

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
SOURCES = ("kernels", "paged_attn")
SUFFIXES = {".cpp", ".cu", ".cuh", ".h", ".py"}


def source_hash(root: Path = ROOT, folders: tuple[str, ...] = SOURCES) -> str:
    """SHA-256 of the names and contents of all sources in the folders."""
    digest = hashlib.sha256()
    for path in sorted(path for folder in folders for path in (root / folder).rglob("*") if path.suffix in SUFFIXES):
        digest.update(f"{path.relative_to(root).as_posix()}\0{path.stat().st_size}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def environment() -> dict[str, Any]:
    """The card of the current CUDA device, versions, date, source hash and command."""
    import cupy
    from cupy.cuda import nvrtc

    runtime = cupy.cuda.runtime
    return {
        "card": runtime.getDeviceProperties(cupy.cuda.Device().id)["name"].decode(),
        "versions": {
            "paged_attn": pa.__version__,
            "python": platform.python_version(),
            "numpy": np.__version__,
            "cupy": cupy.__version__,
            "nvrtc": ".".join(map(str, nvrtc.getVersion())),
            "cuda_driver": runtime.driverGetVersion(),
        },
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "source_hash": source_hash(),
        "command": command(sys.argv[1:]),
    }


def command(arguments: Sequence[str]) -> str:
    """What repeats the measurement. Where its lines are written does not belong to it."""
    kept, rest = [], iter(arguments)
    for argument in rest:
        if argument == "--json":
            next(rest, None)
        elif not argument.startswith("--json="):
            kept.append(argument)
    return " ".join(["python -m bench", *kept])


def append(path: Path, line: dict[str, Any]) -> None:
    """Add one line to a JSON-lines file, which is made where it does not exist."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a JSON-lines file, the oldest first; none where there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
