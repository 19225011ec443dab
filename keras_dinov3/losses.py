"""DINO, iBOT, KoLeo and Gram: each a pure function and a thin `keras.losses.Loss`.

The arguments are (teacher, student), as `(y_true, y_pred)` in Keras, with the image axis first. The
functions compute and return float32 whatever they are given, one value per image (iBOT: per patch);
the classes only reduce. Gradients are never stopped on the way to the teacher: that is for the
caller.
"""

import keras
from keras import ops

from keras_dinov3.schedules import check_range, is_count

TINY_DISTANCE = 1e-8  # keeps KoLeo finite for images with equal features


def dino_loss(y_true, y_pred, student_temperature=0.1, ignore_diagonal=False):
    """Cross-entropy of student crops against teacher crops of the same image.

    For an image `b`, this is the mean over teacher crops `t` and student crops `s` of
    `-sum(y_true[b, t] * log_softmax(y_pred[b, s] / student_temperature))`.

    Args:
        y_true: Teacher probabilities, shape `(B, T, K)`, any float dtype. The last axis sums to 1.
        y_pred: Student logits, shape `(B, S, K)`, any float dtype.
        student_temperature: Positive float or scalar tensor that divides `y_pred`. Defaults to
            0.1.
        ignore_diagonal: If true, skip pairs with `s == t`, that is, a crop compared
            with itself when both sides hold the same global crops. Defaults to `False`.

    Returns:
        float32 tensor of shape `(B,)`.

    Raises:
        ValueError: If the shapes do not fit, if `student_temperature` is not positive, or if
            `ignore_diagonal` leaves no pair.

    Reference:
        [Caron et al., 2021](https://arxiv.org/abs/2104.14294), equation 3.
    """
    check_range("student_temperature", student_temperature, above=0)
    _check_rank(3, "(B, crops, K)", y_true=y_true, y_pred=y_pred)
    _check_equal_axes((0, 2), "images and prototypes", y_true, y_pred)
    num_teacher, num_student = y_true.shape[1], y_pred.shape[1]
    if ignore_diagonal and (num_teacher, num_student) == (1, 1):
        raise ValueError(
            "`ignore_diagonal` needs two crops on one side. Received: "
            f"y_true.shape={tuple(y_true.shape)}, y_pred.shape={tuple(y_pred.shape)}."
        )
    y_true = ops.cast(y_true, "float32")
    log_probs = ops.log_softmax(ops.cast(y_pred, "float32") / student_temperature)  # (B, S, K)
    # The sum of the teacher crops that each student crop is compared with: one product then does
    # for all of them. (No matmul: accelerators may round its inputs.)
    num_pairs = num_teacher * num_student
    wanted = ops.sum(y_true, axis=1, keepdims=True)  # (B, 1, K)
    if ignore_diagonal:
        num_same = min(num_teacher, num_student)
        others = [
            sum((y_true[:, t] for t in range(num_teacher) if t != s), ops.zeros_like(y_true[:, 0]))
            for s in range(num_same)
        ]
        others += [wanted[:, 0]] * (num_student - num_same)
        wanted, num_pairs = ops.stack(others, axis=1), num_pairs - num_same  # (B, S, K)
    return -ops.sum(wanted * log_probs, axis=(1, 2)) / num_pairs


def ibot_loss(y_true, y_pred, student_temperature=0.1):
    """Cross-entropy of the student's masked patches against the teacher's view of them.

    For each patch, `-sum(y_true * log_softmax(y_pred / student_temperature))` over the last axis.
    DINOv3 gives a patch the weight `1 / (masked patches of its crop)` and divides the sum by the
    number of crops, masked or not; the plain mean over all masked patches is `ops.mean` of this.
    A padded slot, with zeros for `y_true` and finite `y_pred`, has a loss and a gradient of 0.

    Args:
        y_true: Teacher probabilities, shape `(..., K)`, any float dtype.
        y_pred: Student logits, shape `(..., K)`, any float dtype.
        student_temperature: Positive float or scalar tensor that divides `y_pred`. Defaults to
            0.1.

    Returns:
        float32 tensor of shape `(...)`.

    Raises:
        ValueError: If the shapes differ or `student_temperature` is not positive.

    Reference:
        [Zhou et al., 2022](https://arxiv.org/abs/2111.07832), equation 2.
    """
    check_range("student_temperature", student_temperature, above=0)
    _check_rank(len(y_true.shape), "(..., K)", y_pred=y_pred)
    _check_equal_axes(range(len(y_true.shape)), "patches and prototypes", y_true, y_pred)
    log_probs = ops.log_softmax(ops.cast(y_pred, "float32") / student_temperature)
    return -ops.sum(ops.cast(y_true, "float32") * log_probs, axis=-1)


