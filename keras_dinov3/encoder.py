"""A vision transformer forward pass over the weights of a Keras Hub backbone."""

import math
from typing import Any, NamedTuple

import keras
import keras_hub
from keras import ops


class Tokens(NamedTuple):
    """What `encode` returns: tokens by kind, after the final norm."""

    cls: Any  # (B, D)
    registers: Any  # (B, R, D)
    patches: Any  # (B, N, D), row-major over the grid


def encode(backbone, images, masks=None, training=False, drop_path_rate=0.0, seed=None):
    """Runs `backbone`'s weights on images of any size and returns its tokens by kind.

    At inference this equals `backbone(images)`. Unlike the Hub's own graph, it takes any
    resolution, hides masked patches and drops residual paths as DINOv3 does.

    Args:
        backbone: `keras_hub.models.DINOV3Backbone`. Its weights are read, nothing is copied;
            the computation runs in its compute dtype.
        images: Float tensor of shape `(B, H, W, C)`, already normalised. `H` and `W` are
            multiples of the patch size and need not be the backbone's `image_shape`.
        masks: Bool tensor of shape `(B, N)`, `N = H * W / patch_size**2`. Where true, the
            patch embedding is replaced by the mask token.
        training: Whether residual paths are dropped.
        drop_path_rate: Float in [0, 1). In each residual branch of each block, a random
            `max(1, int(B * (1 - drop_path_rate)))` images are computed, and their branch is
            scaled up to keep the batch's expected sum; the others skip the branch.
        seed: `keras.random.SeedGenerator`, needed when paths are dropped.

    Returns:
        `Tokens` with `cls` `(B, D)`, `registers` `(B, R, D)` and `patches` `(B, N, D)`.

    Raises:
        TypeError: If `backbone` is of no supported family.
        ValueError: If a shape does not fit the backbone, or a mask is given to a backbone
            without mask token.

    Reference:
        [Siméoni et al., 2025](https://arxiv.org/abs/2508.10104), section 3.2;
        [Oquab et al., 2023](https://arxiv.org/abs/2304.07193), section 5 (stochastic depth).
    """
    grid_size = check_images(backbone, images)
    embeddings = backbone.embeddings
    dtype = backbone.compute_dtype
    patches = embed_patches(
        images, embeddings.patch_embeddings.projection, backbone.patch_size, dtype
    )
    batch_size, num_patches, width = ops.shape(patches)
    if masks is not None:
        check_masks(backbone, masks, (batch_size, num_patches))
        mask_token = ops.cast(embeddings.mask_token, dtype)  # (1, 1, D)
        patches = ops.where(ops.expand_dims(masks, -1), mask_token, patches)

    prefix = [embeddings.cls_token]
    if backbone.num_register_tokens:
        prefix.append(embeddings.register_tokens)
    prefix = ops.concatenate([ops.cast(token, dtype) for token in prefix], axis=1)
    num_prefix = 1 + backbone.num_register_tokens
    x = ops.concatenate(
        [ops.broadcast_to(prefix, (batch_size, num_prefix, width)), patches], axis=1
    )

    sin, cos = rope_tables(
        grid_size, backbone.hidden_dim // backbone.num_heads, backbone.rope_theta
    )
    rope = signed_rope(sin, cos, num_prefix, dtype)
    keep = batch_size
    if training and drop_path_rate:
        keep = max(1, int(batch_size * (1 - drop_path_rate)))
    for layer in backbone.encoder.layers:
        subsets = (None, None)
        if keep < batch_size:
            subsets = (random_subset(batch_size, keep, seed), random_subset(batch_size, keep, seed))
        x = block(x, rope, block_weights(layer, dtype), backbone, subsets)
    x = normalize(x, backbone.layernorm)
    return Tokens(x[:, 0], x[:, 1:num_prefix], x[:, num_prefix:])


def block(x, rope, weights, config, subsets=(None, None)):
    """One transformer block as a pure function of its weights.

    Args:
        x: Tokens, shape `(B, 1 + R + N, D)`.
        rope: `(sin, cos)` from `signed_rope`, each `(1 + R + N, head_dim)`, or `None`.
        weights: Dict of tensors and norms as `block_weights` returns it.
        config: Object with `num_heads`, `layer_norm_eps` and `hidden_activation`.
        subsets: Two int tensors of shape `(keep,)`: the images that the attention and the
            MLP branch compute. `None` computes all.

    Returns:
        Tensor shaped like `x`.
    """

    def attend(x):
        return attention(normalize(x, weights["norm1"]), rope, weights, config.num_heads)

    def feed(x):
        return mlp(normalize(x, weights["norm2"]), weights, config.hidden_activation)

    x = add_residual(x, attend, weights["layer_scale1"], subsets[0])
    return add_residual(x, feed, weights["layer_scale2"], subsets[1])


def add_residual(x, branch, scale, subset):
    if subset is None:
        return x + scale * branch(x)
    batch_size, keep = x.shape[0], subset.shape[0]
    residual = scale * branch(ops.take(x, subset, axis=0)) * (batch_size / keep)
    return x + ops.scatter(ops.expand_dims(subset, -1), residual, x.shape)


