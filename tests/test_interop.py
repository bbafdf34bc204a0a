"""Arrays at the door: zero copy in, the caller's library out, and nothing heavy imported on the way."""

import math
import re
import sys
import time
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import paged_attn as pa
from paged_attn import interop
from tests import child

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


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


def test_a_producer_that_fails_is_refused() -> None:
    class Broken(Producer):
        def __dlpack__(self, **wishes):
            raise BufferError("no more buffers")

    with pytest.raises(TypeError, match=r"q cannot be taken by DLPack .no more buffers.; pass a NumPy or CuPy array"):
        interop.native(Broken(np.zeros(3)), "q")


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


def test_a_jax_array_on_several_devices_is_refused_at_every_door() -> None:
    """tests/jax_shards.py has the calls; what the messages say to do is done there, too."""
    said = child.run("tests.jax_shards", seconds=120)
    assert said.pop("shard") == "(1, 4, 16)"
    assert said.pop("one device") == "(2, 4, 16)"
    assert len(said) == 11
    for name, message in said.items():
        argument = name.removeprefix("cache ").removesuffix(" replicated")
        assert message.startswith(f"{argument} is a JAX array on 2 devices, sharded or replicated ("), message
        assert f"pass a shard, {argument}.addressable_shards[i].data, or all of it on one device" in message


def test_a_donated_jax_array_is_refused() -> None:
    x = jnp.ones((2, 4, 16), jnp.float16)
    jax.jit(lambda x: x + 1, donate_argnums=0)(x)
    assert x.is_deleted()
    for name in ("q", "out"):
        with pytest.raises(
            ValueError, match=rf"{name} is a JAX array that was deleted, .*donate_argnums.*do not donate"
        ):
            interop.native(x, name, writable=name == "out")


# -- a CuPy that cannot be imported, or sees no device -----------------------------------------------------------------


class FailingCupy:
    """A finder by which `import cupy` raises an error of any type."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name == "cupy":
            raise self.error


class SilentDriver(ModuleType):
    """A CuPy whose driver does not answer."""

    def __init__(self) -> None:
        super().__init__("cupy")
        self.cuda = SimpleNamespace(is_available=self.fail, runtime=SimpleNamespace(getDeviceCount=self.fail))

    def fail(self) -> bool:
        raise RuntimeError("cudaErrorInsufficientDriver: CUDA driver version is insufficient")


@pytest.fixture
def no_cupy(monkeypatch: pytest.MonkeyPatch) -> Callable[[Exception | None], None]:
    """Takes CuPy away: its import raises the error, or (None) its driver does."""

    def take(error: Exception | None) -> None:
        monkeypatch.setattr(interop, "_has_cuda", False)
        monkeypatch.setattr(interop, "_no_cuda", (-math.inf, ""))
        monkeypatch.delitem(sys.modules, "cupy", raising=False)
        if error is None:
            monkeypatch.setitem(sys.modules, "cupy", SilentDriver())
        else:
            monkeypatch.setattr(sys, "meta_path", [FailingCupy(error), *sys.meta_path])

    return take


FAILURES = {
    "OSError: [Errno 30] Read-only file system": OSError(30, "Read-only file system"),
    "RuntimeError: libcudart is of another version": RuntimeError("libcudart is of another version"),
    "AttributeError: module 'numpy'": AttributeError("module 'numpy' has no attribute 'float'"),
    "libcuda.so.1: cannot open": ImportError("libcuda.so.1: cannot open shared object file"),
}


@pytest.mark.parametrize("said", [*FAILURES, "cudaErrorInsufficientDriver"])
def test_a_cupy_that_fails_is_no_gpu(no_cupy: Callable[[Exception | None], None], said: str) -> None:
    """Calls that leave the device open go to the CPU; where a GPU is asked for, the reason is said."""
    no_cupy(FAILURES.get(said))
    assert not interop.cuda_available()
    assert interop.resolve_device(None) == "cpu"
    assert pa.supports() and pa.supports(device=None, head_dim=7)
    assert pa.PageTable.empty(2, 3, page_size=4).device == "cpu"
    pa.status()
    assert pa.PagedKVCache(6, 4, 2, 16, layout="NHD", dtype="float16").device == "cpu"
    for device in ("cuda", "cuda:0", 1):
        answer = pa.supports(device=device)
        assert not answer and said in answer.reason
        kind = ImportError if said in FAILURES else ValueError
        with pytest.raises(kind) as raised:
            pa.PageTable.empty(2, 3, page_size=4, device=device)
        assert said in str(raised.value) and f"device={device!r}" in str(raised.value)
    if said in FAILURES:
        with pytest.raises(ImportError, match=f"q lives on a GPU, and CuPy cannot be imported .*{re.escape(said)}"):
            interop.native(Elsewhere(2), "q")


def test_what_is_missing_may_be_put_right(no_cupy: Callable[[Exception | None], None], monkeypatch: Any) -> None:
    """That there is no GPU is asked again, but not on every call; that there is one is not."""
    no_cupy(OSError("a cache folder that cannot be written"))
    now = time.monotonic()
    monkeypatch.setattr(interop.time, "monotonic", lambda: now)
    assert not interop.cuda_available()
    mended, asked = ModuleType("cupy"), []
    mended.cuda = SimpleNamespace(is_available=lambda: not asked.append(1))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cupy", mended)
    assert not interop.cuda_available() and not asked
    now += 10
    assert interop.cuda_available() and interop.cuda_available()
    assert len(asked) == 1


def test_a_machine_without_a_device_says_so(no_cupy: Callable[[Exception | None], None], monkeypatch: Any) -> None:
    no_cupy(None)
    monkeypatch.setattr(sys.modules["cupy"].cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"device='cuda:1', but CuPy sees no CUDA device .there is none.; pass 'cpu'$"):
        interop.resolve_device("cuda:1")


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


@pytest.mark.parametrize("call", ["decode", "prefill", "single_decode", "single_prefill"])
def test_an_array_is_exported_once_a_call(call: str) -> None:
    exported: list[str] = []

    class Counted(Producer):
        def __init__(self, array: np.ndarray, name: str) -> None:
            super().__init__(array)
            self._name = name

        def __dlpack__(self, **options):
            exported.append(self._name)
            return super().__dlpack__(**options)

    rng = np.random.default_rng(0)
    tokens = rng.standard_normal((5, 2, 16), np.float32)
    q = Counted(rng.standard_normal((4, 16) if call == "single_decode" else (1, 4, 16), np.float32), "q")
    sinks = Counted(np.zeros(4, np.float32), "sinks")
    kv = pa.PagedKV(tokens[None], tokens[None], layout="NHD")
    table = pa.PageTable(np.array([0, 1], np.int32), np.zeros(1, np.int32), np.array([5], np.int32), page_size=5)
    if call.startswith("single"):
        k, v = Counted(tokens, "k"), Counted(tokens, "v")
        getattr(pa, call)(q, k, v, layout="NHD", sinks=sinks, return_lse=True)
        assert sorted(exported) == ["k", "q", "sinks", "v"]
    else:
        indptr = () if call == "decode" else (np.array([0, 1], np.int32),)
        getattr(pa, call)(q, *indptr, kv, table, sinks=sinks, return_lse=True)
        assert sorted(exported) == ["q", "sinks"]
