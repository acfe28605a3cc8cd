"""Every picture is drawn whole: of the stated size, no text cut off, no text over another."""

from collections.abc import Callable

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from selconv_jax.report import (
    LayerAllocation,
    allocation_overview,
    channel_map,
    learning_curves,
    method_picture,
    save_figure,
)
from selconv_jax.report._comparison import ConfigurationResults
from selconv_jax.report._comparison_picture import comparison_picture


def layer(
    channels: int,
    sources: int,
    copies: int,
    dimensions: int = 2,
    reach: float = 1.5,
    name: str = "block1/conv",
) -> LayerAllocation:
    """A tenth of the slots is closed, ``copies`` of them copy ``sources`` channels."""
    generator = np.random.default_rng(channels)
    order = generator.permutation(channels)
    gate = np.ones(channels, bool)
    source = np.full(channels, -1, np.int32)
    source[order[:copies]] = order[-1 - generator.integers(0, max(sources, 1), copies)]
    gate[order[copies : copies + channels // 10]] = False
    shift = generator.uniform(-reach, reach, (channels, dimensions))
    return LayerAllocation(name, gate, source, shift, generator.random(channels) ** 4, 48)


def log(first: int, last: int) -> list[dict[str, float]]:
    return [
        {
            "epoch": epoch,
            "train_loss": 2.0 / epoch,
            "train_accuracy": 1 - 0.5 / epoch,
            "validation_loss": 2.4 / epoch,
            "validation_accuracy": 1.0,
            "test_loss": 2.5 / epoch,
            "test_accuracy": 1.0,
            "test_top5": 1.0,
            "learning_rate": 0.1 / epoch,
            "images_per_second": 123456.0,
            "deallocated": 500 if epoch <= last // 2 + first // 2 else 0,
            "reallocated": 400 if epoch <= last // 2 + first // 2 else 0,
            "open_channels": 80_000,
            "copies": 20_000,
            "channels": 100_000,
        }
        for epoch in range(first, last + 1)
    ]


def results(names: list[str], seeds: int, epochs: int) -> list[ConfigurationResults]:
    """Runs whose error falls to another level for every configuration and seed."""
    return [
        ConfigurationResults(
            name,
            {
                seed: [
                    {"epoch": epoch, "test_accuracy": 0.95 - 0.003 * (index + seed) - 0.5 / epoch}
                    for epoch in range(1, epochs + 1)
                ]
                for seed in range(seeds)
            },
        )
        for index, name in enumerate(names)
    ]


LONG = "cifar10/densenet40_selective/allocation.threshold=0.01,model.options.blocks=16,16,16"
PICTURES: dict[str, Callable[[], Figure]] = {
    "one channel, a copy of itself": lambda: channel_map(
        LayerAllocation("c", np.ones(1, bool), np.zeros(1, np.int32), np.full((1, 2), 0.5), np.ones(1), 1)
    ),
    "one channel, unshifted copy": lambda: channel_map(
        LayerAllocation("c", np.ones(1, bool), np.zeros(1, np.int32), np.zeros((1, 2)), None, 1)
    ),
    "8 channels": lambda: channel_map(layer(8, 1, 2)),
    "no copies": lambda: channel_map(layer(456, 0, 0)),
    "every damage 0": lambda: channel_map(LayerAllocation("c", np.ones(4, bool), None, None, np.zeros(4), 1)),
    "everything closed": lambda: channel_map(LayerAllocation("c", np.zeros(40, bool), None, None, None, 1)),
    "one axis": lambda: channel_map(layer(64, 3, 20, dimensions=1)),
    "three axes": lambda: channel_map(layer(64, 3, 12, dimensions=3)),
    "overview of one": lambda: allocation_overview([layer(8, 1, 2)], "net"),
    "curves": lambda: learning_curves(log(281, 300), "run"),
    "curves of one epoch": lambda: learning_curves(log(1, 1), "run"),
    "method": method_picture,
    "comparison of one run": lambda: comparison_picture(results(["quickstart"], 1, 1), "quickstart"),
    "comparison of two": lambda: comparison_picture(
        results(["model.variant=plain", "model.variant=selective"], 3, 7), "quickstart"
    ),
    "comparison of 30": lambda: comparison_picture(results([f"{LONG}{i}" for i in range(30)], 2, 300), LONG),
}
SLOW: dict[str, Callable[[], Figure]] = {
    "456 channels": lambda: channel_map(layer(456, 30, 120)),
    "overview of 60": lambda: allocation_overview(
        [layer(1024 + i, 3, 100, name=f"features/stage_{i % 4}/block_{i}/conv_1") for i in range(60)], "net"
    ),
    "everything a copy, far": lambda: channel_map(layer(64, 64, 64, reach=12.0)),
    "1024 channels": lambda: channel_map(layer(1024, 40, 300)),
    "5000 channels": lambda: channel_map(layer(5000, 40, 300)),
    "overview of 162": lambda: allocation_overview(
        [layer(64, 3, 10, name=f"stage{i // 54}/block{i // 3}/conv{i % 3}") for i in range(162)], "net"
    ),
}


@pytest.mark.parametrize(
    "build",
    [
        *(pytest.param(build, id=name) for name, build in PICTURES.items()),
        *(pytest.param(build, id=name, marks=pytest.mark.slow) for name, build in SLOW.items()),
    ],
)
def test_readable(build, tmp_path, monkeypatch):
    extents: dict[Text, np.ndarray] = {}
    draw = Text.draw

    def recording_draw(self, renderer, *arguments, **options):
        draw(self, renderer, *arguments, **options)
        if self.get_visible() and self.get_text().strip():
            extents[self] = Text.get_window_extent(self, renderer).extents

    monkeypatch.setattr(Text, "draw", recording_draw)
    figure = build()
    save_figure(figure, tmp_path / "picture.png")
    with Image.open(tmp_path / "picture.png") as image:
        width, height = image.size
        assert (width, height) == tuple(int(side) for side in figure.get_size_inches() * 120)
        assert np.unique(np.asarray(image.convert("L"))).size > 10, "the picture is empty"

    assert len(extents) > 5
    texts, boxes = [text.get_text() for text in extents], np.array(list(extents.values()))
    outside = (boxes[:, :2] < -1).any(axis=1) | (boxes[:, 2:] > np.array([width, height]) + 1).any(axis=1)
    assert not [texts[i] for i in np.flatnonzero(outside)], "cut off at the edge"

    low, high = boxes[:, None, :2] + 1.5, boxes[:, None, 2:] - 1.5  # a touch is no overlap
    over = ((low < np.swapaxes(high, 0, 1)) & (np.swapaxes(low, 0, 1) < high)).all(axis=-1)
    pairs = [(texts[i], texts[j]) for i, j in np.argwhere(np.triu(over, 1))]
    assert not pairs, "texts overlap"
