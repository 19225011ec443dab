"""Teacher logits in, target probabilities out: `sinkhorn_knopp` and `SoftmaxCentering`."""

import functools

import keras
from keras import ops

from keras_dinov3 import backend
from keras_dinov3.prototypes import LOWEST, FactoredLogits, FactoredTargets, add_chunk
from keras_dinov3.schedules import check_range, is_count, value_at

SMALLEST_SUM = 1e-30  # reached only if all weights are 0


def sinkhorn_knopp(logits, temperature, num_iterations=3, weights=None):
    """Softmax targets that use all prototypes equally, by Sinkhorn-Knopp.

    Starting from `exp(logits / temperature)`, each iteration divides every prototype by its sum
    over all samples of the batch, then every sample by its sum over prototypes. So each sample
    sums to 1, and prototypes get nearly equal shares. It is computed in the log domain in float32:
    no logit is too large, no temperature too small and no prototype too dead for it.

    Args:
        logits: Teacher logits, shape `(..., K)`, any float dtype. All leading axes are samples.
            Or `FactoredLogits`: then all is done chunk by chunk.
        temperature: Positive float or scalar tensor that divides `logits`.
        num_iterations: Int, at least 1. Defaults to 3.
        weights: Optional, shape `(...)`: how much each sample counts in the sums over samples; 1
            for a sample and 0 for a padded slot, as bool or any number type. What a padded slot
            holds, NaN included, has no influence at all, and padded slots at the end of the
            last sample axis change no addition (see `pairwise_sum`). Defaults to `None`, all 1.

    Returns:
        float32 tensor of shape `(..., K)`, or `FactoredTargets`. The last axis sums to 1, or is 0
        where `weights` are. No gradient flows through it.

    Raises:
        ValueError: If `temperature` is not positive, `num_iterations` is less than 1 or the shape
            of `weights` is not that of the samples.

    Reference:
        [Caron et al., 2020](https://arxiv.org/abs/2006.09882), section 3.1;
        [Oquab et al., 2023](https://arxiv.org/abs/2304.07193), section 4.
    """
    check_range("temperature", temperature, above=0)
    if not is_count(num_iterations, at_least=1):
        raise ValueError(
            "`num_iterations` must be an integer of at least 1. "
            f"Received: num_iterations={num_iterations!r}."
        )
    if weights is not None:
        weights = _column(weights, logits)
    if isinstance(logits, FactoredLogits):
        return _sinkhorn_in_chunks(logits, temperature, num_iterations, weights)
    scores = ops.stop_gradient(ops.cast(logits, "float32") / temperature)
    if weights is not None:
        scores = ops.where(weights > 0, scores, LOWEST)
    # The log of what each prototype is divided by, (K,). It starts from the largest score, so that
    # nothing overflows and the first sum over samples is at least 1; later ones are at least 1 / K.
    log_scale = ops.max(scores, axis=tuple(range(len(scores.shape) - 1)))
    log_scale = log_scale + _log_of_sum(ops.exp(scores - log_scale), weights)
    for _ in range(num_iterations - 1):
        log_scale = log_scale + _log_of_sum(ops.softmax(scores - log_scale), weights)
    shares = ops.softmax(scores - log_scale)
    return shares if weights is None else ops.where(weights > 0, shares, 0.0)


def _sinkhorn_in_chunks(logits, temperature, num_iterations, weights):
    """The same for `FactoredLogits`, with one pass over the chunks per iteration."""
    targets = _before_any_chunk(logits, temperature, weights)
    targets = _divide_in_chunks(targets, weights, is_first=True)
    for _ in range(num_iterations - 1):
        targets = _divide_in_chunks(targets, weights)
    return _without_padding(targets, weights)


def _divide_in_chunks(targets, weights, is_first=False):
    """Divides prototypes by their sums over samples, then samples by their sums over prototypes.

    A prototype's sum needs its own chunk only, and a sample's is added up from chunk to chunk.
    """

    def divide(index, carry):
        offsets, peak, total = carry
        scores = targets.scores(index)
        if is_first:
            kept = scores if weights is None else ops.where(weights > 0, scores, LOWEST)
            offset = ops.max(kept, axis=tuple(range(len(scores.shape) - 1)))
            shares = ops.exp(kept - offset)
        else:
            offset, shares = targets.offsets[index], targets.chunk(index, scores)
        offset = offset + _log_of_sum(shares, weights)
        offsets = backend.put(offsets, offset[None], (index, 0))
        return offsets, *add_chunk(peak, total, scores - offset)

    start = _before_any_chunk(targets.logits, targets.temperature)
    carry = start.offsets, start.peak, start.total
    offsets, peak, total = backend.loop(targets.logits.kernel.shape[1], divide, carry)
    return targets._replace(offsets=offsets, peak=peak, total=total)