def koleo_loss(features, top_k=1, distance="euclidean"):
    """Spreads the images of a batch: minus the log of the distance to the nearest neighbours.

    With unit vectors `z`, an image `i` has the loss `-mean(log(distance(z[i], z[j])))` over its
    `top_k` most similar images `j != i`. Which images these are is decided without gradient; the
    gradient of a distance moves both ends. DINOv3 adds the losses of the two global crops.

    Args:
        features: Float tensor of shape `(B, D)`, one vector per image, of any length.
        top_k: Int between 1 and `B - 1`, the number of neighbours. Defaults to 1.
        distance: `"euclidean"` is `|z[i] - z[j] + e| + e` with `e = 1e-8`, the formula of DINOv2
            and DINOv3. `"cosine"` is `sqrt(max(2 - 2 z[i] . z[j], e))`: the same for images that
            differ, but those closer than 1e-4 have no gradient. Defaults to `"euclidean"`.

    Returns:
        float32 tensor of shape `(B,)`.

    Raises:
        ValueError: If `features` is not of rank 2, if `top_k` is not between 1 and `B - 1`, or if
            `distance` is unknown.

    Reference:
        [Sablayrolles et al., 2019](https://arxiv.org/abs/1806.03198), equation 2.
    """
    _check_koleo_options(top_k, distance)
    _check_rank(2, "(B, D)", features=features)
    batch_size = features.shape[0]
    if batch_size is not None and top_k >= batch_size:
        raise ValueError(
            f"KoLeo with `top_k={top_k}` compares each image with {top_k} others, so a batch needs "
            f"at least {top_k + 1} images. Received: features.shape={tuple(features.shape)}. "
            + (f"Largest `top_k`: {batch_size - 1}." if batch_size > 1 else "Turn KoLeo off.")
        )
    features = ops.cast(features, "float32")
    z = l2_normalize(features, TINY_DISTANCE if distance == "euclidean" else 1e-12)
    # (B, B); -2 is below every cosine, so that no image is its own neighbour
    similarity = ops.stop_gradient(ops.matmul(z, ops.transpose(z)))
    image = ops.arange(ops.shape(z)[0])
    similarity = ops.where(image[:, None] == image, -2.0, similarity)
    _, neighbours = ops.top_k(similarity, top_k)
    neighbours = ops.take(z, neighbours, axis=0)  # (B, top_k, D)
    z = ops.expand_dims(z, 1)
    if distance == "euclidean":
        squares = ops.sum(ops.square(z - neighbours + TINY_DISTANCE), axis=-1)
        distances = ops.sqrt(squares) + TINY_DISTANCE
    else:
        squares = 2.0 - 2.0 * ops.sum(z * neighbours, axis=-1)
        distances = ops.sqrt(ops.maximum(squares, TINY_DISTANCE))
    return -ops.mean(ops.log(distances), axis=-1)


