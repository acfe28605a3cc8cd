"""The networks of the method's evaluation in PyTorch, for comparison; needs torch."""

from collections.abc import Callable
from typing import Any

import flax.linen
import torch
from torch import Tensor, nn
from torch.nn import functional

from pytorch_baseline.layers import PlainLayer, SelectiveLayer
from selconv_jax.errors import ConfigError
from selconv_jax.models import CondenseNet, DenseNet, PreResNet, ResNeXt
from selconv_jax.models._parts import STEMS

__all__ = ["torch_network"]


def torch_network(model: flax.linen.Module, channels: int) -> nn.Module:
    """Build the PyTorch counterpart of one of our networks, freshly initialized.

    Its parameters have the authors' names: load those of ours by `selconv_jax.interop.torch.state_dict`.

    Args:
        model: A network of `selconv_jax.models`.
        channels: Number of image channels.

    Returns:
        A module from images ``[N, C, H, W]`` to logits ``[N, num_classes]``.

    Raises:
        ConfigError: The network is none of them.
    """
    if not isinstance(model, DenseNet | PreResNet | ResNeXt | CondenseNet):
        raise ConfigError(
            f"the model is a {type(model).__name__}; in PyTorch there are DenseNet, PreResNet, ResNeXt "
            "and CondenseNet. Leave --torch out."
        )
    return _Network(model, channels)


class _Network(nn.Module):
    """Stem, blocks of any layer type with pooling between them, and classifier."""

    def __init__(self, model: Any, channels: int) -> None:
        super().__init__()
        self.blocks = tuple(model.blocks)
        size, stride, self.has_max_pool = STEMS[model.stem]
        width = _stem_width(model)
        stem = nn.Conv2d(channels, width, size, stride, size // 2, bias=False)
        self.features = nn.Module()
        if isinstance(model, CondenseNet):  # the authors keep its stem outside
            self.conv0, self.stem_name = stem, "conv0"
        else:
            self.features.add_module("conv0", stem)
            self.stem_name = "features.conv0"
        for index, layers in enumerate(self.blocks):
            block = nn.Sequential()
            for number in range(1, layers + 1):
                layer = _LAYERS[type(model)](model, width, index)
                width = layer.width
                block.add_module(f"layer{number}", layer)
            self.features.add_module(f"block{index + 1}", block)
            if index + 1 < len(self.blocks) and getattr(model, "compression", 1) < 1:
                transition = nn.Module()
                kept = int(width * model.compression)
                transition.add_module(
                    "brc", _selective(model, width, kept, 1, dropout_rate=model.dropout_rate)
                )
                self.features.add_module(f"trans{index + 1}", transition)
                width = kept
        self.features.add_module("norm_last", nn.BatchNorm2d(width))
        self.classifier = nn.Linear(width, model.num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map ``[N, C, H, W]`` to ``[N, num_classes]``."""
        parts = dict(self.features.named_children())
        x = self.get_submodule(self.stem_name)(images)
        if self.has_max_pool:
            x = functional.max_pool2d(x, 3, 2, 1)
        for index in range(1, len(self.blocks) + 1):
            x = parts[f"block{index}"](x)
            if transition := parts.get(f"trans{index}"):
                x = transition.get_submodule("brc")(x)
            if index < len(self.blocks):
                x = functional.avg_pool2d(x, 2)
        x = functional.relu(parts["norm_last"](x), inplace=True)
        return self.classifier(x.mean(dim=(2, 3)))


class _DenseLayer(nn.Module):
    """Layer of a DenseNet: the output of two convolutions is concatenated to the input."""

    def __init__(self, model: DenseNet, channels: int, index: int) -> None:
        super().__init__()
        growth, dropout = model.growth, model.dropout_rate
        self.width = channels + growth
        self.brc_1 = _selective(model, channels, 4 * growth, 1, dropout_rate=dropout)
        self.brc_2 = _gated(model, 4 * growth, growth, 3, dropout_rate=dropout)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.brc_2(self.brc_1(x))], dim=1)


class _CondenseLayer(nn.Module):
    """Layer of a CondenseNet: a DenseNet layer with groups, and a growth rate per block."""

    def __init__(self, model: CondenseNet, channels: int, index: int) -> None:
        super().__init__()
        growth = model.growth[index]
        self.width = channels + growth
        self.brc_1 = _selective(model, channels, 4 * growth, 1, dropout_rate=model.dropout_rate)
        self.brc_2 = PlainLayer(4 * growth, growth, 3, groups=model.groups)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.brc_2(self.brc_1(x))], dim=1)


class _Bottleneck(nn.Module):
    """Bottleneck of a PreResNet or ResNeXt; new channels of the shortcut are zero-padded."""

    def __init__(self, model: PreResNet | ResNeXt, channels: int, index: int) -> None:
        super().__init__()
        if isinstance(model, ResNeXt):
            inner, self.width = model.groups * model.base_width * 2**index, 64 * model.widen * 2**index
            middle: nn.Module = PlainLayer(inner, inner, 3, groups=model.groups)
        else:
            inner = _stem_width(model) * 2**index
            self.width = 4 * inner
            middle = _gated(model, inner, inner, 3)
        self.grown = self.width - channels
        self.brc_1 = _selective(model, channels, inner, 1)
        self.brc_2 = middle
        self.brc_3 = _selective(model, inner, self.width, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.brc_3(self.brc_2(self.brc_1(x)))
        return y + (functional.pad(x, (0, 0, 0, 0, 0, self.grown)) if self.grown else x)


_LAYERS: dict[type, Callable[[Any, int, int], Any]] = {
    DenseNet: _DenseLayer,
    CondenseNet: _CondenseLayer,
    PreResNet: _Bottleneck,
    ResNeXt: _Bottleneck,
}


def _stem_width(model: Any) -> int:
    if isinstance(model, PreResNet):
        return model.width or (64 if model.stem == "imagenet" else 16)
    if isinstance(model, ResNeXt):
        return 64
    return 2 * (model.growth[0] if isinstance(model, CondenseNet) else model.growth)


def _selective(model: Any, *arguments: Any, **named: Any) -> PlainLayer:
    """Make a layer that is selective in the method."""
    if model.variant == "plain":
        return PlainLayer(*arguments, **named)
    return SelectiveLayer(*arguments, gate_only=model.variant == "gate_only", **named)


def _gated(model: Any, *arguments: Any, **named: Any) -> PlainLayer:
    """Make a layer that is gate-only in the method."""
    if model.variant == "plain":
        return PlainLayer(*arguments, **named)
    return SelectiveLayer(*arguments, gate_only=True, **named)
