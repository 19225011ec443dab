"""One transformer block as a pure function of the tokens of all views and of its weights."""

import functools

import keras
from keras import ops

from keras_dinov3 import backend
from keras_dinov3.extras import LAYER
from keras_dinov3.rope import apply_rope


@functools.cache
def block_function(sizes, num_heads, activation, norm, epsilon):
    """`block` with its settings: one object for those alike, so that it is compiled once."""

    def function(x, inputs):
        return block(
            x,
            **inputs,
            sizes=sizes,
            num_heads=num_heads,
            activation=activation,
            norm=norm,
            epsilon=epsilon,
        )

    return function


def block(
    x,
    weights,
    sizes,
    num_heads,
    ropes,
    subsets,
    activation="gelu",
    norm=LAYER,
    epsilon=1e-6,
):
    """One transformer block as a pure function of its weights.

    Args:
        x: Tokens of all views, shape `(rows, D)`.
        weights: Dict by role. `"query"`, `"key"`, `"value"`, `"output"`, `"up"`, `"down"` and, in
            a gated MLP, `"gate"`: pairs of kernel and bias, or `None` for no bias; with an adapter,
            its two matrices follow, see `dense`. `"norm1"`, `"norm2"`: pairs of gain and offset.
            `"layer_scale1"`, `"layer_scale2"`: tensors or `None`.
        sizes: Tuple with a pair for each view: its images and the tokens of each. The rows are
            those of the first view, image by image, then those of the next.
        num_heads: Int.
        ropes: List with `(sin, cos)` from `signed_rope` for each view, each
            `(1 + R + N, head_dim)`, or `None`.
        subsets: List with an int tensor of shape `(2, keep)` for each view: the images that the
            attention and the MLP branch compute. `None`: all.
        activation: Of the MLP, anything that `keras.activations.get` takes.
        norm: `"layer"` or `"rms"`.
        epsilon: Float, of the norms.

    Returns:
        Tensor shaped like `x`.
    """

    def attend(x, sizes):
        x = normalize(x, *weights["norm1"], epsilon, norm)
        return attention(x, sizes, ropes, weights, num_heads)

    def feed(x, sizes):
        return mlp(normalize(x, *weights["norm2"], epsilon, norm), weights, activation)

    for index, (branch, scale) in enumerate(
        [(attend, weights["layer_scale1"]), (feed, weights["layer_scale2"])]
    ):
        images = [subset if subset is None else subset[index] for subset in subsets]
        x = add_residual(x, branch, scale, sizes, images)
    return x


def add_residual(x, branch, scale, sizes, subsets):
    """`x` plus what the branch makes of it, for each view of a subset of its images."""

    def residual(x, sizes):
        y = branch(x, sizes)
        return y if scale is None else scale * y

    if all(subset is None for subset in subsets):
        return x + residual(x, sizes)
    views = from_rows(x, [(*size, x.shape[-1]) for size in sizes])
    kept = [
        view if subset is None else ops.take(view, subset, axis=0)
        for view, subset in zip(views, subsets, strict=True)
    ]
    shapes = [tuple(view.shape) for view in kept]
    added = from_rows(residual(to_rows(kept), tuple(shape[:2] for shape in shapes)), shapes)
    results = []
    for view, part, subset in zip(views, added, subsets, strict=True):
        if subset is not None:
            part = part * (view.shape[0] / part.shape[0])
            part = ops.scatter(ops.expand_dims(subset, -1), part, view.shape)
        results.append(view + part)
    return to_rows(results)


def random_subsets(num_blocks, batch_size, keep, seed):
    """`keep` distinct images of a batch for each branch of each block, an int tensor
    `(num_blocks, 2, keep)`, uniformly drawn."""
    draws = keras.random.uniform((num_blocks, 2, batch_size), dtype="float32", seed=seed)
    return ops.argsort(draws, axis=-1)[..., :keep]


def attention(x, sizes, ropes, weights, num_heads):
    width = x.shape[-1]
    heads = [(*size, num_heads, width // num_heads) for size in sizes]
    projected = (from_rows(dense(x, weights[name]), heads) for name in ("query", "key", "value"))
    outputs = []
    for size, query, key, value, rope in zip(sizes, *projected, ropes, strict=True):
        if rope is not None:
            query, key = apply_rope(query, *rope), apply_rope(key, *rope)
        y = backend.attention(query, key, value)
        outputs.append(ops.reshape(y, (*size, width)))
    return dense(to_rows(outputs), weights["output"])


def mlp(x, weights, activation):
    activation = keras.activations.get(activation)
    if "gate" in weights:
        x = activation(dense(x, weights["gate"])) * dense(x, weights["up"])
    else:
        x = activation(dense(x, weights["up"]))
    return dense(x, weights["down"])


def dense(x, weights):
    """`x @ kernel + bias`, plus `x @ a @ b` where `weights` have these too."""
    kernel, bias, *adapter = weights
    y = backend.dense(x, kernel, bias)
    return y + backend.dense(backend.dense(x, adapter[0]), adapter[1]) if adapter else y


def normalize(x, gamma, beta, epsilon, norm=LAYER):
    """Layer norm or RMSNorm; float32 inside, `x`'s dtype out."""
    if norm == LAYER:
        return ops.layer_normalization(x, gamma, beta, epsilon=epsilon)
    y = ops.cast(x, "float32")
    y = y * ops.rsqrt(ops.mean(ops.square(y), axis=-1, keepdims=True) + epsilon)
    return ops.cast(y * ops.cast(gamma, "float32"), x.dtype)


def to_rows(views):
    """A list of `(B, length, D)` as the rows of one matrix."""
    rows = [ops.reshape(x, (-1, x.shape[-1])) for x in views]
    return rows[0] if len(rows) == 1 else ops.concatenate(rows)


def from_rows(x, shapes):
    """`to_rows` undone: a list of tensors of the given shapes `(B, length, ...)`."""
    counts = [count * length for count, length, *_ in shapes]
    parts = [x] if len(counts) == 1 else backend.split(x, counts)
    return [ops.reshape(part, shape) for part, shape in zip(parts, shapes, strict=True)]
