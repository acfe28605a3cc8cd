"""``selconv sweep``."""

import argparse
import contextlib
import dataclasses
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations, groupby
from pathlib import Path
from typing import Any

from rich.console import Console

from selconv_jax._cli.runs import share_compilations
from selconv_jax._utils.console import print_line, progress_console
from selconv_jax._utils.files import write_json
from selconv_jax.errors import ConfigError
from selconv_jax.report._comparison import (
    ConfigurationResults,
    comparison_table,
    difference_table,
    number_differences,
    run_numbers,
)
from selconv_jax.report._comparison_picture import comparison_picture
from selconv_jax.report._statistics import CONFIDENCE
from selconv_jax.report._style import save_figure
from selconv_jax.train._metrics import read_metrics
from selconv_jax.train._sweeps.configurations import SweepRun, check_sweep, plan_sweep
from selconv_jax.train._sweeps.runs import SweepEnd, run_sweep, share_devices
from selconv_jax.train._workdir import METRICS, read_environment

_REPORT = "sweep.json"
_PICTURE = "sweep.png"
_SHOWN = 3


def run(options: argparse.Namespace) -> int:
    """Make the runs of a sweep, then compare the complete ones in tables, a file and a picture."""
    _be_nice(options.nice)
    share_compilations()
    if options.jobs > 1:
        share_devices()
    workdir, console = Path(options.workdir), progress_console()
    # A file of such a name can be given as ./NAME.
    overrides = [word for word in options.words if re.match(r"[\w.]+\s*=", word)]
    files, own = _files([word for word in options.words if word not in overrides])
    seeds = _seeds("--seeds", options.seeds)
    runs = plan_sweep(files, workdir, seeds=seeds, own_seeds=own, vary=options.vary, overrides=overrides)
    with _written(workdir):
        _check_report(workdir / _REPORT, runs)
    check_sweep(runs, options.jobs, together=options.together)
    with _written(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
    end = run_sweep(runs, console, options.jobs, together=options.together)
    with _written(workdir):
        _compare(runs, end, workdir, console)
    for name, error in end.failures.items():
        print_line(console, f"failed: {name}: {error}")
    return end.code


def _compare(runs: Sequence[SweepRun], end: SweepEnd, workdir: Path, console: Console) -> None:
    """Write tables, file and picture of the complete runs; no picture if asked to stop, to end soon."""
    stopped = end.code > 1
    by_configuration = {name: list(group) for name, group in groupby(runs, key=lambda run: run.configuration)}
    title, names = _titles(list(by_configuration))
    results = [
        ConfigurationResults(
            name,
            {run.config.seed: read_metrics(run.workdir / METRICS) for run in group if run.is_complete},
            failed=[run.config.seed for run in group if run.name in end.failures],
        )
        for name, group in zip(names, by_configuration.values(), strict=True)
        if any(run.is_complete or run.name in end.failures for run in group)
    ]
    comparable = [result for result in results if result.runs]
    if comparable:
        console.print(comparison_table(results))
        if len(comparable) > 1:
            console.print(difference_table(comparable))
    if stopped and not comparable:
        return
    _check_report(workdir / _REPORT, runs)  # again, as another sweep may have written one
    _write_report(workdir / _REPORT, by_configuration, results, names, end.failures)
    print_line(console, f"all results: {workdir / _REPORT}")
    (workdir / _PICTURE).unlink(missing_ok=True)  # of other results
    if comparable and not stopped:
        save_figure(comparison_picture(comparable, title), workdir / _PICTURE)
        print_line(console, f"picture: {workdir / _PICTURE}")


def _check_report(path: Path, runs: Sequence[SweepRun]) -> None:
    """Refuse to replace a report with epochs of runs that are not in this sweep."""
    if not path.exists():
        return
    try:
        parts = json.loads(path.read_text(encoding="utf-8"))["configurations"]
        epochs = {
            run["directory"]: (f"{part['configuration']}, seed {run['seed']}", run["epochs"])
            for part in parts
            for run in part["runs"]
        }
    except (ValueError, LookupError, TypeError):
        raise ConfigError(
            f"{path} is not the report of a sweep. Move it away, or choose another --workdir."
        ) from None
    here = {run.workdir.relative_to(path.parent).as_posix() for run in runs}
    lost = [name for directory, (name, made) in epochs.items() if made and directory not in here]
    if lost:
        more = f" and {len(lost) - _SHOWN} more" if len(lost) > _SHOWN else ""
        raise ConfigError(
            f"{path} has results of runs that this sweep leaves out: {'; '.join(lost[:_SHOWN])}{more}. Add "
            "their files, values and seeds, or choose another --workdir."
        )


@contextlib.contextmanager
def _written(workdir: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"the directory {workdir} of the sweep cannot be written: {error.strerror}. Make room for it, or "
            "choose another --workdir; runs that are complete are kept."
        ) from None


def _be_nice(level: int) -> None:
    if not 0 <= level <= 19:
        raise ConfigError(f"--nice is {level}; it must be in 0 .. 19.")
    os.nice(max(0, level - os.nice(0)))  # which takes and returns changes; a second sweep adds nothing


def _files(words: Sequence[str]) -> tuple[list[Path], dict[Path, list[int]]]:
    """Parse the files, and the seeds of those given as ``FILE@0,1,2``."""
    files, own_seeds = [], {}
    for word in words:
        name, at, seeds = word.rpartition("@")
        if not at or Path(word).exists():
            files.append(Path(word))
            continue
        files.append(Path(name))
        own_seeds[files[-1]] = _seeds(f"the part after @ of {word}", seeds)
    return files, own_seeds


def _seeds(where: str, text: str) -> list[int]:
    try:
        return [int(seed) for seed in text.split(",")]
    except ValueError:
        raise ConfigError(f"{where} is {text!r}; it must be whole numbers, such as 0,1,2.") from None


def _titles(configurations: Sequence[str]) -> tuple[str, list[str]]:
    """Split off the common beginning of all names as the title."""
    if len(configurations) == 1:
        return configurations[0], list(configurations)
    # Cut at slashes; nothing more of paths applies, for the values of a grid may hold any text.
    parts = [name.split("/") for name in configurations]
    shared = 0
    while all(shared + 1 < len(each) and each[shared] == parts[0][shared] for each in parts):
        shared += 1
    title = "/".join(parts[0][:shared]) or f"{len(configurations)} configurations"
    return title, ["/".join(each[shared:]) for each in parts]


def _write_report(
    path: Path,
    by_configuration: Mapping[str, Sequence[SweepRun]],
    results: Sequence[ConfigurationResults],
    names: Sequence[str],
    failures: Mapping[str, str],
) -> None:
    """Everything the runs left in numbers, as JSON; accuracies and errors are fractions in [0, 1]."""
    summaries = {result.name: result.summary for result in results}
    report = [
        {
            "configuration": configuration,
            "seeds": [run.config.seed for run in runs],
            "resolved": {k: v for k, v in dataclasses.asdict(runs[0].config).items() if k != "seed"},
            "summary": {key: dataclasses.asdict(value) for key, value in summaries.get(name, {}).items()},
            "runs": [_run_report(run, path.parent, failures) for run in runs],
        }
        for name, (configuration, runs) in zip(names, by_configuration.items(), strict=True)
    ]
    differences = _differences_report([result for result in results if result.runs])
    write_json(path, {"configurations": report, "differences": differences})


def _differences_report(results: Sequence[ConfigurationResults]) -> list[dict[str, Any]]:
    """Every configuration minus every one before it, paired by seed, in all numbers."""
    return [
        {
            "configuration": later.name,
            "baseline": earlier.name,
            "confidence": CONFIDENCE,
            "numbers": {
                key: {**dataclasses.asdict(difference), "excludes_zero": difference.excludes_zero}
                for key, difference in number_differences(later, earlier).items()
            },
        }
        for earlier, later in combinations(results, 2)
    ]


def _run_report(run: SweepRun, workdir: Path, failures: Mapping[str, str]) -> dict[str, Any]:
    records = read_metrics(run.workdir / METRICS)
    return {
        "seed": run.config.seed,
        "directory": run.workdir.relative_to(workdir).as_posix(),
        "complete": run.is_complete,
        "error": failures.get(run.name),
        "environment": read_environment(run.workdir),
        "numbers": run_numbers(records) if run.is_complete else None,
        "epochs": records,
    }
