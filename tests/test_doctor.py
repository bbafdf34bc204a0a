"""The doctor: what it says of this machine and of imagined ones, and that nothing makes it crash."""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import io
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.console import Console

import paged_attn as pa
from paged_attn import compile as kernels
from paged_attn import doctor
from paged_attn.doctor import Driver, Finding, Probe, Verdict
from paged_attn.interop import cuda_available

ROOT = Path(__file__).parents[1]
H100 = Driver((12, 8), ["NVIDIA H100 80GB HBM3, compute capability 9.0, 80 GiB"])


def diagnose() -> subprocess.CompletedProcess[str]:
    """What `python -m paged_attn doctor` does where there is no terminal."""
    command = [sys.executable, "-m", "paged_attn", "doctor"]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=280, cwd=ROOT)


def look(probes: dict[str, Probe]) -> list[Finding]:
    return [finding for name, probe in probes.items() for finding in doctor.attempt(name, probe)]


def verdicts(output: str) -> dict[str, str]:
    return {name: verdict for verdict, name in re.findall(r"^  (ok|note|failed) +(\S.*?) {2,}\S", output, re.M)}


# -- this machine ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def without_card() -> subprocess.CompletedProcess[str]:
    if cuda_available():
        pytest.skip("this machine has a card")
    return diagnose()


def test_without_a_card_the_answer_is_no(without_card: subprocess.CompletedProcess[str]) -> None:
    assert without_card.returncode == 1
    assert without_card.stderr == ""
    assert "\x1b" not in without_card.stdout and "│" not in without_card.stdout
    found = verdicts(without_card.stdout)
    assert found["NVIDIA driver"] == "failed" or found["card"] == "failed"
    assert {found[name] for name in ("paged_attn", "Python", "numpy", "ml_dtypes")} == {"ok"}
    assert {found[name] for name in doctor.CHECKS} == {"note"}
    assert without_card.stdout.splitlines()[-1].startswith("the GPU path is not usable, because of: NVIDIA driver")


def test_without_a_card_every_kernel_compiles_for_two(without_card: subprocess.CompletedProcess[str]) -> None:
    pytest.importorskip("cuda.bindings.nvrtc")
    for file in {path.name for path in kernels.kernel_files().values()}:
        (line,) = re.findall(rf"^  note    {file} .*$", without_card.stdout, re.M)
        only = {"prefill.cu": "sm_80", "prefill_hopper.cu": "sm_90a", "tiles.cu": "sm_90a"}
        assert f"compiles for {only.get(file, 'sm_80 and sm_90a')} in" in line
        for name, path in kernels.kernel_files().items():
            assert path.name != file or re.search(rf"\b{name}\b", line.partition(": ")[2])


@pytest.mark.gpu
def test_on_a_card_the_answer_is_yes() -> None:
    done = diagnose()
    assert done.returncode == 0, done.stdout + done.stderr
    found = verdicts(done.stdout)
    assert "failed" not in found.values()
    wanted = [*doctor.CHECKS, "status", "card 0", "CuPy", "CUDA runtime", "NVRTC", "GPU support"]
    others = {"prefill.cu", "prefill_hopper.cu", "tiles.cu"}  # on Hopper the first is not needed, else the others
    wanted += {path.name for path in kernels.kernel_files().values()} - others
    assert {name: found.get(name) for name in wanted} == dict.fromkeys(wanted, "ok")
    assert {found[name] for name in others} == {"ok", "note"}
    assert done.stdout.splitlines()[-1] == "the GPU path is usable"


# -- imagined machines -------------------------------------------------------------------------------------------------


