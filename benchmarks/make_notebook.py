"""Makes train_inference.ipynb of train_inference.py and runs it, so that its outputs are real: `make notebook`.

In a notebook the script is its demo. It takes some minutes, and leaves its checkpoints in output-notebook/.
"""

import os
from pathlib import Path

import jupytext
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
SCRIPT, NOTEBOOK = ROOT / "train_inference.py", ROOT / "train_inference.ipynb"


def main() -> None:
    notebook = jupytext.read(SCRIPT, fmt="py:percent")
    notebook.metadata["kernelspec"] = {"display_name": "Python 3", "language": "python", "name": "python3"}
    os.environ |= {"TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore"}  # a page cannot show bars; tqdm warns of that
    client = NotebookClient(
        notebook,
        timeout=None,
        coalesce_streams=True,  # one output for the lines of a cell
        record_timing=False,  # times of day, which change with every run
        resources={"metadata": {"path": str(ROOT)}},
    )
    client.execute()
    for output in (output for cell in notebook.cells for output in cell.get("outputs", [])):
        output.text = output.text.replace(f"{ROOT}/", "")  # this machine's folder
    jupytext.write(notebook, NOTEBOOK, fmt="ipynb")


if __name__ == "__main__":
    main()
