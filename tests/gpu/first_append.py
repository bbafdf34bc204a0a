"""A process whose first append is captured into a graph, in the strictest mode: prints what becomes of faults."""

import json

import cupy
import numpy as np

import paged_attn as pa


def main() -> None:
    print("began", flush=True)
    pool = pa.PagedKV(*(cupy.zeros((2, 4, 1, 16), np.float16) for _ in range(2)), layout="NHD")
    tokens, slots, bad = cupy.ones((1, 1, 16), np.float16), cupy.array([3]), cupy.array([1000])
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    with stream:
        stream.begin_capture(mode=cupy.cuda.runtime.streamCaptureModeGlobal)
        pa.append(pool, slots, tokens, tokens)
        graph = stream.end_capture()
        pa.append(pool, bad, tokens, tokens)
        graph.launch()
    try:
        pa.status()
        raised = False
    except pa.PageTableError:
        raised = True
    pa.status()
    graph.launch(stream)
    pa.status()
    written = bool((pool.k_pages[0, 3] == 1).all())
    print(json.dumps({"fault_after_replay": raised, "clear_after": True, "written": written}))


if __name__ == "__main__":
    main()