def _before_any_chunk(logits, temperature, weights=None):
    """`FactoredTargets` whose sums have not begun, in which padded slots hold zeros."""
    vectors, kernel = ops.stop_gradient(logits.vectors), ops.stop_gradient(logits.kernel)
    if weights is not None:
        vectors = ops.where(weights > 0, vectors, ops.zeros_like(vectors))
    rows = ops.zeros(vectors.shape[:-1], "float32")
    return FactoredTargets(
        FactoredLogits(vectors, kernel),
        ops.convert_to_tensor(temperature, "float32"),
        offsets=ops.zeros(kernel.shape[1:], "float32"),
        peak=rows + LOWEST,
        total=rows,
    )


def _without_padding(targets, weights):
    if weights is None:
        return targets
    total = ops.where(weights[..., 0] > 0, targets.total, float("inf"))
    return targets._replace(total=total)


@keras.saving.register_keras_serializable(package="keras_dinov3")
class SoftmaxCentering(keras.layers.Layer):
    """Softmax targets after subtracting a running mean of the logits.

    A call returns `softmax((logits - center) / temperature)` with the center of earlier calls.
    Then, in training, the center moves: `center = momentum * center + (1 - momentum) *
    mean(logits)`, the mean over all samples of the batch. The center is a weight, so it is saved
    and loaded.

    Args:
        momentum: Float from 0 to 1, the share of the old center. Defaults to 0.9.
        initial: The center before the first call is 0. `"zeros"` moves it by the rule from there;
            `"first_batch"` sets it to the mean of the first batch at the first training call.
            Defaults to `"zeros"`, as in DINO and DINOv3.
        **kwargs: Keyword arguments of `keras.layers.Layer`.

    Call arguments:
        logits: Teacher logits, shape `(..., K)`, any float dtype. All leading axes are samples.
        temperature: Positive float or scalar tensor.
        weights: Optional, shape `(...)`, as in `sinkhorn_knopp`: the mean is weighted, and padded
            slots with weight 0 have no influence. If all are 0, the center stays. Defaults to
            `None`, all 1.
        training: Whether the center moves. Defaults to `True` in a direct call, since targets are
            only made in training; inside a model, to the model's mode.

    Returns:
        float32 tensor of shape `(..., K)`, or `FactoredTargets`. The last axis sums to 1, or is 0
        where `weights` are. No gradient flows through it.

    Raises:
        ValueError: If `momentum` is outside 0 to 1, `initial` is unknown, `temperature` is not
            positive or the shape of `weights` is not that of the samples.

    Reference:
        [Caron et al., 2021](https://arxiv.org/abs/2104.14294), equation 4.
    """

    def __init__(self, momentum=0.9, initial="zeros", **kwargs):
        check_range("momentum", momentum, low=0, high=1)
        if initial not in ("zeros", "first_batch"):
            raise ValueError(
                f'`initial` must be "zeros" or "first_batch". Received: initial={initial!r}.'
            )
        super().__init__(autocast=False, **kwargs)  # logits stay as exact as they come
        self.momentum = momentum
        self.initial = initial

    def build(self, logits_shape):
        def add(name, shape):
            return self.add_weight(
                name=name,
                shape=shape,
                initializer="zeros",
                dtype="float32",
                autocast=False,
                trainable=False,
            )

        self.center = add("center", (logits_shape[-1],))
        # 1 once the center has been set
        self.has_center = add("has_center", ()) if self.initial == "first_batch" else None

    def __call__(self, logits, temperature, **kwargs):
        # by name, since Keras takes no plain number by position
        return super().__call__(logits, temperature=temperature, **kwargs)

    def call(self, logits, temperature, weights=None, training=True):
        check_range("temperature", temperature, above=0)
        if weights is not None:
            weights = _column(weights, logits)
        center = ops.convert_to_tensor(self.center)
        if isinstance(logits, FactoredLogits):
            probabilities, sums = _center_in_chunks(logits, center, temperature, weights)
        else:
            logits = ops.stop_gradient(ops.cast(logits, "float32"))
            if weights is not None:
                logits = ops.where(weights > 0, logits, 0.0)
            probabilities = ops.softmax((logits - center) / temperature, axis=-1)
            if weights is not None:
                probabilities = ops.where(weights > 0, probabilities, 0.0)
            sums = _sum_over_samples(logits, weights)
        if training:
            samples = ops.ones((*logits.shape[:-1], 1), "float32")
            self._move(center, sums, _sum_over_samples(samples, weights))
        return keras.tree.map_structure(ops.stop_gradient, probabilities)

    def _move(self, center, sums, total):
        mean = sums / ops.where(total > 0, total, 1.0)
        momentum = self.momentum
        if self.has_center is not None:
            has_center = ops.convert_to_tensor(self.has_center)
            momentum = momentum * has_center
            self.has_center.assign(ops.where(total[0] > 0, 1.0, has_center))
        moved = center * momentum + mean * (1.0 - momentum)
        self.center.assign(ops.where(total > 0, moved, center))

    def get_config(self):
        return {**super().get_config(), "momentum": self.momentum, "initial": self.initial}


