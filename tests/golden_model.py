"""The reference's whole training steps: models with their weights, and the crops they saw."""

import keras_hub
import meta
import numpy as np
from golden import Golden

import keras_dinov3 as kd
from keras_dinov3.families import swiglu_width


def golden_model(name, **changes):
    """A step of the reference as a case holds it: the case, a model with its weights, its crops.

    `changes` are arguments of `DINOv3`. Crops are ordered by image, as this package has them.
    """
    golden = Golden(name)
    h = {**golden.hyperparameters, **golden.hyperparameters.get("student", {})}
    is_gated, width = h.get("ffn") == "swiglu", h["embed_dim"]
    model = kd.DINOv3(
        keras_hub.models.DINOV3Backbone(
            patch_size=h["patch"],
            num_layers=h["depth"],
            hidden_dim=width,
            num_heads=h["num_heads"],
            intermediate_dim=swiglu_width(width, 3) if is_gated else 4 * width,
            use_gated_mlp=is_gated,
            hidden_activation="silu" if is_gated else "gelu",
            use_key_bias=not h.get("maskk", False),
            num_register_tokens=h["storage"],
            image_shape=(h["gs"], h["gs"], 3),
            layer_norm_eps=1e-5 if h.get("norm") == "layernormbf16" else 1e-6,
        ),
        num_prototypes=h["K"],
        num_patch_prototypes=h["Kp"],
        head_hidden_dim=h["hid"],
        head_bottleneck_dim=h["bot"],
        head_num_layers=h.get("n_head_layers", 3),
        student_temperature=h["student_temp"],
        teacher_temperature=h.get("teacher_temp", h.get("temp")),
        dino_weight=h["dino_loss_weight"],
        local_weight=h.get("local_loss_weight", 1.0),
        ignore_diagonal=h["global_ignore_diagonal"],
        ibot_weight=h["ibot_loss_weight"],
        koleo_weight=h.get("koleo_loss_weight", h.get("kw")),
        extras=kd.EncoderExtras(untie_local_cls_norm=h.get("untiegl", False)),
        augmentation=None,
        masking=None,
        **changes,
    )
    kind = "distill_teacher" if "teacher" in changes else "teacher"
    for side, prefix in (("student", "student/"), ("teacher", f"{kind}/")):
        meta.load(meta.model_weights(model, side), golden.arrays, prefix)

    crops = {
        name: image_major(golden[f"in/{name}"].transpose(0, 2, 3, 1), count)
        for name, count in (("global_crops", 2), ("local_crops", h["nl"]))
    }
    crops["masks"] = image_major(golden["in/masks"], 2)
    return golden, model, crops


def image_major(x, num_crops):
    """`(crops, images, ...)` in one axis, as the reference has it, to `(images, crops, ...)`."""
    return np.moveaxis(x.reshape(num_crops, -1, *x.shape[1:]), 0, 1)
