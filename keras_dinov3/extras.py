"""What encoders can have beyond the Keras Hub class of their backbone: `EncoderExtras`."""

import math
import numbers

import keras
from keras import ops

from keras_dinov3.families import copy_of, parts_of
from keras_dinov3.lora import check_lora
from keras_dinov3.rope import rope_periods, rope_tables
from keras_dinov3.schedules import check_count, check_range

LAYER, RMS = "layer", "rms"  # kinds of norm


@keras.saving.register_keras_serializable(package="keras_dinov3")
class EncoderExtras(keras.layers.Layer):
    """What an encoder can have or do beyond the Keras Hub class of its backbone.

    Give one to `DINOv3(extras=...)`: student and teacher each get their own with these settings,
    and their weights train, move and are saved with the model.

    Args:
        num_register_tokens: Int. Register tokens for a family that has none.
        untie_cls_norm: If true, class and register tokens have a final norm of their own.
        untie_local_cls_norm: If true, those of local crops have one in training; never else.
        norm: `"layer"`, or `"rms"` for RMSNorm in all places: `x / sqrt(mean(x**2) + epsilon) *
            gamma`. The betas of the backbone are then unused.
        layer_scale: If false, the backbone's layer scales are set to 1 and stay so.
        rope_normalize: What divides the patch centres of both axes: each axis's own length
            (`"separate"`), or the longer (`"max"`) or shorter (`"min"`) of the two.
        rope_periods: `(min, max)`: geometric periods between them. `None`: from the backbone's
            `rope_theta`.
        rope_shift: Positive float `s` or `None`. In training, both centres are shifted by
            numbers from `U(-s, s)`, drawn for each block and crop size, one for the batch.
        rope_jitter: Float `j > 1` or `None`. They are multiplied by numbers, one per axis,
            whose logarithm is from `U(-log j, log j)`.
        rope_rescale: Float `r > 1` or `None`. Both are multiplied by one such number.
        lora: `LoRA`, or `None`. Low-rank adapters of the backbone, whose own weights are frozen
            then; a copy of its mask token is not. `DINOv3(lora=...)` gives its own to the extras
            of student and teacher.
        **kwargs: Keyword arguments of `keras.layers.Layer`.

    Raises:
        ValueError: If an argument is outside its range.

    Reference:
        [Siméoni et al., 2025](https://arxiv.org/abs/2508.10104), section 3.2;
        [Zhang & Sennrich, 2019](https://arxiv.org/abs/1910.07467) (RMSNorm);
        [Darcet et al., 2023](https://arxiv.org/abs/2309.16588) (registers).
    """

    def __init__(
        self,
        num_register_tokens=0,
        untie_cls_norm=False,
        untie_local_cls_norm=False,
        norm=LAYER,
        layer_scale=True,
        rope_normalize="separate",
        rope_periods=None,
        rope_shift=None,
        rope_jitter=None,
        rope_rescale=None,
        lora=None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        check_count("num_register_tokens", num_register_tokens)
        check_lora(lora)
        switches = (("untie_cls_norm", untie_cls_norm), ("layer_scale", layer_scale))
        for name, value in (*switches, ("untie_local_cls_norm", untie_local_cls_norm)):
            if not isinstance(value, bool):
                raise ValueError(f"`{name}` must be True or False. Received: {name}={value!r}.")
        if norm not in (LAYER, RMS):
            raise ValueError(f'`norm` must be "layer" or "rms". Received: {norm=}.')
        if rope_normalize not in ("separate", "max", "min"):
            raise ValueError(
                f'`rope_normalize` must be "separate", "max" or "min". Received: {rope_normalize=}.'
            )
        if rope_periods is not None and not is_interval(rope_periods):
            raise ValueError(
                "`rope_periods` must be two numbers (min, max) with 0 < min < max. "
                f"Received: {rope_periods=}."
            )
        strengths = (("rope_shift", rope_shift, 0), ("rope_jitter", rope_jitter, 1))
        for name, value, least in (*strengths, ("rope_rescale", rope_rescale, 1)):
            if value is not None:
                check_range(name, value, above=least, below=math.inf, scheduled=False)
        self.num_register_tokens = num_register_tokens
        self.untie_cls_norm = untie_cls_norm
        self.untie_local_cls_norm = untie_local_cls_norm
        self.norm = norm
        self.layer_scale = layer_scale
        self.rope_normalize = rope_normalize
        self.rope_periods = rope_periods
        self.rope_shift = rope_shift
        self.rope_jitter = rope_jitter
        self.rope_rescale = rope_rescale
        self.lora = lora
        # What `build_for` may make
        self.register_tokens = self.mask_token = self.cls_norm = self.local_cls_norm = None

    def build_for(self, backbone):
        """Makes the weights that `backbone`'s class has no place for; returns the layer.

        New norms start as a copy of the backbone's final norm. Parts of the backbone that these
        settings leave unused are frozen, layer scales at 1, so that an export has none either.
        """
        parts, width = parts_of(backbone), backbone.hidden_dim
        if parts.rope_theta is None and self.changes_rope:
            raise ValueError(
                "The `rope_...` settings of `EncoderExtras` are for backbones with rotary "
                f"positions: `DINOV3Backbone`. Received: {', '.join(self.changes_rope)}, and a "
                f"`{type(backbone).__name__}`, whose positions are learned."
            )
        if self.num_register_tokens and parts.register_tokens is not None:
            raise ValueError(
                "`num_register_tokens` of `EncoderExtras` is for backbones without registers. "
                f"Received: {self.num_register_tokens}, and a backbone that has "
                f"{parts.register_tokens.shape[1]} of its own. Give `num_register_tokens=0`, "
                'in a recipe by `recipe.changed(extras={"num_register_tokens": 0})`.'
            )
        if self.num_register_tokens:
            shape = (1, self.num_register_tokens, width)
            initializer = keras.initializers.TruncatedNormal(stddev=0.02)
            self.register_tokens = self.add_weight(shape, initializer, name="register_tokens")
        own = parts.mask_token
        if not hasattr(backbone, "use_mask_token") or (self.lora is not None and own is not None):
            self.mask_token = self.add_weight((1, 1, width), "zeros", name="mask_token")
            if own is not None:  # it may be new, and a `lora` freezes it
                self.mask_token.assign(reshaped_copy(own, (1, 1, width)))
        for name in ("cls_norm", "local_cls_norm"):
            if getattr(self, f"untie_{name}"):
                copy = type(parts.norm).from_config({**parts.norm.get_config(), "name": name})
                copy.build((None, None, width))
                copy.set_weights(parts.norm.get_weights())
                setattr(self, name, copy)
        if self.norm == RMS:
            weights = [parts.block_weights(layer, "float32") for layer in parts.blocks]
            betas = [block[name][1] for block in weights for name in ("norm1", "norm2")]
            for norm in (parts.norm, self.cls_norm, self.local_cls_norm):
                betas += [] if norm is None else [norm.beta]
            for beta in betas:
                beta.trainable = False
        if not self.layer_scale:
            for layer in parts.blocks:
                for name in ("layer_scale1", "layer_scale2"):
                    if hasattr(layer, name):
                        scale = getattr(layer, name)
                        scale.trainable = False
                        scale.lambda1.assign(ops.ones(scale.lambda1.shape))
        if self.lora is not None:
            self.lora.build_for(backbone)
        self.built = True
        return self

    def check_use(self, training, seed):
        """Raises if these are settings without the weights they need, or draws without a seed."""
        owns = (self.num_register_tokens, self.untie_cls_norm, self.untie_local_cls_norm, self.lora)
        if any(owns) and not self.built:
            raise ValueError(
                "These `EncoderExtras` have settings that need weights, and no weights yet. Of a "
                "`DINOv3`, `extras` are the settings; pass `model.teacher_extras` or "
                "`model.student_extras`, which belong to the backbones. Or `build_for(backbone)`."
            )
        if training and self.varies_rope and seed is None:
            raise ValueError(
                "Rotary positions that vary in training need a `seed`, a "
                "`keras.random.SeedGenerator`. Received: seed=None."
            )

    @property
    def changes_rope(self):
        """Names of the settings of rotary positions that are not the defaults."""
        names = ("rope_periods", "rope_shift", "rope_jitter", "rope_rescale")
        names = [name for name in names if getattr(self, name) is not None]
        return names + ["rope_normalize"] * (self.rope_normalize != "separate")

    @property
    def varies_rope(self):
        """Whether rotary positions are varied in training."""
        return any(x is not None for x in (self.rope_shift, self.rope_jitter, self.rope_rescale))

    def rope(self, grid_size, head_dim, theta, seed=None):
        """`rope_tables` by these settings; with a `SeedGenerator`, varied by a new draw."""
        periods = None
        if self.rope_periods is not None:
            low, high = self.rope_periods
            periods = rope_periods(head_dim, min_period=low, max_period=high)
        variation = {}
        if seed is not None:
            draws = 2.0 * keras.random.uniform((5,), dtype="float32", seed=seed) - 1.0
            if self.rope_shift is not None:
                variation["shift"] = draws[:2] * self.rope_shift
            if self.rope_jitter is not None:
                variation["log_jitter"] = draws[2:4] * math.log(self.rope_jitter)
            if self.rope_rescale is not None:
                variation["log_rescale"] = draws[4] * math.log(self.rope_rescale)
        return rope_tables(grid_size, head_dim, theta, periods, self.rope_normalize, **variation)

    def merged(self, backbone):
        """A trainable copy of the backbone with what a `lora` has learned in its weights."""
        if self.lora is None:
            return copy_of(backbone)
        copy = self.lora.merged(backbone)
        mask_token = parts_of(copy).mask_token
        if mask_token is not None:
            mask_token.assign(reshaped_copy(self.mask_token, mask_token.shape))
        return copy

    def check_export(self, backbone):
        """Raises if features at inference need what `backbone`'s class has no place for."""
        names = {
            "register tokens": self.num_register_tokens,
            "untied norm of class tokens": self.untie_cls_norm,
            "RMSNorm": self.norm == RMS,
            "rope_normalize": self.rope_normalize != "separate",
            "rope_periods": self.rope_periods is not None,
        }
        needed = [name for name, is_needed in names.items() if is_needed]
        if needed:
            raise ValueError(
                f"A Keras Hub `{type(backbone).__name__}` has no place for: {', '.join(needed)}. "
                "Its features would differ. Keep the whole model (`model.save`) and use "
                "`encode(model.teacher, images, extras=model.teacher_extras)`, or train without "
                "them."
            )

    def get_config(self):
        names = ("num_register_tokens", "untie_cls_norm", "untie_local_cls_norm", "norm")
        names += ("layer_scale", "rope_normalize", "rope_periods", "rope_shift", "rope_jitter")
        config = {name: getattr(self, name) for name in (*names, "rope_rescale")}
        lora = keras.saving.serialize_keras_object(self.lora)
        return {**super().get_config(), **config, "lora": lora}

    @classmethod
    def from_config(cls, config):
        return cls(**{**config, "lora": keras.saving.deserialize_keras_object(config.get("lora"))})


def is_interval(value):
    """Whether a value is two finite positive numbers, the smaller first."""
    is_pair = isinstance(value, (tuple, list)) and len(value) == 2
    return (
        is_pair
        and all(isinstance(number, numbers.Real) for number in value)
        and 0 < value[0] < value[1] < math.inf
    )


def extras_for(backbone, settings, name, lora=None):
    """An `EncoderExtras` layer of a backbone's own, with the settings of another or with none.

    Args:
        backbone: The backbone.
        settings: `EncoderExtras`, or `None`.
        name: Str, the beginning of the layer's name.
        lora: `LoRA` whose settings the adapters have. `None`: those of `settings`, if it has any.

    Returns:
        `EncoderExtras`, built.
    """
    config = {} if settings is None else settings.get_config()
    config = {**config, "name": f"{name}_extras", "dtype": backbone.dtype_policy}
    if lora is not None:
        config["lora"] = keras.saving.serialize_keras_object(lora)
    return EncoderExtras.from_config(config).build_for(backbone)


def reshaped_copy(tensor, shape):
    """A copy: JAX gives a step's buffers away, and cannot do so twice with one."""
    return ops.copy(ops.reshape(tensor, shape))
