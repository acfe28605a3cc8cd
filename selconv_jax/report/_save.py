"""Write a picture so that a reader never meets half of one."""

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

    An interrupted or failed call leaves the file that was there before. The metadata is fixed: neither
    the date nor the version of the drawing library gets into the file.

    Args:
        figure: What to draw.
        path: Where to, ending in ``.png``; missing folders are made.

    Raises:
        ConfigError: The path does not end in ``.png``.

    Example:
        >>> from selconv_jax.report import method_picture, save_figure
        >>> save_figure(method_picture(), "method.png")
    """
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ConfigError(f"pictures are written as PNG, but {str(path)!r} ends otherwise: name it *.png.")
    picture = io.BytesIO()
    figure.savefig(picture, format="png", metadata={"Software": "selconv_jax"})
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, picture.getvalue())
