"""``selconv train | resume | eval | compact | show``."""

import argparse
import os
import sys
import tempfile
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from shlex import quote

import jax
import platformdirs
from rich.console import Console

from selconv_jax._cli.guard import described
from selconv_jax._cli.pictures import draw_run, print_run, write_page
from selconv_jax._utils.console import progress_console, terminal_or_lines
from selconv_jax._utils.files import check_folder, check_target
from selconv_jax.errors import ConfigError
from selconv_jax.train._config import load_config
from selconv_jax.train._distributed.agreement import exchange, is_first, on_first, together
from selconv_jax.train._distributed.cluster import Cluster, join
from selconv_jax.train._evaluation import CompactedRun, compact_run, evaluate_run
from selconv_jax.train._loop import resume_run, train_run
from selconv_jax.train._run_setup import best_meaning, find_checkpoint, refuse_skipped, skipped_checkpoints
from selconv_jax.train._workdir import free_workdir


def train(options: argparse.Namespace) -> int:
    """Train in a new directory, then draw the pictures of the run."""
    share_compilations()
    with _joined(options):
        config = together(lambda: load_config(options.config, options.words))
        with ExitStack() as stack:
            if options.workdir:
                workdir = Path(options.workdir)
            else:
                made = on_first(lambda: stack.enter_context(free_workdir(options.config)))
                workdir = Path(exchange(os.fspath(made or ""))[0])
            return _finish(train_run(config, workdir, _console()), workdir)


def resume(options: argparse.Namespace) -> int:
    """Resume a run, then draw its pictures."""
    share_compilations()
    workdir = Path(options.workdir)
    with _joined(options):
        return _finish(resume_run(workdir, _console(), options.words), workdir)


def evaluate(options: argparse.Namespace) -> int:
    """Print loss and accuracy of a checkpoint."""
    share_compilations()
    workdir = Path(options.workdir)
    with _joined(options, shares_stops=False):
        checkpoint = together(lambda: find_checkpoint(workdir, options.checkpoint))
        if is_first():
            _print_skipped(checkpoint.skipped)
        if options.compact:
            compacted = compact_run(workdir, checkpoint.step, evaluate=True, overrides=options.words)
            step, metrics, note = compacted.step, compacted.metrics, ", compacted"
        else:
            step, metrics = evaluate_run(workdir, checkpoint.step, options.words)
            note = ""
        if not is_first():
            return 0
        print(f"{workdir}, checkpoint of step {step}{note}{_meaning(options)}")
        if options.compact:
            _print_sizes(compacted)
        for name, value in metrics.items():
            print(f"  {name:<19} " + (f"{value:.4f}" if name.endswith("_loss") else f"{value:.2%}"))
        return 0


def compact(options: argparse.Namespace) -> int:
    """Write the compacted network of a checkpoint to a file."""
    workdir = Path(options.workdir)
    output = Path(options.output or workdir / "compact.npz")
    checkpoint = find_checkpoint(workdir, options.checkpoint)
    refuse_skipped(checkpoint.step, checkpoint.skipped)
    compacted = compact_run(
        workdir, checkpoint.step, multiple=options.multiple, output=output, overrides=options.words
    )
    step = f"{compacted.step}{_meaning(options)}"
    print(f"{workdir}, checkpoint of step {step}: compacted network in {output}")
    _print_sizes(compacted)
    return 0


def _meaning(options: argparse.Namespace) -> str:
    return f" ({best_meaning(Path(options.workdir))})" if options.checkpoint == "best" else ""


def _print_sizes(compacted: CompactedRun) -> None:
    for name, (before, after) in compacted.sizes.items():
        share = f" ({after / before:.1%})" if before else ""
        print(f"  {name:<14} {before:,} -> {after:,}{share}")


def show(options: argparse.Namespace) -> int:
    """Print the tables of a run and draw its pictures, or write its page."""
    workdir = Path(options.workdir)
    if options.html is not None and Path(options.html).suffix not in (".html", ".htm"):
        raise ConfigError(f"--html {options.html}: the page needs a name that ends in .html.")
    output = Path(options.html or options.output or workdir / "pictures")
    if options.html:
        check_target(output, overwrite=True)
    else:
        check_folder(output)
    _print_skipped(skipped_checkpoints(workdir))
    print_run(workdir, terminal_or_lines())
    try:
        # What these print is progress: an output that nobody reads is no problem of the files.
        (write_page if options.html else draw_run)(workdir, output, progress_console())
    except OSError as error:
        what, how = ("page", "file by --html") if options.html else ("pictures", "folder by --output")
        raise ConfigError(
            f"the {what} cannot be written to {output}: {error.strerror}. Choose a {how}."
        ) from None
    return 0


def _print_skipped(skipped: Sequence[str]) -> None:
    for problem in skipped:
        print(f"skipped: {problem}", file=sys.stderr)


def _joined(options: argparse.Namespace, *, shares_stops: bool = True) -> AbstractContextManager[None]:
    cluster = Cluster(options.coordinator, options.process, options.processes, options.join_timeout)
    return join(cluster, shares_stops=shares_stops)


def _console() -> Console:
    """Make the console of the command, quiet on all processes but process 0."""
    return progress_console() if is_first() else Console(quiet=True)


def _finish(code: int, workdir: Path) -> int:
    if code == 0 and is_first():
        try:
            draw_run(workdir, workdir / "pictures", progress_console())
        except Exception as error:  # the run is complete all the same
            problem = f"no pictures: {described(error).rstrip('.')}"
            later = f"selconv show {quote(str(workdir))}"
            print(f"selconv: {problem}. Draw them later by `{later}`.", file=sys.stderr)
    return code


def share_compilations() -> None:
    """Cache compiled programs in the user's cache folder, unless JAX has one configured."""
    if jax.config.jax_compilation_cache_dir is None:
        folder = platformdirs.user_cache_path("selconv_jax") / "compiled"
        jax.config.update("jax_compilation_cache_dir", os.fspath(folder))
    folder = Path(jax.config.jax_compilation_cache_dir)
    if "://" in jax.config.jax_compilation_cache_dir:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache")
        problem = f"compiled programs are not kept, as {folder} cannot be written ({error.strerror})"
        print(f"selconv: {problem}. Set JAX_COMPILATION_CACHE_DIR to another folder.", file=sys.stderr)
