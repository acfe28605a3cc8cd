"""The picture of the method: its kernels are computed, and its example obeys the rules."""

import numpy as np
from matplotlib.text import Annotation

from selconv_jax.report import method_picture
from selconv_jax.report._method_picture import _COPIES, _COPY_KERNEL, _DAMAGE, _KERNEL, _footprint


def test_six_panels_in_order():
    titles = [axes.get_title("left") for axes in method_picture().axes]
    assert titles == [
        "1  Measure",
        "2  De-allocate",
        "3  Re-allocate",
        "Slot 0",
        "+   Slot 1, the copy",
        "=   Together",
    ]


def test_closed_slots_are_hatched_then_filled():
    measure, close, fill, *_ = method_picture().axes
    hatched = [[patch for patch in axes.patches if patch.get_hatch()] for axes in (measure, close, fill)]
    assert [len(patches) for patches in hatched] == [0, len(_COPIES), 0]
    assert [text.get_text() for text in close.texts].count("closed") == len(_COPIES)
    written = "\n".join(text.get_text() for text in fill.texts)
    for source, shift in _COPIES.values():
        assert f"copy of {source}\nb = ({shift[0]:+}, {shift[1]:+})" in written


def test_example_closes_the_least_and_copies_the_best():
    order = np.argsort(_DAMAGE)
    assert set(order[: len(_COPIES)]) == set(_COPIES)
    assert {source for source, _ in _COPIES.values()} == set(order[-2:])
    np.testing.assert_allclose(sum(_DAMAGE), 1.0)


def test_effective_kernel_is_the_sum_of_the_shifted_ones():
    own, copy, together = (np.asarray(axes.images[0].get_array()) for axes in method_picture().axes[3:])
    np.testing.assert_allclose(together, own + copy)
    np.testing.assert_allclose(own, np.pad(_KERNEL, 2))
    down, right = _COPIES[1][1]
    pixels = np.arange(-3, 4)
    np.testing.assert_allclose(copy.sum(), _COPY_KERNEL.sum())  # bilinear weights sum to 1
    center = np.array([(copy * pixels[:, None]).sum(), (copy * pixels).sum()]) / copy.sum()
    taps = np.arange(-1, 2)
    before = (
        np.array([(_COPY_KERNEL * taps[:, None]).sum(), (_COPY_KERNEL * taps).sum()]) / _COPY_KERNEL.sum()
    )
    np.testing.assert_allclose(center - before, [down, right])


def test_whole_pixels_move_the_kernel_unchanged():
    moved = _footprint(_KERNEL, 1.0, -2.0)
    np.testing.assert_allclose(moved, np.pad(_KERNEL, ((3, 1), (0, 4))))


def test_arrow_shows_the_shift():
    for axes in method_picture().axes[4:]:
        (arrow,) = [text for text in axes.texts if isinstance(text, Annotation)]
        assert arrow.xy == (-0.75, 1.25)
        assert arrow.xyann == (0, 0)
        assert axes.yaxis_inverted()
