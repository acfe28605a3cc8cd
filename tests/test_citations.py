"""What docstrings and comments cite of the method and of the experiments is a heading of these pages."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = {"method": ROOT / "docs" / "method.md", "experiments": ROOT / "experiments" / "README.md"}
FILES = [
    path
    for folder in ("selconv_jax", "experiments", "docs")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if "build" not in path.relative_to(ROOT).parts
]
# (method, "Re-allocate", steps 3 and 4), or: the method's "De-allocate" and "Re-allocate"
CITATION = re.compile(
    r"\b(method|experiments)(?:,|'s) "
    r'("[A-Z][^"]+"(?: and "[A-Z][^"]+")*)'
    r"(?:, steps? (\d+)(?: (?:and|to) (\d+))?)?"
)


def sections(page):
    """The text of a page below every heading, up to the next one."""
    parts = re.split(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def citations(text):
    """Page, headings and step numbers of every citation, also of those that a line break cuts."""
    text = re.sub(r"\s*\n\s*(?:# )?", " ", text)
    for page, headings, *steps in CITATION.findall(text):
        yield page, re.findall(r'"([^"]+)"', headings), [int(step) for step in steps if step]
    assert not re.search(r"(?<=\s)\((?:method|experiments),(?! \")", text), "a citation names no heading"


CITING = [path for path in FILES if any(citations(path.read_text(encoding="utf-8")))]


def test_citations_are_found():
    assert len(CITING) > 15
    text = '(method, "One\n    selective layer", step 2) and the method\'s "Re-allocate" and "A round"'
    assert list(citations(text)) == [
        ("method", ["One selective layer"], [2]),
        ("method", ["Re-allocate", "A round"], []),
    ]


@pytest.mark.parametrize("path", CITING, ids=lambda path: str(path.relative_to(ROOT)))
def test_cited_headings_and_steps_exist(path):
    for page, headings, steps in citations(path.read_text(encoding="utf-8")):
        known = sections(PAGES[page])
        assert set(headings) <= set(known), f"{PAGES[page].name} has the headings {sorted(known)}"
        numbered = re.findall(r"^(\d+)\. ", known[headings[-1]], flags=re.MULTILINE)
        assert set(steps) <= set(map(int, numbered)), f"{headings[-1]} has the steps {numbered}"
