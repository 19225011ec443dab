"""`MultiCrop` against Pillow, against slow loops, and against its probabilities."""

import colorsys
import itertools
import math
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from golden import close, numpy, value_and_gradients
from keras import ops
from PIL import Image

from keras_dinov3 import image_ops
from keras_dinov3.augment import IMAGENET_MEAN, IMAGENET_STD, MultiCrop, split_draws

PLAIN = {  # crop and resize only
    "flip_probability": 0.0,
    "color_jitter_probability": 0.0,
    "grayscale_probability": 0.0,
    "global_blur_probability": 0.0,
    "local_blur_probability": 0.0,
    "global_solarize_probability": 0.0,
    "mean": 0.0,
    "std": 1.0,
}
RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (2, 30, 44, 3), dtype="uint8")  # each axis its own length


def tensor(x):
    return ops.convert_to_tensor(np.asarray(x, "float32"))


def rewind(layer, seed=None):
    """Starts the layer's random sequence again. Cheaper than a new layer: JAX keeps its code."""
    state = [layer.seed if seed is None else seed, 0]
    layer.seed_generator.state.assign(np.array(state, "int32"))


def pillow_resize(plane, box, size, interpolation):
    """One channel in float mode: `(top, left, height, width)` cut out, then resized."""
    top, left, height, width = box
    method = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
    part = Image.fromarray(np.asarray(plane[top : top + height, left : left + width], "float32"))
    return np.asarray(part.resize((size[1], size[0]), method[interpolation]))


def crop_with_weights(plane, box, interpolation, antialias=True, flip=False):
    top, left, height, width = (tensor([[value]]) for value in box)
    kernel = image_ops.KERNELS[interpolation]
    shape = plane.shape
    rows = image_ops.resampling_weights(top, height, SIZE[0], shape[0], kernel, antialias)
    columns = image_ops.resampling_weights(
        left, width, SIZE[1], shape[1], kernel, antialias, ops.convert_to_tensor([[flip]])
    )
    return numpy(rows)[0] @ plane @ numpy(columns)[0].T


