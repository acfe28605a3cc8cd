"""``selconv experiments``."""

import argparse
from pathlib import Path

from selconv_jax._utils.console import terminal_or_lines
from selconv_jax.report._experiment_table import experiment_table, write_experiment_table

__all__ = ["run"]


def run(options: argparse.Namespace) -> int:
    """Print the table of a folder's configurations, or write it into the folder's README."""
    directory = Path(options.directory)
    if options.write:
        terminal_or_lines().print(f"written: {write_experiment_table(directory)}", highlight=False)
    else:
        print(experiment_table(directory), end="")
    return 0
