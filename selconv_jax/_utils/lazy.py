"""Imports of a package's public names: when they are first used, and with the extra that they need."""

import ast
import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def needs_extra(extra: str) -> Iterator[None]:
    """Import what an extra installs; if it is not, the error says how to install it."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("selconv_jax"):
            raise
        package = error.name.partition(".")[0]
        raise ModuleNotFoundError(
            f"the package {package} is not installed; it comes with the extra `{extra}`: "
            f"pip install 'selconv-jax[{extra}]'.",
            name=package,
        ) from None


def lazy_exports(
    package: str, file: str, extra: str | None = None
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Make a package's ``__getattr__`` and ``__dir__`` from the imports in its block ``if TYPE_CHECKING``.

    Importing the package must not import JAX, which takes a second: the command line first answers
    ``--help`` and sets the environment variables that JAX reads.

    Args:
        package: The name of the package, ``__name__``.
        file: Its source, ``__file__``.
        extra: The extra that the names need, see `needs_extra`.
    """
    tree = ast.parse(Path(file).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    homes = {alias.name: str(node.module) for node in imports for alias in node.names}

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        if homes[name] == package:
            return importlib.import_module(f"{package}.{name}")  # which sets the attribute
        with needs_extra(extra) if extra else contextlib.nullcontext():
            value = getattr(importlib.import_module(homes[name]), name)
        setattr(sys.modules[package], name, value)  # found without this function from now on
        return value

    return get, lambda: sorted(homes)
