"""Versions of installed packages."""

import importlib.metadata

import selconv_jax


def version_of(package: str) -> str:
    """Return the version of a package, by its name for ``pip install``, or ``"not installed"``.

    Example:
        >>> version_of("no-such-package")
        'not installed'
    """
    if package == "selconv-jax":
        return selconv_jax.__version__  # even if the sources are used without installation
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
