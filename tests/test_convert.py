import json
import os
import pathlib
import subprocess
import sys
import tomllib

import keras
import keras_hub
import numpy as np
import pytest
import tiny
from golden import Golden, close, numpy
from keras import ops
from safetensors.numpy import load_file, save_file

import keras_dinov3 as kd
from keras_dinov3 import cli, convert

BACKEND = keras.config.backend()
HUGGINGFACE_CASES = ["hf_dinov3_vit_mlp", "hf_dinov3_vit_gated"]


def noisy(backbone, seed=0):
    """No weight at its initial value, so that a swap of two of them shows."""
    rng = np.random.default_rng(seed)
    for variable in backbone.weights:
        variable.assign(rng.normal(size=variable.shape) * 0.3)
    return backbone


def features(backbone, seed=0):
    x = np.random.default_rng(seed).normal(size=(2, *tiny.GLOBAL, 3)).astype("float32")
    return encoded(backbone, x)


def encoded(backbone, x, masks=None):
    tokens = kd.encode(backbone, ops.convert_to_tensor(x), masks)
    return numpy(ops.concatenate([tokens.cls[:, None], tokens.registers, tokens.patches], axis=1))


def same_bytes(actual, expected):
    assert sorted(actual) == sorted(expected)
    for name, array in expected.items():
        assert actual[name].dtype == array.dtype, name
        np.testing.assert_array_equal(actual[name], array, err_msg=name)


def same_weights(backbone, other):
    for a, b in zip(backbone.weights, other.weights, strict=True):
        np.testing.assert_array_equal(numpy(a), numpy(b), err_msg=a.path)


def write_huggingface(folder, golden=None, shards=1, **config):
    golden = golden or Golden("hf_dinov3_vit_mlp")
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**golden.case["config"], **config}))
    weights = golden.part("weights/")
    if shards == 1:
        save_file(weights, folder / "model.safetensors")
        return weights
    files = {}
    for shard in range(shards):
        names = sorted(weights)[shard::shards]
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        save_file({name: weights[name] for name in names}, folder / file)
        files.update(dict.fromkeys(names, file))
    index = {"metadata": {"total_size": 1}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return weights


# Hugging Face


@pytest.mark.parametrize("case", HUGGINGFACE_CASES)
def test_huggingface_outputs(case, tmp_path):
    golden = Golden(case)
    write_huggingface(tmp_path, golden)
    backbone = convert.backbone_from_huggingface(tmp_path)
    for size in ("32x32", "24x40"):
        x = golden[f"in/{size}/pixel_values"].transpose(0, 2, 3, 1)
        masks = ops.convert_to_tensor(golden[f"in/{size}/bool_masked_pos"])
        plain, masked = encoded(backbone, x), encoded(backbone, x, masks)
        for kind, tokens in (("nomask", plain), ("masked", masked)):
            golden.check(tokens, f"out/{size}/{kind}/last_hidden_state")
            golden.check(tokens[:, 0], f"out/{size}/{kind}/pooler_output")

        # The Hub's own graph has one resolution.
        shaped = convert.backbone_from_huggingface(tmp_path, image_shape=x.shape[1:])
        golden.check(shaped({"pixel_values": x}), f"out/{size}/nomask/last_hidden_state")


@pytest.mark.parametrize("case", HUGGINGFACE_CASES)
@pytest.mark.parametrize("shards", [1, 3])
def test_huggingface_round_trip_gives_the_same_bytes(case, shards, tmp_path):
    golden = Golden(case)
    weights = write_huggingface(tmp_path / "theirs", golden, shards)
    backbone = convert.backbone_from_huggingface(tmp_path / "theirs")
    convert.backbone_to_huggingface(backbone, tmp_path / "deep" / "ours")
    same_bytes(load_file(tmp_path / "deep" / "ours" / "model.safetensors"), weights)
    written = json.loads((tmp_path / "deep" / "ours" / "config.json").read_text())
    read = golden.case["config"]
    assert len(written) > 15
    assert {key: read[key] for key in written} == written
    again = convert.backbone_from_huggingface(tmp_path / "deep" / "ours")
    same_weights(again, backbone)
    assert again.get_config() == {**backbone.get_config(), "name": again.name}


def test_huggingface_file_is_what_transformers_accepts(tmp_path):
    convert.backbone_to_huggingface(tiny.backbone(), tmp_path)
    header = (tmp_path / "model.safetensors").read_bytes()
    assert json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])["__metadata__"] == {
        "format": "pt"
    }


def test_huggingface_config_of_other_versions(tmp_path):
    golden = Golden("hf_dinov3_vit_mlp")
    write_huggingface(tmp_path, golden)
    config = dict(golden.case["config"])
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 50.0}
    for key in ("rope_theta", "query_bias", "key_bias", "hidden_act", "layer_norm_eps"):
        del config[key]  # defaults of their class
    config["image_size"] = [24, 37]
    (tmp_path / "config.json").write_text(json.dumps(config))
    backbone = convert.backbone_from_huggingface(tmp_path)
    assert backbone.rope_theta == 50.0 and not backbone.use_key_bias
    assert backbone.image_shape == (24, 32, 3)  # whole patches


CONFIGS = [
    {},
    {"num_register_tokens": 0, "use_mask_token": False, "image_shape": (16, 40, 2)},
    {"use_gated_mlp": True, "hidden_activation": "silu", "use_key_bias": False},
    {"use_query_bias": False, "use_key_bias": False, "use_value_bias": False, "rope_theta": 70.0},
    {"use_proj_bias": False, "use_mlp_bias": False, "layer_norm_eps": 1e-6},
]


