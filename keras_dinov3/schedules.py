"""One schedule type, for everything that changes over training.

Learning rate, weight decay, EMA momentum, temperatures and loss weights all take a plain number or
a schedule; `value_at` reads either. Any `keras.optimizers.schedules.LearningRateSchedule` will do;
`WarmupCosine` is the one that the DINO recipes use.
"""

import itertools
import math
import numbers

import keras
import numpy as np
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
    rate = WarmupCosine.from_epochs(1e-3, 100, steps_per_epoch, warmup_epochs=10)  # the same
    ```

    The last four arguments give the schedules of DINO, DINOv2 and the DINOv3 settings that count
    in that older way: `warmup_reaches_peak=True, cosine_reaches_end=False`.

    Args:
        peak: Float. The value after the warmup.
        total_steps: Int, at least 1. The number of optimizer updates of the whole training, that
            is, epochs times updates per epoch. It only sets the default of `cosine_steps`.
        warmup_steps: Int between 0 and `total_steps`. Optimizer updates of warmup. Defaults to 0.
        start: Float. The value at step 0 if there is a warmup. Defaults to 0.
        end: Float. The value after the cosine. Defaults to 0.
        cosine_steps: Int between 0 and `total_steps - freeze_steps - warmup_steps`, the length of
            the cosine part. Defaults to `None`, which is all of that.
        freeze_steps: Int. Optimizer updates before the warmup, at which the value is 0; all else
            comes that much later. Defaults to 0.
        warmup_reaches_peak: If true, the warmup takes `peak` at its own last step: it divides by
            `w - 1` in place of `w`. Defaults to `False`.
        cosine_reaches_end: If false, the cosine divides by `c` in place of `c - 1`, and `end` comes
            one step after its last. Defaults to `True`.
        truncate_extra: Float of at least 0. The cosine is drawn for
            `int((1 + truncate_extra) * c)` steps, cut after `c` of them, and stretched so that it
            is `end` at the last all the same: it still moves there, where a whole half cosine is
            flat. Needs `cosine_reaches_end=True`. Defaults to 0.

    Call arguments:
        step: Number of optimizer updates made so far: a Python int, or an array or tensor of any
            shape.

    Returns:
        float32 tensor of the shape of `step`, a scalar for a scalar.

    Raises:
        ValueError: If a number of steps is negative, not an integer, or above what
            `total_steps` leaves for it, if a value is not a finite number, or if the cosine is
            both truncated and without its end.

    Reference:
        The half cosine is [Loshchilov & Hutter, 2017](https://arxiv.org/abs/1608.03983),
        equation 5 without restarts; the endpoints are those of the
        [DINOv3](https://arxiv.org/abs/2508.10104) training code.
    """

    def __init__(
        self,
        peak,
        total_steps,
        warmup_steps=0,
        start=0.0,
        end=0.0,
        cosine_steps=None,
        freeze_steps=0,
        warmup_reaches_peak=False,
        cosine_reaches_end=True,
        truncate_extra=0.0,
    ):
        for name, value in (("peak", peak), ("start", start), ("end", end)):
            if not (isinstance(value, numbers.Real) and math.isfinite(value)):
                raise ValueError(f"`{name}` must be a finite number. Received: {name}={value!r}.")
        check_steps("total_steps", total_steps, at_least=1)
        check_steps("warmup_steps", warmup_steps)
        check_steps("freeze_steps", freeze_steps)
        left = total_steps - warmup_steps - freeze_steps
        frozen = f", freeze_steps={freeze_steps}" if freeze_steps else ""
        if left < 0:
            raise ValueError(
                f"`warmup_steps`{' and `freeze_steps`' * bool(frozen)} must be at most "
                "`total_steps`; they count optimizer updates, not epochs. "
                f"Received: warmup_steps={warmup_steps}, total_steps={total_steps}{frozen}."
            )
        if cosine_steps is not None:
            check_steps("cosine_steps", cosine_steps)
            if cosine_steps > left:
                raise ValueError(
                    "`cosine_steps` must be at most `total_steps - freeze_steps - warmup_steps`. "
                    f"Received: cosine_steps={cosine_steps}, total_steps={total_steps}, "
                    f"warmup_steps={warmup_steps}{frozen}. Largest: {left}."
                )
        if not (isinstance(truncate_extra, numbers.Real) and 0 <= truncate_extra < math.inf):
            raise ValueError(
                "`truncate_extra` must be a finite number of at least 0, a share of the cosine's "
                f"length. Received: truncate_extra={truncate_extra!r}."
            )
        if truncate_extra and not cosine_reaches_end:
            raise ValueError(
                "A truncated cosine is stretched to its end, so `truncate_extra` needs "
                "`cosine_reaches_end=True`. Received: cosine_reaches_end=False, "
                f"truncate_extra={truncate_extra}."
            )
        self.peak = peak
        self.total_steps = total_steps
        self.warmup_steps = warmup_steps
        self.start = start
        self.end = end
        self.cosine_steps = cosine_steps
        self.freeze_steps = freeze_steps
        self.warmup_reaches_peak = warmup_reaches_peak
        self.cosine_reaches_end = cosine_reaches_end
        self.truncate_extra = truncate_extra

    @classmethod
    def from_epochs(
        cls,
        peak,
        epochs,
        steps_per_epoch,
        warmup_epochs=0,
        cosine_epochs=None,
        freeze_epochs=0,
        **kwargs,
    ):
        """A schedule whose lengths are given in epochs, whole or not.

        Args:
            peak: Float. The value after the warmup.
            epochs: Number. Epochs of the whole training.
            steps_per_epoch: Int, at least 1. Optimizer updates in one epoch.
            warmup_epochs: Number. Epochs of warmup. Defaults to 0.
            cosine_epochs: Number. Epochs of the cosine part. `None`: all that are left.
            freeze_epochs: Number. Epochs at 0, before the warmup. Defaults to 0.
            **kwargs: The other arguments of `WarmupCosine`.

        Returns:
            `WarmupCosine`; the ends of its parts are rounded to whole steps.

        Raises:
            ValueError: As `WarmupCosine`.
        """
        check_steps("steps_per_epoch", steps_per_epoch, at_least=1)

        lengths = {"freeze_epochs": freeze_epochs, "warmup_epochs": warmup_epochs}
        if cosine_epochs is not None:
            lengths["cosine_epochs"] = cosine_epochs
        for name, value in {"epochs": epochs, **lengths}.items():
            check_range(name, value, low=0, below=math.inf, scheduled=False)
        # Rounded are the ends, so that parts which fill the epochs fill the steps.
        ends = [round(end * steps_per_epoch) for end in itertools.accumulate(lengths.values())]
        freeze, warmup, *cosine = np.diff([0, *ends]).tolist()
        return cls(
            peak,
            round(epochs * steps_per_epoch),
            warmup_steps=warmup,
            cosine_steps=cosine[0] if cosine else None,
            freeze_steps=freeze,
            **kwargs,
        )

    def __call__(self, step):
        return self._formula(ops.cast(step, "float32"), ops)

    def values(self, steps=None):
        """The schedule in double precision, to plot or to check it.

        Args:
            steps: Array of ints. `None`: all of `range(total_steps)`.

        Returns:
            float64 NumPy array of the shape of `steps`.
        """
        steps = np.arange(self.total_steps) if steps is None else steps
        return self._formula(np.asarray(steps, "float64"), np)

    def _formula(self, step, ops):
        """The values at `step` by the functions of `ops`, which is `keras.ops` or `numpy`."""
        step = step - self.freeze_steps
        warmup = self.warmup_steps
        cosine = self.cosine_steps
        if cosine is None:
            cosine = self.total_steps - self.freeze_steps - warmup
        rise = max(warmup - self.warmup_reaches_peak, 1)
        # The steps of a whole half cosine, and the share of them that is taken.
        whole = int((1 + self.truncate_extra) * cosine) - self.cosine_reaches_end
        share = (cosine - 1) / whole if self.truncate_extra and cosine > 1 else 1.0
        span = max(cosine - self.cosine_reaches_end, 1)

        rising = self.start + (self.peak - self.start) * (step / rise)
        # (cos(angle) - cos(last)) / (1 - cos(last)), where `last` is pi for a whole half cosine, as
        # a product of sines: exactly 1 and 0 at both ends, and nothing cancels in between.
        left = 1.0 - ops.clip((step - warmup) / span, 0.0, 1.0)
        half = 0.5 * math.pi * share
        falling = ops.sin(half * (2.0 - left)) * ops.sin(half * left)
        falling = self.end + (self.peak - self.end) / math.sin(half) ** 2 * falling
        after = ops.where(step < warmup + cosine, falling, float(self.end))
        value = ops.where(step < warmup, rising, after)
        return ops.where(step < 0, 0.0, value) if self.freeze_steps else value

    def get_config(self):
        return {
            "peak": self.peak,
            "total_steps": self.total_steps,
            "warmup_steps": self.warmup_steps,
            "start": self.start,
            "end": self.end,
            "cosine_steps": self.cosine_steps,
            "freeze_steps": self.freeze_steps,
            "warmup_reaches_peak": self.warmup_reaches_peak,
            "cosine_reaches_end": self.cosine_reaches_end,
            "truncate_extra": self.truncate_extra,
        }


def value_at(value, step):
    """The value of a number or schedule at a step.

    Args:
        value: A number, a scalar tensor, or a schedule: a callable from step to value, such as
            `WarmupCosine`.
        step: Number of optimizer updates made so far, int or scalar tensor; a schedule gets it as
            a float32 tensor.

    Returns:
        Scalar float32 tensor.
    """
    if callable(value):
        value = value(ops.cast(step, "float32"))
    return ops.cast(value, "float32")


SAMPLE_STEPS = (0, 1, 10, 100, 1000, 10_000, 100_000, 1_000_000)


def check_range(name, value, above=None, low=None, high=None, below=None, scheduled=True):
    """Raises if a number, or a value that a schedule takes, is out of range.

    A `WarmupCosine` is checked at all its steps, another schedule at a few; scalar tensors pass.

    Args:
        name: The name of the argument, for the message.
        value: Number or schedule.
        above: Number that `value` must exceed. Defaults to `None`, no such bound.
        low: Smallest number allowed. Defaults to `None`.
        high: Largest number allowed. Defaults to `None`.
        below: Number that `value` must stay under. Defaults to `None`.
        scheduled: Whether `value` may be a schedule.

    Raises:
        ValueError: If `value` is out of range, NaN, or neither a number nor a schedule.
    """
    if not scheduled and not isinstance(value, numbers.Real):
        raise ValueError(f"`{name}` must be a number. Received: {name}={value!r}.")
    if isinstance(value, WarmupCosine):
        # All its values lie between these; `start` is never taken without a warmup.
        values = [value.peak, value.end] + ([value.start] if value.warmup_steps else [])
        values += [0.0] if value.freeze_steps else []
        received = f"WarmupCosine({', '.join(f'{k}={v}' for k, v in value.get_config().items())})"
    elif callable(value):
        values = [float(ops.convert_to_numpy(value_at(value, step))) for step in SAMPLE_STEPS]
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
        # A decay may reach its limit in float32, long after the run that it is made for.
        late = values[4:] if callable(value) and not isinstance(value, WarmupCosine) else []
        early = values[: len(values) - len(late)]
        holds = all(v > above for v in early) and all(v >= above for v in late)
        rules.append((f"greater than {above}", holds))
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


def check_count(name, count, at_least=0):
    """Raises a `ValueError` if a number is not an integer of at least `at_least`."""
    if not is_count(count, at_least):
        raise ValueError(
            f"`{name}` must be an integer of at least {at_least}. Received: {name}={count!r}."
        )


def check_steps(name, steps, at_least=0):
    """As `check_count`, for numbers of optimizer updates."""
    if not is_count(steps, at_least):
        raise ValueError(
            f"`{name}` must be an integer of at least {at_least}: it counts optimizer updates, "
            "that is, epochs times updates per epoch. "
            f"Received: {name}={steps!r}."
            + (f" Nearest: {round(steps)}." if _is_fraction_above(steps, at_least) else "")
        )


def is_count(value, at_least):
    """Whether a value is an integer of at least `at_least`."""
    is_integer = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    return is_integer and value >= at_least


def _is_fraction_above(steps, at_least):
    return isinstance(steps, float) and math.isfinite(steps) and round(steps) >= at_least
