"""The examples of the docstrings run, and those of public names can be pasted into an empty program."""

import doctest
import importlib
import inspect
import pkgutil
import re

import pytest

import selconv_jax

MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(selconv_jax.__path__, "selconv_jax.")
    if not module.name.endswith("__main__")
)


def public_names():
    """Every public class and function by the module and the name of its definition."""
    packages = [selconv_jax, *map(importlib.import_module, MODULES)]
    packages = [package for package in packages if not re.search(r"\._", package.__name__)]
    values = [getattr(package, name) for package in packages for name in getattr(package, "__all__", ())]
    return {
        f"{value.__module__}.{value.__qualname__}"
        for value in values
        if inspect.isclass(value) or inspect.isroutine(value)
    }


PUBLIC = public_names()


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
