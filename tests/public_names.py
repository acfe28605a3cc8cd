"""The public names of the package: those in ``__all__`` of modules without an underscore in their path."""

import importlib
import inspect
import pkgutil
import re

import selconv_jax

MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(selconv_jax.__path__, "selconv_jax.")
    if not module.name.endswith("__main__")
)


def public_values():
    """Every public class and function, by one of its names."""
    public = [name for name in MODULES if not re.search(r"\._", name)]
    packages = [selconv_jax, *map(importlib.import_module, public)]
    return {
        f"{package.__name__}.{name}": value
        for package in packages
        for name in getattr(package, "__all__", ())
        if inspect.isclass(value := getattr(package, name)) or inspect.isroutine(value)
    }
