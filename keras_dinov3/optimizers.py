"""`AdamW` with rates and decays by the place of a weight, and clipping by the part of a model."""

import math
import numbers
from typing import Any, NamedTuple

import keras
from keras import ops

from keras_dinov3 import backend
from keras_dinov3.roles import role_of
from keras_dinov3.schedules import (
    check_range,
    check_steps,
    deserialize,
    serialize,
    value_at,
)


class Multipliers(NamedTuple):
    """What `AdamW` multiplies its rate and its decay by, for one weight."""

    rate: float
    decay: float
    is_last_layer: bool
    is_backbone: bool


class Rates(NamedTuple):
    """The numbers that all weights share in one update, float32 scalars."""

    rate: Any
    last_layer_rate: Any
    backbone_rate: Any
    decay: Any
    mean_correction: Any  # 1 - beta_1 ** t
    square_correction: Any  # sqrt(1 - beta_2 ** t)

    def of(self, multipliers):
        """Rate and decay of a weight with these multipliers."""
        rate = self.last_layer_rate if multipliers.is_last_layer else self.rate
        rate = self.backbone_rate if multipliers.is_backbone else rate
        return rate * multipliers.rate, self.decay * multipliers.decay


@keras.saving.register_keras_serializable(package="keras_dinov3")
class AdamW(keras.optimizers.Optimizer):
    """AdamW with rates and decays by place, scheduled decay, and clipping by part.

    The update `t` (counted from 1) of a weight `p` with gradient `g` is, in this order,

    - `g *= min(1, part_clipnorm / (norm + 1e-6))`, with the norm of all gradients of its part;
    - `p *= 1 - rate * decay`;
    - `m = beta_1 * m + (1 - beta_1) * g` and `v = beta_2 * v + (1 - beta_2) * g ** 2`;
    - `p -= rate * (m / (1 - beta_1 ** t)) / (sqrt(v / (1 - beta_2 ** t)) + epsilon)`.

    The `rate` of a weight is `learning_rate` times `layerwise_decay ** depth`, and in the patch
    embedding and the heads times their multipliers. The depth is 0 for the heads and the final
    norm, 1 for the last block, and one more for each block before it up to class, register and
    mask tokens and the patch embedding. The `decay` is `weight_decay` for matrices and tokens, and
    0 for biases, norms and layer scale. Parts are `backbone`, `dino_head` and `ibot_head`.

    All that holds for the weights of a `DINOv3`, which tells each its `Role`. Elsewhere this is a
    plain AdamW with all multipliers 1, and all weights are one part. Its epsilon stands where
    Kingma & Ba have it, not where `keras.optimizers.AdamW` has.

    `exclude_from_weight_decay` works, also after `load_model`: as with all Keras optimizers what it
    says is not saved, so call it again there, before the next step.

    Schedules count updates, also under `gradient_accumulation_steps`, where those of Keras's own
    optimizers count batches.

    ```python
    rate = scaled_learning_rate(1e-3, batch_size=256)
    model.compile(
        kd.AdamW(
            kd.WarmupCosine(rate, total_steps=10_000, warmup_steps=1_000, end=1e-6),
            weight_decay=kd.WarmupCosine(0.04, total_steps=10_000, end=0.2),
            layerwise_decay=0.9,
            patch_embed_multiplier=0.2,
            freeze_last_layer_steps=100,
            part_clipnorm=3.0,
        )
    )
    ```

    Args:
        learning_rate: Float, schedule, or callable without arguments.
        weight_decay: Float or schedule.
        beta_1: Float in [0, 1). Decay of the gradient's running mean.
        beta_2: Float in [0, 1). Decay of the squared gradient's running mean.
        epsilon: Positive float.
        layerwise_decay: Float in (0, 1]. Factor of the rate from each block to the one before.
        patch_embed_multiplier: Float of at least 0. Further factor of the patch embedding's rate.
        head_multiplier: Float of at least 0. Factor of the heads' rate.
        head_decay_multiplier: Float of at least 0. Factor of the heads' weight decay.
        freeze_last_layer_steps: Int. Updates at the start in which the rate of the prototypes is 0.
            Their gradients still count in the norm and in `m` and `v`.
        freeze_backbone_steps: Int. Updates at the start in which the rate of the backbone is 0, so
            that new heads learn what it knows before they change it; in as many more it grows
            linearly to what it would be.
        part_clipnorm: Positive float. Largest norm of the gradients of a part, after accumulation.
            `None`: no clipping by part.
        log: If true, the logs of a `DINOv3` show `learning_rate`, `weight_decay` and, before
            clipping, `backbone_gradient_norm`, `dino_head_gradient_norm` and
            `ibot_head_gradient_norm`, all as of the last update.
        **kwargs: Other arguments of `keras.optimizers.Optimizer`, such as
            `gradient_accumulation_steps`.

    Raises:
        ValueError: If an argument is outside its range, or two ways of clipping are given.

    Reference:
        [Loshchilov & Hutter, 2019](https://arxiv.org/abs/1711.05101), algorithm 2;
        [Kingma & Ba, 2015](https://arxiv.org/abs/1412.6980), algorithm 1;
        [Siméoni et al., 2025](https://arxiv.org/abs/2508.10104) for the rules by place.
    """

    def __init__(
        self,
        learning_rate=1e-3,
        weight_decay=0.04,
        beta_1=0.9,
        beta_2=0.999,
        epsilon=1e-8,
        layerwise_decay=1.0,
        patch_embed_multiplier=1.0,
        head_multiplier=1.0,
        head_decay_multiplier=1.0,
        freeze_last_layer_steps=0,
        freeze_backbone_steps=0,
        part_clipnorm=None,
        log=False,
        **kwargs,
    ):
        if isinstance(learning_rate, numbers.Real):
            learning_rate = float(learning_rate)
        is_schedule = isinstance(learning_rate, keras.optimizers.schedules.LearningRateSchedule)
        if is_schedule or not callable(learning_rate):
            check_range("learning_rate", learning_rate, low=0)
        if not isinstance(
            weight_decay, (numbers.Real, keras.optimizers.schedules.LearningRateSchedule)
        ):  # a variable or function would be lost with the config
            raise ValueError(
                "`weight_decay` must be a number or a schedule, such as `WarmupCosine`. "
                f"Received: weight_decay={weight_decay!r}."
            )
        check_range("weight_decay", weight_decay, low=0)
        check_range("beta_1", beta_1, low=0, below=1, scheduled=False)
        check_range("beta_2", beta_2, low=0, below=1, scheduled=False)
        check_range("epsilon", epsilon, above=0, scheduled=False)
        check_range("layerwise_decay", layerwise_decay, above=0, high=1, scheduled=False)
        check_range("patch_embed_multiplier", patch_embed_multiplier, low=0, scheduled=False)
        check_range("head_multiplier", head_multiplier, low=0, scheduled=False)
        check_range("head_decay_multiplier", head_decay_multiplier, low=0, scheduled=False)
        check_steps("freeze_last_layer_steps", freeze_last_layer_steps)
        check_steps("freeze_backbone_steps", freeze_backbone_steps)
        if part_clipnorm is not None:
            check_range("part_clipnorm", part_clipnorm, above=0, scheduled=False)
            others = {
                name: kwargs.get(name) for name in ("clipnorm", "clipvalue", "global_clipnorm")
            }
            others = {name: value for name, value in others.items() if value is not None}
            if others:
                raise ValueError(
                    "Gradients are clipped in one way only. Received: "
                    f"part_clipnorm={part_clipnorm} and {others}. Leave one of them out."
                )
        super().__init__(learning_rate, **kwargs)
        self.weight_decay = weight_decay
        self.beta_1 = beta_1
        self.beta_2 = beta_2
        self.epsilon = epsilon
        self.layerwise_decay = layerwise_decay
        self.patch_embed_multiplier = patch_embed_multiplier
        self.head_multiplier = head_multiplier
        self.head_decay_multiplier = head_decay_multiplier
        self.freeze_last_layer_steps = freeze_last_layer_steps
        self.freeze_backbone_steps = freeze_backbone_steps
        self.part_clipnorm = part_clipnorm
        self.log = log

    def build(self, variables):
        if self.built:
            return
        super().build(variables)
        self._means, self._squares = self.add_optimizer_variables(variables, ["mean", "square"])
        self._parts = [role_of(variable).part for variable in variables]
        self._multipliers = [self._multipliers_of(variable) for variable in variables]
        self._log = {}
        if self.log:
            names = ["learning_rate", "weight_decay", *map(norm_name, dict.fromkeys(self._parts))]
            for name in names:
                self._log[name] = self.add_variable(
                    (), dtype="float32", aggregation="only_first_replica", name=name
                )

    def exclude_from_weight_decay(self, var_list=None, var_names=None):
        """As of `keras.optimizers.Optimizer`, but also of an optimizer that is built.

        A step that is compiled already keeps its rules: `compile` the model again then.
        """
        built, self._built = getattr(self, "_built", False), False
        super().exclude_from_weight_decay(var_list, var_names)
        self._built = built
        if self.built:
            self._multipliers = [self._multipliers_of(v) for v in self._trainable_variables]

    def update_step(self, gradient, variable, learning_rate):
        """Updates one weight and its moments.

        Args:
            gradient: Tensor shaped like `variable`.
            variable: Weight the optimizer was built with.
            learning_rate: The rate before multipliers, or the `Rates` of this update.
        """
        rates = learning_rate if isinstance(learning_rate, Rates) else self.rates(learning_rate)
        rate, decay = rates.of(self.multipliers(variable))
        rate, decay, mean_correction, square_correction = (
            ops.cast(x, variable.dtype)
            for x in (rate, decay, rates.mean_correction, rates.square_correction)
        )
        update(
            (variable, *self.moments(variable)),
            (
                *(ops.cast(gradient, variable.dtype), rate, decay),
                *(mean_correction, square_correction),
            ),
            beta_1=self.beta_1,
            beta_2=self.beta_2,
            epsilon=self.epsilon,
        )

    def rates(self, learning_rate):
        """The `Rates` of the next update, given its learning rate."""
        step = self.iterations
        rate = ops.cast(learning_rate, "float32")
        count = ops.cast(step + 1, "float32")
        frozen = self.freeze_backbone_steps
        thawed = ops.clip((count - frozen) / frozen, 0.0, 1.0) if frozen else 1.0
        return Rates(
            rate,
            ops.where(step < self.freeze_last_layer_steps, 0.0, rate),
            rate * thawed,
            value_at(self.weight_decay, step),
            one_minus_power(self.beta_1, count),
            ops.sqrt(one_minus_power(self.beta_2, count)),
        )

    def multipliers(self, variable):
        """The `Multipliers` of a weight the optimizer was built with."""
        return self._multipliers[self._get_variable_index(variable)]

    def moments(self, variable):
        """The variables that hold `m` and `v` of a weight."""
        index = self._get_variable_index(variable)
        return self._means[index], self._squares[index]

    def logs(self):
        """With `log=True`: what the last update was made with, a dict of float32 scalars."""
        return {name: ops.copy(value) for name, value in self._log.items()} if self.built else {}

    def get_config(self):
        return {
            **super().get_config(),
            "weight_decay": serialize(self.weight_decay),
            "beta_1": self.beta_1,
            "beta_2": self.beta_2,
            "epsilon": self.epsilon,
            "layerwise_decay": self.layerwise_decay,
            "patch_embed_multiplier": self.patch_embed_multiplier,
            "head_multiplier": self.head_multiplier,
            "head_decay_multiplier": self.head_decay_multiplier,
            "freeze_last_layer_steps": self.freeze_last_layer_steps,
            "freeze_backbone_steps": self.freeze_backbone_steps,
            "part_clipnorm": self.part_clipnorm,
            "log": self.log,
        }

    @classmethod
    def from_config(cls, config, custom_objects=None):
        config = {**config, "weight_decay": deserialize(config["weight_decay"])}
        return super().from_config(config, custom_objects)

    # Keras has no public place for these three: what must see the gradients of all weights after
    # accumulation, a decay that differs by weight, and schedules that count updates.

    def _backend_update_step(self, grads, trainable_variables, learning_rate):
        gradients = [ops.convert_to_tensor(gradient) for gradient in grads]
        rates = self.rates(learning_rate)
        gradients = self._clip_parts(gradients, trainable_variables)
        if self.log:
            self._log["learning_rate"].assign(rates.rate)
            self._log["weight_decay"].assign(rates.decay)
        if not backend.update_together(self, gradients, trainable_variables, rates):
            super()._backend_update_step(gradients, trainable_variables, rates)

    def _apply_weight_decay(self, variables):
        pass  # `update_step` does it

    def _get_current_learning_rate(self):
        if isinstance(self._learning_rate, keras.optimizers.schedules.LearningRateSchedule):
            return self._learning_rate(self.iterations)
        return super()._get_current_learning_rate()

    def _clip_parts(self, gradients, variables):
        """The gradients, those of each part scaled to a norm of at most `part_clipnorm`."""
        if self.part_clipnorm is None and not self.log:
            return gradients
        parts = {}
        for position, variable in enumerate(variables):
            part = self._parts[self._get_variable_index(variable)]
            parts.setdefault(part, []).append(position)
        clipped = list(gradients)
        for part, positions in parts.items():
            members = [gradients[position] for position in positions]
            norm = backend.global_norm(members)
            if self.log:
                self._log[norm_name(part)].assign(norm)
            if self.part_clipnorm is not None:
                members = backend.scaled(
                    members, ops.minimum(self.part_clipnorm / (norm + 1e-6), 1.0)
                )
                for position, member in zip(positions, members, strict=True):
                    clipped[position] = member
        return clipped

    def _multipliers_of(self, variable):
        role = role_of(variable)
        rate, decay = self.layerwise_decay**role.depth, float(role.decays)
        if role.kind == "patch_embed":
            rate *= self.patch_embed_multiplier
        if role.kind in ("head", "last_layer"):
            rate *= self.head_multiplier
            decay *= self.head_decay_multiplier
        if not self._use_weight_decay(variable):  # the user's `exclude_from_weight_decay`
            decay = 0.0
        is_backbone = role.part.endswith("backbone")  # also of one student of several
        return Multipliers(rate, decay, role.kind == "last_layer", is_backbone)


