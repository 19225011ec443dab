"""Preservation: class tokens that stay as the released weights had them."""

import math

import keras
from keras import ops

from keras_dinov3.encoder import encode, grid_of, merge
from keras_dinov3.families import patch_size_of
from keras_dinov3.losses import l2_normalize
from keras_dinov3.schedules import check_range, value_at
from keras_dinov3.terms import Term, check_frozen, frozen_copy, own_backbone

DISTANCES = ("cosine", "squared")


@keras.saving.register_keras_serializable(package="keras_dinov3")
class Preserve(Term):
    """Holds the student's class tokens to those of a frozen backbone.

    Training released weights further, on data of one kind, can lose what they knew of others. The
    frozen backbone sees the student's whole global crops; the student's class tokens of the
    (masked) crops are to stay near its own.

    `DINOv3(..., preserve=Preserve(...))` uses it, saves the frozen backbone with the model and logs
    `preservation_loss`. At the weight 0 there is no loss, and no copy of the student is made.

    Args:
        source: The frozen backbone, of the student's width: a copy of a Keras Hub backbone, or the
            name or folder of a preset. `None`: a copy of the student and its `EncoderExtras` as
            they are when the model is made.
        weight: Number or schedule. Weight of the loss.
        distance: `"cosine"`: one minus the cosine similarity; or `"squared"`: the mean over the
            features of their squared differences.
        **kwargs: Keyword arguments of `keras.layers.Layer`.

    Raises:
        TypeError: If `source` is a backbone of an unsupported family.
        ValueError: If an argument is outside the range given above.
    """

    def __init__(self, source=None, weight=1.0, distance="cosine", **kwargs):
        super().__init__(**{"name": "preserve", **kwargs})
        check_range("weight", weight, low=0, below=math.inf)
        if distance not in DISTANCES:
            raise ValueError(
                f"`distance` must be one of {DISTANCES}. Received: distance={distance!r}."
            )
        self.source = None if source is None else own_backbone(source)
        self.weight = weight
        self.distance = distance

    def check(self, model):
        if self.source is None:
            return
        check_frozen("preserve", self.source, model)
        if self.source.hidden_dim != model.student.hidden_dim:
            raise ValueError(
                "`Preserve` compares class tokens, so its backbone must have the student's width. "
                f"Received: widths {self.source.hidden_dim} and {model.student.hidden_dim}."
            )
        sizes = [] if model.augmentation is None else model.augmentation.crop_sizes
        for size, *_ in sizes:
            grid_of(size, patch_size_of(self.source), "global_crops")

    def check_crops(self, crops):
        grid_of(crops["global_crops"].shape[2:4], patch_size_of(self.backbone), "global_crops")

    def make(self, model):
        self.backbone = self.source
        if self.source is None:
            student = model.student, model.student_extras
            self.backbone, self.extras = frozen_copy(*student, "preserve")

    def see(self, crops, student, teacher, masks, step):
        """Class tokens `(B * G, D)` of the frozen backbone and of the student."""
        frozen = encode(self.backbone, merge(crops["global_crops"]), extras=self.extras)
        return ops.stop_gradient(frozen.cls), student.cls

    def log_weights(self):
        return {"preservation_loss": self.weight}

    def losses_of(self, frozen, student, step):
        loss = ops.mean(class_token_distance(frozen, student, self.distance))
        return {"preservation_loss": loss}, {"preservation_loss": value_at(self.weight, step)}

    def get_config(self):
        objects = {"source": self.source, "weight": self.weight}
        return {
            **super().get_config(),
            **{name: keras.saving.serialize_keras_object(x) for name, x in objects.items()},
            "distance": self.distance,
        }


def class_token_distance(y_true, y_pred, distance="cosine"):
    """How far class tokens are from others.

    Args:
        y_true: Class tokens `(B, D)` to keep to, any float dtype.
        y_pred: Class tokens `(B, D)` of the student, any float dtype.
        distance: As in `Preserve`.

    Returns:
        float32 tensor of shape `(B,)`.
    """
    y_true, y_pred = ops.cast(y_true, "float32"), ops.cast(y_pred, "float32")
    if distance == "squared":
        return ops.mean(ops.square(y_pred - y_true), axis=-1)
    return 1.0 - ops.sum(l2_normalize(y_true) * l2_normalize(y_pred), axis=-1)
