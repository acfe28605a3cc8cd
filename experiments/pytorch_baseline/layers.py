"""The selective layer and its plain counterpart in PyTorch, for comparison; needs torch.

Written as PyTorch programs are: NCHW, autograd, `torch.nn.functional`. Names and layouts of parameters and
buffers are those of the authors' checkpoints, so that what `selconv_jax.interop.torch.state_dict` returns
can be loaded, strictly.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["PlainLayer", "SelectiveLayer", "shifted"]


def shifted(x: Tensor, shift: Tensor, identity: Tensor) -> Tensor:
    """Shift every channel by its own offset, with PyTorch's bilinear `grid_sample`.

    Channels take the place of the batch, so that each has its own grid, as in the authors' code.

    Args:
        x: ``[N, C, H, W]``.
        shift: ``[C, 2]`` in pixels, (column, row) as PyTorch's grids have it.
        identity: ``[2, 3]``, the affine map that moves nothing.

    Returns:
        ``[N, C, H, W]``; positions outside are clamped to the image.
    """
    batch, channels, height, width = x.shape
    # Without align_corners the coordinates run from -1 to 1 over the full width of the pixels.
    offset = shift * shift.new_tensor([2 / width, 2 / height])
    maps = torch.cat([identity[:, :2].expand(channels, 2, 2), offset[:, :, None]], dim=2)
    grid = functional.affine_grid(maps, [channels, batch, height, width], align_corners=False)
    moved = functional.grid_sample(
        x.transpose(0, 1), grid, mode="bilinear", padding_mode="border", align_corners=False
    )
    return moved.transpose(0, 1)


class PlainLayer(nn.Module):
    """Batch norm, ReLU, dropout and convolution without bias.

    Args:
        channels: Of the input.
        features: Of the output.
        size: Of the kernel, ``size x size``; the padding keeps the image's size.
        groups: Of the convolution.
        dropout_rate: Fraction of the activations that dropout removes in training.
        stride: Of the convolution.
        padding: In pixels; None: the one that keeps the size.
    """

    def __init__(
        self,
        channels: int,
        features: int,
        size: int,
        groups: int = 1,
        dropout_rate: float = 0.0,
        stride: int = 1,
        padding: int | None = None,
    ) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        padding = size // 2 if padding is None else padding
        self.conv = nn.Conv2d(channels, features, size, stride, padding, groups=groups, bias=False)
        self.dropout_rate = dropout_rate

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[N, C, H, W]`` to ``[N, O, H', W']``."""
        x = functional.relu(self.norm(self.select(x)), inplace=True)
        if self.dropout_rate:
            x = functional.dropout(x, self.dropout_rate, self.training)
        return self.convolve(x)

    def select(self, x: Tensor) -> Tensor:
        """Return the input as the layer reads it."""
        return x

    def convolve(self, x: Tensor) -> Tensor:
        """Convolve, with all of the kernel."""
        return self.conv(x)


class SelectiveLayer(PlainLayer):
    """Channel selection, then `PlainLayer` without the closed channels.

    Only copies are gathered and sampled, and their places are looked up when the allocation is loaded, not
    in every step. Closed channels are zeros of the kernel, at no cost per pixel. Both are cheaper than the
    straightforward form of the method, which samples and multiplies all channels.

    Args:
        *arguments: Those of `PlainLayer`.
        gate_only: Whether channels can only be closed, never copied.
        **named: Further ones of `PlainLayer`.
    """

    is_open: Tensor
    _ind_ptr: Tensor
    _eye: Tensor
    copies: Tensor | None
    sources: Tensor | None

    def __init__(self, *arguments: Any, gate_only: bool = False, **named: Any) -> None:
        super().__init__(*arguments, **named)
        channels = self.norm.num_features
        self.gate_only = gate_only
        self.register_buffer("is_open", torch.ones(channels))
        # Not part of the checkpoint, but moved between devices with the module.
        self.register_buffer("copies", None, persistent=False)
        self.register_buffer("sources", None, persistent=False)
        if not gate_only:
            self.register_buffer("_ind_ptr", torch.full((channels,), -1))
            self.register_buffer("_eye", torch.eye(2, 3))
            self._bias = nn.Parameter(torch.zeros(channels, 2))
            self.register_load_state_dict_post_hook(lambda module, _: module.read_allocation())

    def read_allocation(self) -> None:
        """Look up the copies and their sources."""
        copies = (self._ind_ptr >= 0).nonzero()[:, 0]
        self.copies, self.sources = (copies, self._ind_ptr[copies]) if len(copies) else (None, None)

    def select(self, x: Tensor) -> Tensor:
        """Replace each copy by its shifted source; other channels stay as they are."""
        if self.copies is None or self.sources is None:
            return x
        moved = shifted(x.index_select(1, self.sources), self._bias[self.copies], self._eye)
        return x.index_copy(1, self.copies, moved.to(x.dtype))

    def convolve(self, x: Tensor) -> Tensor:
        """Convolve, with zeros in the kernel for closed channels."""
        conv, kernel = self.conv, self.conv.weight * self.is_open[None, :, None, None]
        return functional.conv2d(x, kernel, None, conv.stride, conv.padding, conv.dilation, conv.groups)
