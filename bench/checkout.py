"""The package of another checkout in one process with ours. Both are named `paged_attn`, one at a time."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

NAME = "paged_attn"


class Checkout:
    """The package of the checkout in `folder`; ImportError where there is none.

    What it imports while it works, by whatever name, must be its own. So its modules are those of sys.modules whenever
    it imports or calls something, and ours are again afterwards.
    """

    def __init__(self, folder: Path) -> None:
        self._package = folder.resolve() / NAME
        self._modules: dict[str, ModuleType] = {}
        start = self._package / "__init__.py"
        if not start.is_file():
            raise ImportError(f"{folder} is no checkout: it has no {NAME}/__init__.py; pass the folder that has it")
        spec = importlib.util.spec_from_file_location(NAME, start, submodule_search_locations=[str(self._package)])
        assert spec is not None and spec.loader is not None
        self.library = importlib.util.module_from_spec(spec)
        self._modules[NAME] = self.library
        with self.active():
            spec.loader.exec_module(self.library)

    @contextmanager
    def active(self) -> Iterator[ModuleType]:
        """Inside, `paged_attn` is the package of this checkout, and nothing of ours may be called that imports late."""
        ours, known = _swap(_active(), self._modules), self._modules
        try:
            yield self.library
        finally:
            self._modules = _swap(_active(), ours)
        for name in self._modules.keys() - known.keys():
            if not Path(self._modules[name].__file__ or "").is_relative_to(self._package):
                raise ImportError(f"{name} of {self._package.parent} came from {self._modules[name].__file__}")

    def inside(self, call: Callable[[], Any]) -> Callable[[], Any]:
        """The call, made while this checkout is active, at the cost of a few microseconds.

        It is made once here, for all that it imports; ImportError where it imports more of the package later on.
        """
        with self.active():
            call()
        names = _active()

        def run() -> Any:
            ours = _swap(names, self._modules)
            count = len(sys.modules)
            try:
                return call()
            finally:
                late = set(_active()) - self._modules.keys() if len(sys.modules) > count else set()
                _swap([*self._modules, *late], ours)
                if late:
                    raise ImportError(f"a call of {self._package.parent} has imported {', '.join(late)} late")

        return run


def _active() -> list[str]:
    """The names of the package's modules."""
    return [name for name in sys.modules if name.partition(".")[0] == NAME]


def _swap(names: Iterable[str], modules: dict[str, ModuleType]) -> dict[str, ModuleType]:
    """Put `modules` into sys.modules instead of those of the names, which are returned."""
    taken = {name: sys.modules.pop(name) for name in names}
    sys.modules.update(modules)
    return taken
