import keras
import keras_hub
import meta
import numpy as np
import pytest
from golden import Golden, close, numpy, value_and_gradients, variable_gradients
from keras import ops

from keras_dinov3 import EncoderExtras, backend, block, encode_layers, encoder, families, rope
from keras_dinov3.encoder import encode

BACKEND = keras.config.backend()


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
    return randomized(keras_hub.models.DINOV3Backbone(**config))


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


GOLDEN_VITS = ("fb_vit_mlp", "fb_vit_swiglu_maskk_untiegl", "fb_vit_rms_untiecp")
KINDS = {  # ours, the reference's
    "cls": "x_norm_clstoken",
    "registers": "x_storage_tokens",
    "patches": "x_norm_patchtokens",
}


def golden_backbone(golden):
    """The backbone of one of `GOLDEN_VITS` and its extras."""
    h = golden.hyperparameters
    is_gated, is_rms = h["ffn_layer"] == "swiglu", h.get("norm_layer") == "rmsnorm"
    width = h["embed_dim"]
    backbone = keras_hub.models.DINOV3Backbone(
        patch_size=h["patch_size"],
        num_layers=h["depth"],
        hidden_dim=width,
        num_heads=h["num_heads"],
        intermediate_dim=(
            families.swiglu_width(width, h["ffn_ratio"]) if is_gated else width * h["ffn_ratio"]
        ),
        num_register_tokens=h["n_storage_tokens"],
        use_gated_mlp=is_gated,
        hidden_activation="silu" if is_gated else "gelu",
        use_query_bias=h["qkv_bias"],
        use_key_bias=h["qkv_bias"] and not h.get("mask_k_bias"),
        use_value_bias=h["qkv_bias"],
        use_proj_bias=h.get("proj_bias", True),
        use_mlp_bias=h.get("ffn_bias", True),
        layer_norm_eps=1e-5 if "norm_layer" in h else 1e-6,
        image_shape=(32, 32, 3),
    )
    extras = EncoderExtras(
        untie_cls_norm=h.get("untie_cls_and_patch_norms", False),
        untie_local_cls_norm=h.get("untie_global_and_local_cls_norm", False),
        norm="rms" if is_rms else "layer",
        layer_scale=h["layerscale_init"] is not None,
        rope_normalize=h.get("pos_embed_rope_normalize_coords", "separate"),
    ).build_for(backbone)
    meta.load(meta.backbone_weights(backbone, extras), golden.arrays, "weights/")
    return backbone, extras


def channels_last(array):
    return ops.convert_to_tensor(array.transpose(0, 2, 3, 1))


@pytest.mark.parametrize("name", GOLDEN_VITS)
def test_golden_vit(name):
    golden = Golden(name)
    backbone, extras = golden_backbone(golden)
    for size in ("32x32", "24x40"):
        image = channels_last(golden[f"in/{size}/image"])
        for kind in ("nomask", "masked"):
            masks = ops.convert_to_tensor(golden[f"in/{size}/masks"]) if kind == "masked" else None
            tokens = encode(backbone, image, masks, extras=extras)
            for ours, theirs in KINDS.items():
                if f"out/{size}/{kind}/{theirs}" in golden.keys():
                    golden.check(getattr(tokens, ours), f"out/{size}/{kind}/{theirs}")
    layers = encode_layers(backbone, image, 2, as_grid=True, extras=extras)
    for index, tokens in enumerate(layers):
        prefix = f"out/intermediate_last2/{index}"
        golden.check(ops.transpose(tokens.patches, (0, 3, 1, 2)), f"{prefix}/patch_map_BDHW")
        golden.check(tokens.cls, f"{prefix}/cls")


