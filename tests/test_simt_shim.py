"""The shim itself: collectives, their misuse, and the C++ twins of the PTX wrappers against NumPy."""

import ml_dtypes
import numpy as np
import pytest

from paged_attn import compile as kernels
from tests.simt.driver import SimtError, launch
from tests.simt.wrappers import number_arrays, numbers, warp_arrays, wrappers_source

pytestmark = pytest.mark.shim
FORMATS = [
    pytest.param(0, np.dtype(np.float16), id="float16"),
    pytest.param(1, np.dtype(ml_dtypes.bfloat16), id="bf16"),
]
ORDERS = pytest.mark.parametrize("reverse", [False, True])


def run(
    body: str, out: np.ndarray, grid: int = 1, block: int = 32, shared_bytes: int = 0, reverse: bool = False
) -> None:
    """Runs a kernel whose body sees `out` (int*), `thread` and `shared` (int*)."""
    source = f"""
        struct Params {{ int* out; }};
        extern __shared__ __align__(1024) unsigned char shared_memory[];
        extern "C" __global__ void probe(const __grid_constant__ Params p) {{
            int* const out = p.out;
            int* const shared = (int*)shared_memory;
            const int thread = threadIdx.x;
            {body}
        }}"""
    launch("probe", grid, block, {"out": out}, shared_bytes, source=source, reverse=reverse)


LANES = np.arange(32)


def test_the_opposite_order_shows_a_missing_barrier() -> None:
    body = """
        shared[thread] = thread;
        out[thread] = shared[thread == 0 ? 0 : thread - 1];"""
    out = np.zeros(32, np.int32)
    run(body, out, shared_bytes=128)
    np.testing.assert_array_equal(out, np.maximum(LANES - 1, 0))
    run(body, out, shared_bytes=128, reverse=True)
    np.testing.assert_array_equal(out[1:], -1)


def test_shared_memory_is_nan_when_a_block_starts() -> None:
    out = np.zeros(3, np.int32)
    run("if (thread == 0) { out[blockIdx.x] = shared[5]; shared[5] = 7; }", out, grid=3, shared_bytes=64)
    np.testing.assert_array_equal(out, -1)
    assert np.isnan(out.view(np.float32)).all()


@ORDERS
@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("if (thread != 9) __syncwarp();", "__syncwarp for lanes 0x200; 31 of 64 threads wait"),
        ("if (thread < 16) out[0] = __shfl_sync(~0u, 1, 0);", "for lanes 0xffff0000"),
        ("if (thread < 40) __syncthreads();", "__syncthreads; 40 of 64 threads wait and 24 have returned"),
        ("if (thread < 9) __syncwarp(); else __any_sync(~0u, 1);", "meets"),
        ("__shfl_sync(thread < 9 ? 0x3ffu : ~0u, 1, 0);", "meets"),
        ("if (thread < 9) __syncthreads(); else __syncthreads_or(1);", "meets"),
        ("__syncwarp(2u);", "in which its own lane"),
        ("if (thread < 8) __shfl_sync(0xffu, 1, 20);", "reads lane 20"),
        ("shared[16] = 1;", "wrote to byte 64 of its 64 bytes of shared memory"),
    ],
)
def test_misuse_is_an_error_with_its_place(body: str, message: str, reverse: bool) -> None:
    out = np.zeros(1, np.int32)
    with pytest.raises(SimtError, match=rf"^probe: block \(1, 0, 0\).*{message}"):
        run(f"if (blockIdx.x == 1) {{ {body} }}", out, grid=3, block=64, shared_bytes=64, reverse=reverse)
    run("out[0] = 1;", out)  # the next launch is not affected
    assert out[0] == 1


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("copy_async_16(56, p.out, true);", "16 bytes at shared address 56"),
        ("copy_async_16(64, p.out, true);", "16 bytes at shared address 64, of 64 bytes"),
        ("copy_async_16(0, p.out + 1, true);", "is not a multiple of 16"),
        ("load_global_cg((const float4*)(p.out + 1));", "is not a multiple of 16"),
        ("prefetch_to_l2((const int*)((const char*)p.out + 2));", "is not a multiple of 4"),
        ("load_global((const float4*)(p.out + 1), cache_policy(Evict::FIRST));", "is not a multiple of 16"),
        ("shared_address_of(shared_memory + 65);", "is not into the launch's shared memory"),
        ("u32 m[4]; load_matrix_x4(m, threadIdx.x * 16);", "16 bytes at shared address 64"),
        ("u32 m[4]; if (threadIdx.x) load_matrix_x4(m, 0);", "deadlock: it waits in load_matrix_x4 for lanes 0x1"),
    ],
)
def test_wrong_addresses_are_errors(statement: str, message: str) -> None:
    source = f"""{kernels.load_source("mma.cuh")}
        struct Params {{ int* out; }};
        extern __shared__ __align__(1024) unsigned char shared_memory[];
        extern "C" __global__ void probe(const __grid_constant__ Params p) {{ {statement} }}"""
    aligned = np.zeros(2, "V16")
    with pytest.raises(SimtError, match=message):
        launch("probe", 1, 32, {"out": aligned}, 64, source=source, BFLOAT16=0)


