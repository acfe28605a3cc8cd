"""Settings of a benchmark, checked before anything is computed."""

import dataclasses
import importlib
import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

import selconv_jax
from selconv_jax.errors import ConfigError, nearest
from selconv_jax.models import create_model, stem_for

# The kinds of measurement, in the order of the report.
WHAT = ("step", "frozen", "compact", "reallocate", "eval", "input", "compile", "memory")

_CLASSES = 10
_DTYPES = ("float32", "bfloat16")
_BASELINE = "pytorch_baseline"  # folder of the PyTorch networks, which the package does not contain


@dataclasses.dataclass(frozen=True)
class BenchSettings:
    """A benchmark; a `ConfigError` if a value is unknown or out of bounds."""

    models: tuple[str, ...] = ("densenet40",)  # names of `selconv_jax.models.MODELS`
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # arguments of the networks
    batch: int = 64  # images per step
    image: tuple[int, int, int] = (32, 32, 3)  # (H, W, C)
    dtype: str = "float32"  # of the computation; parameters and statistics stay float32
    what: tuple[str, ...] = tuple(name for name in WHAT if name != "compile")
    # For each fraction of the channels, a step compiled for so many copies in a network with as many.
    capacity: tuple[float, ...] = (0.0, 0.125, 0.25, 0.5, 1.0)
    # Of the channels: re-allocated for the frozen step and evaluation, closed for the compact step.
    share: float = 0.25
    repeats: int = 10  # rounds of measurement
    steps: int = 0  # training steps per call; 0: as training runs do, 1 on CPU, 50 elsewhere
    torch: bool = False  # also measure the same steps in PyTorch
    together: int = 0  # also measure the same steps for this many seeds in one program; 0: do not
    seed: int = 0  # of the order of measurement, the images, the networks and the allocations

    def __post_init__(self) -> None:
        for name in ("batch", "repeats"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name} is {getattr(self, name)}; it must be at least 1.")
        if self.steps < 0:
            raise ConfigError(f"--steps is {self.steps}; it must be at least 1, or 0 to have it chosen.")
        if len(self.image) != 3 or min(self.image) < 1:
            raise ConfigError(f"--image is {self.image}; it must be HEIGHTxWIDTHxCHANNELS, such as 32x32x3.")
        if self.dtype not in _DTYPES:
            raise ConfigError(f"--dtype is {self.dtype!r}; it must be one of {', '.join(_DTYPES)}.")
        for name in self.what:
            if name not in WHAT:
                raise ConfigError(f"--what has {name!r}. {nearest(name, WHAT)}")
        for share in (*self.capacity, self.share):
            if not 0.0 <= share <= 1.0:
                raise ConfigError(
                    f"--capacity and --share are fractions of the channels, in [0, 1]; {share} is not one."
                )
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"--seed is {self.seed}; it must be in [0, 2**32).")
        for key in ("variant", "dtype", "capacity"):
            if key in self.options:
                raise ConfigError(f"{key} cannot be set: the benchmark sets it itself. Leave it out.")
        if self.together < 0 or self.together == 1:
            raise ConfigError(f"--together is {self.together}; it must be at least 2 seeds, or 0 for none.")
        if self.torch:
            _find_torch_baseline()
        for name in self.models:
            self.model(name, "selective")

    def model(self, name: str, variant: str) -> nn.Module:
        """Create one of ``models`` for the images and 10 classes, with capacity for no copies."""
        arguments = {"stem": stem_for(self.image), "dtype": jnp.dtype(self.dtype), **self.options}
        return create_model(name, _CLASSES, variant=variant, capacity=0.0, **arguments)


def _find_torch_baseline() -> Path:
    """Find the folder of the PyTorch networks in a checkout: the working directory's, or the package's.

    Raises:
        ConfigError: PyTorch is not installed, or there is no checkout.
    """
    if importlib.util.find_spec("torch") is None:
        raise ConfigError(
            "--torch needs PyTorch, which is not installed: `pip install torch`, or leave --torch out."
        )
    for root in (Path.cwd(), Path(selconv_jax.__file__).parent.parent):
        if (root / "experiments" / _BASELINE / "cases.py").is_file():
            return root / "experiments"
    raise ConfigError(
        f"--torch needs the networks of experiments/{_BASELINE}, which the installed package does not "
        "contain. Run it in a checkout of the project, or leave --torch out."
    )


def load_torch_baseline() -> Any:
    """Import the module that plans the PyTorch steps; see `_find_torch_baseline` for errors."""
    folder = str(_find_torch_baseline())
    if folder not in sys.path:
        sys.path.append(folder)
    return importlib.import_module(f"{_BASELINE}.cases")
