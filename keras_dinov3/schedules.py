"""One schedule type, for everything that changes over training.

Learning rate, weight decay, EMA momentum, temperatures and loss weights all take a plain number or
a schedule; `value_at` reads either. Any `keras.optimizers.schedules.LearningRateSchedule` will do;
`WarmupCosine` is the one that the DINO recipes use.
"""

import math
import numbers

import keras
from keras import ops


@keras.saving.register_keras_serializable(package="keras_dinov3")
class WarmupCosine(keras.optimizers.schedules.LearningRateSchedule):
    """A linear warmup, then half a cosine, then a constant.

    With `w = warmup_steps` and `c = cosine_steps`, the value at step `i` is

    - `start + (peak - start) * i / w` for `i < w`, so that `peak` is first reached at step `w`;
    - `end + (peak - end) * (1 + cos(pi * (i - w) / (c - 1))) / 2` for `w <= i < w + c`, which is
      exactly `end` at the last of these steps;
    - `end` from then on, also beyond `total_steps`.

    The same type serves a value that rises: a momentum from 0.992 to 1 has `peak=0.992, end=1.0`,
    and a teacher temperature that warms up and stays has `start=0.04, peak=0.07, end=0.07`.

    ```python
    steps_per_epoch = len(images) // batch_size
    rate = WarmupCosine(1e-3, total_steps=100 * steps_per_epoch, warmup_steps=10 * steps_per_epoch)
    ```

    Args:
        peak: Float. The value after the warmup.
        total_steps: Int, at least 1. The number of optimizer updates of the whole training, that
            is, epochs times updates per epoch. It only sets the default of `cosine_steps`.
        warmup_steps: Int between 0 and `total_steps`. Optimizer updates of warmup. Defaults to 0.
        start: Float. The value at step 0 if there is a warmup. Defaults to 0.
        end: Float. The value after the cosine. Defaults to 0.
        cosine_steps: Int between 0 and `total_steps - warmup_steps`, the length of the cosine
            part. Defaults to `None`, which is all of `total_steps - warmup_steps`.

    Call arguments:
        step: Number of optimizer updates made so far: a Python int, or an array or tensor of any
            shape.

    Returns:
        float32 tensor of the shape of `step`, a scalar for a scalar.

    Raises:
        ValueError: If a number of steps is negative, not an integer, or above what
            `total_steps` leaves for it, or if a value is not a finite number.

    Reference:
        The half cosine is [Loshchilov & Hutter, 2017](https://arxiv.org/abs/1608.03983),
        equation 5 without restarts; the endpoints are those of the
        [DINOv3](https://arxiv.org/abs/2508.10104) training code.
    """

    def __init__(self, peak, total_steps, warmup_steps=0, start=0.0, end=0.0, cosine_steps=None):
        for name, value in (("peak", peak), ("start", start), ("end", end)):
            if not (isinstance(value, numbers.Real) and math.isfinite(value)):
                raise ValueError(f"`{name}` must be a finite number. Received: {name}={value!r}.")
        _check_steps("total_steps", total_steps, at_least=1)
        _check_steps("warmup_steps", warmup_steps)
        left = total_steps - warmup_steps
        if left < 0:
            raise ValueError(
                "`warmup_steps` must be at most `total_steps`; both count optimizer updates, not "
                f"epochs. Received: warmup_steps={warmup_steps}, total_steps={total_steps}."
            )
        if cosine_steps is not None:
            _check_steps("cosine_steps", cosine_steps)
            if cosine_steps > left:
                raise ValueError(
                    "`cosine_steps` must be at most `total_steps - warmup_steps`. Received: "
                    f"cosine_steps={cosine_steps}, total_steps={total_steps}, "
                    f"warmup_steps={warmup_steps}. Largest: {left}."
                )
        self.peak = peak
        self.total_steps = total_steps
        self.warmup_steps = warmup_steps
        self.start = start
        self.end = end
        self.cosine_steps = cosine_steps

    def __call__(self, step):
        step = ops.cast(step, "float32")
        warmup = self.warmup_steps
        cosine = self.total_steps - warmup if self.cosine_steps is None else self.cosine_steps
        rising = self.start + (self.peak - self.start) * (step / max(warmup, 1))
        # (1 + cos(pi * t)) / 2 as a squared sine, which is exactly 1 and 0 at both ends.
        left = 1.0 - ops.clip((step - warmup) / max(cosine - 1, 1), 0.0, 1.0)
        falling = self.end + (self.peak - self.end) * ops.square(ops.sin(0.5 * math.pi * left))
        after = ops.where(step < warmup + cosine, falling, float(self.end))
        return ops.where(step < warmup, rising, after)

    def get_config(self):
        return {
            "peak": self.peak,
            "total_steps": self.total_steps,
            "warmup_steps": self.warmup_steps,
            "start": self.start,
            "end": self.end,
            "cosine_steps": self.cosine_steps,
        }


