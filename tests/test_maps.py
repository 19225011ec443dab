"""Maps of tokens against the formulas in NumPy and the Hub's own layers."""

import sys

import keras
import keras_hub
import numpy as np
import pytest
from golden import numpy
from keras import ops

from keras_dinov3 import encode_layers, visualize
from keras_dinov3.maps import (
    attention_maps,
    feature_map,
    foreground,
    patch_features,
    patch_similarity,
    token_norms,
)

SETTINGS = {"mean": 0.5, "std": 0.5}


@pytest.fixture(scope="module")
def backbone():
    keras.utils.set_random_seed(0)
    backbone = keras_hub.models.DINOV3Backbone(
        patch_size=4,
        num_layers=3,
        hidden_dim=24,
        num_heads=2,
        intermediate_dim=32,
        num_register_tokens=3,
        image_shape=(8, 12, 3),
    )
    rng = np.random.default_rng(0)  # the Hub's small initial weights hide mistakes
    backbone.set_weights([0.4 * rng.normal(size=w.shape) for w in backbone.get_weights()])
    return backbone


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(1).integers(0, 256, (3, 8, 12, 3), "uint8")


def pixels(images):
    return ops.convert_to_tensor(images / 255.0 * 2.0 - 1.0, "float32")


def test_patch_features_are_the_grid_of_tokens(backbone, images):
    features = patch_features(backbone, images, batch_size=2, layers=[1], **SETTINGS)
    (tokens,) = encode_layers(backbone, pixels(images), [1], as_grid=True)
    assert features.shape == (3, 2, 3, 24)
    np.testing.assert_allclose(features, numpy(tokens.patches), atol=1e-4)


def test_similarity_of_a_patch(backbone, images):
    features = patch_features(backbone, images, **SETTINGS)
    for patch, place in (((1, 2), (0, 1, 2)), ((2, 0, 1), (2, 0, 1))):
        found = patch_similarity(backbone, images, patch, **SETTINGS)
        for index in np.ndindex(3, 2, 3):
            a, b = features[index].astype("float64"), features[place].astype("float64")
            expected = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
            assert found[index] == pytest.approx(expected, abs=1e-5)
        assert found[place] == pytest.approx(1)
    for patch in ((2, 0), (0, 3), (3, 0, 0), (-1, 0), (0,)):
        with pytest.raises(ValueError, match="`patch` must be.*within"):
            patch_similarity(backbone, images, patch)


@pytest.mark.parametrize("layer", [0, 1, -1])
def test_attention_by_the_layers_of_the_hub(backbone, images, layer):
    """The queries, keys and rotations are those that the Hub's own block computes."""
    maps = attention_maps(backbone, images, layer, batch_size=2, **SETTINGS)
    assert maps.shape == (3, 4, 2, 2, 3) and maps.dtype == "float32"
    x = backbone.embeddings(pixels(images))
    rope = backbone.rope_embedding(pixels(images))
    layers = backbone.encoder.layer if hasattr(backbone.encoder, "layer") else backbone.layers
    blocks = getattr(backbone.encoder, "layers", layers)
    for block in blocks[: layer % 3]:
        x = block(x, position_embeddings=rope, num_prefix_tokens=4)
    block = blocks[layer % 3]
    x = block.norm1(x)
    attention = block.attention
    query, key = (numpy(getattr(attention, f"{n}_dense")(x)) for n in ("query", "key"))
    query, key = (y.reshape(3, 10, 2, 12).astype("float64") for y in (query, key))
    cosines, sines = (numpy(y).astype("float64") for y in rope)

    def rotated(y):
        y = y.copy()
        tail = y[:, 4:]
        half = np.concatenate([-tail[..., 6:], tail[..., :6]], axis=-1)
        y[:, 4:] = tail * cosines[:, None] + half * sines[:, None]
        return y

    query, key = rotated(query), rotated(key)
    for image, token, head in np.ndindex(3, 4, 2):
        scores = key[image, :, head] @ query[image, token, head] / np.sqrt(12)
        shares = np.exp(scores - scores.max())
        shares = shares / shares.sum()
        expected = shares[4:].reshape(2, 3)
        np.testing.assert_allclose(maps[image, token, head], expected, atol=1e-4)
        assert maps[image, token, head].sum() < 1
    with pytest.raises(ValueError, match="`layers`.*3"):
        attention_maps(backbone, images, layer=3)


