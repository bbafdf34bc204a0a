"""What writes to a pool: append, and the copies that a cache makes of shared pages."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import cupy
import numpy as np

from ...compile import Launch, Recipe, fast_divide, prepare
from ...lifetimes import PerThread
from ...recipes import COPY_PAGES, append_recipe, row_blocks
from .launch import launch, launch_prepared
from .status import device_word
from .uploads import to_backend

if TYPE_CHECKING:
    from ...holders import KVPages

MOST_APPEND_BLOCKS = 4096
_INT32 = np.dtype(np.int32)


def copy_pages(storage: Any, source: np.ndarray[Any, Any], target: np.ndarray[Any, Any]) -> None:
    device = f"cuda:{storage.device.id}"
    num_layers, num_pages = storage.shape[:2]
    pairs = to_backend(np.stack([source, target]).astype(np.int32, copy=False), device)
    page_units = storage.strides[1] // 16
    launch(COPY_PAGES, device, (row_blocks(source.size, source.size * page_units), num_layers), {
        "storage": storage, "source": pairs[0], "target": pairs[1], "status": device_word(device),
        "layer_units": storage.strides[0] // 16, "page_units": page_units, "num_pages": num_pages,
        "num_pairs": source.size,
    })  # fmt: skip


def append(kv: KVPages, slots: Any, k: Any, v: Any, signature: tuple[Any, ...]) -> None:
    """Write new tokens. signature: equal to that of the append before where nothing but addresses differs from it."""
    last = _appends.items.get(kv.device)
    if last is None:
        last = _appends.items[kv.device] = AppendLaunch(kv.device)
    last.run(kv, slots, k, v, signature)


class AppendLaunch:
    """The append of one thread on one device: all but addresses stays written while the signature is the same."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._signature: Any = None
        self._launch: Launch
        self._write: Callable[..., None]  # addresses
        self._launches: dict[Recipe, tuple[Launch, Callable[..., None], Callable[..., None]]] = {}
        self._grid = 0

    def run(self, kv: KVPages, slots: Any, k: Any, v: Any, signature: tuple[Any, ...]) -> None:
        if signature != self._signature:
            self._bind(kv, slots, k.strides, v.strides)
            self._signature = signature
        self._write(k.data.ptr, v.data.ptr, kv.k_address, kv.v_address, slots.data.ptr)
        launch_prepared(self._launch, cupy.cuda.get_current_stream(self._launch.kernel.device_index).ptr, self._grid)

    def _bind(self, kv: KVPages, slots: Any, k_strides: tuple[int, ...], v_strides: tuple[int, ...]) -> None:
        """Write what the signature of an append decides."""
        self._signature = None
        recipe = append_recipe(kv.num_kv_heads, kv.head_dim, kv.v_head_dim)
        if recipe not in self._launches:
            launch = prepare(recipe, self._device, {"status": device_word(self._device)})
            self._launches[recipe] = launch, launch.writer("k", "slots"), launch.writer("k_pool_strides")
        self._launch, self._write, write_rest = self._launches[recipe]
        self._grid = min(-(-slots.size // recipe.tokens_per_block), MOST_APPEND_BLOCKS)
        write_rest(
            *(stride // 16 for stride in (*kv.k_strides, *kv.v_strides)),
            *fast_divide(kv.page_size),
            *(stride // 16 for stride in (*k_strides[:2], *v_strides[:2])),
            slots.size,
            kv.num_kv_heads,
            kv.num_pages,
            slots.dtype == _INT32,
        )


_appends = PerThread()  # by device
