"""Every PTX wrapper against its C++ twin, lane by lane: what the shim's tests say about a kernel holds on a GPU."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from paged_attn import compile as kernels
from tests.simt.driver import launch
from tests.simt.wrappers import number_arrays, numbers, warp_arrays, wrappers_source

FORMATS = [
    pytest.param(0, np.dtype(np.float16), id="float16"),
    pytest.param(1, np.dtype(ml_dtypes.bfloat16), id="bf16"),
]


def launch_on_gpu(name: str, grid: int, block: int, params: dict[str, Any], shared_bytes: int, bfloat16: int) -> None:
    """`launch` of the driver on the current GPU: arrays go there as bytes and come back."""
    import cupy

    source = wrappers_source()
    packed = np.zeros((), kernels.params_dtype(source, kernels.params_name(source, name)))
    arrays = {key: value for key, value in params.items() if isinstance(value, np.ndarray)}
    copies = {key: cupy.asarray(np.ascontiguousarray(value).view(np.uint8)) for key, value in arrays.items()}
    kernels.fill(packed, params | copies)
    module = cupy.RawModule(code=source, options=kernels.options(None, BFLOAT16=bfloat16))
    module.get_function(name)((grid,), (block,), (packed[()],), shared_mem=shared_bytes)
    for key, copy in copies.items():
        arrays[key].view(np.uint8)[...] = copy.get()


@pytest.mark.parametrize(("bfloat16", "dtype"), FORMATS)
@pytest.mark.parametrize("valid_rows", [0, 5, 16])
def test_warp_wrappers_are_their_twins(bfloat16: int, dtype: np.dtype, valid_rows: int) -> None:
    a, b, sums, on_cpu = warp_arrays(dtype)
    on_gpu = {key: value.copy() for key, value in on_cpu.items()}
    inputs = {"a": a, "b": b, "sums": sums, "valid_rows": valid_rows}
    launch("warp_wrappers", 1, 32, inputs | on_cpu, 768, source=wrappers_source(), BFLOAT16=bfloat16)
    launch_on_gpu("warp_wrappers", 1, 32, inputs | on_gpu, 768, bfloat16)
    for outputs in (on_cpu, on_gpu):
        outputs["tickets"].sort()  # lanes count in any order
    for key, expected in on_cpu.items():
        np.testing.assert_array_equal(on_gpu[key].view(np.uint8), expected.view(np.uint8), err_msg=key)


@pytest.mark.parametrize(("bfloat16", "dtype"), FORMATS)
def test_number_wrappers_are_their_twins(bfloat16: int, dtype: np.dtype) -> None:
    bits, x = numbers()
    on_cpu, on_gpu = number_arrays(len(x)), number_arrays(len(x))
    inputs = {"bits": bits, "x": x, "count": len(x)}
    launch("number_wrappers", len(x) // 256, 256, inputs | on_cpu, source=wrappers_source(), BFLOAT16=bfloat16)
    launch_on_gpu("number_wrappers", len(x) // 256, 256, inputs | on_gpu, 0, bfloat16)
    number = ~np.isnan(bits.view(dtype).astype(np.float32))
    np.testing.assert_array_equal(on_gpu["widened"].view(np.uint32)[number], on_cpu["widened"].view(np.uint32)[number])
    assert np.isnan(on_gpu["widened"][~number]).all()
    for key in ("narrowed", "packed"):
        np.testing.assert_array_equal(on_gpu[key], on_cpu[key], err_msg=key)
    near_one = np.abs(x) < 2  # relative errors of exp2 grow with |x|
    np.testing.assert_allclose(on_gpu["exp2"][near_one], on_cpu["exp2"][near_one], rtol=5e-7)
    np.testing.assert_allclose(on_gpu["exp2"], on_cpu["exp2"], rtol=5e-6, atol=2e-38)
    np.testing.assert_allclose(on_gpu["log2"], on_cpu["log2"], rtol=5e-7, atol=3e-7)
    np.testing.assert_allclose(on_gpu["tanh"], on_cpu["tanh"], rtol=1e-6, atol=1.2e-38)  # subnormals are flushed
