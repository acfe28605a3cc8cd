"""``selconv bench``."""

import argparse
import contextlib
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from selconv_jax._bench.compilation import without_compilation_cache
from selconv_jax._bench.environment import environment, load_average
from selconv_jax._bench.picture import bar_picture, panels_of
from selconv_jax._bench.progress import BenchProgress
from selconv_jax._bench.report import compile_table, describe, gains, memory_table, report_of, time_table
from selconv_jax._bench.rows import rows_of
from selconv_jax._bench.run import NetworkResult, bench_network
from selconv_jax._bench.settings import BenchSettings
from selconv_jax._cli.runs import share_compilations
from selconv_jax._utils.console import print_line, progress_console
from selconv_jax._utils.files import write_json
from selconv_jax.errors import ConfigError
from selconv_jax.report._style import save_figure
from selconv_jax.train._signals import StopRequest
from selconv_jax.train._workdir import default_workdir

_REPORT = "bench.json"
_PICTURE = "bench.png"
_BUSY = 0.5  # load average
_PLAIN_OPTIONS = ("batch", "dtype", "share", "repeats", "steps", "torch", "seed", "together")


def run(options: argparse.Namespace) -> int:
    """Time the requested cases; print tables, write a JSON file and a picture."""
    settings = _settings(options)
    output = Path(options.output or default_workdir("-".join(settings.models), "runs/bench"))
    console = progress_console()
    cache: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if "compile" in settings.what:
        cache = without_compilation_cache()
    else:
        share_compilations()
    results: list[NetworkResult] = []
    with _created(output), StopRequest() as stop, cache:
        machine = environment()
        _warn_if_busy(console, machine, settings)
        for model in settings.models:
            with contextlib.closing(BenchProgress(console, model)) as progress:
                result = bench_network(model, settings, progress, lambda: bool(stop))
            results.append(result)
            _print(console, settings, result)
            # Written after every network, so that little is lost if a later one fails.
            machine["load_average_after"] = load_average()
            _write(output, settings, machine, results)
            if stop:
                break
    print_line(console, f"all results: {output / _REPORT}")
    if stop:
        print_line(console, "stopped: these are the results so far.")
    return stop.exit_code


def _print(console: Console, settings: BenchSettings, result: NetworkResult) -> None:
    title = f"{result.model} ({describe(settings)})"
    for note in result.notes:
        print_line(console, f"{result.model}: {note}")
    if result.rounds:
        console.print(time_table(result, title))
        for gain in gains(result):
            print_line(console, f"{result.model}: {gain}")
    if "memory" in settings.what:
        console.print(memory_table(result, f"memory, {title}"))
    if "compile" in settings.what:
        console.print(compile_table(result, f"compilation, {title}"))


def _write(
    output: Path, settings: BenchSettings, machine: Mapping[str, Any], results: Sequence[NetworkResult]
) -> None:
    write_json(output / _REPORT, report_of(settings, machine, results))
    panels = [panel for result in results for panel in panels_of(result)]
    if panels:
        versions = machine["versions"]
        loads = [machine[key] for key in ("load_average", "load_average_after")]
        before, after = ("not known" if load is None else f"{load:.1f}" for load in loads)
        caption = (
            f"medians and quartiles of {_rounds(results)}; {machine['processor']}, {machine['cores']} "
            f"cores, {machine['device']}; jax {versions['jax']}, torch {versions['torch']}; load average "
            f"{before} before, {after} after"
        )
        save_figure(bar_picture(panels, f"Benchmark: {describe(settings)}", caption), output / _PICTURE)


def _rounds(results: Sequence[NetworkResult]) -> str:
    """Format the number of rounds, fewer than requested if the benchmark was stopped."""
    counts = {len(row.seconds) for result in results for row in rows_of(result) if row.summary is not None}
    few, many = min(counts), max(counts)
    count = f"{many}" if few == many else f"{few} to {many}"
    return f"{count} round{'' if many == 1 else 's'}"


@contextlib.contextmanager
def _created(output: Path) -> Iterator[None]:
    """Create a new directory; remove it on exit if nothing has been written."""
    is_new = not output.exists()
    try:
        output.mkdir(parents=True, exist_ok=True)
        content = sorted(entry.name for entry in output.iterdir())
    except OSError as error:
        raise ConfigError(
            f"the directory {output} cannot be written: {error.strerror}. Choose another --output."
        ) from None
    if content:
        raise ConfigError(
            f"{output} is not empty (it holds {content[0]!r}). Choose another --output: a benchmark never "
            "overwrites files."
        )
    try:
        yield
    finally:
        if is_new:
            with contextlib.suppress(OSError):
                output.rmdir()


def _warn_if_busy(console: Console, machine: Mapping[str, Any], settings: BenchSettings) -> None:
    load = machine["load_average"]
    if load is None or load < _BUSY:
        return
    text = (
        f"the machine is busy (load average {load:.1f} on {machine['cores']} cores): times will be too long "
        "and noisy; compare the ratios within rounds, or wait."
    )
    if settings.torch:
        text += (
            " PyTorch's threads wait for one another and suffer most: do not trust the ratios to "
            "PyTorch, which are biased in our favour."
        )
    print_line(console, text)


def _settings(options: argparse.Namespace) -> BenchSettings:
    # As in a sweep: any word of the form KEY=VALUE is an option.
    overrides = [word for word in options.words if re.match(r"\w+\s*=", word)]
    models = [word for word in options.words if word not in overrides]
    capacity = options.capacity and _numbers("--capacity", options.capacity, ",", float, "0,0.25")
    chosen: dict[str, Any] = {
        "models": tuple(dict.fromkeys(models)),
        "options": dict(map(_option, overrides)),
        "image": _numbers("--image", options.image, "x", int, "32x32x3"),
        "what": tuple(dict.fromkeys(options.what.split(","))) if options.what else None,
        "capacity": capacity and tuple(dict.fromkeys(capacity)),
    }
    plain = {key: getattr(options, key) for key in _PLAIN_OPTIONS}
    return BenchSettings(**plain, **{key: value for key, value in chosen.items() if value})


def _option(text: str) -> tuple[str, Any]:
    key, _, value = text.partition("=")
    try:
        return key.strip(), tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return key.strip(), value


def _numbers(name: str, text: str, separator: str, kind: type, example: str) -> tuple[Any, ...]:
    try:
        return tuple(map(kind, text.split(separator)))
    except ValueError:
        raise ConfigError(f"{name} is {text!r}; it must be of the form {example}.") from None
