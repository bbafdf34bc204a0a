"""Layouts, plans and libraries that do not go together: an error at once, and nothing is launched.

The numbers are those of flashinfer#600, where a cache stored in one layout and read as the other made decode loop for
2^32 iterations: 8 KV heads and 64 query heads of 128, pages of 32 tokens, two requests of 512.
"""

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import paged_attn as pa
from paged_attn import compile as kernels
from tests import cases
from tests.gpu.answers import assert_right
from tests.gpu.capture import captured

cupy = pytest.importorskip("cupy")

CASE = cases.Case("mismatch", (512, 512), num_qo_heads=64, num_kv_heads=8, head_dim=128, page_size=32)
OTHER = {"NHD": "HND", "HND": "NHD"}
ROUNDS = 50
SECONDS = 1.0


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels that were launched, every one of them by Launch."""
    names: list[str] = []
    launch = kernels.Launch.__call__

    def counted(self: kernels.Launch, *arguments: Any) -> None:
        names.append(self.kernel.name)
        launch(self, *arguments)

    monkeypatch.setattr(kernels.Launch, "__call__", counted)
    return names


@contextmanager
def within_a_second() -> Iterator[None]:
    start = time.perf_counter()
    yield
    cupy.cuda.Device().synchronize()
    elapsed = time.perf_counter() - start
    assert elapsed < SECONDS, f"it took {elapsed:.2f} s"


class Server:
    """A right pool of the case, the same memory under the other tag, and all that is called with either."""

    def __init__(self, layout: str, case: cases.Case = CASE) -> None:
        self.inputs = cases.build(replace(case, layout=layout))
        self.prefill_inputs = cases.build(replace(case, name=f"{case.name}_prefill", layout=layout, q_lens=(3, 5)))
        self.heads = case.num_qo_heads
        self.kv = self.inputs.kv(cupy.asarray)
        self.wrong_kv = pa.PagedKV(self.kv.k_pages, self.kv.v_pages, layout=OTHER[layout])
        self.table, self.host_table = self.inputs.table(cupy.asarray), self.inputs.table()
        self.q, self.prefill_q = cupy.asarray(self.inputs.q), cupy.asarray(self.prefill_inputs.q)
        self.qo_indptr = cupy.asarray(self.prefill_inputs.qo_indptr)
        self.out, self.lse = cupy.empty_like(self.q), cupy.empty(self.q.shape[:-1], np.float32)
        self.prefill_out = cupy.empty_like(self.prefill_q)
        self.slots = cupy.asarray(np.arange(2, dtype=np.int64))
        self.new_k, self.new_v = (cupy.zeros((2, case.num_kv_heads, case.head_dim), np.float16) for _ in "kv")
        sizes = {"max_batch_size": 2, "max_pages": self.inputs.indices.size}
        self.decode = pa.BatchDecodeWithPagedKVCache(**sizes)
        self.prefill = pa.BatchPrefillWithPagedKVCache(**sizes, max_tokens=8)

    def plan(self) -> None:
        self.decode.plan(self.kv, self.table, self.heads)
        self.prefill.plan(self.kv, self.table, self.qo_indptr, self.heads)

    def assert_served(self) -> None:
        """The device is well, and the right tag gives the right answer."""
        out, lse = pa.decode(self.q, self.kv, self.table, return_lse=True)
        assert_right(self.inputs, out, lse)
        pa.status()


CALLS: dict[str, Callable[[Server], Any]] = {
    "decode": lambda s: pa.decode(s.q, s.wrong_kv, s.table, out=s.out),
    "decode_host_table": lambda s: pa.decode(s.q, s.wrong_kv, s.host_table, out=s.out),
    "prefill": lambda s: pa.prefill(s.prefill_q, s.qo_indptr, s.wrong_kv, s.table, out=s.prefill_out),
    "plan_decode": lambda s: s.decode.plan(s.wrong_kv, s.table, s.heads),
    "plan_prefill": lambda s: s.prefill.plan(s.wrong_kv, s.table, s.qo_indptr, s.heads),
    "run_decode": lambda s: s.decode.run(s.q, s.wrong_kv, out=s.out, lse=s.lse),
    "run_prefill": lambda s: s.prefill.run(s.prefill_q, s.wrong_kv, out=s.prefill_out),
    "append": lambda s: pa.append(s.wrong_kv, s.slots, s.new_k, s.new_v),
}


@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("call", CALLS)
def test_the_wrong_layout_plainly_in_a_timing_loop_and_in_a_graph(call: str, layout: str, launches: list[str]) -> None:
    server = Server(layout)
    server.plan()
    server.out.fill(7)
    cupy.cuda.Device().synchronize()
    launches.clear()

    def refused() -> None:
        with pytest.raises(pa.LayoutMismatchError, match=layout):
            CALLS[call](server)

    with within_a_second():
        refused()

    begin, end = cupy.cuda.Event(), cupy.cuda.Event()
    with within_a_second():
        begin.record()
        for _ in range(ROUNDS):
            refused()
        end.record()
        end.synchronize()
    assert cupy.cuda.get_elapsed_time(begin, end) < 1000 * SECONDS

    with within_a_second():
        graph = captured(refused)
        graph.launch()
    assert not launches
    assert (server.out.get() == 7).all()
    server.assert_served()


@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_the_message_names_the_layout_that_fits(layout: str) -> None:
    server = Server(layout)
    with pytest.raises(pa.LayoutMismatchError) as caught:
        pa.decode(server.q, server.wrong_kv, server.table)
    for part in (f"tagged {OTHER[layout]}", "page_size=8", "num_kv_heads=32", "page_size=32", f"layout='{layout}'"):
        assert part in str(caught.value)


@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_a_plan_refuses_pages_of_the_other_layout_under_its_own_tag(layout: str, launches: list[str]) -> None:
    """The tag is the plan's, the memory is not: the shape says so."""
    server = Server(layout)
    server.plan()
    other = server.kv.to_layout(OTHER[layout])
    mistagged = pa.PagedKV(other.k_pages, other.v_pages, layout=layout)
    launches.clear()
    for run in (
        lambda: server.decode.run(server.q, mistagged, out=server.out),
        lambda: server.prefill.run(server.prefill_q, mistagged, out=server.prefill_out),
    ):
        with within_a_second(), pytest.raises(pa.LayoutMismatchError, match=f"tag the pool layout='{OTHER[layout]}'"):
            run()
    assert not launches
    server.assert_served()


