"""``selconv compile``."""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from selconv_jax._bench.ahead import prepare_compiler, topology_devices
from selconv_jax._bench.ahead_report import (
    largest_table,
    messages_table,
    plan_table,
    scaling_line,
    steps_table,
)
from selconv_jax._bench.compilation import without_compilation_cache
from selconv_jax._bench.environment import environment
from selconv_jax._bench.run_ahead import compile_run, compile_steps, largest_batch
from selconv_jax._utils.console import print_line, terminal_or_lines
from selconv_jax._utils.files import check_target, write_json
from selconv_jax.errors import ConfigError
from selconv_jax.train._config import Config, load_config


def run(options: argparse.Namespace) -> int:
    """Compile a run ahead of time for GPUs or TPUs; print tables, write JSON."""
    config = load_config(options.config, options.words)
    if not 0.0 <= options.capacity <= 1.0:
        raise ConfigError(f"--capacity is {options.capacity}; it must be a fraction of channels in [0, 1].")
    if options.compare and options.batch == "search":
        raise ConfigError("--compare and --batch search do not go together: leave one out.")
    if options.batch not in (None, "search"):
        if not options.batch.isdecimal() or int(options.batch) < 1:
            raise ConfigError(f"--batch is {options.batch!r}; it must be a number of images, or search.")
        config = dataclasses.replace(config, batch_size=int(options.batch))
    output = Path(options.output) if options.output else None
    if output is not None:
        check_target(output)
    prepare_compiler(options.topology)
    devices = topology_devices(options.topology)
    # Programs for another platform cannot be read back from the compilation cache.
    with without_compilation_cache():
        make = _compare if options.compare else _plan
        report, exit_code = make(options, config, devices)
    if output is not None:
        write_json(output, {"config": options.config, "environment": environment(), **report})
        print_line(terminal_or_lines(), f"all results: {output}")
    return exit_code


def _plan(options: argparse.Namespace, config: Config, devices: Sequence[Any]) -> tuple[dict[str, Any], int]:
    make = largest_batch if options.batch == "search" else compile_run
    plan = make(config, options.topology, devices, capacity=options.capacity, tell=_teller(options))
    if plan is None:
        raise ConfigError(
            f"not even {len(devices) * config.micro_batches} images per step fit on {options.topology}. Use "
            "more micro_batches, parameter_shards, or another topology."
        )
    console = terminal_or_lines()
    console.print(plan_table(plan, _title(options, plan.chips, plan.batch_size)))
    if plan.chips > 1:
        console.print(messages_table(plan))
        print_line(console, scaling_line(plan))
    return dataclasses.asdict(plan), int(any(program.fits is False for program in plan.programs))


def _compare(
    options: argparse.Namespace, config: Config, devices: Sequence[Any]
) -> tuple[dict[str, Any], int]:
    keys = ("batch_norm", "micro_batches", "parameter_shards")
    if unused := [key for key in keys if getattr(config, key) != getattr(Config, key)]:
        note = f"{', '.join(unused)} of the configuration: not used in the benchmark's steps"
        print_line(terminal_or_lines(), note)
    arguments = {"capacity": options.capacity, "tell": _teller(options)}
    steps = compile_steps(config, options.topology, devices, **arguments)
    title = _title(options, len(devices), config.batch_size)
    console = terminal_or_lines()
    console.print(largest_table(steps, title))
    console.print(steps_table(steps, title))
    report = {"topology": options.topology, "chips": len(devices), "batch_size": config.batch_size}
    return {**report, "steps": [dataclasses.asdict(step) for step in steps]}, 0


def _title(options: argparse.Namespace, chips: int, batch_size: int) -> str:
    chips_text = f"{chips} chip{'' if chips == 1 else 's'}"
    return f"{options.config} on {options.topology}: {chips_text}, {batch_size:,} images per step"


def _teller(options: argparse.Namespace) -> Any:
    console = terminal_or_lines()
    return lambda what: print_line(console, f"compiling for {options.topology}: {what}")
