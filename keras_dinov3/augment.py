"""Images in, augmented global and local crops out, on the device: `MultiCrop`."""

import functools
import inspect
import itertools
import threading
import warnings

import keras
import numpy as np
from keras import ops

from keras_dinov3 import backend
from keras_dinov3.image_ops import (
    KERNELS,
    OUT_OF_RANGE,
    blur,
    check_value_range,
    cut_and_resize,
    from_planes,
    image_dtype,
    jitter_colors,
    longest_sides,
    random_boxes,
    solarize,
    to_gray,
    to_planes,
    to_unit_range,
)

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# Uniform numbers per crop, by what they decide.
DRAWS = {
    "area": 10,  # tries for a box that fits
    "aspect_ratio": 10,
    "position": 2,
    "flip": 1,
    "jitter": 1,
    "factors": 4,
    "order": 1,
    "grayscale": 1,
    "blur": 1,
    "sigma": 1,
    "solarize": 1,
}
SEED_LOCK = threading.Lock()  # `tf.data` calls from several threads


@keras.saving.register_keras_serializable(package="keras_dinov3")
class MultiCrop(keras.layers.Layer):
    """Cuts augmented global and local crops out of each image of a batch.

    Each crop, independently of all others: a random part of the image, resized; a horizontal
    flip; colour jitter (brightness, contrast, saturation and hue in random order); grayscale;
    Gaussian blur; solarization; normalization. The defaults are DINOv3's. The layer draws at
    every call, whether training or not, and computes in float32 under every dtype policy.

    It runs eagerly, inside a compiled model, and inside `tf.data.Dataset.map` under every
    Keras backend.

    For images that do not have three channels, saturation, hue and grayscale are left out with
    one warning; brightness and contrast (against the mean over all channels) stay.

    Args:
        global_crop_size: Int or `(height, width)`. Size of the global crops in pixels.
        local_crop_size: Int or `(height, width)`. Size of the local crops in pixels.
        num_global_crops: Int, at least 1. Global crops per image, `G`.
        num_local_crops: Int, at least 0. Local crops per image, `L`.
        global_crop_scale: `(low, high)` with `0 < low <= high <= 1`. A global crop covers a
            part of the image's area that is uniform in this range.
        local_crop_scale: The same for local crops.
        crop_aspect_ratio: `(low, high)`, positive. Width over height of the covered part; its
            logarithm is uniform. Parts have whole pixels. If ten draws in a row do not fit in
            the image, the crop is the largest centred part whose ratio is in the range.
        interpolation: `"bicubic"` (Keys' kernel with a = -0.5) or `"bilinear"`.
        antialias: Boolean. Whether to widen the kernel when a part is made smaller.
        flip_probability: Probability of a horizontal flip.
        color_jitter: Four numbers `(brightness, contrast, saturation, hue)`. The first three
            give factors uniform in `[max(0, 1 - x), 1 + x]`; hue is rotated by a share of the
            colour circle uniform in `[-x, x]`, at most 0.5.
        color_jitter_probability: Probability of colour jitter.
        grayscale_probability: Probability of removing colour.
        global_blur_probability: Probability of Gaussian blur: one number, or one per global
            crop, repeated from the first if there are more crops.
        local_blur_probability: The same for local crops.
        blur_sigma: `(low, high)`, positive. Standard deviation of the blur in pixels, uniform.
        blur_kernel_size: Odd int. Pixels that the blur reaches over, in each direction.
        global_solarize_probability: Probability of inverting bright values: one number, or one
            per global crop, repeated.
        local_solarize_probability: The same for local crops.
        solarize_threshold: Number from 0 to 1. Values at or above it are inverted.
        mean: Number, or one per channel, subtracted from values in 0-1. `None` is ImageNet's
            (0.485, 0.456, 0.406) for three channels and 0.5 for any other number of them.
        std: Number, or one per channel, that divides after that. `None` is ImageNet's
            (0.229, 0.224, 0.225) for three channels and 0.25 for any other number of them.
        seed: Int or `None` (a new one each time). The same seed gives the same crops on the
            same backend, compiled in the same way. `DINOv3` saves the position in the random
            sequence.
        **kwargs: Keyword arguments of `keras.layers.Layer`.

    Call arguments:
        images: Tensor of shape `(B, H, W, C)`, uint8 from 0 to 255 or float from 0 to 1. Under
            TensorFlow `B`, `H` and `W` may be unknown.
        gram_scale: `None`, or a number. With it there are crops for a Gram teacher too: the boxes
            and flips of the global crops, this many times as high and wide, normalised but
            otherwise as they are in the image.
        boxes: Whether to say where in the image the global crops lie.

    Returns:
        Dict of float32 tensors: `"global_crops"` of shape `(B, G, height, width, C)`,
        `"local_crops"` of shape `(B, L, height, width, C)`, and with `gram_scale` `"gram_crops"`
        of shape `(B, G, gram_scale * height, gram_scale * width, C)`. With `boxes` also
        `"global_boxes"` `(B, G, 4)`, the top, left, height and width of the covered parts in
        pixels of the image, and `"global_flips"` `(B, G)`, bool, whether left and right are
        exchanged.

    Raises:
        ValueError: If an argument is outside the range given above, or the images are not of
            the shape, type or range given above.

    Reference:
        Multi-crop: [Caron et al., 2020](https://arxiv.org/abs/2006.09882), section 3.3.
        The values: [Siméoni et al., 2025](https://arxiv.org/abs/2508.10104), and
        [Oquab et al., 2023](https://arxiv.org/abs/2304.07193), appendix B.
    """

    def __init__(
        self,
        global_crop_size=224,
        local_crop_size=96,
        num_global_crops=2,
        num_local_crops=8,
        global_crop_scale=(0.32, 1.0),
        local_crop_scale=(0.05, 0.32),
        crop_aspect_ratio=(3 / 4, 4 / 3),
        interpolation="bicubic",
        antialias=True,
        flip_probability=0.5,
        color_jitter=(0.4, 0.4, 0.2, 0.1),
        color_jitter_probability=0.8,
        grayscale_probability=0.2,
        global_blur_probability=(1.0, 0.1),
        local_blur_probability=0.5,
        blur_sigma=(0.1, 2.0),
        blur_kernel_size=9,
        global_solarize_probability=(0.0, 0.2),
        local_solarize_probability=0.0,
        solarize_threshold=0.5,
        mean=None,
        std=None,
        seed=None,
        **kwargs,
    ):
        # autocast would round float images to the compute dtype before `call` sees them.
        super().__init__(autocast=False, **kwargs)
        self.global_crop_size = global_crop_size
        self.local_crop_size = local_crop_size
        self.num_global_crops = num_global_crops
        self.num_local_crops = num_local_crops
        self.global_crop_scale = global_crop_scale
        self.local_crop_scale = local_crop_scale
        self.crop_aspect_ratio = crop_aspect_ratio
        self.interpolation = interpolation
        self.antialias = antialias
        self.flip_probability = flip_probability
        self.color_jitter = color_jitter
        self.color_jitter_probability = color_jitter_probability
        self.grayscale_probability = grayscale_probability
        self.global_blur_probability = global_blur_probability
        self.local_blur_probability = local_blur_probability
        self.blur_sigma = blur_sigma
        self.blur_kernel_size = blur_kernel_size
        self.global_solarize_probability = global_solarize_probability
        self.local_solarize_probability = local_solarize_probability
        self.solarize_threshold = solarize_threshold
        self.mean = mean
        self.std = std
        self.seed = seed
        self.seed_generator = keras.random.SeedGenerator(seed)
        self._check_arguments()
        self._compiled_crops = backend.compiled(self._crops, static_argnames=("view", "size"))
        self._compiled_boxes = backend.compiled(self._boxes, static_argnames=("view",))
        self._warned = False
        self.built = True  # no weights

    def _check_arguments(self):
        for names, holds, rule in ARGUMENT_RULES:
            for name in names:
                value = getattr(self, name)
                if not holds(value):
                    raise ValueError(f"`{name}` must be {rule}. Received: {name}={value!r}.")
        for view in ("global", "local"):
            name, blurred = f"{view}_crop_size", getattr(self, f"{view}_blur_probability")
            side = min(as_pair(getattr(self, name)))
            used = getattr(self, f"num_{view}_crops") > 0 and np.max(blurred) > 0
            if used and side <= self.blur_kernel_size // 2:
                raise ValueError(
                    f"`{name}` must be more than half of `blur_kernel_size`, because the blur "
                    f"mirrors the crop at its edges. Received: {name}={getattr(self, name)}, "
                    f"blur_kernel_size={self.blur_kernel_size}. Largest kernel that fits: "
                    f"{2 * side - 1}. Without blur: `{view}_blur_probability=0`."
                )

    @property
    def crop_sizes(self):
        """List of triples: sizes of global, local and Gram crops, pairs of pixels or `None`."""
        return [(as_pair(self.global_crop_size), as_pair(self.local_crop_size), None)]

    def __call__(self, images, gram_scale=None, boxes=False, **kwargs):
        check_value_range(images)
        if not backend.is_foreign_graph_tensor(images):
            images = backend.assert_in_graph(images, -0.5, 1.5, OUT_OF_RANGE)
            return super().__call__(images, gram_scale=gram_scale, boxes=boxes, **kwargs)
        if images.shape.rank is None:
            raise ValueError(f"`images` must have a known rank. Received: {images}.")
        image_dtype(images)
        shapes = self.compute_output_shape(tuple(images.shape), gram_scale, boxes)

        def call(images):
            check_value_range(images)
            return self.call(images, gram_scale, boxes)

        return backend.call_in_tf_graph(call, images, as_specs(shapes))

    def call(self, images, gram_scale=None, boxes=False):
        self._check_shape(images.shape)
        batch, channels = ops.shape(images)[0], images.shape[-1]
        images = ops.convert_to_tensor(images)
        crops = {}
        for view, (count, size) in self._views(gram_scale).items():
            if count == 0:
                crops[f"{view}_crops"] = ops.zeros((batch, 0, *size, channels), "float32")
                continue
            if view != "gram":  # which comes after the global crops and has their boxes
                draws = self._draw(batch * count)
            crop = functools.partial(self._compiled_crops, view=view, size=size)
            numbers = count * size[0] * size[1] * channels
            crops[f"{view}_crops"] = backend.in_cache(crop, images, draws, size=numbers)
            if boxes and view == "global":
                *box, flip = self._compiled_boxes(images, draws, view=view)
                crops["global_boxes"] = ops.concatenate(box, axis=-1)
                crops["global_flips"] = ops.squeeze(flip, -1)
        return crops

    def _views(self, gram_scale):
        """By view, the number of crops and their height and width; in the order of drawing."""
        views = {}
        for view in ("global", "local"):
            size = as_pair(getattr(self, f"{view}_crop_size"))
            views[view] = getattr(self, f"num_{view}_crops"), size
            if view == "global" and gram_scale is not None:
                if not are_numbers(gram_scale, np.finfo("float32").tiny, shapes=[()]):
                    raise ValueError(
                        f"`gram_scale` must be a positive number. Received: {gram_scale!r}."
                    )
                views["gram"] = views[view][0], tuple(round(gram_scale * side) for side in size)
        return views

    def _crops(self, images, draws, view, size):
        kind = "local" if view == "local" else "global"
        count, scale, blur_probability, solarize_probability = (
            getattr(self, name)
            for name in (
                f"num_{kind}_crops",
                f"{kind}_crop_scale",
                f"{kind}_blur_probability",
                f"{kind}_solarize_probability",
            )
        )
        batch, height, width, channels = ops.shape(images)
        top, left, box_height, box_width, flip = self._boxes(images, draws, kind)
        draws = split_draws(draws)
        longest = longest_sides(height, width, scale, self.crop_aspect_ratio)
        how = KERNELS[self.interpolation], self.antialias
        x = ops.reshape(to_unit_range(images), (batch, height, width * channels))
        x = cut_and_resize(x, top, box_height, size[0], longest[0], *how)
        x = ops.transpose(ops.reshape(x, (-1, size[0], width, channels)), (0, 2, 3, 1))
        x = ops.reshape(x, (-1, width, channels * size[0]))
        one_each = [ops.reshape(x, (-1, 1, 1)) for x in (left, box_width, flip)]
        x = cut_and_resize(x, *one_each[:2], size[1], longest[1], *how, one_each[2])
        x = ops.reshape(x, (-1, size[1], channels, size[0]))
        x = ops.clip(x, 0.0, 1.0)  # a bicubic kernel overshoots
        if view != "gram":
            x = self._distort(x, draws, count, blur_probability, solarize_probability)
        x = ops.reshape(ops.transpose(x, (0, 3, 1, 2)), (-1, count, *size, channels))
        return self.normalize(x)

    def _boxes(self, images, draws, view):
        """Top, left, height and width of the crops in pixels and whether they are flipped.

        Each is `(B, crops, 1)`.
        """
        draws = split_draws(draws)
        _, height, width, _ = ops.shape(images)
        scale = getattr(self, f"{view}_crop_scale")
        boxes = random_boxes(draws, height, width, scale, self.crop_aspect_ratio)
        boxes = [*boxes, draws["flip"] < self.flip_probability]
        return [ops.reshape(x, (-1, getattr(self, f"num_{view}_crops"), 1)) for x in boxes]

    def _distort(self, x, draws, count, blur_probability, solarize_probability):
        """Colour, blur and solarization of crops `(N, S, C, S)`."""
        channels = x.shape[2]
        planes = to_planes(x)
        if self.color_jitter_probability > 0 and any(self.color_jitter):
            jitter = draws["jitter"] < self.color_jitter_probability
            planes = jitter_colors(planes, draws, self.color_jitter, jitter)
        if self.grayscale_probability > 0 and channels == 3:
            planes = to_gray(planes, draws["grayscale"] < self.grayscale_probability)
        x = from_planes(planes, channels)
        if np.max(blur_probability) > 0:
            low, high = self.blur_sigma
            blurred = happens(draws["blur"], blur_probability, count)
            sigma = low + (high - low) * draws["sigma"]
            x = blur(x, sigma, self.blur_kernel_size, blurred)
        if np.max(solarize_probability) > 0:
            solarized = happens(draws["solarize"], solarize_probability, count)
            x = solarize(x, self.solarize_threshold, solarized)
        return x

    def _draw(self, count):
        """Uniform numbers in [0, 1): one row for each crop."""
        with SEED_LOCK:
            return keras.random.uniform(
                (count, sum(DRAWS.values())), dtype="float32", seed=self.seed_generator
            )

    def normalize(self, images):
        """Scales images as the crops are scaled: `(images in 0-1 - mean) / std`.

        Args:
            images: Array of shape `(..., C)`, uint8 from 0 to 255 or float from 0 to 1.

        Returns:
            float32 tensor of the same shape.
        """
        x = to_unit_range(images)
        mean, std = self._mean_and_std(x.shape[-1])
        return (x - ops.convert_to_tensor(mean)) / ops.convert_to_tensor(std)

    def _mean_and_std(self, channels):
        if channels == 3:
            defaults = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
        else:
            defaults = {"mean": 0.5, "std": 0.25}
        values = []
        for name, default in defaults.items():
            value = getattr(self, name)
            value = np.asarray(default if value is None else value, "float32")
            if value.ndim == 1 and len(value) != channels:
                raise ValueError(
                    f"`{name}` must be one number or one per channel. Received: "
                    f"{name}={getattr(self, name)} for images with {channels} channels."
                )
            values.append(value)
        return values

    def _check_shape(self, shape):
        if len(shape) != 4 or shape[-1] is None:
            hint = " For one image, use `images[None]`." if len(shape) == 3 else ""
            raise ValueError(
                "`images` must have shape (B, H, W, C) with C known. "
                f"Received: shape {tuple(shape)}.{hint}"
            )
        channels = shape[-1]
        self._mean_and_std(channels)
        uses_color = {
            "saturation": self.color_jitter[2] * self.color_jitter_probability,
            "hue": self.color_jitter[3] * self.color_jitter_probability,
            "grayscale": self.grayscale_probability,
        }
        left_out = [name for name, amount in uses_color.items() if amount > 0]
        if channels != 3 and left_out and not self._warned:
            self._warned = True
            warnings.warn(
                f"`MultiCrop` leaves out {', '.join(left_out)}: they need RGB images. "
                f"Received: images with {channels} channels. The other steps stay. "
                "To say so yourself: `color_jitter=(brightness, contrast, 0, 0)` and "
                "`grayscale_probability=0`.",
                stacklevel=2,
            )

    def compute_output_shape(self, input_shape, gram_scale=None, boxes=False):
        self._check_shape(input_shape)
        batch, channels = input_shape[0], input_shape[-1]
        shapes = {
            f"{view}_crops": (batch, count, *size, channels)
            for view, (count, size) in self._views(gram_scale).items()
        }
        if boxes:
            shapes["global_boxes"] = (batch, self.num_global_crops, 4)
            shapes["global_flips"] = (batch, self.num_global_crops)
        return shapes

    def compute_output_spec(self, images, gram_scale=None, boxes=False):
        image_dtype(images)
        return as_specs(self.compute_output_shape(images.shape, gram_scale, boxes))

    def get_config(self):
        names = [name for name in inspect.signature(MultiCrop).parameters if name != "kwargs"]
        return {**super().get_config(), **{name: getattr(self, name) for name in names}}


