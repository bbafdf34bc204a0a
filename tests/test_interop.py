"""Arrays at the door: zero copy in, the caller's library out, and nothing heavy imported on the way."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import paged_attn as pa
from paged_attn import interop

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def test_import_is_light() -> None:
    """`import paged_attn` brings none of the heavy libraries and costs less than 0.2 s above NumPy and ml_dtypes."""
    code = (
        "import sys, time, numpy, ml_dtypes; start = time.perf_counter(); import paged_attn;"
        "print(time.perf_counter() - start, *sorted({'cupy', 'jax', 'torch', 'rich'} & sys.modules.keys()))"
    )
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(3)]
    seconds, *heavy = min(runs, key=lambda run: float(run.stdout.split()[0])).stdout.split()
    assert heavy == []
    assert float(seconds) < 0.2


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "int32"])
@pytest.mark.parametrize("shape", [(3, 4), (0, 4), (5,)])
def test_jax_arrays_come_without_a_copy(dtype: str, shape: tuple[int, ...]) -> None:
    x = jnp.arange(np.prod(shape)).reshape(shape).astype(dtype)
    view = interop.native(x, "x")
    assert type(view) is np.ndarray
    assert view.dtype == x.dtype
    assert view.shape == x.shape
    if x.size:
        assert view.ctypes.data == x.unsafe_buffer_pointer()
    np.testing.assert_array_equal(view.astype(np.float32), np.asarray(x, np.float32))


def test_a_view_keeps_the_jax_array_alive() -> None:
    x = jnp.full((1000, 100), 3, jnp.bfloat16)
    view = interop.native(x, "x")
    del x
    jnp.zeros((1000, 100), jnp.bfloat16).block_until_ready()
    assert (view == 3).all()


def test_native_arrays_pass_through(xp) -> None:
    x = xp.zeros((2, 3), np.float16)
    assert interop.native(x, "x") is x
    assert interop.native(x, "x", writable=True) is x
    assert interop.namespace(x) is xp
    assert interop.device_of(x) == ("cpu" if xp is np else f"cuda:{x.device.id}")


class Producer:
    """Another library's array: nothing but DLPack, of the kind before 1.0 if `old`."""

    def __init__(self, array: np.ndarray, old: bool = False) -> None:
        self._array, self._old = array, old

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._array.__dlpack_device__()

    def __dlpack__(self, *, stream=None, **wishes):
        if not self._old:
            return self._array.__dlpack__(**wishes)
        if wishes:
            raise TypeError("unexpected keyword argument")
        return self._array.__dlpack__()


def test_any_dlpack_producer_can_be_read_and_written() -> None:
    array = np.zeros((2, 3), np.float32)
    view = interop.native(Producer(array), "out", writable=True)
    view[1] = 7
    assert (array[1] == 7).all()
    assert interop.to_caller(view, Producer(array)) is view


def test_calls_need_nothing_of_a_producer_but_dlpack() -> None:
    q, k, v = np.random.default_rng(0).standard_normal((3, 4, 2, 16)).astype(np.float16)
    indptr, indices, last_page_len = np.array([0, 1], np.int32), np.zeros(1, np.int32), np.array([4], np.int32)

    def results(to: Callable[[np.ndarray], Any]) -> list[np.ndarray]:
        kv = pa.PagedKV(to(k[None]), to(v[None]), layout="NHD")
        table = pa.PageTable(to(indptr), to(indices), to(last_page_len), page_size=4)
        return [
            pa.decode(to(q[:1]), kv, table),
            pa.prefill(to(q), to(np.array([0, 4], np.int32)), kv, table),
            pa.single_decode(to(q[0]), to(k), to(v), layout="NHD"),
            pa.single_prefill(to(q), to(k), to(v), layout="NHD"),
        ]

    for given, right in zip(results(Producer), results(np.asarray), strict=True):
        np.testing.assert_array_equal(given, right)


def test_an_old_dlpack_producer_can_be_read_only() -> None:
    array = np.arange(6, dtype=np.float32)
    np.testing.assert_array_equal(interop.native(Producer(array, old=True), "q"), array)
    with pytest.raises(
        ValueError, match=r"out .*Producer.* does not say by DLPack that it may be written; pass a NumPy"
    ):
        interop.native(Producer(array, old=True), "out", writable=True)


def test_a_read_only_producer_is_not_written() -> None:
    array = np.zeros(3, np.float32)
    array.flags.writeable = False
    with pytest.raises(ValueError, match=r"out .* does not say by DLPack that it may be written"):
        interop.native(Producer(array), "out", writable=True)
    with pytest.raises(ValueError, match=r"out is a read-only NumPy array; pass out\.copy\(\)"):
        interop.native(array, "out", writable=True)


