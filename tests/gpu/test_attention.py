"""The attention kernels against the reference backend, for every case of the list, poisoned, twice, bitwise."""

from dataclasses import replace

import numpy as np
import pytest

import paged_attn as pa
from tests import cases
from tests.gpu.answers import answer, assert_right, on_gpu

cupy = pytest.importorskip("cupy")

TYPES_OF_THE_GPU = ("float16", "bfloat16")


ALL = [case for case in cases.DECODE + cases.PREFILL if case.dtype in TYPES_OF_THE_GPU]


@pytest.mark.parametrize("case", ALL, ids=str)
def test_kernels_agree_with_the_reference_and_with_themselves(case: cases.Case) -> None:
    inputs = cases.build(case)
    out, lse = answer(inputs)
    assert_right(inputs, out, lse)
    again, lse_again = answer(inputs)
    assert (out.view(np.uint16) == again.view(np.uint16)).all() and (
        lse.view(np.uint32) == lse_again.view(np.uint32)
    ).all()
    pa.status()


@pytest.mark.parametrize("case", [case for case in ALL if "group5" in case.name or "stride3" in case.name], ids=str)
def test_float32_out_and_host_metadata(case: cases.Case) -> None:
    inputs = cases.build(case)
    out = cupy.full(inputs.q.shape, np.nan, np.float32)
    q, kv = on_gpu(inputs.q), inputs.kv(on_gpu)
    if case.is_decode:
        result, lse = pa.decode(q, kv, inputs.table(), out=out, return_lse=True, **inputs.options())
    else:
        result, lse = pa.prefill(q, inputs.qo_indptr, kv, inputs.table(), out=out, return_lse=True, **inputs.options())
    assert result is out
    assert_right(inputs, out, lse)


@pytest.mark.parametrize("dtype", TYPES_OF_THE_GPU)
def test_float32_has_no_kernel_and_says_what_to_do(dtype: str) -> None:
    inputs = cases.build(next(case for case in cases.DECODE if case.dtype == "float32"))
    with pytest.raises(NotImplementedError, match=dtype):
        pa.decode(on_gpu(inputs.q), inputs.kv(on_gpu), inputs.table(on_gpu))


NEEDLES = [
    cases.Case(f"needle_{kind}_{layout}", (700, 33), head_dim=128, layout=layout, **shape)
    for layout in cases.LAYOUTS
    for kind, shape in {
        "decode": {},
        "decode_window": {"window_left": 100},
        "decode_4": {"q_len": 4},
        "prefill": {"q_lens": (90, 33)},
        "prefill_window": {"q_lens": (90, 33), "window_left": 100},
    }.items()
]


@pytest.mark.parametrize("case", NEEDLES, ids=str)
def test_a_needle_in_any_page_is_seen(case: cases.Case) -> None:
    """First and last slot of every page, which are also both sides of every tile and split."""
    for needle in sorted({*range(0, 700, 16), *range(15, 700, 16), 699, *range(597, 602)}):
        inputs = cases.build(case, needle=needle)
        assert_right(inputs, *answer(inputs))


# How decode divides its requests among CTAs: a few evenly, many whole, ragged ones in pieces.
DIVIDED = {"even": (1500,), "whole": (300,) * 70, "pieces": (1500, *(20,) * 140)}
EVERY_TOKEN = [
    cases.Case(f"needle_{division}_{kind}", kv_lens, **shape)
    for division, kv_lens in DIVIDED.items()
    for kind, shape in {
        "plain": {},
        "HND_dim128": {"layout": "HND", "head_dim": 128, "dtype": "bfloat16"},
        "group16": {"num_qo_heads": 32},
        "q_len4_page3": {"q_len": 4, "page_size": 3},
        "window": {"window_left": 100, "page_size": 64},
    }.items()
]


@pytest.mark.parametrize("batch_invariant", (False, True))
@pytest.mark.parametrize("case", EVERY_TOKEN, ids=str)
def test_decode_sees_a_needle_in_any_token(case: cases.Case, batch_invariant: bool) -> None:
    """In turn at every token of the first request, so at both sides of every border of a tile, split or window."""
    kv_len = case.kv_lens[0]
    needle = cases.build(replace(case, kv_lens=(1,)), needle=0)  # this token of request 0, and q, which looks for it
    inputs = cases.build(case, needle=max(case.kv_lens))
    q, kv, table = on_gpu(inputs.q), inputs.kv(on_gpu), inputs.table(on_gpu)
    plan = pa.BatchDecodeWithPagedKVCache(batch_invariant=batch_invariant)
    plan.plan(kv, table, case.num_qo_heads, q_len=case.q_len, window_left=case.window_left)
    out, lse = plan.run(q, kv, return_lse=True)
    bits = out.view(np.uint16)
    outs, lses = (cupy.empty((kv_len, *array.shape[1:]), array.dtype) for array in (bits, lse))
    pools = [
        pages if case.layout == "NHD" else pages.swapaxes(1, 2)
        for pages in (kv.k_pages.view(np.uint16), kv.v_pages.view(np.uint16))
    ]
    tokens = [on_gpu(dense[0][0]).view(np.uint16) for dense in (needle.k, needle.v)]
    for place in range(kv_len):
        page, slot = int(inputs.indices[place // case.page_size]), place % case.page_size
        own = [pool[page, slot].copy() for pool in pools]
        for pool, token in zip(pools, tokens, strict=True):
            pool[page, slot] = token
        plan.run(q, kv, out=out, lse=lse)
        outs[place], lses[place] = bits[0], lse[0]
        for pool, token in zip(pools, own, strict=True):
            pool[page, slot] = token
    plan.status()
    first = replace(case, kv_lens=case.kv_lens[:1])
    rows = (kv_len, case.q_len, case.num_qo_heads)
    found = outs.get().view(inputs.q.dtype).reshape(*rows, -1), lses.get().reshape(rows)
    for place, row in enumerate(zip(*found, strict=True)):
        cases.assert_needle(first, place, *row)
