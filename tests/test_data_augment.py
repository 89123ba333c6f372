"""Augmentation against slices and sums in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynprune_jax.data.augment import (
    augment,
    center_crop,
    cutout,
    normalise,
    random_crop,
    random_flip,
    random_resized_crop,
)

cut_and_resized = jax.jit(random_resized_crop, static_argnums=2)


def numbered(batch=4, height=5, width=6, channels=2):
    """Images whose every value is different, as far as 255 allows, and never 0."""
    values = np.arange(batch * height * width * channels) % 255 + 1
    return values.astype(np.uint8).reshape(batch, height, width, channels)


def windows(image, height, width):
    """All windows of an image, by their top left corner."""
    return {
        (top, left): image[top : top + height, left : left + width]
        for top in range(image.shape[0] - height + 1)
        for left in range(image.shape[1] - width + 1)
    }


@settings(deadline=None, max_examples=12)
@given(
    seed=st.integers(0, 2**31 - 1),
    padding_and_size=st.sampled_from([(0, 5), (0, 3), (2, 6), (3, 5)]),
)
def test_a_random_crop_is_a_window_of_the_padded_image(seed, padding_and_size):
    padding, size = padding_and_size
    images = numbered()
    crops = np.asarray(random_crop(jax.random.key(seed), jnp.asarray(images), padding, size))
    assert crops.shape == (4, size, size, 2)
    assert crops.dtype == np.uint8
    border = ((padding, padding), (padding, padding), (0, 0))
    for image, crop in zip(images, crops, strict=True):
        candidates = windows(np.pad(image, border), size, size)
        assert any(np.array_equal(crop, window) for window in candidates.values())


def test_a_window_as_large_as_the_padded_image_is_all_of_it():
    images = numbered(2, 4, 4, 1)
    whole = random_crop(jax.random.key(0), jnp.asarray(images), 2, 8)
    np.testing.assert_array_equal(whole, np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0))))


def test_random_crops_reach_every_place_evenly():
    images = np.broadcast_to(numbered(1, 3, 3, 1), (3000, 3, 3, 1))
    crops = np.asarray(
        jax.jit(random_crop, static_argnums=(2, 3))(jax.random.key(0), jnp.asarray(images), 1, 3)
    )
    places = windows(np.pad(images[0], ((1, 1), (1, 1), (0, 0))), 3, 3)
    counts = [np.all(crops == window, axis=(1, 2, 3)).sum() for window in places.values()]
    assert len(counts) == 9
    assert sum(counts) == 3000
    assert min(counts) > 270
    assert max(counts) < 400


def test_a_crop_larger_than_the_image_is_refused():
    with pytest.raises(ValueError, match="cannot cut 8x8 from 5x6"):
        random_crop(jax.random.key(0), jnp.asarray(numbered()), 1, 8)
    with pytest.raises(ValueError, match="cannot cut 6x6 from 5x6"):
        center_crop(jnp.asarray(numbered()), 6)


def test_a_flip_mirrors_half_of_the_images_whole():
    images = numbered(400, 3, 4, 2)
    flipped = np.asarray(random_flip(jax.random.key(1), jnp.asarray(images)))
    mirrored = np.all(flipped == images[:, :, ::-1], axis=(1, 2, 3))
    same = np.all(flipped == images, axis=(1, 2, 3))
    np.testing.assert_array_equal(mirrored, ~same)
    assert 150 < mirrored.sum() < 250


def test_center_crop_is_the_middle():
    images = numbered(2, 6, 9)
    np.testing.assert_array_equal(center_crop(jnp.asarray(images), 4), images[:, 1:5, 2:6])
    np.testing.assert_array_equal(center_crop(jnp.asarray(images), 6), images[:, :, 1:7])


def test_a_random_resized_crop_shows_a_plain_image_plain():
    images = np.broadcast_to(np.array([0, 77, 255], np.uint8), (8, 9, 12, 3))
    crops = cut_and_resized(jax.random.key(0), jnp.asarray(images), 5)
    np.testing.assert_allclose(crops, np.broadcast_to(images[:, :5, :5], crops.shape), atol=1e-3)


def test_random_resized_crops_have_the_areas_and_aspects_asked_for():
    # On images that hold their own coordinates, a crop shows its corners.
    side, size = 64, 16
    rows, columns = np.mgrid[:side, :side].astype(np.uint8) * 3
    images = np.broadcast_to(np.stack([rows, columns], -1), (500, side, side, 2))
    crops = np.asarray(cut_and_resized(jax.random.key(3), jnp.asarray(images), size))
    assert crops.dtype == np.float32
    # Values in the middle of the crop, where no border bends them, grow by a crop's pixel.
    steps = (crops[:, 12, 12] - crops[:, 4, 4]) / 8 / 3 * size  # height and width in pixels
    area = steps.prod(1) / side**2
    aspect = steps[:, 1] / steps[:, 0]
    assert 0.07 < area.min() < 0.1
    assert 0.9 < area.max() < 1.02
    assert 0.74 < aspect.min() < 0.85
    assert 1.2 < aspect.max() < 1.35
    # Both corners stay inside, and reach both borders.
    corner = crops[:, 8, 8] / 3
    assert corner.min() > side / 8
    assert corner.max() < side * 7 / 8
    assert corner[:, 0].std() > 3
    # Uniform in area, as far as 500 draws can tell.
    assert abs(np.median(area) - 0.54) < 0.05


def test_normalise_is_the_formula_per_channel():
    images = numbered(2, 3, 3, 3)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    found = normalise(jnp.asarray(images), mean, std)
    expected = (images / 255 - np.array(mean)) / np.array(std)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    one = normalise(jnp.asarray(images, jnp.float32), (0.5,), (0.25,), jnp.bfloat16)
    assert one.dtype == jnp.bfloat16
    expected = (images / 255 - 0.5) / 0.25
    np.testing.assert_allclose(np.asarray(one, np.float32), expected, atol=0.01)


@settings(max_examples=8)
@given(seed=st.integers(0, 2**31 - 1), size=st.sampled_from([0, 1, 2, 3, 9]))
def test_a_cutout_is_a_black_square_around_a_pixel_of_the_image(seed, size):
    images = numbered()
    found = np.asarray(cutout(jax.random.key(seed), jnp.asarray(images), size))
    assert found.dtype == np.uint8
    for image, cut in zip(images, found, strict=True):
        possible = []
        for row, column in np.ndindex(image.shape[:2]):
            expected = image.copy()
            top, left = row - size // 2, column - size // 2
            expected[max(top, 0) : max(top + size, 0), max(left, 0) : max(left + size, 0)] = 0
            possible.append(np.array_equal(cut, expected))
        assert any(possible)


def test_cutouts_are_around_each_pixel_and_are_cut_off_at_the_edges():
    found = cutout(jax.random.key(0), jnp.ones((500, 5, 6, 1), jnp.uint8), 3)
    found = {np.asarray(image).tobytes() for image in found}
    expected = set()
    for row, column in np.ndindex(5, 6):
        image = np.ones((5, 6, 1), np.uint8)
        image[max(row - 1, 0) : row + 2, max(column - 1, 0) : column + 2] = 0
        expected.add(image.tobytes())
    assert len(expected) == 30
    assert found == expected


@pytest.mark.parametrize("resized_crop", [False, True])
def test_augment_is_crop_then_flip_then_cutout_under_jit(resized_crop):
    images = jnp.asarray(numbered(8, 10, 10, 3))
    options = {"image_size": 8, "crop_padding": 1, "flip": True, "resized_crop": resized_crop}
    options["cutout_size"] = 3

    @jax.jit
    def run(key):
        return augment(key, images, **options)

    key = jax.random.key(5)
    crop_key, flip_key, cutout_key = jax.random.split(key, 3)
    if resized_crop:
        cropped = cut_and_resized(crop_key, images, 8)
    else:
        cropped = random_crop(crop_key, images, 1, 8)
    out = run(key)
    assert out.shape == (8, 8, 8, 3)
    assert out.dtype == (jnp.float32 if resized_crop else jnp.uint8)
    expected = cutout(cutout_key, random_flip(flip_key, cropped), 3)
    np.testing.assert_allclose(out.astype(jnp.float32), expected.astype(jnp.float32), atol=0.01)
    assert not np.array_equal(out, run(jax.random.key(6)))


def test_augment_without_anything_is_the_identity():
    images = jnp.asarray(numbered(3, 6, 6, 1))
    out = augment(
        jax.random.key(0), images, image_size=6, crop_padding=0, flip=False, resized_crop=False
    )
    np.testing.assert_array_equal(out, images)
