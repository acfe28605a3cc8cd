"""The base class of the networks: attributes that all share, their checks, and the layers that they make."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from selconv_jax._utils.arguments import check_number, check_whole, is_whole
from selconv_jax.errors import ConfigError, nearest
from selconv_jax.models._parts import STEMS, Classifier, Stem
from selconv_jax.nn._layers import BatchNormReLUConv, SelectiveConv

VARIANTS = ("plain", "selective", "gate_only")

# Image sizes that the stems are designed for (experiments, "Stem").
_STEM_IMAGES = {"cifar": 32, "tiny_imagenet": 64, "imagenet": 224}


@dataclasses.dataclass(frozen=True)
class LayerMaker:
    """Makes the layers of a network in its variant and types; see `Network` for the attributes."""

    variant: str
    capacity: float
    dropout_rate: float
    dtype: Any
    param_dtype: Any

    def plain(self, features: int, size: int, name: str, **options: Any) -> BatchNormReLUConv:
        """Make a layer that is plain in every variant, with a ``size x size`` kernel and without dropout."""
        return self._layer(BatchNormReLUConv, features, size, name, dropout_rate=0.0, **options)

    def gated(self, features: int, size: int, name: str, **options: Any) -> BatchNormReLUConv:
        """Make a layer that is gate-only where the network is not plain."""
        if self.variant == "plain":
            return self._layer(BatchNormReLUConv, features, size, name, **options)
        return self._layer(SelectiveConv, features, size, name, gate_only=True, **options)

    def selective(self, features: int, size: int, name: str, **options: Any) -> BatchNormReLUConv:
        """Make a layer of the network's variant."""
        if self.variant == "plain":
            return self._layer(BatchNormReLUConv, features, size, name, **options)
        options = {"gate_only": self.variant == "gate_only", "capacity": self.capacity, **options}
        return self._layer(SelectiveConv, features, size, name, **options)

    def _layer(
        self, kind: Callable[..., BatchNormReLUConv], features: int, size: int, name: str, **options: Any
    ) -> BatchNormReLUConv:
        common = {"dropout_rate": self.dropout_rate, "dtype": self.dtype, "param_dtype": self.param_dtype}
        return kind(features, kernel_size=(size, size), name=name, **(common | options))


class Network(nn.Module):
    """Base class of the image networks, called as ``apply(variables, images, train=...)``.

    Subclasses have an attribute ``blocks``, the number of layers per block; between blocks the image size
    halves.

    Attributes:
        num_classes: Number of outputs.
        stem: First convolution: ``"cifar"`` (3x3, stride 1; also for Fashion-MNIST), ``"tiny_imagenet"``
            (3x3, stride 2) or ``"imagenet"`` (7x7, stride 2, then a 3x3 max pool of stride 2).
        variant: ``"plain"``, ``"selective"``, or ``"gate_only"`` (de-allocation without re-allocation).
        capacity: See `selconv_jax.SelectiveConv`.
        dtype: Type of the computation; None: that of the input.
        param_dtype: Type of the parameters.

    Raises:
        ConfigError: A value is out of bounds or not one of the choices.
    """

    num_classes: int
    stem: str = dataclasses.field(default="cifar", kw_only=True)
    variant: str = dataclasses.field(default="selective", kw_only=True)
    capacity: float = dataclasses.field(default=1.0, kw_only=True)
    dtype: Any = dataclasses.field(default=None, kw_only=True)
    param_dtype: Any = dataclasses.field(default=jnp.float32, kw_only=True)

    def __post_init__(self) -> None:
        for name, choices in (("stem", STEMS), ("variant", VARIANTS)):
            value = getattr(self, name)
            if not isinstance(value, str) or value not in choices:
                raise ConfigError(f"{name} is {value!r}. {nearest(str(value), choices)}")
        for name in ("stem_norm", "projection"):
            if not isinstance(value := getattr(self, name, False), bool):
                raise ConfigError(f"{name} is {value!r}; it must be True or False.")
        check_whole("num_classes", self.num_classes, 1)
        self._check_widths("blocks")
        if hasattr(self, "dropout_rate"):
            check_number("dropout_rate", self.dropout_rate, lambda rate: 0 <= rate < 1, "a number in [0, 1)")
        super().__post_init__()

    @nn.nowrap
    def _check_widths(self, name: str, length: int | None = None) -> None:
        """Raise a `ConfigError` unless an attribute is a list of whole numbers, one per block."""
        values = getattr(self, name)
        if not isinstance(values, Sequence) or not values or not all(is_whole(v) and v >= 1 for v in values):
            raise ConfigError(f"{name} is {values!r}; it must be a list of whole numbers, all at least 1.")
        if length is not None and len(values) != length:
            raise ConfigError(f"{name} is {values!r}; it must be a list of {length}, like blocks.")

    @property
    def _make(self) -> LayerMaker:
        rate = getattr(self, "dropout_rate", 0.0)
        return LayerMaker(self.variant, self.capacity, rate, self.dtype, self.param_dtype)

    @nn.nowrap
    def _stem(self, features: int, kernel_size: int | None = None, norm: bool = False) -> Stem:
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        return Stem(features, self.stem, kernel_size, norm, **types, name="stem")

    @nn.nowrap
    def _classifier(self, zero_bias: bool = False) -> Classifier:
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        return Classifier(self.num_classes, zero_bias, **types, name="classifier")

    @nn.nowrap
    def example_images(self, variables: Mapping[str, Any]) -> jax.ShapeDtypeStruct:
        """Return the shape ``[1, H, W, C]`` and dtype of an input image.

        Args:
            variables: The network's variables, or their shapes, which determine ``C``.

        Raises:
            ValueError: The variables do not belong to the network.
        """
        network: Any = self
        try:
            colours = variables["params"]["stem"]["kernel"].shape[-2]
        except KeyError as error:
            raise ValueError(
                "the variables have no params/stem/kernel: they are not the network's."
            ) from error
        _, stride, pool = STEMS[self.stem]
        least = stride * (2 if pool else 1) * 2 ** len(network.blocks)  # large enough for all pools
        size = max(_STEM_IMAGES[self.stem], least)
        return jax.ShapeDtypeStruct((1, size, size, colours), self.dtype or jnp.float32)
