"""Patch kernel alignment: a student's patches relate as in another crop of the teacher."""

import math
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from keras_dinov3.encoder import grid_of
from keras_dinov3.families import patch_size_of
from keras_dinov3.schedules import check_range, is_count, value_at
from keras_dinov3.terms import Term

TINY = 1e-12  # variances below are taken for none
WHOLE = (0.0, 0.0, 1.0, 1.0)  # the box of a crop in its own coordinates
PAIRS = ("different", "same", "all")
TOKENS = ("all", "masked", "unmasked")


@keras.saving.register_keras_serializable(package="keras_dinov3")
class PatchAlignment(Term):
    """Aligns the student's patch kernel with the teacher's where two crops of an image overlap.

    The kernel of a crop is the Gram matrix of its patch features: what each patch has to do with
    each other. For a global crop of the student and one of the teacher, the loss is one minus the
    centred kernel alignment of the two over the student's patches that the teacher's crop shows
    too. Unlike a `GramAnchor` the teacher is the one of now, sees another crop, and the scale and
    mean of the features are left free.

    `DINOv3(..., alignment=PatchAlignment(...))` uses it and logs `alignment_loss`.

    Ready crops bring for it, unless pairs are `"same"`, `"global_boxes"` `(B, G, 4)`, the top,
    left, height and width of each crop's part of its image in any unit, and `"global_flips"`
    `(B, G)`, bool, whether left and right are exchanged: `MultiCrop()(images, boxes=True)`.

    From Yeo et al. (PaKA): the objective with a linear kernel, between a student and its EMA
    teacher, on the overlap of two crops. Choices made here: the student's crops are the (masked)
    global ones, where theirs are local; the teacher's features are read off at the student's patch
    centres bilinearly, where theirs are pooled; the teacher's crops are augmented as always.

    Args:
        weight: Number or schedule. Weight of the loss.
        pairs: Which pairs of global crops: `"different"` ones of an image, the `"same"` crop, or
            `"all"`.
        tokens: `"all"` patches of the student, or those that are `"masked"` or `"unmasked"`.
        min_patches: Int, at least 3. A pair with fewer patches to compare is left out of the mean
            over pairs, which is 0 when none is left.
        **kwargs: Keyword arguments of `keras.layers.Layer`.

    Raises:
        ValueError: If an argument is outside the range given above.

    Reference:
        [Yeo et al., 2025](https://arxiv.org/abs/2509.05606);
        [Kornblith et al., 2019](https://arxiv.org/abs/1905.00414), section 3.
    """

    def __init__(self, weight=1.0, pairs="different", tokens="all", min_patches=4, **kwargs):
        super().__init__(**{"name": "alignment", **kwargs})
        check_range("weight", weight, low=0, below=math.inf)
        for name, value, choices in (("pairs", pairs, PAIRS), ("tokens", tokens, TOKENS)):
            if value not in choices:
                raise ValueError(f"`{name}` must be one of {choices}. Received: {name}={value!r}.")
        if not is_count(min_patches, at_least=3):
            raise ValueError(
                "`min_patches` must be an integer of at least 3, since any two kernels of two "
                f"patches are aligned. Received: min_patches={min_patches!r}."
            )
        self.weight = weight
        self.pairs = pairs
        self.tokens = tokens
        self.min_patches = min_patches

    @property
    def crop_options(self):
        return {} if self.pairs == "same" else {"boxes": True}

    @property
    def crop_names(self):
        return () if self.pairs == "same" else ("global_boxes", "global_flips")

    @property
    def needs_masks(self):
        return self.tokens != "all"

    def check(self, model):
        if model.augmentation is not None:
            self.pairs_of(model.augmentation.num_global_crops)

    def check_crops(self, crops):
        self.pairs_of(crops["global_crops"].shape[1])
        if self.crop_names:
            boxes, flips = (crops[name] for name in self.crop_names)
            check_boxes(boxes, flips, crops["global_crops"].shape[:2])

    def make(self, model):
        self.patch_sizes = [patch_size_of(backbone) for backbone in (model.teacher, model.student)]

    def pairs_of(self, num_crops):
        """Two lists, the teacher's and the student's crop of each pair."""
        wanted = {"different": (False,), "same": (True,), "all": (False, True)}[self.pairs]
        crops = range(num_crops)
        pairs = [(t, s) for t in crops for s in crops if (t == s) in wanted]
        if not pairs:
            raise ValueError(
                '`PatchAlignment(pairs="different")` needs two global crops. Received: '
                f'{num_crops}. Take more, or `pairs="same"`.'
            )
        return list(zip(*pairs, strict=True))

    def see(self, crops, student, teacher, masks, step):
        """Teacher's features where the student's patches lie, the student's, and their weights.

        For `P` pairs of crops, `(P, N, D')`, `(P, N, D)` and `(P, N)`.
        """
        batch_size, num_crops, *size = crops["global_crops"].shape[:4]
        if self.crop_names:
            boxes, flips = (ops.cast(crops[name], "float32") for name in self.crop_names)
        else:
            boxes = ops.broadcast_to(ops.convert_to_tensor(WHOLE), (batch_size, num_crops, 4))
            flips = ops.zeros((batch_size, num_crops))
        grids = [grid_of(size, patch_size, "global_crops") for patch_size in self.patch_sizes]
        indices = self.pairs_of(num_crops)
        places = [
            Place(grid, take_crops(boxes, index), take_crops(flips, index))
            for grid, index in zip(grids, indices, strict=True)
        ]
        teacher_patches, student_patches = (
            take_crops(ops.reshape(x, (batch_size, num_crops, *x.shape[1:])), index)
            for x, index in zip((teacher.patches, student.patches), indices, strict=True)
        )
        teacher_patches, weights = read_off(teacher_patches, *places)
        if self.tokens != "all":
            hidden = masks if self.tokens == "masked" else ops.logical_not(masks)
            weights = weights * take_crops(ops.cast(hidden, "float32"), indices[1])
        return ops.stop_gradient(teacher_patches), student_patches, ops.stop_gradient(weights)

    def log_weights(self):
        return {"alignment_loss": self.weight}

    def losses_of(self, teacher_patches, student_patches, weights, step):
        losses = patch_kernel_alignment_loss(teacher_patches, student_patches, weights)
        num_patches = ops.sum(ops.cast(weights > 0, "float32"), axis=1)
        counted = ops.cast(num_patches >= self.min_patches, "float32")
        loss = ops.sum(losses * counted) / ops.maximum(ops.sum(counted), 1.0)
        return {"alignment_loss": loss}, {"alignment_loss": value_at(self.weight, step)}

    def get_config(self):
        names = ("pairs", "tokens", "min_patches")
        return {
            **super().get_config(),
            **{name: getattr(self, name) for name in names},
            "weight": keras.saving.serialize_keras_object(self.weight),
        }


