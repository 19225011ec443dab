"""Gram anchoring: patch similarities that stay as a frozen teacher sees them in larger crops."""

import math

import keras
import numpy as np
from keras import ops

from keras_dinov3 import backend
from keras_dinov3.encoder import encode, grid_of, merge
from keras_dinov3.families import check_backbone, patch_size_of
from keras_dinov3.losses import check_negatives, gram_loss
from keras_dinov3.masking import masked_slots
from keras_dinov3.schedules import check_count, check_range, check_steps, value_at
from keras_dinov3.terms import Term, check_frozen, frozen_copy, own_backbone

SOURCES = ("teacher", "ema_teacher")
TOKENS = ("all", "masked", "unmasked")
PARTS = ("masked", "unmasked")  # what `log_parts` looks at


@keras.saving.register_keras_serializable(package="keras_dinov3")
class GramTeacher(keras.callbacks.Callback):
    """Makes the Gram teacher a copy of the EMA teacher, once and then every so many updates.

    The first copy is made when the model has had `start_step` updates, at 0 when `fit` begins. The
    copying runs inside the compiled train step of `DINOv3`, so that it falls on the same update
    however many steps run at once and wherever a run is resumed; this callback owns the rule. `fit`
    adds the one of the model's `GramAnchor` when none is passed.

    Args:
        start_step: Int. Updates before the first copy.
        refresh_every: Int, at least 1, or `None` for no other copy. Updates from one to the next.
        max_refreshes: Int, or `None` for as many as there are. Copies after the first.

    Raises:
        ValueError: If a number is out of range, or there is a `max_refreshes` without refreshes.

    Reference:
        [Siméoni et al., 2025](https://arxiv.org/abs/2508.10104), section 4.2.
    """

    def __init__(self, start_step=0, refresh_every=None, max_refreshes=None):
        super().__init__()
        check_steps("start_step", start_step)
        if refresh_every is not None:
            check_steps("refresh_every", refresh_every, at_least=1)
        if max_refreshes is not None:
            check_count("max_refreshes", max_refreshes)
            if refresh_every is None:
                raise ValueError(
                    "`max_refreshes` limits the refreshes that `refresh_every` makes. Received: "
                    f"max_refreshes={max_refreshes}, refresh_every=None."
                )
        self.start_step = start_step
        self.refresh_every = refresh_every
        self.max_refreshes = max_refreshes

    def is_due(self, step):
        """Whether a copy is made when the model has had `step` updates, an int tensor."""
        since = step - self.start_step
        if self.refresh_every is None:
            return since == 0
        is_due = ops.logical_and(since >= 0, since % self.refresh_every == 0)
        if self.max_refreshes is None:
            return is_due
        return ops.logical_and(is_due, since <= self.max_refreshes * self.refresh_every)

    def on_train_begin(self, logs=None):
        if int(self.model.step) == self.start_step == 0:
            self.model.gram.copy(self.model.teacher, self.model.teacher_extras)

    def get_config(self):
        names = ("start_step", "refresh_every", "max_refreshes")
        return {name: getattr(self, name) for name in names}


