"""``selconv compile``."""

import argparse
import dataclasses
from pathlib import Path

from selconv_jax._bench.compilation import without_compilation_cache
from selconv_jax._bench.environment import environment
from selconv_jax._bench.pod import compile_for_pod, largest_batch
from selconv_jax._bench.tpu import prepare_process, topology_devices
from selconv_jax._bench.tpu_report import messages_table, pod_table, scaling_line
from selconv_jax._utils.console import print_line, terminal_or_lines
from selconv_jax._utils.files import write_json
from selconv_jax.errors import ConfigError
from selconv_jax.train._config import load_config


def run(options: argparse.Namespace) -> int:
    """Compile a run ahead of time for a TPU topology; print tables, write JSON."""
    config = load_config(options.config, options.words)
    if not 0.0 <= options.capacity <= 1.0:
        raise ConfigError(f"--capacity is {options.capacity}; it must be a fraction of channels in [0, 1].")
    if options.batch not in (None, "search"):
        if not options.batch.isdecimal() or int(options.batch) < 1:
            raise ConfigError(f"--batch is {options.batch!r}; it must be a number of images, or search.")
        config = dataclasses.replace(config, batch_size=int(options.batch))
    output = Path(options.output) if options.output else None
    if output is not None and output.exists():
        raise ConfigError(f"{output} already exists. Choose another --output: nothing is overwritten.")
    prepare_process()
    devices = topology_devices(options.topology)
    console = terminal_or_lines()

    def tell(what: str) -> None:
        print_line(console, f"compiling for {options.topology}: {what}")

    # Programs for another platform cannot be read back from the compilation cache.
    with without_compilation_cache():
        make = largest_batch if options.batch == "search" else compile_for_pod
        plan = make(config, options.topology, devices, capacity=options.capacity, tell=tell)
    if plan is None:
        raise ConfigError(
            f"not even {len(devices) * config.micro_batches} images per step fit on {options.topology}. Use "
            "more micro_batches, parameter_shards, or another topology."
        )
    title = f"{options.config} on {plan.topology}: {plan.chips} chips, {plan.batch_size:,} images per step"
    console.print(pod_table(plan, title))
    console.print(messages_table(plan))
    print_line(console, scaling_line(plan))
    if output is not None:
        report = {"config": options.config, "environment": environment(), **dataclasses.asdict(plan)}
        write_json(output, report)
        print_line(console, f"all results: {output}")
    return 0 if all(program.fits is not False for program in plan.programs) else 1
