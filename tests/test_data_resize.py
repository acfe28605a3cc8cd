"""Random parts and middles of images: bounds, shares, and pixels where they are known."""

import numpy as np
import pytest

from selconv_jax.data._resize import random_box, random_resized_crop, resized_center_crop


@pytest.mark.parametrize(("height", "width"), [(300, 400), (400, 300), (64, 64)])
def test_boxes_lie_inside_with_the_asked_share_and_ratio(height, width):
    generator = np.random.default_rng(0)
    boxes = np.array([random_box(height, width, generator) for _ in range(2000)])
    top, left, tall, wide = boxes.T
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + tall <= height).all()
    assert (left + wide <= width).all()
    share, ratio = tall * wide / (height * width), wide / tall
    assert 0.07 < share.min() < 0.12
    assert share.max() > 0.9
    assert 0.70 < ratio.min() < 0.8
    assert 1.25 < ratio.max() < 1.42
    # Every place can be taken: the parts reach all four edges.
    assert (top.min(), left.min()) == (0, 0)
    assert ((top + tall).max(), (left + wide).max()) == (height, width)


@pytest.mark.parametrize(("height", "width", "box"), [(10, 100, (0, 43, 10, 13)), (100, 10, (43, 0, 13, 10))])
def test_where_no_part_fits_it_is_the_middle(height, width, box):
    class Largest:
        """Draws the largest share and the most extreme ratio."""

        def uniform(self, low, high):
            return high if high == 1 else high if height > width else low

    assert random_box(height, width, Largest()) == box


def test_a_part_is_cut_and_resized():
    image = np.arange(100 * 80 * 3, dtype=np.uint32).reshape(100, 80, 3).astype(np.uint8)
    image[...] = np.arange(80, dtype=np.uint8)[None, :, None]  # a ramp from left to right
    top, left, _, width = random_box(100, 80, np.random.default_rng(3))
    part = random_resized_crop(image, (16, 16), np.random.default_rng(3))
    assert part.shape == (16, 16, 3)
    centers = left + (np.arange(16) + 0.5) * width / 16 - 0.5
    np.testing.assert_allclose(part[5, 2:-2, 1], centers[2:-2], atol=1)
    again = random_resized_crop(image, (16, 16), np.random.default_rng(3))
    np.testing.assert_array_equal(part, again)
    assert top >= 0


def test_grey_images_keep_their_axis():
    image = np.full((30, 40, 1), 77, np.uint8)
    assert (random_resized_crop(image, (8, 9), np.random.default_rng(0)) == np.full((8, 9, 1), 77)).all()


@pytest.mark.parametrize("shape", [(32, 48, 3), (48, 32, 3), (32, 32, 3)])
def test_middle_of_an_image_of_the_right_size(shape):
    """The shorter side is what it should be: nothing is interpolated."""
    image = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    top, left = (shape[0] - 28) // 2, (shape[1] - 28) // 2
    middle = resized_center_crop(image, (28, 28), shorter_side=32)
    np.testing.assert_array_equal(middle, image[top : top + 28, left : left + 28])


def test_middle_of_a_halved_image():
    image = np.zeros((64, 100, 3), np.uint8)
    image[:, 50:] = 200  # the edge is in the middle
    middle = resized_center_crop(image, (28, 28), shorter_side=32)
    np.testing.assert_array_equal(middle[:, :13], 0)
    np.testing.assert_array_equal(middle[:, 15:], 200)
