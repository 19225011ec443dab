"""Puts weights named as in the reference's checkpoints into Keras layers (goldens only)."""

import numpy as np


def load_backbone(backbone, weights):
    """`weights`: dict of reference names to arrays, without a prefix."""
    embeddings = backbone.embeddings
    embeddings.cls_token.assign(weights["cls_token"])
    embeddings.mask_token.assign(weights["mask_token"][None])
    embeddings.register_tokens.assign(weights["storage_tokens"])
    projection = embeddings.patch_embeddings.projection
    projection.kernel.assign(weights["patch_embed.proj.weight"].transpose(2, 3, 1, 0))
    projection.bias.assign(weights["patch_embed.proj.bias"])
    for index, layer in enumerate(backbone.encoder.layers):
        prefix = f"blocks.{index}."
        names = [name for name in weights if name.startswith(prefix)]
        load_block(layer, {name.removeprefix(prefix): weights[name] for name in names})
    load_norm(backbone.layernorm, weights, "norm")


def load_block(layer, weights):
    load_norm(layer.norm1, weights, "norm1")
    load_norm(layer.norm2, weights, "norm2")
    attention = layer.attention
    dense = (attention.query_dense, attention.key_dense, attention.value_dense)
    kernels = np.split(weights["attn.qkv.weight"], 3)
    biases = np.split(weights["attn.qkv.bias"], 3)
    for part, kernel, bias in zip(dense, kernels, biases, strict=True):
        part.kernel.assign(kernel.T)
        part.bias.assign(bias)
    load_dense(attention.output_dense, weights, "attn.proj")
    load_dense(layer.mlp.up_proj, weights, "mlp.fc1")
    load_dense(layer.mlp.down_proj, weights, "mlp.fc2")
    layer.layer_scale1.lambda1.assign(weights["ls1.gamma"])
    layer.layer_scale2.lambda1.assign(weights["ls2.gamma"])


def load_head(head, weights):
    """A `DINOHead`: its weights in order are kernel and bias of each layer, then prototypes."""
    names = sorted(name for name in weights if name.startswith("mlp."))
    names = sorted(names, key=lambda name: (name.split(".")[1], name.endswith("bias")))
    head.set_weights([weights[name].T for name in [*names, "last_layer.weight"]])


def load_dense(layer, weights, name):
    layer.kernel.assign(weights[f"{name}.weight"].T)
    layer.bias.assign(weights[f"{name}.bias"])


def load_norm(layer, weights, name):
    layer.gamma.assign(weights[f"{name}.weight"])
    layer.beta.assign(weights[f"{name}.bias"])


def part(arrays, prefix):
    """The entries of `arrays` under `prefix`, without it."""
    return {name.removeprefix(prefix): a for name, a in arrays.items() if name.startswith(prefix)}