@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_equal_shapes_differ_by_their_tag(layout: str, launches: list[str]) -> None:
    """page_size == num_kv_heads: only the tag can tell, and it does."""
    square = cases.Case("mismatch_square", (40, 7), num_qo_heads=16, num_kv_heads=8, head_dim=64, page_size=8)
    server = Server(layout, square)
    server.plan()
    assert server.wrong_kv.k_pages.shape == server.kv.k_pages.shape
    launches.clear()
    for run in (
        lambda: server.decode.run(server.q, server.wrong_kv, out=server.out),
        lambda: server.prefill.run(server.prefill_q, server.wrong_kv, out=server.prefill_out),
    ):
        with within_a_second(), pytest.raises(pa.LayoutMismatchError) as caught:
            run()
        assert f"kv has layout {OTHER[layout]} and the plan was made for {layout}" in str(caught.value)
    assert not launches
    out, lse = server.decode.run(server.q, server.kv, return_lse=True)
    assert_right(server.inputs, out, lse)


def test_a_plan_serves_its_own_tag_only_however_the_pool_was_made(launches: list[str]) -> None:
    shape = {"num_pages": 8, "page_size": 8, "num_kv_heads": 8, "head_dim": 64, "dtype": "float16", "device": "cuda"}
    caches = {layout: pa.PagedKVCache(**shape, layout=layout) for layout in cases.LAYOUTS}
    seq = caches["NHD"].new_sequence()
    zeros = cupy.zeros((5, 8, 64), np.float16)
    caches["NHD"].append([seq], 5, zeros, zeros)
    plan = pa.BatchDecodeWithPagedKVCache()
    plan.plan(caches["NHD"].layers[0], caches["NHD"].page_table([seq]), 8)
    q = cupy.zeros((1, 8, 64), np.float16)
    assert (plan.run(q, caches["NHD"].layers[0]).get() == 0).all()
    launches.clear()
    with pytest.raises(pa.LayoutMismatchError, match=re.escape("pass kv.to_layout('NHD')")):
        plan.run(q, caches["HND"].layers[0])
    assert not launches
    assert (plan.run(q, caches["HND"].layers[0].to_layout("NHD")).get() == 0).all()