@pytest.mark.parametrize("name", GOLDEN_VITS)
def test_golden_vit_gradients_of_images(name):
    """The stored ones are twice the gradient that the manifest's formula gives, in all cases.

    The gradients of the weights, from the same sum, are stored once.
    """
    golden = Golden(name)
    backbone, extras = golden_backbone(golden)
    masks = ops.convert_to_tensor(golden["in/32x32/masks"])

    def function(global_images, local_images):
        views = {
            "global": encode(backbone, global_images, masks, True, extras=extras),
            "local": encode(backbone, local_images, None, True, extras=extras, is_local=True),
        }
        total = 0.0
        for view, tokens in views.items():
            for ours, theirs in KINDS.items():
                if f"in/cotangent/{view}/{theirs}" in golden.keys():
                    cotangent = ops.convert_to_tensor(golden[f"in/cotangent/{view}/{theirs}"])
                    total = total + ops.sum(getattr(tokens, ours) * cotangent)
        return total

    keys = ("in/32x32/image", "in/local/image")
    images = [np.ascontiguousarray(golden[key].transpose(0, 2, 3, 1)) for key in keys]
    _, gradients = value_and_gradients(function, *images)
    for view, gradient in zip(("global", "local"), gradients, strict=True):
        golden.check(2 * gradient.transpose(0, 3, 1, 2), f"grad/image_{view}")


@pytest.mark.parametrize("name", GOLDEN_VITS)
def test_golden_vit_in_training(name):
    """Outputs of a global and a local batch, and every gradient."""
    golden = Golden(name)
    backbone, extras = golden_backbone(golden)
    masks = ops.convert_to_tensor(golden["in/32x32/masks"])
    batches = {"global": ("in/32x32/image", masks), "local": ("in/local/image", None)}

    def see(view):
        key, masks = batches[view]
        image = channels_last(golden[key])
        return encode(backbone, image, masks, True, extras=extras, is_local=view == "local")

    def function():
        total = 0.0
        for view in batches:
            tokens = see(view)
            for ours, theirs in KINDS.items():
                if f"in/cotangent/{view}/{theirs}" in golden.keys():
                    cotangent = ops.convert_to_tensor(golden[f"in/cotangent/{view}/{theirs}"])
                    total = total + ops.sum(getattr(tokens, ours) * cotangent)
        return total

    for view in batches:
        tokens = see(view)
        for ours, theirs in KINDS.items():
            if f"out/train_list/{view}/{theirs}" in golden.keys():
                golden.check(getattr(tokens, ours), f"out/train_list/{view}/{theirs}")
    names = golden.case["grad_norm_names"]
    weights = meta.backbone_weights(backbone, extras)
    _, gradients = meta.gradients_of(function, weights, names)
    norms = [np.linalg.norm(gradients[name].astype("float64")) for name in names]
    golden.check(np.array(norms), "grad_norms")
    stored = {key.removeprefix("grad/") for key in golden.keys() if key.startswith("grad/")}
    assert len(stored & set(names)) >= 7
    for name in stored & set(names):
        golden.check(gradients[name], f"grad/{name}")
    assert stored - set(names) <= {"image_global", "image_local"}


def test_layers_by_number():
    backbone = small_backbone(num_layers=3)
    x = ops.convert_to_tensor(images(2, 16, 24, 3))
    last, first = encode_layers(backbone, x, [-1, 0])
    close(last.cls, numpy(encode(backbone, x).cls), 0, 0)
    raw = encode_layers(backbone, x, [2], normalize=False)[0]
    norm = backbone.layernorm
    normed = block.normalize(raw.patches, norm.gamma, norm.beta, norm.epsilon)
    close(normed, numpy(last.patches), 1e-6, 0)
    assert np.max(np.abs(numpy(first.cls) - numpy(last.cls))) > 1e-2
    for layers in (0, 4, [3], [-4], [], None, 1.5, True, "a", [0.5], [True]):
        with pytest.raises(ValueError, match="from 1 to 3, or a list of blocks from 0 to 2"):
            encode_layers(backbone, x, layers)