def patch_kernel_alignment_loss(y_true, y_pred, weights=None):
    """One minus the linear centred kernel alignment (CKA) of two sets of patch features.

    With the Gram matrices `K`, `L` of the features, centred, `CKA = <K, L> / (|K| |L|)`, from 0 to
    1 and the same when features are rotated, scaled by a number, or shifted. Of unrelated features
    it is not 0, and the nearer to 1 the more features there are for each patch: 0.62 for some 150
    patches of 384 random features.

    Args:
        y_true: Patch features of the teacher, shape `(P, N, D')`, any float dtype. `D'` may differ
            from `D`.
        y_pred: Patch features of the student, shape `(P, N, D)`, any float dtype.
        weights: What each patch weighs, of shape `(P, N)`, none below 0; a pair of patches weighs
            the product. Patches of weight 0 might as well not be there. Defaults to `None`: all
            the same.

    Returns:
        float32 tensor of shape `(P,)`. It is 1, with no gradient, where fewer than two patches
        have a weight or those of one side are all equal.

    Raises:
        ValueError: If the shapes do not fit.

    Reference:
        [Kornblith et al., 2019](https://arxiv.org/abs/1905.00414), section 3: CKA of the biased
        estimate of HSIC.
    """
    shapes = [tuple(x.shape[:2]) for x in (y_true, y_pred)]
    shapes += [] if weights is None else [tuple(weights.shape)]
    ranks = {len(y_true.shape), len(y_pred.shape)}
    if ranks != {3} or len(set(shapes)) > 1:
        raise ValueError(
            "`y_true` and `y_pred` must have shapes (P, N, D') and (P, N, D), `weights` (P, N). "
            f"Received: y_true.shape={tuple(y_true.shape)}, y_pred.shape={tuple(y_pred.shape)}"
            f"{'' if weights is None else f', weights.shape={tuple(weights.shape)}'}."
        )
    if weights is None:
        weights = ops.ones(shapes[1])
    share = ops.expand_dims(ops.cast(weights, "float32"), -1)
    share = share / ops.maximum(ops.sum(share, axis=1, keepdims=True), TINY)  # (P, N, 1)
    teacher, student = (unit_kernel(ops.cast(x, "float32"), share) for x in (y_true, y_pred))
    return 1.0 - ops.sum(teacher * student, axis=(1, 2))


