"""The examples of the docstrings run, and those of public names can be pasted into an empty program."""

import doctest
import importlib
import re

import pytest

from public_names import MODULES, public_values

PUBLIC = {f"{value.__module__}.{value.__qualname__}" for value in public_values().values()}


def is_public(example):
    return any(example.name == name or example.name.startswith(f"{name}.") for name in PUBLIC)


def test_public_names_are_found():
    assert {"selconv_jax.nn._layers.SelectiveConv", "selconv_jax.interop.torch.load_network"} <= PUBLIC
    assert {name.rpartition(".")[0] for name in PUBLIC} <= set(MODULES)


@pytest.mark.parametrize("name", MODULES)
def test_examples(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # some write files
    runner = doctest.DocTestRunner()
    for example in doctest.DocTestFinder().find(importlib.import_module(name)):
        if is_public(example):
            example.globs = {"__name__": "__main__"}
            private = re.findall(
                r"selconv_jax[\w.]*\._\w+", example.docstring[: example.docstring.rfind(">>>")]
            )
            assert not private, f"the example of {example.name} imports what is private: {private}"
        runner.run(example)
    assert runner.summarize(verbose=False).failed == 0
