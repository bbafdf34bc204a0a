"""The package of another checkout beside ours in one process, under a name of its own."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

OURS = "paged_attn"


def load(folder: Path, name: str = "other_paged_attn") -> ModuleType:
    """The package `paged_attn` of the checkout in `folder`, imported as `name`.

    Its modules import each other relatively, so that none of them meets ours, and it finds its kernels beside itself.
    ImportError where there is no such checkout, or where one of its modules has taken something of ours.
    """
    package = folder.resolve() / OURS / "__init__.py"
    if not package.is_file():
        raise ImportError(f"{folder} is no checkout: there is no {OURS}/__init__.py in it; pass the folder that has it")
    spec = importlib.util.spec_from_file_location(name, package, submodule_search_locations=[str(package.parent)])
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    check_apart(name)
    return module


def check_apart(name: str) -> None:
    """ImportError where a module of the package `name` holds a module, a class or a function of ours.

    Modules that are imported at their first use are seen only after it.
    """
    for path, module in list(sys.modules.items()):
        if path.partition(".")[0] != name:
            continue
        mixed = [key for key, value in vars(module).items() if _package_of(value) == OURS]
        if mixed:
            raise ImportError(f"{path} has {', '.join(mixed)} of {OURS}, not of {name}; import relatively there")


def _package_of(value: Any) -> str:
    home = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None)
    return home.partition(".")[0] if isinstance(home, str) else ""
