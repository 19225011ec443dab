"""`EncoderExtras`: which mask token is used, and what an export takes over."""

import keras_hub
import numpy as np
import pytest
import tiny
from golden import numpy

import keras_dinov3 as kd

SIZES = {"patch_size": 8, "num_layers": 2, "hidden_dim": 32, "num_heads": 2}
SHAPE = (*tiny.GLOBAL, 3)


def dinov2(**arguments):
    sizes = {**SIZES, "intermediate_dim": 48, "image_shape": (24, 24, 3), **arguments}
    sizes["position_embedding_shape"] = sizes["image_shape"][:2]
    return keras_hub.models.DINOV2Backbone(**sizes)


def vit():
    return keras_hub.models.ViTBackbone(image_shape=SHAPE, mlp_dim=48, **SIZES)


def token_of(backbone):
    return backbone.embeddings.mask_token


@pytest.mark.parametrize("make", [tiny.backbone, dinov2])
def test_adapters_have_a_copy_of_the_mask_token(make):
    backbone = make()
    drawn = np.random.default_rng(0).normal(size=token_of(backbone).shape).astype("float32")
    token_of(backbone).assign(drawn)
    plain = kd.EncoderExtras().build_for(make())
    assert plain.mask_token is None and not plain.weights
    extras = kd.EncoderExtras(lora=kd.LoRA(2)).build_for(backbone)
    assert extras.mask_token.shape == (1, 1, 32) and extras.mask_token.trainable
    np.testing.assert_array_equal(numpy(extras.mask_token).ravel(), drawn.ravel())

    extras.mask_token.assign(2 * numpy(extras.mask_token))
    np.testing.assert_array_equal(numpy(token_of(backbone)), drawn)
    exported = extras.merged(backbone)
    np.testing.assert_array_equal(numpy(token_of(exported)), 2 * drawn)
    np.testing.assert_array_equal(numpy(token_of(kd.EncoderExtras().merged(backbone))), drawn)


def test_the_copy_is_what_hides_a_patch():
    backbone = tiny.backbone()
    extras = kd.EncoderExtras(lora=kd.LoRA(2)).build_for(backbone)
    images = tiny.crops()["global_crops"][:, 0]
    masks = np.zeros((len(images), tiny.N), bool)
    masks[:, ::3] = True

    def features():
        return numpy(kd.encode(backbone, images, masks=masks, extras=extras).patches)

    before = features()
    token_of(backbone).assign(np.arange(32.0).reshape(token_of(backbone).shape))
    np.testing.assert_array_equal(features(), before)
    extras.mask_token.assign(np.arange(32.0).reshape(1, 1, 32))
    assert np.abs(features() - before).max() > 1e-3


def test_backbones_that_have_none():
    extras = kd.EncoderExtras(lora=kd.LoRA(2)).build_for(vit())  # its class cannot have one
    np.testing.assert_array_equal(numpy(extras.mask_token), np.zeros((1, 1, 32)))
    assert isinstance(extras.merged(vit()), keras_hub.models.ViTBackbone)
    without = dinov2(use_mask_token=False)  # its class can, and nothing is hidden from this one
    extras = kd.EncoderExtras(lora=kd.LoRA(2)).build_for(without)
    assert extras.mask_token is None
    assert not extras.merged(without).use_mask_token
