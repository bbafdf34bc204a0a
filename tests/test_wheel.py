"""The wheel holds every file of kernels/, and works where nothing but the wheel and its dependencies is."""

import re
import subprocess
import sys
import sysconfig
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

from .test_readme import BLOCKS

ROOT = Path(__file__).parents[1]
WHAT_WAS_LOADED = """
import sys
print(sys.modules["paged_attn"].__file__)
loaded = {name.partition(".")[0] for name, module in sys.modules.items() if getattr(module, "__file__", None)}
print(*loaded - sys.stdlib_module_names - {"__main__", "paged_attn"})
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, ROOT], check=True)
    (path,) = folder.glob("*.whl")
    return path


def test_it_holds_every_file_of_kernels_and_the_package(wheel: Path) -> None:
    sources = {
        (Path(place) / path.relative_to(ROOT / folder)).as_posix()
        for folder, place in (("paged_attn", "paged_attn"), ("kernels", "paged_attn/kernels"))
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert "paged_attn/kernels/decode.cu" in names and "paged_attn/py.typed" in names
    assert names == sources


def test_it_runs_the_numpy_path_in_a_new_environment(wheel: Path, tmp_path: Path) -> None:
    environment = tmp_path / "environment"
    venv.create(environment, symlinks=True)
    python = environment / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "--python", python]
    subprocess.run([*pip, "install", "--no-deps", "--no-index", wheel], check=True)
    # The dependencies come from this environment, on a path behind the new one's own packages.
    (site_packages,) = environment.glob("lib/python*/site-packages")
    (site_packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))

    (numpy_block,) = (code for _, code in BLOCKS[:3] if code.startswith("import numpy"))
    script = tmp_path / "script.py"
    script.write_text(numpy_block + WHAT_WAS_LOADED)
    printed = subprocess.run([python, script], cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    file, packages = printed.splitlines()
    assert Path(file).is_relative_to(site_packages)
    assert "numpy" in packages.split()
    assert set(packages.split()) <= declared_dependencies(wheel)


def declared_dependencies(wheel: Path) -> set[str]:
    """Names of the packages that the wheel's metadata requires without an extra."""
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        requirements = Parser().parsestr(archive.read(metadata).decode()).get_all("Requires-Dist", [])
    names = [re.match(r"[\w-]+", requirement) for requirement in requirements if "extra ==" not in requirement]
    return {name[0].replace("-", "_") for name in names if name}