def test_lengths_and_those_that_stand_out(backbone, images):
    norms = token_norms(backbone, images, layers=[0, 2], batch_size=2, **SETTINGS)
    assert norms["prefix"].shape == (3, 2, 4) and norms["patches"].shape == (3, 2, 2, 3)
    layers = encode_layers(backbone, pixels(images), [0, 2], as_grid=True, normalize=False)
    for index, tokens in enumerate(layers):
        lengths = np.linalg.norm(numpy(tokens.patches), axis=-1)
        np.testing.assert_allclose(norms["patches"][:, index], lengths, rtol=1e-4)
        registers = np.linalg.norm(numpy(tokens.registers), axis=-1)
        np.testing.assert_allclose(norms["prefix"][:, index, 1:], registers, rtol=1e-4)
        cls = np.linalg.norm(numpy(tokens.cls), axis=-1)
        np.testing.assert_allclose(norms["prefix"][:, index, 0], cls, rtol=1e-4)
        middle = np.median(lengths)
        bound = middle + 10 * np.median(np.abs(lengths - middle))
        np.testing.assert_array_equal(norms["outliers"][:, index], lengths > bound)


def test_outliers_are_found(backbone, images, monkeypatch):
    lengths = np.ones((3, 1, 10), "float32") + 0.01 * np.arange(10, dtype="float32")
    lengths[1, 0, 6] = 5.0
    monkeypatch.setattr("keras_dinov3.maps.NormExtractor.extract", lambda *args: lengths)
    outliers = token_norms(backbone, images)["outliers"]
    assert outliers.sum() == 1 and outliers[1, 0, 0, 2]


@pytest.mark.parametrize("sign", [1, -1])
def test_foreground_is_not_at_the_border(sign):
    rng = np.random.default_rng(0)
    inside = np.zeros((2, 6, 7), bool)
    inside[0, 1:4, 2:5] = True
    inside[1, 2:5, 1:6] = True
    direction = rng.normal(size=8)
    features = sign * np.where(inside[..., None], 3.0, -1.0) * direction
    features = features + 0.3 * rng.normal(size=features.shape) + 5.0
    np.testing.assert_array_equal(foreground(features), inside)


def test_colors_of_the_foreground_alone():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(2, 3, 4, 5))
    chosen = rng.random((2, 3, 4)) < 0.5
    colors = visualize.pca_colors(features, chosen)
    assert (colors[~chosen] == 0).all()
    np.testing.assert_allclose(colors[chosen], visualize.pca_colors(features[chosen]), atol=1e-6)
    nothing = np.zeros((2, 3, 4), bool)
    everything = visualize.pca_colors(features)
    np.testing.assert_array_equal(visualize.pca_colors(features, nothing), everything)


def test_points_in_a_plane(monkeypatch):
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], 20)
    features = 5 * np.eye(3, 9)[labels] + 0.3 * rng.normal(size=(60, 9))
    for method in ("pca", "tsne"):
        points = feature_map(features, method)
        assert points.shape == (60, 2) and points.dtype == "float32"
        centers = np.stack([points[labels == label].mean(axis=0) for label in range(3)])
        nearest = np.linalg.norm(points[:, None] - centers, axis=-1).argmin(axis=1)
        np.testing.assert_array_equal(nearest, labels)
        np.testing.assert_array_equal(points, feature_map(features, method))
    _, values, directions = np.linalg.svd(features - features.mean(axis=0), full_matrices=False)
    spread = np.linalg.norm(feature_map(features), axis=0)
    np.testing.assert_allclose(spread, values[:2], rtol=1e-4)
    for wrong in ({"method": "umap"}, {"features": np.ones((3, 1))}):
        with pytest.raises(ValueError, match="two images at least.*"):
            feature_map(**{"features": features, **wrong})
    monkeypatch.setitem(sys.modules, "sklearn.manifold", None)
    with pytest.raises(ImportError, match=r"keras-dinov3\[evaluation\]"):
        feature_map(features, "tsne")


def test_a_backbone_without_rope_or_registers():
    backbone = keras_hub.models.ViTBackbone(
        image_shape=(8, 8, 3), patch_size=4, num_layers=1, num_heads=2, hidden_dim=8, mlp_dim=8
    )
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), "uint8")
    maps = attention_maps(backbone, images)
    assert maps.shape == (2, 1, 2, 2, 2)
    assert token_norms(backbone, images)["prefix"].shape == (2, 1, 1)