def as_specs(shapes):
    dtypes = {"global_flips": "bool"}
    return {
        name: keras.KerasTensor(shape, dtypes.get(name, "float32"))
        for name, shape in shapes.items()
    }


def split_draws(draws):
    """`(N, numbers per crop)` to arrays `(N, DRAWS[name])` by name."""
    ends = list(itertools.accumulate(DRAWS.values()))
    return dict(zip(DRAWS, ops.split(draws, ends[:-1], axis=1), strict=True))


def happens(draw, probability, count):
    """Whether an event happens to each of `(N, 1)` crops, `count` crops per image in order."""
    cycle = itertools.cycle(np.atleast_1d(probability).tolist())
    probabilities = ops.convert_to_tensor(list(itertools.islice(cycle, count)), "float32")
    return ops.reshape(ops.reshape(draw, (-1, count)) < probabilities, (-1, 1))


def as_pair(size):
    return tuple(size) if np.ndim(size) else (size, size)


def is_whole(value, low=1):
    return isinstance(value, (int, np.integer)) and value >= low


def is_size(value):
    return np.ndim(value) <= 1 and len(as_pair(value)) == 2 and all(map(is_whole, as_pair(value)))


def are_numbers(value, low=-np.inf, high=np.inf, shapes=None):
    """Whether `value` is finite numbers from `low` to `high`, of one of the shapes."""
    try:
        value = np.asarray(value, "float64")
    except (TypeError, ValueError):
        return False
    allowed = (value.ndim <= 1 and value.size > 0) if shapes is None else value.shape in shapes
    return allowed and bool(np.all(np.isfinite(value) & (value >= low) & (value <= high)))


