import sys
import types

import keras
import keras_hub
import numpy as np
import pytest
from golden import numpy

from keras_dinov3 import EncoderExtras
from keras_dinov3.augment import MultiCrop
from keras_dinov3.curves import training_curves
from keras_dinov3.features import FeatureExtractor
from keras_dinov3.masking import BlockMasking
from keras_dinov3.visualize import (
    crops,
    crops_figure,
    gray_out,
    patch_pca,
    patch_pca_figure,
    pca_colors,
)


@pytest.fixture(scope="module")
def backbone():
    keras.utils.set_random_seed(0)
    return keras_hub.models.DINOV3Backbone(
        patch_size=4,
        num_layers=1,
        hidden_dim=16,
        num_heads=2,
        intermediate_dim=24,
        image_shape=(8, 8, 3),
    )


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(1).integers(0, 256, (3, 8, 12, 3), "uint8")


@pytest.fixture
def no_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)


def png_size(path):
    header = path.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(header[16:20], "big"), int.from_bytes(header[20:24], "big")


def shown(figure):
    """The arrays of all pictures in a figure, in drawing order."""
    return [np.asarray(axes.images[0].get_array()) for axes in figure.axes if axes.images]


# Patch PCA


def test_pca_colors_against_loops():
    features = np.random.default_rng(0).normal(size=(2, 3, 5, 7)) * np.arange(1, 8) + 3.0
    rows = features.reshape(30, 7)
    centered = rows - rows.mean(0)
    _, _, directions = np.linalg.svd(centered, full_matrices=False)
    expected = np.zeros((30, 3))
    for channel in range(3):
        direction = directions[channel] * np.sign(
            directions[channel][np.argmax(np.abs(directions[channel]))]
        )
        values = np.array([row @ direction for row in centered])
        low, high = np.percentile(values, 1), np.percentile(values, 99)
        for index, value in enumerate(values):
            expected[index, channel] = min(max((value - low) / (high - low), 0), 1)
    colors = pca_colors(features)
    assert colors.shape == (2, 3, 5, 3) and colors.dtype == "float32"
    np.testing.assert_allclose(colors.reshape(30, 3), expected, atol=1e-5)


def test_outliers_do_not_take_the_whole_range():
    features = np.random.default_rng(0).normal(size=(1000, 4)) * [4, 3, 2, 1]
    clean = pca_colors(features[1:])
    features[0] = [1e3, 0, 0, 0]
    np.testing.assert_allclose(pca_colors(features)[1:], clean, atol=0.05)


def test_directions_without_variation_are_gray():
    line = np.linspace(0, 1, 20)[:, None] * np.array([[1.0, 2.0, 0.0, -1.0]]) + 5.0
    colors = pca_colors(line)
    np.testing.assert_array_equal(colors[:, 1:], 0.5)
    assert colors[0, 0] == 0 and colors[-1, 0] == 1 and np.all(np.diff(colors[:, 0]) >= 0)
    np.testing.assert_array_equal(pca_colors(np.full((4, 6, 5), 7.0)), 0.5)


def test_pca_errors():
    with pytest.raises(ValueError, match=r"at least 3 wide.*\(4, 2\)"):
        pca_colors(np.ones((4, 2)))
    with pytest.raises(ValueError, match="finite"):
        pca_colors(np.full((4, 3), np.nan))


def test_patch_pca(backbone, images, tmp_path):
    path = tmp_path / "new folder" / "pca.png"
    colors = patch_pca(backbone, images, mean=0.4, std=0.3, image_size=(16, 8), path=path)
    extractor = FeatureExtractor(backbone, "patches", 0.4, 0.3, (16, 8))
    expected = pca_colors(extractor.extract(images)).reshape(3, 4, 2, 3)
    np.testing.assert_allclose(colors, expected, atol=1e-4)  # over all images at once
    assert min(png_size(path)) > 100
    extras = EncoderExtras(norm="rms").build_for(backbone)
    other = pca_colors(FeatureExtractor(backbone, "patches", extras=extras).extract(images))
    np.testing.assert_allclose(
        patch_pca(backbone, images, extras=extras).reshape(other.shape), other, atol=1e-4
    )
    assert np.max(np.abs(patch_pca(backbone, images).reshape(other.shape) - other)) > 1e-2


def test_patch_pca_without_matplotlib(no_matplotlib, backbone, images, tmp_path):
    assert patch_pca(backbone, images).shape == (3, 2, 3, 3)
    message = r"pip install keras-dinov3\[plots\]"
    with pytest.raises(ImportError, match=message):
        patch_pca(None, images, path=tmp_path / "pca.png")  # before anything is computed
    with pytest.raises(ImportError, match=message):
        crops(None, images, path=tmp_path / "crops.png")
    with pytest.raises(ImportError, match=message):
        training_curves({"loss": [1.0]})


