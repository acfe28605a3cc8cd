"""``selconv data prepare | list``."""

import argparse

from rich.table import Table

from selconv_jax._utils.console import terminal_or_lines
from selconv_jax.data._catalog import prepare_command, resolve_data_dir, status
from selconv_jax.data._preparation.prepare import prepare


def run(options: argparse.Namespace) -> int:
    """Prepare a data set, or list all."""
    if options.action == "prepare":
        print(prepare(options.name, options.source, options.data_dir))
        return 0
    rows = status(options.data_dir)
    table = Table("name", "state", "images", "size", "classes", title="data sets", title_justify="left")
    for row in rows:
        table.add_row(
            row.name,
            row.state,
            ", ".join(f"{count:,} {split}" for split, count in row.counts.items()),
            "x".join(map(str, row.image_shape)) if row.image_shape else "",
            str(row.num_classes or ""),
        )
    console = terminal_or_lines()
    console.print(table)
    data_dir = resolve_data_dir(options.data_dir)
    console.print(f"prepared sets are looked for in {data_dir}", soft_wrap=True)
    for row in rows:
        if row.state == "not prepared":
            console.print(
                f"\n{row.name}: `{prepare_command(row.name, data_dir)}`, where PATH holds the files of "
                f"{row.origin}.",
                soft_wrap=True,
                highlight=False,
            )
    return 0