SIZE = (13, 17)
BOXES = [  # (top, left, height, width) on an image of 30 x 44
    (0, 0, 30, 44),  # the whole image, made smaller
    (4, 7, 21, 30),
    (9, 30, 6, 8),  # made larger
    (2, 3, 25, 7),  # smaller in one direction, larger in the other
    (29, 43, 1, 1),  # a single pixel
]


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_resampling_equals_pillow(interpolation):
    plane = RNG.random((30, 44)).astype("float32")
    for box in BOXES:
        expected = pillow_resize(plane, box, SIZE, interpolation)
        close(crop_with_weights(plane, box, interpolation), expected, 0, 5e-6, box)
        flipped = crop_with_weights(plane, box, interpolation, flip=True)
        close(flipped, expected[:, ::-1], 0, 5e-6, box)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_resampling_without_antialias(interpolation):
    def kernel(t):
        t = abs(t)
        if interpolation == "bilinear":
            return max(0.0, 1 - t)
        if t < 1:
            return 1.5 * t**3 - 2.5 * t**2 + 1
        return -0.5 * t**3 + 2.5 * t**2 - 4 * t + 2 if t < 2 else 0.0

    def weights(start, length, size, input_size):
        matrix = np.zeros((size, input_size))
        for i in range(size):
            center = (i + 0.5) * length / size - 0.5
            for j in range(length):
                matrix[i, start + j] = kernel(center - j)
        return matrix / matrix.sum(axis=1, keepdims=True)

    plane = RNG.random((30, 44)).astype("float32")
    for box in BOXES:
        rows = weights(box[0], box[2], SIZE[0], 30)
        columns = weights(box[1], box[3], SIZE[1], 44)
        actual = crop_with_weights(plane, box, interpolation, antialias=False)
        close(actual, rows @ plane @ columns.T, 0, 5e-6, box)
    antialiased = crop_with_weights(plane, BOXES[0], interpolation)
    assert (
        np.abs(antialiased - crop_with_weights(plane, BOXES[0], interpolation, False)).max() > 0.1
    )


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("height, size", [(230, 70), (90, 100), (230, 13)])
def test_windows_hold_every_pixel_that_counts(height, size, interpolation, antialias):
    """Equal to the whole matrices, for boxes as long as `longest` allows, at every edge."""
    longest = height // 2
    start = [[0, height - longest, 17, height - 1], [1, height - 2, 40, 5]]
    length = [[longest, longest, longest // 3, 1], [longest - 1, 2, longest, 31]]
    flip = np.array([[False, True, True, False], [True, False, True, True]])
    images = RNG.random((2, height, 3)).astype("float32")
    start, length, flip = (x[..., None] for x in (tensor(start), tensor(length), flip))
    kernel = image_ops.KERNELS[interpolation]
    how = {"kernel": kernel, "antialias": antialias, "flip": ops.convert_to_tensor(flip)}
    actual = image_ops.cut_and_resize(tensor(images), start, length, size, longest, **how)
    flat = [ops.reshape(x, (-1, 1)) for x in (start, length, how.pop("flip"))]
    weights = numpy(
        image_ops.resampling_weights(*flat[:2], size, height, **how, flip=flat[2])
    ).reshape(2, 4 * size, height)
    close(actual, (weights @ images).reshape(8, size, 3), 0, 5e-6)


@pytest.mark.parametrize("height, width", [(30, 44), (100, 7), (9, 80), (300, 200)])
def test_no_box_is_longer_than_stated(height, width):
    draws = {name: tensor(draw) for name, draw in random_draws(500).items()}
    for scale, ratio in (((0.05, 0.32), (3 / 4, 4 / 3)), ((0.3, 1.0), (0.5, 0.7))):
        boxes = image_ops.random_boxes(draws, height, width, scale, ratio)
        longest = image_ops.longest_sides(height, width, scale, ratio)
        for side, bound, whole in zip(boxes[2:], longest, (height, width), strict=True):
            assert numpy(side).max() <= bound <= whole
    assert image_ops.longest_sides(None, width, scale, ratio) == (None, None)


def test_solarize_and_gray_act_on_their_crops_alone():
    x = RNG.random((3, 4, 3, 5)).astype("float32")
    x[:, 0, 0, 0] = 0.4  # the threshold itself is inverted
    applied = np.array([[True], [False], [True]])
    expected = np.where(applied[..., None, None] & (x >= np.float32(0.4)), 1 - x, x)
    actual = image_ops.solarize(tensor(x), 0.4, ops.convert_to_tensor(applied))
    close(actual, expected, 0, 1e-6)
    planes = image_ops.to_gray(image_ops.to_planes(tensor(x)), ops.convert_to_tensor(applied))
    actual = numpy(image_ops.from_planes(planes, 3))
    expected = np.repeat(gray_by_loop(x.transpose(0, 1, 3, 2))[:, :, None], 3, axis=2)
    np.testing.assert_array_equal(actual[1], x[1])
    close(actual[::2], expected[::2], 0, 1e-6)
    assert np.ptp(actual[::2], axis=2).max() == 0


def box_by_loop(draws, height, width, scale, ratio):
    """torchvision's rule for one crop, in float32 as the layer computes it."""
    f = np.float32
    for u_area, u_ratio in zip(draws["area"], draws["aspect_ratio"], strict=True):
        area = f(height * width) * (f(scale[0]) + f(scale[1] - scale[0]) * u_area)
        log_ratio = f(math.log(ratio[0])) + f(math.log(ratio[1] / ratio[0])) * u_ratio
        box_width = int(np.round(np.sqrt(area * np.exp(log_ratio))))
        box_height = int(np.round(np.sqrt(area * np.exp(-log_ratio))))
        if 0 < box_width <= width and 0 < box_height <= height:
            top = int(draws["position"][0] * (height - box_height + 1))
            left = int(draws["position"][1] * (width - box_width + 1))
            return top, left, box_height, box_width
    box_height, box_width = height, width
    if width / height < ratio[0]:
        box_height = round(width / ratio[0])
    elif width / height > ratio[1]:
        box_width = round(height * ratio[1])
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width


def random_draws(count):
    return numbers_by_name(MultiCrop(seed=0)._draw(count))


def numbers_by_name(draws):
    return {name: numpy(draw) for name, draw in split_draws(draws).items()}


@pytest.mark.parametrize("height, width", [(30, 44), (100, 7), (9, 80), (1, 1), (2, 3)])
def test_boxes_follow_the_rule_of_random_resized_crop(height, width):
    scale, ratio, count = (0.2, 1.0), (3 / 4, 4 / 3), 200
    draws = random_draws(count)
    boxes = image_ops.random_boxes(
        {name: tensor(draw) for name, draw in draws.items()}, height, width, scale, ratio
    )
    actual = np.concatenate([numpy(side) for side in boxes], axis=1)
    expected = [
        box_by_loop({name: draw[i] for name, draw in draws.items()}, height, width, scale, ratio)
        for i in range(count)
    ]
    # a square root one rounding error beside k + 0.5 may round the other way
    assert np.mean(np.all(actual == np.array(expected), axis=1)) >= 0.99
    top, left, box_height, box_width = actual.T
    assert np.all((top >= 0) & (left >= 0) & (box_height > 0) & (box_width > 0))
    assert np.all((top + box_height <= height) & (left + box_width <= width))


def test_boxes_are_distributed_as_stated():
    scale, ratio, side, count = (0.1, 0.5), (1 / 2, 2.0), 1000, 4000
    draws = {name: tensor(draw) for name, draw in random_draws(count).items()}
    boxes = image_ops.random_boxes(draws, side, side, scale, ratio)
    top, left, height, width = (numpy(x)[:, 0] for x in boxes)
    uniform = np.linspace(0, 1, count)

    def check_uniform(values, what):  # Kolmogorov-Smirnov: 1.95 / sqrt(n) is p = 0.001
        distance = np.abs(np.sort(values) - uniform).max()
        assert distance < 1.95 / math.sqrt(count), (what, distance)

    check_uniform((height * width / side**2 - scale[0]) / (scale[1] - scale[0]), "area")
    check_uniform(np.log(width / height) / math.log(4) + 0.5, "log aspect ratio")
    check_uniform(top / (side - height), "top")
    check_uniform(left / (side - width), "left")
    assert abs(np.corrcoef(top / (side - height), left / (side - width))[0, 1]) < 0.06


def gray_by_loop(rgb):
    return 0.2989 * rgb[..., 0] + 0.587 * rgb[..., 1] + 0.114 * rgb[..., 2]


def adjust_by_loop(rgb, name, factor):
    """torchvision's four colour operations on one `(H, W, 3)` image in 0-1."""
    if name == "hue":
        out = np.empty_like(rgb)
        for index in np.ndindex(rgb.shape[:2]):
            hue, saturation, value = colorsys.rgb_to_hsv(*rgb[index])
            out[index] = colorsys.hsv_to_rgb((hue + factor) % 1.0, saturation, value)
        return out
    gray = gray_by_loop(rgb)[..., None]
    other = {"brightness": 0.0, "contrast": gray.mean(), "saturation": gray}[name]
    return np.clip(factor * rgb + (1 - factor) * other, 0, 1)


def jitter_by_loop(rgb, factors, order):
    for name in order:
        rgb = adjust_by_loop(rgb, name, factors[name])
    return rgb


NAMES = ("brightness", "contrast", "saturation", "hue")
ORDERS = list(itertools.permutations(NAMES))


def factors_by_loop(draws, strength):
    low = [max(0, 1 - s) for s in strength[:3]] + [-strength[3]]
    high = [1 + s for s in strength[:3]] + [strength[3]]
    values = (lo + (hi - lo) * u for lo, hi, u in zip(low, high, draws, strict=True))
    return dict(zip(NAMES, values, strict=True))


def test_jitter_equals_loops_in_each_of_the_24_orders():
    """`order` is uniform in [0, 1): order k of 24 gets the numbers from k/24 to (k+1)/24."""
    strength = (0.9, 0.8, 1.5, 0.5)  # so strong that every step clips
    rng = np.random.default_rng(3)  # its own: with other factors, two orders may be much alike
    count, height, width = 25, 4, 6
    rgb = rng.random((count, height, width, 3))
    rgb[:, 0, 0] = 0.5  # no hue
    rgb[:, 0, 1] = (1.0, 1.0, 0.0)  # two largest
    factors = rng.random((count, 4))
    order = (np.arange(count) % 24 + rng.random(count)) / 24
    applied = np.arange(count) < 24  # the last one stays as it is
    planes = image_ops.to_planes(tensor(rgb.transpose(0, 1, 3, 2)))
    draws = {"factors": tensor(factors), "order": tensor(order[:, None])}
    planes = image_ops.jitter_colors(
        planes, draws, strength, ops.convert_to_tensor(applied[:, None])
    )
    actual = numpy(image_ops.from_planes(planes, 3)).transpose(0, 1, 3, 2)
    results = [
        jitter_by_loop(rgb[i], factors_by_loop(factors[i], strength), ORDERS[i]) for i in range(24)
    ]
    close(actual[:24], np.stack(results), 0, 2e-5)
    close(actual[24], rgb[24], 0, 1e-6)
    swapped = jitter_by_loop(rgb[0], factors_by_loop(factors[0], strength), ORDERS[1])
    assert np.abs(swapped - results[0]).max() > 1e-2  # the order matters


def test_hue_rotation_of_every_corner_and_edge():
    values = [0.0, 0.25, 1.0]
    rgb = np.array(list(itertools.product(values, repeat=3)))[None]  # (1, 27, 3)
    for turns in (-0.5, -0.1, 0.0, 1 / 6, 0.37):
        planes = image_ops.to_planes(tensor(rgb.transpose(0, 2, 1)[:, None]))
        rotated = image_ops.rotate_hue(planes, tensor([[[turns]]]))
        expected = adjust_by_loop(rgb, "hue", turns)
        close(numpy(ops.stack(rotated, axis=-1))[0], expected, 0, 2e-6, turns)


def blur_by_loop(image, sigma, kernel_size):
    """`(H, W, C)`: a two-dimensional Gaussian over a mirrored image."""
    radius = kernel_size // 2
    taps = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    kernel = np.outer(taps, taps) / taps.sum() ** 2
    padded = np.pad(image, [(radius, radius), (radius, radius), (0, 0)], mode="reflect")
    out = np.zeros_like(image)
    for y, x in np.ndindex(image.shape[:2]):
        window = padded[y : y + kernel_size, x : x + kernel_size]
        out[y, x] = (window * kernel[..., None]).sum(axis=(0, 1))
    return out


@pytest.mark.parametrize("kernel_size", [1, 5, 9])
def test_blur_equals_loops(kernel_size):
    images = RNG.random((4, 5, 11, 2))  # 5 rows: mirrored from both edges at once
    sigma, applied = np.array([0.1, 0.7, 2.0, 5.0]), np.array([True, True, False, True])
    actual = image_ops.blur(
        tensor(images.transpose(0, 1, 3, 2)),
        tensor(sigma[:, None]),
        kernel_size,
        ops.convert_to_tensor(applied[:, None]),
    )
    expected = [
        blur_by_loop(x, s, kernel_size) if a else x
        for x, s, a in zip(images, sigma, applied, strict=True)
    ]
    close(numpy(actual).transpose(0, 1, 3, 2), np.stack(expected), 0, 1e-6)


def crops_by_loop(images, draws, count, size, scale, blur, solarize, layer):
    """Everything that happens to a crop, one crop after the other."""
    images = images / 255.0 if images.dtype == "uint8" else images
    batch, height, width, channels = images.shape
    out = np.empty((batch, count, *size, channels))
    for b, v in np.ndindex(batch, count):
        u = {name: draw[b * count + v] for name, draw in draws.items()}
        box = box_by_loop(u, height, width, scale, layer.crop_aspect_ratio)
        planes = [
            pillow_resize(images[b, :, :, c], box, size, layer.interpolation)
            for c in range(channels)
        ]
        x = np.clip(np.stack(planes, axis=-1), 0, 1)
        if u["flip"] < layer.flip_probability:
            x = x[:, ::-1]
        if u["jitter"] < layer.color_jitter_probability:
            factors = factors_by_loop(u["factors"], layer.color_jitter)
            x = jitter_by_loop(x, factors, ORDERS[int(u["order"][0] * 24)])
        if u["grayscale"] < layer.grayscale_probability:
            x = np.repeat(gray_by_loop(x)[..., None], 3, axis=-1)
        if u["blur"] < blur[v]:
            low, high = layer.blur_sigma
            x = blur_by_loop(x, low + (high - low) * u["sigma"][0], layer.blur_kernel_size)
        if u["solarize"] < solarize[v]:
            # a value within rounding of the threshold may fall on either side
            x = np.where(np.abs(x - layer.solarize_threshold) < 1e-5, np.nan, x)
            x = np.where(x >= layer.solarize_threshold, 1 - x, x)
        out[b, v] = (x - IMAGENET_MEAN) / IMAGENET_STD
    return out


def test_the_whole_layer_equals_loops_over_its_crops():
    settings = {
        "num_global_crops": 3,
        "num_local_crops": 4,
        "global_blur_probability": (1.0, 0.3),  # repeated: 1.0, 0.3, 1.0
        "local_blur_probability": (0.2, 0.8, 0.5, 1.0),
        "global_solarize_probability": (0.0, 0.5, 0.9),
        "local_solarize_probability": 0.3,
        "solarize_threshold": 0.4,
        "flip_probability": 0.4,
        "seed": 11,
    }
    layer = MultiCrop((13, 17), 9, **settings)
    crops = layer(IMAGES)
    rewind(layer)
    for name, count, size, scale, blur, solarize in (
        ("global_crops", 3, (13, 17), (0.32, 1.0), (1.0, 0.3, 1.0), (0.0, 0.5, 0.9)),
        ("local_crops", 4, (9, 9), (0.05, 0.32), (0.2, 0.8, 0.5, 1.0), (0.3,) * 4),
    ):
        draws = numbers_by_name(layer._draw(2 * count))
        expected = crops_by_loop(IMAGES, draws, count, size, scale, blur, solarize, layer)
        actual = numpy(crops[name])
        assert actual.dtype == "float32" and np.mean(np.isnan(expected)) < 0.01
        close(np.where(np.isnan(expected), 0, actual), np.nan_to_num(expected), 0, 2e-4, name)


def test_defaults_are_the_reference_recipe():
    layer = MultiCrop()
    assert (layer.global_crop_size, layer.local_crop_size) == (224, 96)
    assert (layer.num_global_crops, layer.num_local_crops) == (2, 8)
    assert (layer.global_crop_scale, layer.local_crop_scale) == ((0.32, 1.0), (0.05, 0.32))
    assert (layer.flip_probability, layer.grayscale_probability) == (0.5, 0.2)
    assert (layer.color_jitter, layer.color_jitter_probability) == ((0.4, 0.4, 0.2, 0.1), 0.8)
    assert (layer.global_blur_probability, layer.local_blur_probability) == ((1.0, 0.1), 0.5)
    assert (layer.blur_sigma, layer.blur_kernel_size) == ((0.1, 2.0), 9)
    assert layer.global_solarize_probability == (0.0, 0.2)
    assert (layer.local_solarize_probability, layer.solarize_threshold) == (0.0, 0.5)
    assert (layer.interpolation, layer.antialias) == ("bicubic", True)


def test_how_often_each_thing_happens_to_each_view():
    """A picture on which each event leaves a trace of its own."""
    batch = 1500
    image = np.zeros((8, 8, 3), "float32")
    image[:, :4] = (0.45, 0.3, 0.2)  # the left half is brighter; nothing reaches 0.5
    image[:, 4:] = (0.2, 0.1, 0.05)
    image[3, 1] = (1.0, 1.0, 1.0)  # a dot: what solarization and blur act on
    common = {
        "global_crop_scale": (1.0, 1.0),
        "local_crop_scale": (1.0, 1.0),
        "crop_aspect_ratio": (1.0, 1.0),
        "blur_sigma": (0.5, 0.5),
        "mean": 0.0,
        "std": 1.0,
        "num_local_crops": 1,
        "color_jitter_probability": 0.0,
    }
    images = np.broadcast_to(image, (batch, *image.shape))
    layer = MultiCrop(8, 8, seed=5, local_solarize_probability=0.3, **common)
    crops = layer(images)
    views = {
        "global 1": numpy(crops["global_crops"])[:, 0],
        "global 2": numpy(crops["global_crops"])[:, 1],
        "local": numpy(crops["local_crops"])[:, 0],
    }
    expected = {  # flip, grayscale, blur, solarize
        "global 1": (0.5, 0.2, 1.0, 0.0),
        "global 2": (0.5, 0.2, 0.1, 0.2),
        "local": (0.5, 0.2, 0.5, 0.3),
    }
    events = {}
    for view, x in views.items():
        dark_corner, bright_corner = x[:, 7, 7].sum(-1), x[:, 7, 0].sum(-1)
        flip = dark_corner > bright_corner
        x = np.where(flip[:, None, None, None], x[:, :, ::-1], x)
        gray = np.ptp(x[:, 7, 0], axis=-1) < 1e-6
        blur = np.abs(x[:, 3, 2] - x[:, 7, 2]).max(-1) > 1e-3  # the dot reaches its neighbor
        # the dot is the brightest pixel, until solarization inverts it
        solarize = x[:, 3, 1].sum(-1) < x[:, 7, 1].sum(-1)
        events[view] = np.stack([flip, gray, blur, solarize], axis=1)
    for view, happened in events.items():
        for name, share, p in zip(
            ("flip", "grayscale", "blur", "solarize"),
            happened.mean(axis=0),
            expected[view],
            strict=True,
        ):
            bound = 4 * math.sqrt(p * (1 - p) / batch)
            assert abs(share - p) <= bound, (view, name, share, p)
    flips = np.stack([happened[:, 0] for happened in events.values()])
    assert np.abs(np.corrcoef(flips) - np.eye(3)).max() < 0.11  # views are independent


def test_how_often_colors_are_jittered_and_how_much():
    batch = 1500
    images = np.full((batch, 4, 4, 3), 0.25, "float32")
    settings = PLAIN | {
        "num_local_crops": 0,
        "color_jitter_probability": 0.8,
        "color_jitter": (0.6, 0.0, 0.0, 0.0),
    }
    crops = MultiCrop(5, 5, seed=2, **settings)(images)["global_crops"]
    for view in range(2):
        factor = numpy(crops)[:, view, 0, 0, 0] / 0.25
        changed = np.abs(factor - 1) > 1e-5
        assert abs(changed.mean() - 0.8) < 4 * math.sqrt(0.16 / batch)
        share = np.sort((factor[changed] - 0.4) / 1.2)  # uniform in 0.4 to 1.6
        distance = np.abs(share - np.linspace(0, 1, len(share))).max()
        assert distance < 1.95 / math.sqrt(len(share))


def test_seeds_and_calls():
    layer = MultiCrop(9, 8, num_global_crops=3, seed=3, **PLAIN | {"num_local_crops": 0})
    assert numpy(layer.seed_generator.state.value).tolist() == [3, 0]
    first, second = (numpy(layer(IMAGES)["global_crops"]) for _ in range(2))
    rewind(layer)
    np.testing.assert_array_equal(numpy(layer(IMAGES)["global_crops"]), first)
    np.testing.assert_array_equal(numpy(layer(IMAGES)["global_crops"]), second)
    rewind(layer, seed=1000)
    other = numpy(layer(IMAGES)["global_crops"])
    crops = np.stack([first, second, other]).reshape(-1, *first.shape[2:])
    for a, b in itertools.combinations(crops, 2):  # also two crops of one image
        assert np.abs(a - b).max() > 0.1


@pytest.mark.parametrize("channels", [1, 5])
def test_other_channel_counts(channels):
    images = RNG.random((2, 20, 30, channels)).astype("float32")
    settings = {"num_local_crops": 0, "global_solarize_probability": 1.0}
    layer = MultiCrop(10, 8, seed=4, **settings)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        crops = layer(images)
        layer(images)
    caught = [str(w.message) for w in caught if "MultiCrop" in str(w.message)]
    assert len(caught) == 1
    assert "saturation, hue, grayscale" in caught[0] and f"{channels} channels" in caught[0]
    assert crops["global_crops"].shape == (2, 2, 10, 10, channels)
    values = numpy(crops["global_crops"]) * 0.25 + 0.5  # the defaults without RGB
    assert values.min() >= -1e-6 and values.max() <= 0.5 + 1e-6  # solarized


def test_brightness_and_contrast_stay_without_rgb():
    images = RNG.random((3, 6, 7, 2))
    factors, order = RNG.random((3, 4)), np.array([0.0, 0.5, 0.99])
    planes = image_ops.to_planes(tensor(images.transpose(0, 1, 3, 2)))
    draws = {"factors": tensor(factors), "order": tensor(order[:, None])}
    applied = ops.ones((3, 1), "bool")
    planes = image_ops.jitter_colors(planes, draws, (0.9, 0.8, 0.7, 0.3), applied)
    actual = numpy(image_ops.from_planes(planes, 2)).transpose(0, 1, 3, 2)
    for i in range(3):
        x, strengths = images[i], factors_by_loop(factors[i], (0.9, 0.8, 0.7, 0.3))
        for name in ORDERS[int(order[i] * 24)]:
            if name in ("brightness", "contrast"):
                other = 0.0 if name == "brightness" else x.mean()
                x = np.clip(strengths[name] * x + (1 - strengths[name]) * other, 0, 1)
        close(actual[i], x, 0, 2e-6, i)


def test_no_warning_where_nothing_is_left_out():
    settings = {"color_jitter": (0.4, 0.4, 0.0, 0.0), "grayscale_probability": 0.0}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        MultiCrop(10, 8, **settings).compute_output_shape((2, 20, 30, 1))
        MultiCrop(10, 8).compute_output_shape((2, 20, 30, 3))


def test_normalize():
    layer = MultiCrop(10, 8)
    expected = (IMAGES / 255.0 - IMAGENET_MEAN) / IMAGENET_STD
    close(layer.normalize(IMAGES), expected, 0, 1e-6)
    close(layer.normalize((IMAGES / 255.0).astype("float32")), expected, 0, 1e-6)
    close(layer.normalize(IMAGES[0, 0]), expected[0, 0], 0, 1e-6)
    assert str(numpy(layer.normalize(ops.cast(IMAGES / 255.0, "float16"))).dtype) == "float32"
    close(layer.normalize(IMAGES[..., :2]), (IMAGES[..., :2] / 255.0 - 0.5) / 0.25, 0, 1e-6)
    own = MultiCrop(10, 8, mean=0.1, std=(1, 2, 4))
    close(own.normalize(IMAGES), (IMAGES / 255.0 - 0.1) / np.array([1, 2, 4]), 0, 1e-6)


def test_uint8_and_float_images_give_the_same_crops():
    layer = MultiCrop(12, 9, num_local_crops=1, seed=3, **PLAIN)
    expected = layer(IMAGES)
    for dtype in ("float32", "float64"):
        rewind(layer)
        crops = layer((IMAGES / 255.0).astype(dtype))
        for name in expected:
            close(crops[name], numpy(expected[name]), 0, 1e-4, (name, dtype))


def test_many_images_at_once_get_the_crops_of_few():
    """Torch makes them in parts; every image keeps its own draws."""
    layer = MultiCrop(64, 40, num_global_crops=3, num_local_crops=2, seed=3)
    images = RNG.integers(0, 256, (9, 70, 80, 3), dtype="uint8")
    crops = layer(images)
    rewind(layer)
    for name, count, size in (("global", 3, (64, 64)), ("local", 2, (40, 40))):
        draws = layer._draw(9 * count)
        few = ops.convert_to_tensor(images[7:])
        expected = layer._crops(few, draws[7 * count :], view=name, size=size)
        close(numpy(crops[f"{name}_crops"])[7:], numpy(expected), 0, 1e-5, name)


def test_no_local_crops():
    crops = MultiCrop(12, (7, 9), num_local_crops=0, **PLAIN)(IMAGES)
    assert tuple(crops["local_crops"].shape) == (2, 0, 7, 9, 3)
    assert tuple(crops["global_crops"].shape) == (2, 2, 12, 12, 3)


def test_symbolic_shapes():
    layer = MultiCrop((12, 14), 9, num_local_crops=3, **PLAIN)
    expected = {"global_crops": (None, 2, 12, 14, 3), "local_crops": (None, 3, 9, 9, 3)}
    assert layer.compute_output_shape((None, 30, 44, 3)) == expected
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        layer = MultiCrop((12, 14), 9, num_local_crops=3, **PLAIN)
        crops = layer(keras.Input((30, 44, 3), dtype="uint8"))
        images = ops.convert_to_tensor((IMAGES / 255.0).astype("float32"))
        actual = layer(images)
    finally:
        keras.config.set_dtype_policy("float32")
    for name, shape in expected.items():
        assert crops[name].shape == shape and crops[name].dtype == "float32"
        assert tuple(actual[name].shape) == (2, *shape[1:])
        assert keras.backend.standardize_dtype(actual[name].dtype) == "float32"


def test_mixed_precision_does_not_round_the_pixels():
    images = RNG.random((2, 20, 20, 3)).astype("float32")
    settings = PLAIN | {"num_local_crops": 0, "seed": 1}
    expected = numpy(MultiCrop(20, 8, **settings)(images)["global_crops"])
    actual = numpy(MultiCrop(20, 8, dtype="mixed_bfloat16", **settings)(images)["global_crops"])
    np.testing.assert_array_equal(actual, expected)


def test_gradient_reaches_every_pixel_with_the_weight_of_its_crops():
    """Plain crops are linear: the gradients of a crop's sum add up to its number of values."""
    layer = MultiCrop(6, 5, num_local_crops=3, seed=1, interpolation="bilinear", **PLAIN)
    images = 0.25 + 0.5 * RNG.random((2, 14, 16, 3)).astype("float32")

    def total(x):
        crops = layer(x)
        return ops.sum(crops["global_crops"]) + ops.sum(crops["local_crops"])

    _, (gradient,) = value_and_gradients(total, images)
    close(gradient.sum(axis=(1, 2, 3)), np.full(2, (2 * 36 + 3 * 25) * 3.0), 1e-5, 0)


def test_gradient_of_all_steps_is_finite():
    layer = MultiCrop(6, 7, num_local_crops=0, seed=1)
    images = RNG.random((2, 14, 16, 3)).astype("float32")
    images[0, :7] = 0.5  # no hue, no chroma

    def total(x):
        return ops.sum(ops.square(layer(x)["global_crops"]))

    _, (gradient,) = value_and_gradients(total, images)
    assert np.all(np.isfinite(gradient)) and np.abs(gradient).max() > 0


def compilers():
    """Ways to compile a layer into a function of images, per engine."""
    backend = keras.config.backend()
    if backend == "jax":
        import jax

        def jit(layer):
            step = jax.jit(lambda state, x: layer.stateless_call([], state, x)[0])
            return lambda x: step([v.value for v in layer.non_trainable_variables], x)

        return [jit]
    if backend == "tensorflow":
        unknown = tf.TensorSpec((None, None, None, 3), "uint8")
        return [
            tf.function,
            lambda layer: tf.function(lambda x: layer(x), input_signature=[unknown]),
        ]
    return [lambda layer: layer]  # torch runs it as it is


def test_compiled_equals_eager():
    settings = {"num_local_crops": 2, "seed": 6}
    expected = MultiCrop(12, 9, **settings)(IMAGES)
    for compiler in compilers():
        actual = compiler(MultiCrop(12, 9, **settings))(ops.convert_to_tensor(IMAGES))
        for name in expected:
            close(actual[name], numpy(expected[name]), 0, 1e-4, name)
    if keras.config.backend() == "tensorflow":  # XLA draws other numbers from the same seed
        layer = MultiCrop(12, 9, **settings)
        images = tf.constant(RNG.random((2, 30, 44, 3)), "float32")
        draws = layer._draw(4)
        step = tf.function(lambda x, u: layer._crops(x, u, "global", (12, 12)), jit_compile=True)
        expected = layer._crops(images, draws, "global", (12, 12))
        close(step(images, draws), numpy(expected), 0, 1e-4)
        crops = tf.function(layer, jit_compile=True)(IMAGES)
        assert crops["local_crops"].shape == (2, 2, 9, 9, 3)


def test_inside_a_model_that_trains():
    inputs = keras.Input((20, 24, 3), dtype="uint8")
    crops = MultiCrop(8, 6, num_local_crops=0, seed=0)(inputs)
    x = ops.mean(crops["global_crops"], axis=(1, 2, 3))
    model = keras.Model(inputs, keras.layers.Dense(2)(x))
    model.compile("sgd", "mse")
    images = RNG.integers(0, 256, (6, 20, 24, 3), dtype="uint8")
    model.fit(images, np.zeros((6, 2)), batch_size=3, epochs=2, verbose=0)
    predictions = [model.predict(images, batch_size=3, verbose=0) for _ in range(2)]
    assert np.all(np.isfinite(predictions)) and np.ptp(predictions, axis=0).max() > 1e-3


def test_tf_data_under_every_backend():
    layer = MultiCrop(12, (9, 7), num_local_crops=3, seed=8, **PLAIN)
    images = RNG.integers(0, 256, (6, 20, 24, 3), dtype="uint8")
    batches = tf.data.Dataset.from_tensor_slices(images).batch(3)
    dataset = batches.map(layer)
    expected_spec = {"global_crops": (None, 2, 12, 12, 3), "local_crops": (None, 3, 9, 7, 3)}
    assert {k: tuple(v.shape) for k, v in dataset.element_spec.items()} == expected_spec
    assert all(v.dtype == tf.float32 for v in dataset.element_spec.values())
    mapped = list(dataset)
    rewind(layer)
    for crops, batch in zip(mapped, batches, strict=True):
        for name, x in layer(batch).items():  # eager TensorFlow tensors, on every backend
            close(crops[name], numpy(x), 0, 1e-4, name)


def test_tf_data_in_parallel_gives_every_batch_its_own_crops():
    settings = PLAIN | {"num_local_crops": 0, "seed": 8, "flip_probability": 0.5}
    images = RNG.random((1, 20, 24, 3)).astype("float32")
    dataset = tf.data.Dataset.from_tensors(images).repeat(24)
    dataset = dataset.map(MultiCrop(8, 6, **settings), num_parallel_calls=4)
    crops = np.stack([x["global_crops"] for x in dataset])
    assert crops.shape == (24, 1, 2, 8, 8, 3) and np.all(np.isfinite(crops))
    # TensorFlow may give calls of the same moment the same numbers
    fewest = 6 if keras.config.backend() == "tensorflow" else 24
    assert len({x.tobytes() for x in crops}) >= fewest


def test_tf_data_errors_come_when_the_pipeline_is_built():
    dataset = tf.data.Dataset.from_tensors(IMAGES.astype("int32"))
    with pytest.raises(ValueError, match="uint8"):
        dataset.map(MultiCrop(12, 9))
    with pytest.raises(ValueError, match=r"\(B, H, W, C\)"):
        tf.data.Dataset.from_tensor_slices(IMAGES).map(MultiCrop(12, 9))


def test_values_from_0_to_255_are_found_wherever_they_come():
    layer = MultiCrop(12, 9, **PLAIN)
    images = RNG.uniform(0, 255, (2, 20, 24, 3)).astype("float32")
    for tensor in (ops.convert_to_tensor(images), tf.constant(images)):
        with pytest.raises(ValueError, match=r"from 0 to 1.*divide by 255.*Received: values from"):
            layer(tensor)
    dataset = tf.data.Dataset.from_tensors(images).map(layer)
    with pytest.raises(tf.errors.OpError, match="divide by 255"):
        next(iter(dataset))


def test_config_round_trip():
    settings = {
        "global_crop_size": (12, 14),
        "local_crop_size": 7,
        "num_global_crops": 3,
        "num_local_crops": 1,
        "global_crop_scale": (0.4, 0.9),
        "local_crop_scale": (0.1, 0.2),
        "crop_aspect_ratio": (0.5, 1.5),
        "interpolation": "bilinear",
        "antialias": False,
        "flip_probability": 0.1,
        "color_jitter": (0.1, 0.2, 0.3, 0.05),
        "color_jitter_probability": 0.7,
        "grayscale_probability": 0.3,
        "global_blur_probability": (0.1, 0.2, 0.3),
        "local_blur_probability": 0.4,
        "blur_sigma": (0.2, 1.0),
        "blur_kernel_size": 5,
        "global_solarize_probability": 0.6,
        "local_solarize_probability": 0.5,
        "solarize_threshold": 0.7,
        "mean": (0.1, 0.2, 0.3),
        "std": 0.4,
        "seed": 12,
    }
    layer = MultiCrop(**settings, name="crops")
    for name, value in settings.items():
        assert getattr(layer, name) == value
    config = keras.saving.serialize_keras_object(layer)
    copy = keras.saving.deserialize_keras_object(config)
    assert copy.get_config() == layer.get_config() and copy.name == "crops"
    for name, value in settings.items():
        assert copy.get_config()[name] == value
    defaults = MultiCrop().get_config()
    assert all(defaults[name] != value for name, value in settings.items())


@pytest.mark.parametrize(
    "name, value",
    [
        ("global_crop_size", 0),
        ("global_crop_size", (12, 0)),
        ("local_crop_size", 7.5),
        ("local_crop_size", (4, 5, 6)),
        ("num_global_crops", 0),
        ("num_local_crops", -1),
        ("global_crop_scale", (0.0, 1.0)),
        ("global_crop_scale", (0.5, 1.1)),
        ("local_crop_scale", (0.3, 0.2)),
        ("local_crop_scale", 0.3),
        ("crop_aspect_ratio", (0.0, 1.0)),
        ("crop_aspect_ratio", (2.0, 1.0)),
        ("interpolation", "nearest"),
        ("flip_probability", 1.1),
        ("color_jitter_probability", -0.1),
        ("grayscale_probability", (0.1, 0.2)),
        ("global_blur_probability", (0.1, 1.2)),
        ("global_blur_probability", ()),
        ("local_blur_probability", "often"),
        ("global_solarize_probability", float("nan")),
        ("local_solarize_probability", None),
        ("solarize_threshold", 128),
        ("color_jitter", (0.4, 0.4, 0.2)),
        ("color_jitter", (-0.1, 0.4, 0.2, 0.1)),
        ("color_jitter", (0.4, 0.4, 0.2, 0.6)),
        ("blur_sigma", (0.0, 2.0)),
        ("blur_kernel_size", 8),
        ("mean", "imagenet"),
        ("std", 0.0),
        ("std", (1.0, 1.0, -1.0)),
    ],
)
def test_wrong_arguments_are_named(name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be .*Received: {name}="):
        MultiCrop(**{name: value})


def test_crop_smaller_than_the_blur():
    with pytest.raises(ValueError, match="`local_crop_size` .*Largest kernel that fits: 7"):
        MultiCrop(local_crop_size=4)
    MultiCrop(local_crop_size=4, blur_kernel_size=7)
    MultiCrop(local_crop_size=4, local_blur_probability=0)


@pytest.mark.parametrize(
    "images, message",
    [
        (IMAGES[0], r"\(B, H, W, C\).*images\[None\]"),
        (IMAGES[None], r"\(B, H, W, C\)"),
        (IMAGES.astype("int32"), "uint8.*Received: dtype int32.*Cast to uint8"),
        (IMAGES.astype("float32"), "from 0 to 1.*divide by 255"),
        (IMAGES / 255.0 - 1.0, "from 0 to 1"),
    ],
)
def test_wrong_images_are_named(images, message):
    with pytest.raises(ValueError, match=message):
        MultiCrop(12, 9)(images)


def test_mean_and_std_must_fit_the_channels():
    with pytest.raises(ValueError, match="`mean` must be one number or one per channel"):
        MultiCrop(12, 9, mean=(0.5, 0.5))(IMAGES)
    with pytest.raises(ValueError, match="`std` must be one number or one per channel"):
        MultiCrop(12, 9, std=(0.5, 0.5)).normalize(IMAGES)


def test_crops_for_a_gram_teacher_are_the_same_boxes_undistorted():
    settings = {"global_crop_size": (12, 18), "local_crop_size": (10, 11), "num_local_crops": 3}
    layer = MultiCrop(**settings, mean=0.5, std=0.25, seed=3)
    expected = layer(IMAGES)
    rewind(layer)
    found = layer(IMAGES, gram_scale=2)
    assert found["gram_crops"].shape == (2, 2, 24, 36, 3)
    for name, crops in expected.items():  # nothing else is drawn
        np.testing.assert_array_equal(numpy(found[name]), numpy(crops))
    # The same boxes and flips: without distortion, at the same size, they are the global crops.
    plain = MultiCrop(**settings, **{**PLAIN, "flip_probability": 0.5, "mean": 0.5, "std": 0.25})
    plain.seed_generator.state.assign(np.array([3, 0], "int32"))
    undistorted = plain(IMAGES, gram_scale=1)
    close(undistorted["gram_crops"], numpy(undistorted["global_crops"]), 0, 1e-6)
    rewind(layer)
    same_size = layer(IMAGES, gram_scale=1)
    close(same_size["gram_crops"], numpy(undistorted["gram_crops"]), 0, 1e-6)
    with pytest.raises(ValueError, match="`gram_scale` must be a positive number"):
        layer(IMAGES, gram_scale=0)


def test_crops_for_a_gram_teacher_in_a_pipeline():
    layer = MultiCrop(global_crop_size=(12, 18), local_crop_size=(10, 11), seed=3)
    expected = layer(IMAGES, gram_scale=1.5)
    rewind(layer)
    data = tf.data.Dataset.from_tensors(IMAGES).map(lambda x: layer(x, gram_scale=1.5))
    assert data.element_spec["gram_crops"].shape == (2, 2, 18, 27, 3)
    (found,) = data.as_numpy_iterator()
    close(found["gram_crops"], numpy(expected["gram_crops"]), 0, 1e-5)


def test_boxes_of_the_global_crops_in_a_pipeline():
    """They are handed out when asked for, and nothing else changes."""
    layer = MultiCrop(global_crop_size=(12, 18), local_crop_size=(10, 11), seed=3)
    expected = layer(IMAGES)
    rewind(layer)
    found = layer(IMAGES, boxes=True)
    assert found.keys() - expected.keys() == {"global_boxes", "global_flips"}
    for name, crops in expected.items():
        np.testing.assert_array_equal(numpy(found[name]), numpy(crops))
    boxes, flips = numpy(found["global_boxes"]), numpy(found["global_flips"])
    assert np.all(boxes == np.round(boxes)) and np.all(boxes[..., 2:] >= 1) and boxes.min() >= 0
    assert np.all(boxes[..., :2] + boxes[..., 2:] <= IMAGES.shape[1:3])
    rewind(layer)
    data = tf.data.Dataset.from_tensors(IMAGES).map(lambda x: layer(x, boxes=True))
    assert data.element_spec["global_boxes"] == tf.TensorSpec((2, 2, 4), "float32")
    assert data.element_spec["global_flips"] == tf.TensorSpec((2, 2), "bool")
    (mapped,) = data.as_numpy_iterator()
    np.testing.assert_array_equal(mapped["global_boxes"], boxes)
    np.testing.assert_array_equal(mapped["global_flips"], flips)
    specs = layer.compute_output_spec(keras.KerasTensor((None, 30, 44, 3), "uint8"), boxes=True)
    assert specs["global_boxes"].shape == (None, 2, 4) and specs["global_flips"].dtype == "bool"
