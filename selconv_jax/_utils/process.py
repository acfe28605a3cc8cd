"""Settings of the process that make programs on CPU faster and have to be made before it starts."""

import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Mapping, Sequence

# A step on CPU allocates its whole working memory as one block and frees it at its end. By default the C
# library returns such blocks to the system, which has to map and clear every page again in the next step,
# about a quarter of a step's time. These settings make it keep the memory, in huge pages.
TUNABLES = f"glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold={2**40}"

# The CPU compiler of jaxlib 0.10 drops barriers before it fuses operations, so that everything that
# `_xla.materialize` is for is recomputed by each reader. Without this pass it keeps them, as later ones do.
BARRIERS = "--xla_disable_hlo_passes=cse_barrier_expander"
_BARRIERS_KEPT_FROM = (0, 11)


def restart_for_cpu() -> None:
    """Restart the interpreter with settings that make training on CPU faster, unless it has them.

    Call it at the start of a program, before anything is computed or opened: what the process has done is
    lost, and its command line is rerun. With ``GLIBC_TUNABLES`` the C library keeps the memory of a step for
    the next, in huge pages (Linux); with a flag in ``XLA_FLAGS`` the compiler of jaxlib 0.10 does not
    recompute values that it was told to keep (where there is no accelerator). Settings that you have made
    yourself are kept. The ``selconv`` commands do the same. Nothing happens in an interactive session, or if
    the program is read from standard input.

    Example:
        >>> import selconv_jax
        >>> selconv_jax.restart_for_cpu()  # doctest: +SKIP
    """
    if hasattr(sys, "ps1") or sys.flags.interactive or "ipykernel" in sys.modules or sys.argv[0] in ("", "-"):
        return
    if restart := restart_command(os.environ, sys.orig_argv):
        command, environ = restart
        sys.stdout.flush()
        sys.stderr.flush()
        os.execve(command[0], command, environ)


def restart_command(
    environ: Mapping[str, str], arguments: Sequence[str], platform: str = sys.platform
) -> tuple[list[str], dict[str, str]] | None:
    """Return command line and environment that restart this process with the settings; None if not needed.

    If ``GLIBC_TUNABLES`` is set already, even empty, that stays. ``arguments`` are as in `sys.orig_argv`.
    """
    added = {}
    if platform == "linux" and "GLIBC_TUNABLES" not in environ:
        added["GLIBC_TUNABLES"] = TUNABLES
    flags = environ.get("XLA_FLAGS", "")
    if _drops_barriers() and "xla_disable_hlo_passes" not in flags and not _may_have_accelerator(environ):
        added["XLA_FLAGS"] = f"{flags} {BARRIERS}".strip()
    if not added or not sys.executable:
        return None
    return [sys.executable, *arguments[1:]], {**environ, **added}


def _drops_barriers() -> bool:
    try:
        major, minor, *_ = importlib.metadata.version("jaxlib").split(".")
        return (int(major), int(minor)) < _BARRIERS_KEPT_FROM
    except (importlib.metadata.PackageNotFoundError, ValueError):  # a build of one's own
        return False


def _may_have_accelerator(environ: Mapping[str, str]) -> bool:
    """Check whether JAX may find another device than the CPU, without importing it."""
    if platforms := environ.get("JAX_PLATFORMS"):
        return platforms != "cpu"
    plugins = importlib.metadata.entry_points(group="jax_plugins")
    return bool(plugins) or any(map(importlib.util.find_spec, ("jax_plugins", "libtpu")))