@keras.saving.register_keras_serializable(package="keras_dinov3")
class GramAnchor(Term):
    """Anchors the student's patch similarities to those of an earlier, frozen backbone.

    Long training improves class tokens while patch features lose their detail. The Gram teacher
    keeps what the patches of an image had to do with each other: it sees the boxes of the global
    crops, larger and without colour distortion, and its patch features, resized to the student's
    grid, give the similarities that the student's (masked) crops are held to.

    `DINOv3(..., gram=GramAnchor(...))` uses it; its backbone is saved with the model.

    Args:
        source: What the Gram teacher is. `"teacher"`: a copy of the EMA teacher at `start_step`.
            `"ema_teacher"`: the EMA teacher itself, on the student's own global crops. Or a copy of
            a Keras Hub backbone, or the name or folder of a preset: that one, which never changes.
        start_step: Int. The update from which the loss counts; before, it is 0 and the Gram
            teacher computes nothing.
        refresh_every: Int, or `None` for never. Updates from one new copy of the EMA teacher to
            the next, for `source="teacher"`; see `callbacks.GramTeacher`.
        max_refreshes: Int, or `None`. How many there are after the first copy.
        resolution_scale: Number of at least 1. Sides of the Gram teacher's crops over those of the
            student's global crops, where a `MixedCrops` has no others.
        tokens: `"all"` patches, or only those that are `"masked"` or `"unmasked"` in the student's
            crops, which needs `per_image=False`.
        weight: Number or schedule. Weight of the loss.
        normalize: Whether similarities are cosines, as in `losses.gram_loss`.
        per_image: Whether similarities are those within each crop, or those of all patches of the
            batch, of which memory then holds the square of their number.
        negatives: `"keep"`, `"remove"` or `"remove_teacher"`, as in `losses.gram_loss`.
        antialias: Whether resizing to a smaller grid averages over what lies between. Without,
            the bicubic kernel has a = -0.75, with it -0.5.
        log_parts: Whether the logs also say the loss over the batch's masked and unmasked
            patches, as `gram_masked_loss` and `gram_unmasked_loss`; they are not trained on.
        **kwargs: Keyword arguments of `keras.layers.Layer`.

    Raises:
        TypeError: If `source` is a backbone of an unsupported family.
        ValueError: If an argument is outside the range given above.

    Reference:
        [Siméoni et al., 2025](https://arxiv.org/abs/2508.10104), sections 4.2 and 4.3.
    """

    is_on = True  # also at weight 0, for what it logs

    def __init__(
        self,
        source="teacher",
        start_step=0,
        refresh_every=None,
        max_refreshes=None,
        resolution_scale=2,
        tokens="all",
        weight=2.0,
        normalize=True,
        per_image=True,
        negatives="keep",
        antialias=False,
        log_parts=False,
        **kwargs,
    ):
        super().__init__(**{"name": "gram", **kwargs})
        check_options(source, refresh_every, max_refreshes, resolution_scale, tokens, per_image)
        check_negatives(negatives)
        check_range("weight", weight, low=0, below=math.inf)
        if source not in SOURCES:
            source = own_backbone(source)
        self.refresh = GramTeacher(start_step, refresh_every, max_refreshes)
        self.source = source
        self.resolution_scale = resolution_scale
        self.tokens = tokens
        self.weight = weight
        self.normalize = normalize
        self.per_image = per_image
        self.negatives = negatives
        self.antialias = antialias
        self.log_parts = log_parts

    def check(self, model):
        if self.is_live:
            if patch_size_of(model.student) != patch_size_of(model.teacher):
                raise ValueError(
                    'With `source="ema_teacher"` the Gram teacher sees the student\'s crops, so '
                    f"both need the same patch size. Received: {patch_size_of(model.student)} "
                    f"and {patch_size_of(model.teacher)}."
                )
            return
        backbone = model.teacher
        if self.source != "teacher":
            backbone = self.source
            check_frozen("gram", backbone, model)
        sizes = [] if model.augmentation is None else model.augmentation.crop_sizes
        for size, _, own_size in sizes:
            size = own_size or tuple(round(self.resolution_scale * side) for side in size)
            grid_of(size, patch_size_of(backbone), "gram_crops")

    def check_crops(self, crops):
        shapes = [crops[name].shape for name in ("global_crops", *self.crop_names)]
        if len({shape[1] for shape in shapes}) > 1:
            raise ValueError(
                "`gram_crops` must hold one crop for each global crop. Received: shapes "
                f"{shapes[1]} and {shapes[0]}."
            )

    def make(self, model):
        self.student_patch_size = patch_size_of(model.student)
        if self.source == "teacher":
            teacher = frozen_copy(model.teacher, model.teacher_extras, "gram")
            self.backbone, self.extras = teacher
        elif not self.is_live:
            self.backbone = self.source

    @property
    def is_live(self):
        """Whether the Gram teacher is the EMA teacher, on the same crops."""
        return self.source == "ema_teacher"

    @property
    def crop_options(self):
        return {} if self.is_live else {"gram_scale": self.resolution_scale}

    @property
    def crop_names(self):
        return () if self.is_live else ("gram_crops",)

    @property
    def needs_masks(self):
        return self.tokens != "all" or self.log_parts

    def log_weights(self):
        parts = {f"gram_{part}_loss": 1 for part in PARTS} if self.log_parts else {}
        return {"gram_loss": self.weight, **parts}

    def see(self, crops, student, teacher, masks, step):
        size = crops["global_crops"].shape[2:4]
        grid_size = grid_of(size, self.student_patch_size, "global_crops")
        targets = self.targets(crops.get("gram_crops"), grid_size, teacher.patches, step)
        return student.patches, targets, masks

    def targets(self, crops, grid_size, teacher_patches, step):
        """What the student's patches are compared with.

        Args:
            crops: The Gram teacher's crops, `(B, G, T, T, C)`; `None` if it is the EMA teacher.
            grid_size: `(height, width)` in patches of the student's global crops.
            teacher_patches: The EMA teacher's patches of these, `(B * G, N, D)`.
            step: Int tensor, the updates that have been made.

        Returns:
            float32 tensor `(B * G, N, D')`, without gradient; zeros before `start_step`.
        """
        if self.is_live:
            return ops.stop_gradient(ops.cast(teacher_patches, "float32"))
        old = grid_of(crops.shape[2:4], patch_size_of(self.backbone), "gram_crops")
        count = crops.shape[0] * crops.shape[1]

        def seen():
            tokens = encode(self.backbone, merge(crops), extras=self.extras)
            return resize_grid(ops.cast(tokens.patches, "float32"), old, grid_size, self.antialias)

        def unseen():
            return ops.zeros((count, math.prod(grid_size), self.backbone.hidden_dim), "float32")

        if self.refresh.start_step == 0:
            return ops.stop_gradient(seen())
        return ops.stop_gradient(ops.cond(step >= self.refresh.start_step, seen, unseen))

    def losses_of(self, student_patches, targets, masks, step):
        is_on = ops.cast(step >= self.refresh.start_step, "float32")
        if self.tokens == "all":
            loss = ops.mean(self.compare(targets, student_patches, per_image=self.per_image))
        else:
            loss = self.compare_some(targets, student_patches, masks, self.tokens)
        terms, weights = {"gram_loss": is_on * loss}, {"gram_loss": value_at(self.weight, step)}
        if self.log_parts:
            student_patches = ops.stop_gradient(student_patches)
            for part in PARTS:
                loss = self.compare_some(targets, student_patches, masks, part)
                terms[f"gram_{part}_loss"], weights[f"gram_{part}_loss"] = is_on * loss, 0.0
        return terms, weights

    def compare(self, targets, patches, **options):
        options = {"normalize": self.normalize, "negatives": self.negatives, **options}
        return gram_loss(targets, patches, **options)

    def compare_some(self, targets, patches, masks, part):
        """The loss over the patches of the batch that are masked, or over the others."""
        chosen = masks if part == "masked" else ops.logical_not(masks)
        slots = masked_slots(chosen, math.prod(masks.shape))
        targets, patches = (
            ops.take(ops.reshape(x, (-1, x.shape[-1])), slots.index, axis=0)
            for x in (targets, patches)
        )
        return self.compare(targets, patches, per_image=False, weights=slots.valid)

    def follow(self, model, ticks):
        """Copies the EMA teacher if a refresh is due, when `ticks` is 1."""
        if self.source != "teacher":
            return
        is_due = ops.logical_and(self.refresh.is_due(model.step), ticks > 0)
        kept = 1.0 - ops.cast(is_due, "float32")
        copies = (self.backbone, model.teacher), (self.extras, model.teacher_extras)
        for copy, original in copies:
            backend.move_towards(copy.weights, original.weights, kept)

    def copy(self, teacher, extras):
        """Makes the Gram teacher equal to the EMA teacher now, outside of a step."""
        if self.source == "teacher":
            self.backbone.set_weights(teacher.get_weights())
            self.extras.set_weights(extras.get_weights())

    def get_config(self):
        source = self.source
        if source not in SOURCES:
            source = keras.saving.serialize_keras_object(source)
        names = ("resolution_scale", "tokens", "normalize", "per_image", "negatives")
        return {
            **super().get_config(),
            **self.refresh.get_config(),
            **{name: getattr(self, name) for name in (*names, "antialias", "log_parts")},
            "source": source,
            "weight": keras.saving.serialize_keras_object(self.weight),
        }


