"""append, run on a CPU by the SIMT shim, against a loop over tokens."""

import mmap
from dataclasses import dataclass

import numpy as np
import pytest

from paged_attn import compile as kernels
from paged_attn.errors import FAULT_FIELDS
from tests.simt.driver import launch
from tests.simt.guarded import Guarded

MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Python 3.11 does not name it


@dataclass(frozen=True)
class Case:
    layout: str = "NHD"
    page_size: int = 16
    heads: int = 2
    head_dim: int = 64
    v_head_dim: int | None = None  # None: head_dim
    tokens: int = 9
    num_pages: int = 5
    strided: bool = False  # k and v are slices of one [tokens, 3 * heads, dim] array, pools of one [pages, 2, ...]
    block: tuple[int, int] = (32, 2)
    grid: int = 2

    @property
    def dims(self) -> tuple[int, int]:
        """Of K and of V."""
        return self.head_dim, self.v_head_dim or self.head_dim


CASES = [
    Case(),
    Case(layout="HND"),
    Case(page_size=1, num_pages=20),
    Case(page_size=1, num_pages=20, layout="HND"),
    Case(page_size=3),
    Case(page_size=48, layout="HND", num_pages=2),
    Case(page_size=64, num_pages=1),
    Case(heads=1),
    Case(heads=1, layout="HND"),
    Case(heads=5, head_dim=80),
    Case(heads=5, head_dim=112, layout="HND", page_size=8),
    Case(heads=16, head_dim=256, tokens=3),
    Case(head_dim=16),
    Case(head_dim=16, heads=1, layout="HND"),
    Case(head_dim=128, heads=8, page_size=8),
    Case(head_dim=128, heads=8, page_size=8, layout="HND"),
    Case(tokens=1),
    Case(tokens=40, grid=1),
    Case(tokens=40, grid=50),
    Case(tokens=40, block=(64, 4)),
    Case(tokens=33, block=(32, 1), grid=7, layout="HND"),
    Case(strided=True),
    Case(strided=True, layout="HND"),
    Case(strided=True, heads=3, head_dim=96, page_size=7),
    Case(head_dim=192, v_head_dim=128),
    Case(head_dim=64, v_head_dim=128, heads=5, strided=True, layout="HND"),
    Case(head_dim=72, v_head_dim=8, tokens=40),
]


