"""One-shot calls whose plans are kept, on the SIMT shim's card: whether each was right, and its plans are as few."""

import json
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np

from . import card

card.install()

import cupy  # noqa: E402

import paged_attn as pa  # noqa: E402
from paged_attn import plans  # noqa: E402
from paged_attn.backends import cuda  # noqa: E402
from tests import cases  # noqa: E402

SHAPE = {"num_qo_heads": 4, "num_kv_heads": 2, "head_dim": 16, "page_size": 4}
INPUTS = [
    cases.build(cases.Case(f"one_shot{i}", kv_lens, q_lens=q_lens, **SHAPE, **options))
    for i, (kv_lens, q_lens, options) in enumerate(
        [
            ((9, 3), None, {}),
            ((9, 3), None, {"window_left": 2}),
            ((5, 1, 14), None, {"logits_soft_cap": 2.0}),
            ((9, 3), (2, 3), {}),
            ((9, 3), (4, 1), {}),
            ((6,), (4,), {"window_left": 1}),
        ]
    )
]
made: list[Any] = []
updates: list[Any] = []


class CountedPlan(cuda.Plan):
    def __init__(self, *given: Any, **options: Any) -> None:
        made.append(None)
        super().__init__(*given, **options)

    def update(self, *given: Any) -> None:
        updates.append(None)
        super().update(*given)


cuda.Plan = CountedPlan  # type: ignore[misc]


def attend(inputs: Any, to: Any, metadata: Any) -> Any:
    kv, table, options = inputs.kv(to), inputs.table(metadata), inputs.options()
    if inputs.case.is_decode:
        return pa.decode(to(inputs.q), kv, table, **options)
    return pa.prefill(to(inputs.q), metadata(inputs.qo_indptr), kv, table, **options)


RIGHT = [attend(inputs, np.asarray, np.asarray) for inputs in INPUTS]


def is_right(i: int, metadata: Any) -> bool:
    out = attend(INPUTS[i], cupy.asarray, metadata).host
    return bool(np.allclose(out.astype(np.float32), RIGHT[i].astype(np.float32), rtol=0.01, atol=0.01))


def in_turns(rng: np.random.Generator) -> Iterator[bool]:
    """Six calls by turns, with metadata of either kind: each is planned once on every stream and in every thread."""
    stream = cupy.cuda.Stream()
    for place in (cupy.asarray, np.asarray):
        before = len(made)
        for i in rng.permutation(list(range(len(INPUTS))) * 3):
            with stream if rng.random() < 0.5 else card.Stream(0):
                yield is_right(int(i), place)
        yield len(made) - before <= 2 * len(INPUTS)
    before = len(made)
    for i in range(len(INPUTS)):
        yield is_right(i, np.asarray)
    yield len(made) <= before + len(INPUTS)
    before, results = len(made), []
    other = threading.Thread(target=lambda: results.extend(is_right(0, np.asarray) for _ in range(3)))
    other.start()
    other.join()
    yield results == [True] * 3 and len(made) == before + 1


