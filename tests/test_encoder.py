import keras
import keras_hub
import numpy as np
import pytest
from golden import Golden, close, numpy, variable_gradients
from keras import ops

from keras_dinov3 import encoder
from keras_dinov3.convert import backbone_from_meta, backbone_to_meta
from keras_dinov3.encoder import encode


def small_backbone(**config):
    config = {
        "patch_size": 8,
        "num_layers": 2,
        "hidden_dim": 48,
        "num_heads": 3,
        "intermediate_dim": 80,
        "image_shape": (32, 32, 3),
        "layer_scale_init_value": 0.5,
        **config,
    }
    backbone = keras_hub.models.DINOV3Backbone(**config)
    rng = np.random.default_rng(0)
    for variable in backbone.trainable_variables:
        variable.assign(numpy(variable) + rng.normal(size=variable.shape) * 0.1)
    return backbone


def images(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def tokens_in_order(tokens):
    return ops.concatenate([tokens.cls[:, None], tokens.registers, tokens.patches], axis=1)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"use_gated_mlp": True, "hidden_activation": "silu"},
        {"use_key_bias": False, "num_register_tokens": 0},
        {"use_query_bias": False, "use_value_bias": False, "use_mlp_bias": False},
        {"image_shape": (16, 40, 2), "use_proj_bias": False, "rope_theta": 50.0},
        {"layer_norm_eps": 1e-3, "use_mask_token": False},
    ],
)
def test_equals_the_hub_at_inference(config):
    backbone = small_backbone(**config)
    x = images(3, *backbone.image_shape)
    expected = numpy(backbone({"pixel_values": x}))
    actual = numpy(tokens_in_order(encode(backbone, ops.convert_to_tensor(x))))
    assert actual.shape == expected.shape
    assert np.max(np.abs(actual - expected)) < 1e-5


def test_mixed_bfloat16_equals_the_hub():
    backbone = small_backbone(dtype="mixed_bfloat16")
    x = images(2, 32, 32, 3)
    tokens = encode(backbone, ops.convert_to_tensor(x))
    assert keras.backend.standardize_dtype(tokens.cls.dtype) == "bfloat16"
    expected = numpy(ops.cast(backbone({"pixel_values": x}), "float32"))
    close(ops.cast(tokens_in_order(tokens), "float32"), expected, 0.02, 0)


@pytest.mark.parametrize("size", [(16, 16), (24, 56), (64, 8)])
def test_any_resolution_from_the_same_weights(size):
    """A Hub backbone built for another size, with the same weights, is the reference."""
    backbone, other = small_backbone(), small_backbone(image_shape=(*size, 3))
    other.set_weights(backbone.get_weights())
    x = images(2, *size, 3)
    close(
        tokens_in_order(encode(backbone, ops.convert_to_tensor(x))),
        numpy(other({"pixel_values": x})),
        1e-5,
        0,
    )


def test_masked_patches_are_not_seen():
    backbone = small_backbone()
    masks = np.random.default_rng(1).random((2, 16)) < 0.4
    x = images(2, 32, 32, 3)
    tiles = x.reshape(2, 4, 8, 4, 8, 3)
    hidden = masks.reshape(2, 4, 1, 4, 1, 1)
    noise = np.where(hidden, 5.0, tiles).reshape(x.shape).astype("float32")
    masks = ops.convert_to_tensor(masks)
    a, b, c = (
        numpy(tokens_in_order(encode(backbone, ops.convert_to_tensor(i), m)))
        for i, m in ((x, masks), (noise, masks), (x, None))
    )
    close(a, b, 1e-6, 0)
    assert np.max(np.abs(a - c)) > 1e-2


@pytest.mark.parametrize("size", ["32x32", "24x40"])
@pytest.mark.parametrize("kind", ["nomask", "masked"])
def test_golden_vit(size, kind):
    golden = Golden("fb_vit_mlp")
    backbone = golden_backbone(golden)
    image = golden[f"in/{size}/image"].transpose(0, 2, 3, 1)
    masks = ops.convert_to_tensor(golden[f"in/{size}/masks"]) if kind == "masked" else None
    tokens = encode(backbone, ops.convert_to_tensor(image), masks)
    golden.check(tokens.cls, f"out/{size}/{kind}/x_norm_clstoken")
    golden.check(tokens.registers, f"out/{size}/{kind}/x_storage_tokens")
    golden.check(tokens.patches, f"out/{size}/{kind}/x_norm_patchtokens")


