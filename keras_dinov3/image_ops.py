"""Crop, colour and blur as pure functions of arrays: the steps of `MultiCrop`.

Every step is arithmetic on whole arrays, so the same code runs eagerly, compiled and
differentiated on each backend. Choices between pixels are arithmetic too: `where` with a mask of
pixels costs torch on a CPU forty times as much as a product. Crops are kept as `(N, S, C, S)`,
that is, crop, column, channel, row: each channel of a column is contiguous.
"""

import functools
import itertools
import math

import keras
import numpy as np
from keras import ops

from keras_dinov3 import backend

LUMA = (0.2989, 0.587, 0.114)  # ITU-R 601-2, as in Pillow and torchvision
BLOCK_SIZE = 32  # output rows that `cut_and_resize` computes from one window of the input
STEEP = 3e38  # times any normal number below -1e-38: less than -2


def image_dtype(images):
    dtype = keras.backend.standardize_dtype(images.dtype)
    if dtype != "uint8" and "float" not in dtype:
        raise ValueError(
            "`images` must be uint8 (0 to 255) or float (0 to 1). Received: "
            f"dtype {dtype}. Cast to uint8 if the values are 0 to 255; otherwise divide by "
            "their largest possible value and cast to float32."
        )
    return dtype


OUT_OF_RANGE = (
    "Float `images` must be from 0 to 1, not yet normalised. For 0 to 255, divide by 255 or cast "
    "to uint8. Received: values from"
)


def check_value_range(images):
    """Raises if float images that are at hand, not only traced, are far outside of 0-1."""
    is_float = "float" in keras.backend.standardize_dtype(images.dtype)
    values = backend.host_values(images) if is_float else None
    if values is not None and values.size:
        low, high = float(values.min()), float(values.max())
        if low < -0.5 or high > 1.5:
            raise ValueError(f"{OUT_OF_RANGE} {low:.4g} to {high:.4g}.")


def to_unit_range(images):
    """uint8 0-255 or float 0-1 of any float type to float32 0-1."""
    images = ops.convert_to_tensor(images)
    scaled = ops.cast(images, "float32")
    return scaled / 255.0 if image_dtype(images) == "uint8" else scaled


def per_crop(x):
    """`(N,)` or `(N, 1)`, one value per crop, ready to combine with `(N, S, C, S)`."""
    return ops.reshape(x, (-1, 1, 1, 1))


def random_boxes(draws, height, width, scale, aspect_ratio):
    """Top, left, height and width in whole pixels of one random part per crop, `(N, 1)` each.

    The rule of torchvision's `RandomResizedCrop`: the first try that fits into the image, else
    the largest centred box whose aspect ratio is in range.
    """
    height, width = (ops.cast(ops.convert_to_tensor(x), "float32") for x in (height, width))
    low, high = aspect_ratio
    area = height * width * (scale[0] + (scale[1] - scale[0]) * draws["area"])
    log_ratio = math.log(low) + math.log(high / low) * draws["aspect_ratio"]
    box_width = ops.round(ops.sqrt(area * ops.exp(log_ratio)))
    box_height = ops.round(ops.sqrt(area * ops.exp(-log_ratio)))
    fits = ops.logical_and(
        ops.logical_and(box_width > 0, box_width <= width),
        ops.logical_and(box_height > 0, box_height <= height),
    )
    fits = ops.cast(fits, "float32")
    first = fits * ops.cast(ops.cumsum(fits, axis=1) == 1, "float32")  # one-hot, or all 0
    none_fits = 1.0 - ops.sum(first, axis=1, keepdims=True)
    fallback_width = ops.maximum(ops.minimum(width, ops.round(height * high)), 1.0)
    fallback_height = ops.maximum(ops.minimum(height, ops.round(width / low)), 1.0)
    box_width = ops.sum(first * box_width, axis=1, keepdims=True) + none_fits * fallback_width
    box_height = ops.sum(first * box_height, axis=1, keepdims=True) + none_fits * fallback_height

    draw_top, draw_left = ops.split(draws["position"], 2, axis=1)
    free_height, free_width = height - box_height, width - box_width
    centred = none_fits > 0
    # the product of a draw just below 1 can round up to `free + 1`
    top = ops.minimum(ops.floor(draw_top * (free_height + 1.0)), free_height)
    left = ops.minimum(ops.floor(draw_left * (free_width + 1.0)), free_width)
    top = ops.where(centred, ops.floor(free_height / 2.0), top)
    left = ops.where(centred, ops.floor(free_width / 2.0), left)
    return top, left, box_height, box_width


def linear_kernel(distance):
    return ops.relu(1.0 - ops.abs(distance))


