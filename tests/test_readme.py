"""The README is short, and its marked commands are the ones that are tested; see also test_docs."""

import re
import tomllib
from pathlib import Path

from method_picture import method_picture

import selconv_jax
from selconv_jax.report._style import save_figure
from selconv_jax.train._config import load_config

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_it_is_short():
    assert len(README.splitlines()) <= 200


def test_every_public_name_is_documented():
    for name in selconv_jax.__all__:
        assert getattr(selconv_jax, name).__doc__, name


def test_every_experiment_is_a_configuration():
    files = sorted((ROOT / "experiments").rglob("*.toml"))
    assert ROOT / "experiments" / "quickstart.toml" in files
    for file in files:
        config = load_config(file)
        assert config.description, file
        assert f"selconv train {file.relative_to(ROOT)}" in file.read_text(), file


def test_commands_are_single_lines():
    commands = re.findall(r"<!-- command: (\w+) -->\n```bash\n(.*?)```", README, flags=re.DOTALL)
    assert [name for name, _ in commands] == ["train", "docs", "test"]
    for _, text in commands:
        assert text.count("\n") == 1
    assert "experiments/quickstart.toml" in dict(commands)["train"]


def test_excluded_jaxlib_is_excluded():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    jaxlib = next(line for line in project["dependencies"] if line.startswith("jaxlib"))
    assert "!=0.10.2" in jaxlib
    assert not any(line.lower().startswith("tensorflow>") for line in project["dependencies"])


def test_picture_of_the_method_is_current(tmp_path):
    save_figure(method_picture(), tmp_path / "method.png")
    assert (tmp_path / "method.png").stat().st_size > 10_000
    assert (ROOT / "experiments" / "results" / "method.png").is_file()


def test_citation_names_the_version():
    citation = (ROOT / "docs" / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {selconv_jax.__version__}\n" in citation
