"""The notebook is one, and its cells run in order."""

import json
from pathlib import Path

import matplotlib
import torch

NOTEBOOK = Path(__file__).parents[2] / "examples" / "lab.ipynb"


def test_the_notebook_runs(capsys):
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids) and {cell["cell_type"] for cell in notebook["cells"]} == {"markdown", "code"}
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in code), "outputs are stripped"
    matplotlib.use("Agg")
    threads, names = torch.get_num_threads(), {}
    for cell in code:
        exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
    torch.set_num_threads(threads)
    said = capsys.readouterr().out
    assert "l_2, clipped" in said and "before" in said and "after" in said
