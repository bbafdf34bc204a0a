"""A random serving loop after warm_up. Prints what was compiled before it and during it.

    python -m tests.serving shim 80     on the SIMT shim's card of this compute capability
    python -m tests.serving gpu         on a GPU

It runs in a process of its own, in which nothing has been compiled yet.
"""

import json
import sys
from typing import Any

import numpy as np

if sys.argv[1] == "shim":
    from tests.simt import card

    card.install(sys.argv[2])

import cupy

import paged_attn as pa

ROUNDS = 8
compiled: list[Any] = []  # the options of each compilation


def count_compilations() -> None:
    make = cupy.RawModule

    def counted(code: str, options: tuple[str, ...]) -> Any:
        compiled.append(options)
        return make(code=code, options=options)

    cupy.RawModule = counted


class Server:
    """A model of two layers, one of them with a window, that serves what comes."""

    def __init__(self, num_qo_heads: int, num_kv_heads: int, head_dim: int, most: int) -> None:
        self.rng = np.random.default_rng(0)
        self.heads, self.most = (num_qo_heads, num_kv_heads, head_dim), most
        self.cache = pa.PagedKVCache(
            512, 16, num_kv_heads, head_dim, layout="NHD", dtype="float16", num_layers=2, device="cuda"
        )
        self.decode, self.prefill = pa.BatchDecodeWithPagedKVCache(), pa.BatchPrefillWithPagedKVCache()
        self.invariant = pa.BatchDecodeWithPagedKVCache(max_batch_size=most, max_pages=512, batch_invariant=True)
        self.seqs: list[int] = []

    def warm_up(self, **more: Any) -> None:
        num_qo_heads, num_kv_heads, head_dim = self.heads
        for op in ("decode", "prefill", "merge"):  # append comes with them
            pa.warm_up(
                op,
                num_qo_heads=num_qo_heads,
                num_kv_heads=num_kv_heads,
                head_dim=head_dim,
                dtype="float16",
                page_size=16,
                device="cuda",
                **more,
            )

    def normal(self, rows: int, heads: int) -> Any:
        return cupy.asarray(self.rng.standard_normal((rows, heads, self.heads[2])).astype(np.float16))

    def out(self, rows: int) -> Any:
        dtype = np.float32 if self.rng.random() < 0.5 else np.float16
        return cupy.empty((rows, self.heads[0], self.heads[2]), dtype)

    def step(self) -> None:
        """Sequences leave, join, fork and grow; the new tokens are attended to in one of many ways."""
        for seq in [seq for seq in self.seqs if self.rng.random() < 0.4]:
            self.seqs.remove(seq)
            self.cache.free(seq)
        self.seqs += [self.cache.new_sequence() for _ in range(int(self.rng.integers(1, self.most - len(self.seqs))))]
        if len(self.seqs) < self.most - 1 and self.rng.random() < 0.5 and self.cache.seq_len(self.seqs[0]):
            self.seqs.append(self.cache.fork(self.seqs[0]))
        counts = self.rng.integers(1, 20, len(self.seqs))
        slots = self.cache.reserve(self.seqs, counts)
        for layer in range(2):
            k, v = (self.normal(int(counts.sum()), self.heads[1]) for _ in range(2))
            self.cache.write(slots, k, v, layer=layer)
        self.attend(self.cache.page_table(self.seqs), np.append(0, np.cumsum(counts)).astype(np.int32))

    def attend(self, table: Any, qo_indptr: np.ndarray) -> None:
        layer, batch, rows = self.cache.layers[int(self.rng.integers(2))], len(self.seqs), int(qo_indptr[-1])
        q, out = self.normal(batch, self.heads[0]), self.out(batch)
        for plan in (self.decode, self.invariant):
            plan.plan(layer, table, self.heads[0], window_left=int(self.rng.choice([-1, 20])))
            plan.run(q, layer, out=out)
        pa.decode(q, layer, table, out=out)
        self.prefill.plan(layer, table, qo_indptr, self.heads[0])
        self.prefill.run(self.normal(rows, self.heads[0]), layer, out=self.out(rows), return_lse=True)
        chunks = table.split(2)
        partial = cupy.empty((2 * batch, *q.shape[1:]), self.out(1).dtype)
        both = cupy.empty(partial.shape, np.float16)
        both[:batch], both[batch:] = q, q
        lse = cupy.empty(partial.shape[:2], np.float32)
        pa.decode(both, layer, chunks, out=partial, lse=lse)
        v, s = partial.reshape(2, *q.shape).swapaxes(0, 1), lse.reshape(2, *q.shape[:2]).swapaxes(0, 1)
        pa.merge_states(v, s, out=out)
        pa.merge_state(v[:, 0], s[:, 0], v[:, 1], s[:, 1], out=out)
        table.validate(512).raise_if_bad()
        block_table = table.to_block_table(64)
        pa.PageTable.from_block_table(block_table, table.seq_lens, page_size=16)
        table.slots(cupy.asarray(np.zeros(2, np.int32)), cupy.asarray(np.zeros(2, np.int32)))
        pa.status("cuda")


if __name__ == "__main__":
    count_compilations()
    # With 64 KV heads decode's constants change between batches of one, of three and of ten. Hopper's prefill has
    # kernels from head_dim 64 on, and takes long on the shim.
    heads, head_dim = {"80": (64, 16), "90": (4, 64)}[sys.argv[2]] if sys.argv[1] == "shim" else (64, 64)
    server = Server(num_qo_heads=heads, num_kv_heads=heads, head_dim=head_dim, most=10)
    server.warm_up()
    ahead = len(compiled)
    for _ in range(ROUNDS):
        server.step()
    print(json.dumps({"ahead": ahead, "while_serving": compiled[ahead:]}))