def cubic_kernel(distance):
    """Keys' cubic convolution with a = -0.5, as one expression for both of its pieces."""
    outer = ops.relu(2.0 - ops.abs(distance))
    beyond = outer - 1.0
    inner = ops.relu(beyond)
    return inner * inner * (1.0 - 2.0 * inner) + 0.5 * outer * outer * beyond


KERNELS = {"bicubic": cubic_kernel, "bilinear": linear_kernel}
REACH = {cubic_kernel: 2.0, linear_kernel: 1.0}  # beyond this distance they are 0


def longest_sides(height, width, scale, aspect_ratio):
    """Height and width in pixels that no box of `random_boxes` exceeds; `None` if unknown."""
    if not (isinstance(height, int) and isinstance(width, int)):
        return None, None
    area = height * width * scale[1]
    sides = math.sqrt(area / aspect_ratio[0]) + 1.0, math.sqrt(area * aspect_ratio[1]) + 1.0
    if sides[0] > height or sides[1] > width:  # draws may not fit, and then the box is the largest
        return height, width
    return sides


def resampling_weights(start, length, size, input_size, kernel, antialias, flip=None):
    """Matrices that cut `length` pixels from `start` and resize them to `size` pixels.

    Equal to cropping first and resizing then: pixels outside the box do not count, and the
    weights of each output pixel sum to 1.

    Args:
        start: First pixel of each box, `(N, 1)`.
        length: Pixels of each box, `(N, 1)`.
        size: Int. Pixels to resize to.
        input_size: Pixels of the image along this axis.
        kernel: Function of the distance in pixels.
        antialias: Whether the kernel spans output pixels where these are the larger ones.
        flip: Optional booleans `(N, 1)`: reverse the order of the output pixels.

    Returns:
        float32 tensor of shape `(N, size, input_size)`.
    """
    center = centers(size, size, length, flip)
    pixel = ops.cast(ops.arange(input_size), "float32") + 0.5 - start  # (N, input_size)
    return kernel_weights(pixel, center, length, size, kernel, antialias)


def centers(count, size, length, flip=None):
    """Where in boxes of `length` `(N, 1)` each of `size` output pixels has its centre.

    Returns:
        float32 tensor of shape `(N, count)`; those beyond `size` repeat the last one.
    """
    pixel = ops.minimum(ops.arange(count, dtype="float32"), size - 1.0) + 0.5
    center = (length / size) * pixel
    return center if flip is None else ops.where(flip, length - center, center)


def kernel_weights(pixel, center, length, size, kernel, antialias):
    """Weights `(..., n, T)` of input pixels `(..., T)` for output pixels with centres `(..., n)`.

    Both are positions in the box, whose `length` has a last axis of 1.
    """
    inside = ops.cast(ops.logical_and(pixel > 0.0, pixel < length), "float32")
    if antialias:
        spread = ops.maximum(length / size, 1.0)
        pixel, center = pixel / spread, center / spread
    distance = ops.expand_dims(pixel, -2) - ops.expand_dims(center, -1)
    weights = kernel(distance) * ops.expand_dims(inside, -2)
    return weights / ops.sum(weights, axis=-1, keepdims=True)


