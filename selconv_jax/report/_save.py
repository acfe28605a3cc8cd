"""Atomic saving of pictures."""

import io
import os
from pathlib import Path

from matplotlib.figure import Figure

from selconv_jax._utils.files import write_atomically
from selconv_jax.errors import ConfigError
from selconv_jax.report._style import styled

__all__ = ["save_figure"]


@styled
def save_figure(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a figure as PNG, atomically; equal figures give equal bytes.

    An interrupted or failed call leaves an existing file intact. The metadata is fixed: the file contains
    neither the date nor the version of the drawing library.

    Args:
        figure: The figure.
        path: The file, ending in ``.png``; missing folders are created.

    Raises:
        ConfigError: The path does not end in ``.png``.

    Example:
        >>> from matplotlib.figure import Figure
        >>> save_figure(Figure(), "empty.png")
    """
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ConfigError(f"pictures are saved as PNG, but {str(path)!r} has another suffix: name it *.png.")
    picture = io.BytesIO()
    figure.savefig(picture, format="png", metadata={"Software": "selconv_jax"})
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, picture.getvalue())
