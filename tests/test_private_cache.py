"""The folder that tests load compiled kernels from: of its user alone, the same in every process, warm between runs."""

import os
import subprocess
import tempfile
from pathlib import Path

import pytest

from tests import private_cache
from tests.simt import driver

SOURCE = """
struct Params { int* out; };
extern "C" __global__ void probe(const __grid_constant__ Params p) { p.out[0] = 1; }"""


def test_it_is_of_its_user_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = private_cache.folder("simt")
    assert folder == tmp_path / "cache" / "paged_attn-tests" / "simt" and folder.is_dir()
    assert folder.parent.stat().st_mode & 0o777 == 0o700
    assert private_cache.folder("simt") == folder
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # which the XDG specification has ignored
    monkeypatch.setenv("HOME", str(tmp_path))
    assert private_cache.folder("simt") == tmp_path / ".cache" / "paged_attn-tests" / "simt"


@pytest.mark.parametrize("fault", ["others may write", "others may read", "a link", "of another user"])
def test_what_others_can_fill_is_refused(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    place = tmp_path / "paged_attn-tests"
    if fault == "a link":
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        place.symlink_to(tmp_path / "elsewhere")
    else:
        place.mkdir()
        place.chmod({"others may write": 0o702, "others may read": 0o750}.get(fault, 0o700))
    if fault == "of another user":
        another = os.getuid() + 1
        monkeypatch.setattr(os, "getuid", lambda: another)
    with pytest.raises(
        PermissionError, match=r"paged_attn-tests must be a folder of user \d+ .* remove it, or set XDG_CA"
    ):
        private_cache.folder("simt")


def test_without_a_home_it_is_in_the_folder_for_temporary_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null/cache")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = private_cache.folder("simt")
    assert folder == tmp_path / f"paged_attn-tests-{os.getuid()}" / "simt"
    assert folder.parent.stat().st_mode & 0o777 == 0o700
    folder.parent.chmod(0o777)
    with pytest.raises(PermissionError, match="nobody else may enter"):
        private_cache.folder("simt")


def test_a_home_that_may_not_be_searched_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setenv("XDG_CACHE_HOME", "/somebody/else")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    mkdir, is_symlink = Path.mkdir, Path.is_symlink
    foreign = lambda path: not path.is_relative_to(tmp_path)  # noqa: E731
    monkeypatch.setattr(Path, "mkdir", lambda path, *a, **o: refuse() if foreign(path) else mkdir(path, *a, **o))
    monkeypatch.setattr(Path, "is_symlink", lambda path: refuse() if foreign(path) else is_symlink(path))
    assert private_cache.folder("simt").is_relative_to(tmp_path)


@pytest.mark.shim
def test_a_kernel_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    driver.build.__wrapped__(SOURCE, "probe", ())
    (library,) = tmp_path.rglob("*.so")
    assert library.parent == private_cache.folder("simt")
    monkeypatch.setattr(subprocess, "run", lambda *arguments, **options: pytest.fail("compiled again"))
    driver.build.__wrapped__(SOURCE, "probe", ())