def golden_backbone(golden):
    num_heads = golden.hyperparameters["num_heads"]
    return backbone_from_meta(golden.part("weights/"), num_heads, layer_norm_eps=1e-6)


def test_golden_vit_gradients():
    golden = Golden("fb_vit_mlp")
    backbone = golden_backbone(golden)
    masks = ops.convert_to_tensor(golden["in/32x32/masks"])
    whole, local = (
        ops.convert_to_tensor(golden[f"in/{key}/image"].transpose(0, 2, 3, 1))
        for key in ("32x32", "local")
    )

    def function():
        total = 0.0
        for name, tokens in (
            ("global", encode(backbone, whole, masks, training=True)),
            ("local", encode(backbone, local, training=True)),
        ):
            for kind, x in (
                ("x_norm_clstoken", tokens.cls),
                ("x_storage_tokens", tokens.registers),
                ("x_norm_patchtokens", tokens.patches),
            ):
                cotangent = ops.convert_to_tensor(golden[f"in/cotangent/{name}/{kind}"])
                total = total + ops.sum(x * cotangent)
        return total

    variables = {
        "cls_token": backbone.embeddings.cls_token,
        "storage_tokens": backbone.embeddings.register_tokens,
        "mask_token": backbone.embeddings.mask_token,
        "patch_embed.proj.weight": backbone.embeddings.patch_embeddings.projection.kernel,
        "norm.weight": backbone.layernorm.gamma,
    }
    _, gradients = variable_gradients(function, list(variables.values()))
    for name, gradient in zip(variables, gradients, strict=True):
        if name == "patch_embed.proj.weight":
            gradient = gradient.transpose(3, 2, 0, 1)
        golden.check(gradient.reshape(golden[f"grad/{name}"].shape), f"grad/{name}")


def test_golden_rope_periods():
    golden = Golden("fb_rope")
    h = golden.hyperparameters
    golden.check(encoder.rope_periods(h["D_head"], h["base"]), "periods/base")
    minmax = encoder.rope_periods(h["D_head"], min_period=h["minp"], max_period=h["maxp"])
    golden.check(minmax, "periods/minmax")


def test_golden_rope_tables():
    golden = Golden("fb_rope")
    h = golden.hyperparameters
    augmentations = {
        "plain": {},
        "shift": {"shift": h["shift"]},
        "jitter": {"log_jitter": h["logj"]},
        "rescale": {"log_rescale": h["logr"][0]},
        "all": {"shift": h["shift"], "log_jitter": h["logj"], "log_rescale": h["logr"][0]},
        "minmax_period": {
            "periods": encoder.rope_periods(h["D_head"], min_period=h["minp"], max_period=h["maxp"])
        },
    }
    checked = 0
    for key in golden.keys():
        parts = key.split("/")
        if parts[0] not in ("separate", "min", "max") or parts[-1] == "cos":
            continue
        normalize, augmentation, grid, _ = parts
        sin, cos = encoder.rope_tables(
            tuple(map(int, grid.split("x"))),
            h["D_head"],
            h["base"],
            normalize=normalize,
            **augmentations[augmentation],
        )
        golden.check(sin, key)
        golden.check(cos, key[:-3] + "cos")
        checked += 1
    assert checked == 34


def test_golden_rope_rotation():
    golden = Golden("fb_rope")
    h = golden.hyperparameters
    sin, cos = encoder.rope_tables(h["grids"][1], h["D_head"], h["base"])
    x = golden["apply/x"].transpose(0, 2, 1, 3)  # ours: (B, length, heads, head_dim)
    rope = encoder.signed_rope(sin, cos, 0, "float32")
    y = encoder.apply_rope(ops.convert_to_tensor(x), *rope)
    golden.check(numpy(y).transpose(0, 2, 1, 3), "apply/y")


def test_prefix_tokens_are_not_rotated():
    sin, cos = encoder.rope_tables((2, 3), 8)
    rope = encoder.signed_rope(sin, cos, 5, "float32")
    x = images(2, 11, 3, 8)
    y = numpy(encoder.apply_rope(ops.convert_to_tensor(x), *rope))
    np.testing.assert_array_equal(y[:, :5], x[:, :5])
    assert np.max(np.abs(y[:, 5:] - x[:, 5:])) > 0.1


