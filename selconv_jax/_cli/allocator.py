"""Memory that is kept from one step to the next, on Linux."""

import os
import sys
from collections.abc import Mapping, Sequence

__all__ = ["TUNABLES", "keep_memory", "restart_command"]

# A step on CPU asks for its whole working memory in one piece and gives it back at its end. By default the C
# library returns such pieces to the system, which then has to hand out and clear every page anew in the next
# step: about a quarter of the time of a step. These settings make it keep the memory, in large pages.
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
    """How this process is to be started anew so that it keeps its memory.

    The C library reads its settings before the program begins, so they cannot be made from within.

    Args:
        environ: The environment. If it holds ``GLIBC_TUNABLES`` already, even empty, that stays.
        arguments: The command line with the interpreter, as in `sys.orig_argv`.
        platform: As in `sys.platform`.

    Returns:
        Command line and environment for `os.execve`; None if everything is as it shall be.

    Example:
        >>> restart_command({"GLIBC_TUNABLES": ""}, ["python", "-m", "selconv_jax"]) is None
        True
    """
    if platform != "linux" or "GLIBC_TUNABLES" in environ or not sys.executable:
        return None
    return [sys.executable, *arguments[1:]], {**environ, "GLIBC_TUNABLES": TUNABLES}


def keep_memory() -> None:
    """Start the process anew where `restart_command` says so; return if there is nothing to do."""
    if restart := restart_command(os.environ, sys.orig_argv):
        command, environ = restart
        os.execve(command[0], command, environ)
