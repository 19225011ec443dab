"""Weights of Keras layers under the names and in the layouts of the reference's checkpoints."""

import numpy as np
from golden import variable_gradients


class Weight:
    """A reference weight: the Keras variables that hold it, and the way there and back."""

    def __init__(self, variables, unpack, pack):
        self.variables, self.unpack, self.pack = variables, unpack, pack

    def load(self, array):
        for variable, value in zip(self.variables, self.unpack(array), strict=True):
            variable.assign(value.reshape(variable.shape))


def vector(variable, shape=None):
    return Weight([variable], lambda a: [a], lambda g: g[0].reshape(shape or g[0].shape))


def linear(variable):
    return Weight([variable], lambda a: [a.T], lambda g: g[0].T)


def convolution(variable):
    return Weight(
        [variable],
        lambda a: [a.transpose(2, 3, 1, 0)],
        lambda g: g[0].transpose(3, 2, 0, 1),
    )


def backbone_weights(backbone, extras=None):
    """`Weight`s of a `DINOV3Backbone` and its extras by the reference's names."""
    embeddings, width = backbone.embeddings, backbone.hidden_dim
    is_rms = extras is not None and extras.norm == "rms"
    projection = embeddings.patch_embeddings.projection
    weights = {
        "cls_token": vector(embeddings.cls_token),
        "mask_token": vector(embeddings.mask_token, (1, width)),
        "patch_embed.proj.weight": convolution(projection.kernel),
        "patch_embed.proj.bias": vector(projection.bias),
    }
    if backbone.num_register_tokens:
        weights["storage_tokens"] = vector(embeddings.register_tokens)
    for index, layer in enumerate(backbone.encoder.layers):
        for name, weight in block_weights(layer, width, is_rms).items():
            if extras is None or extras.layer_scale or not name.startswith("ls"):
                weights[f"blocks.{index}.{name}"] = weight
    norms = {"norm": backbone.layernorm}
    if extras is not None:
        norms |= {"cls_norm": extras.cls_norm, "local_cls_norm": extras.local_cls_norm}
    for name, norm in norms.items():
        if norm is not None:
            weights |= norm_weights(name, norm, is_rms)
    return weights


def block_weights(layer, width, is_rms=False):
    attention = layer.attention
    query, key, value = attention.query_dense, attention.key_dense, attention.value_dense
    weights = {
        "attn.qkv.weight": Weight(
            [query.kernel, key.kernel, value.kernel],
            lambda a: [part.T for part in np.split(a, 3)],
            lambda g: np.concatenate([part.T for part in g]),
        ),
        "attn.proj.weight": linear(attention.output_dense.kernel),
        "ls1.gamma": vector(layer.layer_scale1.lambda1),
        "ls2.gamma": vector(layer.layer_scale2.lambda1),
        **norm_weights("norm1", layer.norm1, is_rms),
        **norm_weights("norm2", layer.norm2, is_rms),
    }
    if key.use_bias:
        biases = [query.bias, key.bias, value.bias]
        weights["attn.qkv.bias"] = Weight(biases, lambda a: np.split(a, 3), np.concatenate)
    elif query.use_bias:  # masked key bias
        weights["attn.qkv.bias"] = Weight(
            [query.bias, value.bias],
            lambda a: [a[:width], a[2 * width :]],
            lambda g: np.concatenate([g[0], np.zeros(width, "float32"), g[1]]),
        )
    dense = {"attn.proj": attention.output_dense, "mlp.fc1": layer.mlp.up_proj}
    dense["mlp.fc2"] = layer.mlp.down_proj
    if layer.use_gated_mlp:
        del dense["mlp.fc1"], dense["mlp.fc2"]
        dense |= {"mlp.w1": layer.mlp.gate_proj, "mlp.w2": layer.mlp.up_proj}
        dense["mlp.w3"] = layer.mlp.down_proj
    for name, part in dense.items():
        weights[f"{name}.weight"] = linear(part.kernel)
        if part.use_bias:
            weights[f"{name}.bias"] = vector(part.bias)
    return weights


def norm_weights(name, norm, is_rms=False):
    weights = {f"{name}.weight": vector(norm.gamma)}
    return weights if is_rms else {**weights, f"{name}.bias": vector(norm.beta)}