class Machine:
    """What the doctor looks at, replaced."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch
        self.packages: dict[str, str] = {}
        monkeypatch.setattr(importlib.metadata, "version", self._version)
        self.driver(None)
        self.module("cupy", None)

    def _version(self, package: str) -> str:
        if package not in self.packages:
            raise importlib.metadata.PackageNotFoundError(package)
        return self.packages[package]

    def driver(self, driver: Driver | None) -> None:
        def read() -> Driver:
            if driver is None:
                raise OSError("libcuda.so.1: cannot open shared object file")
            return driver

        self._monkeypatch.setattr(doctor, "read_driver", read)

    def module(self, name: str, module: Any) -> None:
        """None is a module that cannot be imported."""
        self._monkeypatch.setitem(sys.modules, name, module)

    def cupy(self, major: int, *, runtime: int | Exception, nvrtc: tuple[int, int] | Exception) -> None:
        def answer(value: Any) -> Any:
            if isinstance(value, Exception):
                raise value
            return value

        cuda = SimpleNamespace(
            runtime=SimpleNamespace(runtimeGetVersion=lambda: answer(runtime)),
            nvrtc=SimpleNamespace(getVersion=lambda: answer(nvrtc)),
            is_available=lambda: False,
        )
        self.packages[f"cupy-cuda{major}x"] = "14.2.0"
        self.module("cupy", SimpleNamespace(__version__="14.2.0", cuda=cuda))
        self.module("cupy.cuda", cuda)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


@pytest.mark.parametrize(("driver", "major"), [(None, 12), ((12, 2), 12), ((13, 0), 13)])
def test_a_missing_cupy_is_installed_for_the_driver(
    machine: Machine, driver: tuple[int, int] | None, major: int
) -> None:
    machine.driver(driver and Driver(driver, []))
    finding = doctor.find_cupy()
    assert finding.verdict is Verdict.BAD
    assert finding.command == (
        f'{sys.executable} -m pip install "cupy-cuda{major}x>=14.0.1,!=14.1.0" "{doctor.TOOLKIT[major]}"'
    )
    assert doctor.find_runtime().verdict is doctor.find_support().verdict is Verdict.NOTE


def test_both_wheels_are_one_too_many(machine: Machine) -> None:
    machine.packages |= {"cupy-cuda12x": "14.2.0", "cupy-cuda13x": "14.2.0"}
    machine.driver(Driver((13, 0), []))
    finding = doctor.find_cupy()
    assert finding.verdict is Verdict.BAD and "overwrite each other" in finding.text
    assert " uninstall -y cupy-cuda12x cupy-cuda13x && " in finding.command
    assert f'"{doctor.CUPY[13]}"' in finding.command and doctor.CUPY[12] not in finding.command


@pytest.mark.parametrize(
    ("version", "verdict"), [("13.6.0", "failed"), ("14.0.1", "ok"), ("14.1.0", "failed"), ("15.0.0rc1", "ok")]
)
def test_versions_of_cupy(machine: Machine, version: str, verdict: str) -> None:
    machine.cupy(12, runtime=12090, nvrtc=(12, 9))
    sys.modules["cupy"].__version__ = version
    finding = doctor.find_cupy()
    assert finding.verdict == verdict and version in finding.text
    assert bool(finding.command) == (verdict == "failed")


def test_a_driver_that_is_older_than_the_runtime(machine: Machine) -> None:
    machine.cupy(13, runtime=13000, nvrtc=(13, 0))
    machine.driver(H100)
    finding = doctor.find_runtime()
    assert finding.verdict is Verdict.BAD and "13.0, but the driver is for CUDA 12.8" in finding.text
    assert " uninstall -y cupy-cuda13x && " in finding.command and f'"{doctor.CUPY[12]}"' in finding.command
    machine.driver(Driver((13, 0), H100.cards))
    assert doctor.find_runtime() == Finding(Verdict.GOOD, "13.0")


def test_nvrtc_that_is_missing_or_old(machine: Machine) -> None:
    missing = RuntimeError("Failure finding libnvrtc.so.13")
    machine.cupy(13, runtime=missing, nvrtc=missing)
    for finding in (doctor.find_nvrtc(), doctor.find_runtime()):
        assert finding.verdict is Verdict.BAD and "libnvrtc.so.13" in finding.text
        assert finding.command == f'{sys.executable} -m pip install "{doctor.TOOLKIT[13]}"'
    machine.cupy(13, runtime=13000, nvrtc=(12, 8))
    assert "12.8, and the kernels need 12.9" in doctor.find_nvrtc().text
    machine.cupy(13, runtime=13000, nvrtc=(12, 9))
    assert doctor.find_nvrtc() == Finding(Verdict.GOOD, "12.9")


def test_cards_are_named(machine: Machine) -> None:
    machine.driver(H100)
    driver, card = doctor.attempt("NVIDIA driver", doctor.find_driver)
    assert driver == (Verdict.GOOD, "for CUDA 12.8 and earlier", "", "NVIDIA driver")
    assert card == (Verdict.GOOD, H100.cards[0], "", "card 0")
    machine.driver(Driver((12, 8), []))
    assert [finding.verdict for finding in doctor.find_driver()] == [Verdict.GOOD, Verdict.BAD]


class FakeLibrary:
    """libcuda with one T4."""

    def __init__(self, init: int = 0) -> None:
        self.cuInit = lambda flags: init

    def __getattr__(self, function: str) -> Any:
        def call(target: Any, *arguments: int) -> int:
            if function == "cuDeviceGetName":
                target.value = b"Tesla T4"
            else:
                target._obj.value = answers[(function, *arguments)]
            return 0

        answers = {
            ("cuDriverGetVersion",): 12040, ("cuDeviceGetCount",): 1, ("cuDeviceGet", 0): 40,
            ("cuDeviceTotalMem_v2", 40): 16 * 2**30,
            ("cuDeviceGetAttribute", 75, 40): 7, ("cuDeviceGetAttribute", 76, 40): 5,
        }  # fmt: skip
        return call


def test_the_driver_is_read_without_cupy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: FakeLibrary())
    assert doctor.read_driver() == Driver((12, 4), ["Tesla T4, compute capability 7.5, 16 GiB"])
    monkeypatch.setattr(ctypes, "CDLL", lambda name: FakeLibrary(init=doctor.NO_DEVICE))
    assert doctor.read_driver() == Driver((12, 4), [])
    monkeypatch.setattr(ctypes, "CDLL", lambda name: FakeLibrary(init=803))
    with pytest.raises(RuntimeError, match="cuInit of the driver fails with CUDA error 803"):
        doctor.read_driver()


def test_a_card_that_is_too_old(monkeypatch: pytest.MonkeyPatch, machine: Machine) -> None:
    machine.cupy(12, runtime=12090, nvrtc=(12, 9))
    no = SimpleNamespace(reason="cuda:0 has compute capability 7.5, and the kernels need 8.0")
    monkeypatch.setattr(pa, "supports", lambda op, device: type("No", (), {"__bool__": lambda s: False, **vars(no)})())
    assert doctor.find_support() == Finding(Verdict.BAD, no.reason)


def test_jax_is_a_note(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.module("jax", None)
    finding = doctor.find_jax()
    assert finding.verdict is Verdict.NOTE and finding.command.endswith(" install jax")
    machine.module("jax", SimpleNamespace(__version__="0.10.2"))
    assert doctor.find_jax() == Finding(Verdict.GOOD, "0.10.2")
    monkeypatch.setattr(doctor, "on_card", lambda: True)
    machine.driver(Driver((13, 0), H100.cards))
    finding = doctor.find_jax()
    assert finding.verdict is Verdict.NOTE and finding.command.endswith(' install "jax[cuda13]"')
    machine.packages["jax-cuda13-plugin"] = "0.10.2"
    assert doctor.find_jax().verdict is Verdict.GOOD


def test_without_cupy_and_cuda_bindings_the_compiler_is_what_is_missing(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """cuda-toolkit alone would leave the next run where this one is: nothing could load it."""
    monkeypatch.setattr(doctor, "on_card", lambda: False)
    machine.module("cuda.bindings", None)
    finding = doctor.find_nvrtc()
    assert finding.verdict is Verdict.NOTE
    command = f'{sys.executable} -m pip install "cuda-bindings>=12.9,<13" "{doctor.TOOLKIT[12]}"'
    assert finding.command == command
    for finding in look(doctor.kernels()):
        assert finding.verdict is Verdict.NOTE and "not checked" in finding.text and finding.command == command
    machine.packages["cupy-cuda13x"] = "14.2.0"  # whose toolkit must not be taken back to 12
    assert doctor.find_nvrtc().command.endswith(f' install "cuda-bindings>=13,<14" "{doctor.TOOLKIT[13]}"')


def test_a_cupy_that_cannot_be_imported_is_said_for_what_it_is(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Finder:
        def find_spec(self, name: str, path: object = None, target: object = None) -> None:
            if name.partition(".")[0] == "cupy":
                raise OSError(30, "Read-only file system")

    for name in [name for name in sys.modules if name.partition(".")[0] == "cupy"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    finding = doctor.find_cupy()
    assert finding.verdict is Verdict.BAD and "cannot be imported" in finding.text
    assert "Read-only file system" in finding.text and "CUPY_CACHE_DIR" in finding.text and not finding.command
    for probe in (doctor.find_runtime, doctor.find_support):
        assert probe().verdict is Verdict.NOTE


# -- nothing makes it crash --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("probe", ["paged_attn", "driver", "cupy", "runtime", "nvrtc", "support", "jax"])
def test_a_probe_that_breaks_is_a_line(probe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Finding:
        raise OSError("it is\nbroken by an error here")

    monkeypatch.setattr(doctor, f"find_{probe}", broken)
    findings = look(doctor.found())
    assert Verdict.BAD in {f.verdict for f in findings if f.text == "OSError: broken by an error here"}
    assert doctor.found().keys() <= {finding.name for finding in findings}


def test_a_file_that_does_not_compile_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cuda.bindings.nvrtc")
    monkeypatch.setattr(doctor, "on_card", lambda: False)
    monkeypatch.setattr(kernels, "load_source", lambda name: "int x = ;")
    findings = look(doctor.kernels())
    assert {finding.name for finding in findings} == {path.name for path in kernels.kernel_files().values()}
    for finding in findings:
        assert finding.verdict is Verdict.BAD
        assert finding.text == f"RuntimeError: {finding.name}(1): error: expected an expression"


# -- checks: NumPy stands for a card -----------------------------------------------------------------------------------


class Array(np.ndarray):
    def get(self) -> np.ndarray:
        return np.asarray(self)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """numpy under CuPy's name."""
    monkeypatch.setitem(sys.modules, "cupy", np)
    monkeypatch.setattr(doctor, "on_card", lambda: True)
    monkeypatch.setattr(pa, "status", lambda device: None)
    for name, check in doctor.CHECKS.items():
        as_card = functools.partial(lambda check, batch: [array.view(Array) for array in check(batch)], check)
        monkeypatch.setitem(doctor.CHECKS, name, as_card)
    return monkeypatch


