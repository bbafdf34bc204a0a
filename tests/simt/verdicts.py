"""Every call of the bad-input table on NumPy and on the SIMT shim's card: prints where the two verdicts differ.

A verdict is the type of the error and its message, whatever the device is called.
"""

import json
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from . import card


class ndarray(card.ndarray):
    """An array of the card that does whatever a NumPy array does."""

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.host, name)
        return (lambda *given, **more: on_card(found(*given, **more))) if callable(found) else found

    def __setitem__(self, key: Any, value: Any) -> None:
        self.host[key] = value

    def __getitem__(self, key: Any) -> Any:
        return on_card(self.host[key])

    def __int__(self) -> int:
        return int(self.host)


def on_card(value: Any) -> Any:
    return ndarray(value) if isinstance(value, np.ndarray) else value


card.ndarray = ndarray  # type: ignore[misc]
card.install()

import cupy  # noqa: E402

from tests import test_bad_input  # noqa: E402


def on_host(value: Any) -> Any:
    return value.host if isinstance(value, ndarray) else value


def maker(make: Callable[..., np.ndarray]) -> Callable[..., Any]:
    return lambda *given, **more: on_card(make(*map(on_host, given), **more))


for make in (np.array, np.full, np.ones, np.zeros, np.zeros_like):
    setattr(cupy, make.__name__, maker(make))


def verdict(call: Any, world: Any) -> str:
    try:
        call(world)
    except Exception as error:
        message = re.sub(r"cuda:\d|cuda|cpu", "device", str(error))
        return f"{type(error).__name__}: {message}"
    return "no error"


if __name__ == "__main__":
    worlds = test_bad_input.World(np), test_bad_input.World(cupy)
    differences = []
    for case in test_bad_input.CASES:
        on_numpy, on_the_card = (verdict(case.call, world) for world in worlds)
        if on_numpy != on_the_card or on_numpy == "no error":
            differences.append([case.name, on_numpy, on_the_card])
    print(json.dumps({"cases": len(test_bad_input.CASES), "differences": differences}))
