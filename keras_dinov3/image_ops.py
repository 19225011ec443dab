"""Crop, colour and blur as pure functions of arrays: the steps of `MultiCrop`.

Every step is arithmetic on whole arrays, so the same code runs eagerly, compiled and
differentiated on each backend. Cropping and blurring are matrix products. Crops are kept as
`(N, S, C, S)`, that is, crop, row, channel, column: both products are then plain batched
matrix products, and each channel of a row is contiguous.
"""

import functools
import itertools
import math

import keras
import numpy as np
from keras import ops

from keras_dinov3 import backend

LUMA = (0.2989, 0.587, 0.114)  # ITU-R 601-2, as in Pillow and torchvision


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
    start, length = ops.expand_dims(start, 2), ops.expand_dims(length, 2)
    step = length / size
    center = step * (ops.reshape(ops.arange(size, dtype="float32"), (1, size, 1)) + 0.5)
    if flip is not None:
        center = ops.where(ops.expand_dims(flip, 2), length - center, center)
    pixel = ops.cast(ops.arange(input_size), "float32") + 0.5 - start  # (N, 1, input_size)
    inside = ops.logical_and(pixel > 0.0, pixel < length)
    spread = ops.maximum(step, 1.0) if antialias else 1.0
    distance = pixel / spread - center / spread  # (N, size, input_size)
    weights = kernel(distance) * ops.cast(inside, "float32")
    return weights / ops.sum(weights, axis=2, keepdims=True)


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
    for step in range(6):
        if step == 3 and strength[3] > 0:
            planes = rotate_hue(planes, ops.reshape(factors[:, 3], (-1, 1, 1)))
        change = [ops.reshape(changes[:, step, i], (-1, 1, 1)) for i in range(3)]
        planes = change_tone(planes, *change)
    return planes


def change_tone(planes, brightness, contrast, saturation):
    """Changes by `factor - 1` of brightness, contrast or saturation; two of them are 0."""
    factor = 1.0 + (brightness + contrast + saturation)
    gray = luminance(planes)
    other = contrast * ops.mean(gray, axis=(1, 2), keepdims=True) + saturation * gray
    return [ops.clip(factor * plane - other, 0.0, 1.0) for plane in planes]


def rotate_hue(planes, turns):
    """Rotates the hue of RGB planes by `turns` `(N, 1, 1)` of the colour circle."""
    red, green, blue = planes
    brightest = ops.maximum(ops.maximum(red, green), blue)
    darkest = ops.minimum(ops.minimum(red, green), blue)
    chroma = brightest - darkest
    sixth = 1.0 / ops.where(chroma > 0.0, chroma, 1.0)
    hue = ops.where(
        brightest == red,
        (green - blue) * sixth,
        ops.where(brightest == green, (blue - red) * sixth + 2.0, (red - green) * sixth + 4.0),
    )
    hue = hue + 6.0 * turns
    hue = hue - 6.0 * ops.floor(hue / 6.0)  # 0 and 6: red, 2: green, 4: blue
    ramps = ops.abs(hue - 3.0) - 1.0, 2.0 - ops.abs(hue - 2.0), 2.0 - ops.abs(hue - 4.0)
    return [darkest + chroma * ops.clip(ramp, 0.0, 1.0) for ramp in ramps]


@functools.cache
def mirrored_taps(size, radius):
    """`[t, i, j]`: how often pixel `j` is at distance `t` from pixel `i`, mirrored at the edges.

    Returns:
        float32 array of shape `(radius + 1, size, size)`.
    """
    mirrored = np.pad(np.arange(size), radius, mode="reflect")
    offsets = np.arange(-radius, radius + 1)
    neighbors = mirrored[np.arange(size)[:, None] + offsets + radius]  # (size, offsets)
    is_neighbor = np.eye(size, dtype="float32")[neighbors]  # (size, offsets, size)
    at_distance = np.eye(radius + 1, dtype="float32")[abs(offsets)]  # (offsets, radius + 1)
    return np.einsum("ot,ioj->tij", at_distance, is_neighbor)


def blur(x, sigma, kernel_size, applied):
    """Gaussian blur of crops `(N, S, C, S)`, mirrored at the edges; `sigma` is `(N, 1)` pixels.

    Crops that are not `applied` `(N, 1)` pass through an identity matrix.
    """
    _, height, channels, width = x.shape
    radius = kernel_size // 2
    distances = ops.arange(radius + 1, dtype="float32")
    kernel = ops.exp(-0.5 * ops.square(distances / sigma))  # (N, radius + 1)
    kernel = ops.where(applied, kernel, ops.cast(distances == 0.0, "float32"))
    kernel = kernel / (2.0 * ops.sum(kernel, axis=1, keepdims=True) - kernel[:, :1])

    def weights(size):
        taps = ops.convert_to_tensor(mirrored_taps(size, radius))
        products = ops.matmul(kernel, ops.reshape(taps, (radius + 1, size * size)))
        return ops.reshape(products, (-1, size, size))

    x = ops.matmul(weights(height), ops.reshape(x, (-1, height, channels * width)))
    x = ops.reshape(x, (-1, height * channels, width))
    x = ops.matmul(x, ops.swapaxes(weights(width), 1, 2))
    return ops.reshape(x, (-1, height, channels, width))