def test_golden_rope_periods():
    golden = Golden("fb_rope")
    h = golden.hyperparameters
    golden.check(rope.rope_periods(h["D_head"], h["base"]), "periods/base")
    minmax = rope.rope_periods(h["D_head"], min_period=h["minp"], max_period=h["maxp"])
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
            "periods": rope.rope_periods(h["D_head"], min_period=h["minp"], max_period=h["maxp"])
        },
    }
    checked = 0
    for key in golden.keys():
        parts = key.split("/")
        if parts[0] not in ("separate", "min", "max") or parts[-1] == "cos":
            continue
        normalize, augmentation, grid, _ = parts
        sin, cos = rope.rope_tables(
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


def test_golden_rope_of_the_reference_trainer():
    """It computes the tables in bfloat16; ours, in float32, lie within that rounding."""
    golden = Golden("fb_rope")
    h = golden.hyperparameters
    sin, cos = rope.rope_tables((2, 6), h["D_head"], h["base"])
    golden.check(sin, "bf16/separate/plain/2x6/sin", atol=2e-2)
    golden.check(cos, "bf16/separate/plain/2x6/cos", atol=2e-2)


def test_golden_rope_rotation():
    golden = Golden("fb_rope")
    h = golden.hyperparameters
    sin, cos = rope.rope_tables(h["grids"][1], h["D_head"], h["base"])
    x = golden["apply/x"].transpose(0, 2, 1, 3)  # ours: (B, length, heads, head_dim)
    tables = rope.signed_rope(sin, cos, 0, "float32")
    y = rope.apply_rope(ops.convert_to_tensor(x), *tables)
    golden.check(numpy(y).transpose(0, 2, 1, 3), "apply/y")


def test_prefix_tokens_are_not_rotated():
    sin, cos = rope.rope_tables((2, 3), 8)
    tables = rope.signed_rope(sin, cos, 5, "float32")
    x = images(2, 11, 3, 8)
    y = numpy(rope.apply_rope(ops.convert_to_tensor(x), *tables))
    np.testing.assert_array_equal(y[:, :5], x[:, :5])
    assert np.max(np.abs(y[:, 5:] - x[:, 5:])) > 0.1


@pytest.mark.skipif(BACKEND != "tensorflow", reason="graphs of TensorFlow")
def test_batches_of_unknown_size():
    import tensorflow as tf

    backbone = small_backbone()
    x = images(3, 16, 24, 3)

    @tf.function(input_signature=[tf.TensorSpec((None, 16, 24, 3))])
    def tokens_of(x):
        return encode(backbone, x), *encoder.encode_layers(backbone, x, [0])

    tokens, inner = tokens_of(x)
    close(tokens.cls, numpy(encode(backbone, x).cls), 1e-5, 1e-5)
    close(inner.patches, numpy(encoder.encode_layers(backbone, x, [0])[0].patches), 1e-5, 1e-5)


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


# Other families


def randomized(backbone):
    rng = np.random.default_rng(0)
    for variable in backbone.trainable_variables:
        variable.assign(numpy(variable) + rng.normal(size=variable.shape) * 0.1)
    return backbone


def dinov2(**config):
    config = {
        "patch_size": 8,
        "num_layers": 2,
        "hidden_dim": 48,
        "num_heads": 3,
        "intermediate_dim": 80,
        "layer_scale_init_value": 0.5,
        "image_shape": (32, 32, 3),
        "position_embedding_shape": (32, 32, 3),
        **config,
    }
    return randomized(keras_hub.models.DINOV2Backbone(**config))


def vit(**config):
    config = {
        "image_shape": (32, 24, 3),
        "patch_size": 8,
        "num_layers": 2,
        "num_heads": 3,
        "hidden_dim": 48,
        "mlp_dim": 80,
        **config,
    }
    return randomized(keras_hub.models.ViTBackbone(**config))


@pytest.mark.parametrize(
    "backbone",
    [
        lambda: dinov2(num_register_tokens=3),
        lambda: dinov2(use_swiglu_ffn=True, use_mask_token=False),
        lambda: vit(),
        lambda: vit(use_mha_bias=False, use_mlp_bias=False, use_patch_bias=False),
    ],
)
def test_other_families_equal_the_hub_at_inference(backbone):
    backbone = backbone()
    x = images(2, *backbone.image_shape)
    expected = numpy(backbone({"images": x}))
    actual = numpy(tokens_in_order(encode(backbone, ops.convert_to_tensor(x))))
    assert actual.shape == expected.shape
    assert np.max(np.abs(actual - expected)) < 1e-5


def test_learned_positions_are_resized():
    """To half the grid: each position is nearly the mean of the four it covers."""
    backbone = vit(image_shape=(96, 96, 3))
    x, y = np.meshgrid(np.arange(12.0), np.arange(12.0))
    ramp = np.zeros((145, 48), "float32")
    ramp[1:, 0], ramp[1:, 1] = x.ravel(), y.ravel()
    embedding = backbone.get_layer("vit_patching_and_embedding").position_embedding
    embedding.set_weights([ramp])
    small = numpy(encoder.resize_positions(families.parts_of(backbone), (6, 6)))[0]
    np.testing.assert_array_equal(small[0], 0)
    inner = small[1:].reshape(6, 6, 48)[2:-2, 2:-2]  # where the kernel meets no edge
    np.testing.assert_allclose(inner[..., 0], [[4.5, 6.5], [4.5, 6.5]], atol=1e-5)
    np.testing.assert_allclose(inner[..., 1], [[4.5, 4.5], [6.5, 6.5]], atol=1e-5)


def test_extra_registers_and_mask_token():
    backbone = vit()
    extras = EncoderExtras(num_register_tokens=4).build_for(backbone)
    assert [tuple(w.shape) for w in extras.weights] == [(1, 4, 48), (1, 1, 48)]
    x = ops.convert_to_tensor(images(2, 16, 40, 3))
    masks = ops.convert_to_tensor(np.random.default_rng(1).random((2, 10)) < 0.4)
    plain, masked = encode(backbone, x, extras=extras), encode(backbone, x, masks, extras=extras)
    assert plain.registers.shape == (2, 4, 48) and plain.patches.shape == (2, 10, 48)
    assert np.max(np.abs(numpy(plain.cls) - numpy(masked.cls))) > 1e-3
    with pytest.raises(ValueError, match="ViTBackbone without one; pass the `EncoderExtras`"):
        encode(backbone, x, masks)
    with pytest.raises(ValueError, match="has 4 of its own"):
        EncoderExtras(num_register_tokens=1).build_for(small_backbone(num_register_tokens=4))


@pytest.mark.parametrize(
    ("backbone", "message"),
    [
        (lambda: vit(use_class_token=False), "class token.*use_class_token=False"),
        (lambda: vit(patch_size=(8, 4)), r"square.*patch_size=\(8, 4\)"),
        (lambda: dinov2(position_embedding_shape=(48, 48, 3)), "position embeddings.*any size"),
    ],
)
def test_kinds_that_are_not_supported(backbone, message):
    with pytest.raises(ValueError, match=message):
        families.check_backbone(backbone())


# Varied rotary positions


def test_rope_is_varied_in_training_by_block_and_call():
    backbone = small_backbone()
    extras = EncoderExtras(rope_shift=0.5, rope_jitter=2.0, rope_rescale=2.0)
    x = ops.convert_to_tensor(images(2, 32, 32, 3))
    seed = keras.random.SeedGenerator(1)
    plain = numpy(encode(backbone, x).cls)
    close(encode(backbone, x, seed=seed, extras=extras).cls, plain, 0, 0)
    one, two = (
        numpy(encode(backbone, x, training=True, seed=seed, extras=extras).cls) for _ in range(2)
    )
    assert np.max(np.abs(one - plain)) > 1e-3 and np.max(np.abs(one - two)) > 1e-3


@pytest.mark.parametrize("kind", ["rope_shift", "rope_jitter", "rope_rescale"])
def test_rope_draws_stay_in_their_range(kind):
    """Angles of the longest period, from which the drawn number follows."""
    limit = {"rope_shift": 0.4, "rope_jitter": 1.5, "rope_rescale": 3.0}[kind]
    extras, seed = EncoderExtras(**{kind: limit}), keras.random.SeedGenerator(5)
    drawn = []
    for _ in range(60):
        sin, cos = (numpy(x) for x in extras.rope((2, 3), 16, 1e6, seed))
        angle = np.arctan2(sin, cos)[0]  # of the first patch: h angles, w angles
        period = 1e6 ** (3 / 4)
        centre = angle[[3, 7]] * period / (2 * np.pi)
        plain = np.array([-1 / 2, -2 / 3])
        drawn.append(centre - plain if kind == "rope_shift" else np.log(centre / plain))
    drawn = np.array(drawn)
    bound = limit if kind == "rope_shift" else np.log(limit)
    assert np.all(np.abs(drawn) <= bound * 1.001) and np.min(np.ptp(drawn, axis=0)) > bound
    same = np.allclose(drawn[:, 0], drawn[:, 1], atol=1e-3)
    assert same == (kind == "rope_rescale")  # one number for both axes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_register_tokens": -1}, "num_register_tokens=-1"),
        ({"norm": "batch"}, "norm='batch'"),
        ({"rope_normalize": "mean"}, "rope_normalize='mean'"),
        ({"num_register_tokens": True}, "num_register_tokens=True"),
        ({"rope_periods": (5.0, 2.0)}, "0 < min < max"),
        ({"rope_periods": (1.0, float("inf"))}, "0 < min < max"),
        ({"rope_periods": (1.0,)}, "0 < min < max"),
        ({"rope_periods": 5.0}, "0 < min < max"),
        ({"rope_shift": 0.0}, "rope_shift=0.0"),
        ({"rope_shift": "a"}, "rope_shift='a'"),
        ({"rope_jitter": float("inf")}, "rope_jitter=inf"),
        ({"rope_jitter": 1.0}, "rope_jitter=1.0"),
        ({"rope_rescale": 0.5}, "rope_rescale=0.5"),
        ({"untie_cls_norm": "no"}, "`untie_cls_norm` must be True or False. Received:"),
        ({"untie_local_cls_norm": 1}, "untie_local_cls_norm=1"),
        ({"layer_scale": "false"}, "layer_scale='false'"),
    ],
)
def test_extras_say_what_is_wrong(arguments, message):
    with pytest.raises(ValueError, match=message):
        EncoderExtras(**arguments)