def head_weights(head):
    layers = [*head.hidden_layers, head.bottleneck]
    weights = {}
    for index, layer in enumerate(layers):
        weights[f"mlp.{2 * index}.weight"] = linear(layer.kernel)
        weights[f"mlp.{2 * index}.bias"] = vector(layer.bias)
    weights["last_layer.weight"] = linear(head.prototypes.kernel)
    return weights


def model_weights(model, side="student"):
    """`Weight`s of one side of a `DINOv3` by the reference's names."""
    parts = {
        "backbone": backbone_weights(getattr(model, side), getattr(model, f"{side}_extras")),
        "dino_head": head_weights(getattr(model, f"{side}_dino_head")),
        "ibot_head": head_weights(getattr(model, f"{side}_ibot_head")),
    }
    return {f"{part}.{name}": w for part, names in parts.items() for name, w in names.items()}


def load(weights, arrays, prefix=""):
    """Puts all reference arrays under `prefix` into `weights`; each must be there."""
    arrays = {name: array for name, array in part(arrays, prefix).items() if not is_buffer(name)}
    assert arrays.keys() == weights.keys(), arrays.keys() ^ weights.keys()
    for name, array in arrays.items():
        weights[name].load(array)


def is_buffer(name):
    return name.endswith(("rope_embed.periods", "bias_mask"))


def part(arrays, prefix):
    """The entries of `arrays` under `prefix`, without it."""
    return {name.removeprefix(prefix): a for name, a in arrays.items() if name.startswith(prefix)}


def gradients_of(function, weights, names):
    """`function() -> scalar`: its value, and gradients in the reference's layouts by name.

    They are zeros where the value does not depend on a weight, as in the reference.
    """
    variables = [variable for name in names for variable in weights[name].variables]
    value, flat = variable_gradients(function, variables)
    flat, gradients = iter(flat), {}
    for name in names:
        parts = [
            np.zeros(variable.shape, "float32") if gradient is None else gradient
            for variable, gradient in zip(weights[name].variables, flat, strict=False)
        ]
        gradients[name] = weights[name].pack(parts)
    return value, gradients


def vit_weights(backbone, extras):
    """`Weight`s of a `ViTBackbone` with registers by the names of timm's."""
    embedding = backbone.get_layer("vit_patching_and_embedding")
    encoder, width = backbone.get_layer("vit_encoder"), backbone.hidden_dim
    patches = embedding.patch_embedding
    weights = {
        "cls_token": vector(embedding.class_token),
        "pos_embed": vector(embedding.position_embedding.embeddings, (1, -1, width)),
        "register_tokens": vector(extras.register_tokens),
        "patch_embed.proj.weight": convolution(patches.kernel),
        "patch_embed.proj.bias": vector(patches.bias),
        **norm_weights("norm", encoder.layer_norm),
    }
    for index, layer in enumerate(encoder.encoder_layers):
        dense = [getattr(layer.mha, f"{name}_dense") for name in ("query", "key", "value")]
        output = layer.mha.output_dense
        block = {
            "attn.qkv.weight": Weight(
                [part.kernel for part in dense],
                lambda a: [part.T for part in np.split(a, 3)],
                lambda g: np.concatenate([part.reshape(width, width).T for part in g]),
            ),
            "attn.qkv.bias": Weight(
                [part.bias for part in dense],
                lambda a: np.split(a, 3),
                lambda g: np.concatenate([part.ravel() for part in g]),
            ),
            "attn.proj.weight": Weight(
                [output.kernel], lambda a: [a.T], lambda g: g[0].reshape(width, width).T
            ),
            "attn.proj.bias": vector(output.bias),
            **norm_weights("norm1", layer.layer_norm_1),
            **norm_weights("norm2", layer.layer_norm_2),
        }
        for name, part in (("mlp.fc1", layer.mlp.dense_1), ("mlp.fc2", layer.mlp.dense_2)):
            block |= {f"{name}.weight": linear(part.kernel), f"{name}.bias": vector(part.bias)}
        weights |= {f"blocks.{index}.{name}": weight for name, weight in block.items()}
    return weights