@pytest.mark.parametrize("config", CONFIGS)
def test_hub_to_huggingface_and_back(config, tmp_path):
    backbone = noisy(tiny.backbone(**config))
    convert.backbone_to_huggingface(backbone, tmp_path)
    again = convert.backbone_from_huggingface(tmp_path)
    same_weights(again, backbone)
    assert again.get_config() == {**backbone.get_config(), "name": again.name}


# Meta


@pytest.mark.parametrize("case", ["fb_vit_mlp", "fb_vit_swiglu_maskk_untiegl"])
def test_meta_outputs(case):
    golden = Golden(case)
    weights = golden.part("weights/")
    # In training only: without it, inference is the same.
    weights = {name: a for name, a in weights.items() if not name.startswith("local_cls_norm.")}
    epsilon = 1e-6 if case == "fb_vit_mlp" else 1e-5
    backbone = convert.backbone_from_meta(weights, 2, layer_norm_eps=epsilon)
    for size in ("32x32", "24x40"):
        x = golden[f"in/{size}/image"].transpose(0, 2, 3, 1)
        masks = ops.convert_to_tensor(golden[f"in/{size}/masks"])
        for kind, hidden in (("nomask", None), ("masked", masks)):
            tokens = kd.encode(backbone, ops.convert_to_tensor(x), hidden)
            golden.check(tokens.cls, f"out/{size}/{kind}/x_norm_clstoken")
            golden.check(tokens.registers, f"out/{size}/{kind}/x_storage_tokens")
            golden.check(tokens.patches, f"out/{size}/{kind}/x_norm_patchtokens")


def test_meta_round_trip_gives_the_same_bytes():
    weights = Golden("fb_vit_mlp").part("weights/")
    backbone = convert.backbone_from_meta(weights, 2, image_shape=(32, 24, 3))
    assert backbone.image_shape == (32, 24, 3) and backbone.rope_theta == 100.0
    same_bytes(convert.backbone_to_meta(backbone), weights)


def test_meta_round_trip_of_a_masked_key_bias():
    weights = Golden("fb_vit_swiglu_maskk_untiegl").part("weights/")
    weights = {name: a for name, a in weights.items() if not name.startswith("local_cls_norm.")}
    backbone = convert.backbone_from_meta(weights, 2)
    assert backbone.use_gated_mlp and not backbone.use_key_bias
    width = backbone.hidden_dim
    for index in range(backbone.num_layers):  # the values that the mask hides do not travel
        weights[f"blocks.{index}.attn.qkv.bias"][width : 2 * width] = 0
    same_bytes(convert.backbone_to_meta(backbone), weights)


@pytest.mark.parametrize("config", CONFIGS)
def test_hub_to_meta_and_back(config):
    backbone = noisy(tiny.backbone(**config))
    weights = convert.backbone_to_meta(backbone)
    again = convert.backbone_from_meta(
        weights,
        backbone.num_heads,
        image_shape=backbone.image_shape,
        layer_norm_eps=backbone.layer_norm_eps,
    )
    same_weights(again, backbone)
    assert again.get_config() == {**backbone.get_config(), "name": again.name}
    same_bytes(convert.backbone_to_meta(again), weights)


def test_every_weight_of_the_hub_has_one_place():
    """A Hub release that adds a weight fails here, instead of being converted without it."""
    backbone = tiny.backbone(use_gated_mlp=True, hidden_activation="silu")
    sizes = convert.sizes_of(backbone)
    for places in (
        convert.meta_places(sizes),
        convert.backbone_places(sizes, convert.HUGGINGFACE),
    ):
        found = [convert.weight_at(backbone, p) for place in places.values() for p in place.paths]
        assert len(found) == len(backbone.weights)
        assert {id(variable) for variable in found} == {id(v) for v in backbone.weights}


def test_bfloat16_both_ways(tmp_path):
    backbone = noisy(tiny.backbone(dtype="bfloat16"))
    convert.backbone_to_huggingface(backbone, tmp_path)
    arrays = load_file(tmp_path / "model.safetensors")
    assert {array.dtype.name for array in arrays.values()} == {"bfloat16"}
    again = convert.backbone_from_huggingface(tmp_path, dtype="bfloat16")
    convert.backbone_to_huggingface(again, tmp_path / "again")
    same_bytes(load_file(tmp_path / "again" / "model.safetensors"), arrays)
    wide = convert.backbone_from_huggingface(tmp_path)
    assert {keras.backend.standardize_dtype(v.dtype) for v in wide.weights} == {"float32"}
    name = "layer.1.mlp.up_proj.weight"
    kernel = wide.encoder.layers[1].mlp.up_proj.kernel
    np.testing.assert_array_equal(numpy(kernel).T, arrays[name].astype("float32"))


@pytest.mark.parametrize("theta", [100.0, 50.0, 123.5, 10000.0])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_base_of_the_periods_is_found(theta, dtype):
    backbone = tiny.backbone(rope_theta=theta, hidden_dim=128)  # 64 for each head, as Meta's
    weights = convert.backbone_to_meta(backbone)
    if dtype == "bfloat16":  # as in released files
        periods = ops.cast(weights["rope_embed.periods"], "bfloat16")
        weights["rope_embed.periods"] = numpy(ops.cast(periods, "float32"))
    found = convert.backbone_from_meta(weights, 2).rope_theta
    assert found == (theta if theta != 123.5 or dtype == "float32" else pytest.approx(theta, 0.05))
    del weights["rope_embed.periods"]
    assert convert.backbone_from_meta(weights, 2).rope_theta == 100.0
    assert convert.backbone_from_meta(weights, 2, rope_theta=7.0).rope_theta == 7.0


# A whole model


GRAM_BACKBONE = "gram_teacher/backbone."


