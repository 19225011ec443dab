"""What happens now and then during `fit`, and the rule by which the teacher moves."""

import math

import keras

from keras_dinov3.collapse import CollapseMonitor
from keras_dinov3.gram import GramTeacher
from keras_dinov3.guard import Guard
from keras_dinov3.mixed import batches_seen
from keras_dinov3.monitors import KNN, LiDAR, RankMe, ScheduleLogger
from keras_dinov3.online_probe import LinearProbe
from keras_dinov3.pictures import Pictures
from keras_dinov3.schedules import check_range

__all__ = [
    "CollapseMonitor",
    "DataOrder",
    "GramTeacher",
    "Guard",
    "KNN",
    "LiDAR",
    "LinearProbe",
    "OfStudent",
    "Pictures",
    "RankMe",
    "ScheduleLogger",
    "StopOnNonFinite",
    "TeacherEMA",
]


@keras.saving.register_keras_serializable(package="keras_dinov3")
class TeacherEMA(keras.callbacks.Callback):
    """Makes the teacher the moving average of the student.

    After the optimizer's update `t` (counted from 0 over the model's life, saved with it),
    every teacher weight becomes `momentum(t) * teacher + (1 - momentum(t)) * student`, in
    float32: backbone, heads, tokens and norms. Micro-steps of gradient accumulation do not
    count. The arithmetic runs inside the compiled train step of `DINOv3`; this callback owns
    the rule. `fit` adds the model's own `teacher_ema` when none is passed.

    Args:
        momentum: Float in [0, 1], or a schedule of the step (`WarmupCosine`). Large batches
            want less (0.992 at 2048 images), long runs with small batches more (0.998).

    Raises:
        ValueError: If the momentum is outside [0, 1].

    Reference:
        [Caron et al., 2021](https://arxiv.org/abs/2104.14294), section 3.1.
    """

    def __init__(self, momentum=0.992):
        super().__init__()
        check_range("momentum", momentum, low=0, high=1)
        self.momentum = momentum

    def get_config(self):
        return {"momentum": keras.saving.serialize_keras_object(self.momentum)}

    @classmethod
    def from_config(cls, config):
        return cls(keras.saving.deserialize_keras_object(config["momentum"]))


class StopOnNonFinite(keras.callbacks.Callback):
    """Ends `fit` with an error when the loss is no longer finite; `fit` adds it.

    Args:
        every: Int. Batches from one look at the loss to the next; a look waits for the device.
            A NaN stays in the epoch's mean, so none is missed, only found a little later.

    Raises:
        FloatingPointError: Names the loss terms that went bad first, and the step.
    """

    def __init__(self, every=20):
        super().__init__()
        self.every = every

    @classmethod
    def before(cls, callbacks):
        """One that looks at every batch if one of `callbacks` writes weights between epochs."""
        writes = any(getattr(c, "save_freq", "epoch") != "epoch" for c in callbacks)
        return cls(every=1) if writes else cls()

    def on_train_batch_end(self, batch, logs=None):
        if (batch + 1) % self.every == 0:
            self._check(logs)

    def on_epoch_end(self, epoch, logs=None):
        self._check(logs)

    def _check(self, logs):
        loss = (logs or {}).get("loss")
        if loss is None or math.isfinite(float(loss)):
            return
        if hasattr(self.model, "jax_state_sync"):
            self.model.jax_state_sync()  # during `fit` on JAX the weights live in its loop
        names, step = self.model.bad_terms()
        raise FloatingPointError(
            f"The loss must stay finite. Not finite first: {', '.join(names) or 'loss'}, at step "
            f"{step}. Training stopped; go on from the last checkpoint. Try a lower learning "
            "rate or a longer warm-up, clip gradients (`clipnorm=3.0`), and look for NaN in the "
            "images, or floats far outside of 0 to 1. Masks that hide more than "
            "`max_masked_patches` make `ibot_loss` NaN."
        )


class DataOrder(keras.callbacks.Callback):
    """Tells data that shuffle themselves where the run is, so that a resumed one goes on."""

    def __init__(self, data):
        super().__init__()
        self.data = data

    def on_epoch_begin(self, epoch, logs=None):
        if hasattr(self.model, "jax_state_sync"):
            self.model.jax_state_sync()
        # Keras goes on within a pass if `steps_per_epoch` is less; then the order stays.
        self.data.position = batches_seen(self.model) // len(self.data) * len(self.data)


class OfStudent(keras.callbacks.Callback):
    """Lets a callback watch one student of a `MultiDistillation`, as if it were trained alone.

    The callback's model is then the student's `DINOv3`, with the optimizer of the whole. Its logs
    are the student's, without the student's name; what it adds to them gets that name:
    `OfStudent("small", KNN(...))` logs `small_knn`. So `ModelCheckpoint(path, monitor="loss")`
    saves the student when its own loss is least, and `EarlyStopping` ends the whole run.

    Args:
        name: The student's name.
        callback: Keras callback, of this package or not.

    Raises:
        ValueError: Before training, if the model has no student of this name.
    """

    def __init__(self, name, callback):
        super().__init__()
        self.name = name
        self.callback = callback

    def set_params(self, params):
        super().set_params(params)
        self.callback.set_params(params)

    def set_model(self, model):
        super().set_model(model)
        students = getattr(model, "students", {})
        if self.name not in students:
            raise ValueError(
                "`OfStudent` needs a student of a `MultiDistillation`. Received: "
                f"name={self.name!r}, a {type(model).__name__} with students {list(students)}."
            )
        self.callback.set_model(StudentOf(model, students[self.name]))

    def tell(self, hook, *args, logs=None):
        """Calls a method of the callback with the student's logs, and takes over what it adds."""
        names = {}  # in the student's logs: in those of all
        for key in logs or {}:
            for prefix in ("", "val_"):
                if key.startswith(f"{prefix}{self.name}_"):
                    names[prefix + key.removeprefix(f"{prefix}{self.name}_")] = key
        own = {name: logs[key] for name, key in names.items()}
        getattr(self.callback, hook)(*args, logs=own)
        if logs is not None:
            logs.update({names.get(key, f"{self.name}_{key}"): own[key] for key in own})

    def on_train_begin(self, logs=None):
        self.tell("on_train_begin", logs=logs)

    def on_train_end(self, logs=None):
        self.tell("on_train_end", logs=logs)

    def on_epoch_begin(self, epoch, logs=None):
        self.tell("on_epoch_begin", epoch, logs=logs)

    def on_epoch_end(self, epoch, logs=None):
        self.tell("on_epoch_end", epoch, logs=logs)

    def on_train_batch_begin(self, batch, logs=None):
        self.tell("on_train_batch_begin", batch, logs=logs)

    def on_train_batch_end(self, batch, logs=None):
        self.tell("on_train_batch_end", batch, logs=logs)


class StudentOf:
    """One student of a `MultiDistillation`, as callbacks see a model that is trained.

    Args:
        whole: `MultiDistillation`, which has what training needs.
        student: `DINOv3`, which has the rest.
    """

    OF_THE_WHOLE = ("jax_state_sync", "optimizer", "stop_training", "test_shapes", "train_shapes")

    def __init__(self, whole, student):
        vars(self).update(whole=whole, student_model=student)

    def __getattr__(self, name):
        return getattr(self.whole if name in self.OF_THE_WHOLE else self.student_model, name)

    def __setattr__(self, name, value):
        setattr(self.whole if name in self.OF_THE_WHOLE else self.student_model, name, value)
