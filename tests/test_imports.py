"""`import paged_attn` is light, measured in processes of its own."""

import json
import subprocess
import sys
from pathlib import Path

HEAVY = {"cupy", "jax", "jaxlib", "torch", "rich"}
ROOT = Path(__file__).parents[1]
PROBE = """
import json, sys, time
import numpy
start = time.perf_counter()
import {module}
seconds = time.perf_counter() - start
print(json.dumps([seconds, [name for name in sys.modules if "." not in name]]))
"""


def import_cost(module: str, folder: Path = ROOT, processes: int = 5) -> tuple[float, set[str]]:
    """Seconds above numpy (the best of a few processes) that an import takes, and the heavy modules it brings."""
    seconds: list[float] = []
    modules: set[str] = set()
    for _ in range(processes):
        probe = [sys.executable, "-c", PROBE.format(module=module)]
        took, loaded = json.loads(subprocess.run(probe, cwd=folder, check=True, capture_output=True, text=True).stdout)
        seconds.append(took)
        modules.update(loaded)
    return min(seconds), modules & HEAVY


def test_import_is_light() -> None:
    seconds, heavy = import_cost("paged_attn")
    assert not heavy
    assert seconds < 0.2


def test_a_heavy_import_is_seen(tmp_path: Path) -> None:
    (tmp_path / "heavy_module.py").write_text("import time\nimport rich\ntime.sleep(0.2)\n")
    seconds, heavy = import_cost("heavy_module", tmp_path, processes=1)
    assert heavy == {"rich"}
    assert seconds >= 0.2