def golden_model(num_register_tokens=4, **config):
    return tiny.model(
        backbone=keras_hub.models.DINOV3Backbone(
            patch_size=8,
            num_layers=2,
            hidden_dim=64,
            num_heads=2,
            intermediate_dim=256,
            num_register_tokens=num_register_tokens,
            image_shape=(32, 32, 3),
        ),
        **config,
        num_prototypes=96,
        num_patch_prototypes=80,
        head_hidden_dim=64,
        head_bottleneck_dim=32,
    )


def model_weights(model, index):
    return [numpy(w).copy() for pair in model.student_and_teacher for w in pair[index].weights]


@pytest.mark.parametrize("part", ["student", "teacher"])
def test_load_meta_loads_one_side(part):
    golden = Golden("fb_step")
    model = golden_model()
    index = convert.SIDES.index(part)
    other = model_weights(model, 1 - index)
    convert.load_meta(model, golden.part(f"{part}/"), part)
    for before, after in zip(other, model_weights(model, 1 - index), strict=True):
        np.testing.assert_array_equal(before, after)
    backbone, _, dino_head, ibot_head = (pair[index] for pair in model.student_and_teacher)
    same_bytes(convert.backbone_to_meta(backbone), golden.part(f"{part}/backbone."))
    for name, head in (("dino_head", dino_head), ("ibot_head", ibot_head)):
        weights = golden.part(f"{part}/{name}.")
        kernels = [layer.kernel for layer in (*head.hidden_layers, head.bottleneck)]
        for kernel, place in zip(kernels, (0, 2, 4), strict=True):
            np.testing.assert_array_equal(numpy(kernel).T, weights[f"mlp.{place}.weight"])
        np.testing.assert_array_equal(numpy(head.bottleneck.bias), weights["mlp.4.bias"])
        np.testing.assert_array_equal(numpy(head.prototypes.kernel).T, weights["last_layer.weight"])


@pytest.mark.parametrize("source", ["teacher", "backbone"])
def test_load_meta_loads_a_gram_teacher(source):
    weights = Golden("fb_gram_step").part("gram_teacher/")
    own = golden_model().student
    model = golden_model(gram=kd.GramAnchor("teacher" if source == "teacher" else own))
    sides = [model_weights(model, index) for index in (0, 1)]
    state_dict = {"gram_teacher": weights, "student": {"backbone.cls_token": np.zeros((1, 1, 64))}}
    convert.load_meta(model, state_dict, "gram_teacher")
    same_bytes(
        convert.backbone_to_meta(model.gram.backbone), Golden("fb_gram_step").part(GRAM_BACKBONE)
    )
    for index, before in enumerate(sides):
        for x, y in zip(before, model_weights(model, index), strict=True):
            np.testing.assert_array_equal(x, y)
    same_bytes(
        convert.backbone_to_meta(convert.backbone_from_meta(state_dict, 2, part="gram_teacher")),
        Golden("fb_gram_step").part(GRAM_BACKBONE),
    )


def test_a_gram_teacher_is_needed_for_its_weights():
    weights = {"gram_teacher": Golden("fb_gram_step").part("gram_teacher/")}
    with pytest.raises(ValueError, match=r"needs a Gram teacher.*gram=None"):
        convert.load_meta(golden_model(), weights, "gram_teacher")
    live = golden_model(gram=kd.GramAnchor("ema_teacher"))
    with pytest.raises(ValueError, match=r"weights of its own.*gram='ema_teacher'"):
        convert.load_meta(live, weights, "gram_teacher")


def test_load_meta_knows_extras():
    """Untied norms, RMSNorm and missing layer scale go into a model that has them, in one piece."""
    arrays = {f"backbone.{k}": a for k, a in Golden("fb_vit_rms_untiecp").part("weights/").items()}
    extras = kd.EncoderExtras(
        untie_cls_norm=True, norm="rms", layer_scale=False, rope_normalize="max"
    )
    biases = ("query", "key", "value", "proj", "mlp")
    backbone = keras_hub.models.DINOV3Backbone(
        patch_size=8,
        num_layers=2,
        hidden_dim=64,
        num_heads=4,
        intermediate_dim=128,
        num_register_tokens=0,
        image_shape=(32, 32, 3),
        **{f"use_{name}_bias": False for name in biases},
    )
    model = kd.DINOv3(
        backbone, num_prototypes=7, head_hidden_dim=9, head_bottleneck_dim=5, extras=extras
    )
    for name in ("dino_head", "ibot_head"):
        head = getattr(model, f"student_{name}")
        places = convert.head_places(head, 64)
        arrays |= {f"{name}.{key}": a for key, a in convert.collect(head, places).items()}
    convert.load_meta(model, arrays)
    golden = Golden("fb_vit_rms_untiecp")
    x = ops.convert_to_tensor(golden["in/24x40/image"].transpose(0, 2, 3, 1))
    tokens = kd.encode(model.student, x, extras=model.student_extras)
    golden.check(tokens.cls, "out/24x40/nomask/x_norm_clstoken")
    golden.check(tokens.patches, "out/24x40/nomask/x_norm_patchtokens")
    del arrays["backbone.cls_norm.weight"]
    with pytest.raises(ValueError, match=r"Missing: backbone\.cls_norm\.weight"):
        convert.load_meta(model, arrays)