def test_jax_arrays_are_not_written() -> None:
    with pytest.raises(ValueError, match=r"out is a JAX array, which is immutable.*pass a NumPy array"):
        interop.native(jnp.zeros(3), "out", writable=True)


def test_traced_arrays_are_refused() -> None:
    with pytest.raises(TypeError, match=r"q is a JAX array that is being traced.*call paged_attn outside"):
        jax.jit(lambda x: interop.native(x, "q"))(jnp.zeros(3))


@pytest.mark.parametrize("thing", [[1, 2], 3.0, None, "q", np.float32(3)])
def test_what_is_no_array_is_refused(thing: object) -> None:
    with pytest.raises(TypeError, match=f"q must be an array .*got {type(thing).__name__}; pass np.asarray"):
        interop.native(thing, "q")


def test_dtypes_that_numpy_does_not_know_are_refused() -> None:
    with pytest.raises(TypeError, match=r"q cannot be taken by DLPack .*pass a NumPy or CuPy array"):
        interop.native(jnp.zeros(3, jnp.float8_e4m3fn), "q")


class Elsewhere(Producer):
    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device_type, 0

    def __init__(self, device_type: int) -> None:
        super().__init__(np.zeros(3))
        self.device_type = device_type


def test_other_devices_are_refused() -> None:
    with pytest.raises(
        TypeError, match=r"q lives on a device of DLPack type 10, and paged_attn knows the CPU and CUDA"
    ):
        interop.native(Elsewhere(10), "q")


def test_a_gpu_array_without_cupy_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(ImportError, match=r"q lives on a GPU, and CuPy cannot be imported .*pip install .cupy-cuda12x"):
        interop.native(Elsewhere(2), "q")
    with pytest.raises(ImportError, match=r"device='cuda' needs CuPy.*pip install .cupy-cuda13x"):
        interop.resolve_device("cuda")


@pytest.mark.parametrize("dtype", [np.float16, BFLOAT16, np.float32])
def test_results_go_back_to_jax(dtype: np.dtype) -> None:
    result = np.arange(6).astype(dtype).reshape(2, 3)
    back = interop.to_caller(result, jax.device_put(jnp.zeros(3), jax.devices("cpu")[0]))
    assert isinstance(back, jax.Array)
    assert back.dtype == result.dtype
    np.testing.assert_array_equal(np.asarray(back, np.float32), [[0, 1, 2], [3, 4, 5]])
    assert interop.to_caller(result, result) is result


@pytest.mark.parametrize("dtype", ["bfloat16", BFLOAT16, ml_dtypes.bfloat16, jnp.bfloat16])
def test_every_spelling_of_a_dtype(dtype: object) -> None:
    assert interop.as_dtype(dtype) == BFLOAT16
    for name in ("float16", "float32", "float64"):
        for spelling in (name, np.dtype(name), getattr(np, name), getattr(jnp, name)):
            assert interop.as_dtype(spelling) == np.dtype(name)


@pytest.mark.parametrize("dtype", [None, "fp16", "int32", np.int32, object(), ml_dtypes.float8_e4m3fn, "f"])
def test_other_dtypes_are_refused(dtype: object) -> None:
    with pytest.raises(TypeError, match=r"dtype must be one of float16, bfloat16, float32, float64 .*got"):
        interop.as_dtype(dtype)


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:x", "cuda1", "", True, -1, 1.5, ("cuda", 0)])
def test_other_devices_have_no_name(device: object) -> None:
    with pytest.raises(ValueError, match=r"device must be 'cpu', 'cuda', 'cuda:<i>', .*pass None"):
        interop.resolve_device(device)


def test_the_default_device() -> None:
    assert interop.resolve_device("cpu") == "cpu"
    assert interop.resolve_device(None) == ("cuda:0" if interop.cuda_available() else "cpu")


@pytest.mark.gpu
def test_every_spelling_of_a_cuda_device() -> None:
    import cupy

    for device in ("cuda", "cuda:0", 0, cupy.cuda.Device(0)):
        assert interop.resolve_device(device) == "cuda:0"
    with pytest.raises(ValueError, match=r"device='cuda:99', but CuPy sees \d+ CUDA devices; pass 'cpu' or an index"):
        interop.resolve_device("cuda:99")


@pytest.mark.gpu
def test_cupy_bfloat16_comes_and_goes_by_dlpack() -> None:
    import cupy

    class GpuProducer(Producer):
        def __dlpack__(self, *, stream=None, **wishes):
            return self._array.__dlpack__(stream=stream, **wishes)

    array = cupy.zeros((2, 3), np.uint16).view(BFLOAT16)
    view = interop.native(GpuProducer(array), "q")
    assert isinstance(view, cupy.ndarray)
    assert view.dtype == BFLOAT16
    assert view.data.ptr == array.data.ptr
