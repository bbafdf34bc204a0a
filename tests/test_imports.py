"""`import paged_attn` is light, measured in processes of its own."""

import json
import subprocess
import sys
from pathlib import Path

HEAVY = {"cupy", "jax", "jaxlib", "mpi4py", "torch", "rich"}
ROOT = Path(__file__).parents[1]
PROBE = """
import json, sys, time
import numpy
start = time.process_time()
import {module}
seconds = time.process_time() - start
print(json.dumps([seconds, [name for name in sys.modules if "." not in name]]))
"""


def import_cost(module: str, folder: Path = ROOT) -> tuple[float, set[str]]:
    """Seconds of CPU time above numpy that an import takes in a new process, and the heavy modules it brings."""
    probe = [sys.executable, "-c", PROBE.format(module=module)]
    run = subprocess.run(probe, cwd=folder, check=True, capture_output=True, text=True)
    seconds, modules = json.loads(run.stdout)
    return seconds, HEAVY & set(modules)


def test_import_is_light() -> None:
    """CPU time, and the best of a few processes: a runner that is busy with something else must not fail it."""
    for _ in range(10):
        seconds, heavy = import_cost("paged_attn")
        assert not heavy
        if seconds < 0.2:
            return
    raise AssertionError(f"the last of ten imports took {seconds:.2f} s")


def test_communicators_bring_their_libraries_when_they_are_made() -> None:
    assert not import_cost("paged_attn.parallel")[1]
    probe = [sys.executable, "-c", "import sys, paged_attn; print('paged_attn.parallel' in sys.modules)"]
    assert subprocess.run(probe, cwd=ROOT, check=True, capture_output=True, text=True).stdout == "False\n"


def test_a_heavy_import_is_seen(tmp_path: Path) -> None:
    (tmp_path / "heavy_module.py").write_text("import rich\n")
    assert import_cost("heavy_module", tmp_path)[1] == {"rich"}