def is_range(value, high=np.inf):
    return are_numbers(value, 0.0, high, [(2,)]) and 0 < value[0] <= value[1]


ARGUMENT_RULES = (  # names, a function of the value, and the rule in words
    (
        ("global_crop_size", "local_crop_size"),
        is_size,
        "a positive integer or a pair of them (height, width), in pixels",
    ),
    (("num_global_crops",), is_whole, "an integer of at least 1"),
    (("num_local_crops",), lambda x: is_whole(x, 0), "an integer of at least 0"),
    (
        ("global_crop_scale", "local_crop_scale"),
        lambda x: is_range(x, 1.0),
        "a pair (low, high) with 0 < low <= high <= 1, shares of the image's area",
    ),
    (
        ("crop_aspect_ratio", "blur_sigma"),
        is_range,
        "a pair (low, high) with 0 < low <= high",
    ),
    (("interpolation",), lambda x: x in tuple(KERNELS), '"bicubic" or "bilinear"'),
    (
        ("flip_probability", "color_jitter_probability", "grayscale_probability"),
        lambda x: are_numbers(x, 0.0, 1.0, [()]),
        "a number from 0 to 1",
    ),
    (
        (
            "global_blur_probability",
            "local_blur_probability",
            "global_solarize_probability",
            "local_solarize_probability",
        ),
        lambda x: are_numbers(x, 0.0, 1.0),
        "a number from 0 to 1, or one for each crop",
    ),
    (
        ("color_jitter",),
        lambda x: are_numbers(x, 0.0, shapes=[(4,)]) and x[3] <= 0.5,
        "four numbers (brightness, contrast, saturation, hue) of at least 0, with hue <= 0.5",
    ),
    (("blur_kernel_size",), lambda x: is_whole(x) and x % 2 == 1, "a positive odd integer"),
    (("solarize_threshold",), lambda x: are_numbers(x, 0.0, 1.0, [()]), "a number from 0 to 1"),
    (("mean",), lambda x: x is None or are_numbers(x), "None, a number, or one per channel"),
    (
        ("std",),
        lambda x: x is None or are_numbers(x, np.finfo("float32").tiny),
        "None, a positive number, or one per channel",
    ),
)
