"""A backend is a module with the same few functions: `reference` (NumPy) and `cuda` (CuPy)."""

import functools
from importlib import import_module
from types import ModuleType


@functools.cache
def of(device: str) -> ModuleType:
    """The backend for the arrays of `device` ("cpu" or "cuda:<i>"), imported when it is first asked for."""
    return import_module("paged_attn.backends.reference" if device == "cpu" else "paged_attn.backends.cuda")
