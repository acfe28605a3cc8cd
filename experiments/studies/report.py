"""Summarize the runs of a study as ``results.json``, ``table.md`` and ``accuracy.png`` in its folder.

    python experiments/studies/report.py STUDY RUNS [RUNS ...]    collect the runs below these directories
    python experiments/studies/report.py STUDY RUNS --keep        and keep the others of results.json
    python experiments/studies/report.py STUDY                    table and picture again, from results.json

A study is a folder of configurations, in the order of their names but for ``plain``, which comes first. The
first one is the baseline, to which the others are compared, seed by seed: runs of equal seed see the
same images in the same order. A run belongs to the configuration whose ``description`` it has, wherever it
lies; what follows the colon in it is the name in table and picture. Accuracies are those of the last epoch,
whatever came before.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from accuracy_picture import TITLES, accuracy_picture, by_data_set
from tensorboardX.proto.event_pb2 import Event

from selconv_jax.analysis import count_multiply_adds, count_parameters
from selconv_jax.data._catalog import KNOWN
from selconv_jax.errors import ConfigError, DataError, SelconvError
from selconv_jax.report import paired_difference, save_figure, spread
from selconv_jax.train import Config, load_config, read_metrics
from selconv_jax.train._config_changes import origin_of
from selconv_jax.train._network import make_network
from selconv_jax.train._workdir import CONFIG, ENVIRONMENT, METRICS, read_config

RESULTS, TABLE, PICTURE = "results.json", "table.md", "accuracy.png"


def collect(study: Path, directories: Sequence[Path]) -> dict[str, Any]:
    """Collect the results of all complete runs of a study.

    Args:
        study: The folder of its configurations.
        directories: Searched for runs, at any depth.

    Returns:
        What ``results.json`` holds.

    Raises:
        SelconvError: There is no configuration or no complete run; two runs have the same configuration,
            images and seed; or runs of a configuration differ in more than their seed.
    """
    files = sorted(study.glob("*.toml"), key=lambda file: (file.stem != "plain", file.stem))
    if not files:
        raise ConfigError(f"{study} holds no configuration (*.toml): it is no study.")
    descriptions = {load_config(file).description: file.stem for file in files}
    if len(descriptions) < len(files):
        raise ConfigError(f"two configurations in {study} have the same description; runs are told by it.")
    found: dict[tuple[str, str], dict[int, tuple[Path, Config]]] = {}
    unfinished = set()
    for file in sorted(path for directory in directories for path in directory.rglob(CONFIG)):
        config = read_config(file.parent)
        if config.description not in descriptions:
            continue
        records = read_metrics(file.parent / METRICS)
        if not records or records[-1]["epoch"] != config.epochs:
            unfinished.add((descriptions[config.description], config.data.name, config.seed))
            continue
        runs = found.setdefault((config.data.name, descriptions[config.description]), {})
        if config.seed in runs:
            raise DataError(
                f"{runs[config.seed][0]} and {file.parent} are runs of the same configuration, images and "
                "seed. Name the directory of one of them alone."
            )
        runs[config.seed] = (file.parent, config)
    if not found:
        raise DataError(f"no complete run of {study} lies below {', '.join(map(str, directories))}.")
    environments: list[dict[str, Any]] = []
    order = [file.stem for file in files]
    names = {stem: description.partition(":")[2].strip() for description, stem in descriptions.items()}
    results = [
        {"data": data, "configuration": stem, "name": names[stem] or stem}
        | _configuration(found[data, stem], environments)
        for data, stem in sorted(found, key=lambda key: (_place(key[0]), order.index(key[1])))
    ]
    return {
        "study": study.resolve().name,
        "baseline": order[0],
        "environments": environments,
        "unfinished": [
            f"{stem}, {data}, seed {seed}"
            for stem, data, seed in sorted(unfinished)
            if seed not in found.get((data, stem), {})  # repeated elsewhere
        ],
        "results": results,
    }


def merge(earlier: dict[str, Any], results: dict[str, Any]) -> dict[str, Any]:
    """Add the runs of earlier results that are not among new ones, as of another machine.

    Args:
        earlier: Results of the same study; a run of equal configuration, images and seed is replaced.
        results: The new results.

    Returns:
        Both, in the form of `collect`.

    Raises:
        DataError: Runs of a configuration differ in more than their seed.
    """
    rows = {(row["data"], row["configuration"]): row | {"runs": [*row["runs"]]} for row in results["results"]}
    environments = [*results["environments"]]
    for row in earlier["results"]:
        merged = rows.setdefault((row["data"], row["configuration"]), row | {"runs": []})
        if not _agree(row["settings"], merged["settings"]):
            raise DataError(
                f"the runs of {row['configuration']} on {row['data']} in {RESULTS} have other settings: they "
                "cannot be averaged. Collect the new ones without --keep."
            )
        for run in row["runs"]:
            if run["seed"] in {other["seed"] for other in merged["runs"]}:
                continue
            environment = earlier["environments"][run["environment"]]
            if environment not in environments:
                environments.append(environment)
            merged["runs"].append(run | {"environment": environments.index(environment)})
        merged["runs"].sort(key=lambda run: run["seed"])
    complete = {
        f"{stem}, {data}, seed {run['seed']}" for (data, stem), row in rows.items() for run in row["runs"]
    }
    unfinished = {*earlier["unfinished"], *results["unfinished"]} - complete

    def place(key: tuple[str, str]) -> tuple[int, bool, str]:
        return _place(key[0]), key[1] != results["baseline"], key[1]

    return {
        **results,
        "environments": environments,
        "unfinished": sorted(unfinished),
        "results": [rows[key] for key in sorted(rows, key=place)],
    }


def _agree(first: Any, second: Any) -> bool:
    """Compare settings by the keys that both have: versions of the program add some."""
    if isinstance(first, dict) and isinstance(second, dict):
        return all(_agree(value, second[key]) for key, value in first.items() if key in second)
    return bool(first == second)


def _place(data: str) -> int:
    return list(KNOWN).index(data) if data in KNOWN else len(KNOWN)


def _configuration(
    runs: dict[int, tuple[Path, Config]], environments: list[dict[str, Any]]
) -> dict[str, Any]:
    """Collect cost and runs by seed; new environments are appended to the list."""
    first, config = next(iter(runs.values()))
    rows = []
    for seed, (workdir, other) in sorted(runs.items()):
        if _settings(other) != _settings(config):
            raise DataError(f"{first} and {workdir} differ in more than their seed: they cannot be averaged.")
        environment = json.loads((workdir / ENVIRONMENT).read_text(encoding="utf-8"))
        for key in ("seed", "images"):  # of the run, not of the machine
            environment.pop(key, None)
        if environment not in environments:
            environments.append(environment)
        records = read_metrics(workdir / METRICS)
        metrics = {key: [_rounded(record.get(key)) for record in records] for key in records[0]}
        rows.append(
            {
                "seed": seed,
                "environment": environments.index(environment),
                "hours": _rounded(_hours(workdir)),
                "metrics": metrics,
            }
        )
    parameters, multiply_adds = _cost(config)
    costs = {"parameters": parameters, "multiply_adds": multiply_adds}
    return {**costs, "settings": _settings(config), "runs": rows}


def _settings(config: Config) -> dict[str, Any]:
    """Return the settings that runs have to share to be averaged: those that determine their results."""
    return {key: value for key, value in origin_of(config).items() if key != "seed"}


def _rounded(value: float | None) -> float | None:
    return value if value is None or isinstance(value, int) else float(f"{value:.6g}")


def _hours(workdir: Path) -> float | None:
    """Sum the hours of all parts of a run, between the first and last TensorBoard event of each."""
    seconds, known = 0.0, False
    for file in workdir.glob("tensorboard/events.*"):
        data, times, start = file.read_bytes(), [], 0
        # Record format: length (8 bytes) and its checksum (4), the event, its checksum (4).
        while len(data) >= start + 12:
            length = int.from_bytes(data[start : start + 8], "little")
            times.append(Event.FromString(data[start + 12 : start + 12 + length]).wall_time)
            start += length + 16
        if times:
            seconds, known = seconds + times[-1] - times[0], True
    return seconds / 3600 if known else None


def _cost(config: Config) -> tuple[int, int]:
    """Count parameters and multiply-adds (MACs) per image; shifts count as none."""
    info = KNOWN[config.data.name].info()
    network = make_network(config.model, info.image_shape, info.num_classes).clone(capacity=0.0)

    def init(images: jax.Array) -> Any:
        return network.init(jax.random.key(0), images, train=False)

    images = jax.ShapeDtypeStruct((1, *info.image_shape), jnp.float32)
    multiply_adds = sum(count_multiply_adds(init, images).values())
    return count_parameters(jax.eval_shape(init, images)["params"]), multiply_adds


def table(results: dict[str, Any]) -> str:
    """Format a Markdown table per data set: accuracy, paired differences to the baseline, size, cost."""
    parts = []
    for data, rows in by_data_set(results).items():
        baseline = _accuracies(rows[0]) if rows[0]["configuration"] == results["baseline"] else {}
        lines = [
            f"### {TITLES.get(data, data)}",
            "",
            f"| network | seeds | test accuracy (%) | difference to {rows[0]['name'] if baseline else '-'} "
            "| 95% interval | copies | closed | parameters | multiply-adds | minutes a run |",
            "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
            *(_row(row, {} if row is rows[0] else baseline) for row in rows),
        ]
        parts.append("\n".join(lines))
    notes = [
        "Test accuracy after the last epoch: mean ± standard deviation over the seeds. Differences are in "
        "percentage points, paired by seed: mean ± standard error, and Student's 95% interval of the mean. "
        "Copies and closed channels: at the end, mean over the seeds, of all channels that the layers read. "
        "Multiply-adds are those of the convolutions for an image; the interpolation of shifts is not in "
        "them. Minutes are wall time with compilation, beside whatever else the machine did.",
        *machines(results),
    ]
    hours = [run["hours"] for row in results["results"] for run in row["runs"]]
    if None not in hours:
        notes.append(f"All {len(hours)} runs took {sum(hours):.1f} hours.")
    if results["unfinished"]:
        notes.append(f"Left out, as they are not complete: {'; '.join(results['unfinished'])}.")
    return "\n\n".join([*parts, *notes]) + "\n"


def _accuracies(row: dict[str, Any]) -> dict[int, float]:
    """Collect the test accuracy in per cent after the last epoch, by seed."""
    return {run["seed"]: 100 * run["metrics"]["test_accuracy"][-1] for run in row["runs"]}


def _row(row: dict[str, Any], baseline: dict[int, float]) -> str:
    accuracies = _accuracies(row)
    sample = spread(list(accuracies.values()))
    accuracy = f"{sample.mean:.2f}" + ("" if sample.std is None else f" ± {sample.std:.2f}")
    difference = interval = ""
    if accuracies.keys() & baseline.keys():
        paired = paired_difference(accuracies, baseline)
        difference = f"{paired.mean:+.2f}"
        if paired.interval is not None:
            difference += f" ± {paired.std_error:.2f}"
            interval = "{:+.2f} to {:+.2f}".format(*paired.interval)
    last = {
        key: [run["metrics"][key][-1] for run in row["runs"] if key in run["metrics"]]
        for key in ("channels", "copies", "open_channels")
    }
    copies = closed = ""
    if any(last["channels"]):  # a plain network has none
        channels = last["channels"][0]
        copies = f"{np.mean(last['copies']):.0f} of {channels}"
        closed = f"{channels - np.mean(last['open_channels']):.0f}"
    hours = [run["hours"] for run in row["runs"]]
    minutes = "" if None in hours else f"{60 * np.mean(hours):.1f}"
    cells = (
        row["name"],
        ", ".join(map(str, accuracies)),
        accuracy,
        difference,
        interval,
        copies,
        closed,
        f"{row['parameters']:,}",
        f"{row['multiply_adds'] / 1e6:.2f} M",
        minutes,
    )
    return "| " + " | ".join(cell or "-" for cell in cells) + " |"


def machines(results: Mapping[str, Any]) -> list[str]:
    """Name the machines of the runs, a sentence each; those that differ only in what is not shown once."""

    def sentence(environment: Mapping[str, Any]) -> str:
        versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
        count, device, backend = (environment[key] for key in ("devices", "device", "backend"))
        return f"Machine: {count} x {device} ({backend}); {versions}."

    return list(dict.fromkeys(map(sentence, results["environments"])))


def main(words: Sequence[str] | None = None) -> int:
    """Write the three files; an error is one line."""
    parser = argparse.ArgumentParser(description="Turns the runs of a study into numbers, table and picture.")
    parser.add_argument("study", type=Path, help="folder of the study's configurations")
    parser.add_argument("runs", type=Path, nargs="*", help="directories of its runs; none: results.json")
    parser.add_argument("--keep", action="store_true", help="keep the other runs of results.json")
    options = parser.parse_args(words)
    try:
        file = options.study / RESULTS
        if options.runs:
            results = collect(options.study, options.runs)
            if options.keep and file.is_file():
                results = merge(json.loads(file.read_text(encoding="utf-8")), results)
            file.write_text(as_json(results), encoding="utf-8")
        elif not file.is_file():
            raise DataError(f"there is no {file}: name the directories of the study's runs.")
        else:
            results = json.loads(file.read_text(encoding="utf-8"))
        (options.study / TABLE).write_text(table(results), encoding="utf-8")
        save_figure(accuracy_picture(results), options.study / PICTURE)
    except SelconvError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(", ".join(str(options.study / name) for name in (RESULTS, TABLE, PICTURE)))
    return 0


def as_json(results: dict[str, Any]) -> str:
    """Write JSON with one run per line, which suits line-based diffs and is a tenth of the length."""
    rows = []
    for row in results["results"]:
        head = json.dumps({key: value for key, value in row.items() if key != "runs"})[:-1]
        runs = ",\n  ".join(json.dumps(run, separators=(",", ":")) for run in row["runs"])
        rows.append(f'{head}, "runs": [\n  {runs}]}}')
    head = json.dumps({key: value for key, value in results.items() if key != "results"}, indent=1)[:-2]
    return head + ',\n "results": [\n' + ",\n".join(rows) + "]}\n"


if __name__ == "__main__":
    sys.exit(main())
