"""Loss terms that are one argument of `DINOv3` each: what it asks of them; frozen copies."""

import keras

from keras_dinov3.extras import extras_for
from keras_dinov3.families import channels_of, check_backbone, copy_of
from keras_dinov3.presets import read_preset
from keras_dinov3.schedules import is_zero

TERMS = ("gram", "alignment", "preserve")  # arguments of `DINOv3`


class Term(keras.layers.Layer):
    """A loss term beside DINO, iBOT and KoLeo, with a `weight` of its own, a number or schedule.

    In each step `DINOv3` asks for what it compares, `see`, and then for its `losses_of` that. Other
    methods and attributes say what it needs; those below are for a term that needs nothing.

    Args:
        **kwargs: Keyword arguments of `keras.layers.Layer`.
    """

    crop_options = {}  # what it asks of `MultiCrop` besides crops
    crop_names = ()  # what ready crops must bring for it
    needs_masks = False
    refresh = None  # a callback that `fit` adds

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.backbone = self.extras = None  # of a frozen encoder

    @property
    def is_on(self):
        """Whether it is computed at all."""
        return not is_zero(self.weight)

    def check(self, model):
        """Raises if it cannot belong to `model`, whose own settings are checked already."""

    def check_crops(self, crops):
        """Raises if ready crops, a dict of NumPy arrays, do not suit it."""

    def make(self, model):
        """Makes what it keeps."""

    def build_for(self, model):
        """Makes what it keeps, frozen.

        Args:
            model: The `DINOv3` it is an argument of, whose student and teacher are there.

        Returns:
            This layer.

        Raises:
            ValueError: If it belongs to another model.
        """
        kind = type(self).__name__
        if self.built:
            raise ValueError(
                f"A `{kind}` belongs to one model. Received: one that has a model. Make another: "
                f"`{kind}.from_config(old.get_config())`."
            )
        self.make(model)
        self.trainable = False
        for layer in (self.backbone, self.extras):
            if layer is not None:
                layer.trainable = False
        self.built = True
        return self

    def log_weights(self):
        """What is in the logs, by name, and whether it is ever other than 0."""
        raise NotImplementedError

    def see(self, crops, student, teacher, masks, step):
        """What is compared.

        Args:
            crops: Dict of crops and what comes with them.
            student: `Tokens` of the (masked) global crops, `B * G` of them.
            teacher: `Tokens` of the whole global crops.
            masks: Bool `(B, G, N)`, or `None`.
            step: Int tensor, the updates that have been made.

        Returns:
            Tuple of tensors.
        """
        raise NotImplementedError

    def losses_of(self, *seen, step):
        """The terms and what they weigh in the total.

        Args:
            *seen: What `see` returns.
            step: Int tensor.

        Returns:
            Two dicts by name: scalar float32 tensors, and their weights.
        """
        raise NotImplementedError

    def follow(self, model, ticks):
        """Changes what it keeps after an update, when `ticks` is 1."""

    @classmethod
    def from_config(cls, config):
        objects = {
            name: keras.saving.deserialize_keras_object(config[name])
            for name in config.keys() & {"source", "weight"}
        }
        return cls(**{**config, **objects})


def terms_of(model):
    """The terms that `model` has, by the names of its arguments, without those of weight 0."""
    terms = {name: getattr(model, name, None) for name in TERMS}
    return {name: term for name, term in terms.items() if term is not None and term.is_on}


def merged(dicts):
    return {key: value for part in dicts for key, value in part.items()}


def frozen_copy(backbone, extras, name):
    """A backbone of its own with the same weights, and its `EncoderExtras`."""
    copy = copy_of(backbone)
    own = extras_for(copy, extras, name)
    own.set_weights(extras.get_weights())
    return copy, own


def own_backbone(source):
    """A frozen backbone of its own: a copy of a given one, or that of a preset."""
    if isinstance(source, str):
        backbone = read_preset(source)
    else:
        check_backbone(source)
        backbone = copy_of(source)
    backbone.trainable = False
    return backbone


def check_frozen(name, backbone, model):
    """Says why a backbone cannot be the frozen one of an argument `name` of a model."""
    if channels_of(backbone) != channels_of(model.student):
        raise ValueError(
            f"The backbone of `{name}` sees the student's images, so it needs their channels. "
            f"Received: {channels_of(backbone)} and {channels_of(model.student)}."
        )
