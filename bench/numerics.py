"""The study of errors: `python -m bench.numerics`, on a machine with an NVIDIA GPU.

One request of 16 to 262,144 keys; decode of one query, and causal prefill of the last 16; float16 and bfloat16; with
and without a soft cap; scores from tiny to extreme. Everything is compared with float64 (exact.cu), FlashInfer too
where it can be imported. Writes results/numerics.jsonl and results/numerics.png and prints a table. The exit status is
1 where a result was not finite, or worse than FlashInfer's.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import rich
from rich.progress import track
from rich.table import Table

import paged_attn as pa
from tests.cases import DTYPES

from . import record
from .workload import random_normal, to_host

NUM_QO_HEADS, NUM_KV_HEADS, HEAD_DIM, PAGE_SIZE = 8, 2, 128, 16
QUERIES = {"decode": 1, "prefill": 16}
DTYPES_16 = ("float16", "bfloat16")
KV_LENS = tuple(4**power for power in range(2, 10))
SOFT_CAPS = (0.0, 30.0)
# Standard deviation of the scores (before a soft cap) of random queries and keys.
RANDOM_SCORES = {"tiny": 0.01, "unit": 1.0, "large": 10.0}
# Every key's score, and that of one key in the middle.
CHOSEN_SCORES = {"all -64": (-64.0, -64.0), "one +20": (0.0, 20.0), "all equal": (0.0, 0.0)}
SCORES = (*RANDOM_SCORES, *CHOSEN_SCORES)
OURS = "paged_attn"

# What counts as worse: an error 10% larger, and by more than the result's own format can show.
WORSE = 1.1
OUT_ROUNDING = {"float16": 2.0**-11, "bfloat16": 2.0**-8}
ROUNDINGS = 0.02
LSE_ROUNDING = 1e-5  # of a float32 of size 64, and the logarithm's


@dataclass(frozen=True)
class Point:
    """One measurement."""

    kind: str  # "decode" or "prefill"
    dtype: str
    scores: str
    logits_soft_cap: float
    kv_len: int

    @property
    def sm_scale(self) -> float:
        """An eighth where scores are chosen, which makes them exact."""
        return 0.125 if self.scores in CHOSEN_SCORES else HEAD_DIM**-0.5


def points(max_kv_len: int = KV_LENS[-1]) -> list[Point]:
    kv_lens = [kv_len for kv_len in KV_LENS if kv_len <= max_kv_len]
    return list(itertools.starmap(Point, itertools.product(QUERIES, DTYPES_16, SCORES, SOFT_CAPS, kv_lens)))


# -- inputs ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """A point's arrays: q [rows, heads, dim], NHD pools, page ids of the request (int32, in order)."""

    point: Point
    q: Any
    k_pages: Any
    v_pages: Any
    page_ids: Any

    def table(self) -> pa.PageTable:
        last_page_len = (self.point.kv_len - 1) % PAGE_SIZE + 1
        upload = np.asarray if isinstance(self.page_ids, np.ndarray) else _cupy().asarray
        indptr, last = (upload(np.array(x, np.int32)) for x in ([0, self.page_ids.size], [last_page_len]))
        return pa.PageTable(indptr, self.page_ids, last, page_size=PAGE_SIZE)

    def qo_indptr(self) -> np.ndarray:
        return np.array([0, len(self.q)], np.int32)