def layers(rng: np.random.Generator) -> Iterator[bool]:
    """The layers of a step, whose metadata the host has, are planned once; metadata that has changed in place is seen,
    and a device's is copied each time, as nobody knows."""
    plans._kept.plans.clear()
    for i in (0, 3):
        inputs, kv, table, q = INPUTS[i], INPUTS[i].kv(cupy.asarray), INPUTS[i].table(), cupy.asarray(INPUTS[i].q)
        on_host = inputs.kv(), table

        def call(q: Any, kv: Any, table: Any, qo_indptr: Any = inputs.qo_indptr, is_decode: bool = i == 0) -> Any:
            return pa.decode(q, kv, table) if is_decode else pa.prefill(q, qo_indptr, kv, table)

        for _ in range(2):
            before = len(updates)
            right = call(inputs.q, *on_host).astype(np.float32)
            for _ in range(3):
                yield bool(np.allclose(call(q, kv, table).host.astype(np.float32), right, rtol=0.01, atol=0.01))
            yield len(updates) == before + 1
            inputs.indices[:2] = inputs.indices[1::-1]  # of the first request: its first two pages change places
        try:
            inputs.indices[0] += 1000
            call(q, kv, table)
            yield False
        except pa.PageTableError:
            inputs.indices[0] -= 1000
        inputs.indices[:2] = inputs.indices[1::-1]
    before = len(updates)
    yield all(is_right(0, cupy.asarray) for _ in range(2)) and len(updates) == before + 2
    inputs = INPUTS[3]
    try:  # a qo_indptr that ends elsewhere than q is refused as in a first call
        pa.prefill(cupy.asarray(inputs.q[1:]), inputs.qo_indptr, inputs.kv(cupy.asarray), inputs.table())
        yield False
    except pa.PageTableError as error:
        yield error.field == "qo_indptr"


def bounded(rng: np.random.Generator) -> Iterator[bool]:
    """Calls of ever new shapes leave a bounded number of plans."""
    for window in range(2 * plans.MOST_KEPT):
        inputs = INPUTS[0]
        out = pa.decode(cupy.asarray(inputs.q), inputs.kv(cupy.asarray), inputs.table(), window_left=window).host
        right = pa.decode(inputs.q, inputs.kv(), inputs.table(), window_left=window)
        yield bool(np.allclose(out.astype(np.float32), right.astype(np.float32), rtol=0.01, atol=0.01))
        yield len(plans._kept.plans) <= plans.MOST_KEPT


def faults(rng: np.random.Generator) -> Iterator[bool]:
    """A fault of a call stays in the device's status word, whatever is called after it, until it is raised."""
    inputs = INPUTS[0]
    bad = inputs.indices.copy()
    bad[0] = 999
    arrays = (cupy.asarray(array) for array in (inputs.indptr, bad, inputs.last_page_len))
    pa.decode(cupy.asarray(inputs.q), inputs.kv(cupy.asarray), pa.PageTable(*arrays, page_size=4))
    yield is_right(0, cupy.asarray)
    try:
        pa.status()
        yield False
    except pa.PageTableError as error:
        yield error.field == "indices" and error.value == 999
    pa.status()
    yield is_right(0, cupy.asarray)


def errors(rng: np.random.Generator) -> Iterator[bool]:
    """A call that is refused, or that fails in the backend, harms none after it; an option may be an array."""
    inputs = INPUTS[0]
    run = CountedPlan.run

    def fail(*given: Any) -> None:
        raise MemoryError("the card is full")

    for change in ({"window_left": -7}, {"window_left": 2.0}, {"sm_scale": [1.0]}, {"logits_soft_cap": np.ones(2)}):
        try:
            pa.decode(cupy.asarray(inputs.q), inputs.kv(cupy.asarray), inputs.table(), **change)
            yield False
        except (ValueError, TypeError):
            yield is_right(0, np.asarray)
    CountedPlan.run = fail  # type: ignore[method-assign]
    try:
        is_right(0, np.asarray)
        yield False
    except MemoryError:
        CountedPlan.run = run  # type: ignore[method-assign]
        yield is_right(0, np.asarray)
    scale = np.array(0.25)
    for number in (0.25, 0.5):
        scale[...] = number
        out = pa.decode(cupy.asarray(inputs.q), inputs.kv(cupy.asarray), inputs.table(), sm_scale=scale).host
        right = pa.decode(inputs.q, inputs.kv(), inputs.table(), sm_scale=number)
        yield bool(np.allclose(out.astype(np.float32), right.astype(np.float32), rtol=0.01, atol=0.01))


if __name__ == "__main__":
    rng = np.random.default_rng(0)
    works = (in_turns, layers, bounded, faults, errors)
    print(json.dumps({work.__name__: list(work(rng)) for work in works}))