def test_a_right_card_agrees(card: pytest.MonkeyPatch) -> None:
    findings = look(doctor.checks())
    assert [finding.name for finding in findings] == [*doctor.CHECKS, "status"]
    assert {finding.verdict for finding in findings} == {Verdict.GOOD}
    assert all("0.0e+00 of 2e-03 (float16), 0.0e+00 of 1e-02 (bfloat16)" in finding.text for finding in findings[:-1])


@pytest.mark.parametrize("name", doctor.CHECKS)
def test_a_card_that_errs_is_told_from_numpy(name: str, card: pytest.MonkeyPatch) -> None:
    """The card's answer has one wrong element."""
    check, answers = doctor.CHECKS[name], []

    def wrong(batch: doctor.Batch) -> list[Any]:
        answers.append([*check(batch)])
        if len(answers) > len(doctor.OUT_TOLERANCE):
            answers[-1][0] = answers[-1][0].copy()
            answers[-1][0].flat[-1] += 100
        return answers[-1]

    finding = doctor.run_check(wrong)
    assert finding.verdict is Verdict.BAD and "differs from NumPy" in finding.text


def test_a_check_that_breaks_is_a_line(card: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any, **options: Any) -> Any:
        raise RuntimeError("cudaErrorIllegalAddress: an illegal memory access was encountered")

    card.setattr(pa, "decode", broken)
    bad = [finding for finding in look(doctor.checks()) if finding.verdict is Verdict.BAD]
    assert [finding.name for finding in bad] == ["decode", "cache"]
    assert all("cudaErrorIllegalAddress" in finding.text for finding in bad)


