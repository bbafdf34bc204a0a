"""The rules of the markers gpu and shim, and the evidence of a GPU run (tests/gpu/results.json, results_cuda12.json).

Tests in tests/gpu are marked gpu, those in tests/simt shim. A gpu test is skipped where CuPy sees no card; with
PA_REQUIRE_GPU=1 a skipped one is a failure, but for those marked two_gpus, which need a second card. Without g++ one
failure stands for all shim tests. A run that executed gpu tests writes its evidence; any other run says when the
evidence is of another tree.
"""

import datetime
import importlib.metadata
import json
import os
import platform
import shutil
from collections import Counter
from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench import record
from paged_attn.interop import cuda_available

ROOT = Path(__file__).parents[1]
GPU_TESTS = ROOT / "tests" / "gpu"
SHIM_TESTS = ROOT / "tests" / "simt"
RESULTS = GPU_TESTS / "results.json"
RESULTS_CUDA12 = GPU_TESTS / "results_cuda12.json"  # of a run with CuPy and NVRTC for CUDA 12
PACKAGES = ("numpy", "ml_dtypes", "cupy-cuda12x", "cupy-cuda13x", "nvidia-cuda-nvrtc-cu12", "nvidia-cuda-nvrtc", "jax")

OUTCOMES = "outcomes of gpu tests"


def gpu_is_required() -> bool:
    return os.environ.get("PA_REQUIRE_GPU") == "1"


def source_hash(root: Path = ROOT) -> str:
    """One SHA-256 of the paths and texts of the sources in kernels/, paged_attn/ and tests/."""
    return record.source_hash(root, (*record.SOURCES, "tests"))


@pytest.fixture(params=["numpy", pytest.param("cupy", marks=pytest.mark.gpu)])
def xp(request: pytest.FixtureRequest) -> Any:
    """The array module of each backend: numpy, and cupy on a machine that has a card."""
    return pytest.importorskip(request.param) if request.param == "cupy" else np


# -- the marker ------------------------------------------------------------------------------------------------------


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(session: pytest.Session, items: list[pytest.Item]) -> Generator[None, None, None]:
    for item in items:
        if GPU_TESTS in item.path.parents:
            item.add_marker(pytest.mark.gpu)
        if SHIM_TESTS in item.path.parents:
            item.add_marker(pytest.mark.shim)
        if item.get_closest_marker("gpu") and not cuda_available():
            item.add_marker(pytest.mark.skip(reason="CuPy is not installed or sees no CUDA device"))
        elif needs_another_card(item):
            item.add_marker(pytest.mark.skip(reason="needs two CUDA devices, and CuPy sees one"))
    yield  # -m and -k choose
    in_need = [item for item in items if item.get_closest_marker("shim")]
    if in_need and shutil.which("g++") is None:
        session.config.hook.pytest_deselected(items=in_need)
        failure = CompilerIsMissing.from_parent(session, name="g++", count=len(in_need))
        items[:] = [failure, *(item for item in items if item not in in_need)]


class CompilerIsMissing(pytest.Item):
    """The one failure that stands for all tests that g++ would have compiled a kernel for."""

    def __init__(self, count: int, **options: Any) -> None:
        super().__init__(**options)
        self.count = count

    def runtest(self) -> None:
        pytest.fail(
            f"g++ is not on the PATH, and {self.count} of the chosen tests run kernels that it compiles: none of them "
            "was run. Install it (apt-get install g++), or leave them out with -m 'not shim'",
            pytrace=False,
        )

    def reportinfo(self) -> tuple[Path, None, str]:
        return self.path, None, "g++ is there"


def needs_another_card(item: pytest.Item) -> bool:
    """Whether the test is one of two cards on a machine that has one."""
    if item.get_closest_marker("two_gpus") is None or not cuda_available():
        return False
    import cupy

    return bool(cupy.cuda.runtime.getDeviceCount() < 2)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    report.needs_gpu = item.get_closest_marker("gpu") is not None
    if report.needs_gpu:
        if report.skipped and gpu_is_required() and not hasattr(report, "wasxfail") and not needs_another_card(item):
            report.outcome = "failed"
            report.longrepr = f"a gpu test was skipped, and PA_REQUIRE_GPU=1: {report.longrepr}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    if report.skipped and gpu_is_required() and GPU_TESTS in collector.path.parents:
        report.outcome = "failed"
        report.longrepr = f"a module of gpu tests was skipped, and PA_REQUIRE_GPU=1: {report.longrepr}"
    return report


# -- the evidence ----------------------------------------------------------------------------------------------------


class Outcomes:
    """How often each gpu test passed, failed and so on; the same where pytest-xdist runs them in several processes."""

    def __init__(self) -> None:
        self.tests: dict[str, Counter[str]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if getattr(report, "needs_gpu", False) and (report.when == "call" or not report.passed):
            outcome = "error" if report.failed and report.when != "call" else report.outcome
            self.tests.setdefault(report.nodeid.partition("[")[0], Counter())[outcome] += 1


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Outcomes(), OUTCOMES)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    outcomes = config.pluginmanager.get_plugin(OUTCOMES).tests
    total = sum(outcomes.values(), Counter())
    if total["passed"] + total["failed"]:
        found = evidence(outcomes, total)
        results = RESULTS_CUDA12 if "cupy-cuda12x" in found["versions"] else RESULTS
        results.write_text(json.dumps(found, indent=1) + "\n")
        terminalreporter.write_line(f"GPU evidence written to {results.relative_to(ROOT)}")
    elif warning := evidence_warning():
        terminalreporter.write_line(f"warning: {warning}", yellow=True)


def evidence(outcomes: dict[str, Counter[str]], total: Counter[str]) -> dict[str, Any]:
    """What a run on this machine's card has shown."""
    import cupy

    card = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.runtime.getDevice())
    versions = {"python": platform.python_version(), "driver": cupy.cuda.runtime.driverGetVersion()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "card": card["name"].decode(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "source_hash": source_hash(),
        "skips_are_failures": gpu_is_required(),
        "versions": versions,
        "total": dict(total),
        "tests": {name: dict(counts) for name, counts in sorted(outcomes.items())},
    }


def evidence_warning(results: Path = RESULTS) -> str | None:
    """What is to be said about the committed evidence, if it is not of this tree."""
    if not results.exists():
        return f"there is no GPU evidence ({results.name}); run PA_REQUIRE_GPU=1 pytest -m gpu on a machine with a card"
    recorded = json.loads(results.read_text())
    if recorded["source_hash"] == source_hash():
        return None
    return (
        f"the GPU evidence of {recorded['date']} is of another tree than this one; "
        f"run PA_REQUIRE_GPU=1 pytest -m gpu on a machine with a card"
    )
