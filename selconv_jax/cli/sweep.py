"""``selconv sweep``."""

import argparse
import dataclasses
import json
import os
import re
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.console import Console

from selconv_jax.cli.console import terminal_or_lines
from selconv_jax.cli.runs import share_compilations
from selconv_jax.errors import ConfigError
from selconv_jax.report.comparison import ConfigurationResults, comparison_table, run_numbers
from selconv_jax.report.comparison_picture import comparison_picture
from selconv_jax.report.save import save_figure
from selconv_jax.train.config import Config
from selconv_jax.train.metrics import read_metrics
from selconv_jax.train.sweep import SweepRun, check_sweep, plan_sweep, run_sweep
from selconv_jax.train.workdir import ENVIRONMENT, METRICS

__all__ = ["run"]

_REPORT = "sweep.json"
_PICTURE = "sweep.png"


def run(options: argparse.Namespace) -> int:
    """Makes the runs of a sweep, then compares the complete ones in a table, a file and a picture."""
    share_compilations()
    workdir, console = Path(options.workdir), terminal_or_lines()
    # A file of such a name can be given as ./NAME.
    overrides = [word for word in options.words if re.match(r"[\w.]+\s*=", word)]
    files = [Path(word) for word in options.words if word not in overrides]
    runs = plan_sweep(files, workdir, seeds=_seeds(options.seeds), vary=options.vary, overrides=overrides)
    check_sweep(runs)
    end = run_sweep(runs, console)
    if end.code > 1:
        return end.code  # asked to stop, which is to be soon

    by_configuration = {name: list(group) for name, group in groupby(runs, key=lambda run: run.configuration)}
    title, names = _titles(list(by_configuration))
    results = [
        ConfigurationResults(
            name, {run.config.seed: read_metrics(run.workdir / METRICS) for run in group if run.is_complete}
        )
        for name, group in zip(names, by_configuration.values(), strict=True)
        if any(run.is_complete for run in group)
    ]
    if results:
        console.print(comparison_table(results))
        save_figure(comparison_picture(results, title), workdir / _PICTURE)
        _say(console, f"picture: {workdir / _PICTURE}")
    _write_report(workdir / _REPORT, by_configuration, results, names, end.failures)
    _say(console, f"every number: {workdir / _REPORT}")
    for name, error in end.failures.items():
        _say(console, f"failed: {name}: {error}")
    return end.code


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def _seeds(text: str) -> list[int]:
    try:
        return [int(seed) for seed in text.split(",")]
    except ValueError:
        raise ConfigError(f"--seeds is {text!r}; it must be whole numbers, such as 0,1,2.") from None


def _titles(configurations: Sequence[str]) -> tuple[str, list[str]]:
    """What all names begin with, as the title, and the names without it."""
    common = os.path.commonpath(configurations)
    if len(configurations) == 1:
        return common, [common]
    names = [os.path.relpath(name, common or ".") for name in configurations]
    return common or f"{len(configurations)} configurations", names


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
            "resolved": _without_seed(runs[0].config),
            "summary": {key: dataclasses.asdict(value) for key, value in summaries.get(name, {}).items()},
            "runs": [_run_report(run, path.parent, failures) for run in runs],
        }
        for name, (configuration, runs) in zip(names, by_configuration.items(), strict=True)
    ]
    temporary = path.with_name(f".{path.name}.new")
    temporary.parent.mkdir(parents=True, exist_ok=True)
    temporary.write_text(json.dumps({"configurations": report}, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def _without_seed(config: Config) -> dict[str, Any]:
    return {key: value for key, value in dataclasses.asdict(config).items() if key != "seed"}


def _run_report(run: SweepRun, workdir: Path, failures: Mapping[str, str]) -> dict[str, Any]:
    records = read_metrics(run.workdir / METRICS)
    environment = run.workdir / ENVIRONMENT
    return {
        "seed": run.config.seed,
        "directory": run.workdir.relative_to(workdir).as_posix(),
        "complete": run.is_complete,
        "error": failures.get(run.name),
        "environment": json.loads(environment.read_text()) if environment.is_file() else None,
        "numbers": run_numbers(records) if run.is_complete else None,
        "epochs": records,
    }