def value_at(value, step):
    """The value of a number or schedule at a step.

    Args:
        value: A number, a scalar tensor, or a schedule: a callable from step to value, such as
            `WarmupCosine`.
        step: Number of optimizer updates made so far, int or scalar tensor. Not used if `value`
            is a number.

    Returns:
        Scalar float32 tensor.
    """
    return ops.cast(value(step) if callable(value) else value, "float32")


SAMPLE_STEPS = (0, 1, 10, 100, 1000, 10_000, 100_000, 1_000_000)


def check_range(name, value, above=None, low=None, high=None, below=None):
    """Raises if a number, or a value that a schedule takes, is out of range.

    A `WarmupCosine` is checked at all its steps, another schedule at a few; scalar tensors pass.

    Args:
        name: The name of the argument, for the message.
        value: Number or schedule.
        above: Number that `value` must exceed. Defaults to `None`, no such bound.
        low: Smallest number allowed. Defaults to `None`.
        high: Largest number allowed. Defaults to `None`.
        below: Number that `value` must stay under. Defaults to `None`.

    Raises:
        ValueError: If `value` is out of range, NaN, or neither a number nor a schedule.
    """
    if isinstance(value, WarmupCosine):
        # All its values lie between these; `start` is never taken without a warmup.
        values = [value.peak, value.end] + ([value.start] if value.warmup_steps else [])
        received = f"WarmupCosine({', '.join(f'{k}={v}' for k, v in value.get_config().items())})"
    elif callable(value):
        values = [float(ops.convert_to_numpy(value(step))) for step in SAMPLE_STEPS]
        taken = ", ".join(f"{v:g}" for v in values)
        received = f"{value}, which is {taken} at the steps {SAMPLE_STEPS}"
    elif isinstance(value, numbers.Real):
        values, received = [value], value
    elif hasattr(value, "shape"):
        return
    else:
        raise ValueError(
            f"`{name}` must be a number or a schedule, such as `WarmupCosine`. "
            f"Received: {name}={value!r}."
        )
    rules = []
    if above is not None:
        rules.append((f"greater than {above}", all(v > above for v in values)))
    if low is not None:
        rules.append((f"at least {low}", all(v >= low for v in values)))
    if high is not None:
        rules.append((f"at most {high}", all(v <= high for v in values)))
    if below is not None:
        rules.append((f"less than {below}", all(v < below for v in values)))
    if not all(holds for _, holds in rules):
        rule = " and ".join(text for text, _ in rules)
        raise ValueError(f"`{name}` must be {rule}. Received: {name}={received}.")


def is_zero(weight):
    """Whether a weight is the number 0, and not a schedule that may be."""
    return isinstance(weight, numbers.Real) and weight == 0


def serialize(value):
    """A number or schedule as plain data for `get_config`; `deserialize` undoes it."""
    return keras.saving.serialize_keras_object(value)


def deserialize(config):
    """The number or schedule that `serialize` was given. Numbers and schedules pass unchanged."""
    return keras.saving.deserialize_keras_object(config) if isinstance(config, dict) else config


def _check_steps(name, steps, at_least=0):
    if not isinstance(steps, numbers.Integral) or isinstance(steps, bool) or steps < at_least:
        raise ValueError(
            f"`{name}` must be an integer of at least {at_least}: it counts optimizer updates, "
            "that is, epochs times updates per epoch. "
            f"Received: {name}={steps!r}."
            + (f" Nearest: {round(steps)}." if _is_fraction_above(steps, at_least) else "")
        )


def _is_fraction_above(steps, at_least):
    return isinstance(steps, float) and math.isfinite(steps) and round(steps) >= at_least
