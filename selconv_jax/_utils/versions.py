"""Versions of installed packages."""

import importlib.metadata

import selconv_jax

__all__ = ["version_of"]


def version_of(package: str) -> str:
    """The version of a package, or ``"not installed"``.

    Args:
        package: As it is named for installing.

    Example:
        >>> version_of("no-such-package")
        'not installed'
    """
    if package == "selconv-jax":
        return selconv_jax.__version__  # also where the sources are used without being installed
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
