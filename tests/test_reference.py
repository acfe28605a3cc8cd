"""The documentation site builds without a warning, and has every public name and configuration key."""

import dataclasses
import html
import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import selconv_jax
from selconv_jax.train import Config

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Builds the site by the README's command, elsewhere."""
    output = tmp_path_factory.mktemp("site")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    block = readme.split("<!-- command: docs -->\n```bash\n")[1].split("```")[0]
    program, *arguments = shlex.split(block.split("&&")[-1])
    assert program == ".venv/bin/sphinx-build"
    assert "-W" in arguments
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", *arguments[:-1], str(output)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return output


def test_reference_has_every_public_name(site):
    names = [name for name in selconv_jax.__all__ if isinstance(getattr(selconv_jax, name), ModuleType)]
    assert {"functional", "nn", "train", "interop"} <= set(names)
    for module in [*(f"selconv_jax.{name}" for name in names), "selconv_jax.interop.torch"]:
        page = (site / "reference" / f"{module.split('.')[1]}.html").read_text(encoding="utf-8")
        for name in importlib.import_module(module).__all__:
            assert re.search(rf'id="(module-)?{module}.{name}"', page), f"{name} is not on {module}'s page"
    overview = (site / "reference" / "index.html").read_text(encoding="utf-8")
    for name in selconv_jax.__all__:
        row = re.search(rf'<a class="reference internal" [^>]*><code[^>]*>(<[^>]*>)*{name}<', overview)
        assert row is not None, f"{name} is not in the overview, or has no link"


def test_every_configuration_key_is_described(site):
    page = (site / "training" / "configuration.html").read_text(encoding="utf-8")
    cells = {}
    for row in re.findall(r"<tr.*?</tr>", page, re.DOTALL):
        texts = [re.sub(r"<[^>]+>", "", cell).strip() for cell in re.findall(r"<td>.*?</td>", row, re.DOTALL)]
        if texts:
            key, *cells[key] = map(html.unescape, texts)
    sections = [("", Config)]
    sections += [(f"{field.name}.", field.type) for field in dataclasses.fields(Config)]
    keys = [
        f"{prefix}{field.name}"
        for prefix, kind in sections
        if dataclasses.is_dataclass(kind)
        for field in dataclasses.fields(kind)
        if not dataclasses.is_dataclass(field.type)
    ]
    assert list(cells) == keys
    assert all(len(description) > 10 for _, _, description in cells.values())
    assert cells["allocation.threshold"][:2] == ["number", "0.001"]
    assert cells["batch_norm"][:2] == ['"global" or "per_device"', '"global"']
    assert cells["data.validation"][:2] == ["integer or number or none", "none"]
