"""merge_states and merge_state, run on a CPU by the SIMT shim, against a float64 formula."""

import math
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import pytest

from tests.cases import with_sinks
from tests.simt.driver import launch
from tests.simt.guarded import Guarded

BF16, F16, F32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16), np.dtype(np.float32)


@dataclass(frozen=True)
class Case:
    rows: int = 3
    num_states: int = 5
    heads: int = 4
    head_dim: int = 128
    v: np.dtype = F16
    out: np.dtype = F16
    vec: int = 8
    base: float = math.e
    warps: int = 4
    swapped: bool = False  # v and s are [num_states, rows, ...] with their first axes swapped
    gap: int = 0  # elements between heads of v

    def __str__(self) -> str:
        shape = f"{self.rows}x{self.num_states}x{self.heads}x{self.head_dim}"
        return f"{shape}-{self.v.name}-{self.out.name}-vec{self.vec}-base{self.base:.0f}" + "-swapped" * self.swapped


CASES = [
    Case(),
    Case(base=2.0),
    Case(num_states=1),
    Case(num_states=2, base=2.0),
    Case(num_states=16),
    Case(num_states=17),
    Case(num_states=40, swapped=True),
    Case(num_states=0),
    Case(swapped=True, base=2.0),
    Case(gap=8),
    Case(out=F32),
    Case(out=F32, num_states=9, swapped=True),
    Case(v=BF16, out=BF16),
    Case(v=BF16, out=F32, head_dim=112, num_states=70),
    Case(v=F32, out=F32, vec=4),
    Case(v=F32, out=F32, vec=4, num_states=33, base=2.0),
    Case(v=F32, out=F16, vec=4, swapped=True),
    Case(v=F32, out=BF16, vec=4, head_dim=112),
    Case(head_dim=256, num_states=6),
    Case(v=F32, out=F32, head_dim=256, vec=4, num_states=6),
    Case(head_dim=16, num_states=70),
    Case(head_dim=80, num_states=11, heads=5, warps=5),
    Case(head_dim=112, out=F32),
    Case(head_dim=8, num_states=100),
    Case(heads=9, warps=5),
    Case(heads=1, warps=1, rows=7),
    Case(head_dim=40, vec=1, gap=3),
    Case(v=F32, out=F32, head_dim=40, vec=1, gap=1),
    Case(head_dim=256, vec=1, gap=1, num_states=5),
    Case(head_dim=36, vec=4, gap=4, num_states=12),
]


