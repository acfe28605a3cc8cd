"""The examples of the docstrings run."""

import doctest
import importlib
import pkgutil

import pytest

import selconv_jax

MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(selconv_jax.__path__, "selconv_jax.")
    if not module.name.endswith("__main__")
)


@pytest.mark.parametrize("name", MODULES)
def test_examples(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # some write files
    assert doctest.testmod(importlib.import_module(name)).failed == 0
