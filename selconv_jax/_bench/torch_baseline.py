"""Finding the PyTorch networks in a checkout, which the package does not contain."""

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

import selconv_jax
from selconv_jax.errors import ConfigError

__all__ = ["check_torch_baseline", "load_torch_baseline"]

_NAME = "pytorch_baseline"


def check_torch_baseline() -> Path:
    """Find the networks in the working directory's checkout, or in that of the imported package.

    Returns:
        The folder that holds them.

    Raises:
        ConfigError: PyTorch is not installed, or there is no checkout.
    """
    if importlib.util.find_spec("torch") is None:
        raise ConfigError(
            "--torch needs PyTorch, which is not installed: `pip install torch`, or leave --torch out."
        )
    for root in (Path.cwd(), Path(selconv_jax.__file__).parent.parent):
        if (root / "experiments" / _NAME / "cases.py").is_file():
            return root / "experiments"
    raise ConfigError(
        f"--torch needs the networks of experiments/{_NAME}, which the installed package does not contain. "
        "Run it in a checkout of the project, or leave --torch out."
    )


def load_torch_baseline() -> Any:
    """Import the module that plans the PyTorch steps; see `check_torch_baseline` for errors."""
    folder = str(check_torch_baseline())
    if folder not in sys.path:
        sys.path.append(folder)
    return importlib.import_module(f"{_NAME}.cases")
