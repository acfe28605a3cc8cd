"""The machine and the versions of a measurement."""

import contextlib
import os
import platform
from pathlib import Path
from typing import Any

import jax

from selconv_jax._utils.versions import version_of

_PACKAGES = ("selconv-jax", "jax", "jaxlib", "flax", "optax", "numpy", "torch", "libtpu", "jax-cuda13-plugin")


def environment() -> dict[str, Any]:
    """Describe processor, device, allocator settings and versions, ready for JSON."""
    device = jax.devices()[0]
    return {
        "processor": _processor(),
        "cores": cores(),
        "backend": jax.default_backend(),
        "device": device.device_kind,
        "devices_used": 1,
        "system": platform.platform(),
        "load_average": load_average(),
        "malloc": os.environ.get("GLIBC_TUNABLES", ""),
        "versions": {"python": platform.python_version()} | {name: version_of(name) for name in _PACKAGES},
    }


def cores() -> int:
    """Count the processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def load_average() -> float | None:
    """Return the load average of the last minute; None if the system has none."""
    with contextlib.suppress(OSError, AttributeError):
        return os.getloadavg()[0]
    return None


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
