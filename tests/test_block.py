import keras
import keras_hub
import meta
import numpy as np
import pytest
from golden import Golden, numpy
from keras import ops

from keras_dinov3 import block, families


def test_golden_drop_path_with_given_subsets():
    golden = Golden("fb_block_drop_path")
    h = golden.hyperparameters
    backbone = keras_hub.models.DINOV3Backbone(
        patch_size=8,
        num_layers=1,
        hidden_dim=h["dim"],
        num_heads=h["num_heads"],
        intermediate_dim=h["dim"] * h["ffn_ratio"],
        layer_norm_eps=h["norm_eps"],
        image_shape=(16, 16, 3),
    )
    layer = backbone.encoder.layers[0]
    meta.load(meta.block_weights(layer, h["dim"]), golden.arrays, "weights/")
    weights = families.dinov3_block(layer, "float32")
    crops = [golden[f"in/{index}"] for index in (0, 1)]
    subsets = []
    for index, x in enumerate(crops):
        keep = max(int(len(x) * (1 - h["drop_path"])), 1)
        subset = np.stack([golden[f"in/perm{p}"][:keep] for p in (index, index + 2)])
        subsets.append(ops.convert_to_tensor(subset, dtype="int32"))
    y = block.block(
        block.to_rows([ops.convert_to_tensor(x) for x in crops]),
        weights,
        [x.shape[:2] for x in crops],
        h["num_heads"],
        ropes=[None, None],
        subsets=subsets,
        epsilon=h["norm_eps"],
    )
    for index, part in enumerate(block.from_rows(y, [x.shape for x in crops])):
        golden.check(part, f"out/{index}")


def test_drop_path_drops_whole_images_and_keeps_the_expectation():
    x = block.to_rows([ops.ones((7, 3, 5)), ops.ones((2, 4, 5))])
    seed = keras.random.SeedGenerator(3)
    drawn = []
    for _ in range(40):
        subsets = [block.random_subsets(1, 7, 4, seed)[0, 1], None]
        y = block.add_residual(x, lambda x, _: x, ops.ones((5,)), ((7, 3), (2, 4)), subsets)
        y, others = (numpy(part) for part in block.from_rows(y, [(7, 3, 5), (2, 4, 5)]))
        np.testing.assert_array_equal(others, 2.0)
        kept = np.unique(y.reshape(7, -1), axis=1)
        assert kept.shape == (7, 1)  # an image is dropped as a whole
        np.testing.assert_allclose(np.unique(y), [1.0, 1.0 + 7 / 4], rtol=1e-6)
        assert np.sum(y) == pytest.approx(2 * 7 * 15, rel=1e-6)
        drawn.append(kept[:, 0] > 1)
    share = np.mean(drawn, axis=0)
    assert np.all((share > 0.25) & (share < 0.9))  # 4/7, each image in turn
