"""``selconv train | resume | eval | compact | show``."""

import argparse
import os
from contextlib import AbstractContextManager
from pathlib import Path

import jax
import platformdirs
from rich.console import Console

from selconv_jax.cli.pictures import draw_run, print_run
from selconv_jax.console import progress_console, terminal_or_lines
from selconv_jax.train.agreement import exchange, is_first, together
from selconv_jax.train.cluster import Cluster, join
from selconv_jax.train.compacting import CompactedRun, compact_run
from selconv_jax.train.config import load_config
from selconv_jax.train.loop import evaluate_run, resume_run, train_run
from selconv_jax.train.opening import best_meaning, find_checkpoint
from selconv_jax.train.workdir import default_workdir

__all__ = ["compact", "evaluate", "resume", "share_compilations", "show", "train"]


def train(options: argparse.Namespace) -> int:
    """Trains in a new directory, then draws the pictures of the run."""
    share_compilations()
    with _joined(options):
        config = together(lambda: load_config(options.config, options.words))
        workdir = Path(options.workdir) if options.workdir else default_workdir(options.config)
        if not options.workdir:
            # A process that comes later may find the first one's directory made.
            workdir = Path(exchange(os.fspath(workdir))[0])
        return _finish(train_run(config, workdir, _console()), workdir)


def resume(options: argparse.Namespace) -> int:
    """Goes on with a run, then draws its pictures."""
    share_compilations()
    workdir = Path(options.workdir)
    with _joined(options):
        return _finish(resume_run(workdir, _console()), workdir)


def evaluate(options: argparse.Namespace) -> int:
    """Prints loss and accuracy of a checkpoint."""
    share_compilations()
    workdir = Path(options.workdir)
    with _joined(options, shares_stops=False):
        checkpoint = together(lambda: find_checkpoint(workdir, options.checkpoint))
        if options.compact:
            compacted = compact_run(workdir, checkpoint, evaluate=True)
            step, metrics, note = compacted.step, compacted.metrics, ", compacted"
        else:
            step, metrics = evaluate_run(workdir, checkpoint)
            note = ""
        if not is_first():
            return 0
        if options.checkpoint == "best":
            note += f" ({best_meaning(workdir)})"
        print(f"{workdir}, checkpoint of step {step}{note}")
        if options.compact:
            _print_sizes(compacted)
        for name, value in metrics.items():
            print(f"  {name:<19} " + (f"{value:.4f}" if name.endswith("_loss") else f"{value:.2%}"))
        return 0


def compact(options: argparse.Namespace) -> int:
    """Writes the network of a checkpoint, without what it does not use, into a file."""
    workdir = Path(options.workdir)
    output = Path(options.output) if options.output else workdir / "compact.npz"
    compacted = compact_run(
        workdir, find_checkpoint(workdir, options.checkpoint), multiple=options.multiple, output=output
    )
    note = f" ({best_meaning(workdir)})" if options.checkpoint == "best" else ""
    print(f"{workdir}, checkpoint of step {compacted.step}{note}: compacted network in {output}")
    _print_sizes(compacted)
    return 0


def _print_sizes(compacted: CompactedRun) -> None:
    for name, (before, after) in compacted.sizes.items():
        share = f" ({after / before:.1%})" if before else ""
        print(f"  {name:<14} {before:,} -> {after:,}{share}")


def show(options: argparse.Namespace) -> int:
    """Prints the tables of a run and draws its pictures."""
    workdir = Path(options.workdir)
    console = terminal_or_lines()
    print_run(workdir, console)
    draw_run(workdir, Path(options.output) if options.output else workdir / "pictures", console)
    return 0


def _joined(options: argparse.Namespace, *, shares_stops: bool = True) -> AbstractContextManager[None]:
    cluster = Cluster(options.coordinator, options.process, options.processes, options.join_timeout)
    return join(cluster, shares_stops=shares_stops)


def _console() -> Console:
    """Of several processes the first one speaks for all."""
    return progress_console() if is_first() else Console(quiet=True)


def _finish(code: int, workdir: Path) -> int:
    if code == 0 and is_first():
        draw_run(workdir, workdir / "pictures", progress_console())
    return code


def share_compilations() -> None:
    """Keeps compiled programs in a folder of the user's, unless JAX has been told where."""
    if jax.config.jax_compilation_cache_dir is None:
        folder = platformdirs.user_cache_path("selconv_jax") / "compiled"
        jax.config.update("jax_compilation_cache_dir", os.fspath(folder))