def test_load_meta_places_registers_in_extras():
    backbone = tiny.backbone(num_register_tokens=0)
    extras = kd.EncoderExtras(num_register_tokens=3)
    model = tiny.model(backbone=backbone, extras=extras)
    arrays = convert.backbone_to_meta(noisy(tiny.backbone(num_register_tokens=3)))
    arrays = {f"backbone.{name}": array for name, array in arrays.items()}
    for name in ("dino_head", "ibot_head"):
        head = getattr(model, f"student_{name}")
        places = convert.head_places(head, 32)
        arrays |= {f"{name}.{key}": a for key, a in convert.collect(head, places).items()}
    convert.load_meta(model, arrays, part="teacher")
    tokens = arrays["backbone.storage_tokens"]
    np.testing.assert_array_equal(numpy(model.teacher_extras.register_tokens), tokens)
    assert not np.array_equal(numpy(model.student_extras.register_tokens), tokens)
    arrays["backbone.storage_tokens"] = tokens[:, :2]
    with pytest.raises(ValueError, match=r"storage_tokens \(1, 2, 32\), not \(1, 3, 32\)"):
        convert.load_meta(model, arrays)
    del arrays["backbone.storage_tokens"]
    with pytest.raises(ValueError, match=r"Missing: backbone\.storage_tokens"):
        convert.load_meta(model, arrays)


def test_the_norm_of_local_crops_is_left_out_with_a_warning():
    weights = Golden("fb_vit_swiglu_maskk_untiegl").part("weights/")
    with pytest.warns(UserWarning, match=r"Left out local_cls_norm\.bias, local_cls_norm\.weight"):
        convert.backbone_from_meta(weights, 2)


def test_head_of_one_layer():
    head = kd.DINOHead(7, bottleneck_dim=5, num_layers=1)
    head.build((None, 3))
    arrays = convert.collect(head, convert.head_places(head, 3))
    shapes = {name: array.shape for name, array in arrays.items()}
    assert shapes == {"mlp.weight": (5, 3), "mlp.bias": (5,), "last_layer.weight": (7, 5)}


