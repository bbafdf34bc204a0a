"""Pictures of what is recorded in bench/results: times beside the floor, curves over lengths, rooflines."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Lines = Sequence[dict[str, Any]]
Groups = Mapping[str, Sequence[Any]]
OURS = "paged_attn"
CONTIGUOUS = ("fa3", "cudnn")  # peers whose keys and values have no pages
STYLES = ("o-", "s--", "^:", "v-.", "x-")  # of page sizes, the smallest first


def newest(lines: Iterable[dict[str, Any]], wanted: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A line of each case and page size, of those that have the wanted settings (None: are without): the last one.

    Of several cards and sources only those of the last line are taken, and of their lines the one with the most peers.
    """
    chosen = [line for line in lines if all(line.get(name) == value for name, value in wanted.items())]
    of_last = [line for line in chosen if _sources(line) == _sources(chosen[-1])]
    by_peers = sorted(of_last, key=lambda line: len(line.get("peers", {})))  # in their order where these are as many
    return list({(line["case"], line["page_size"]): line for line in by_peers}.values())


def _sources(line: dict[str, Any]) -> tuple[str, str | None]:
    return line["card"], line.get("source_hash")


def times(line: dict[str, Any]) -> dict[str, float]:
    """Median microseconds of ours and of each peer that has a time."""
    peers = {name: found["median"] for name, found in line.get("peers", {}).items() if "median" in found}
    return {OURS: line["run_us"]["median"], **peers}


def of_group(lines: Lines, cases: Iterable[Any], page_size: int | None = None) -> list[dict[str, Any]]:
    """The lines of a group's cases, in its order, of one page size where one is named."""
    pages = [line for line in lines if page_size in (None, line["page_size"])]
    return [line for case in cases for line in pages if line["case"] == case.name]


def decode(lines: Lines, groups: Groups, page_size: int) -> Any:
    """The headline cases on the floor, a roofline, and time over kv_len and over the batch size."""
    figure, ((headline, roof), (lengths, batches)) = _figure(lines, 2, 2)
    _bars(headline, of_group(lines, groups["headline"], page_size), "time / read floor", _over_floor)
    headline.axvline(1, color="0.3", linewidth=1)
    _roofline(roof, lines)
    for panel, name, label in ((lengths, "kv_len", "kv_len, batch 1"), (batches, "batch", "batch size, kv_len 2048")):
        sizes = {case.name: case.kv_lens[0] if name == "kv_len" else case.batch_size for case in groups[name]}
        chosen = of_group(lines, groups[name], page_size)
        if not chosen:
            panel.set_axis_off()
            continue
        floor = [line["read_floor_us"]["median"] for line in chosen]
        panel.plot([sizes[line["case"]] for line in chosen], floor, color="0.3", linewidth=1, label="read floor")
        _curves(panel, chosen, sizes, lambda line, time: time)
        panel.set(xlabel=label, ylabel="microseconds", xscale="log", yscale="log")
        panel.legend(fontsize=8)
    return figure


def prefill(lines: Lines, groups: Groups, page_size: int) -> Any:
    """TFLOP/s of the headline cases and over the sequence length, and a roofline."""
    figure, ((headline, curves, roof),) = _figure(lines, 1, 3)
    _bars(headline, of_group(lines, groups["headline"], page_size), "TFLOP/s", _tflops)
    _curves(
        curves, of_group(lines, groups["length"]), {case.name: case.kv_lens[0] for case in groups["length"]}, _tflops
    )
    if curves.lines:
        curves.set(xlabel="sequence length, batch 1, causal", ylabel="TFLOP/s", xscale="log")
        curves.set_ylim(bottom=0)
        curves.legend(fontsize=8)
    else:
        curves.set_axis_off()
    _roofline(roof, lines)
    return figure


FIGURES: dict[str, Callable[[Lines, Groups, int], Any]] = {"decode": decode, "prefill": prefill}


def save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _figure(lines: Lines, rows: int, columns: int) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        rows, columns, figsize=(6.5 * columns, 5 * rows), layout="constrained", squeeze=False
    )
    last = lines[-1]
    figure.suptitle(f"{last['bench']}, {last['layout']}, {last['dtype']}, {last['card']}, {last['date'][:10]}")
    return figure, axes


def _over_floor(line: dict[str, Any], time: float) -> float:
    return time / line["read_floor_us"]["median"]


def _tflops(line: dict[str, Any], time: float) -> float:
    return line["gflop"] / time * 1e3


def _libraries(lines: Lines) -> list[str]:
    """Ours first; the order gives each its colour."""
    return list(dict.fromkeys(name for line in lines for name in times(line)))


def _bars(panel: Any, lines: Lines, label: str, value: Callable[[dict[str, Any], float], float]) -> None:
    libraries = _libraries(lines)
    height = 0.8 / max(len(libraries), 1)
    for i, library in enumerate(libraries):
        here = [(row, value(line, times(line)[library])) for row, line in enumerate(lines) if library in times(line)]
        bars = panel.barh([row + i * height for row, _ in here], [width for _, width in here], height, label=library)
        panel.bar_label(bars, fmt="%.3g", fontsize=7, padding=2)
    panel.set_yticks([row + (len(libraries) - 1) * height / 2 for row in range(len(lines))])
    panel.set_yticklabels([line["case"] for line in lines])
    panel.invert_yaxis()
    panel.set_xlabel(label)
    if libraries:
        panel.legend(fontsize=8)


def _curves(
    panel: Any, lines: Lines, sizes: Mapping[str, int], value: Callable[[dict[str, Any], float], float]
) -> None:
    """A curve for each library and page size; one for a library that has no pages."""
    page_sizes = sorted({line["page_size"] for line in lines})
    for color, library in enumerate(_libraries(lines)):
        without_pages = library in CONTIGUOUS
        for page_size, style in zip(page_sizes[:1] if without_pages else page_sizes, STYLES, strict=False):
            here = [line for line in lines if line["page_size"] == page_size and library in times(line)]
            x, y = [sizes[line["case"]] for line in here], [value(line, times(line)[library]) for line in here]
            label = f"{library}, {'contiguous' if without_pages else f'page {page_size}'}"
            panel.plot(x, y, style, color=f"C{color}", markersize=3, label=label)


def _roofline(panel: Any, lines: Lines) -> None:
    """TFLOP/s over FLOP per byte of K and V; the roof is the best bandwidth that a read floor showed."""
    bandwidth = max(line["kv_mb"] / line["read_floor_us"]["median"] for line in lines)  # TB/s
    intensity = [line["gflop"] * 1e3 / line["kv_mb"] for line in lines]
    ends = [min(intensity), max(intensity)]
    panel.plot(ends, [bandwidth * x for x in ends], color="0.3", linewidth=1, label=f"reading at {bandwidth:.2f} TB/s")
    for library in _libraries(lines):
        here = [(x, line) for x, line in zip(intensity, lines, strict=True) if library in times(line)]
        y = [_tflops(line, times(line)[library]) for _, line in here]
        panel.plot([x for x, _ in here], y, "o", markersize=4, alpha=0.7, label=library)
    panel.set(xlabel="FLOP / byte of K and V", ylabel="TFLOP/s", xscale="log", yscale="log")
    panel.set_ylim(top=2 * max(_tflops(line, time) for line in lines for time in times(line).values()))
    panel.legend(fontsize=8)
