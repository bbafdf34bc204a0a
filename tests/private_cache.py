"""A folder for what tests keep between runs: compiled kernels, a model. What loads code from it trusts it."""

import os
import stat
import tempfile
from pathlib import Path

_NAME = "paged_attn-tests"


def folder(name: str) -> Path:
    """The folder ``name`` in paged_attn-tests in $XDG_CACHE_HOME or in ~/.cache; the same in every process.

    Where neither can be written it is in the machine's folder for temporary files, under the user's own number.
    PermissionError where somebody else owns it, or may enter it: what it holds is then not known to be ours.
    """
    for place in (*_cache_homes(), Path(tempfile.gettempdir()) / f"{_NAME}-{os.getuid()}"):
        try:
            place.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError:  # a read-only home, or none; a file or a dangling link in its place
            if not _is_link(place):
                continue
        _check_private(place)
        if os.access(place, os.W_OK):
            (place / name).mkdir(exist_ok=True)
            return place / name
    raise PermissionError(
        f"neither a cache folder nor {tempfile.gettempdir()} can be written; set XDG_CACHE_HOME to one"
    )


def _cache_homes() -> list[Path]:
    place = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not place.is_absolute():
        try:
            place = Path.home() / ".cache"
        except RuntimeError:  # a user whom the machine does not know
            return []
    return [place / _NAME]


def _check_private(place: Path) -> None:
    found = place.lstat()
    mode = stat.S_IMODE(found.st_mode)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or mode & 0o077:
        raise PermissionError(
            f"{place} must be a folder of user {os.getuid()} that nobody else may enter (mode 0700), but it is "
            f"{stat.filemode(found.st_mode)} of user {found.st_uid}; remove it, or set XDG_CACHE_HOME to another folder"
        )


def _is_link(place: Path) -> bool:
    """Also where its folder may not be searched: then it is none of ours."""
    try:
        return place.is_symlink()
    except OSError:
        return False
