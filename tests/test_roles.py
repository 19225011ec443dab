"""`set_roles`: every weight of a student is given its place."""

import keras
import keras_hub
import pytest
import tiny

import keras_dinov3 as kd
from keras_dinov3.roles import Role, role_of

SIZES = {"patch_size": 8, "num_layers": 2, "hidden_dim": 32, "num_heads": 2}
SHAPE = (*tiny.GLOBAL, 3)


def dinov2():
    shapes = {"image_shape": (24, 24, 3), "position_embedding_shape": (24, 24)}
    return keras_hub.models.DINOV2Backbone(intermediate_dim=48, **SIZES, **shapes)


def vit():
    return keras_hub.models.ViTBackbone(image_shape=SHAPE, mlp_dim=48, **SIZES)


def roles_of(weights):
    return [role_of(weight) for weight in weights]


@pytest.mark.parametrize("make", [tiny.backbone, dinov2, vit])
def test_every_weight_of_a_student_has_its_part_and_depth(make):
    model = tiny.model(backbone=make(), extras=kd.EncoderExtras(untie_cls_norm=True))
    backbone, extras = model.student, model.student_extras
    roles = roles_of(backbone.trainable_weights + extras.weights)
    assert {role.part for role in roles} == {"backbone"}
    # The tokens and the patch embedding, two blocks, the last norms.
    assert {role.depth for role in roles} == {3, 2, 1, 0}
    assert {role.depth for role in roles if role.kind == "patch_embed"} == {3}
    assert sum(role.kind == "patch_embed" for role in roles) == 2  # kernel and bias
    assert roles_of(extras.cls_norm.weights) == [Role("backbone", 0, decays=False)] * 2
    per_block = [sum(role.depth == depth for role in roles) for depth in (2, 1)]
    assert per_block[0] == per_block[1] > 8


def test_of_a_head_the_prototypes_alone_are_the_last_layer():
    model = tiny.model()
    for part, head in (
        ("dino_head", model.student_dino_head),
        ("ibot_head", model.student_ibot_head),
    ):
        for weight in head.weights:
            kind = "last_layer" if weight is head.prototypes.kernel else "head"
            assert role_of(weight) == Role(part, 0, kind, len(weight.shape) > 1)
        assert [role.kind for role in roles_of(head.weights)].count("last_layer") == 1


def test_what_decays_are_matrices_and_tokens():
    model = tiny.model(backbone=vit(), extras=kd.EncoderExtras(num_register_tokens=2))
    decays = {w.path: role_of(w).decays for w in model.trainable_variables}
    assert all(
        not does for path, does in decays.items() if path.endswith(("bias", "beta", "gamma"))
    )
    assert all(
        does for path, does in decays.items() if path.endswith(("kernel", "token", "tokens"))
    )
    assert any(path.endswith("bias") for path in decays)  # also those with an axis of heads
    assert {len(w.shape) for w in model.trainable_variables if w.path.endswith("bias")} == {1, 2}


def test_weights_of_other_models_have_the_default():
    assert role_of(keras.Variable([1.0])) == Role("", 0, "plain", True)