def test_patch_pca_figure_shows_images_and_colors(images):
    colors = np.random.default_rng(0).random((3, 2, 3, 3))
    figure = patch_pca_figure(images, colors, columns=2)  # 2 and 1 side by side
    pictures = shown(figure)
    order = {0: images[0], 1: images[1], 2: colors[0], 3: colors[1], 4: images[2], 5: colors[2]}
    assert len(pictures) == 6
    for index, expected in order.items():
        np.testing.assert_array_equal(pictures[index], expected)
    labels = [axes.get_ylabel() for axes in figure.axes]
    assert [label for label in labels if label] == ["image", "patch features"] * 2


@pytest.mark.parametrize("channels, kept", [(1, 1), (2, 1), (3, 3), (5, 3)])
def test_any_number_of_channels(channels, kept):
    images = np.random.default_rng(0).random((1, 4, 6, channels)).astype("float32")
    picture = shown(patch_pca_figure(images, np.zeros((1, 2, 3, 3))))[0]
    np.testing.assert_array_equal(picture, images[0, ..., :kept].squeeze())


# Crops


def plain_crops(size, **kwargs):
    """A `MultiCrop` whose global crops are the image and its mirror-free local halves."""
    return MultiCrop(
        global_crop_size=size,
        local_crop_size=4,
        num_local_crops=5,
        global_crop_scale=(1.0, 1.0),
        crop_aspect_ratio=(1.0, 1.0),
        flip_probability=0,
        color_jitter_probability=0,
        grayscale_probability=0,
        global_blur_probability=0,
        local_blur_probability=0,
        global_solarize_probability=0,
        **kwargs,
    )


@pytest.mark.parametrize(
    "mean, std", [(None, None), (0.3, 0.7), ((0.1, 0.2, 0.3), (2.0, 1.0, 0.5))]
)
def test_crops_have_the_colors_of_the_image(images, tmp_path, mean, std):
    square = images[:, :, :8]
    path = tmp_path / "crops.png"
    drawn = crops(plain_crops(8, mean=mean, std=std), square, path=path)
    assert drawn["global_crops"].shape == (3, 2, 8, 8, 3)
    assert drawn["local_crops"].shape == (3, 5, 4, 4, 3)
    for crop in range(2):
        np.testing.assert_allclose(drawn["global_crops"][:, crop], square / 255, atol=1e-5)
    assert drawn["local_crops"].min() >= 0 and drawn["local_crops"].max() <= 1
    assert min(png_size(path)) > 100


def test_masked_patches_are_gray():
    generator = np.random.default_rng(0)
    images = generator.random((2, 3, 4, 6, 1)).astype("float32")  # patches of 2: 2 x 3
    masks = generator.random((2, 3, 6)) < 0.5
    covered = gray_out(images, masks)
    for b, g, row, column in np.ndindex(2, 3, 4, 6):
        value = images[b, g, row, column]
        if masks[b, g, row // 2 * 3 + column // 2]:
            value = 0.5 + 0.15 * (value - 0.5)
        np.testing.assert_allclose(covered[b, g, row, column], value, atol=1e-6)


def test_masks_of_the_model_and_given_ones(images):
    square = images[:, :, :8]
    model = types.SimpleNamespace(
        augmentation=plain_crops(8),
        masking=BlockMasking(mask_probability=1.0, mask_ratio=(0.5, 0.5), seed=3),
        student=types.SimpleNamespace(patch_size=2),
    )
    again = BlockMasking(mask_probability=1.0, mask_ratio=(0.5, 0.5), seed=3)
    masks = numpy(again.sample(3, 2, (4, 4)))
    plain = np.repeat(square[:, None] / 255, 2, axis=1)
    drawn = crops(model, square)["global_crops"]
    np.testing.assert_allclose(drawn, gray_out(plain, masks), atol=1e-5)
    drawn = crops(model, square, masks=~masks)["global_crops"]
    np.testing.assert_allclose(drawn, gray_out(plain, ~masks), atol=1e-5)
    model.masking = None
    np.testing.assert_allclose(crops(model, square)["global_crops"], plain, atol=1e-5)


def test_crops_figure_shows_all_crops(images):
    generator = np.random.default_rng(0)
    drawn = {
        "global_crops": generator.random((3, 2, 6, 6, 3)),
        "local_crops": generator.random((3, 5, 4, 4, 3)),
    }
    pictures = shown(crops_figure(images, drawn))
    assert len(pictures) == 3 * (1 + 2 + 5)
    expected = [images[1], *drawn["global_crops"][1], *drawn["local_crops"][1]]
    for picture, value in zip(pictures[8:16], expected, strict=True):
        np.testing.assert_array_equal(picture, value)
    drawn["local_crops"] = drawn["local_crops"][:, :0]
    assert len(shown(crops_figure(images, drawn))) == 3 * (1 + 2)


@pytest.mark.parametrize("shape", [(2, 3, 5), (2, 2, 6), (2, 3, 12)])
def test_masks_of_the_wrong_shape(shape):
    with pytest.raises(ValueError, match=r"one value per square patch.*masks.shape=\(2, "):
        gray_out(np.zeros((2, 3, 4, 6, 1)), np.zeros(shape, bool))
