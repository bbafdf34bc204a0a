"""Devices, streams and threads as the host code sees them, on the SIMT shim's two cards. Prints what was found."""

import gc
import json
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from . import card

card.install()

import cupy  # noqa: E402

import paged_attn as pa  # noqa: E402
from paged_attn.backends.cuda import pool, status, uploads  # noqa: E402
from tests import cases  # noqa: E402

THREADS = 24


def on_card_1(array: np.ndarray) -> Any:
    with cupy.cuda.Device(1):
        return cupy.asarray(array)


def operations() -> dict[str, Callable[[], Any]]:
    """Calls with data on cuda:1, by name; the first of each kind compiles, makes buffers, and so on."""
    inputs = cases.build(
        cases.Case("contexts", (9, 3), num_qo_heads=4, num_kv_heads=2, head_dim=16, page_size=4, q_lens=(1, 1))
    )
    kv, q = inputs.kv(on_card_1), on_card_1(inputs.q)
    tables = {"host": inputs.table(), "device": inputs.table(on_card_1)}
    cache = pa.PagedKVCache(64, 4, 2, 16, layout="NHD", dtype="float16", device="cuda:1")
    seqs = [cache.new_sequence(), cache.new_sequence()]
    k = on_card_1(np.ones((4, 2, 16), np.float16))
    decode = pa.BatchDecodeWithPagedKVCache()
    prefill = pa.BatchPrefillWithPagedKVCache()
    states, logs = on_card_1(np.ones((2, 3, 4, 16), np.float16)), on_card_1(np.zeros((2, 3, 4), np.float32))

    def forked() -> None:
        cache.fork(seqs[0])
        cache.append(seqs[:1], 1, k[:1], k[:1])

    calls = {
        "append": lambda: cache.append(seqs, 2, k, k),
        "copy on write": forked,
        "page_table": lambda: cache.page_table(seqs),
        "merge_states": lambda: pa.merge_states(states, logs),
        "merge_state": lambda: pa.merge_state(states[:, 0], logs[:, 0], states[:, 1], logs[:, 1]),
        "status": lambda: pa.status("cuda:1"),
    }
    for name, table in tables.items():
        calls |= {
            f"decode, {name} table": lambda table=table: pa.decode(q, kv, table),
            f"prefill, {name} table": lambda table=table: pa.prefill(q, inputs.qo_indptr, kv, table),
            f"plan decode, {name} table": lambda table=table: decode.plan(kv, table, 4),
            f"plan prefill, {name} table": lambda table=table: prefill.plan(kv, table, inputs.qo_indptr, 4),
        }
    device = tables["device"]
    calls |= {
        "run decode": lambda: decode.run(q, kv),
        "run prefill": lambda: prefill.run(q, kv),
        "status of a plan": decode.status,
        "seq_lens": lambda: device.seq_lens,
        "split": lambda: device.split(2),
        "validate": lambda: device.validate(64).raise_if_bad(),
        "slots": lambda: device.slots(np.zeros(2, np.int32), np.zeros(2, np.int32)),
        "to_block_table": lambda: pa.PageTable.from_block_table(
            device.to_block_table(4), on_card_1(np.array([9, 3], np.int32)), page_size=4
        ),
    }
    return calls


def devices_and_streams() -> dict[str, list[str]]:
    """Which calls left another device current, launched elsewhere, or made a result elsewhere."""
    wrong: dict[str, list[str]] = {"current device": [], "launches": [], "results": []}
    for name, call in operations().items():
        for _ in range(3):  # with all prepared, launches go another way; and the stream is another each time
            stream = card.Stream()
            card.current.streams[1] = stream
            del card.launched[:]
            result = call()
            if cupy.cuda.runtime.getDevice() != 0:
                wrong["current device"].append(name)
                cupy.cuda.runtime.setDevice(0)
            if any((device, at) != (1, stream.ptr) for _, device, at in card.launched):
                wrong["launches"].append(name)
            arrays = [x for x in (result if isinstance(result, tuple) else (result,)) if isinstance(x, cupy.ndarray)]
            if any(array.device.id != 1 for array in arrays):
                wrong["results"].append(name)
    return wrong


def living(kind: type) -> int:
    gc.collect()
    return sum(isinstance(thing, kind) for thing in gc.get_objects())


def threads_leave_nothing() -> dict[str, Any]:
    """What finished threads leave behind, and how much pinned memory their successors need."""
    pinned = []
    alloc = cupy.cuda.alloc_pinned_memory

    def counted(size: int) -> Any:
        pinned.append(size)
        return alloc(size)

    cupy.cuda.alloc_pinned_memory = counted
    kv = pa.PagedKV(*(cupy.asarray(np.zeros((4, 4, 2, 16), np.float16)) for _ in range(2)), layout="NHD")
    tokens = cupy.asarray(np.ones((3, 2, 16), np.float16))
    work, together = threading.Lock(), threading.Barrier(THREADS)  # the shim runs one kernel at a time

    def append() -> None:
        with work:
            pa.append(kv, np.arange(3), tokens, tokens)
        together.wait()  # so that each has pinned memory of its own

    def generation() -> int:
        together.reset()
        before = len(pinned)
        threads = [threading.Thread(target=append) for _ in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return len(pinned) - before

    kinds = (uploads.Staging, pool.AppendLaunch)
    before = [living(kind) for kind in kinds]
    blocks = [generation(), generation()]
    return {
        "left": [living(kind) - number for kind, number in zip(kinds, before, strict=True)],
        "idle": len(uploads._idle_blocks["cuda:0"]),
        "blocks": blocks,
    }


def words_of_a_device() -> int:
    """How many status words a device has whose first users are several threads at a time."""
    make, words, ready = status.zeros, [], threading.Barrier(4)

    def slowly(*arguments: Any) -> Any:
        time.sleep(0.1)
        return make(*arguments)

    def ask() -> None:
        ready.wait()
        words.append(status.device_word("cuda:0"))

    status._device_words.clear()
    status.zeros = slowly
    try:
        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        status.zeros = make
    return len({id(word) for word in words})


if __name__ == "__main__":
    print(
        json.dumps(
            {
                "contexts": devices_and_streams(),
                "words": words_of_a_device(),
                "threads": threads_leave_nothing(),
            }
        )
    )