# -- libraries and devices ---------------------------------------------------------------------------------------------


class Both:
    """The same arguments on both devices."""

    def __init__(self) -> None:
        inputs = self.inputs = cases.build(cases.Case("both", (20, 5), head_dim=64))
        self.h = {
            "q": inputs.q,
            "k_pages": inputs.k_pages,
            "v_pages": inputs.v_pages,
            "k": inputs.k[0],
            "v": inputs.v[0],
            "slots": np.arange(20, dtype=np.int64),
            "indptr": inputs.indptr,
            "indices": inputs.indices,
            "last_page_len": inputs.last_page_len,
            "qo_indptr": np.arange(3, dtype=np.int32),
            "block_table": np.zeros((2, 2), np.int32),
            "seq_lens": np.array([20, 5], np.int32),
            "out": np.empty_like(inputs.q),
            "lse": np.empty(inputs.q.shape[:-1], np.float32),
            "states": np.zeros((2, 3, 8, 64), np.float16),
            "logs": np.zeros((2, 3, 8), np.float32),
        }
        self.d = {name: cupy.asarray(array) for name, array in self.h.items()}
        self.h_kv = pa.PagedKV(self.h["k_pages"], self.h["v_pages"], layout="NHD")
        self.d_kv = pa.PagedKV(self.d["k_pages"], self.d["v_pages"], layout="NHD")
        self.h_table, self.d_table = inputs.table(), inputs.table(cupy.asarray)


def run_with(out: str, lse: str) -> Callable[[Both], Any]:
    """A planned run on the GPU whose out and lse are of the world that is named (h: host, d: device)."""

    def call(w: Both) -> Any:
        plan = pa.BatchDecodeWithPagedKVCache()
        plan.plan(w.d_kv, w.d_table, 8)
        return plan.run(w.d["q"], w.d_kv, out=getattr(w, out)["out"], lse=getattr(w, lse)["lse"])

    return call