def check_options(source, refresh_every, max_refreshes, resolution_scale, tokens, per_image):
    """Says which arguments of a `GramAnchor` cannot be."""
    if not isinstance(source, str):
        check_backbone(source)
    if source != "teacher" and (refresh_every is not None or max_refreshes is not None):
        raise ValueError(
            '`refresh_every` and `max_refreshes` are for copies of the teacher, `source="teacher"`.'
            f" Received: source={source!r}, refresh_every={refresh_every}, "
            f"max_refreshes={max_refreshes}."
        )
    check_range("resolution_scale", resolution_scale, low=1, below=math.inf, scheduled=False)
    if tokens not in TOKENS:
        raise ValueError(f"`tokens` must be one of {TOKENS}. Received: tokens={tokens!r}.")
    if tokens != "all" and per_image:
        raise ValueError(
            f'`tokens="{tokens}"` compares patches of the whole batch, since crops have different '
            "numbers of them. Received: per_image=True. Add `per_image=False`."
        )


def resize_grid(patches, old, new, antialias=False):
    """Bicubic resize of patch features from one grid to another.

    Args:
        patches: float32 tensor of shape `(B, N, D)`, row-major over the grid `old`.
        old: `(height, width)` in patches.
        new: The same of the result.
        antialias: As in `resize_weights`.

    Returns:
        float32 tensor of shape `(B, new height * new width, D)`.
    """
    if tuple(old) == tuple(new):
        return patches
    rows, columns = (
        ops.convert_to_tensor(resize_weights(n, m, antialias))
        for n, m in zip(old, new, strict=True)
    )
    width = patches.shape[-1]
    x = ops.reshape(patches, (-1, *old, width))
    x = ops.einsum("yh,bhwd->bywd", rows, x)
    x = ops.einsum("xw,bywd->byxd", columns, x)
    return ops.reshape(x, (-1, math.prod(new), width))


