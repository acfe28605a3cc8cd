"""The tutorial runs and shows what it says, and its recorded outputs are those of its code."""

import importlib.util
import platform
from pathlib import Path

import jax
import numpy as np
import pytest

from selconv_jax._bench.environment import environment
from selconv_jax.analysis import count_parameters

DOCS = Path(__file__).resolve().parent.parent / "docs"
SCRIPT = DOCS / "tutorial.py"
_spec = importlib.util.spec_from_file_location("notebook", DOCS / "_extensions" / "notebook.py")
notebook = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(notebook)


def test_page_has_the_text_the_code_and_the_recorded_outputs():
    page = notebook.page(SCRIPT.read_text(encoding="utf-8"), SCRIPT.with_suffix(""))
    assert page.startswith("## A plain network\n")
    assert "4 of 5 convolutions are selective" in page
    pictures = sorted(SCRIPT.with_suffix("").glob("*.png"))
    assert len(pictures) == page.count("](tutorial/") == 4
    for picture in pictures:
        assert f"](tutorial/{picture.name})" in page


def test_outputs_of_other_code_are_refused():
    script = SCRIPT.read_text(encoding="utf-8")
    with pytest.raises(ValueError, match=r"another version of the script: run docs/_extensions/notebook\.py"):
        notebook.page(script.replace("threshold=0.1", "threshold=0.3"), SCRIPT.with_suffix(""))


def test_cells_are_recorded_with_what_they_print_and_draw(tmp_path):
    script = tmp_path / "small.py"
    script.write_text(
        '"""Not shown."""\n# %% [markdown]\n# # Title\n#\n# Text.\n\n'
        '# %% Sum\nx = 2\nprint("x is", x)\nx + 1\n\n'
        "# %% A picture\nfrom matplotlib.figure import Figure\n\nFigure(figsize=(1, 1))\n"
    )
    notebook.record(script)
    text = notebook.page(script.read_text(), tmp_path / "small")
    assert text.startswith("# Title\n\nText.\n\n```python\nx = 2\n")
    assert "```{code-block} text\n:caption: Output\nx is 2\n3\n```" in text
    assert "![A picture](small/1.png)\n\nThe outputs on this page come from one run, on " in text
    assert f" cores of {environment()['processor']} (cpu), python {platform.python_version()}, jax " in text
    assert (tmp_path / "small" / "1.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_tutorial(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "tutorial"}
    cells = notebook.cells_of(SCRIPT.read_text(encoding="utf-8"))
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        values = [value for _, _, value in notebook.run(cells, names)]
        small, model = (
            jax.jit(lambda x, model=model, tree=tree: model.apply(tree, x, False))(names["images"][:5])
            for model, tree in (
                (names["small"], names["small_variables"]),
                (names["model"], names["variables"]),
            )
        )
        classified = names["classify"](names["pixels"])
    assert sum(value is not None for value in values) == 4  # pictures
    plain, selective = names["unchanged"][-1][0], names["history"][-1][0]
    assert selective > plain + 0.1
    assert count_parameters(names["small_variables"]["params"]) < count_parameters(names["trained"]["params"])
    np.testing.assert_allclose(small, model, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(names["logits"], classified, rtol=1e-3, atol=1e-4)
