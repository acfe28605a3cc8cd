"""Compiling a program once, with its compile time and memory."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache


@dataclasses.dataclass(frozen=True)
class TimedProgram:
    """A compiled program, and what compiling it took.

    Attributes:
        run: The compiled function; ``as_text()`` gives its text.
        lower_seconds: Time of tracing and lowering.
        compile_seconds: Time of compilation, or of reading the compilation cache.
        memory: Bytes on a device: ``arguments``, ``outputs`` (those that take the place of a donated argument
            included), ``in_place`` (the outputs that do), ``temporary``, ``peak`` where the compiler tells
            it, and ``total``: arguments, outputs and temporary less those in place. None: unknown.
    """

    run: Any
    lower_seconds: float
    compile_seconds: float
    memory: dict[str, int] | None


def compile_program(
    lower: Callable[[], jax.stages.Lowered], clock: Callable[[], float] = time.perf_counter
) -> TimedProgram:
    """Compile what ``lower`` returns, such as ``lambda: jax.jit(function).lower(x)``, timing both."""
    start = clock()
    lowered = lower()
    is_lowered = clock()
    compiled = lowered.compile()
    return TimedProgram(compiled, is_lowered - start, clock() - is_lowered, _memory_of(compiled))


def _memory_of(compiled: Any) -> dict[str, int] | None:
    try:
        analysis = compiled.memory_analysis()
    except (NotImplementedError, jax.errors.JaxRuntimeError):
        return None
    if analysis is None:
        return None
    memory = {
        "arguments": int(analysis.argument_size_in_bytes),
        "outputs": int(analysis.output_size_in_bytes),
        "in_place": int(analysis.alias_size_in_bytes),
        "temporary": int(analysis.temp_size_in_bytes),
    }
    memory["total"] = memory["arguments"] + memory["outputs"] + memory["temporary"] - memory["in_place"]
    peak = int(getattr(analysis, "peak_memory_in_bytes", 0))
    if peak >= memory["temporary"] > 0:  # on CPU it leaves the temporary arrays out
        memory["peak"] = peak
    return memory


@contextlib.contextmanager
def without_compilation_cache() -> Iterator[None]:
    """Context in which the persistent compilation cache is neither read nor written."""
    enabled = jax.config.jax_enable_compilation_cache
    try:
        jax.config.update("jax_enable_compilation_cache", False)
        compilation_cache.reset_cache()
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", enabled)
        compilation_cache.reset_cache()