def gram_loss(y_true, y_pred, normalize=True, per_image=True, negatives="keep", weights=None):
    """Mean squared difference of two Gram matrices, that is, of patch similarities.

    Args:
        y_true: Patch features of the Gram teacher, shape `(B, N, D')`, any float dtype. `D'` may
            differ from `D`: only similarities are compared.
        y_pred: Patch features of the student, shape `(B, N, D)`, any float dtype.
        normalize: Whether similarities are cosines; otherwise plain inner products. Defaults to
            `True`.
        per_image: If true, compare the `N x N` similarities within each image. Otherwise compare
            those of all patches of the batch, `B * N x B * N`; then the features may also be
            `(patches, D)`. Defaults to `True`.
        negatives: `"keep"` all similarities, `"remove"` negative ones (set them to 0 on both
            sides), or `"remove_teacher"`: only the teacher's. Defaults to `"keep"`.
        weights: What each patch weighs, of shape `(B, N)` or `(patches,)`; a pair weighs the
            product, and the mean over pairs is a weighted one, 0 if all weights are 0. Defaults to
            `None`: all the same.

    Returns:
        float32 tensor of shape `(B,)`, or a scalar if `per_image` is false.

    Raises:
        ValueError: If the shapes do not fit or `negatives` is unknown.

    Reference:
        [Siméoni et al., 2025](https://arxiv.org/abs/2508.10104), section 4.2.
    """
    check_negatives(negatives)
    if per_image:
        _check_rank(3, "(B, N, D)", y_true=y_true, y_pred=y_pred)
    else:
        _check_rank((2, 3), "(B, N, D) or (patches, D)", y_true=y_true, y_pred=y_pred)
        _check_rank(len(y_true.shape), "of the rank of `y_true`", y_pred=y_pred)
    _check_equal_axes(range(len(y_true.shape) - 1), "images and patches", y_true, y_pred)

    def similarities(features, without_negatives):
        features = ops.cast(features, "float32")
        if not per_image:
            features = ops.reshape(features, (-1, features.shape[-1]))
        if normalize:
            features = l2_normalize(features)
        gram = ops.matmul(features, ops.swapaxes(features, -1, -2))
        return ops.relu(gram) if without_negatives else gram

    teacher = similarities(y_true, negatives in ("remove", "remove_teacher"))
    student = similarities(y_pred, negatives == "remove")
    squares = ops.square(student - teacher)
    if weights is None:
        return ops.mean(squares, axis=(-2, -1))
    _check_equal_axes(range(len(y_true.shape) - 1), "weights and patches", y_true, weights)
    weights = ops.reshape(ops.cast(weights, "float32"), (*squares.shape[:-1], 1))
    total = ops.sum(weights, axis=(-2, -1))
    squares = ops.matmul(ops.swapaxes(weights, -1, -2), ops.matmul(squares, weights))
    return ops.squeeze(squares, (-2, -1)) / ops.maximum(ops.square(total), 1e-12)


def l2_normalize(x, epsilon=1e-12):
    """`x / max(|x|, epsilon)` over the last axis, with a finite gradient also at 0.

    Args:
        x: float32 tensor of shape `(..., D)`.
        epsilon: Float. Defaults to 1e-12.

    Returns:
        Tensor like `x`.
    """
    squares = ops.sum(ops.square(x), axis=-1, keepdims=True)
    return x / ops.sqrt(ops.maximum(squares, epsilon * epsilon))


class _Float32Loss(keras.losses.Loss):
    """Keeps Keras from casting features and logits to a shorter float before they get here."""

    def __init__(self, reduction="sum_over_batch_size", name=None):
        super().__init__(name=name, reduction=reduction, dtype="float32")


@keras.saving.register_keras_serializable(package="keras_dinov3")
class DINOLoss(_Float32Loss):
    """`dino_loss` as a Keras loss: teacher `(B, T, K)`, student `(B, S, K)`.

    Args:
        student_temperature: Positive float. Defaults to 0.1.
        ignore_diagonal: Whether to skip pairs of crops with the same index. Defaults to `False`.
        reduction: How Keras reduces the values `(B,)`. Defaults to `"sum_over_batch_size"`.
        name: Optional name.

    Call arguments:
        y_true, y_pred: As in `dino_loss`.
        sample_weight: Optional weights of shape `(B,)`.
    """

    def __init__(self, student_temperature=0.1, ignore_diagonal=False, **kwargs):
        check_range("student_temperature", student_temperature, above=0)
        super().__init__(**kwargs)
        self.student_temperature = student_temperature
        self.ignore_diagonal = ignore_diagonal

    def call(self, y_true, y_pred):
        return dino_loss(y_true, y_pred, self.student_temperature, self.ignore_diagonal)

    def get_config(self):
        config = {
            "student_temperature": self.student_temperature,
            "ignore_diagonal": self.ignore_diagonal,
        }
        return {**super().get_config(), **config}


@keras.saving.register_keras_serializable(package="keras_dinov3")
class IBOTLoss(_Float32Loss):
    """`ibot_loss` as a Keras loss: teacher and student `(..., K)`.

    Args:
        student_temperature: Positive float. Defaults to 0.1.
        reduction: How Keras reduces the values `(...)`. Defaults to `"sum_over_batch_size"`, the
            plain mean over patches.
        name: Optional name.

    Call arguments:
        y_true, y_pred: As in `ibot_loss`.
        sample_weight: Optional weights of the patches, of shape `(...)`.
    """

    def __init__(self, student_temperature=0.1, **kwargs):
        check_range("student_temperature", student_temperature, above=0)
        super().__init__(**kwargs)
        self.student_temperature = student_temperature

    def call(self, y_true, y_pred):
        return ibot_loss(y_true, y_pred, self.student_temperature)

    def get_config(self):
        return {**super().get_config(), "student_temperature": self.student_temperature}


