"""JAX on a GPU, for every file of this folder that asks for it."""

import os
from typing import Any

import pytest

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # JAX takes three quarters of each card otherwise


@pytest.fixture(scope="session")
def gpu() -> Any:
    """The first GPU as JAX knows it."""
    jax = pytest.importorskip("jax")
    try:
        return jax.devices("gpu")[0]
    except RuntimeError as error:
        pytest.skip(f"JAX sees no GPU, install jax[cuda12] or jax[cuda13]: {error}")