@pytest.mark.parametrize(
    "arguments", [{"rope_shift": 1.0}, {"rope_normalize": "max"}, {"rope_periods": (1.0, 9.0)}]
)
def test_rotary_extras_need_rotary_positions(arguments):
    with pytest.raises(ValueError, match=f"{[*arguments][0]}, and a `DINOV2Backbone`"):
        EncoderExtras(**arguments).build_for(dinov2())


def test_a_single_period_is_the_smallest():
    close(rope.rope_periods(4, min_period=2.0, max_period=9.0), np.array([2.0]), 0, 0)


@pytest.mark.parametrize(("ratio", "multiple", "width"), [(3, 8, 128), (4, 8, 176), (4, 64, 192)])
def test_swiglu_width(ratio, multiple, width):
    assert families.swiglu_width(64, ratio, multiple) == width


def test_views_together_equal_one_after_the_other():
    """Masks, drawn images and rotations, and a norm of its own for local class tokens."""
    backbone = small_backbone(num_layers=4, hidden_dim=24, num_heads=2, intermediate_dim=40)
    extras = EncoderExtras(rope_shift=0.5, untie_cls_norm=True, untie_local_cls_norm=True)
    extras.build_for(backbone)
    for index, weight in enumerate(extras.trainable_weights):
        weight.assign(weight + 0.1 * (index + 1))
    masks = ops.convert_to_tensor(np.random.default_rng(1).random((5, 6)) < 0.4)
    views = [
        encoder.View(ops.convert_to_tensor(images(5, 16, 24, 3)), masks),
        encoder.View(ops.convert_to_tensor(images(7, 8, 16, 3)), is_local=True),
    ]

    def total(tokens):
        return sum(ops.sum(ops.square(x.patches)) + ops.sum(x.cls[:, 0]) for x in tokens)

    seeds = [keras.random.SeedGenerator(4) for _ in range(2)]

    def together():
        return total(encoder.encode_views(backbone, views, True, 0.4, seeds[0], extras))

    def in_turn():
        return total(
            encode(backbone, view.images, view.masks, True, 0.4, seeds[1], extras, view.is_local)
            for view in views
        )

    weights = [*backbone.trainable_variables, *extras.trainable_variables]
    expected, gradients = variable_gradients(in_turn, weights)
    actual, again = variable_gradients(together, weights)
    close(actual, numpy(expected), 1e-5, 1e-5)
    for variable, a, b in zip(weights, again, gradients, strict=True):
        assert np.max(np.abs(b)) > 0, variable.path
        close(a, numpy(b), 1e-5 * np.max(np.abs(b)), 1e-4)


