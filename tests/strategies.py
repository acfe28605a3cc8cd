"""Hypothesis strategies: recipes from which NumPy builds random layers.

Hypothesis draws a seed and the structure; NumPy fills the arrays. The shapes are few, so that
every compiled function is compiled once for each of them. All numbers are float32 values stored
as float64: a function in either precision and the oracle start from the very same state.
"""

import dataclasses

import numpy as np
from hypothesis import strategies as st

from oracle import Layer


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of a layer and of its input ``[2, *image, channels]``."""

    window: tuple[int, ...]
    channels: int
    outputs: int
    image: tuple[int, ...]
    groups: int = 1


SHAPES = {
    "1-D": Shape((3,), 8, 4, (9,)),
    "2-D": Shape((3, 3), 7, 5, (4, 5)),
    "2-D 1x1": Shape((1, 1), 12, 3, (3, 6)),
    "3-D": Shape((2, 1, 2), 5, 3, (3, 2, 4)),
    "one channel": Shape((2, 1), 1, 2, (4, 1)),
    "groups": Shape((2,), 9, 6, (7,), groups=3),
    "depthwise": Shape((2, 2), 4, 8, (3, 4), groups=4),
}
THRESHOLDS = (0.0, 1e-3, 0.03, 0.2, 0.25, 0.5, 0.9, 0.999, 1.0)
SHIFT_RANGES = (1.5, 4.0, 1e3, 1e10)  # the start value's, to the border, and far beyond


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a random layer is made of; the shares are probabilities per channel.

    Attributes:
        shape: A key of ``SHAPES``.
        seed: Of the generator of all numbers.
        exact: Small integers and halves instead of normal numbers. Sums are exact in either
            precision and equal damages are common.
        closed: Share of closed channels; one stays open.
        copies: Share of the open channels that are copies; some of themselves.
        silent: Share of channels with scale 0.
        empty: Share of channels with an all-zero kernel row, and of all-zero outputs.
        far: Shifts are drawn from ``[-far, far]``.
        whole: Shifts are rounded to whole pixels.
    """

    shape: str
    seed: int
    exact: bool = False
    closed: float = 0.3
    copies: float = 0.4
    silent: float = 0.2
    empty: float = 0.2
    far: float = 1.5
    whole: bool = False

    @property
    def sizes(self):
        return SHAPES[self.shape]

    def shifts(self, salt=0):
        """Shifts [C, len(S)]; another ``salt``, other shifts."""
        generator = np.random.default_rng((self.seed, 1, salt))
        sizes = (self.sizes.channels, len(self.sizes.image))
        drawn = generator.uniform(-self.far, self.far, sizes)
        return _float32(np.round(drawn) if self.whole else drawn)

    def image(self):
        """An input [2, *S, C]."""
        generator = np.random.default_rng((self.seed, 2))
        return _float32(generator.normal(size=(2, *self.sizes.image, self.sizes.channels)))

    def layer(self):
        generator = np.random.default_rng((self.seed, 0))
        sizes = self.sizes
        channels = (sizes.channels,)
        kernel_shape = (*sizes.window, sizes.channels // sizes.groups, sizes.outputs)
        if self.exact:
            kernel = generator.integers(-1, 2, kernel_shape).astype(float)
            scale = np.zeros(channels)  # the damage is max(bias, 0) times a sum of integers
            bias = generator.integers(-1, 4, channels) / 2
        else:
            # Importance of channels over several orders of magnitude.
            size = np.exp(2 * generator.normal(size=(sizes.channels, 1)))
            kernel = generator.normal(size=kernel_shape) * self._rows(size[:, 0])
            scale = generator.normal(size=channels)
            bias = generator.normal(size=channels)
        scale[generator.random(channels) < self.silent] = 0.0
        kernel[..., self._rows(generator.random(channels) < self.empty)] = 0.0
        kernel[..., generator.random(sizes.outputs) < self.empty] = 0.0
        gate = generator.random(channels) >= self.closed
        gate[generator.integers(sizes.channels)] = True
        copied = gate & (generator.random(channels) < self.copies)
        source = np.where(copied, generator.integers(sizes.channels, size=channels), -1)
        return Layer(
            kernel=_float32(kernel),
            scale=_float32(scale),
            bias=_float32(bias),
            mean=_float32(generator.normal(size=channels)),
            var=_float32(generator.uniform(0.1, 2.0, channels)),
            gate=gate,
            source=source.astype(np.int32),
            shift=self.shifts(),
        )

    def _rows(self, values):
        """One value per channel [C] as [C / groups, O], for the kernel entries that read the channel."""
        sizes = self.sizes
        return np.repeat(values.reshape(sizes.groups, -1).T, sizes.outputs // sizes.groups, axis=1)


def _float32(array):
    return np.asarray(array, np.float32).astype(np.float64)


def recipes(shapes=tuple(SHAPES)):
    """Recipes of any structure."""
    shares = st.sampled_from((0.0, 0.3, 0.8, 1.0))
    return st.builds(
        Recipe,
        shape=st.sampled_from(shapes),
        seed=st.integers(0, 2**32 - 1),
        exact=st.booleans(),
        closed=shares,
        copies=shares,
        silent=shares,
        empty=shares,
        far=st.sampled_from(SHIFT_RANGES),
        whole=st.booleans(),
    )


def thresholds():
    """Thresholds of de-allocation, the extremes included."""
    return st.sampled_from(THRESHOLDS) | st.floats(0.0, 1.0, width=32, allow_subnormal=False)
