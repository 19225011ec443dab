"""Which patches of the global crops the student may not see, drawn on the device.

How many patches a batch masks depends on shapes and settings only, not on the draw, so
everything behind the masks keeps static shapes.
"""

import math
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from keras_dinov3.schedules import check_count, check_range, is_count


class _Masking(keras.layers.Layer):
    """A layer that draws masks: its seed, and how many patches its batches mask."""

    def __init__(self, seed, **kwargs):
        super().__init__(**kwargs)
        self.seed = seed
        self.seed_generator = keras.random.SeedGenerator(seed)
        self.built = True

    def num_masked(self, batch_size, num_crops, grid_size):
        """Masked patches of a batch, the same for every batch: a Python int."""
        return int(np.sum(self.target_counts(batch_size, num_crops, grid_size)))


@keras.saving.register_keras_serializable(package="keras_dinov3")
class BlockMasking(_Masking):
    """Masks random rectangles of patches in a fixed share of the global crops.

    `n = int(B * G * mask_probability)` crops of a batch are masked. Their numbers of masked
    patches are spread evenly over `mask_ratio`: with `edges = linspace(low, high, n + 1)` in
    float32, one crop each masks exactly `int(N * edges[i])` patches, `i = 1 ... n`. Which crop
    gets which number is drawn anew for each batch, over all crops of all images together.

    A crop is filled rectangle by rectangle. Let `space` be the smaller of `max_num_patches`
    and the patches still to mask. A try draws an area from `U(min_num_patches, space)` and the
    log of height / width from `U(log(min_aspect_ratio), -log(min_aspect_ratio))`, rounds height
    and width, and draws a place within the grid. It fails if a side is as long as the grid's,
    or if the rectangle adds no patch or more than `space`. After `num_tries` failures in a row
    the patches still to mask are drawn one by one, uniformly.

    Args:
        mask_probability: Float from 0 to 1, share of the global crops that are masked.
        mask_ratio: Pair of floats, `0 <= low <= high <= 1`, share of the patches that is
            masked in a masked crop.
        min_num_patches: Int, at least 1. Smallest area of a rectangle in patches, before
            rounding; near the end of a crop the smaller `space` takes its place.
        max_num_patches: Int, at least `min_num_patches`: the most patches that one rectangle
            may add. `None`: those of half of the rows, `(h // 2) * w`.
        min_aspect_ratio: Float above 0, at most 1. Height / width lies between this number
            and its inverse, before rounding.
        random_circular_shift: If true, each mask is rolled by a random number of rows and of
            columns, which makes all positions equally likely.
        num_tries: Int, at least 1: failures in a row that end the rectangles of a crop.
        seed: Int or `None`. The same seed gives the same masks on one backend and compiler.
        **kwargs: Keyword arguments of `keras.layers.Layer`.

    Raises:
        ValueError: If an argument is outside its range.

    Reference:
        [Bao et al., 2021](https://arxiv.org/abs/2106.08254), algorithm 1, with the counts per
        batch of [Oquab et al., 2023](https://arxiv.org/abs/2304.07193).
    """

    def __init__(
        self,
        mask_probability=0.5,
        mask_ratio=(0.1, 0.5),
        min_num_patches=4,
        max_num_patches=None,
        min_aspect_ratio=0.3,
        random_circular_shift=False,
        num_tries=10,
        seed=None,
        **kwargs,
    ):
        super().__init__(seed, **kwargs)
        check_range("mask_probability", mask_probability, low=0, high=1, scheduled=False)
        if np.shape(mask_ratio) != (2,) or not 0 <= mask_ratio[0] <= mask_ratio[1] <= 1:
            raise ValueError(
                "`mask_ratio` must be a pair with 0 <= low <= high <= 1, such as (0.1, 0.5). "
                f"Received: {mask_ratio=}."
            )
        check_count("min_num_patches", min_num_patches, at_least=1)
        if max_num_patches is not None:
            check_count("max_num_patches", max_num_patches, at_least=min_num_patches)
        check_range("min_aspect_ratio", min_aspect_ratio, above=0, high=1, scheduled=False)
        check_count("num_tries", num_tries, at_least=1)
        self.mask_probability = mask_probability
        self.mask_ratio = mask_ratio
        self.min_num_patches = min_num_patches
        self.max_num_patches = max_num_patches
        self.min_aspect_ratio = min_aspect_ratio
        self.random_circular_shift = random_circular_shift
        self.num_tries = num_tries

    def target_counts(self, batch_size, num_crops, grid_size):
        """Masked patches per crop before shuffling, as `sample`: int32 NumPy array `(B*G,)`."""
        _check_sizes(batch_size, num_crops, grid_size)
        if min(grid_size) < 2:
            raise ValueError(
                "Blocks need at least two rows and two columns of patches; `RandomMasking` takes "
                f"any grid. Received: {grid_size=}."
            )
        num_masked_crops = int(batch_size * num_crops * self.mask_probability)
        edges = np.linspace(*self.mask_ratio, num_masked_crops + 1, dtype="float32")
        counts = np.zeros(batch_size * num_crops, "int32")
        counts[:num_masked_crops] = np.float32(math.prod(grid_size)) * edges[1:]
        if not counts.any() and self.mask_probability * self.mask_ratio[1] > 0:
            raise ValueError(
                "At least one patch of a batch must be masked. Use more images or patches, or a "
                f"larger probability or ratio. Received: {batch_size=}, {num_crops=}, {grid_size=}"
                f", mask_probability={self.mask_probability}, mask_ratio={self.mask_ratio}."
            )
        return counts

    def sample(self, batch_size, num_crops, grid_size):
        """Draws the masks of one batch.

        Args:
            batch_size: Int, `B`.
            num_crops: Int, `G`, the number of global crops per image.
            grid_size: Pair of ints `(h, w)`, the patches along height and width of a crop.

        Returns:
            Bool tensor of shape `(B, G, N)`, `N = h * w` row by row; true is masked.

        Raises:
            ValueError: If a size is not a positive int, if the grid has a single row or
                column, or if not one patch of the batch would be masked.
        """
        targets = ops.convert_to_tensor(self.target_counts(batch_size, num_crops, grid_size))
        generator, num_masks = self.seed_generator, batch_size * num_crops
        # One draw for all but the rectangles: XLA takes long to compile each further draw.
        shape = (num_masks, 3 + math.prod(grid_size))
        noise = keras.random.uniform(shape, dtype="float32", seed=generator)
        targets = ops.take(targets, ops.argsort(noise[:, 0]))

        def unfinished(masks, missing, failures, seed_state):
            return ops.any((missing > 0) & (failures < self.num_tries))

        def attempt(masks, missing, failures, seed_state):
            # A loop body may not change a variable, so the seed travels with the loop.
            with keras.StatelessScope([(generator.state, seed_state)]) as scope:
                drawn = keras.random.uniform((num_masks, 3), dtype="float32", seed=generator)
            masks, missing, failures, _ = self._try_rectangle(masks, missing, failures, drawn)
            return masks, missing, failures, scope.get_current_value(generator.state)

        # It ends: a crop has fewer than `num_tries` failures for each patch that it gains.
        masks, _, _, seed_state = ops.while_loop(
            unfinished,
            attempt,
            (
                ops.zeros((num_masks, *grid_size), "float32"),
                ops.cast(targets, "float32"),
                ops.zeros_like(targets),
                ops.convert_to_tensor(generator.state),
            ),
        )
        generator.state.assign(seed_state)
        masks = _complete(ops.reshape(masks, (num_masks, -1)), targets, noise[:, 3:])
        if self.random_circular_shift:
            masks = _roll(masks, grid_size, noise[:, 1:3])
        return ops.reshape(masks, (batch_size, num_crops, -1))

    def _try_rectangle(self, masks, missing, failures, noise):
        """Tries one rectangle in every crop that is not finished.

        Args:
            masks: float32 tensor `(B*G, h, w)` of zeros and ones.
            missing: float32 tensor `(B*G,)`, the patches still to mask.
            failures: int32 tensor `(B*G,)`, failed tries since the last rectangle.
            noise: float32 tensor `(B*G, 3)`, uniform in [0, 1).

        Returns:
            The new `masks`, `missing` and `failures`; and of each rectangle height, width,
            the patches it would add, and 1 if it was set, else 0: float32 tensors `(B*G,)`.
        """
        _, grid_height, grid_width = masks.shape
        space = ops.minimum(missing, self.max_num_patches or grid_height // 2 * grid_width)
        area = self.min_num_patches + noise[:, 0] * (space - self.min_num_patches)
        aspect = ops.exp((1 - 2 * noise[:, 1]) * math.log(self.min_aspect_ratio))
        height = ops.round(ops.sqrt(area * aspect))
        width = ops.round(ops.sqrt(area / aspect))
        num_lefts = grid_width - width + 1
        place = ops.floor(noise[:, 2] * ((grid_height - height + 1) * num_lefts))
        top = ops.floor(place / num_lefts)
        rows = _interval(top, height, grid_height)
        columns = _interval(place - top * num_lefts, width, grid_width)

        added = rows[:, :, None] * columns[:, None, :] * (1 - masks)
        new = ops.sum(added, axis=(1, 2))
        fits = (height < grid_height) & (width < grid_width) & (new >= 1) & (new <= space)
        fits = fits & (failures < self.num_tries)
        failures = ops.where(fits, 0, failures + 1)
        fits = ops.cast(fits, "float32")
        masks = masks + added * fits[:, None, None]
        return masks, missing - new * fits, failures, (height, width, new, fits)

    def get_config(self):
        return {
            **super().get_config(),
            "mask_probability": self.mask_probability,
            "mask_ratio": self.mask_ratio,
            "min_num_patches": self.min_num_patches,
            "max_num_patches": self.max_num_patches,
            "min_aspect_ratio": self.min_aspect_ratio,
            "random_circular_shift": self.random_circular_shift,
            "num_tries": self.num_tries,
            "seed": self.seed,
        }


@keras.saving.register_keras_serializable(package="keras_dinov3")
class RandomMasking(_Masking):
    """Masks `round(N * mask_ratio)` patches of every global crop, drawn uniformly.

    Each crop of each image has a draw of its own, without replacement. Python's `round` takes
    halves to the even number.

    Args:
        mask_ratio: Float from 0 to 1, share of the patches that is masked.
        seed: Int or `None`. The same seed gives the same masks on one backend and compiler.
        **kwargs: Keyword arguments of `keras.layers.Layer`.

    Raises:
        ValueError: If `mask_ratio` is outside its range.

    Reference:
        [He et al., 2021](https://arxiv.org/abs/2111.06377), section 3, "Masking".
    """

    def __init__(self, mask_ratio=0.3, seed=None, **kwargs):
        super().__init__(seed, **kwargs)
        check_range("mask_ratio", mask_ratio, low=0, high=1, scheduled=False)
        self.mask_ratio = mask_ratio

    def target_counts(self, batch_size, num_crops, grid_size):
        """Masked patches per crop, arguments as `sample`: int32 NumPy array `(B*G,)`."""
        _check_sizes(batch_size, num_crops, grid_size)
        count = round(math.prod(grid_size) * self.mask_ratio)
        if count == 0 and self.mask_ratio > 0:
            raise ValueError(
                "At least one patch must be masked. Use more patches or a larger ratio. "
                f"Received: {grid_size=}, mask_ratio={self.mask_ratio}."
            )
        return np.full(batch_size * num_crops, count, "int32")

    def sample(self, batch_size, num_crops, grid_size):
        """Draws the masks of one batch; arguments and result as in `BlockMasking.sample`."""
        targets = ops.convert_to_tensor(self.target_counts(batch_size, num_crops, grid_size))
        shape = (batch_size * num_crops, math.prod(grid_size))
        noise = keras.random.uniform(shape, dtype="float32", seed=self.seed_generator)
        masks = _complete(ops.zeros(shape, "float32"), targets, noise)
        return ops.reshape(masks, (batch_size, num_crops, -1))

    def get_config(self):
        return {**super().get_config(), "mask_ratio": self.mask_ratio, "seed": self.seed}


class Slots(NamedTuple):
    """A static number of places for the masked patches of a batch, in ascending order."""

    index: Any  # (M,) int, into the B * G * N patches
    valid: Any  # (M,) float32, 1 where the slot holds a masked patch, 0 where it is padding
    weight: Any  # (M,) float32, what the patch weighs in its image's loss; 0 where padding
    image: Any  # (M,) int, the image the patch belongs to


def masked_slots(masks, num_slots, average="crops", exact=False):
    """Where the masked patches are, as arrays of a static length.

    With `average="crops"` a masked patch weighs `1 / (masked patches of its crop * G)`: the
    weighted sum over an image is the mean over its global crops of the means over their masked
    patches. With `"patches"` it weighs `B / (masked patches of the batch)`: the mean over images
    of their weighted sums is the mean over all masked patches.

    Args:
        masks: Bool tensor of shape `(B, G, N)`.
        num_slots: Int, `M`. If more patches are masked, all weights become NaN: nothing is
            left out in silence.
        average: `"crops"` or `"patches"`.
        exact: Whether exactly `num_slots` patches are known to be masked.

    Returns:
        `Slots`; `valid` is `None` if `exact`.
    """
    batch_size, num_crops, num_patches = masks.shape
    masks = ops.cast(ops.reshape(masks, (batch_size * num_crops, num_patches)), "int32")
    position = ops.cumsum(ops.reshape(masks, (-1,)))  # 1 at the first masked patch, 2 at the next
    slot = ops.arange(1, num_slots + 1, dtype="int32")
    index = ops.searchsorted(position, slot, side="left")
    index = ops.minimum(index, masks.shape[0] * num_patches - 1)
    if average == "crops":
        in_crop = ops.maximum(ops.sum(masks, axis=1), 1)
        in_crop = ops.take(in_crop, index // num_patches, axis=0)
        weight = 1.0 / ops.cast(in_crop * num_crops, "float32")
    else:
        in_batch = ops.cast(ops.maximum(position[-1], 1), "float32")
        weight = ops.ones((num_slots,), "float32") * (batch_size / in_batch)
    image = index // (num_crops * num_patches)
    if exact:
        return Slots(index, None, weight, image)
    valid = ops.cast(slot <= position[-1], "float32")
    weight = ops.where(position[-1] > num_slots, float("nan"), weight * valid)
    return Slots(index, valid, weight, image)


def _check_sizes(batch_size, num_crops, grid_size):
    sizes = [batch_size, num_crops, *np.ravel(np.array(grid_size, "object"))]
    if len(sizes) != 4 or not all(is_count(size, at_least=1) for size in sizes):
        raise ValueError(
            "`batch_size`, `num_crops` and the two of `grid_size` must be known ints of at least "
            f"1. Received: {batch_size=}, {num_crops=}, {grid_size=}."
        )


def _interval(start, length, size):
    """`(B*G,)` to float32 `(B*G, size)`: 1 where `start <= index < start + length`, else 0."""
    index, start, length = ops.arange(size, dtype="float32"), start[:, None], length[:, None]
    return ops.cast((index >= start) & (index < start + length), "float32")


def _complete(masks, targets, noise):
    """Adds patches to each mask `(B*G, N)`, by uniform noise, up to exactly its target; bool."""
    num_patches = masks.shape[1]
    # One int32 per patch: noise, then the index, so that no two are equal; masked ones below 0.
    order = ops.cast(noise * (2**30 // num_patches), "int32") * num_patches
    order = order + ops.arange(num_patches) - 2**30 * ops.cast(masks, "int32")
    last = ops.maximum(targets, 1)[:, None] - 1
    last = ops.take_along_axis(ops.sort(order, axis=1), last, axis=1)
    return (order <= last) & (targets > 0)[:, None]


def _roll(masks, grid_size, noise):
    """Rolls each mask `(B*G, h*w)` along both axes of its grid, by uniform noise `(B*G, 2)`."""
    height, width = grid_size
    shift = noise[:, :, None, None]
    rows = ops.arange(height)[:, None] - ops.cast(shift[:, 0] * height, "int32")
    columns = ops.arange(width) - ops.cast(shift[:, 1] * width, "int32")
    source = rows % height * width + columns % width  # (B*G, h, w)
    return ops.take_along_axis(masks, ops.reshape(source, masks.shape), axis=1)