def test_recomputing_keeps_outputs_and_gradients():
    backbone = small_backbone(num_layers=4, hidden_dim=24, num_heads=2, intermediate_dim=40)
    x = ops.convert_to_tensor(images(5, 16, 24, 3))
    masks = ops.convert_to_tensor(np.random.default_rng(1).random((5, 6)) < 0.4)

    def loss_with(remat):
        seed = keras.random.SeedGenerator(4)  # each time the same images skip a branch

        def function():
            tokens = encode(backbone, x, masks, True, 0.4, seed, remat=remat)
            return ops.sum(ops.square(tokens.patches)) + ops.sum(tokens.cls[:, 0])

        return function

    weights = backbone.trainable_variables
    expected, gradients = variable_gradients(loss_with("none"), weights)
    for remat in ("blocks", "full"):
        actual, again = variable_gradients(loss_with(remat), weights)
        close(actual, numpy(expected), 1e-5, 1e-5)
        for variable, a, b in zip(weights, again, gradients, strict=True):
            assert np.max(np.abs(b)) > 0, variable.path
            close(a, numpy(b), 1e-5 * np.max(np.abs(b)), 1e-5)


@pytest.mark.skipif(BACKEND == "jax", reason="JAX compiles whole steps")
def test_compiled_blocks_equal_plain_ones():
    backbone = small_backbone(num_layers=3, hidden_dim=24, num_heads=2, intermediate_dim=40)
    x = ops.convert_to_tensor(images(2, 16, 24, 3))
    weights = [v for v in backbone.trainable_variables if "mask_token" not in v.path]

    def function():
        return ops.sum(ops.square(encode(backbone, x, training=True).patches))

    expected, gradients = variable_gradients(function, weights)
    with backend.compiled_pieces(True):
        for _ in range(2):
            actual, again = variable_gradients(function, weights)
    close(actual, numpy(expected), 1e-5, 1e-5)
    for a, b in zip(again, gradients, strict=True):
        close(a, numpy(b), 1e-5 * np.max(np.abs(b)), 1e-5)
    if BACKEND == "torch":
        import torch

        counters = torch._dynamo.utils.counters
        assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


def test_extras_that_cannot_be_used():
    backbone, x = small_backbone(), ops.convert_to_tensor(images(2, 16, 24, 3))
    for settings in ({"untie_cls_norm": True}, {"untie_local_cls_norm": True}):
        for function in (encode, encode_layers):
            with pytest.raises(ValueError, match="no weights yet.*model.teacher_extras"):
                function(backbone, x, extras=EncoderExtras(**settings))
    extras = EncoderExtras(rope_shift=0.5)
    with pytest.raises(ValueError, match="need a `seed`"):
        encode(backbone, x, training=True, extras=extras)
    encode(backbone, x, extras=extras)
    with pytest.raises(ValueError, match="`layer_scale` must be True or False"):
        EncoderExtras(layer_scale="false")
