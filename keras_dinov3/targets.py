"""Teacher logits in, target probabilities out: `sinkhorn_knopp` and `SoftmaxCentering`."""

import keras
from keras import ops

from keras_dinov3.schedules import check_range

NOTHING = -1e30  # a finite log(0): the exponential of a score this far below others is exactly 0
SMALLEST_SUM = 1e-30  # reached only if all weights are 0


def sinkhorn_knopp(logits, temperature, num_iterations=3, weights=None):
    """Softmax targets that use all prototypes equally, by Sinkhorn-Knopp.

    Starting from `exp(logits / temperature)`, each iteration divides every prototype by its sum
    over all samples of the batch, then every sample by its sum over prototypes. So each sample
    sums to 1, and prototypes get nearly equal shares. It is computed in the log domain in float32:
    no logit is too large, no temperature too small and no prototype too dead for it.

    Args:
        logits: Teacher logits, shape `(..., K)`, any float dtype. All leading axes are samples.
        temperature: Positive float or scalar tensor that divides `logits`.
        num_iterations: Int, at least 1. Defaults to 3.
        weights: Optional, shape `(...)`: how much each sample counts in the sums over samples; 1
            for a sample and 0 for a padded slot, as bool or any number type. What a padded slot
            holds, NaN included, has no influence at all, and padded slots at the end of the
            last sample axis change no addition (see `pairwise_sum`). Defaults to `None`, all 1.

    Returns:
        float32 tensor of shape `(..., K)`. The last axis sums to 1, or is 0 where `weights` are.
        No gradient flows through it.

    Raises:
        ValueError: If `temperature` is not positive, `num_iterations` is less than 1 or the shape
            of `weights` is not that of the samples.

    Reference:
        [Caron et al., 2020](https://arxiv.org/abs/2006.09882), section 3.1;
        [Oquab et al., 2023](https://arxiv.org/abs/2304.07193), section 4.
    """
    check_range("temperature", temperature, above=0)
    if not isinstance(num_iterations, int) or num_iterations < 1:
        raise ValueError(
            "`num_iterations` must be an integer of at least 1. "
            f"Received: num_iterations={num_iterations!r}."
        )
    scores = ops.stop_gradient(ops.cast(logits, "float32") / temperature)
    if weights is not None:
        weights = _column(weights, scores)
        scores = ops.where(weights > 0, scores, NOTHING)
    # The log of what each prototype is divided by, (K,). It starts from the largest score, so that
    # nothing overflows and the first sum over samples is at least 1; later ones are at least 1 / K.
    log_scale = ops.max(scores, axis=tuple(range(len(scores.shape) - 1)))
    shares = ops.exp(scores - log_scale)
    for _ in range(num_iterations):
        if weights is not None:
            shares = shares * weights
        log_scale = log_scale + ops.log(ops.maximum(_sum_over_samples(shares), SMALLEST_SUM))
        shares = ops.softmax(scores - log_scale, axis=-1)
    return shares if weights is None else ops.where(weights > 0, shares, 0.0)


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
        float32 tensor of shape `(..., K)`. The last axis sums to 1, or is 0 where `weights` are.
        No gradient flows through it.

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
        logits = ops.stop_gradient(ops.cast(logits, "float32"))
        if weights is not None:
            weights = _column(weights, logits)
            logits = ops.where(weights > 0, logits, 0.0)
        center = ops.convert_to_tensor(self.center)
        probabilities = ops.softmax((logits - center) / temperature, axis=-1)
        if weights is not None:
            probabilities = ops.where(weights > 0, probabilities, 0.0)
        if training:
            self._move(center, logits, weights)
        return ops.stop_gradient(probabilities)

    def _move(self, center, logits, weights):
        if weights is None:
            weights = ops.ones_like(logits[..., :1])
        total = _sum_over_samples(weights)  # (1,)
        mean = _sum_over_samples(logits * weights) / ops.where(total > 0, total, 1.0)
        momentum = self.momentum
        if self.has_center is not None:
            has_center = ops.convert_to_tensor(self.has_center)
            momentum = momentum * has_center
            self.has_center.assign(ops.where(total[0] > 0, 1.0, has_center))
        moved = center * momentum + mean * (1.0 - momentum)
        self.center.assign(ops.where(total > 0, moved, center))

    def get_config(self):
        return {**super().get_config(), "momentum": self.momentum, "initial": self.initial}


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
    while x.shape[-2] > 1:
        *before, length, width = x.shape
        if length % 2:
            x = ops.pad(x, [(0, 0)] * len(before) + [(0, 1), (0, 0)])
        x = ops.reshape(x, (*before, (length + 1) // 2, 2, width))
        x = x[..., 0, :] + x[..., 1, :]  # not `ops.sum`: XLA would merge the levels into one
    return ops.squeeze(x, axis=-2)


def _sum_over_samples(x):
    """Sum over all axes but the last; the one place that would also sum over devices."""
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