def resize_weights(old, new, antialias=False):
    """What each of `old` values in a row weighs in each of `new`, corners not aligned.

    Args:
        old: Int.
        new: Int.
        antialias: Whether the kernel spans the new pixels where these are the larger ones; then
            a = -0.5 and what lies outside does not count. Else a = -0.75 and the last value is
            repeated outside: PyTorch's two rules.

    Returns:
        float32 NumPy array of shape `(new, old)`, whose rows sum to 1.

    Reference:
        [Keys, 1981](https://doi.org/10.1109/TASSP.1981.1163711), equation 4 with a free a.
    """
    step = old / new
    center = (np.arange(new)[:, None] + 0.5) * step - 0.5
    if antialias:
        weights = keys_kernel((np.arange(old) - center) / max(step, 1.0), -0.5)
        return (weights / weights.sum(axis=1, keepdims=True)).astype("float32")
    first = np.floor(center).astype(int)
    weights = np.zeros((new, old))
    for offset in (-1, 0, 1, 2):
        index = first + offset
        value = keys_kernel(index - center, -0.75)
        np.add.at(weights, (np.arange(new)[:, None], np.clip(index, 0, old - 1)), value)
    return weights.astype("float32")


def keys_kernel(distance, a):
    x = np.abs(distance)
    inner = ((a + 2) * x - (a + 3)) * x * x + 1
    outer = ((x - 5) * x + 8) * x * a - 4 * a
    return np.where(x <= 1, inner, np.where(x < 2, outer, 0.0))
