"""The time that other cases of a run predict for a case: by their rate of work, or by the same case in another pool."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tests.cases import BENCH_BASES

POOL = ("layout", "page_size", "dtype")
Line = Mapping[str, Any]


def over_bases(line: Line, earlier: Sequence[Line], work: str) -> dict[str, Any]:
    """Our time over what its bases, among the earlier lines, took for as much work; never less than the read floor.

    The bases of a case are those of BENCH_BASES in the same pool. A case that has none there is compared with itself in
    the first pool it was measured in. work: the figure that counts a case's work. {} where not all bases were measured.
    """
    names = BENCH_BASES.get(line["case"])
    if names:
        bases = [other for other in earlier if other["case"] in names and _pool(other) == _pool(line)]
    else:
        names = (line["case"],)
        bases = [other for other in earlier if other["case"] in names][:1]
    if len(bases) != len(names):
        return {}
    rate = sum(base[work] for base in bases) / sum(base["run_us"]["median"] for base in bases)
    expected = max(line[work] / rate, line["read_floor_us"]["median"])
    return {
        "bases": [{"case": base["case"], **_pool(base)} for base in bases],
        "over_bases": round(line["run_us"]["median"] / expected, 4),
    }


def _pool(line: Line) -> dict[str, Any]:
    return {name: line[name] for name in POOL}
