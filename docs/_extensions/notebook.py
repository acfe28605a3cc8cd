"""Sphinx directive ``notebook``: a Python script with ``# %%`` cells, and what a run of it printed and drew.

Building the site runs no cell. This records the outputs beside the script, in a folder of its name:

    python docs/_extensions/notebook.py docs/tutorial.py
"""

import ast
import contextlib
import hashlib
import io
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from docutils import nodes
from matplotlib.figure import Figure
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from selconv_jax._bench.environment import environment
from selconv_jax.report import save_figure

__all__ = ["Cell", "cells_of", "page", "record", "run", "setup"]

_OUTPUTS = "outputs.json"
_MARK = re.compile(r"^# %%[ \t]*(.*)\n", flags=re.MULTILINE)


class Cell(NamedTuple):
    """A cell: its title, and Python code, or Markdown if it was marked ``[markdown]``."""

    title: str
    text: str
    is_code: bool


def cells_of(script: str) -> list[Cell]:
    """Split a script at its ``# %%`` lines."""
    _, *parts = _MARK.split(script)
    cells = []
    for heading, text in zip(parts[::2], parts[1::2], strict=True):
        title, markdown, _ = heading.partition("[markdown]")
        if markdown:
            text = re.sub(r"^# ?", "", text, flags=re.MULTILINE)
        cells.append(Cell(title.strip(), text.strip(), not markdown))
    return cells


def run(cells: list[Cell], namespace: dict[str, Any]) -> Iterator[tuple[Cell, str, Any]]:
    """Run the code cells in order; yield each with what it printed and the value of its last line."""
    for number, cell in enumerate(cell for cell in cells if cell.is_code):
        tree = ast.parse(cell.text)
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        name, printed, value = f"cell {number} ({cell.title})", io.StringIO(), None
        with contextlib.redirect_stdout(printed):
            exec(compile(tree, name, "exec"), namespace)
            if isinstance(last, ast.Expr):
                value = eval(compile(ast.Expression(last.value), name, "eval"), namespace)
        yield cell, printed.getvalue(), value


def record(script: Path) -> None:
    """Run a script and write the outputs of its cells beside it."""
    folder = script.with_suffix("")
    folder.mkdir(exist_ok=True)
    for old in folder.glob("*.png"):
        old.unlink()
    outputs = []
    for cell, text, value in run(cells_of(script.read_text(encoding="utf-8")), {"__name__": "__main__"}):
        print(text, end="")
        output = {"code": _digest(cell), "text": text}
        if isinstance(value, Figure):
            output["picture"] = f"{len(outputs)}.png"
            save_figure(value, folder / output["picture"])
        elif value is not None:
            output["text"] += repr(value)
        outputs.append(output)
    document = {"machine": _machine(), "cells": outputs}
    (folder / _OUTPUTS).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def _machine() -> str:
    """Describe where the outputs come from, in words."""
    found = environment()
    names = ("python", "jax", "jaxlib", "flax", "optax", "numpy")
    versions = (f"{name} {found['versions'][name]}" for name in names)
    return ", ".join([f"{found['cores']} cores of {found['processor']} ({found['device']})", *versions])


def page(script: str, folder: Path) -> str:
    """Write a script and its recorded outputs as Markdown.

    Raises:
        ValueError: The outputs are not those of this script.
    """
    try:
        document = json.loads((folder / _OUTPUTS).read_text(encoding="utf-8"))
    except FileNotFoundError:
        document = {"cells": []}
    outputs = document["cells"]
    cells = cells_of(script)
    if [_digest(cell) for cell in cells if cell.is_code] != [output["code"] for output in outputs]:
        raise ValueError(
            f"{folder / _OUTPUTS} is of another version of the script: run docs/_extensions/notebook.py on it"
        )
    rest, parts = iter(outputs), []
    for cell in cells:
        if not cell.is_code:
            parts.append(cell.text)
            continue
        output = next(rest)
        parts.append(f"```python\n{cell.text}\n```")
        if text := output["text"].rstrip():
            parts.append(f"```{{code-block}} text\n:caption: Output\n{text}\n```")
        if "picture" in output:
            parts.append(f"![{cell.title}]({folder.name}/{output['picture']})")
    if outputs:
        parts.append(f"The outputs on this page come from one run, on {document['machine']}.")
    return "\n\n".join(parts) + "\n"


def _digest(cell: Cell) -> str:
    return hashlib.sha256(cell.text.encode()).hexdigest()[:16]


class _Notebook(SphinxDirective):
    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        path, name = self.env.relfn2path(self.arguments[0])[::-1]
        script = Path(path)
        for file in (script, script.with_suffix("") / _OUTPUTS):
            self.env.note_dependency(str(file))
        try:
            text = page(script.read_text(encoding="utf-8"), script.with_suffix(""))
        except (OSError, ValueError) as error:
            raise self.error(f"{name}: {error}") from None
        return self.parse_text_to_nodes(text, allow_section_headings=True)


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directive with Sphinx."""
    app.add_directive("notebook", _Notebook)
    return {"parallel_read_safe": True}


if __name__ == "__main__":
    record(Path(sys.argv[1]))
