"""Channel maps and overviews: cells, counts and arrows equal the state they show."""

import dataclasses

import numpy as np
import pytest
from matplotlib.text import Annotation

from selconv_jax.errors import SelconvError
from selconv_jax.report import LayerAllocation, allocation_overview, channel_map


def hand_made() -> LayerAllocation:
    """Slots 2 and 5 copy channel 5 (5 is a copy of itself), 7 copies the closed 3, 6 copies 0."""
    shift = np.zeros((8, 2), np.float32)
    shift[[2, 5, 7, 6]] = [[0.5, -1.25], [-1.0, 1.0], [0.0625, 0.0], [1.5, 0.5]]
    return LayerAllocation(
        "block1/conv",
        np.array([1, 1, 1, 0, 1, 1, 1, 1], bool),
        np.array([-1, -1, 5, -1, -1, 5, 0, 3], np.int32),
        shift,
        np.array([0.6, 0.1, 0.2, 0.0, 0.3, 0.25, 0.15, 0.05]),
        16,
    )


def many(channels: int, sources: int, copies: int, dimensions: int = 2) -> LayerAllocation:
    """Slots sources, sources + 1, ... copy the first channels in turn; the last slot is closed."""
    generator = np.random.default_rng(0)
    gate = np.ones(channels, bool)
    gate[-1] = False
    source = np.full(channels, -1, np.int32)
    source[sources : sources + copies] = np.arange(copies) % sources
    shift = generator.uniform(-1.5, 1.5, (channels, dimensions)) * (source >= 0)[:, None]
    return LayerAllocation("many", gate, source, shift, generator.random(channels), 16)


def cards(figure) -> dict[str, object]:
    return {
        axes.get_title("left").split(":")[0]: axes
        for axes in figure.axes
        if axes.get_title("left").startswith("Channel")
    }


def arrows(axes) -> list[tuple[tuple[float, float], tuple[float, float]]]:
    """(start, end) in data coordinates: x is columns, y is rows."""
    found = [text for text in axes.texts if isinstance(text, Annotation) and text.arrow_patch]
    return [(tuple(map(float, text.xyann)), tuple(map(float, text.xy))) for text in found]


def numbers(axes) -> set[str]:
    return {text.get_text() for text in axes.texts if isinstance(text, Annotation) and not text.arrow_patch}


def texts(figure) -> str:
    found = [text.get_text() for part in (figure, *figure.subfigs) for text in part.texts]
    found += [text.get_text() for sub in figure.subfigs for part in sub.subfigs for text in part.texts]
    return "\n".join(found)


def test_states():
    layer = hand_made()
    np.testing.assert_array_equal(layer.own, [1, 1, 0, 0, 1, 0, 0, 0])
    np.testing.assert_array_equal(layer.copy, [0, 0, 1, 0, 0, 1, 1, 1])
    np.testing.assert_array_equal(layer.closed, [0, 0, 0, 1, 0, 0, 0, 0])
    assert {source: list(slots) for source, slots in layer.copies_of.items()} == {
        5: [2, 5],
        0: [6],
        3: [7],
    }
    assert list(layer.copies_of) == [5, 0, 3], "most copied first, equal ones by index"


def test_a_closed_slot_is_no_copy():
    layer = dataclasses.replace(hand_made(), gate=np.zeros(8, bool))
    assert layer.closed.all()
    assert layer.copies_of == {}


def test_strip_shows_every_slot():
    strip = channel_map(hand_made()).axes[0]
    cells = strip.images[0].get_array()
    np.testing.assert_array_equal(cells[0, :8], [0, 0, 1, 2, 0, 1, 1, 1])
    assert cells.mask[0, 8:].all()
    assert [text.get_text() for text in strip.get_legend().get_texts()] == [
        "reads its own channel: 3",
        "copy of channel s shifted by b: 4",
        "closed (crossed): 1",
        "a channel that copies read: 3",
    ]
    crosses, rings = strip.get_lines()
    np.testing.assert_array_equal(crosses.get_xydata(), [[3, 0]])
    np.testing.assert_array_equal(rings.get_xdata(), [0, 3, 5])
    labels = {text.xy[0]: text.get_text() for text in strip.texts}
    assert labels == {2: "5", 5: "5", 6: "0", 7: "3"}


