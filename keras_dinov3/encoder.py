"""A vision transformer forward pass over the weights of a Keras Hub backbone."""

from typing import Any, NamedTuple

from keras import ops

from keras_dinov3 import backend
from keras_dinov3.block import (
    block_function,
    dense,
    from_rows,
    normalize,
    random_subsets,
    to_rows,
)
from keras_dinov3.extras import EncoderExtras
from keras_dinov3.families import channels_of, parts_of, patch_size_of
from keras_dinov3.image_ops import resize
from keras_dinov3.rope import signed_rope
from keras_dinov3.schedules import is_count

NO_EXTRAS = EncoderExtras()


class View(NamedTuple):
    """Crops of one size, as `encode` takes them."""

    images: Any  # (B, H, W, C)
    masks: Any = None  # (B, N), bool
    is_local: bool = False


class Tokens(NamedTuple):
    """What `encode` returns: tokens by kind, after the final norm."""

    cls: Any  # (B, D)
    registers: Any  # (B, R, D)
    patches: Any  # (B, N, D), row-major over the grid


def encode(
    backbone,
    images,
    masks=None,
    training=False,
    drop_path_rate=0.0,
    seed=None,
    extras=None,
    is_local=False,
    remat="none",
):
    """Runs `backbone`'s weights on images of any size and returns its tokens by kind.

    At inference and without `extras` this equals `backbone(images)`. Unlike the Hub's own graph,
    it takes any resolution, hides masked patches and drops residual paths as DINOv3 does.
    Learned position embeddings are resized (bicubic, antialiased) to other grids.

    Args:
        backbone: `DINOV3Backbone`, `DINOV2Backbone` or `ViTBackbone` of `keras_hub.models`. Its
            weights are read, nothing is copied; the computation runs in its compute dtype. Its
            own dropout and drop path are not used.
        images: Float tensor of shape `(B, H, W, C)`, already normalised. `H` and `W` are
            multiples of the patch size and need not be the backbone's `image_shape`.
        masks: Bool tensor of shape `(B, N)`, `N = H * W / patch_size**2`. Where true, the
            patch embedding is replaced by the mask token.
        training: Whether residual paths are dropped and rotary positions are varied.
        drop_path_rate: Float in [0, 1). In each residual branch of each block, a random
            `max(1, int(B * (1 - drop_path_rate)))` images are computed, and their branch is
            scaled up to keep the batch's expected sum; the others skip the branch.
        seed: `keras.random.SeedGenerator`, needed when something is drawn.
        extras: `EncoderExtras` built for the backbone, or `None`.
        is_local: Whether these are local crops, for the norm of their class tokens.
        remat: What the backward pass computes again to save memory: `"none"`, `"blocks"` (all
            within a block; the tokens between blocks are kept) or `"full"` (also those, but for
            one in about the square root of the number of blocks).

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
    view = View(images, masks, is_local)
    (tokens,) = encode_views(
        backbone, [view], training, drop_path_rate, seed, extras=extras, remat=remat
    )
    return tokens


def encode_views(
    backbone, views, training=False, drop_path_rate=0.0, seed=None, extras=None, remat="none"
):
    """`encode` for crops of several sizes together; equals one call after the other.

    The tokens of all views are rows of one matrix in each product, norm and MLP; attention, and
    what is drawn at random, is each view's own. So the operations are fewer and larger, weights are
    read once, and their gradients come from one product.

    Args:
        backbone: As in `encode`.
        views: List of `View`.
        training: As in `encode`.
        drop_path_rate: As in `encode`.
        seed: As in `encode`.
        extras: As in `encode`.
        remat: As in `encode`.

    Returns:
        List of `Tokens`, one for each view.

    Raises:
        TypeError, ValueError: As in `encode`.
    """
    parts, extras = parts_of(backbone), extras or NO_EXTRAS
    extras.check_use(training, seed)
    embedded = [embed(backbone, parts, view.images, view.masks, extras) for view in views]
    shapes = [shape_of(x) for x, _, _ in embedded]  # (B, length, D)
    num_prefix = embedded[0][2]
    function, blocks = blocks_of(
        backbone,
        parts,
        [(shape[0], grid_size) for shape, (_, grid_size, _) in zip(shapes, embedded, strict=True)],
        num_prefix,
        extras,
        training,
        drop_path_rate,
        seed,
    )
    x = backend.fold(function, to_rows([x for x, _, _ in embedded]), blocks, remat)
    return [
        split_tokens(x, parts, num_prefix, extras, view.is_local and training)
        for x, view in zip(from_rows(x, shapes), views, strict=True)
    ]


def encode_layers(backbone, images, layers=1, as_grid=False, normalize=True, extras=None):
    """Tokens of several blocks at inference, for dense tasks and probes.

    Args:
        backbone: As in `encode`.
        images: As in `encode`.
        layers: Int: the last so many blocks. Or a list of block numbers, counted from 0;
            negative ones count from the end.
        as_grid: Whether patches come as `(B, h, w, D)` instead of `(B, N, D)`.
        normalize: Whether to apply the final norm, as `encode` does.
        extras: As in `encode`.

    Returns:
        List of `Tokens`, in the order of the blocks asked for.

    Raises:
        ValueError: If there is no such block.
    """
    parts, extras = parts_of(backbone), extras or NO_EXTRAS
    extras.check_use(False, None)
    wanted = block_numbers(layers, backbone)
    x, grid_size, num_prefix = embed(backbone, parts, images, None, extras)
    shape = shape_of(x)
    function, blocks = blocks_of(backbone, parts, [(shape[0], grid_size)], num_prefix, extras)
    x, outputs = to_rows([x]), []
    for weights in blocks[: max(wanted) + 1]:
        x = function(x, weights)
        outputs += from_rows(x, [shape])
    found = []
    for layer in wanted:
        x = outputs[layer]
        if normalize:
            tokens = split_tokens(x, parts, num_prefix, extras, False)
        else:
            tokens = Tokens(x[:, 0], x[:, 1:num_prefix], x[:, num_prefix:])
        if as_grid:
            batch_size, _, width = ops.shape(x)
            patches = ops.reshape(tokens.patches, (batch_size, *grid_size, width))
            tokens = tokens._replace(patches=patches)
        found.append(tokens)
    return found


def block_numbers(layers, backbone):
    """The blocks that `layers` of `encode_layers` means, counted from 0."""
    count = len(parts_of(backbone).blocks)
    is_list = isinstance(layers, (list, tuple, range)) and len(layers)
    if is_count(layers, at_least=1) and layers <= count:
        return range(count - layers, count)
    if is_list and all(is_count(layer, -count) and layer < count for layer in layers):
        return [layer % count for layer in layers]
    raise ValueError(
        f"`layers` must be a number of blocks from 1 to {count}, or a list of blocks from 0 to "
        f"{count - 1}. Received: layers={layers!r}."
    )


def embed(backbone, parts, images, masks, extras):
    """Tokens before the first block, `(B, 1 + R + N, D)`; the grid; the tokens before patches."""
    grid_size = check_images(backbone, images)
    dtype = backbone.compute_dtype
    patches = embed_patches(images, parts.projection, parts.patch_size, dtype)
    batch_size, num_patches, width = ops.shape(patches)
    if masks is not None:
        mask_token = parts.mask_token if extras.mask_token is None else extras.mask_token
        check_masks(backbone, mask_token, masks, (batch_size, num_patches))
        mask_token = ops.reshape(ops.cast(mask_token, dtype), (1, 1, width))
        patches = ops.where(ops.expand_dims(masks, -1), mask_token, patches)
    prefix = [parts.cls_token]
    if parts.positions is not None:
        positions = ops.cast(resize_positions(parts, grid_size), dtype)
        prefix[0] = ops.cast(parts.cls_token, dtype) + positions[:, :1]
        patches = patches + positions[:, 1:]
    registers = extras.register_tokens if parts.register_tokens is None else parts.register_tokens
    if registers is not None:
        prefix.append(registers)
    prefix = ops.concatenate([ops.cast(token, dtype) for token in prefix], axis=1)
    num_prefix = prefix.shape[1]
    prefix = ops.broadcast_to(prefix, (batch_size, num_prefix, width))
    return ops.concatenate([prefix, patches], axis=1), grid_size, num_prefix


def blocks_of(
    backbone, parts, views, num_prefix, extras, training=False, drop_path_rate=0.0, seed=None
):
    """The blocks as one pure function and what it takes for each of them.

    Args:
        backbone: As in `encode`.
        parts: Its `Parts`.
        views: List of pairs: the number of images and their patch grid `(h, w)`.
        num_prefix: Int, the tokens before the patches.
        extras: `EncoderExtras`.
        training: As in `encode`.
        drop_path_rate: As in `encode`.
        seed: As in `encode`.

    Returns:
        A function `(rows, inputs) -> rows`, the same object for all backbones and views alike, and
        a list of the `inputs` of each block, see `block.block`.
    """
    dtype, num_blocks = backbone.compute_dtype, len(parts.blocks)
    ropes, subsets = [], []  # of each view, those of each block
    for batch_size, grid_size in views:
        tables = [None] * num_blocks
        if parts.rope_theta is not None:
            varied = extras.varies_rope and training
            tables = [
                signed_rope(
                    *extras.rope(
                        grid_size, backbone.hidden_dim // backbone.num_heads, parts.rope_theta, draw
                    ),
                    num_prefix,
                    dtype,
                )
                for draw in ([seed] * num_blocks if varied else [None])
            ]
            tables = tables if varied else tables * num_blocks
        ropes.append(tables)
        kept, keep = [None] * num_blocks, max(1, int(batch_size * (1 - drop_path_rate)))
        if training and keep < batch_size:
            kept = ops.unstack(random_subsets(num_blocks, batch_size, keep, seed), num_blocks)
        subsets.append(kept)
    blocks = []
    for index, layer in enumerate(parts.blocks):
        weights = parts.block_weights(layer, dtype)
        if not extras.layer_scale:
            weights.update(layer_scale1=None, layer_scale2=None)
        if extras.lora is not None:
            weights = extras.lora.adapted(index, weights)
        blocks.append(
            {
                "weights": weights,
                "ropes": [tables[index] for tables in ropes],
                "subsets": [kept[index] for kept in subsets],
            }
        )
    sizes = tuple((count, num_prefix + height * width) for count, (height, width) in views)
    function = block_function(
        sizes, backbone.num_heads, parts.activation, extras.norm, float(parts.norm.epsilon)
    )
    return function, blocks


def shape_of(x):
    """The shape of tokens, with -1 for a batch of unknown size, which TensorFlow graphs have."""
    batch_size, *others = x.shape
    return (-1 if batch_size is None else batch_size, *others)


def merge(crops):
    """`(B, crops, ...)` as a plain batch of images; any first two axes become one."""
    return ops.reshape(crops, (crops.shape[0] * crops.shape[1], *crops.shape[2:]))


def by_image(tokens, crops):
    """`(B * crops, D)`, of other crops of the same images than `(B, ...)`, as `(B, crops, D)`."""
    return ops.reshape(tokens, (crops.shape[0], -1, tokens.shape[-1]))


def split_tokens(x, parts, num_prefix, extras, is_local):
    """The final norm, or several where norms are untied, and the tokens by kind."""

    def final(x, layer):
        return normalize(x, layer.gamma, layer.beta, layer.epsilon, extras.norm)

    cls_norm = extras.cls_norm
    if is_local and extras.local_cls_norm is not None:
        cls_norm = extras.local_cls_norm
    if cls_norm is None:
        x = final(x, parts.norm)
        return Tokens(x[:, 0], x[:, 1:num_prefix], x[:, num_prefix:])
    prefix, patches = final(x[:, :num_prefix], cls_norm), final(x[:, num_prefix:], parts.norm)
    return Tokens(prefix[:, 0], prefix[:, 1:], patches)


def resize_positions(parts, grid_size):
    """Learned position embeddings `(1, 1 + N, D)` for another grid; bicubic, antialiased."""
    positions = ops.convert_to_tensor(parts.positions)
    if grid_size == parts.grid_size:
        return positions
    width = positions.shape[-1]
    patches = ops.cast(ops.reshape(positions[:, 1:], (1, *parts.grid_size, width)), "float32")
    patches = ops.reshape(resize(patches, grid_size), (1, -1, width))
    return ops.concatenate([positions[:, :1], ops.cast(patches, positions.dtype)], axis=1)


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
    bias = ops.cast(projection.bias, dtype) if projection.use_bias else None
    return dense(x, (kernel, bias))


def check_images(backbone, images):
    """Returns the patch grid `(h, w)` or says why the images do not fit the backbone."""
    if len(images.shape) != 4:
        raise ValueError(
            "`images` must have shape (batch, height, width, channels). "
            f"Received: images.shape={tuple(images.shape)}."
        )
    if images.shape[-1] != channels_of(backbone):
        raise ValueError(
            f"`images` must have the {channels_of(backbone)} channels the backbone was built for. "
            f"Received: images.shape={tuple(images.shape)} (channels last)."
        )
    return grid_of(images.shape[1:3], patch_size_of(backbone), "images")


def check_masks(backbone, mask_token, masks, shape):
    if mask_token is None:
        hint = "pass the `EncoderExtras` of its `DINOv3`"
        if hasattr(backbone, "use_mask_token"):
            hint = "build it with `use_mask_token=True`"
        raise ValueError(
            f"`masks` need a mask token. Received: a {type(backbone).__name__} without one; {hint}."
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