def cut_and_resize(images, start, length, size, longest, kernel, antialias, flip=None):
    """Cuts `length` rows from `start` out of images and resizes them to `size` rows.

    This is the product with `resampling_weights`, but without most of their zeros: a block of
    output rows is made from the window of input rows that it can depend on.

    Args:
        images: float32 tensor of shape `(B, H, R)`.
        start: First row of each box, `(B, n, 1)`: `n` boxes for each image.
        length: Rows of each box, `(B, n, 1)`.
        size: Int. Rows to resize to.
        longest: Number of rows that no box exceeds. `None`: unknown.
        kernel: Function of the distance in rows.
        antialias: Whether the kernel spans output rows where these are the larger ones.
        flip: Optional booleans `(B, n, 1)`: reverse the order of the output rows.

    Returns:
        float32 tensor of shape `(B * n, size, R)`.
    """
    batch, height, rest = ops.shape(images)
    num_blocks = -(-size // BLOCK_SIZE)
    block = -(-size // num_blocks)
    if longest is not None:
        step = longest / size
        reach = REACH[kernel] * (max(step, 1.0) if antialias else 1.0)
        window = math.ceil((block - 1) * step + 2.0 * reach) + 2
    if longest is None or window >= height:
        flat = [x if x is None else ops.reshape(x, (-1, 1)) for x in (start, length, flip)]
        weights = resampling_weights(*flat[:2], size, height, kernel, antialias, flat[2])
        weights = ops.reshape(weights, (batch, -1, height))
        return ops.reshape(ops.matmul(weights, images), (-1, size, rest))

    boxes = start.shape[1]
    center = centers(num_blocks * block, size, length, flip)
    center = ops.reshape(center, (-1, boxes, num_blocks, block))
    start, length = ops.expand_dims(start, 3), ops.expand_dims(length, 3)  # (B, n, 1, 1)
    spread = ops.maximum(length / size, 1.0) if antialias else 1.0
    first = ops.minimum(center[..., :1], center[..., -1:]) - REACH[kernel] * spread
    first = ops.clip(ops.floor(start + first), 0.0, float(height - window))
    row = first + ops.arange(window, dtype="float32")  # (B, n, blocks, window)
    weights = kernel_weights(row + 0.5 - start, center, length, size, kernel, antialias)
    row = ops.cast(row, "int32") + height * ops.reshape(ops.arange(batch), (-1, 1, 1, 1))
    windows = ops.take(ops.reshape(images, (-1, rest)), ops.reshape(row, (-1,)), axis=0)
    weights = ops.reshape(weights, (-1, block, window))
    x = ops.matmul(weights, ops.reshape(windows, (-1, window, rest)))
    return ops.reshape(x, (-1, num_blocks * block, rest))[:, :size]


def to_planes(x):
    """`(N, S, C, S)` to a list of `(N, S, S)`: red, green, blue. Else to `[(N, S, C*S)]`.

    With the channels in separate arrays, every colour operation reads and writes at the same
    place, which XLA can fuse; slices of a common array make it compute (and compile) the same
    chain again for each channel.
    """
    _, height, channels, width = x.shape
    if channels == 3:
        return [x[:, :, channel] for channel in range(3)]
    return [ops.reshape(x, (-1, height, channels * width))]


def from_planes(planes, channels):
    if len(planes) == 3:
        return ops.stack(planes, axis=2)
    _, height, width = planes[0].shape
    return ops.reshape(planes[0], (-1, height, channels, width // channels))


def luminance(planes):
    """Luma of RGB planes `(N, S, S)`. Other images have no colour: their values as they are."""
    if len(planes) != 3:
        return planes[0]
    return LUMA[0] * planes[0] + LUMA[1] * planes[1] + LUMA[2] * planes[2]


def tone_orders():
    """What each of six steps does in each of the 24 orders of the colour operations.

    Hue always comes between step 2 and step 3. An order fills the steps before and after it
    with brightness, contrast and saturation, and leaves three steps empty.

    Returns:
        float32 array of shape (24, 6, 3), one-hot, or zero for an empty step.
    """
    hue, empty = 3, 4
    steps = []
    for order in itertools.permutations(range(4)):
        position = order.index(hue)
        before, after = order[:position], order[position + 1 :]
        pad = [empty] * 3
        steps.append([*before, *pad][:3] + [*after, *pad][:3])
    return np.eye(5, 3, dtype="float32")[np.array(steps)]


TONE_ORDERS = tone_orders()


def resize(images, size):
    """Antialiased bicubic resize of `(B, H, W, C)`.

    Equal to `keras.ops.image.resize`, which XLA cannot compile under TensorFlow.
    """
    for axis, product in ((1, "yh,bhwc->bywc"), (2, "xw,bhwc->bhxc")):
        old, new = images.shape[axis], size[axis - 1]
        if old != new:
            start, length = ops.zeros((1, 1), "float32"), ops.full((1, 1), old, "float32")
            weights = resampling_weights(start, length, new, old, cubic_kernel, antialias=True)
            images = ops.einsum(product, weights[0], images)
    return images


def jitter_colors(planes, draws, strength, applied):
    """Brightness, contrast, saturation and hue in an order drawn for each crop.

    Brightness, contrast and saturation are each `factor * x + (1 - factor) * other`, with 0,
    the mean luminance and the luminance as `other`, so one step does any of them. Hue, the
    expensive one, is computed once. Values are clipped to 0-1 after each.

    Args:
        planes: Crops in 0-1 as `to_planes` gives them. Without RGB, saturation and hue are
            left out.
        draws: Dict with uniform numbers `"factors"` `(N, 4)` and `"order"` `(N, 1)`.
        strength: The four numbers of `MultiCrop`'s `color_jitter`.
        applied: Booleans `(N, 1)`: which crops to change.

    Returns:
        List of planes.
    """
    if len(planes) != 3:
        strength = (*strength[:2], 0.0, 0.0)
    low = [max(0.0, 1.0 - s) for s in strength[:3]] + [-strength[3]]
    high = [1.0 + s for s in strength[:3]] + [strength[3]]
    low, high = (ops.convert_to_tensor(bound, "float32") for bound in (low, high))
    neutral = ops.convert_to_tensor([1.0, 1.0, 1.0, 0.0], "float32")
    factors = ops.where(applied, low + (high - low) * draws["factors"], neutral)
    order = ops.cast(ops.reshape(draws["order"], (-1,)) * len(TONE_ORDERS), "int32")
    steps = ops.take(ops.convert_to_tensor(TONE_ORDERS), order, axis=0)  # (N, 6, 3)
    changes = steps * (ops.expand_dims(factors[:, :3], 1) - 1.0)
    changes = ops.reshape(ops.transpose(changes, (1, 2, 0)), (6, 3, -1, 1, 1))
    for step in range(6):
        if step == 3 and strength[3] > 0:
            planes = rotate_hue(planes, ops.reshape(factors[:, 3], (-1, 1, 1)))
        planes = change_tone(planes, changes[step])
    return planes


def change_tone(planes, changes):
    """Changes by `factor - 1` `(3, N, 1, 1)` of brightness, contrast, saturation; two are 0."""
    contrast, saturation = changes[1], changes[2]
    gray = luminance(planes)
    other = saturation * gray + contrast * ops.mean(gray, axis=(1, 2), keepdims=True)
    factor = 1.0 + ops.sum(changes, axis=0)
    return [ops.clip(factor * plane - other, 0.0, 1.0) for plane in planes]


def rotate_hue(planes, turns):
    """Rotates the hue of RGB planes by `turns` `(N, 1, 1)` of the colour circle."""
    red, green, blue = planes
    brightest = ops.maximum(ops.maximum(red, green), blue)
    darkest = ops.minimum(ops.minimum(red, green), blue)
    chroma = brightest - darkest
    # Hue is 0 and 6 at red, 2 at green and 4 at blue. Its distance from 3 is 2 + red - green -
    # blue, of channels stretched to 0-1; green and blue say on which side of 3 it is.
    side = 2.0 * at_least(blue, green) - 1.0
    distance = ((red - green) + (darkest - blue)) / ops.maximum(chroma, 1e-12) + 2.0
    hue = side * distance + (6.0 * turns + 3.0)
    hue = hue - 6.0 * ops.floor(hue * (1.0 / 6.0))
    ramps = ops.abs(hue - 3.0) - 1.0, 2.0 - ops.abs(hue - 2.0), 2.0 - ops.abs(hue - 4.0)
    return [darkest + chroma * ops.clip(ramp, 0.0, 1.0) for ramp in ramps]


def at_least(x, bound):
    """1.0 where `x >= bound`, else 0.0."""
    return ops.stop_gradient(ops.clip((x - bound) * STEEP + 1.0, 0.0, 1.0))


def solarize(x, threshold, applied):
    """Inverts values of at least `threshold` in the crops that are `applied` `(N, 1)`."""
    inverted = at_least(x, threshold) * per_crop(ops.cast(applied, "float32"))
    return inverted * (1.0 - 2.0 * x) + x


def to_gray(planes, applied):
    """RGB planes without colour in the crops that are `applied` `(N, 1)`."""
    share = ops.expand_dims(ops.cast(applied, "float32"), 2)
    gray = share * luminance(planes)
    return [gray + (1.0 - share) * plane for plane in planes]


def blur(x, sigma, kernel_size, applied):
    """Gaussian blur of crops `(N, h, C, w)`, mirrored at the edges; `sigma` is `(N, 1)` pixels.

    Crops that are not `applied` `(N, 1)` stay as they are.
    """
    radius = kernel_size // 2
    distances = ops.arange(radius + 1, dtype="float32")
    kernel = ops.exp(-0.5 * ops.square(distances / sigma))  # (N, radius + 1)
    kernel = ops.where(applied, kernel, ops.cast(distances == 0.0, "float32"))
    kernel = kernel / (2.0 * ops.sum(kernel, axis=1, keepdims=True) - kernel[:, :1])

    def weights(size):  # (N, size, size): all of a row's weights, most of them 0
        bands = ops.convert_to_tensor(mirrored_bands(size, radius))
        return ops.reshape(ops.matmul(kernel, bands), (-1, size, size))

    _, height, channels, width = x.shape
    x = ops.matmul(weights(height), ops.reshape(x, (-1, height, channels * width)))
    x = ops.reshape(x, (-1, height * channels, width))
    x = ops.matmul(x, ops.transpose(weights(width), (0, 2, 1)))
    return ops.reshape(x, (-1, height, channels, width))


@functools.cache
def mirrored_bands(size, radius):
    """Which pixel each output pixel reads at each distance, `(radius + 1, size * size)` counts.

    Pixels beyond an edge are those before it, the edge itself not repeated.
    """
    bands = np.zeros((radius + 1, size, size), "float32")
    for shift in range(-radius, radius + 1):
        for row in range(size):
            column = abs(row + shift)
            bands[abs(shift), row, min(column, 2 * (size - 1) - column)] += 1.0
    return bands.reshape(radius + 1, -1)
