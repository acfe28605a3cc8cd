"""Crops, mirroring and normalization against NumPy loops with the same offsets."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selconv_jax.data._augment import augment, crop_and_flip, normalize

augment_jitted = jax.jit(augment, static_argnames=("crop_padding", "flip"))


def reference(images, top, left, mirrored, padding):
    """One image after the other."""
    border = (padding, padding)
    result = np.empty_like(images)
    height, width = images.shape[1:3]
    for index, image in enumerate(images):
        padded = np.pad(image, (border, border, (0, 0)))
        crop = padded[top[index] : top[index] + height, left[index] : left[index] + width]
        result[index] = crop[:, ::-1] if mirrored[index] else crop
    return result


def random_images(shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize(
    ("shape", "padding"),
    [((40, 8, 8, 3), 2), ((40, 28, 28, 1), 4), ((9, 5, 7, 2), 6), ((3, 4, 4, 1), 0)],
)
def test_crops_equal_the_loop(shape, padding):
    images = random_images(shape)
    generator = np.random.default_rng(1)
    top, left = generator.integers(0, 2 * padding + 1, (2, len(images)), dtype=np.int32)
    mirrored = generator.random(len(images)) < 0.5
    actual = jax.jit(crop_and_flip, static_argnames="crop_padding")(
        images, top, left, mirrored, crop_padding=padding
    )
    assert actual.dtype == np.uint8
    np.testing.assert_array_equal(actual, reference(images, top, left, mirrored, padding))


def test_every_corner_of_the_padding():
    images = random_images((4, 6, 6, 3), seed=2)
    top, left = np.array([[0, 0, 8, 8], [0, 8, 0, 8]], np.int32)
    mirrored = np.array([False, True, False, True])
    actual = np.asarray(crop_and_flip(images, top, left, mirrored, crop_padding=4))
    np.testing.assert_array_equal(actual, reference(images, top, left, mirrored, 4))
    assert not actual[0, :4].any()  # black rows above
    np.testing.assert_array_equal(actual[0, 4:, 4:], images[0, :2, :2])


def test_unmoved_crop_is_the_image_itself():
    images = random_images((5, 6, 6, 3))
    middle = np.full(5, 3, np.int32)
    actual = crop_and_flip(images, middle, middle, np.zeros(5, bool), crop_padding=3)
    np.testing.assert_array_equal(actual, images)


def offsets_of(augmented, images, padding):
    """Row, column and mirroring by which each augmented image came from its image."""
    height, width = images.shape[1:3]
    border = (padding, padding)
    padded = np.pad(images, ((0, 0), border, border, (0, 0)))
    found = [[] for _ in images]
    for top, left, mirrored in itertools.product(range(2 * padding + 1), range(2 * padding + 1), (0, 1)):
        crops = padded[:, top : top + height, left : left + width]
        crops = crops[:, :, ::-1] if mirrored else crops
        for index in np.flatnonzero((crops == augmented).all((1, 2, 3))):
            found[index].append((top, left, mirrored))
    assert {len(matches) for matches in found} == {1}
    return np.array([matches[0] for matches in found])


def test_augment_draws_every_offset_evenly():
    images = random_images((600, 6, 6, 1), seed=3)
    augmented = np.asarray(augment_jitted(jax.random.key(0), images, crop_padding=1, flip=True))
    offsets = offsets_of(augmented, images, 1)
    for axis in (0, 1):
        counts = np.bincount(offsets[:, axis], minlength=3)
        assert counts.min() > 150, counts  # 200 each on average, standard deviation 11.5
    assert 240 < offsets[:, 2].sum() < 360  # 300 on average, standard deviation 12.2
    # Rows, columns and mirroring are drawn independently.
    assert np.abs(np.corrcoef(offsets.T) - np.eye(3)).max() < 0.2


def test_augment_without_flip_mirrors_nothing():
    images = random_images((50, 6, 6, 1))
    augmented = np.asarray(augment_jitted(jax.random.key(0), images, crop_padding=2, flip=False))
    assert not offsets_of(augmented, images, 2)[:, 2].any()


def test_augment_of_nothing_is_the_identity():
    images = random_images((8, 6, 6, 3))
    actual = augment_jitted(jax.random.key(0), images, crop_padding=0, flip=False)
    np.testing.assert_array_equal(actual, images)


def test_same_key_same_crops_with_and_without_jit():
    images = random_images((64, 32, 32, 3))
    options = {"crop_padding": 4, "flip": True}
    first, second = (np.asarray(augment_jitted(jax.random.key(seed), images, **options)) for seed in (0, 1))
    np.testing.assert_array_equal(augment(jax.random.key(0), images, **options), first)
    assert (first != second).any()


@pytest.mark.parametrize(("dtype", "bound"), [(np.float32, 2e-7), (jnp.bfloat16, 2**-8)])
def test_normalize(dtype, bound):
    images = random_images((16, 8, 8, 3))
    mean, std = (0.4914, 0.4824, 0.4467), (0.2471, 0.2435, 0.2616)
    actual = normalize(images, mean, std, dtype)
    expected = (images.astype(np.float64) / 255 - mean) / std
    assert actual.dtype == dtype
    error = np.abs(np.asarray(actual, np.float64) - expected)
    assert (error <= bound * np.maximum(np.abs(expected), 2)).all()


def test_normalize_centres_and_scales():
    images = random_images((200, 8, 8, 2))
    mean, std = (images / 255).mean((0, 1, 2)), (images / 255).std((0, 1, 2))
    actual = np.asarray(normalize(images, tuple(mean.tolist()), tuple(std.tolist())), np.float64)
    np.testing.assert_allclose(actual.mean((0, 1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(actual.std((0, 1, 2)), 1, atol=1e-5)
