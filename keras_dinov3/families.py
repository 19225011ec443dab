"""Where each Keras Hub family of vision transformers keeps its weights."""

import itertools
from typing import Any, NamedTuple

import keras_hub
import numpy as np
from keras import ops

from keras_dinov3.augment import as_pair

FAMILIES = (
    keras_hub.models.DINOV3Backbone,
    keras_hub.models.DINOV2Backbone,
    keras_hub.models.ViTBackbone,
)


class Parts(NamedTuple):
    """A backbone's weights and settings by role, whatever its family calls them."""

    patch_size: int
    projection: Any  # the patch convolution, a Keras layer
    cls_token: Any  # (1, 1, D)
    register_tokens: Any  # (1, R, D), or None
    mask_token: Any  # of D values, or None
    positions: (
        Any  # learned position embeddings (1, 1 + N, D), the first the class token's; or None
    )
    grid_size: tuple  # (h, w) of these
    rope_theta: float  # None: no rotary positions
    activation: Any  # of the MLP
    blocks: list  # Keras layers
    block_weights: Any  # function (layer, dtype) to a dict, see `block.block`
    projections: Any  # function (layer) to a dict of its dense layers by role
    norm: Any  # the final norm, a Keras layer, whose epsilon is that of the blocks' norms too


def parts_of(backbone):
    """The `Parts` of a backbone of a supported family.

    Raises:
        TypeError: If the family is not supported.
        ValueError: If the backbone is of a kind that cannot be trained here.
    """
    check_backbone(backbone)
    if isinstance(backbone, keras_hub.models.ViTBackbone):
        return vit_parts(backbone)
    embeddings = backbone.embeddings
    parts = {
        "patch_size": backbone.patch_size,
        "projection": projection_of(backbone),
        "cls_token": embeddings.cls_token,
        "register_tokens": embeddings.register_tokens if backbone.num_register_tokens else None,
        "mask_token": embeddings.mask_token if backbone.use_mask_token else None,
        "blocks": backbone.encoder.layers,
        "norm": backbone.layernorm,
    }
    if isinstance(backbone, keras_hub.models.DINOV3Backbone):
        return Parts(
            **parts,
            positions=None,
            grid_size=None,
            rope_theta=backbone.rope_theta,
            activation=backbone.hidden_activation,
            block_weights=dinov3_block,
            projections=dinov3_projections,
        )
    height, width = embeddings.image_shape
    return Parts(
        **parts,
        positions=embeddings.interpolated_position_embeddings,
        grid_size=(height // backbone.patch_size, width // backbone.patch_size),
        rope_theta=None,
        activation="silu" if backbone.use_swiglu_ffn else "gelu",
        block_weights=dinov2_block,
        projections=dinov2_projections,
    )


def vit_parts(backbone):
    embedding = backbone.get_layer("vit_patching_and_embedding")
    encoder = backbone.get_layer("vit_encoder")
    patch_size = patch_size_of(backbone)
    height, width = embedding.image_size
    return Parts(
        patch_size=patch_size,
        projection=projection_of(backbone),
        cls_token=embedding.class_token,
        register_tokens=None,
        mask_token=None,
        positions=ops.expand_dims(embedding.position_embedding.embeddings, 0),
        grid_size=(height // patch_size, width // patch_size),
        rope_theta=None,
        activation="gelu",
        blocks=encoder.encoder_layers,
        block_weights=vit_block,
        projections=vit_projections,
        norm=encoder.layer_norm,
    )


def dinov3_block(layer, dtype):
    """The weights of a Hub `DINOV3Layer` by role, matrices and scales cast to `dtype`."""
    projections = dinov3_projections(layer)
    return {
        "norm1": norm_weights(layer.norm1),
        "layer_scale1": ops.cast(layer.layer_scale1.lambda1, dtype),
        "norm2": norm_weights(layer.norm2),
        "layer_scale2": ops.cast(layer.layer_scale2.lambda1, dtype),
        **{role: dense_weights(dense, dtype) for role, dense in projections.items()},
    }


def dinov3_projections(layer):
    """The layers of a Hub `DINOV3Layer` that are matrix products, by role."""
    mlp = layer.mlp
    gate = {"gate": mlp.gate_proj} if layer.use_gated_mlp else {}
    return {**attention_layers(layer.attention), **gate, "up": mlp.up_proj, "down": mlp.down_proj}


def dinov2_block(layer, dtype):
    """The same of a Hub `DINOV2Layer`."""
    weights = {
        "norm1": norm_weights(layer.norm1),
        **attention_weights(layer.attention.attention, dtype),
        "layer_scale1": ops.cast(layer.layer_scale1.lambda1, dtype),
        "norm2": norm_weights(layer.norm2),
        "layer_scale2": ops.cast(layer.layer_scale2.lambda1, dtype),
    }
    if layer.use_swiglu_ffn:  # gate and up in one matrix
        kernel, bias = dense_weights(layer.mlp.weights_in, dtype)
        kernels, biases = ops.split(kernel, 2, axis=1), ops.split(bias, 2)
        weights["gate"], weights["up"] = zip(kernels, biases, strict=True)
        weights["down"] = dense_weights(layer.mlp.weights_out, dtype)
    else:
        weights["up"] = dense_weights(layer.mlp.fc1, dtype)
        weights["down"] = dense_weights(layer.mlp.fc2, dtype)
    return weights


def dinov2_projections(layer):
    """The same of a Hub `DINOV2Layer`; gate and up of a gated MLP are halves of one."""
    layers, mlp = attention_layers(layer.attention.attention), layer.mlp
    if layer.use_swiglu_ffn:
        both = mlp.weights_in
        return {**layers, "gate": both, "up": both, "down": mlp.weights_out}
    return {**layers, "up": mlp.fc1, "down": mlp.fc2}


def vit_block(layer, dtype):
    """The same of a Hub `ViTEncoderBlock`, which has no layer scale."""
    return {
        "norm1": norm_weights(layer.layer_norm_1),
        **attention_weights(layer.mha, dtype),
        "layer_scale1": None,
        "norm2": norm_weights(layer.layer_norm_2),
        "up": dense_weights(layer.mlp.dense_1, dtype),
        "down": dense_weights(layer.mlp.dense_2, dtype),
        "layer_scale2": None,
    }


def vit_projections(layer):
    """The same of a Hub `ViTEncoderBlock`."""
    return {**attention_layers(layer.mha), "up": layer.mlp.dense_1, "down": layer.mlp.dense_2}


def attention_layers(layer):
    return {name: getattr(layer, f"{name}_dense") for name in ("query", "key", "value", "output")}


def attention_weights(layer, dtype):
    """Of a `keras.layers.MultiHeadAttention`, whose kernels keep the heads on an axis."""
    weights = {}
    for name, dense in attention_layers(layer).items():
        kernel, bias = ops.cast(dense.kernel, dtype), dense.bias
        width = kernel.shape[-1] if name == "output" else kernel.shape[0]
        shape = (-1, width) if name == "output" else (width, -1)
        bias = None if bias is None else ops.reshape(ops.cast(bias, dtype), (-1,))
        weights[name] = ops.reshape(kernel, shape), bias
    return weights


def norm_weights(layer):
    """Gain and offset of a norm, the variables themselves."""
    return layer.gamma, layer.beta


def dense_weights(layer, dtype):
    bias = ops.cast(layer.bias, dtype) if layer.use_bias else None
    return ops.cast(layer.kernel, dtype), bias


def add_to_kernels(projections, changes):
    """Adds matrices to the kernels of a block.

    Args:
        projections: Dict of Keras layers by role, as the function of `Parts` returns it.
        changes: Dict of tensors `(in, out)` by role.
    """
    for role, change in changes.items():
        kernel, change = projections[role].kernel, ops.convert_to_numpy(change)
        matrix = np.array(ops.convert_to_numpy(kernel)).reshape(len(change), -1)
        shares = role == "up" and projections[role] is projections.get("gate")
        matrix[:, change.shape[1] if shares else 0 :][:, : change.shape[1]] += change
        kernel.assign(matrix.reshape(kernel.shape))


def check_backbone(backbone):
    """Raises if a backbone is of no supported family, or cannot be trained here."""
    if not isinstance(backbone, FAMILIES):
        names = ", ".join(f"`{family.__name__}`" for family in FAMILIES)
        raise TypeError(
            f"`backbone` must be one of Keras Hub's {names}. "
            f"Received: {backbone!r} of type {type(backbone).__name__}."
        )
    name = type(backbone).__name__
    is_dinov3 = isinstance(backbone, keras_hub.models.DINOV3Backbone)
    if is_dinov3 and backbone.hidden_dim % (4 * backbone.num_heads):
        raise ValueError(
            "`hidden_dim` must be a multiple of 4 * `num_heads`: rotary embeddings turn pairs of "
            f"features along two axes. Received: hidden_dim={backbone.hidden_dim}, "
            f"num_heads={backbone.num_heads}."
        )
    if not getattr(backbone, "use_class_token", True):
        raise ValueError(
            f"The backbone must have a class token. Received: a {name} with "
            "use_class_token=False. Build it with `use_class_token=True`."
        )
    if len(set(as_pair(backbone.patch_size))) > 1:
        raise ValueError(
            f"Patches must be square. Received: a {name} with patch_size={backbone.patch_size}."
        )
    sizes = (
        tuple(getattr(backbone, key, ())[:2]) for key in ("image_shape", "position_embedding_shape")
    )
    if isinstance(backbone, keras_hub.models.DINOV2Backbone) and len(set(sizes)) > 1:
        raise ValueError(
            "A `DINOV2Backbone` must be built for the image size of its position embeddings, or "
            "it could not save them as they are. Received: image_shape="
            f"{backbone.image_shape}, position_embedding_shape="
            f"{backbone.position_embedding_shape}. Crops may still have any size; positions are "
            "resized to each."
        )
    if projection_of(backbone).data_format != "channels_last":
        raise ValueError(
            f'Images are channels last. Received: a {name} with data_format="channels_first". '
            'Build it with `data_format="channels_last"`.'
        )


def projection_of(backbone):
    """The patch convolution."""
    if isinstance(backbone, keras_hub.models.ViTBackbone):
        return backbone.get_layer("vit_patching_and_embedding").patch_embedding
    return backbone.embeddings.patch_embeddings.projection


def weight_places(backbone):
    """The weights of a backbone by place, for rules that differ from place to place.

    Returns:
        Dict of lists of variables: `"tokens"` (class, register and mask, and learned positions),
        `"patch_embed"`, `"norm"` (the final one), and `"blocks"`, which has a list for each block.
    """
    parts = parts_of(backbone)
    places = {
        "patch_embed": parts.projection.weights,
        "blocks": [layer.weights for layer in parts.blocks],
        "norm": parts.norm.weights,
    }
    named = [*places["patch_embed"], *places["norm"], *itertools.chain(*places["blocks"])]
    named = {id(weight) for weight in named}
    places["tokens"] = [weight for weight in backbone.weights if id(weight) not in named]
    return places


def freeze_mask_token(backbone, extras):
    """Leaves the mask token as it is, wherever it lies."""
    for token in (parts_of(backbone).mask_token, extras.mask_token):
        if token is not None:
            token.trainable = False


def settle_positions(backbone):
    """Puts trained position embeddings where a `DINOV2Backbone` saves them.

    It has them twice, as they were loaded and as they are trained, and when it is saved, takes
    over the trained ones only if their sum has become smaller (Keras Hub 0.32).
    """
    if isinstance(backbone, keras_hub.models.DINOV2Backbone):
        embeddings = backbone.embeddings
        trained = embeddings.interpolated_position_embeddings
        # A copy: JAX gives a step's buffers away, and cannot do so twice with one.
        embeddings.position_embeddings.assign(ops.copy(trained))


def copy_of(backbone):
    """A trainable backbone of its own with the same weights."""
    copy = type(backbone).from_config({**backbone.get_config(), "trainable": True})
    copy.set_weights(backbone.get_weights())
    settle_positions(copy)
    return copy


def patch_size_of(backbone):
    """The side of a patch in pixels."""
    return as_pair(backbone.patch_size)[0]


def channels_of(backbone):
    """The channels of the images that a backbone takes."""
    return projection_of(backbone).kernel.shape[-2]


def swiglu_width(hidden_dim, ratio, multiple=8):
    """The `intermediate_dim` of the reference's gated MLPs.

    Args:
        hidden_dim: Int, `D`.
        ratio: Float, what a plain MLP's width would be, over `D`.
        multiple: Int, what the width is rounded up to a multiple of.

    Returns:
        Int, two thirds of `int(D * ratio)`, rounded up.
    """
    return -(-int(int(hidden_dim * ratio) * 2 / 3) // multiple) * multiple