def _updated(
    weight,
    mean,
    square,
    gradient,
    rate,
    decay,
    mean_correction,
    square_correction,
    beta_1,
    beta_2,
    epsilon,
):
    """A weight and its moments after an update of `AdamW`."""
    mean = mean + (gradient - mean) * (1 - beta_1)
    square = square + (ops.square(gradient) - square) * (1 - beta_2)
    # Numerator and denominator times `square_correction`: one pass over the weights less.
    scale = ops.sqrt(square) + epsilon * square_correction
    move = (rate * square_correction / mean_correction) * mean / scale
    return weight * (1 - rate * decay) - move, mean, square


update = backend.assigning(_updated, static_argnames=("beta_1", "beta_2", "epsilon"))


def scaled_learning_rate(learning_rate, batch_size, rule="sqrt_wrt_1024"):
    """The learning rate for a batch size, from one that was found for another.

    Args:
        learning_rate: Float. The rate before scaling.
        batch_size: Int, at least 1. Images in one optimizer update, over all devices and
            micro-steps of gradient accumulation.
        rule: `"sqrt_wrt_1024"` multiplies by `4 * sqrt(batch_size / 1024)`, which is 1 for 64
            images; `"linear_wrt_256"` by `batch_size / 256`.

    Returns:
        Float.

    Raises:
        ValueError: If an argument is none of these.

    Reference:
        [Goyal et al., 2017](https://arxiv.org/abs/1706.02677), section 2.1, for the linear rule;
        the other is that of the [DINOv3](https://arxiv.org/abs/2508.10104) training code.
    """
    check_range("learning_rate", learning_rate, low=0, scheduled=False)
    check_range("batch_size", batch_size, low=1, below=math.inf, scheduled=False)
    rules = {
        "sqrt_wrt_1024": 4 * math.sqrt(batch_size / 1024),
        "linear_wrt_256": batch_size / 256,
    }
    if rule not in rules:
        raise ValueError(f"`rule` must be one of {sorted(rules)}. Received: rule={rule!r}.")
    return learning_rate * rules[rule]


def norm_name(part):
    """The name of the gradient norm of a part in the logs."""
    return f"{part}_gradient_norm" if part else "gradient_norm"


def one_minus_power(base, exponent):
    """`1 - base ** exponent` without the cancellation that takes four digits of it for 0.999."""
    if base == 0:
        return ops.ones_like(exponent)
    return -ops.expm1(exponent * math.log(base))
