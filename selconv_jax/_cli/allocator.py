"""Allocator settings that keep memory from one step to the next, on Linux."""

import os
import sys
from collections.abc import Mapping, Sequence

__all__ = ["TUNABLES", "keep_memory", "restart_command"]

# A step on CPU allocates its whole working memory as one block and frees it at its end. By default the C
# library returns such blocks to the system, which has to map and clear every page again in the next step,
# about a quarter of a step's time. These settings make it keep the memory, in huge pages.
TUNABLES = ":".join(
    (
        "glibc.malloc.hugetlb=1",
        "glibc.malloc.mmap_max=0",
        f"glibc.malloc.trim_threshold={2**40}",
    )
)


def restart_command(
    environ: Mapping[str, str], arguments: Sequence[str], platform: str = sys.platform
) -> tuple[list[str], dict[str, str]] | None:
    """Return the command that restarts this process with allocator settings that keep its memory.

    The C library reads its settings before the program starts, so they cannot be changed from within.

    Args:
        environ: The environment. If it holds ``GLIBC_TUNABLES`` already, even empty, that stays.
        arguments: The command line with the interpreter, as in `sys.orig_argv`.
        platform: As in `sys.platform`.

    Returns:
        Command line and environment for `os.execve`; None if no restart is needed.

    Example:
        >>> restart_command({"GLIBC_TUNABLES": ""}, ["python", "-m", "selconv_jax"]) is None
        True
    """
    if platform != "linux" or "GLIBC_TUNABLES" in environ or not sys.executable:
        return None
    return [sys.executable, *arguments[1:]], {**environ, "GLIBC_TUNABLES": TUNABLES}


def keep_memory() -> None:
    """Restart the process if `restart_command` says so, else return."""
    if restart := restart_command(os.environ, sys.orig_argv):
        command, environ = restart
        os.execve(command[0], command, environ)