@keras.saving.register_keras_serializable(package="keras_dinov3")
class KoLeoLoss(_Float32Loss):
    """`koleo_loss` as a Keras loss of features `(B, D)`. It has no target: `y_true` is ignored.

    Args:
        top_k: Int of at least 1, the number of neighbours. Defaults to 1.
        distance: `"euclidean"` or `"cosine"`, see `koleo_loss`. Defaults to `"euclidean"`.
        reduction: How Keras reduces the values `(B,)`. Defaults to `"sum_over_batch_size"`.
        name: Optional name.

    Call arguments:
        y_true: Anything, also `None`.
        y_pred: Features of shape `(B, D)`.
        sample_weight: Optional weights of shape `(B,)`. They weigh the images' losses and do not
            choose who can be a neighbour.
    """

    def __init__(self, top_k=1, distance="euclidean", **kwargs):
        _check_koleo_options(top_k, distance)
        super().__init__(**kwargs)
        self.top_k = top_k
        self.distance = distance

    def __call__(self, y_true, y_pred, sample_weight=None):
        return super().__call__(y_pred, y_pred, sample_weight)

    def call(self, y_true, y_pred):
        return koleo_loss(y_pred, self.top_k, self.distance)

    def get_config(self):
        return {**super().get_config(), "top_k": self.top_k, "distance": self.distance}


@keras.saving.register_keras_serializable(package="keras_dinov3")
class GramLoss(_Float32Loss):
    """`gram_loss` as a Keras loss: Gram teacher `(B, N, D')`, student `(B, N, D)`.

    Args:
        normalize: Whether similarities are cosines. Defaults to `True`.
        per_image: Whether to compare within each image only. Defaults to `True`.
        negatives: `"keep"`, `"remove"` or `"remove_teacher"`, see `gram_loss`. Defaults to
            `"keep"`.
        reduction: How Keras reduces the values `(B,)`. Defaults to `"sum_over_batch_size"`.
        name: Optional name.

    Call arguments:
        y_true, y_pred: As in `gram_loss`.
        sample_weight: Optional weights of shape `(B,)`, only if `per_image`.
    """

    def __init__(self, normalize=True, per_image=True, negatives="keep", **kwargs):
        check_negatives(negatives)
        super().__init__(**kwargs)
        self.normalize = normalize
        self.per_image = per_image
        self.negatives = negatives

    def __call__(self, y_true, y_pred, sample_weight=None):
        if sample_weight is not None and not self.per_image:
            raise ValueError(
                "`sample_weight` weighs images, so it needs `GramLoss(per_image=True)`. "
                "Received: per_image=False and a sample_weight."
            )
        return super().__call__(y_true, y_pred, sample_weight)

    def call(self, y_true, y_pred):
        return gram_loss(y_true, y_pred, self.normalize, self.per_image, self.negatives)

    def get_config(self):
        config = {
            "normalize": self.normalize,
            "per_image": self.per_image,
            "negatives": self.negatives,
        }
        return {**super().get_config(), **config}


def _check_koleo_options(top_k, distance):
    if not is_count(top_k, at_least=1):
        raise ValueError(f"`top_k` must be an integer of at least 1. Received: top_k={top_k!r}.")
    if distance not in ("euclidean", "cosine"):
        raise ValueError(
            f'`distance` must be "euclidean" or "cosine". Received: distance={distance!r}.'
        )


def check_negatives(negatives):
    if negatives not in ("keep", "remove", "remove_teacher"):
        raise ValueError(
            '`negatives` must be "keep", "remove" or "remove_teacher". '
            f"Received: negatives={negatives!r}."
        )


def _check_rank(ranks, wanted, **tensors):
    ranks = ranks if isinstance(ranks, tuple) else (ranks,)
    for name, tensor in tensors.items():
        if len(tensor.shape) not in ranks:
            raise ValueError(
                f"`{name}` must have shape {wanted}. Received: {name}.shape={tuple(tensor.shape)}."
            )


def _check_equal_axes(axes, meaning, y_true, y_pred):
    """Compares axes as far as both lengths are known."""
    for axis in axes:
        lengths = (y_true.shape[axis], y_pred.shape[axis])
        if None not in lengths and lengths[0] != lengths[1]:
            raise ValueError(
                f"`y_true` and `y_pred` must hold the same {meaning}. Received: "
                f"y_true.shape={tuple(y_true.shape)}, y_pred.shape={tuple(y_pred.shape)}."
            )
