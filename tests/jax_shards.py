"""What the doors say of JAX arrays on two devices (of the CPU), in a process of its own; prints them as JSON."""

import json
import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

import paged_attn as pa


def spread(*shape: int, dtype: str = "float16", replicated: bool = False) -> jax.Array:
    mesh = jax.make_mesh((2,), ("x",))
    return jax.device_put(jnp.ones(shape, dtype), NamedSharding(mesh, PartitionSpec(*([] if replicated else ["x"]))))


def main() -> None:
    pages = np.zeros((6, 4, 2, 16), np.float16)
    kv, q = pa.PagedKV(pages, pages.copy(), layout="NHD"), np.zeros((2, 4, 16), np.float16)
    arrays = [np.array(values, np.int32) for values in ([0, 1, 2], [0, 1], [4, 4])]
    table = pa.PageTable(*arrays, page_size=4)
    plan = pa.BatchDecodeWithPagedKVCache()
    plan.plan(kv, table, 4)
    cache = pa.PagedKVCache(6, 4, 2, 16, layout="NHD", dtype="float16", device="cpu")
    seqs = [cache.new_sequence() for _ in range(2)]
    tokens = np.zeros((2, 2, 16), np.float16)
    calls = {
        "k_pages": lambda: pa.PagedKV(spread(6, 4, 2, 16), pages, layout="NHD"),
        "indices": lambda: pa.PageTable(arrays[0], spread(2, dtype="int32"), arrays[2], page_size=4),
        "q": lambda: pa.decode(spread(2, 4, 16), kv, table),
        "q replicated": lambda: plan.run(spread(2, 4, 16, replicated=True), kv),
        "qo_indptr": lambda: pa.prefill(q, spread(4, dtype="int32"), kv, table),
        "k": lambda: pa.append(kv, np.arange(2), spread(2, 2, 16), tokens),
        "slots": lambda: pa.append(kv, spread(2, dtype="int32"), tokens, tokens),
        "v": lambda: pa.merge_states(spread(2, 2, 4, 16), np.zeros((2, 2, 4), np.float32)),
        "seqs": lambda: cache.page_table(spread(2, dtype="int32") * 0),
        "counts": lambda: cache.reserve(seqs, spread(2, dtype="int32")),
        "cache k": lambda: cache.append(seqs, [1, 1], spread(2, 2, 16), tokens),
    }
    said = {}
    for name, call in calls.items():
        try:
            call()
        except TypeError as error:
            said[name] = str(error)
        except Exception as error:
            said[name] = f"raw {error!r}"
    shard = spread(2, 4, 16).addressable_shards[1].data
    one = jax.device_put(spread(2, 4, 16), jax.devices()[0])
    said["shard"] = str(
        pa.decode(shard, kv, pa.PageTable(arrays[0][:2], *arrays[1:2], arrays[2][:1], page_size=4)).shape
    )
    said["one device"] = str(pa.decode(one, kv, table).shape)
    print(json.dumps(said))


if __name__ == "__main__":
    main()
