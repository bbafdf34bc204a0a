"""What moves tokens and states: microseconds of append and of merge_states, each beside plain memory traffic."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

import paged_attn as pa
from tests.cases import AppendCase, MergeCase

from .pools import Append, Merge
from .session import Session


def measure_merge(case: MergeCase, session: Session) -> dict[str, Any]:
    """Microseconds of merge_states (merge_state for two), and of reading the states."""
    import cupy

    inputs = Merge.build(case, cupy)
    run = inputs.run()
    inputs.check(*run())
    as_many = cupy.empty(inputs.read_bytes, np.uint8)
    floor = session.stopwatch.read_floor(as_many, inputs.read_bytes)
    figures = session.measure("merge", inputs, inputs.check, {"read_floor_us": floor, "run_us": run})
    ratio = figures["run_us"]["median"] / figures["read_floor_us"]["median"]
    return {"read_mb": round(inputs.read_bytes / 1e6, 2), **figures, "ratio": round(ratio, 4)}


def measure_append(case: AppendCase, session: Session) -> dict[str, Any]:
    """Microseconds of append, and of a plain copy of as many bytes."""
    import cupy

    inputs = Append.build(case, cupy)
    run = inputs.run()
    run()
    inputs.check()
    num_bytes = inputs.k.nbytes + inputs.v.nbytes
    source, target = cupy.zeros(num_bytes, np.uint8), cupy.empty(num_bytes, np.uint8)
    copy = partial(target.data.copy_from_device_async, source.data, num_bytes)
    figures = session.measure("append", inputs, inputs.check, {"copy_us": copy, "run_us": run})
    pa.status()
    ratio = figures["run_us"]["median"] / figures["copy_us"]["median"]
    return {"written_mb": round(num_bytes / 1e6, 3), **figures, "ratio": round(ratio, 4)}