def _center_in_chunks(logits, center, temperature, weights):
    """Of `FactoredLogits`, the centered targets, and the sums over samples `(K,)`."""
    targets = _before_any_chunk(logits, temperature, weights)
    offsets = ops.reshape(center, targets.offsets.shape) / temperature

    def add(index, carry):
        sums, peak, total = carry
        chunk = targets.logits.chunk(index)
        sums = backend.put(sums, _sum_over_samples(chunk, weights)[None], (index, 0))
        return sums, *add_chunk(peak, total, chunk / targets.temperature - offsets[index])

    carry = targets.offsets, targets.peak, targets.total
    sums, peak, total = backend.loop(logits.kernel.shape[1], add, carry)
    targets = targets._replace(offsets=offsets, peak=peak, total=total)
    return _without_padding(targets, weights), ops.reshape(sums, center.shape)


def pairwise_sum(x):
    """Sum over the axis before the last, as a tree of sums of two neighbours.

    Backends choose the order of `ops.sum` by the length of the axis, so that zeros appended to
    it change the rounding. In the tree they do not: `(a + b) + c` becomes `(a + b) + (c + 0)`.
    (XLA still fuses different shapes differently, which can change the last bit of what is
    summed.) Rounding errors are also smaller.

    Args:
        x: Tensor of shape `(..., n, K)`.

    Returns:
        Tensor of shape `(..., K)`.
    """
    if not x.shape[-2]:  # empty, or unknown
        return ops.sum(x, axis=-2)
    last = []  # rows that had no neighbour, from the end of the axis to its start
    while x.shape[-2] > 1:
        if x.shape[-2] % 2:
            last.append(x[..., -1, :])
            x = x[..., :-1, :]
        x = x[..., 0::2, :] + x[..., 1::2, :]  # not `ops.sum`: XLA would merge levels into one
    return functools.reduce(lambda total, row: row + total, [*last, x[..., 0, :]])


def _log_of_sum(shares, weights):
    """The log of the sum over samples, `(..., K)` to `(K,)`."""
    return ops.log(ops.maximum(_sum_over_samples(shares, weights), SMALLEST_SUM))


def _sum_over_samples(x, weights=None):
    """Sum over all axes but the last; the one place that would also sum over devices."""
    x = x if weights is None else x * weights
    x = pairwise_sum(x) if len(x.shape) > 1 else x
    return ops.sum(x, axis=tuple(range(len(x.shape) - 1)))


def _column(weights, logits):
    """Sample weights `(..., 1)`, checked against logits `(..., K)`."""
    shapes = tuple(ops.shape(weights)), tuple(logits.shape[:-1])
    if shapes[0] != shapes[1]:
        raise ValueError(
            "`weights` must have the shape of the samples, all but the last axis of `logits`. "
            f"Received: weights.shape={shapes[0]}, logits.shape={tuple(logits.shape)}."
        )
    return ops.stop_gradient(ops.expand_dims(ops.cast(weights, "float32"), axis=-1))


def make_targets(centering, num_prototypes, sinkhorn_iterations=3):
    """A function `(logits, temperature, weights=None, training=None)` to target probabilities.

    Args:
        centering: `"sinkhorn_knopp"`, or a `SoftmaxCentering` whose settings a new one takes.
        num_prototypes: Int, `K`.
        sinkhorn_iterations: Int, at least 1.
    """
    if isinstance(centering, SoftmaxCentering):
        targets = SoftmaxCentering.from_config({**centering.get_config(), "name": None})
        targets.build((None, num_prototypes))
        return targets

    def sinkhorn_targets(logits, temperature, weights=None, training=None):
        return sinkhorn_knopp(logits, temperature, sinkhorn_iterations, weights)

    return sinkhorn_targets


def targets_of(model, outputs, training=False):
    """Target probabilities from the teacher's logits among the outputs of a `DINOv3`.

    Args:
        model: `DINOv3`, whose centering and present temperature apply.
        outputs: Dict with `"teacher_global"` `(B, G, K)`, and `"teacher_patches"` `(M, K)` where
            there are `"slots"`.
        training: Whether a running center moves.

    Returns:
        Dict of float32 tensors of these shapes, or `FactoredTargets`: `"dino"` and `"ibot"`.
    """
    temperature = value_at(model.teacher_temperature, model.step)
    logits = outputs["teacher_global"]
    targets = {"dino": model.class_targets(logits, temperature, training=training)}
    if "slots" in outputs:
        logits, weights = outputs["teacher_patches"], outputs["slots"].valid
        settings = {"weights": weights, "training": training}
        targets["ibot"] = model.patch_targets(logits, temperature, **settings)
    return targets
