"""What happens now and then during `fit`, and the rule by which the teacher moves."""

import math

import keras

from keras_dinov3.evaluation import FeatureExtractor, knn_accuracy
from keras_dinov3.schedules import check_count, check_range


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


class KNN(keras.callbacks.Callback):
    """Says whether the teacher learns: weighted k-NN top-1 accuracy in the logs as `knn`.

    Measured before the first epoch and after every `every` epochs; the epochs between repeat
    the last value, so that `CSVLogger`, `ModelCheckpoint(monitor="knn", mode="max")` and
    `EarlyStopping` find it in each. Put it before them in the list of callbacks.

    Args:
        train: `(images, labels)` or anything that yields such batches: the labelled neighbours.
        val: The same, images to classify.
        every: Int, at least 1. Epochs from one measurement to the next.
        k: Int. Number of neighbours.
        temperature: Positive float of the vote `exp(similarity / temperature)`.
        feature: `"cls"`, `"mean_patch"` or `"cls_mean_patch"`.
        mean: Number or one per channel, as in `MultiCrop`. `None`: the mean of the model's
            augmentation; needed if the model trains on ready crops with another one.
        std: The same.
        image_size: `None` (the images' own size, rounded to whole patches), int or
            `(height, width)` in pixels.
        batch_size: Int. Images in one forward pass.
        name: Name of the value in the logs.

    Attributes:
        history: List of `(epoch, accuracy)`: after how many epochs, 0 being before training, or
            as many as were made before if the run goes on from there; accuracy in [0, 1].

    Raises:
        ValueError: If an argument is outside its range or the data cannot be read again; before
            training, if they hold no labels or fewer images than `k`.

    Reference:
        [Wu et al., 2018](https://arxiv.org/abs/1805.01978), section 3.4.
    """

    def __init__(
        self,
        train,
        val,
        every=1,
        k=20,
        temperature=0.07,
        feature="cls",
        mean=None,
        std=None,
        image_size=None,
        batch_size=64,
        name="knn",
    ):
        super().__init__()
        for count, value in (("every", every), ("k", k), ("batch_size", batch_size)):
            check_count(count, value, at_least=1)
        check_range("temperature", temperature, above=0, scheduled=False)
        if feature not in ("cls", "mean_patch", "cls_mean_patch"):
            raise ValueError(
                '`feature` must be "cls", "mean_patch" or "cls_mean_patch". '
                f"Received: feature={feature!r}."
            )
        for side, data in (("train", train), ("val", val)):
            if hasattr(data, "__next__"):
                raise ValueError(
                    f"`{side}` is read at every measurement, and a generator only once. Received: "
                    "a generator. Give `(images, labels)`, a list of batches or a data set."
                )
        self.train = train
        self.val = val
        self.every = every
        self.k = k
        self.temperature = temperature
        self.feature = feature
        self.mean = mean
        self.std = std
        self.image_size = image_size
        self.batch_size = batch_size
        self.name = name
        self.history = []
        self._extractor = None

    def on_train_begin(self, logs=None):
        augmentation = self.model.augmentation  # its mean and std are those of training
        mean, std = (
            getattr(augmentation, name, None) if value is None else value
            for name, value in (("mean", self.mean), ("std", self.std))
        )
        self._extractor = FeatureExtractor(
            self.model.teacher,
            feature=self.feature,
            mean=mean,
            std=std,
            image_size=self.image_size,
            extras=self.model.teacher_extras,
        )
        self._is_new = True

    def on_epoch_begin(self, epoch, logs=None):
        if self._is_new:  # by now a callback that restores a run has done so
            self._is_new = False
            self._measure(epoch)

    def on_epoch_end(self, epoch, logs=None):
        if (epoch + 1) % self.every == 0:
            self._measure(epoch + 1)
        if logs is not None:
            logs[self.name] = self.history[-1][1]

    def _measure(self, epoch):
        neighbours = self._features("train")
        queries = self._features("val")
        accuracy = knn_accuracy(*neighbours, *queries, k=self.k, temperature=self.temperature)
        self.history.append((epoch, accuracy))

    def _features(self, side):
        features = self._extractor.extract(getattr(self, side), batch_size=self.batch_size)
        if not isinstance(features, tuple):
            raise ValueError(
                f"k-NN needs a label for each image. Received: images alone in `{side}`. Give "
                "`(images, labels)`, or batches of them."
            )
        return features


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
        optimizer = getattr(self.model.optimizer, "inner_optimizer", self.model.optimizer)
        per_update = optimizer.gradient_accumulation_steps or 1
        batches = int(self.model.step) * per_update + int(optimizer._iterations) % per_update
        # Keras goes on within a pass if `steps_per_epoch` is less; then the order stays.
        self.data.position = batches // len(self.data) * len(self.data)