def unit_kernel(features, share):
    """The centred Gram matrices `(P, N, N)` of features `(P, N, D)`, of norm 1, or 0 if they are 0.

    Entries are multiplied by the square roots of the `share` `(P, N, 1)` that both patches have.
    """
    x = features - ops.sum(share * features, axis=1, keepdims=True)
    x = ops.sqrt(share) * x
    x = over_norm(x)  # so that no scale of the features underflows below
    return over_norm(ops.matmul(x, ops.swapaxes(x, 1, 2)))


def over_norm(x):
    squares = ops.sum(ops.square(x), axis=(1, 2), keepdims=True)
    return x * ops.rsqrt(ops.maximum(squares, TINY))


class Place(NamedTuple):
    """Where the patches of `P` crops lie in their images."""

    grid_size: tuple  # (height, width) in patches
    boxes: Any  # (P, 4): top, left, height, width
    flips: Any  # (P,): 1 if left and right are exchanged, or 0


def read_off(patches, place, other):
    """Patch features of crops, read off where the patches of other crops have their centres.

    Args:
        patches: float tensor `(P, N', D)`, row-major over the grid.
        place: The `Place` of these.
        other: The `Place` of the others, in the same images.

    Returns:
        float32 tensors: features `(P, N, D)` by bilinear interpolation between patch centres,
        beyond the outermost of which they stay the same; and `(P, N)`, 1 where a centre lies in
        the box of the first crop and 0 elsewhere.
    """
    upright = ops.zeros_like(place.flips)
    rows, has_row = axis_weights(place, other, 0, upright, upright)
    columns, has_column = axis_weights(place, other, 1, place.flips, other.flips)
    width = patches.shape[-1]
    x = ops.reshape(ops.cast(patches, "float32"), (-1, *place.grid_size, width))
    x = ops.einsum("pyh,phwd->pywd", rows, x)
    x = ops.einsum("pxw,pywd->pyxd", columns, x)
    is_seen = ops.expand_dims(has_row, 2) * ops.expand_dims(has_column, 1)
    num_patches = math.prod(other.grid_size)
    return ops.reshape(x, (-1, num_patches, width)), ops.reshape(is_seen, (-1, num_patches))


def axis_weights(place, other, axis, flips, other_flips):
    """What each row (axis 0) or column (1) of patches weighs for those of the other crop.

    Returns:
        float32 tensors `(P, n, n')`, and `(P, n)`: 1 where the other's centre lies in the box.
    """

    def of(place, flips):
        start, length = (place.boxes[:, i : i + 1] for i in (axis, axis + 2))
        return place.grid_size[axis], start, length, ops.expand_dims(flips, 1)

    count, start, length, flip = of(other, other_flips)
    center = (ops.arange(count, dtype="float32") + 0.5) / count
    center = start + length * mirrored(center, flip)  # (P, n), in the image
    count, start, length, flip = of(place, flips)
    center = mirrored((center - start) / length, flip)
    is_inside = ops.cast(ops.logical_and(center > 0.0, center < 1.0), "float32")
    position = ops.clip(center * count - 0.5, 0.0, count - 1.0)
    distance = ops.expand_dims(position, 2) - ops.arange(count, dtype="float32")
    return ops.relu(1.0 - ops.abs(distance)), is_inside


def mirrored(x, flip):
    """`x` or, where `flip` is 1, `1 - x`."""
    return x + flip * (1.0 - 2.0 * x)


def take_crops(x, index):
    """Of `(B, G, ...)`, the crops of a list for each image, `(B * len(index), ...)`."""
    x = ops.stack([x[:, crop] for crop in index], axis=1)
    return ops.reshape(x, (-1, *x.shape[2:]))


def check_boxes(boxes, flips, shape):
    """Says what is wrong with NumPy boxes and flips of crops `(B, G)`."""
    if boxes.shape != (*shape, 4) or flips.shape != tuple(shape):
        raise ValueError(
            f"`global_boxes` must have shape {(*shape, 4)} and `global_flips` {tuple(shape)}. "
            f"Received: shapes {boxes.shape} and {flips.shape}."
        )
    if not np.all(np.isfinite(boxes)) or np.any(boxes[..., 2:] <= 0):
        raise ValueError(
            "`global_boxes` must be finite (top, left, height, width) with positive sides. "
            f"Received: least sides {boxes[..., 2:].min(axis=(0, 1)).tolist()}."
        )
    if flips.dtype != bool and not np.all((flips == 0) | (flips == 1)):
        raise ValueError(
            "`global_flips` must be bool, or numbers that are 0 or 1, true where left and right "
            f"are exchanged. Received: {flips.dtype} with other values."
        )