def pool(case: Case, dim: int, guarded: Guarded, value: int) -> tuple[np.ndarray, tuple[int, int, int]]:
    """A pool of one number in the case's layout, and its (page, slot, head) strides in units of 16 bytes."""
    page = (case.page_size, case.heads) if case.layout == "NHD" else (case.heads, case.page_size)
    middle = (2,) if case.strided else ()
    array = guarded.output(np.full((case.num_pages, *middle, *page, dim), value, np.uint16), 16)
    pages = array[:, 1] if case.strided else array
    first, second, third = (stride // 16 for stride in pages.strides[:3])
    return pages, (first, second, third) if case.layout == "NHD" else (first, third, second)


def new_tokens(case: Case, dim: int, guarded: Guarded, rng: np.random.Generator) -> np.ndarray:
    heads = 3 * case.heads if case.strided else case.heads
    array = guarded.input(rng.integers(0, 2**16, (case.tokens, heads, dim)).astype(np.uint16), 16)
    return array[:, case.heads : 2 * case.heads] if case.strided else array


def run(case: Case, slots: np.ndarray, reverse: bool = False) -> tuple[str, int, int] | None:
    """Appends and compares; returns the fault that was recorded."""
    rng = np.random.default_rng(slots.size)
    guarded = Guarded()
    k, v = (new_tokens(case, dim, guarded, rng) for dim in case.dims)
    k_pool, k_strides = pool(case, case.dims[0], guarded, 11111)
    v_pool, v_strides = pool(case, case.dims[1], guarded, 22222)
    status = guarded.status()
    want = [k_pool.copy(), v_pool.copy()]
    for token, slot in enumerate(slots.tolist()):
        if 0 <= slot < case.num_pages * case.page_size:
            page, offset = divmod(slot, case.page_size)
            for expected, new in zip(want, (k, v), strict=True):
                by_token = expected if case.layout == "NHD" else expected.swapaxes(1, 2)
                by_token[page, offset] = new[token]
    launch(
        "append",
        case.grid,
        case.block,
        {
            "k": k,
            "v": v,
            "k_pool": k_pool,
            "v_pool": v_pool,
            "slots": guarded.input(slots),
            "status": status,
            "k_pool_strides": k_strides,
            "v_pool_strides": v_strides,
            "page_size": kernels.fast_divide(case.page_size),
            "k_token_stride": k.strides[0] // 16,
            "k_head_stride": k.strides[1] // 16,
            "v_token_stride": v.strides[0] // 16,
            "v_head_stride": v.strides[1] // 16,
            "tokens": case.tokens,
            "heads": case.heads,
            "num_pages": case.num_pages,
            "slots_are_int": slots.dtype == np.int32,
        },
        reverse=reverse,
        HEAD_DIM=case.dims[0],
        V_HEAD_DIM=case.dims[1],
    )
    guarded.check()
    np.testing.assert_array_equal(k_pool, want[0])
    np.testing.assert_array_equal(v_pool, want[1])
    field = FAULT_FIELDS[int(status["field"])]
    return None if field == "none" else (field, int(status["index"]), int(status["value"]))


def free_slots(case: Case, seed: int = 0) -> np.ndarray:
    num_slots = case.num_pages * case.page_size
    return np.random.default_rng(seed).permutation(num_slots)[: case.tokens].astype(np.int64)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_tokens_reach_their_slots(case: Case) -> None:
    slots = free_slots(case)
    assert run(case, slots) is None
    slots[::3] = -1
    assert run(case, slots, reverse=True) is None


@pytest.mark.parametrize("case", CASES[:4], ids=str)
def test_slots_of_32_bits(case: Case) -> None:
    slots = free_slots(case).astype(np.int32)
    assert run(case, slots) is None
    slots[::3] = -1
    assert run(case, slots, reverse=True) is None
    for slot in (-2, -(2**31), case.num_pages * case.page_size, 2**31 - 1):
        slots[4] = slot
        assert run(case, slots) == ("slots", 4, slot)


@pytest.mark.parametrize("slot", [-2, -(2**63), -(2**31), 80, 2**31, 2**32 + 3, 2**63 - 1])
@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_a_slot_outside_the_pool_is_skipped_and_recorded(slot: int, layout: str) -> None:
    case = Case(layout=layout)
    slots = free_slots(case)
    slots[4] = slot
    assert run(case, slots) == ("slots", 4, slot)


def test_a_pool_without_pages() -> None:
    assert run(Case(num_pages=0), np.full(9, -1, np.int64)) is None
    fault = run(Case(num_pages=0), np.zeros(9, np.int64))
    assert fault is not None and fault[0] == "slots"


@pytest.mark.parametrize("seed", range(10))
def test_slots_of_anything(seed: int) -> None:
    case = CASES[seed]
    rng = np.random.default_rng(seed)
    slots = np.where(rng.random(case.tokens) < 0.5, rng.integers(-(2**63), 2**63 - 1, case.tokens), free_slots(case))
    fault = run(case, slots)
    wrong = [("slots", i, x) for i, x in enumerate(slots.tolist()) if not -1 <= x < case.num_pages * case.page_size]
    assert fault in wrong if wrong else fault is None


def test_pages_that_lie_far_apart() -> None:
    """The third page begins at slot 2^31, 48 GiB behind the first (address space that is only reserved)."""
    page_units = 3 << 29
    region = mmap.mmap(-1, 2 * page_units * 16 + 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
    far = np.frombuffer(region, np.uint16, count=4 * 16, offset=2 * page_units * 16)
    near = np.frombuffer(region, np.uint16, count=4 * 16)
    tokens = np.arange(2 * 16, dtype=np.uint16).reshape(2, 1, 16) + 1
    guarded = Guarded()
    k, v = guarded.input(tokens, 16), guarded.input(tokens + 100, 16)
    other = guarded.output(np.zeros((3, 4, 1, 16), np.uint16), 16)
    fields = {
        "k": k,
        "v": v,
        "k_pool": near,
        "v_pool": other,
        "slots": guarded.input(np.array([2, 2**31 + 3])),
        "status": guarded.status(),
        "k_pool_strides": (page_units, 2, 2),
        "v_pool_strides": (8, 2, 2),
        "page_size": kernels.fast_divide(2**30),
        "k_token_stride": 2,
        "v_token_stride": 2,
        "tokens": 2,
        "heads": 1,
        "num_pages": 3,
    }
    launch("append", 1, (32, 2), fields, HEAD_DIM=16, V_HEAD_DIM=16)
    guarded.check()
    np.testing.assert_array_equal(near.reshape(4, 16)[2], tokens[0, 0])
    np.testing.assert_array_equal(far.reshape(4, 16)[3], tokens[1, 0])
    np.testing.assert_array_equal(other[2, 3, 0], tokens[1, 0] + 100)
