"""Every notebook runs on the reference backend as it stands, and is committed with the outputs of a whole run."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient.exceptions import CellExecutionError

import paged_attn as pa
from notebooks.execute import code_hash, environment, execute, main

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
NUM_PICTURES = {
    "01_quickstart": 3,  # the page table, the masks of prefill, decode against the read floor
    "02_kv_sequence_parallelism": 2,  # two halves of a softmax, the ranks that store pages
}
SHOWS_RECORDS = "01_quickstart"  # one picture fewer where bench/results is empty

# Whose committed outputs are a GPU's: `python notebooks/execute.py` on a machine with a card makes them so.
COMMITTED_FROM_GPU = {"01_quickstart", "02_kv_sequence_parallelism"}


def read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(cell: nbformat.NotebookNode) -> str:
    return "".join(output.text for output in cell.outputs if output.output_type == "stream" and output.name == "stdout")


def pictures(notebook: nbformat.NotebookNode) -> list[Any]:
    return [o for cell in code_cells(notebook) for o in cell.outputs if "image/png" in o.get("data", {})]


def assert_whole_run(notebook: nbformat.NotebookNode) -> None:
    """Every cell ran, in order, printed or drew something, and warned of nothing."""
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        kinds = {output.get("name", output.output_type) for output in cell.outputs}
        assert kinds, f"no output of {cell.source}"
        assert kinds <= {"stdout", "display_data"}, f"{kinds} of {cell.source}"


@pytest.fixture
def no_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # the kernel is a process of its own


def record(folder: Path) -> None:
    """Two lines as bench/ writes them, the first one of an older run."""
    results = folder / "bench" / "results" / "decode.jsonl"
    results.parent.mkdir(parents=True)
    with results.open("w") as file:
        for date, run in (("2026-01-01", 99.0), ("2026-01-02", 14.4)):
            line = {"bench": "decode", "case": "bs1_4k_g4", "layout": "NHD", "page_size": 16, "dtype": "float16"}
            times = {"read_floor_us": {"median": 12.0}, "run_us": {"median": run}}
            file.write(json.dumps({**line, **times, "card": "a card", "date": date}) + "\n")


@pytest.mark.parametrize(
    ("name", "is_recorded"), [(path.stem, True) for path in NOTEBOOKS] + [(SHOWS_RECORDS, False)], ids=str
)
@pytest.mark.usefixtures("no_card")
def test_it_runs_on_the_reference_backend(name: str, is_recorded: bool, tmp_path: Path) -> None:
    if is_recorded:
        record(tmp_path)
    notebook = read(FOLDER / f"{name}.ipynb")
    execute(notebook, tmp_path)
    assert_whole_run(notebook)
    assert len(pictures(notebook)) == NUM_PICTURES[name] - (not is_recorded)
    assert "numpy arrays on the CPU" in printed(code_cells(notebook)[0])


@pytest.mark.usefixtures("no_card")
def test_the_quickstart_shows_what_it_says(tmp_path: Path) -> None:
    notebook = read(FOLDER / "01_quickstart.ipynb")
    execute(notebook, tmp_path)
    output = "".join(map(printed, code_cells(notebook)))
    assert "seq_lens      [15  5 10]" in output
    assert output.count("LayoutMismatchError: kv ") == 2
    assert "was made for NHD" in output and "the shape fits layout NHD" in output
    assert "difference of the results 0.0" in output
    assert "last rows against decode: 0.0" in output
    assert "3 sequences of 12 tokens hold 7 pages, 1 of them shared" in output


@pytest.mark.usefixtures("no_card")
def test_kv_sequence_parallelism_shows_what_it_says(tmp_path: Path) -> None:
    notebook = read(FOLDER / "02_kv_sequence_parallelism.ipynb")
    execute(notebook, tmp_path)
    output = "".join(map(printed, code_cells(notebook)))
    differences = re.findall(r"(?:out|lse) +(\d+e[+-]\d+)", output)
    assert len(differences) == 10 and max(map(float, differences)) < 2e-6
    assert "request 0: the query sees keys in chunks [3]" in output and "[60 60 60 56] see a key" in output
    assert "the same bits on all ranks: True" in output
    assert "all-gather, 18720 bytes\nby hand: 18720 bytes" in output
    assert "ranks 0, 2, 3 said 200; rank 1 said 201" in output


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_committed_with_the_outputs_of_its_code(path: Path) -> None:
    notebook = read(path)
    nbformat.validate(notebook)
    assert_whole_run(notebook)
    metadata = notebook.metadata["paged_attn"]
    again = "run `python notebooks/execute.py`"
    assert metadata["code"] == code_hash(notebook), f"{path.name} was edited after it was executed; {again}"
    assert metadata["date"] and set(metadata["versions"]) >= {"paged_attn", "python", "numpy"}
    first = printed(code_cells(notebook)[0])
    if path.stem in COMMITTED_FROM_GPU:
        assert metadata["card"] != "cpu", f"{path.name} was executed without a card; {again} on a machine with one"
        assert f"cupy arrays on {metadata['card']}" in first
        assert metadata["versions"].keys() >= {"cupy", "nvrtc", "cuda_driver"}
        assert len(pictures(notebook)) == NUM_PICTURES[path.stem], f"{again} after `python -m bench decode`"
    else:
        assert metadata["card"] == "cpu"
        assert "numpy arrays on the CPU" in first


def test_the_environment_has_a_card_and_versions() -> None:
    found = environment()
    assert found["card"] and "T" in found["date"]
    assert all(isinstance(version, str) and version for version in found["versions"].values())


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    """A notebook of one cell with the outputs of a GPU."""
    cell = nbformat.v4.new_code_cell("print('executed')")
    notebook = nbformat.v4.new_notebook(cells=[cell], metadata={"paged_attn": {"card": "NVIDIA H200"}})
    path = tmp_path / "recorded.ipynb"
    nbformat.write(notebook, path)
    return path


def test_outputs_of_a_gpu_stay_where_there_is_none(recorded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pa, "supports", lambda operation, device: False)
    before = recorded.read_bytes()
    other = recorded.with_name("never_executed.ipynb")
    nbformat.write(nbformat.v4.new_notebook(), other)
    message = r"recorded.ipynb holds outputs of NVIDIA H200, and paged_attn sees no GPU here .* pass --cpu to replace"
    with pytest.raises(SystemExit, match=message):
        main([str(other), str(recorded)])
    assert recorded.read_bytes() == before
    assert "paged_attn" not in read(other).metadata  # nothing of the list was executed
    main([str(other)])
    assert read(other).metadata["paged_attn"]["card"] == "cpu"


def test_outputs_of_a_gpu_are_replaced_where_one_says_so(recorded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pa, "supports", lambda operation, device: False)
    main(["--cpu", str(recorded)])
    assert read(recorded).metadata["paged_attn"]["card"] == "cpu"
    assert printed(read(recorded).cells[0]) == "executed\n"


@pytest.mark.gpu
def test_outputs_of_a_gpu_are_replaced_by_those_of_a_gpu(recorded: Path) -> None:
    main([str(recorded)])
    assert read(recorded).metadata["paged_attn"]["card"] not in ("cpu", "")
    assert printed(read(recorded).cells[0]) == "executed\n"


@pytest.mark.usefixtures("no_card")
def test_a_cell_that_fails_fails_the_run(tmp_path: Path) -> None:
    cell = nbformat.v4.new_code_cell("import paged_attn as pa\npa.Layout('NDH')")
    notebook = nbformat.v4.new_notebook(cells=[cell])
    with pytest.raises(CellExecutionError, match="NDH"):
        execute(notebook, tmp_path)


def test_an_edit_without_a_run_is_seen() -> None:
    notebook = read(NOTEBOOKS[0])
    before = code_hash(notebook)
    code_cells(notebook)[3]["source"] += "\n"
    assert code_hash(notebook) != before
    code_cells(notebook)[3]["outputs"] = []
    with pytest.raises(AssertionError, match="no output of"):
        assert_whole_run(notebook)
