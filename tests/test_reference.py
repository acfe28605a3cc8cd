"""The README's command builds the reference of the API, and every public name is on its page."""

import importlib
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import selconv_jax

ROOT = Path(__file__).resolve().parent.parent


def reference_command():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    block = readme.split("<!-- command: reference -->\n```bash\n")[1].split("```")[0]
    return shlex.split(block.split("&&")[-1])


def test_reference_has_every_public_name(tmp_path):
    program, *arguments = reference_command()
    assert program.endswith("pdoc")
    arguments[arguments.index("--output-directory") + 1] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "pdoc", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Warn" not in done.stderr
    public = [name for name in selconv_jax.__all__ if isinstance(getattr(selconv_jax, name), ModuleType)]
    assert {"functional", "models", "nn", "train"} <= set(public)
    for name in ["selconv_jax", *(f"selconv_jax.{name}" for name in public), "selconv_jax.interop.torch"]:
        page = (tmp_path / f"{name.replace('.', '/')}.html").read_text(encoding="utf-8")
        for export in importlib.import_module(name).__all__:
            link = f'href="{name.rpartition(".")[2]}/{export}.html"'  # a module with a page of its own
            assert f'id="{export}"' in page or link in page, f"{export} is not on the page of {name}"