def test_score_bars():
    layer = hand_made()
    own, copy = channel_map(layer).axes[1].collections
    for bars, state in ((own, layer.own), (copy, layer.copy)):
        ends = np.array([segment[1] for segment in bars.get_segments()])
        np.testing.assert_allclose(ends, np.stack([np.flatnonzero(state), layer.score[state]], axis=1))
    without = channel_map(dataclasses.replace(layer, score=None))
    assert len(without.axes) == len(channel_map(layer).axes) - 1


def test_arrows_end_at_the_shifts():
    drawn = cards(channel_map(hand_made()))
    assert list(drawn) == ["Channel 5", "Channel 0", "Channel 3"]
    origin = (0.0, 0.0)
    # (row, column) becomes (x, y) = (column, row), with y counted downwards
    assert arrows(drawn["Channel 5"]) == [(origin, (-1.25, 0.5)), (origin, (1.0, -1.0))]
    assert arrows(drawn["Channel 0"]) == [(origin, (0.5, 1.5))]
    assert arrows(drawn["Channel 3"]) == [(origin, (0.0, 0.0625))]
    assert numbers(drawn["Channel 5"]) == {"2", "5"}
    for axes in drawn.values():
        assert axes.yaxis_inverted()
        assert axes.get_aspect() == 1.0
        assert axes.get_xlim() == (-2.5, 2.5)


def test_cards_tell_what_the_channels_own_slot_does():
    drawn = cards(channel_map(hand_made()))
    about = {name: axes.texts[0].get_text() for name, axes in drawn.items()}
    assert about == {
        "Channel 5": "slot 5 reads it shifted",
        "Channel 0": "slot 0 reads it unshifted",
        "Channel 3": "slot 3 is closed",
    }
    hollow = {name: axes.get_lines()[0].get_color() == "white" for name, axes in drawn.items()}
    assert hollow == {"Channel 5": True, "Channel 0": False, "Channel 3": True}
    chain = LayerAllocation("c", np.ones(3, bool), np.array([2, 0, -1]), np.ones((3, 2)), None, 1)
    card = cards(channel_map(chain))["Channel 0"]
    assert card.texts[0].get_text() == "slot 0 is a copy of channel 2"


def test_key_explains_scale_and_axes():
    key = next(axes for axes in channel_map(hand_made()).axes if "How to read" in axes.get_title("left"))
    assert key.get_xlabel() == "column shift (pixels) →"
    assert key.get_ylabel() == "← row shift (pixels)"  # turned by 90 degrees: the arrow points down
    lengths = [np.hypot(end[0] - start[0], end[1] - start[1]) for start, end in arrows(key)]
    assert 1.0 in lengths
    assert "1 pixel" in {text.get_text() for text in key.texts}


def test_one_axis_has_a_lane_per_copy():
    shift = np.array([[0.0], [1.25], [-0.5]])
    layer = LayerAllocation("1d", np.ones(3, bool), np.array([-1, 0, 0]), shift, None, 4)
    card = cards(channel_map(layer))["Channel 0"]
    assert arrows(card) == [((0.0, 1.0), (1.25, 1.0)), ((0.0, 2.0), (-0.5, 2.0))]
    assert numbers(card) == {"1", "2"}


def test_three_axes_draw_the_last_two_and_print_the_first():
    shift = np.array([[0.0, 0.0, 0.0], [0.75, 1.25, -0.5], [-0.04, -1.0, 0.0]])
    layer = LayerAllocation("3d", np.ones(3, bool), np.array([-1, 0, 0]), shift, None, 4)
    figure = channel_map(layer)
    card = cards(figure)["Channel 0"]
    assert arrows(card) == [((0.0, 0.0), (-0.5, 1.25)), ((0.0, 0.0), (0.0, -1.0))]
    assert numbers(card) == {"1 (+0.8)", "2 (+0.0)"}
    legends = [legend for sub in figure.subfigs for part in sub.subfigs for legend in part.legends]
    assert any("along the first axis" in text.get_text() for item in legends for text in item.get_texts())


def test_many_sources_are_cut_and_counted():
    assert "further" not in texts(channel_map(many(456, 11, 30)))
    figure = channel_map(many(456, 40, 83))  # 3 channels have three copies, 37 have two
    assert list(cards(figure)) == [f"Channel {source}" for source in range(11)]
    assert "… and 29 further channels with 2 copies each." in texts(figure)
    assert "… and 1 further channel with 1 copy each." in texts(channel_map(many(456, 12, 23)))
    assert "… and 3 further channels with 1 to 2 copies each." in texts(channel_map(many(456, 14, 27)))