def numbers(rng: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    return rng.standard_normal(shape).astype(dtype)


def bits(array: np.ndarray) -> np.ndarray:
    """The same memory, 16-bit numbers as u16: arrays of any such dtype can be guarded and passed."""
    return array.view(np.uint16) if array.dtype.itemsize == 2 else array


def expected(v: np.ndarray, s: np.ndarray, base: float) -> tuple[np.ndarray, np.ndarray]:
    """v [rows, num_states, heads, dim], s [rows, num_states, heads] -> out, lse in float64."""
    v, s = v.astype(np.float64), s.astype(np.float64) * math.log(base)
    rows, num_states, heads, head_dim = v.shape
    out, lse = np.zeros((rows, heads, head_dim)), np.full((rows, heads), -np.inf)
    for row in range(rows):
        for head in range(heads):
            states = [i for i in range(num_states) if not np.isinf(s[row, i, head])]
            if not states:
                continue
            top = s[row, states, head].max()
            weights = np.exp(s[row, states, head] - top)
            out[row, head] = weights @ v[row, states, head] / weights.sum()
            lse[row, head] = (top + np.log(weights.sum())) / math.log(base)
    return out, lse


def assert_close(case: Case, out: np.ndarray, lse: np.ndarray, want_out: np.ndarray, want_lse: np.ndarray) -> None:
    out = out.astype(np.float64)
    np.testing.assert_array_equal(np.isnan(out), np.isnan(want_out))
    tolerance = {F32: 2e-6, F16: 1e-3, BF16: 6e-3}[case.out]
    error = np.linalg.norm(out - want_out, axis=-1)
    assert (error <= tolerance * np.linalg.norm(want_out, axis=-1)).all(), error.max()
    np.testing.assert_array_equal(np.isinf(lse), np.isinf(want_lse))
    seen = np.isfinite(want_lse)
    np.testing.assert_allclose(lse[seen], want_lse[seen], rtol=1e-6, atol=2e-6)


def run(
    case: Case, v: np.ndarray, s: np.ndarray, with_lse: bool = True, row_major: bool = True, reverse: bool = False,
    sinks: np.ndarray | None = None,
) -> tuple:  # fmt: skip
    """v, s in plain C order; they are laid out as the case says. Row-major: rows lie along y and z of the grid."""
    guarded = Guarded()
    spread = np.zeros((*v.shape[:3], case.head_dim + case.gap), case.v)
    spread[..., : case.head_dim] = v
    if case.swapped:
        v_in = guarded.input(bits(spread.swapaxes(0, 1)), case.vec * case.v.itemsize).swapaxes(0, 1)
        s_in = guarded.input(s.swapaxes(0, 1)).swapaxes(0, 1)
    else:
        v_in, s_in = guarded.input(bits(spread), case.vec * case.v.itemsize), guarded.input(s)
    # 77: must be written over, by zeros too
    out = guarded.output(bits(np.full((case.rows, case.heads, case.head_dim), 77, case.out)), 16)
    lse = guarded.output(np.full((case.rows, case.heads), 77, np.float32))
    v_strides = [stride // case.v.itemsize for stride in v_in.strides]
    s_strides = [stride // 4 for stride in s_in.strides]
    fields = {
        "v": v_in,
        "s": s_in,
        "out": out,
        "v_row_stride": v_strides[0],
        "v_state_stride": v_strides[1],
        "v_head_stride": v_strides[2],
        "s_row_stride": s_strides[0],
        "s_state_stride": s_strides[1],
        "s_head_stride": s_strides[2],
        "rows": case.rows,
        "num_states": case.num_states,
        "heads": case.heads,
        "row_major": row_major,
        "log2_of_base": math.log2(case.base),
        "sinks": None if sinks is None else guarded.input(sinks),
    }
    groups = -(-case.heads // case.warps)
    launch(
        "merge_states",
        (groups, -(-case.rows // 2), 2) if row_major else (case.rows, groups),
        case.warps * 32,
        fields | ({"lse": lse} if with_lse else {}),
        reverse=reverse,
        **constants(case) | {"SINKS": sinks is not None},
    )
    guarded.check()
    return out.view(case.out), lse


def constants(case: Case) -> dict[str, int]:
    return {
        "HEAD_DIM": case.head_dim,
        "VEC": case.vec,
        "BFLOAT16": int(BF16 in (case.v, case.out)),
        "V_FLOAT32": int(case.v == F32),
        "OUT_FLOAT32": int(case.out == F32),
        "SINKS": 0,
    }


def states(case: Case, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    v = numbers(rng, (case.rows, case.num_states, case.heads, case.head_dim), case.v)
    return v, (rng.standard_normal(v.shape[:3]) * 3).astype(np.float32)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_merge_states(case: Case) -> None:
    v, s = states(case)
    want = expected(v, s, case.base)
    out, lse = run(case, v, s)
    assert_close(case, out, lse, *want)
    again, _ = run(case, v, s, with_lse=False, row_major=False, reverse=True)
    np.testing.assert_array_equal(bits(again), bits(out))


@pytest.mark.parametrize("mark", [-np.inf, np.inf])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_empty_states_change_nothing(case: Case, mark: float) -> None:
    """Whatever stands in their v; and a row of nothing but empty states, marked either way, is 0 / -inf."""
    v, s = states(case, 1)
    empty = np.random.default_rng(2).random(s.shape) < 0.5
    empty[0] = True
    s[empty] = mark
    s[:, 1::2][empty[:, 1::2]] = -np.inf
    v[empty] = [np.nan, np.inf][case.num_states % 2]
    out, lse = run(case, v, s)
    assert_close(case, out, lse, *expected(v, s, case.base))
    assert not out[0].any() and (lse[0] == -np.inf).all()


@pytest.mark.parametrize("seed", range(5))
def test_scores_far_apart(seed: int) -> None:
    """Where one state outweighs all others it is the result; a maximum may come in any batch, or past float's exp."""
    case = Case(num_states=50, out=F32, base=[2.0, math.e][seed % 2])
    v, s = states(case, seed)
    s += np.float32([-1e4, 1e4, -300, 300, 0][seed])
    winner = [0, 15, 16, 33, 49][seed]
    s[:, winner] += 200
    out, lse = run(case, v, s)
    np.testing.assert_array_equal(out, v[:, winner].astype(np.float32))
    np.testing.assert_allclose(lse, s[:, winner], rtol=1e-6)


@pytest.mark.parametrize("base", [2.0, math.e])
@pytest.mark.parametrize("sign", [1, -1])
def test_scores_up_to_the_largest_float(sign: int, base: float) -> None:
    """Equal ones share the result, and one that is larger by one step of the last bit takes all of it."""
    case = Case(num_states=40, base=base)
    v, _ = states(case)
    v[:] = v[:, :1]
    for largest in (2.0**30, 2.0**127, np.finfo(np.float32).max):
        s = np.full(v.shape[:3], sign * np.float32(largest))
        out, lse = run(case, v, s)
        np.testing.assert_array_equal(out, v[:, 0])
        np.testing.assert_array_equal(lse, s[:, 0])
    s[:] = sign * 2.0**127
    s[:, 0] = np.nextafter(s[:, 0], np.float32(np.inf))
    v[:, 1:] = 0
    out, lse = run(case, v, s)
    np.testing.assert_array_equal(out, v[:, 0])
    np.testing.assert_array_equal(lse, s[:, 0])


@pytest.mark.parametrize("case", [case for case in CASES if case.head_dim in (128, 112, 40)], ids=str)
def test_sinks(case: Case) -> None:
    """exp(sink), whatever the base, is added to the denominator once, also where no state has seen a key."""
    v, s = states(case)
    s[0] = -np.inf
    sinks = np.linspace(-3, 4, case.heads).astype(np.float32)
    if case.heads > 1:
        sinks[1] = -np.inf
    out, lse = expected(v, s, case.base)
    out, lse = with_sinks(out, lse * math.log(case.base), sinks)
    assert_close(case, *run(case, v, s, sinks=sinks), out, lse / math.log(case.base))


def test_huge_sinks() -> None:
    case = Case(num_states=3, heads=4, out=F32)
    v, s = states(case)
    sinks = np.array([2.0**127, -(2.0**127), np.nan, np.inf], np.float32)
    out, lse = run(case, v, s, sinks=sinks)
    want, want_lse = expected(v, s, case.base)
    assert not out[:, [0, 3]].any() and (lse[:, [0, 3]] == sinks[[0, 3]]).all()
    np.testing.assert_allclose(out[:, 1], want[:, 1], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(lse[:, 1], want_lse[:, 1], rtol=1e-5)
    assert np.isnan(out[:, 2]).all() and np.isnan(lse[:, 2]).all()


def test_a_nan_goes_through() -> None:
    case = Case(num_states=20)
    v, s = states(case)
    s[0, 3, 1] = np.nan
    v[1, 17, 2, 5] = np.nan
    out, lse = run(case, v, s)
    assert np.isnan(out[0, 1]).all() and np.isnan(lse[0, 1])
    assert np.isnan(out[1, 2, 5]) and np.isnan(out).sum() == case.head_dim + 1 and np.isnan(lse).sum() == 1


def test_a_result_past_half_is_infinite() -> None:
    case = Case(v=F32, out=F16, vec=4, num_states=2)
    v, s = states(case)
    v[:] = 1e6
    assert np.isposinf(run(case, v, s)[0]).all()


PAIRS = [
    Case(num_states=2),
    Case(num_states=2, base=2.0, out=F32),
    Case(num_states=2, v=BF16, out=BF16),
    Case(num_states=2, v=F32, out=F32, vec=4),
    Case(num_states=2, v=F32, out=F32, vec=4, head_dim=256),
    Case(num_states=2, head_dim=16),
    Case(num_states=2, head_dim=80, heads=5, warps=3),
    Case(num_states=2, head_dim=256, rows=1),
    Case(num_states=2, head_dim=40, vec=1, gap=3),
    Case(num_states=2, gap=8, head_dim=96),
]


def run_pair(case: Case, v: np.ndarray, s: np.ndarray, in_place: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """The two states stand in arrays of their own; those of b are [heads, rows] inside."""
    guarded = Guarded()
    align = case.vec * case.v.itemsize
    spread = np.zeros((*v.shape[:3], case.head_dim + case.gap), case.v)
    spread[..., : case.head_dim] = v
    v_a = (guarded.output if in_place else guarded.input)(bits(v[:, 0] if in_place else spread[:, 0]), align)
    s_a = (guarded.output if in_place else guarded.input)(s[:, 0])
    v_b = guarded.input(bits(spread[:, 1].swapaxes(0, 1)), align).swapaxes(0, 1)
    s_b = guarded.input(s[:, 1].swapaxes(0, 1)).swapaxes(0, 1)
    out = v_a if in_place else guarded.output(bits(np.full((case.rows, case.heads, case.head_dim), 77, case.out)), 16)
    lse = s_a if in_place else guarded.output(np.full((case.rows, case.heads), 77, np.float32))
    fields = {"v_a": v_a, "v_b": v_b, "s_a": s_a, "s_b": s_b, "out": out, "lse": lse}
    for name in ("v_a", "v_b", "s_a", "s_b"):
        row_stride, head_stride = (stride // fields[name].itemsize for stride in fields[name].strides[:2])
        fields |= {f"{name}_row_stride": row_stride, f"{name}_head_stride": head_stride}
    fields |= {"rows": case.rows, "heads": case.heads, "log2_of_base": math.log2(case.base)}
    launch("merge_state", (case.rows, -(-case.heads // case.warps)), case.warps * 32, fields, **constants(case))
    guarded.check()
    return out.view(case.out), lse


@pytest.mark.parametrize("case", PAIRS, ids=str)
def test_merge_state(case: Case) -> None:
    v, s = states(case)
    assert_close(case, *run_pair(case, v, s), *expected(v, s, case.base))
    for mark in (-np.inf, np.inf):
        s[0, 0], s[1 % case.rows, 1] = mark, mark
        v[np.isinf(s)] = np.nan
        assert_close(case, *run_pair(case, v, s), *expected(v, s, case.base))


@pytest.mark.parametrize("case", [case for case in PAIRS if case.v == case.out and not case.gap], ids=str)
def test_merge_state_in_place(case: Case) -> None:
    v, s = states(case)
    assert_close(case, *run_pair(case, v, s, in_place=True), *expected(v, s, case.base))
