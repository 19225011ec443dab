"""Backbones from presets and runs: mask tokens, sizes, normalisation."""

import json

import keras_hub
import numpy as np
import pytest
import tiny
from golden import numpy

import keras_dinov3 as kd
from keras_dinov3.presets import normalization_of, preset_of, read_preset


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run, with a backbone that has no mask token, and the backbone."""
    folder = tmp_path_factory.mktemp("run")
    backbone = tiny.backbone(use_mask_token=False)
    backbone.save_to_preset(str(folder / "backbone"))
    augmentation = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "num_local_crops": 2}
    settings = {"recipe": {"settings": {"augmentation": augmentation}}}
    (folder / "settings.json").write_text(json.dumps(settings))
    return folder, backbone


def test_a_run_and_its_preset_are_one(run):
    folder, _ = run
    assert preset_of(folder) == preset_of(folder / "backbone") == str(folder / "backbone")
    assert preset_of("dinov3_vit_small_lvd1689m") == "dinov3_vit_small_lvd1689m"
    assert normalization_of(folder) == {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    assert normalization_of(folder / "backbone") == {"mean": None, "std": None}


def test_the_weights_are_read_and_a_mask_token_is_new(run):
    folder, backbone = run
    found = read_preset(folder, (64, 48, 3))
    assert found.use_mask_token and tuple(found.image_shape) == (64, 48, 3)
    places = [weight for weight in found.weights if weight.name != "mask_token"]
    assert len(places) == len(found.weights) - 1 == len(backbone.weights)
    for place, weight in zip(places, backbone.weights, strict=True):
        np.testing.assert_array_equal(numpy(place), numpy(weight))
    images = np.random.default_rng(0).random((2, *tiny.GLOBAL, 3)).astype("float32")
    outputs = [kd.encode(x, images).cls for x in (found, backbone)]
    np.testing.assert_allclose(*map(numpy, outputs), rtol=0, atol=1e-6)


def test_a_mask_token_that_is_there_stays(tmp_path):
    backbone = tiny.backbone()
    token = np.random.default_rng(1).normal(size=backbone.embeddings.mask_token.shape)
    backbone.embeddings.mask_token.assign(token)
    backbone.save_to_preset(str(tmp_path / "preset"))
    found = read_preset(tmp_path / "preset")
    np.testing.assert_array_equal(
        numpy(found.embeddings.mask_token), numpy(backbone.embeddings.mask_token)
    )
    assert tuple(found.image_shape) == (*tiny.GLOBAL, 3)


def test_a_vit_keeps_its_image_shape(tmp_path):
    settings = {"num_layers": 1, "num_heads": 2, "hidden_dim": 32, "mlp_dim": 48, "patch_size": 8}
    vit = keras_hub.models.ViTBackbone(image_shape=(32, 32, 3), **settings)
    vit.save_to_preset(str(tmp_path / "vit"))
    found = read_preset(tmp_path / "vit", (64, 64, 3), dtype="mixed_bfloat16")
    assert tuple(found.image_shape) == (32, 32, 3)
    assert found.dtype_policy.name == "mixed_bfloat16"


def test_a_model_goes_on_from_a_run(run):
    folder, backbone = run
    settings = {"num_prototypes": 8, "head_hidden_dim": 16, "head_bottleneck_dim": 8, "seed": 1}
    model = kd.DINOv3.from_preset(folder, augmentation=tiny.multi_crop(), **settings)
    assert model.num_prototypes == 8 and type(model) is kd.DINOv3
    for side in (model.student, model.teacher):
        np.testing.assert_array_equal(
            numpy(side.embeddings.cls_token), numpy(backbone.embeddings.cls_token)
        )


def test_errors_teach(tmp_path):
    with pytest.raises(ValueError, match=r"folder of a run that has ended. Received: .*config"):
        read_preset(tmp_path)
    with pytest.raises(ValueError, match="no_such_preset"):
        read_preset("no_such_preset")
    keras_hub.models.ResNetBackbone(
        input_conv_filters=[64],
        input_conv_kernel_sizes=[3],
        stackwise_num_filters=[64],
        stackwise_num_blocks=[1],
        stackwise_num_strides=[1],
        block_type="basic_block",
        image_shape=(16, 16, 3),
    ).save_to_preset(str(tmp_path / "resnet"))
    with pytest.raises(TypeError, match="ResNetBackbone"):
        read_preset(tmp_path / "resnet")