@ORDERS
@pytest.mark.parametrize(("bfloat16", "dtype"), FORMATS)
@pytest.mark.parametrize("valid_rows", [0, 5, 16])
def test_warp_wrappers(bfloat16: int, dtype: np.dtype, valid_rows: int, reverse: bool) -> None:
    a, b, sums, out = warp_arrays(dtype)
    a_seen = np.where(np.arange(16)[:, None] < valid_rows, a, np.zeros((), dtype))
    params = {"a": a, "b": b, "sums": sums, "valid_rows": valid_rows, **out}
    launch("warp_wrappers", 1, 32, params, 768, source=wrappers_source(), reverse=reverse, BFLOAT16=bfloat16)

    matrices = np.stack([a_seen[:8, :8], a_seen[8:, :8], a_seen[:8, 8:], a_seen[8:, 8:]])
    np.testing.assert_array_equal(out["fragment"], matrices.reshape(4, 32, 2).swapaxes(0, 1))
    halves = np.stack([b[:8].T, b[8:].T] * 2)
    np.testing.assert_array_equal(out["transposed"], halves.reshape(4, 32, 2).swapaxes(0, 1))
    np.testing.assert_array_equal(out["turned"], a_seen[:8, :8].T.reshape(32, 2))
    np.testing.assert_array_equal(out["c"], a_seen.astype(np.float32) @ b.astype(np.float32))
    np.testing.assert_array_equal(np.sort(out["tickets"]), np.sort((3 + LANES) % 5))
    assert out["counter"] == (3 + 32) % 5
    np.testing.assert_array_equal(out["loaded"], [1, 2, 3, 4, 1, 2])
    np.testing.assert_array_equal(out["moved"], [1, 2, 3, 4, 1, 2])
    np.testing.assert_array_equal(out["shared"], [1, 2, 3, 4, 5, 6, 7, 1])


@pytest.mark.parametrize(("bfloat16", "dtype"), FORMATS)
def test_conversions(bfloat16: int, dtype: np.dtype) -> None:
    bits, x = numbers()
    out = run_numbers(bits, x, bfloat16)
    np.testing.assert_array_equal(out["widened"], bits.view(dtype).astype(np.float32))
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        low, high = x.astype(dtype), (-x).astype(dtype)
    number = ~np.isnan(x)
    np.testing.assert_array_equal(out["narrowed"][number], low.view(np.uint16)[number])
    np.testing.assert_array_equal(out["narrowed"][~number], 0x7FFF)
    both = low.view(np.uint16).astype(np.uint32) | high.view(np.uint16).astype(np.uint32) << 16
    np.testing.assert_array_equal(out["packed"][number], both[number])
    np.testing.assert_array_equal(out["packed"][~number], 0x7FFF7FFF)


def run_numbers(bits: np.ndarray, x: np.ndarray, bfloat16: int) -> dict[str, np.ndarray]:
    out = number_arrays(len(x))
    params = {"bits": bits, "x": x, "count": len(x), **out}
    launch("number_wrappers", -(-len(x) // 256), 256, params, source=wrappers_source(), BFLOAT16=bfloat16)
    return out


def test_functions_of_softmax() -> None:
    x = np.concatenate([np.linspace(-150, 130, 40001), np.linspace(-0.5, 0.5, 20001), 2.0 ** np.arange(-126, 128)])
    x = x.astype(np.float32)
    out = run_numbers(np.zeros(len(x), np.uint16), x, 0)
    exact = x.astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        normal = (exact > -126) & (exact < 128)
        np.testing.assert_allclose(out["exp2"][normal], 2.0 ** exact[normal], rtol=5e-7)
        np.testing.assert_array_equal(out["exp2"][exact < -126], 0)
        np.testing.assert_allclose(out["log2"], np.log2(exact), rtol=1e-6, atol=3e-7)
    np.testing.assert_allclose(out["tanh"], np.tanh(exact), rtol=1e-6)


def test_functions_of_softmax_at_their_ends() -> None:
    x = np.array([np.inf, -np.inf, np.nan, 0, -0.0, -1], np.float32)
    out = run_numbers(np.zeros(len(x), np.uint16), x, 0)
    np.testing.assert_array_equal(out["exp2"], [np.inf, 0, np.nan, 1, 1, 0.5])
    np.testing.assert_array_equal(out["log2"], [np.inf, np.nan, np.nan, -np.inf, -np.inf, np.nan])
    np.testing.assert_allclose(out["tanh"], [1, -1, np.nan, 0, 0, np.tanh(-1)], rtol=1e-6)
