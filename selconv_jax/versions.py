"""Versions of installed packages."""

import importlib.metadata

__all__ = ["version_of"]


def version_of(package: str) -> str:
    """The version of a package, or ``"not installed"``.

    Args:
        package: As it is named for installing.

    Example:
        >>> version_of("no-such-package")
        'not installed'
    """
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