WRAPPINGS = {
    "nested": lambda student, teacher: {"student": student, "teacher": teacher, "iteration": 3},
    "flat": lambda student, teacher: {
        **{f"student.{name}": a for name, a in student.items()},
        **{f"teacher.{name}": a for name, a in teacher.items()},
        "dino_loss.center": np.zeros((1, 96)),
        "gram_teacher.backbone.norm.weight": np.zeros(64),
    },
    "model": lambda student, teacher: {
        "model": {
            **{f"module.student.{name}": a for name, a in student.items()},
            **{f"module.teacher.{name}": a for name, a in teacher.items()},
        },
        "optimizer": {"state": {0: {"exp_avg": np.zeros(3)}}, "param_groups": [{"lr": 0.1}]},
    },
    "teacher": lambda student, teacher: {"teacher": teacher},
    "module": lambda student, teacher: {f"module.{name}": a for name, a in teacher.items()},
    "compiled": lambda student, teacher: {
        f"_orig_mod.{name}".replace("blocks.1.", "blocks.1._orig_mod."): a
        for name, a in teacher.items()
    },
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_wrappers_of_training_checkpoints(wrapping):
    golden = Golden("fb_step")
    state_dict = WRAPPINGS[wrapping](golden.part("student/"), golden.part("teacher/"))
    model = golden_model()
    convert.load_meta(model, state_dict, "teacher")
    expected = golden.part("teacher/backbone.")
    same_bytes(convert.backbone_to_meta(model.teacher), expected)
    same_bytes(convert.backbone_to_meta(convert.backbone_from_meta(state_dict, 2)), expected)


def test_backbone_of_either_part():
    golden = Golden("fb_step")
    state_dict = {"student": golden.part("student/"), "teacher": golden.part("teacher/")}
    student = convert.backbone_from_meta(state_dict, 2, part="student")
    same_bytes(convert.backbone_to_meta(student), golden.part("student/backbone."))
    with pytest.raises(ValueError, match=r"no names under `student\.`.*teacher"):
        convert.backbone_from_meta({"teacher": state_dict["teacher"]}, 2, part="student")
    with pytest.raises(ValueError, match=r"'gram_teacher'\).*part='gram'"):
        convert.backbone_from_meta(state_dict, 2, part="gram")


# What does not fit


def test_all_that_does_not_fit_is_named_and_nothing_is_loaded():
    weights = Golden("fb_step").part("student/")
    broken = {
        **weights,
        "backbone.head.weight": np.ones((3, 4)),
        "dino_head.mlp.6.bias": np.ones(1),
    }
    del broken["backbone.blocks.1.attn.proj.bias"], broken["ibot_head.last_layer.weight"]
    broken["backbone.cls_token"] = np.ones((1, 64))
    broken["dino_head.mlp.0.weight"] = weights["dino_head.mlp.0.weight"][:, :63]
    broken["backbone.norm.weight"] = np.ones(64, "int64")
    broken["backbone.rope_embed.periods"] = np.linspace(1, 2, 8)
    model = golden_model()
    before = model_weights(model, 0) + model_weights(model, 1)
    with pytest.raises(ValueError) as error:
        convert.load_meta(model, broken)
    for text in (
        "Unknown: backbone.head.weight, dino_head.mlp.6.bias.",
        "Missing: backbone.blocks.1.attn.proj.bias, ibot_head.last_layer.weight.",
        "backbone.cls_token (1, 64), not (1, 1, 64)",
        "dino_head.mlp.0.weight (64, 63), not (64, 64)",
        "backbone.norm.weight int64, not float",
        "backbone.rope_embed.periods",
        "`rope_theta ** (4 * i / head_dim)`",
        "nothing was loaded",
    ):
        assert text in str(error.value)
    for a, b in zip(before, model_weights(model, 0) + model_weights(model, 1), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_mask_of_the_key_bias_is_not_ignored():
    golden = Golden("fb_vit_swiglu_maskk_untiegl")
    weights = golden.part("weights/")
    weights = {name: a for name, a in weights.items() if not name.startswith("local_cls_norm.")}
    with pytest.raises(ValueError, match=r"Unknown: blocks\.0\.attn\.qkv\.bias_mask.*masked key"):
        convert.backbone_from_meta(weights, 2, use_key_bias=True)
    weights["blocks.1.attn.qkv.bias_mask"] = np.full(192, np.nan, "float32")  # Meta's, unset
    with pytest.raises(ValueError, match=r"another value: blocks\.1\.attn\.qkv\.bias_mask\."):
        convert.backbone_from_meta(weights, 2)
    del weights["blocks.1.attn.qkv.bias_mask"]
    with pytest.raises(ValueError, match=r"Missing: blocks\.1\.attn\.qkv\.bias_mask\."):
        convert.backbone_from_meta(weights, 2)


def test_weights_without_a_place_in_the_hub():
    weights = Golden("fb_vit_rms_untiecp").part("weights/")
    with pytest.raises(ValueError) as error:
        convert.backbone_from_meta(weights, 4)
    assert "Unknown: cls_norm.weight. Missing: " in str(error.value)
    missing = ["norm.bias"]
    for index in range(2):
        missing += [f"blocks.{index}.{name}" for name in ("norm1.bias", "norm2.bias")]
        missing += [f"blocks.{index}.{name}" for name in ("ls1.gamma", "ls2.gamma")]
    for name in (*missing, "RMSNorm", "layer scales"):
        assert name in str(error.value)


def test_hints_only_where_they_explain():
    weights = Golden("fb_vit_mlp").part("weights/")
    del weights["blocks.1.norm2.bias"]  # one of many: no RMSNorm
    with pytest.raises(ValueError, match=r"Missing: blocks\.1\.norm2\.bias\. $"):
        convert.backbone_from_meta(weights, 2)


def test_unknown_arguments_of_the_backbone_are_named():
    weights = Golden("fb_vit_mlp").part("weights/")
    with pytest.raises(ValueError, match="among patch_size.*Received: rope_thta"):
        convert.backbone_from_meta(weights, 2, rope_thta=50.0)
    with pytest.raises(ValueError, match=r"`image_shape` must be.*image_shape=\(32, 32\)"):
        convert.backbone_from_meta(weights, 2, image_shape=(32, 32))


def test_one_misshapen_or_missing_array_is_named_alone():
    """Sizes are those of most arrays, so that the odd one does not make the others wrong."""
    weights = Golden("fb_vit_mlp").part("weights/")
    optional = {"mask_token", "storage_tokens", "rope_embed.periods"}
    for name, array in weights.items():
        odd = {**weights, name: np.ones((*array.shape, 2), "float32")}
        with pytest.raises(ValueError) as error:
            convert.backbone_from_meta(odd, 2)
        said = "Unknown: storage_tokens." if name == "storage_tokens" else f"shape: {name} ("
        assert said in str(error.value) and str(error.value).count(", not (") <= 1
        if name not in optional:
            del odd[name]
            with pytest.raises(ValueError, match=rf"nothing was loaded. Missing: {name}\.( \D*)?$"):
                convert.backbone_from_meta(odd, 2)


@pytest.mark.parametrize("num_heads", [0, -2, 3, 2.0, None, True, "2"])
def test_num_heads_must_divide_the_width(num_heads):
    with pytest.raises(ValueError, match="num_heads"):
        convert.backbone_from_meta(Golden("fb_vit_mlp").part("weights/"), num_heads)


def test_wrong_num_heads_are_told_by_the_periods():
    with pytest.raises(ValueError, match=r"rope_embed\.periods \(8,\), not \(4,\).*num_heads"):
        convert.backbone_from_meta(Golden("fb_vit_mlp").part("weights/"), 4)


@pytest.mark.parametrize("weights", [{}, {"a": np.ones(3)}, {"blocks.0.x": np.ones(3)}, [1], None])
def test_other_things_are_no_weights(weights):
    with pytest.raises(ValueError, match="Meta's names|must be a dict"):
        convert.backbone_from_meta(weights, 2)


def test_far_block_numbers_make_no_far_blocks():
    weights = Golden("fb_vit_mlp").part("weights/")
    weights["blocks.999999999.norm1.weight"] = np.ones(64, "float32")
    with pytest.raises(ValueError, match=r"Unknown: blocks\.999999999.*Missing: blocks\.3\."):
        convert.backbone_from_meta(weights, 2)


def test_names_that_collide():
    with pytest.raises(ValueError, match=r"Two arrays have the name norm\.weight"):
        convert.backbone_from_meta({"norm.weight": np.ones(3), "module.norm.weight": np.ones(3)}, 2)


def test_the_default_image_shape_follows_the_data_format():
    weights = convert.backbone_to_meta(tiny.backbone())
    assert convert.backbone_from_meta(weights, 2).image_shape == (112, 112, 3)
    first = convert.backbone_from_meta(weights, 2, data_format="channels_first")
    assert first.image_shape == (3, 112, 112)
    same_bytes(convert.backbone_to_meta(first), weights)
    with pytest.raises(ValueError, match=r"\(32, 3, 8, 8\), not \(32, 1, 8, 8\)"):
        convert.backbone_from_meta(weights, 2, image_shape=(32, 32, 1))


def test_settings_that_have_no_name_elsewhere(tmp_path):
    gated = tiny.backbone(use_gated_mlp=True, hidden_activation="silu")
    weights = {f"backbone.{name}": a for name, a in convert.backbone_to_meta(gated).items()}
    model = tiny.model(backbone=tiny.backbone(use_gated_mlp=True))  # the Hub's default is gelu
    with pytest.raises(ValueError, match="silu in a gated one.*'gelu'"):
        convert.load_meta(model, weights)
    with pytest.raises(ValueError, match="use_query_bias=False"):
        convert.backbone_to_meta(tiny.backbone(use_query_bias=False))
    with pytest.raises(ValueError, match="gelu in a plain MLP.*'silu'"):
        convert.backbone_to_meta(tiny.backbone(hidden_activation="silu"))
    with pytest.raises(ValueError, match="gelu, silu, relu.*'tanh'"):
        convert.backbone_to_huggingface(tiny.backbone(hidden_activation="tanh"), tmp_path / "no")
    assert not (tmp_path / "no").exists()
    with pytest.raises(TypeError, match="DINOV3Backbone"):
        convert.backbone_to_meta(keras.Sequential())
    with pytest.raises(TypeError, match="`DINOv3`.*DINOV3Backbone"):
        convert.load_meta(tiny.backbone(), {})


# Files


def test_files_of_both_kinds(tmp_path):
    weights = Golden("fb_vit_mlp").part("weights/")
    for file in ("weights.pth", "weights.safetensors"):
        convert.write_weights(weights, tmp_path / file)
        same_bytes(convert.read_weights(tmp_path / file), weights)
    half = {"x": ops.convert_to_numpy(ops.ones((3,))).astype("bfloat16")}
    for file in ("half.pt", "half.safetensors"):
        convert.write_weights(half, tmp_path / file)
        same_bytes(convert.read_weights(tmp_path / file), half)
    with pytest.raises(ValueError, match=r"\.safetensors, \.pth.*weights\.npz"):
        convert.write_weights(weights, tmp_path / "weights.npz")
    with pytest.raises(ValueError, match=r"\.safetensors, \.pth.*weights\.npz"):
        convert.read_weights(tmp_path / "weights.npz")
    with pytest.raises(FileNotFoundError, match="none.pth"):
        convert.read_weights(tmp_path / "none.pth")


def test_folders_are_made_and_files_in_the_way_are_told(tmp_path):
    (tmp_path / "file").write_text("text")
    for name in ("x.pth", "x.safetensors"):
        convert.write_weights({"a": np.ones(3, "float32")}, tmp_path / "new" / "folder" / name)
        with pytest.raises(OSError, match="file"):
            convert.write_weights({"a": np.ones(3, "float32")}, tmp_path / "file" / name)
        (tmp_path / name).mkdir()
        with pytest.raises(FileNotFoundError, match=f"no file .*{name}"):
            convert.read_weights(tmp_path / name)


def test_training_checkpoint_of_torch(tmp_path):
    torch = pytest.importorskip("torch")
    golden = Golden("fb_step")
    teacher = {name: torch.tensor(a) for name, a in golden.part("teacher/").items()}
    torch.save({"teacher": teacher, "iteration": 3}, tmp_path / "checkpoint.pth")
    weights = convert.read_weights(tmp_path / "checkpoint.pth")
    same_bytes(weights, {f"teacher.{k}": a for k, a in golden.part("teacher/").items()})
    model = golden_model()
    convert.load_meta(model, weights, "teacher")
    same_bytes(convert.backbone_to_meta(model.teacher), golden.part("teacher/backbone."))
    convert.load_meta(model, {"teacher": teacher}, "teacher")  # tensors as they are


class Evil:
    def __reduce__(self):
        return (os.mkdir, ("ran",))


def damaged_files(tmp_path):
    """Files that are no weights: of the wrong kind, cut, or dangerous."""
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    weights = {"norm.weight": np.ones(300, "float32")}
    for suffix in (".pth", ".safetensors"):
        convert.write_weights(weights, tmp_path / f"whole{suffix}")
        whole = (tmp_path / f"whole{suffix}").read_bytes()
        contents = [b"", b"\0" * 8, rng.bytes(100), b"{}", whole[:-100], whole[:40], b"PK" + whole]
        contents += [b"\xff" * 7 + b"\x7f" + whole]
        for index, content in enumerate(contents):
            path = tmp_path / f"damaged{index}{suffix}"
            path.write_bytes(content)
            yield path
    for index, thing in enumerate((Evil(), [1, 2], torch.ones(3), {"a": 1}, {"x": Evil()})):
        path = tmp_path / f"thing{index}.pth"
        torch.save(thing, path)
        yield path


def test_damaged_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    count = 0
    for path in damaged_files(tmp_path):
        with pytest.raises(ValueError, match=path.name) as error:
            convert.read_weights(path)
        assert "weights_only" not in str(error.value)  # torch's advice to run the file's code
        count += 1
    assert count == 21
    assert not pathlib.Path("ran").exists()


def test_without_torch(tmp_path, monkeypatch):
    (tmp_path / "weights.pth").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ImportError, match=r"weights\.pth.*torch is not installed.*\.safetensors"):
        kd.backend.load_torch_file(tmp_path / "weights.pth")


@pytest.mark.parametrize(
    "config, message",
    [
        ({"model_type": "vit"}, "'dinov3_vit'.*'vit'"),
        ({"hidden_size": "64"}, "hidden_size='64'"),
        ({"num_hidden_layers": 2.5}, "num_hidden_layers=2.5"),
        ({"num_hidden_layers": 10**12}, "1000000000000, .*only 41 arrays"),
        ({"patch_size": 0}, "patch_size=0 .needs int of at least 1"),
        ({"key_bias": 1}, "key_bias=1 .needs bool"),
        ({"rope_theta": None, "hidden_act": "no"}, "rope_theta=None .needs float.*hidden_act='no'"),
        ({"layer_norm_eps": float("nan")}, "layer_norm_eps=nan"),
        ({"rope_theta": 10**400}, "rope_theta=1000"),
        ({"image_size": 4}, "image_size=4"),
        ({"image_size": "big"}, "image_size='big'"),
        ({"image_size": [32, 32, 3]}, r"image_size=\[32, 32, 3\]"),
        ({"num_attention_heads": 5}, "multiple of 4 . num_attention_heads=20"),
        ({"intermediate_size": 255}, r"mlp\.down_proj\.weight \(64, 256\), not \(64, 255\)"),
        ({"num_hidden_layers": 1}, r"Unknown: .*layer\.1\."),
        ({"num_hidden_layers": 3}, r"Missing: .*layer\.2\."),
        ({"use_gated_mlp": True}, r"Missing: .*layer\.0\.mlp\.gate_proj\.weight"),
        ({"num_channels": 1}, r"\(64, 3, 8, 8\), not \(64, 1, 8, 8\)"),
        ({"num_register_tokens": 0}, r"register_tokens \(1, 4, 64\), not \(1, 0, 64\)"),
    ],
)
def test_huggingface_configs_that_do_not_fit(config, message, tmp_path):
    write_huggingface(tmp_path, **config)
    with pytest.raises(ValueError, match=message):
        convert.backbone_from_huggingface(tmp_path)


def test_damaged_huggingface_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        convert.backbone_from_huggingface(tmp_path)
    write_huggingface(tmp_path)
    good = (tmp_path / "config.json").read_bytes()
    for content in (b"", b"{", b"[1]", b"\xff\xfe\x00", b"[" * 100_000, good[:-5], b"null"):
        (tmp_path / "config.json").write_bytes(content)
        with pytest.raises(ValueError, match=r"config\.json"):
            convert.backbone_from_huggingface(tmp_path)
    (tmp_path / "config.json").write_bytes(good)
    weights = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[:-3])
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        convert.backbone_from_huggingface(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors\.index\.json"):
        convert.backbone_from_huggingface(tmp_path)


def test_damaged_shards(tmp_path):
    write_huggingface(tmp_path, shards=2)
    index = tmp_path / "model.safetensors.index.json"
    good = json.loads(index.read_text())["weight_map"]
    for weight_map in (None, [1], {"a": 1}, {"norm.bias": "../model.safetensors"}, {"a": "x.bin"}):
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(ValueError, match="weight_map"):
            convert.backbone_from_huggingface(tmp_path)
    index.write_text(json.dumps({"weight_map": {**good, "extra": good["norm.bias"]}}))
    with pytest.raises(ValueError, match="lacks extra"):
        convert.backbone_from_huggingface(tmp_path)
    other = next(file for file in good.values() if file != good["norm.bias"])
    index.write_text(json.dumps({"weight_map": {**good, "norm.bias": other}}))
    with pytest.raises(ValueError, match=r"lacks norm\.bias.*also holds norm\.bias"):
        convert.backbone_from_huggingface(tmp_path)
    index.write_text(json.dumps({"weight_map": {**good, "a": "missing.safetensors"}}))
    with pytest.raises(FileNotFoundError, match=r"missing\.safetensors"):
        convert.backbone_from_huggingface(tmp_path)


# The way of a user, station by station


def test_features_stay_equal_from_station_to_station(tmp_path):
    noisy(tiny.backbone()).save_to_preset(str(tmp_path / "preset"))
    backbone = keras_hub.models.DINOV3Backbone.from_preset(str(tmp_path / "preset"))
    start = features(backbone)
    model = tiny.model(backbone=backbone, optimizer=kd.AdamW(1e-2))
    model.teacher_ema.momentum = 0.5
    close(features(model.student), start, 0, 1e-5)
    close(features(model.teacher), start, 0, 1e-5)
    for seed in range(3):
        model.train_on_batch(tiny.images(seed=seed))
    trained = features(model.teacher)
    assert np.max(np.abs(trained - start)) > 1e-2
    exported = model.export_backbone()
    close(features(exported), trained, 0, 1e-5)
    exported.save_to_preset(str(tmp_path / "trained"))
    loaded = keras_hub.models.DINOV3Backbone.from_preset(str(tmp_path / "trained"))
    close(features(loaded), trained, 0, 1e-5)
    convert.backbone_to_huggingface(loaded, tmp_path / "huggingface")
    back = convert.backbone_from_huggingface(tmp_path / "huggingface")
    close(features(back), trained, 0, 1e-5)
    # The Hub reads such a folder by itself, if its images are square.
    config = json.loads((tmp_path / "huggingface" / "config.json").read_text())
    (tmp_path / "huggingface" / "config.json").write_text(json.dumps({**config, "image_size": 32}))
    by_hub = keras_hub.models.DINOV3Backbone.from_preset(str(tmp_path / "huggingface"))
    close(features(by_hub), trained, 0, 1e-5)
    weights = convert.backbone_to_meta(back)
    meta = convert.backbone_from_meta(weights, back.num_heads)
    close(features(meta), trained, 0, 1e-5)


# The command


def test_command_converts_around_and_gives_the_same_bytes(tmp_path, capsys):
    weights = Golden("fb_vit_mlp").part("weights/")
    paths = [tmp_path / name for name in ("a.pth", "keras", "hf", "b.safetensors", "hf2", "c.pth")]
    convert.write_weights(weights, paths[0])
    options = [["--num-heads", "2"], [], [], ["--num-heads", "2", "--to", "huggingface"], []]
    for source, target, more in zip(paths, paths[1:], options, strict=False):
        assert cli.main(["convert", str(source), str(target), *more]) == 0
        assert str(target) in capsys.readouterr().out
    same_bytes(convert.read_weights(paths[-1]), weights)
    assert (tmp_path / "keras" / "model.weights.h5").exists()
    assert (tmp_path / "hf" / "model.safetensors").exists()


def test_command_keeps_bfloat16_if_told(tmp_path):
    convert.backbone_to_huggingface(noisy(tiny.backbone(dtype="bfloat16")), tmp_path / "hf")
    start = load_file(tmp_path / "hf" / "model.safetensors")
    for source, target in (("hf", "keras"), ("keras", "hf2")):
        command = ["convert", str(tmp_path / source), str(tmp_path / target)]
        assert cli.main([*command, "--dtype", "bfloat16"]) == 0
    same_bytes(load_file(tmp_path / "hf2" / "model.safetensors"), start)
    command = ["convert", str(tmp_path / "keras"), str(tmp_path / "hf3")]
    assert cli.main(command) == 0
    wide = load_file(tmp_path / "hf3" / "model.safetensors")
    same_bytes(wide, {name: array.astype("float32") for name, array in start.items()})


def test_command_takes_epsilon_and_image_size(tmp_path):
    write_huggingface(tmp_path / "hf")
    convert.write_weights(Golden("fb_vit_mlp").part("weights/"), tmp_path / "a.safetensors")
    more = ["--layer-norm-eps", "1e-6", "--image-size", "40", "24"]
    for source, heads in (("a.safetensors", ["--num-heads", "2"]), ("hf", ["--to", "huggingface"])):
        target = tmp_path / f"{source} new"
        command = ["convert", str(tmp_path / source), str(target), "--to", "huggingface"]
        assert cli.main([*command, *heads, *more]) == 0
        config = json.loads((target / "config.json").read_text())
        assert config["layer_norm_eps"] == 1e-6 and config["image_size"] == [40, 24]


def test_image_size_in_place_of_image_shape():
    weights = convert.backbone_to_meta(tiny.backbone())
    first = convert.backbone_from_meta(
        weights, 2, image_size=(24, 40), data_format="channels_first"
    )
    assert first.image_shape == (3, 24, 40)
    for wrong in ((24, 41), 24, (24, 40, 3), (0, 8)):
        with pytest.raises(ValueError, match="`image_size` must be two integers.*patch size 8"):
            convert.backbone_from_meta(weights, 2, image_size=wrong)
    with pytest.raises(ValueError, match="in one way only"):
        convert.backbone_from_meta(weights, 2, image_size=(8, 8), image_shape=(8, 8, 3))


def test_command_takes_a_part(tmp_path):
    golden = Golden("fb_step")
    sides = {f"student.{name}": a for name, a in golden.part("student/").items()}
    sides.update({f"teacher.{name}": a for name, a in golden.part("teacher/").items()})
    convert.write_weights(sides, tmp_path / "a.safetensors")
    for part, more in (("teacher", []), ("student", ["--part", "student"])):
        target = tmp_path / f"{part}.safetensors"
        command = ["convert", str(tmp_path / "a.safetensors"), str(target), "--num-heads", "2"]
        assert cli.main([*command, *more]) == 0
        same_bytes(load_file(target), golden.part(f"{part}/backbone."))


def test_command_as_a_process(tmp_path):
    """Once whole, from the shell; and an error is one line with exit code 2."""
    write_huggingface(tmp_path / "hf")
    command = [sys.executable, "-W", "ignore", "-m", "keras_dinov3.cli", "convert"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run(
        [*command, "hf", "weights.safetensors"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert "weights.safetensors (meta)" in result.stdout
    backbone = convert.backbone_from_huggingface(tmp_path / "hf")
    same_bytes(load_file(tmp_path / "weights.safetensors"), convert.backbone_to_meta(backbone))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["none.pth", "new"], "no file or folder none.pth"),
        (["a.pth", "there"], "there exists"),
        (["a.pth", "new"], "--num-heads"),
        (["a.pth", "new", "--num-heads", "3"], "num_heads=3"),
        (["a.pth", "new", "--num-heads", "2", "--to", "meta"], "must end in"),
        (["a.pth", "new.bin", "--num-heads", "2"], "kind keras is a folder, and new.bin has the"),
        (["a.pth", "new.safetensors", "--num-heads", "2", "--to", "keras"], "is a folder, and"),
        (["there", "new", "--from", "keras", "--image-size", "8", "8"], "preset tells them itself"),
        (["there", "new"], "neither"),
        (["text.txt", "new"], "neither"),
        (["there", "new", "--from", "keras"], "no readable Keras Hub preset"),
        (["there", "new", "--from", "huggingface"], "config.json"),
        (["there", "new", "--from", "meta", "--num-heads", "2"], ".safetensors, .pth"),
        (["bad.pth", "new", "--num-heads", "2"], "cannot be read"),
        (["odd.pth", "new", "--num-heads", "2"], "Missing: norm.bias."),
    ],
)
def test_command_errors(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    weights = Golden("fb_vit_mlp").part("weights/")
    convert.write_weights(weights, "a.pth")
    del weights["norm.bias"]
    convert.write_weights(weights, "odd.pth")
    pathlib.Path("there").mkdir()
    pathlib.Path("text.txt").write_text("text")
    pathlib.Path("bad.pth").write_bytes(b"no weights")
    assert cli.main(["convert", *arguments]) == 2
    output = capsys.readouterr()
    assert output.out == "" and not pathlib.Path("new").exists()
    assert message in output.err and output.err.startswith("keras-dinov3 convert: ")


def test_the_command_is_installed_under_its_name():
    text = (pathlib.Path(__file__).parents[1] / "pyproject.toml").read_text()
    scripts = tomllib.loads(text)["project"]["scripts"]
    assert scripts == {"keras-dinov3": f"{cli.main.__module__}:{cli.main.__name__}"}


def test_command_says_how_it_is_used(capsys):
    for arguments in ([], ["convert"], ["convert", "a", "b", "--from", "onnx"], ["evaluate"]):
        with pytest.raises(SystemExit) as stop:
            cli.main(arguments)
        assert stop.value.code == 2 and "usage: keras-dinov3" in capsys.readouterr().err