def test_crowded_card_says_what_it_leaves_out():
    card = cards(channel_map(many(456, 1, 200)))["Channel 0"]
    written = len(numbers(card))
    assert len(arrows(card)) == 200
    assert 10 < written < 200
    assert card.get_xlabel() == f"{written} of 200 copies numbered"


@pytest.mark.parametrize(
    ("channels", "per_row", "rows"), [(1, 32, 1), (128, 32, 4), (129, 64, 3), (1024, 64, 16)]
)
def test_strip_wraps(channels, per_row, rows):
    layer = LayerAllocation("w", np.ones(channels, bool), None, None, None, 8)
    assert channel_map(layer).axes[0].images[0].get_array().shape == (rows, per_row)


def test_no_copies_and_gate_only():
    none = LayerAllocation("n", np.ones(4, bool), np.full(4, -1), np.zeros((4, 2)), None, 8)
    assert "No slot of this layer is a copy." in texts(channel_map(none))
    gate_only = dataclasses.replace(none, source=None, shift=None)
    assert "gate-only" in texts(channel_map(gate_only))
    assert not cards(channel_map(none)) | cards(channel_map(gate_only))


def test_names_are_no_formulas():
    layer = dataclasses.replace(hand_made(), name="$conv_{$")
    channel_map(layer).draw_without_rendering()
    assert "$conv_{$" in texts(channel_map(layer))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gate": np.ones((2, 4), bool)}, r"'block1/conv'.*gate.*\(2, 4\)"),
        ({"gate": np.ones(0, bool)}, r"C of at least 1"),
        ({"source": None}, "source and shift belong together"),
        ({"source": np.zeros(7, np.int32)}, r"source has shape \(7,\), but gate has 8"),
        ({"score": np.zeros(9)}, r"score has shape \(9,\)"),
        ({"shift": np.zeros((8,))}, r"shift has shape \(8,\), expected \(8, D\)"),
        ({"source": np.array([0, 0, 0, 8, 0, 0, 0, 0])}, r"source\[3\] is 8, outside -1..7"),
        ({"shift": np.full((8, 2), np.nan)}, "shift holds NaN.*earlier checkpoint"),
        ({"score": np.full(8, np.inf)}, "score holds NaN or infinity"),
    ],
)
def test_contradictions_are_refused(change, message):
    with pytest.raises(SelconvError, match=message):
        dataclasses.replace(hand_made(), **change)


def test_overview_counts_and_shares():
    gate_only = LayerAllocation("last", np.array([True, False]), None, None, None, 8)
    figure = allocation_overview([hand_made(), gate_only], "net")
    (axes,) = figure.axes
    own, copy, closed = axes.containers
    np.testing.assert_allclose([bar.get_width() for bar in own], [3 / 8, 1 / 2])
    np.testing.assert_allclose([bar.get_width() for bar in copy], [4 / 8, 0])
    np.testing.assert_allclose([bar.get_width() for bar in closed], [1 / 8, 1 / 2])
    np.testing.assert_allclose([bar.get_x() for bar in closed], [7 / 8, 1 / 2])
    assert [text.get_text() for text in axes.get_yticklabels()] == ["block1/conv", "last"]
    assert [text.get_text() for text in axes.texts] == ["own", "3", "1", "copy", "4", "0", "closed", "1", "1"]
    labels = [text.get_text() for text in figure.subfigs[0].legends[0].get_texts()]
    assert labels == ["own channel: 4 (40.0%)", "copy: 4 (40.0%)", "closed: 2 (20.0%)"]


def test_overview_of_many_layers_continues_in_further_columns():
    layers = [LayerAllocation(f"layer{i}", np.ones(2, bool), None, None, None, 8) for i in range(113)]
    figure = allocation_overview(layers, "net")
    names = [[text.get_text() for text in axes.get_yticklabels()] for axes in figure.axes]
    assert [len(column) for column in names] == [38, 38, 37]
    assert [name for column in names for name in column] == [layer.name for layer in layers]


def test_overview_of_nothing():
    with pytest.raises(SelconvError, match=r"train one with model\.variant = .selective"):
        allocation_overview([], "net")
