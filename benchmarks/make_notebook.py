"""Makes train_inference.ipynb of train_inference.py, and runs it with --demo, so that its outputs are real.

python benchmarks/make_notebook.py
"""

import os
from pathlib import Path

import jupytext
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
ARGUMENTS = "parser.parse_args()"
ARGUMENTS_HERE = 'parser.parse_args(["--demo", "--output-dir", "output-notebook", "--overwrite"])'


def main() -> None:
    source = (ROOT / "train_inference.py").read_text(encoding="utf-8")
    assert ARGUMENTS in source
    notebook = jupytext.reads(source.replace(ARGUMENTS, ARGUMENTS_HERE), fmt="py:percent")
    notebook.metadata["kernelspec"] = {"display_name": "Python 3", "language": "python", "name": "python3"}
    os.environ["PYTHONWARNINGS"] = "ignore"  # tqdm asks for ipywidgets
    NotebookClient(notebook, timeout=3600, resources={"metadata": {"path": str(ROOT)}}).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times of day, which change with every run
        merge_streams(cell)
    jupytext.write(notebook, ROOT / "train_inference.ipynb", fmt="ipynb")


def merge_streams(cell: dict) -> None:
    """One output for the lines that a cell printed, in place of one for each."""
    merged: list[dict] = []
    for output in cell.get("outputs", []):
        last = merged[-1] if merged else {}
        if output["output_type"] == "stream" and last.get("name") == output["name"]:
            last["text"] += output["text"]
        else:
            merged.append(output)
    if "outputs" in cell:
        cell["outputs"] = merged


if __name__ == "__main__":
    main()
