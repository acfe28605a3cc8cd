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
def test_examples(name):
    if name.startswith("selconv_jax.bench.torch_"):
        pytest.importorskip("torch")
    assert doctest.testmod(importlib.import_module(name)).failed == 0
