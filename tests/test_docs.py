"""The README, the pages of docs and of the experiments: code runs, commands parse, links and names exist."""

import dataclasses
import pkgutil
import re
import shlex
from pathlib import Path

import pytest

from selconv_jax._cli.arguments import make_parser
from selconv_jax.models import MODELS
from selconv_jax.train import Config, load_config

ROOT = Path(__file__).resolve().parent.parent
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in [
        ROOT / "README.md",
        *sorted((ROOT / "docs").rglob("*.md")),
        *sorted((ROOT / "experiments").rglob("README.md")),
    ]
    if "build" not in path.relative_to(ROOT).parts
}
SECTIONS = {
    field.name: field.type for field in dataclasses.fields(Config) if dataclasses.is_dataclass(field.type)
}
PLACEHOLDERS = {
    "FILE": "experiments/quickstart.toml",
    "COMMAND": "train",
    "CONFIG": "experiments/quickstart.toml",
    "TOPOLOGY": "v5e:1x1",
    "NORM": "global",
    "N": "64",
}


def code_of(text):
    return re.findall(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def commands_of(text):
    """The words after ``selconv`` of every command in shell blocks, indented lines and code literals."""
    blocks = "".join(re.findall(r"^```bash\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE))
    lines = blocks.replace("\\\n", " ").splitlines()
    lines += re.findall(r"^    (selconv .*)", text, flags=re.MULTILINE)
    literals = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    lines += [match.replace("\n", " ") for match in re.findall(r"`(selconv\s[^`]+)`", literals)]
    for line in lines:
        for command in line.split("&&"):
            words = shlex.split(command, comments=True)
            words = [part for word in words for part in (shlex.split(word) if "selconv " in word else [word])]
            programs = [index for index, word in enumerate(words) if Path(word).name == "selconv"]
            if programs:
                yield words[programs[0] + 1 :]


CODE = [page for page in PAGES if code_of(PAGES[page])]
COMMANDS = [
    pytest.param(words, id=f"{page}: {' '.join(words)}")
    for page in PAGES
    for words in commands_of(PAGES[page])
]


def test_pages_are_found():
    assert {"README.md", "docs/guide/layers.md", "docs/guide/compaction.md"} <= set(CODE)
    assert {command.values[0][0] for command in COMMANDS} >= {"train", "resume", "sweep", "bench", "compile"}


@pytest.mark.parametrize("page", CODE)
def test_code_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "page"}  # the blocks of a page follow on one another
    for number, block in enumerate(code_of(PAGES[page])):
        exec(compile(block, f"{page}, block {number}", "exec"), namespace)


@pytest.mark.parametrize("command", COMMANDS)
def test_command_parses(command):
    words = [re.sub(r"\w+", lambda match: PLACEHOLDERS.get(match[0], match[0]), word) for word in command]
    if len(words) == 1:  # a mention
        words.append("--help")
    if "--help" in words:
        with pytest.raises(SystemExit, match=r"^0$"):
            make_parser().parse_args(words)
        return
    options, rest = make_parser().parse_known_args(words)
    assert not any(word.startswith("-") for word in rest)
    words = [*getattr(options, "words", []), *rest, getattr(options, "config", "")]
    keys = [word for word in words if "=" in word]
    keys += [word.split(",")[0] for word in getattr(options, "vary", [])]
    names = {word for word in words if word} - set(keys)
    if options.command == "bench":
        assert names <= set(MODELS)
        return
    files = [file for name in names for file in ROOT.glob(name)]
    assert bool(files) == (options.command in ("train", "compile", "sweep"))
    for file in files or [ROOT / "experiments" / "quickstart.toml"]:
        load_config(file, keys)


@pytest.mark.parametrize("page", PAGES)
def test_links_exist(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]):
        if "://" not in target:
            path, _, anchor = target.partition("#")
            file = (ROOT / page).parent / path
            assert file.exists(), target
            if anchor:
                headings = re.findall(r"^#+ (.*)", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
                assert anchor in [re.sub(r"[^\w -]", "", text.lower()).replace(" ", "-") for text in headings]


@pytest.mark.parametrize("page", PAGES)
def test_keys_and_names_in_the_text_exist(page):
    for code in re.findall(r"`([^`\n]+)`", PAGES[page]):
        if re.fullmatch(rf"({'|'.join(SECTIONS)})\.\w+(=\S+)?", code):
            section, _, key = code.partition("=")[0].partition(".")
            assert key in {field.name for field in dataclasses.fields(SECTIONS[section])}, code
        if re.fullmatch(r"selconv_jax(\.\w+)+", code):
            assert not any(part.startswith("_") for part in code.split(".")), code
            pkgutil.resolve_name(code)
