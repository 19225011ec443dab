"""Rotary position embeddings along the two axes of the patch grid."""

import math

from keras import ops


def rope_periods(head_dim, theta=None, min_period=None, max_period=None):
    """The `head_dim / 4` periods: powers of `theta`, or geometric from minimum to maximum."""
    exponents = ops.arange(head_dim // 4, dtype="float32")
    if theta is not None:
        return ops.power(float(theta), exponents * (4 / head_dim))
    return min_period * ops.power(max_period / min_period, exponents / max(head_dim // 4 - 1, 1))


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
