"""Which warnings fail a test, by pyproject.toml: our own, and not those of a dependency's next release."""

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROBE = """
import threading
import warnings

import dependency
import pytest

def test_a_dependency_warns():
    dependency.warn()

@pytest.mark.parametrize("module", ["numpy", "jax._src.core", "paged_attn_of_others", "benchmarks", "zmq.tests.x"])
def test_others_warn(module):
    warnings.warn_explicit("soon gone", DeprecationWarning, "file.py", 1, module=module)

@pytest.mark.parametrize("module", ["paged_attn", "paged_attn.checks", "bench.plot", "notebooks.execute", "readme"])
def test_we_warn(module):
    warnings.warn_explicit("overflow", RuntimeWarning, "file.py", 1, module=module)

def test_we_warn_in_a_test():
    warnings.warn("of this test")

def test_we_raise_in_a_thread():
    thread = threading.Thread(target=lambda: 1 / 0)
    thread.start()
    thread.join()

def test_we_raise_in_a_destructor():
    class Broken:
        def __del__(self):
            raise ValueError
    Broken()
"""


def test_our_warnings_are_errors_and_those_of_others_are_shown(tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "dependency.py").write_text("import warnings\ndef warn(): warnings.warn('old', DeprecationWarning)\n")
    (tmp_path / "tests/test_probe.py").write_text(PROBE)
    command = [sys.executable, "-m", "pytest", "-q", "-rA", "-p", "no:cacheprovider"]
    said = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False).stdout
    results = [line.split(" - ")[0].split("::") for line in said.splitlines() if line.startswith(("PASSED", "FAILED"))]
    outcomes = {test.partition("[")[0]: outcome.split()[0] for outcome, test in results}
    assert outcomes == {
        "test_a_dependency_warns": "PASSED",
        "test_others_warn": "PASSED",
        "test_we_warn": "FAILED",
        "test_we_warn_in_a_test": "FAILED",
        "test_we_raise_in_a_thread": "FAILED",
        "test_we_raise_in_a_destructor": "FAILED",
    }
    assert "8 failed, 6 passed" in said
