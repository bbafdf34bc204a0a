"""JAX arrays on the GPU, eagerly: they come and go by DLPack, and nothing is copied on the way in."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import paged_attn as pa
from tests import cases
from tests.gpu.answers import assert_right, expected

cupy = pytest.importorskip("cupy")
jax = pytest.importorskip("jax")

DTYPES = ("float16", "bfloat16")


@pytest.fixture(scope="module")
def to_jax(gpu: Any) -> Callable[[np.ndarray], Any]:
    return lambda array: jax.device_put(array, gpu)


def build(dtype: str, layout: str, **changed: Any) -> cases.Inputs:
    return cases.build(cases.Case(f"jax_{dtype}_{layout}", (130, 0, 1, 33), dtype=dtype, layout=layout, **changed))


def bits(array: Any) -> bytes:
    return np.asarray(array).tobytes() if isinstance(array, jax.Array) else array.tobytes()


def assert_jax(result: Any, like: Any, gpu: Any, shape: tuple[int, ...], dtype: Any) -> None:
    assert isinstance(result, jax.Array)
    assert result.devices() == {gpu} == like.devices()
    assert result.shape == shape and result.dtype == dtype


@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_decode_is_that_of_cupy(dtype: str, layout: str, gpu: Any, to_jax: Callable) -> None:
    inputs = build(dtype, layout)
    q = to_jax(inputs.q)
    out, lse = pa.decode(q, inputs.kv(to_jax), inputs.table(to_jax), return_lse=True)
    assert_jax(out, q, gpu, q.shape, q.dtype)
    assert_jax(lse, q, gpu, q.shape[:-1], np.float32)
    right, right_lse = pa.decode(
        cupy.asarray(inputs.q), inputs.kv(cupy.asarray), inputs.table(cupy.asarray), return_lse=True
    )
    assert bits(out) == bits(right) and bits(lse) == bits(right_lse)
    assert_right(inputs, right, right_lse)
    assert bits(q) == inputs.q.tobytes()
    pa.status()


@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_prefill_is_that_of_cupy(dtype: str, layout: str, gpu: Any, to_jax: Callable) -> None:
    inputs = build(dtype, layout, q_lens=(40, 2, 1, 33))
    q = to_jax(inputs.q)
    out, lse = pa.prefill(q, to_jax(inputs.qo_indptr), inputs.kv(to_jax), inputs.table(to_jax), return_lse=True)
    assert_jax(out, q, gpu, q.shape, q.dtype)
    assert_jax(lse, q, gpu, q.shape[:-1], np.float32)
    right, right_lse = pa.prefill(
        cupy.asarray(inputs.q), inputs.qo_indptr, inputs.kv(cupy.asarray), inputs.table(cupy.asarray), return_lse=True
    )
    assert bits(out) == bits(right) and bits(lse) == bits(right_lse)
    assert_right(inputs, right, right_lse)
    pa.status()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_cupy_pool_serves_a_jax_q(dtype: str, gpu: Any, to_jax: Callable) -> None:
    """The way to serve from JAX: the pool is CuPy's, written in place; q, K and V come from JAX, and out goes back."""
    inputs = build(dtype, "HND")
    cache = pa.PagedKVCache(32, 16, 2, 64, layout="HND", dtype=dtype, device="cuda")
    seqs = [cache.new_sequence() for _ in inputs.k]
    k, v = (to_jax(np.concatenate(tokens)) for tokens in (inputs.k, inputs.v))
    cache.append(seqs, [len(tokens) for tokens in inputs.k], k, v)
    q = to_jax(inputs.q)
    plan = pa.BatchDecodeWithPagedKVCache()
    plan.plan(cache.layers[0], cache.page_table(seqs), inputs.case.num_qo_heads)
    out, lse = plan.run(q, cache.layers[0], return_lse=True)
    assert_jax(out, q, gpu, q.shape, q.dtype)
    right, right_lse = expected(inputs)
    cases.assert_close(out, right, lse, right_lse, tolerance=cases.OUT_TOLERANCE[dtype])