def random_subset(batch_size, keep, seed):
    """`keep` distinct images of a batch, uniformly drawn: an int tensor of shape `(keep,)`."""
    return ops.argsort(keras.random.uniform((batch_size,), seed=seed))[:keep]


def attention(x, rope, weights, num_heads):
    batch_size, length, width = ops.shape(x)
    heads = (batch_size, length, num_heads, width // num_heads)
    query, key, value = (
        ops.reshape(dense(x, weights[name]), heads) for name in ("query", "key", "value")
    )
    if rope is not None:
        query, key = apply_rope(query, *rope), apply_rope(key, *rope)
    x = ops.dot_product_attention(query, key, value)
    return dense(ops.reshape(x, (batch_size, length, width)), weights["output"])


def mlp(x, weights, activation):
    activation = keras.activations.get(activation)
    if "gate" in weights:
        x = activation(dense(x, weights["gate"])) * dense(x, weights["up"])
    else:
        x = activation(dense(x, weights["up"]))
    return dense(x, weights["down"])


def dense(x, kernel_and_bias):
    kernel, bias = kernel_and_bias
    x = ops.matmul(x, kernel)
    return x if bias is None else x + bias


def normalize(x, norm):
    """Layer norm with the weights of a Keras layer; float32 inside, `x`'s dtype outside."""
    return ops.layer_normalization(x, norm.gamma, norm.beta, epsilon=norm.epsilon)


def block_weights(layer, dtype):
    """The weights of a Hub `DINOV3Layer` by role, matrices and scales cast to `dtype`."""

    def dense_weights(dense_layer):
        bias = dense_layer.bias if dense_layer.use_bias else None
        return (
            ops.cast(dense_layer.kernel, dtype),
            None if bias is None else ops.cast(bias, dtype),
        )

    weights = {
        "norm1": layer.norm1,
        "query": dense_weights(layer.attention.query_dense),
        "key": dense_weights(layer.attention.key_dense),
        "value": dense_weights(layer.attention.value_dense),
        "output": dense_weights(layer.attention.output_dense),
        "layer_scale1": ops.cast(layer.layer_scale1.lambda1, dtype),
        "norm2": layer.norm2,
        "up": dense_weights(layer.mlp.up_proj),
        "down": dense_weights(layer.mlp.down_proj),
        "layer_scale2": ops.cast(layer.layer_scale2.lambda1, dtype),
    }
    if layer.use_gated_mlp:
        weights["gate"] = dense_weights(layer.mlp.gate_proj)
    return weights


def weight_places(backbone):
    """The weights of a Hub backbone by place, for rules that differ from place to place.

    Returns:
        Dict of lists of variables: `"tokens"` (class, register and mask), `"patch_embed"`,
        `"norm"` (the final one), and `"blocks"`, which has one list for each block.
    """
    patch_embed = backbone.embeddings.patch_embeddings.weights
    return {
        "tokens": [w for w in backbone.embeddings.weights if all(w is not p for p in patch_embed)],
        "patch_embed": patch_embed,
        "blocks": [layer.weights for layer in backbone.encoder.layers],
        "norm": backbone.layernorm.weights,
    }


def embed_patches(images, projection, patch_size, dtype):
    """The patch convolution as one matrix product, `(B, H, W, C)` to `(B, N, D)`."""
    batch_size, height, width, channels = ops.shape(images)
    rows, columns = height // patch_size, width // patch_size
    x = ops.reshape(
        ops.cast(images, dtype), (batch_size, rows, patch_size, columns, patch_size, channels)
    )
    x = ops.transpose(x, (0, 1, 3, 2, 4, 5))
    x = ops.reshape(x, (batch_size, rows * columns, patch_size * patch_size * channels))
    kernel = ops.reshape(ops.cast(projection.kernel, dtype), (x.shape[-1], -1))
    return dense(x, (kernel, ops.cast(projection.bias, dtype)))


def rope_periods(head_dim, theta=None, min_period=None, max_period=None):
    """The `head_dim / 4` periods: powers of `theta`, or geometric from minimum to maximum."""
    exponents = ops.arange(head_dim // 4, dtype="float32")
    if theta is not None:
        return ops.power(float(theta), exponents * (4 / head_dim))
    return min_period * ops.power(max_period / min_period, exponents / (head_dim // 4 - 1))


def rope_tables(
    grid_size,
    head_dim,
    theta=100.0,
    periods=None,
    normalize="separate",
    shift=None,
    log_jitter=None,
    log_rescale=None,
):
    """Sine and cosine tables of the axial rotary position embedding.

    Patch centres run from -1 to 1 along each axis and are turned into angles
    `2 * pi * centre / period`.

    Args:
        grid_size: `(h, w)`, the patch grid.
        head_dim: Int, a multiple of 4.
        theta: Float, the base of the periods `theta ** (4 * i / head_dim)`.
        periods: Tensor of shape `(head_dim / 4,)`; replaces those of `theta`.
        normalize: What divides the centres of both axes: each axis's own length
            (`"separate"`), or the longer (`"max"`) or shorter (`"min"`) of the two.
        shift: Two floats added to the (h, w) centres.
        log_jitter: Two floats whose exponentials multiply the (h, w) centres.
        log_rescale: Float whose exponential multiplies both.

    Returns:
        `(sin, cos)`, float32, each `(h * w, head_dim)`: h angles, w angles, then both again.

    Reference:
        [Siméoni et al., 2025](https://arxiv.org/abs/2508.10104), section 3.2.
    """
    extents = {"separate": grid_size, "max": (max(grid_size),) * 2, "min": (min(grid_size),) * 2}
    centres = []
    for axis, (length, extent) in enumerate(zip(grid_size, extents[normalize], strict=True)):
        centre = (ops.arange(length, dtype="float32") + 0.5) / extent * 2.0 - 1.0
        if shift is not None:
            centre = centre + shift[axis]
        if log_jitter is not None:
            centre = centre * ops.exp(ops.cast(log_jitter[axis], "float32"))
        if log_rescale is not None:
            centre = centre * ops.exp(ops.cast(log_rescale, "float32"))
        centres.append(centre)
    if periods is None:
        periods = rope_periods(head_dim, theta)
    rows, columns = (
        2 * math.pi * ops.expand_dims(centre, -1) / periods for centre in centres
    )  # (h, head_dim / 4), (w, head_dim / 4)
    shape = (*grid_size, head_dim // 4)
    angles = ops.concatenate(
        [
            ops.broadcast_to(ops.expand_dims(rows, 1), shape),
            ops.broadcast_to(ops.expand_dims(columns, 0), shape),
        ],
        axis=-1,
    )
    angles = ops.tile(ops.reshape(angles, (-1, head_dim // 2)), (1, 2))
    return ops.sin(angles), ops.cos(angles)


def signed_rope(sin, cos, num_prefix, dtype):
    """Tables for `apply_rope`: the sign of the rotated half in the sine, prefix tokens at rest.

    Class and register tokens have no position: their angle is 0, so one product serves the
    whole sequence and nothing is sliced.
    """
    half = sin.shape[-1] // 2
    sin = ops.concatenate([-sin[:, :half], sin[:, half:]], axis=-1)
    sin = ops.pad(sin, ((num_prefix, 0), (0, 0)))
    cos = ops.pad(cos, ((num_prefix, 0), (0, 0)), constant_values=1.0)
    return ops.cast(sin, dtype), ops.cast(cos, dtype)


def apply_rope(x, sin, cos):
    """Rotates `(B, length, heads, head_dim)` by tables of shape `(length, head_dim)`."""
    rolled = ops.roll(x, x.shape[-1] // 2, axis=-1)
    return x * ops.expand_dims(cos, 1) + rolled * ops.expand_dims(sin, 1)


def check_images(backbone, images):
    """Returns the patch grid `(h, w)` or says why the images do not fit the backbone."""
    check_backbone(backbone)
    if len(images.shape) != 4:
        raise ValueError(
            "`images` must have shape (batch, height, width, channels). "
            f"Received: images.shape={tuple(images.shape)}."
        )
    channels = backbone.embeddings.patch_embeddings.projection.kernel.shape[-2]
    if images.shape[-1] != channels:
        raise ValueError(
            f"`images` must have the {channels} channels the backbone was built for. "
            f"Received: images.shape={tuple(images.shape)} (channels last)."
        )
    return grid_of(images.shape[1:3], backbone.patch_size, "images")


def check_backbone(backbone):
    if not isinstance(backbone, keras_hub.models.DINOV3Backbone):
        raise TypeError(
            "`backbone` must be a `keras_hub.models.DINOV3Backbone`. "
            f"Received: {backbone!r} of type {type(backbone).__name__}."
        )
    if backbone.hidden_dim % (4 * backbone.num_heads):
        raise ValueError(
            "`hidden_dim` must be a multiple of 4 * `num_heads`: rotary embeddings turn pairs of "
            f"features along two axes. Received: hidden_dim={backbone.hidden_dim}, "
            f"num_heads={backbone.num_heads}."
        )


def check_masks(backbone, masks, shape):
    if not backbone.use_mask_token:
        raise ValueError(
            "`masks` need a backbone with a mask token. Received a backbone with "
            "use_mask_token=False; build it with `use_mask_token=True`."
        )
    if tuple(masks.shape) != tuple(shape):
        raise ValueError(
            f"`masks` must have shape (batch, patches)={tuple(shape)}. "
            f"Received: masks.shape={tuple(masks.shape)}."
        )


def grid_of(size, patch_size, name):
    """The patch grid of an image of `size` (height, width) pixels."""
    for pixels in size:
        if pixels % patch_size or pixels < patch_size:
            below = max(pixels // patch_size, 1) * patch_size
            nearest = sorted({below, (pixels // patch_size + 1) * patch_size})
            raise ValueError(
                f"Height and width of `{name}` must be multiples of `patch_size`. "
                f"Received: {name} of {size[0]}x{size[1]} pixels, patch_size={patch_size}. "
                f"Nearest to {pixels}: {', '.join(map(str, nearest))}."
            )
    return size[0] // patch_size, size[1] // patch_size