# -- what a person sees ------------------------------------------------------------------------------------------------


def test_numpy_that_works_is_said_before_what_is_missing(
    without_card: subprocess.CompletedProcess[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "NumPy is fully usable: every operation ran on this CPU. What is missing is for a GPU only."
    lines = without_card.stdout.splitlines()
    assert lines.count(text) == 1
    assert lines.index(text) < min(i for i, line in enumerate(lines) if line.startswith(("to install", "the GPU path")))

    def conclusion(broken: str | None) -> str:
        file = io.StringIO()
        verdicts = {name: Verdict.BAD if name == broken else Verdict.NOTE for name in doctor.CHECKS}
        findings = [Finding(verdict, "", name=name) for name, verdict in ({"CuPy": Verdict.BAD} | verdicts).items()]
        doctor.conclude(Console(file=file, highlight=False, markup=False), findings)
        return file.getvalue()

    assert "NumPy" in conclusion(None)
    assert all("NumPy" not in conclusion(name) for name in doctor.CHECKS)


@pytest.mark.parametrize("terminal", [True, False])
def test_brackets_survive_and_a_command_stands_alone(terminal: bool) -> None:
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, width=60, highlight=False, markup=False)
    command = doctor.pip("install", doctor.TOOLKIT[12], "x" * 50)
    findings = [Finding(Verdict.BAD, "needs [bold] things", command, name) for name in ("NVRTC", "CUDA runtime")]
    doctor.show(console, "found", findings)
    doctor.conclude(console, findings)
    output = file.getvalue()
    assert "needs [bold] things" in output
    assert output.count(command) == 1
    assert f"\n  {command}\n" in output
    assert "not usable, because of: NVRTC, CUDA runtime" in output
    assert ("┌" in output) == terminal