GPU = "cuda:0"
# name -> (call, the two that are not together, each with where it lives)
MIXED: dict[str, tuple[Callable[[Both], Any], tuple[str, ...]]] = {
    "decode, NumPy q": (lambda w: pa.decode(w.h["q"], w.d_kv, w.d_table), ("q lives on cpu", f"kv on {GPU}")),
    "decode, NumPy pool": (lambda w: pa.decode(w.d["q"], w.h_kv, w.h_table), (f"q lives on {GPU}", "kv on cpu")),
    "decode, table of the GPU": (
        lambda w: pa.decode(w.h["q"], w.h_kv, w.d_table),
        (f"table lives on {GPU}", "kv on cpu"),
    ),
    "prefill, NumPy q": (
        lambda w: pa.prefill(w.h["q"], w.h["qo_indptr"], w.d_kv, w.d_table),
        ("q lives on cpu", f"kv on {GPU}"),
    ),
    "prefill, NumPy pool": (
        lambda w: pa.prefill(w.d["q"], w.h["qo_indptr"], w.h_kv, w.h_table),
        (f"q lives on {GPU}", "kv on cpu"),
    ),
    "prefill, qo_indptr of the GPU": (
        lambda w: pa.prefill(w.h["q"], w.d["qo_indptr"], w.h_kv, w.h_table),
        (f"qo_indptr lives on {GPU}", "kv on cpu"),
    ),
    "pool": (
        lambda w: pa.PagedKV(w.h["k_pages"], w.d["v_pages"], layout="NHD"),
        (f"v_pages lives on {GPU}", "k_pages on cpu"),
    ),
    "table": (
        lambda w: pa.PageTable(w.h["indptr"], w.d["indices"], w.h["last_page_len"], page_size=16),
        (f"indices lives on {GPU}", "indptr on cpu"),
    ),
    "block table": (
        lambda w: pa.PageTable.from_block_table(w.d["block_table"], w.h["seq_lens"], page_size=16),
        ("seq_lens lives on cpu", f"block_table on {GPU}"),
    ),
    "slots of the GPU": (
        lambda w: w.h_table.slots(w.d["seq_lens"], w.h["seq_lens"]),
        (f"batch_indices lives on {GPU}", "the table on cpu"),
    ),
    "append, NumPy k": (
        lambda w: pa.append(w.d_kv, w.d["slots"], w.h["k"], w.d["v"]),
        ("k lives on cpu", f"kv on {GPU}"),
    ),
    "append, NumPy v": (
        lambda w: pa.append(w.d_kv, w.d["slots"], w.d["k"], w.h["v"]),
        ("v lives on cpu", f"kv on {GPU}"),
    ),
    "append, NumPy pool": (
        lambda w: pa.append(w.h_kv, w.h["slots"], w.d["k"], w.d["v"]),
        (f"k lives on {GPU}", "kv on cpu"),
    ),
    "append, slots of the GPU": (
        lambda w: pa.append(w.h_kv, w.d["slots"], w.h["k"], w.h["v"]),
        (f"slots lives on {GPU}", "kv on cpu"),
    ),
    "single_decode, NumPy q": (
        lambda w: pa.single_decode(w.h["q"][0], w.d["k"], w.d["v"], layout="NHD"),
        ("q lives on cpu", f"kv on {GPU}"),
    ),
    "single_decode, NumPy k": (
        lambda w: pa.single_decode(w.d["q"][0], w.h["k"], w.d["v"], layout="NHD"),
        (f"lives on {GPU}", "on cpu"),
    ),
    "single_prefill, NumPy k and v": (
        lambda w: pa.single_prefill(w.d["q"], w.h["k"], w.h["v"], layout="NHD"),
        (f"q lives on {GPU}", "kv on cpu"),
    ),
    "decode, NumPy out": (
        lambda w: pa.decode(w.d["q"], w.d_kv, w.d_table, out=w.h["out"]),
        ("out lives on cpu", f"q on {GPU}"),
    ),
    "decode, NumPy lse": (
        lambda w: pa.decode(w.d["q"], w.d_kv, w.d_table, lse=w.h["lse"]),
        ("lse lives on cpu", f"q on {GPU}"),
    ),
    "decode, out of the GPU": (
        lambda w: pa.decode(w.h["q"], w.h_kv, w.h_table, out=w.d["out"]),
        (f"out lives on {GPU}", "q on cpu"),
    ),
    "run, NumPy out": (run_with("h", "d"), ("out lives on cpu", f"q on {GPU}")),
    "run, NumPy lse": (run_with("d", "h"), ("lse lives on cpu", f"q on {GPU}")),
    "merge_state": (
        lambda w: pa.merge_state(w.d["states"][0], w.d["logs"][0], w.h["states"][1], w.d["logs"][1]),
        ("v_b lives on cpu", f"v_a on {GPU}"),
    ),
    "merge_states": (lambda w: pa.merge_states(w.d["states"], w.h["logs"]), ("s lives on cpu", f"v on {GPU}")),
    "merge_states, NumPy out": (
        lambda w: pa.merge_states(w.d["states"], w.d["logs"], out=np.empty((2, 8, 64), np.float16)),
        ("out lives on cpu", f"on {GPU}"),
    ),
}


@pytest.mark.parametrize("name", MIXED)
def test_numpy_and_cupy_mixed(name: str, launches: list[str]) -> None:
    world = Both()
    call, said = MIXED[name]
    before = {key: array.tobytes() for key, array in (*world.h.items(), *world.d.items())}
    planned = name.startswith("run")  # whose plan is right, and launches its own kernels
    with pytest.raises(TypeError) as caught:
        call(world)
    for part in said:
        assert part in str(caught.value)
    assert bool(launches) == planned and all(kernel.startswith("plan_") for kernel in launches)
    assert before == {key: array.tobytes() for key, array in (*world.h.items(), *world.d.items())}


def test_a_plan_refuses_a_pool_of_the_other_device() -> None:
    world = Both()
    plan = pa.BatchDecodeWithPagedKVCache()
    plan.plan(world.d_kv, world.d_table, 8)
    with pytest.raises(TypeError, match=f"kv lives on cpu and the plan was made for {GPU}"):
        plan.run(world.h["q"], world.h_kv)
    plan.plan(world.h_kv, world.h_table, 8)
    with pytest.raises(TypeError, match=f"kv lives on {GPU} and the plan was made for cpu"):
        plan.run(world.d["q"], world.d_kv)