def test_single_requests_and_merging(gpu: Any, to_jax: Callable) -> None:
    inputs = build("bfloat16", "NHD")
    q, k, v = inputs.q[:1], inputs.k[0], inputs.v[0]
    given = [to_jax(q[0]), to_jax(k), to_jax(v)]
    out, lse = pa.single_decode(*given, layout="NHD", return_lse=True)
    assert_jax(out, given[0], gpu, q.shape[1:], given[0].dtype)
    right, right_lse = pa.single_decode(*map(cupy.asarray, (q[0], k, v)), layout="NHD", return_lse=True)
    assert bits(out) == bits(right) and bits(lse) == bits(right_lse)

    given[0] = to_jax(q)
    out, lse = pa.single_prefill(*given, layout="NHD", return_lse=True)
    assert_jax(out, given[0], gpu, q.shape, given[0].dtype)
    right, right_lse = pa.single_prefill(*map(cupy.asarray, (q, k, v)), layout="NHD", return_lse=True)
    assert bits(out) == bits(right) and bits(lse) == bits(right_lse)

    states, logs = np.stack([inputs.q, -inputs.q], axis=1), np.zeros((4, 2, 8), np.float32)
    merged, merged_lse = pa.merge_states(to_jax(states), to_jax(logs))
    assert_jax(merged, given[0], gpu, inputs.q.shape, given[0].dtype)
    right, right_lse = pa.merge_states(cupy.asarray(states), cupy.asarray(logs))
    assert bits(merged) == bits(right) and bits(merged_lse) == bits(right_lse)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_is_copied_on_the_way_in(dtype: str, to_jax: Callable) -> None:
    inputs = build(dtype, "NHD")
    k_pages, v_pages, indptr = to_jax(inputs.k_pages), to_jax(inputs.v_pages), to_jax(inputs.indptr)
    kv = pa.PagedKV(k_pages, v_pages, layout="NHD")
    assert isinstance(kv.k_pages, cupy.ndarray) and kv.dtype == inputs.k_pages.dtype
    assert kv.k_pages.data.ptr == k_pages.unsafe_buffer_pointer()
    assert kv.v_pages.data.ptr == v_pages.unsafe_buffer_pointer()
    table = pa.PageTable(indptr, to_jax(inputs.indices), to_jax(inputs.last_page_len), page_size=16)
    assert table.indptr.data.ptr == indptr.unsafe_buffer_pointer()


def test_work_of_jax_and_ours_is_in_order(to_jax: Callable) -> None:
    """q is still being computed when decode is called, and JAX goes on with out at once."""
    inputs = build("float16", "NHD")
    kv, table = inputs.kv(to_jax), inputs.table(to_jax)

    @jax.jit
    def slowly(q: Any) -> Any:
        """q, after a long detour."""
        start = jax.numpy.broadcast_to(q.astype(np.float32), (4096, *q.shape))
        far = jax.lax.fori_loop(0, 200, lambda _, x: x + 1, start)
        return jax.lax.fori_loop(0, 200, lambda _, x: x - 1, far)[0].astype(np.float16)

    q = to_jax((inputs.q * 8).round().astype(np.float16) / np.float16(8))  # eighths survive the detour
    doubled = jax.jit(lambda x: x * 2)
    jax.block_until_ready((slowly(q), doubled(q)))
    right = doubled(pa.decode(q, kv, table))
    for _ in range(5):
        assert bits(doubled(pa.decode(slowly(q), kv, table))) == bits(right)


# -- what does not go together -----------------------------------------------------------------------------------------


def test_q_of_jax_on_the_cpu_beside_a_pool_on_the_gpu(to_jax: Callable) -> None:
    inputs = build("float16", "NHD")

    def to_cpu(array: np.ndarray) -> Any:
        return jax.device_put(array, jax.devices("cpu")[0])

    q = to_cpu(inputs.q)
    for kv in (inputs.kv(cupy.asarray), inputs.kv(to_jax)):
        with pytest.raises(TypeError, match="q lives on cpu and kv on cuda:0"):
            pa.decode(q, kv, inputs.table())
    with pytest.raises(TypeError, match="q lives on cuda:0 and kv on cpu"):
        pa.decode(to_jax(inputs.q), inputs.kv(to_cpu), inputs.table())


@pytest.mark.parametrize("dtype", DTYPES)
def test_jax_arrays_are_read_and_never_written(dtype: str, to_jax: Callable) -> None:
    inputs = build(dtype, "NHD")
    kv, k, v = inputs.kv(to_jax), to_jax(inputs.k[0]), to_jax(inputs.v[0])
    slots = np.arange(len(inputs.k[0]), dtype=np.int64)
    with pytest.raises(ValueError, match=r"kv cannot be written.*keep the pool as NumPy .* or CuPy .* arrays"):
        pa.append(kv, slots, k, v)
    combined = pa.PagedKV.combined(to_jax(np.stack([inputs.k_pages, inputs.v_pages], axis=1)), layout="NHD")
    with pytest.raises(ValueError, match="kv cannot be written"):
        pa.append(combined, cupy.asarray(slots), k, v)
    q = to_jax(inputs.q)
    with pytest.raises(ValueError, match=r"out is a JAX array, .*pass a NumPy array .* or a CuPy array"):
        pa.decode(q, kv, inputs.table(), out=to_jax(inputs.q))
    with pytest.raises(ValueError, match="lse is a JAX array, which is immutable"):
        pa.decode(q, kv, inputs.table(), lse=to_jax(np.zeros(inputs.q.shape[:-1], np.float32)))
    assert bits(kv.k_pages) == inputs.k_pages.tobytes() and bits(kv.v_pages) == inputs.v_pages.tobytes()

    out = cupy.empty(inputs.q.shape, inputs.q.dtype)
    result = pa.decode(q, kv, inputs.table(), out=out)
    assert result is out
    assert bits(out) == bits(pa.decode(q, kv, inputs.table()))