def test_golden_drop_path_with_given_subsets():
    golden = Golden("fb_block_drop_path")
    h = golden.hyperparameters
    backbone = keras_hub.models.DINOV3Backbone(
        patch_size=8,
        num_layers=1,
        hidden_dim=h["dim"],
        num_heads=h["num_heads"],
        intermediate_dim=h["dim"] * h["ffn_ratio"],
        image_shape=(16, 16, 3),
    )
    block = {f"blocks.0.{name}": array for name, array in golden.part("weights/").items()}
    backbone = backbone_from_meta(
        {**backbone_to_meta(backbone), **block}, h["num_heads"], layer_norm_eps=h["norm_eps"]
    )
    weights = encoder.block_weights(backbone.encoder.layers[0], "float32")
    for index in (0, 1):
        x = golden[f"in/{index}"]
        keep = max(int(len(x) * (1 - h["drop_path"])), 1)
        subsets = [
            ops.convert_to_tensor(golden[f"in/perm{p}"][:keep], dtype="int32")
            for p in (index, index + 2)
        ]
        y = encoder.block(ops.convert_to_tensor(x), None, weights, backbone, subsets)
        golden.check(y, f"out/{index}")


def test_drop_path_drops_whole_images_and_keeps_the_expectation():
    x = ops.ones((7, 3, 5))
    seed = keras.random.SeedGenerator(3)
    drawn = []
    for _ in range(40):
        subset = encoder.random_subset(7, 4, seed)
        y = numpy(encoder.add_residual(x, lambda x: x, ops.ones((5,)), subset))
        kept = np.unique(y.reshape(7, -1), axis=1)
        assert kept.shape == (7, 1)  # an image is dropped as a whole
        np.testing.assert_allclose(np.unique(y), [1.0, 1.0 + 7 / 4], rtol=1e-6)
        assert np.sum(y) == pytest.approx(2 * 7 * 15, rel=1e-6)
        drawn.append(kept[:, 0] > 1)
    share = np.mean(drawn, axis=0)
    assert np.all((share > 0.25) & (share < 0.9))  # 4/7, each image in turn


def test_drop_path_only_in_training():
    backbone = small_backbone()
    x = ops.convert_to_tensor(images(4, 16, 16, 3))
    seed = keras.random.SeedGenerator(1)
    plain = numpy(encode(backbone, x).cls)
    close(encode(backbone, x, drop_path_rate=0.5, seed=seed).cls, plain, 0, 0)
    dropped = numpy(encode(backbone, x, training=True, drop_path_rate=0.5, seed=seed).cls)
    again = numpy(encode(backbone, x, training=True, drop_path_rate=0.5, seed=seed).cls)
    assert np.max(np.abs(dropped - plain)) > 1e-3
    assert np.max(np.abs(dropped - again)) > 1e-3


def test_errors_teach():
    backbone = small_backbone(use_mask_token=False)
    with pytest.raises(ValueError, match=r"multiples of `patch_size`.*36.*Nearest to 36: 32, 40"):
        encode(backbone, ops.zeros((2, 36, 32, 3)))
    with pytest.raises(ValueError, match="Nearest to 4: 8"):
        encode(backbone, ops.zeros((2, 32, 4, 3)))
    with pytest.raises(ValueError, match=r"shape \(batch, height, width, channels\)"):
        encode(backbone, ops.zeros((32, 32, 3)))
    with pytest.raises(ValueError, match="3 channels"):
        encode(backbone, ops.zeros((2, 32, 32, 4)))
    with pytest.raises(ValueError, match="mask token"):
        encode(backbone, ops.zeros((2, 32, 32, 3)), ops.zeros((2, 16), "bool"))
    with pytest.raises(ValueError, match=r"\(batch, patches\)=\(2, 16\)"):
        encode(small_backbone(), ops.zeros((2, 32, 32, 3)), ops.zeros((2, 15), "bool"))
    with pytest.raises(TypeError, match="DINOV3Backbone"):
        encode(keras.Sequential(), ops.zeros((2, 32, 32, 3)))
