"""The configurations of a folder as one table per subfolder, and its place in the folder's README."""

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from selconv_jax.errors import ConfigError
from selconv_jax.train._config import load_config

__all__ = ["experiment_table", "write_experiment_table"]

_BEGIN = "<!-- begin of the tables: written by `selconv experiments --write` -->"
_END = "<!-- end of the tables -->"
_HEADINGS = (
    "file",
    "model",
    "variant",
    "data",
    "epochs",
    "batch size",
    "threshold",
    "top_k",
    "max_copies",
    "purpose",
)


def experiment_table(directory: Path) -> str:
    """All configurations below a folder as Markdown that also reads well as plain text.

    Args:
        directory: The folder of the TOML files.

    Returns:
        A table per folder, in the order of their names; what allocates no channels has ``-`` for the
        keys of allocation, and so has a key that is not set.

    Raises:
        ConfigError: There is no configuration, or one is wrong.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder, "tiny.toml")
        ...     _ = file.write_text('model.variant = "plain"')
        ...     print(experiment_table(Path(folder)).splitlines()[2][:32])
        | tiny.toml | densenet40 | plain
    """
    files = sorted(directory.rglob("*.toml"), key=lambda file: (file.parent, file.name))
    if not files:
        raise ConfigError(f"there is no configuration (*.toml) in {directory}.")
    tables = []
    for folder, group in groupby(files, key=lambda file: file.parent):
        rows = [_row(file) for file in group]
        title = folder.relative_to(directory).as_posix()
        tables.append(("" if title == "." else f"### {title}\n\n") + _markdown([_HEADINGS, *rows]))
    return "\n\n".join(tables) + "\n"


def write_experiment_table(directory: Path) -> Path:
    """Write the tables of a folder into its ``README.md``, between the two comments that mark the place.

    Args:
        directory: The folder of the TOML files.

    Returns:
        The file.

    Raises:
        ConfigError: There is no such file, the comments are missing, or a configuration is wrong.
    """
    readme = directory / "README.md"
    text = readme.read_text(encoding="utf-8") if readme.is_file() else ""
    before, begin, rest = text.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not begin or not end:
        raise ConfigError(f"{readme} needs the lines {_BEGIN!r} and {_END!r}: the tables go between them.")
    readme.write_text(f"{before}{_BEGIN}\n\n{experiment_table(directory)}\n{_END}{after}", encoding="utf-8")
    return readme


def _row(file: Path) -> tuple[str, ...]:
    try:
        config = load_config(file)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from None
    allocation = config.allocation
    has_rounds = config.model.variant != "plain" and allocation.until > 0
    allocated = (f"{allocation.threshold:g}", str(allocation.top_k), str(allocation.max_copies or "-"))
    return (
        file.name,
        config.model.name,
        config.model.variant,
        config.data.name,
        str(config.epochs),
        str(config.batch_size),
        *(allocated if has_rounds else ("-", "-", "-")),
        config.description.replace("|", "\\|"),
    )


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    widths[-1] = 0  # the last column is the widest; its end need not line up
    lines = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    lines.insert(1, ["-" * max(width, 3) for width in widths])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
