"""Execute notebooks in place and save them with their outputs: ``python notebooks/execute.py [--cpu] [PATH ...]``.

Without a path it takes every notebook of this folder. A notebook runs on a GPU where there is one, and its metadata
says under "paged_attn" what it ran on: the card ("cpu" where there was none), the date, the versions, and a hash of the
code that its outputs are of. Outputs of a GPU are not replaced by those of a CPU unless --cpu says so.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
from nbclient import NotebookClient

import paged_attn as pa

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent
CPU = "cpu"  # the card of a machine that has none


def main(arguments: Sequence[str] | None = None) -> None:
    """Execute the notebooks that the command line names; SystemExit before the first if one must stay as it is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("notebooks", nargs="*", type=Path, metavar="PATH", help="default: all in this folder")
    parser.add_argument("--cpu", action="store_true", help="on a machine without a GPU, replace outputs of a GPU, too")
    options = parser.parse_args(arguments)
    paths = options.notebooks or sorted(FOLDER.glob("*.ipynb"))
    notebooks = {path: nbformat.read(path, as_version=4) for path in paths}
    cards = {path: notebook.metadata.get("paged_attn", {}).get("card", CPU) for path, notebook in notebooks.items()}
    on_gpu = {str(path): card for path, card in cards.items() if card != CPU}
    if on_gpu and not options.cpu and environment()["card"] == CPU:
        held = "; ".join(f"{path} holds outputs of {card}" for path, card in on_gpu.items())
        raise SystemExit(
            f"{held}, and paged_attn sees no GPU here (python -m paged_attn doctor says why); nothing was executed. "
            "Execute on a machine with a GPU, or a copy, or pass --cpu to replace the outputs by those of this CPU"
        )
    for path, notebook in notebooks.items():
        execute(notebook)
        notebook.metadata["paged_attn"] = environment() | {"code": code_hash(notebook)}
        nbformat.write(notebook, path)
        print(f"{path}: executed on {notebook.metadata['paged_attn']['card']}")


def execute(notebook: nbformat.NotebookNode, folder: Path = FOLDER) -> None:
    """Run every cell in a new kernel in `folder`, with this checkout's package; CellExecutionError if one fails."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    client = NotebookClient(notebook, timeout=300, record_timing=False, resources={"metadata": {"path": str(folder)}})
    client.execute(env=os.environ | {"PYTHONPATH": path})
    notebook.metadata["language_info"] = {"name": "python"}  # no version: it is in metadata.paged_attn


def environment() -> dict[str, Any]:
    """The card that a notebook runs on, versions and date."""
    card, versions = CPU, {"paged_attn": pa.__version__, "python": platform.python_version(), "numpy": np.__version__}
    if pa.supports("decode", device="cuda"):
        import cupy

        card = cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()
        versions |= {
            "cupy": cupy.__version__,
            "nvrtc": ".".join(map(str, cupy.cuda.nvrtc.getVersion())),
            "cuda_driver": str(cupy.cuda.runtime.driverGetVersion()),
        }
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"card": card, "date": date, "versions": versions}


def code_hash(notebook: nbformat.NotebookNode) -> str:
    """SHA-256 of all code cells."""
    text = "\0".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    return hashlib.sha256(text.encode()).hexdigest()


if __name__ == "__main__":
    main()