class Inputs:
    """The arrays of all points of a dtype with up to max_kv_len keys, in the memory of `xp` (numpy or cupy)."""

    def __init__(self, xp: ModuleType, dtype: str, max_kv_len: int) -> None:
        self._xp, self._dtype = xp, DTYPES[dtype]
        shape = _pool_shape(max_kv_len)
        self._k, self._v = (random_normal(xp, shape, self._dtype, seed) for seed in (1, 2))

    def problem(self, point: Point) -> Problem:
        shape = (QUERIES[point.kind], NUM_QO_HEADS, HEAD_DIM)
        num_pages = _pool_shape(point.kv_len)[0]
        page_ids = np.random.default_rng(0).permutation(num_pages).astype(np.int32)
        if point.scores in RANDOM_SCORES:
            q = np.random.default_rng(3).standard_normal(shape) * RANDOM_SCORES[point.scores]
            k_pages = self._k[:num_pages]
        else:  # column 0 alone makes the scores: 8 * key / 8
            q = np.zeros(shape)
            q[..., 0] = 8
            usual, chosen = self._bits(np.array(CHOSEN_SCORES[point.scores]))
            k = np.zeros(_pool_shape(point.kv_len), np.uint16)
            k[..., 0] = usual
            middle = point.kv_len // 2
            k[page_ids[middle // PAGE_SIZE], middle % PAGE_SIZE, :, 0] = chosen
            k_pages = self._upload(k)
        return Problem(point, self._upload(self._bits(q)), k_pages, self._v[:num_pages], self._xp.asarray(page_ids))

    def _bits(self, array: np.ndarray) -> np.ndarray:
        return array.astype(self._dtype).view(np.uint16)

    def _upload(self, bits: np.ndarray) -> Any:
        return self._xp.asarray(bits).view(self._dtype)


def _pool_shape(kv_len: int) -> tuple[int, int, int, int]:
    return -(-kv_len // PAGE_SIZE), PAGE_SIZE, NUM_KV_HEADS, HEAD_DIM


# -- who computes it ---------------------------------------------------------------------------------------------------

Answer = tuple[np.ndarray, np.ndarray]  # out [rows, heads, dim], lse [rows, heads] (natural), float64 on the host


def ours(problem: Problem) -> Answer:
    """paged_attn, on the device of the arrays."""
    point, table = problem.point, problem.table()
    kv = pa.PagedKV(problem.k_pages, problem.v_pages, layout="NHD")
    options: dict[str, Any] = {"sm_scale": point.sm_scale, "logits_soft_cap": point.logits_soft_cap, "return_lse": True}
    if point.kind == "decode":
        return _on_host(*pa.decode(problem.q, kv, table, **options))
    return _on_host(*pa.prefill(problem.q, problem.qo_indptr(), kv, table, **options))


def _on_host(out: Any, lse: Any) -> Answer:
    return to_host(out).astype(np.float64), to_host(lse).astype(np.float64)


def exact_on_cpu(problem: Problem) -> Answer:
    """The reference backend in float64; NumPy arrays."""
    arrays = (problem.q, problem.k_pages, problem.v_pages)
    q, k_pages, v_pages = (array.astype(np.float64) for array in arrays)
    return ours(Problem(problem.point, q, k_pages, v_pages, problem.page_ids))


class ExactOnGpu:
    """exact.cu; CuPy arrays."""

    def __init__(self) -> None:
        text = Path(__file__).with_name("exact.cu").read_text()
        self._kernels = {
            dtype: _cupy()
            .RawModule(code=text, options=("-std=c++17", f"-DHEAD_DIM={HEAD_DIM}", f"-DBFLOAT16={bfloat16}"))
            .get_function("exact_attention")
            for bfloat16, dtype in enumerate(DTYPES_16)
        }

    def __call__(self, problem: Problem) -> Answer:
        cupy, point = _cupy(), problem.point
        rows = len(problem.q)
        out, lse = cupy.empty(problem.q.shape, np.float64), cupy.empty(problem.q.shape[:2], np.float64)
        arrays = (array.view(np.uint16) for array in (problem.q, problem.k_pages, problem.v_pages))
        sizes = (rows, NUM_QO_HEADS, NUM_KV_HEADS, PAGE_SIZE, point.kv_len)
        scales = (point.sm_scale, point.logits_soft_cap)
        self._kernels[point.dtype](
            (rows, NUM_QO_HEADS), (512,),
            (*arrays, problem.page_ids, out, lse, *map(np.int32, sizes), *map(np.float64, scales)),
            shared_mem=16 * (HEAD_DIM + 2) * 8,
        )  # fmt: skip
        return _on_host(out, lse)


class FlashInfer:
    """FlashInfer's kernels; ImportError where it or PyTorch is missing."""

    def __init__(self) -> None:
        import torch

        flashinfer = import_module("flashinfer")
        self._torch, self.version = torch, flashinfer.__version__
        workspace = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
        decode, prefill = flashinfer.BatchDecodeWithPagedKVCacheWrapper, flashinfer.BatchPrefillWithPagedKVCacheWrapper
        self._wrappers = {
            ("decode", "flashinfer"): decode(workspace, "NHD", use_tensor_cores=False),
            ("decode", "flashinfer tensor cores"): decode(workspace, "NHD", use_tensor_cores=True),
            ("prefill", "flashinfer"): prefill(workspace, "NHD"),
        }

    def answers(self, problem: Problem) -> dict[str, Answer]:
        """By the name of the kernel."""
        point = problem.point
        names = [name for kind, name in self._wrappers if kind == point.kind]
        return {name: self._answer(self._wrappers[point.kind, name], problem) for name in names}

    def _answer(self, wrapper: Any, problem: Problem) -> Answer:
        torch, point = self._torch, problem.point
        dtype = getattr(torch, point.dtype)
        table = problem.table()
        arrays = [torch.from_numpy(to_host(x)) for x in (table.indptr, problem.page_ids, table.last_page_len)]
        options = {
            "sm_scale": point.sm_scale,
            "logits_soft_cap": point.logits_soft_cap or None,
            "q_data_type": dtype,
            "kv_data_type": dtype,
        }
        sizes = (NUM_QO_HEADS, NUM_KV_HEADS, HEAD_DIM, PAGE_SIZE)
        if point.kind == "decode":
            wrapper.plan(*arrays, *sizes, **options)
        else:
            wrapper.plan(torch.from_numpy(problem.qo_indptr()), *arrays, *sizes, causal=True, **options)
        q, k_pages, v_pages = (
            torch.from_dlpack(array.view(np.uint16)).view(dtype)
            for array in (problem.q, problem.k_pages, problem.v_pages)
        )
        out, lse = wrapper.run(q, (k_pages, v_pages), return_lse=True)
        return out.double().cpu().numpy(), lse.double().cpu().numpy() * math.log(2)


def _cupy() -> ModuleType:
    import cupy

    return cupy


# -- errors ------------------------------------------------------------------------------------------------------------


def errors(answer: Answer, exact: Answer) -> dict[str, Any]:
    """Relative errors of out: of all rows together and of the worst row (norms); the largest error of lse."""
    (out, lse), (exact_out, exact_lse) = answer, exact
    difference, size = (np.linalg.norm(x, axis=-1) for x in (out - exact_out, exact_out))
    return {
        "finite": bool(np.isfinite(out).all() and np.isfinite(lse).all()),
        "out_error": float(np.linalg.norm(difference) / np.linalg.norm(size)),
        "worst_row_error": float((difference / size).max()),
        "lse_error": float(np.abs(lse - exact_lse).max()),
    }


def study(
    some_points: Iterable[Point],
    problem_of: Callable[[Point], Problem],
    exact: Callable[[Problem], Answer],
    peers: Callable[[Problem], dict[str, Answer]] | None = None,
) -> list[dict[str, Any]]:
    """One line for each point and library."""
    lines = []
    for point in some_points:
        problem = problem_of(point)
        right = exact(problem)
        answers = {OURS: ours(problem)} | (peers(problem) if peers else {})
        lines += [asdict(point) | {"library": name} | errors(answer, right) for name, answer in answers.items()]
    return lines


def complaints(lines: Sequence[dict[str, Any]]) -> list[str]:
    """Where ours is not finite, or worse than a peer of the same point."""
    found = []
    mine = {_point(line): line for line in lines if line["library"] == OURS}
    for line in lines:
        ours, where = mine[_point(line)], ", ".join(map(str, _point(line)))
        if line is ours:
            if not ours["finite"]:
                found.append(f"{where}: a result is not finite")
            continue
        floors = {"out_error": ROUNDINGS * OUT_ROUNDING[line["dtype"]], "lse_error": LSE_ROUNDING}
        found += [
            f"{where}: {name} is {ours[name]:.3g}, {line['library']}'s {line[name]:.3g}"
            for name, floor in floors.items()
            if ours[name] > max(WORSE * line[name], line[name] + floor)
        ]
    return found


def _point(line: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(line[name] for name in Point.__dataclass_fields__)


# -- what is shown -----------------------------------------------------------------------------------------------------


def table_of(lines: Sequence[dict[str, Any]], title: str) -> Table:
    """Our error / the best peer's, by kv_len."""
    kv_lens = sorted({line["kv_len"] for line in lines})
    table = Table(title=f"{title}: ||out - exact|| / ||exact||, ours / best peer")
    for name in ("kind", "dtype", "scores", "cap"):
        table.add_column(name, no_wrap=True)
    for kv_len in kv_lens:
        table.add_column(f"{kv_len}", justify="right")
    rows: dict[tuple[Any, ...], dict[int, list[float]]] = {}
    for line in lines:  # ours is the first of a point
        rows.setdefault(_point(line)[:-1], {}).setdefault(line["kv_len"], []).append(line["out_error"])
    for names, by_len in rows.items():
        cells = (by_len[kv_len] for kv_len in kv_lens)
        shown = (f"{mine:.1e}" + (f" / {min(others):.1e}" if others else "") for mine, *others in cells)
        table.add_row(*map(str, names), *shown)
    return table


def plot(lines: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Errors of out over kv_len: a panel for each kind and dtype, a colour for the scores, dashes for the soft cap."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(QUERIES), len(DTYPES_16), figsize=(12, 9), sharex=True, sharey="col")
    for (row, kind), (column, dtype) in itertools.product(enumerate(QUERIES), enumerate(DTYPES_16)):
        panel = axes[row][column]
        panel.set_title(f"{kind}, {dtype}")
        panel.axhline(OUT_ROUNDING[dtype] / math.sqrt(3), color="0.8", linewidth=4, label="rounding of out")
        for (color, scores), cap in itertools.product(enumerate(SCORES), SOFT_CAPS):
            for library in sorted({line["library"] for line in lines}):
                wanted = {"kind": kind, "dtype": dtype, "scores": scores, "logits_soft_cap": cap, "library": library}
                chosen = [line for line in lines if all(line[name] == value for name, value in wanted.items())]
                x, y = ([line[name] for line in chosen] for name in ("kv_len", "out_error"))
                style: dict[str, Any]
                if library == OURS:
                    style = {"linestyle": "--" if cap else "-", "label": None if cap else scores}
                else:
                    style = {"linestyle": "", "marker": "+" if "tensor" in library else "x", "alpha": 0.5}
                panel.plot(x, y, color=f"C{color}", **style)
        panel.set_xscale("log", base=4)
        panel.set_yscale("log")
        panel.grid(alpha=0.3)
        panel.set_xlabel("kv_len")
    axes[0][0].set_ylabel("||out - exact|| / ||exact||")
    axes[1][0].set_ylabel("||out - exact|| / ||exact||")
    axes[0][0].legend(fontsize=8)
    figure.suptitle(f"{title}\nlines: paged_attn (dashed: soft cap 30); x and +: FlashInfer, + with tensor cores")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    """The study on the current GPU."""
    parser = argparse.ArgumentParser(prog="python -m bench.numerics", description=__doc__)
    parser.add_argument("--max-kv-len", type=int, default=KV_LENS[-1])
    parser.add_argument("--no-peers", action="store_true", help="leave FlashInfer out")
    parser.add_argument("--json", type=Path, default=record.RESULTS / "numerics.jsonl", metavar="PATH")
    options = parser.parse_args(arguments)
    try:
        peer = None if options.no_peers else FlashInfer()
    except ImportError as error:
        rich.print(f"FlashInfer is left out: {error}")
        peer = None
    environment = record.environment() | {"command": "python -m bench.numerics"}
    if peer:
        environment["versions"]["flashinfer"] = peer.version
    cupy, exact = _cupy(), ExactOnGpu()
    inputs = {dtype: Inputs(cupy, dtype, options.max_kv_len) for dtype in DTYPES_16}
    lines = study(
        track(points(options.max_kv_len), "errors"),
        lambda point: inputs[point.dtype].problem(point),
        exact,
        peer.answers if peer else None,
    )
    pa.status()
    options.json.unlink(missing_ok=True)
    for line in lines:
        record.append(options.json, {"bench": "numerics", **line, **environment})
    title = f"errors on {environment['card']}, {environment['date']}"
    rich.print(table_of(lines, title))
    plot(lines, options.json.with_suffix(".png"), title)
    found = complaints(lines)
    for complaint in found:
        rich.print(f"[red]{complaint}[/]")
    rich.print(f"{len(lines)} lines written to {options.json}, plot beside it; {len(found)} complaints")
    return int(bool(found))


if __name__ == "__main__":
    raise SystemExit(main())
