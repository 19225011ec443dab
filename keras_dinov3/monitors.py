"""Callbacks that measure now and then: what features are worth, and what the schedules say."""

import keras
import numpy as np
from keras import ops

from keras_dinov3 import backend, evaluation
from keras_dinov3.augment import MultiCrop
from keras_dinov3.evaluation import knn_accuracy, rankme
from keras_dinov3.features import POOLED, FeatureExtractor, batches
from keras_dinov3.optimizers import AdamW
from keras_dinov3.schedules import check_count, check_range, value_at


class Monitor(keras.callbacks.Callback):
    """Measures before the first epoch, then now and then, and fills the logs of every epoch.

    The epochs between two measurements repeat the last values, so that `CSVLogger`,
    `ModelCheckpoint(monitor=...)`, `EarlyStopping` and `TensorBoard` find them in each; put it
    before them in the list of callbacks. A subclass has `measure`, and `prepare` if it needs one.

    Args:
        every: Int, at least 1. Epochs from one measurement to the next.
        every_steps: Int, at least 1. Batches from one measurement to the next, counted over the
            whole `fit`; the values are then in the logs of batches as well. `None`: only at the
            ends of epochs.

    Attributes:
        records: List of dicts, one for each measurement: `epoch` (how many were over), `step` (the
            model's updates by then) and the values by their names in the logs.
    """

    def __init__(self, every=1, every_steps=None):
        super().__init__()
        check_count("every", every, at_least=1)
        if every_steps is not None:
            check_count("every_steps", every_steps, at_least=1)
        self.every = every
        self.every_steps = every_steps
        self.records = []
        self._values = {}

    def prepare(self):
        """Makes ready what `measure` needs; called before training."""

    def measure(self):
        """The values of the moment, a dict of numbers."""
        raise NotImplementedError

    def on_train_begin(self, logs=None):
        self._is_new, self._count = True, 0
        self.prepare()

    def on_epoch_begin(self, epoch, logs=None):
        self._epoch, self._batch = epoch, 0
        if self._is_new:  # by now a callback that restores a run has done so
            self._is_new = False
            self._record(epoch)

    def on_train_batch_end(self, batch, logs=None):
        before = self._count
        self._count += batch + 1 - self._batch  # more than 1 under `steps_per_execution`
        self._batch = batch + 1
        if self.every_steps is None:
            return
        if before // self.every_steps < self._count // self.every_steps:
            self._record(self._epoch)
        if logs is not None:
            logs.update(self._values)

    def on_epoch_end(self, epoch, logs=None):
        if (epoch + 1) % self.every == 0:
            self._record(epoch + 1)
        if logs is not None:
            logs.update(self._values)

    def _record(self, epoch):
        synchronize(self.model)
        self._values = self.measure()
        self.records.append({"epoch": epoch, "step": int(self.model.step), **self._values})


def synchronize(model):
    """Puts the weights of the moment into the model: during `fit` on JAX they live in its loop."""
    if hasattr(model, "jax_state_sync"):
        model.jax_state_sync()


class FeatureMonitor(Monitor):
    """A `Monitor` of the teacher's features; its arguments are described in `KNN`."""

    def __init__(self, data, every, every_steps, feature, mean, std, image_size, batch_size, name):
        super().__init__(every, every_steps)
        check_count("batch_size", batch_size, at_least=1)
        if feature not in POOLED:
            raise ValueError(f"`feature` must be one of {POOLED}. Received: feature={feature!r}.")
        for side, images in data.items():
            if hasattr(images, "__next__"):
                raise ValueError(
                    f"`{side}` is read at every measurement, and a generator only once. Received: "
                    "a generator. Give arrays, a list of batches or a data set."
                )
            setattr(self, side, images)
        self.feature = feature
        self.mean = mean
        self.std = std
        self.image_size = image_size
        self.batch_size = batch_size
        self.name = name

    @property
    def history(self):
        """List of `(epoch, value)`."""
        return [(record["epoch"], record[self.name]) for record in self.records]

    def prepare(self):
        augmentation = self.model.augmentation  # its mean and std are those of training
        mean, std = (
            getattr(augmentation, name, None) if value is None else value
            for name, value in (("mean", self.mean), ("std", self.std))
        )
        backbone, extras = self.model.learned
        self._extractor = FeatureExtractor(
            backbone,
            feature=self.feature,
            mean=mean,
            std=std,
            image_size=self.image_size,
            extras=extras,
        )

    def labelled_features(self, side):
        features = self._extractor.extract(getattr(self, side), self.batch_size)
        if not isinstance(features, tuple):
            raise ValueError(
                f"`{type(self).__name__}` needs a label for each image. Received: images alone in "
                f"`{side}`. Give `(images, labels)`, or batches of them."
            )
        return features


class KNN(FeatureMonitor):
    """Says whether the teacher learns: weighted k-NN top-1 accuracy in the logs as `knn`.

    Measured before the first epoch and after every `every` epochs; the epochs between repeat
    the last value, so that `CSVLogger`, `ModelCheckpoint(monitor="knn", mode="max")` and
    `EarlyStopping` find it in each. Put it before them in the list of callbacks.

    Args:
        train: `(images, labels)` or anything that yields such batches: the labelled neighbours.
        val: The same, images to classify.
        every: Int, at least 1. Epochs from one measurement to the next.
        k: Int, number of neighbours, or several: then `knn_10`, `knn_20` and so on in the logs.
        temperature: Positive float of the vote `exp(similarity / temperature)`.
        feature: `"cls"`, `"mean_patch"` or `"cls_mean_patch"`.
        mean: Number or one per channel, as in `MultiCrop`. `None`: the mean of the model's
            augmentation; needed if the model trains on ready crops with another one.
        std: The same.
        image_size: `None` (the images' own size, rounded to whole patches), int or
            `(height, width)` in pixels.
        batch_size: Int. Images in one forward pass.
        name: Name of the value in the logs.
        every_steps: Int. Batches from one measurement to the next, see `Monitor`. `None`: only at
            the ends of epochs.

    Attributes:
        records: List of dicts, see `Monitor`.
        history: List of `(epoch, accuracy)`: after how many epochs, 0 being before training, or
            as many as were made before if the run goes on from there; accuracy in [0, 1], of
            the first `k` if there are several.

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
        every_steps=None,
    ):
        data = {"train": train, "val": val}
        super().__init__(data, every, every_steps, feature, mean, std, image_size, batch_size, name)
        for count in np.ravel(k).tolist() or [None]:
            check_count("k", count, at_least=1)
        check_range("temperature", temperature, above=0, scheduled=False)
        self.k = k
        self.temperature = temperature

    @property
    def history(self):
        first = f"{self.name}_{self.k[0]}" if np.ndim(self.k) else self.name
        return [(record["epoch"], record[first]) for record in self.records]

    def measure(self):
        neighbours = self.labelled_features("train")
        queries = self.labelled_features("val")
        accuracy = knn_accuracy(*neighbours, *queries, k=self.k, temperature=self.temperature)
        if np.ndim(self.k):
            return {f"{self.name}_{k}": value for k, value in accuracy.items()}
        return {self.name: accuracy}


class RankMe(FeatureMonitor):
    """Effective rank of the teacher's features in the logs as `rankme`; it needs no labels.

    From 1, when all images give one direction, to about the width or the number of images,
    whichever is less. It falls when dimensions collapse.

    Args:
        images: Images, or `(images, labels)`, or anything that yields such batches; labels are
            ignored. Several times as many as the features are wide, always the same.
        every: As in `KNN`, as are the other arguments and `history`.
        feature: `"cls"`, `"mean_patch"` or `"cls_mean_patch"`.
        mean: Number or one per channel.
        std: The same.
        image_size: `None`, int or `(height, width)` in pixels.
        batch_size: Int. Images in one forward pass.
        name: Name of the value in the logs.
        every_steps: Int or `None`.

    Raises:
        ValueError: If an argument is outside its range or the data cannot be read again.

    Reference:
        [Garrido et al., 2023](https://arxiv.org/abs/2210.02885), equation 1.
    """

    def __init__(
        self,
        images,
        every=1,
        feature="cls",
        mean=None,
        std=None,
        image_size=None,
        batch_size=64,
        name="rankme",
        every_steps=None,
    ):
        data = {"images": images}
        super().__init__(data, every, every_steps, feature, mean, std, image_size, batch_size, name)

    def measure(self):
        features = self._extractor.extract(self.images, self.batch_size)
        return {self.name: rankme(features[0] if isinstance(features, tuple) else features)}


class LiDAR(FeatureMonitor):
    """Rank of what the teacher knows of images beyond their views, in the logs as `lidar`.

    Each image is seen in several views, the global crops of the augmentation. The rank is that of
    a linear discriminant analysis with a class per image: directions in which images differ count,
    those in which the views of one image differ do not. So random features, whose `RankMe` is
    high, score low.

    Args:
        images: Images, or `(images, labels)`, or anything that yields such batches; labels are
            ignored. More images than the features are wide, always the same.
        every: As in `KNN`, as are the other arguments and `history`.
        num_views: Int, at least 2. Views of each image; the same ones at every measurement.
        augmentation: `MultiCrop` layer whose global crops are the views. `None`: the model's.
        seed: Int. Seeds the views.
        feature: `"cls"`, `"mean_patch"` or `"cls_mean_patch"`.
        batch_size: Int. Images in one forward pass, so this times `num_views` crops.
        name: Name of the value in the logs.
        every_steps: Int or `None`.

    Raises:
        ValueError: If an argument is outside its range or the data cannot be read again; before
            training, if there is no augmentation.

    Reference:
        [Thilak et al., 2023](https://arxiv.org/abs/2312.04000), section 4.
    """

    def __init__(
        self,
        images,
        every=1,
        num_views=10,
        augmentation=None,
        seed=0,
        feature="cls",
        batch_size=16,
        name="lidar",
        every_steps=None,
    ):
        data = {"images": images}
        super().__init__(data, every, every_steps, feature, None, None, None, batch_size, name)
        check_count("num_views", num_views, at_least=2)
        check_count("seed", seed)
        if not isinstance(augmentation, (MultiCrop, type(None))):
            raise ValueError(
                "`augmentation` must be a `MultiCrop` layer, or None for the model's. "
                f"Received: augmentation={augmentation!r}."
            )
        self.num_views = num_views
        self.augmentation = augmentation
        self.seed = seed

    def prepare(self):
        augmentation = self.augmentation or self.model.augmentation
        if augmentation is None:
            raise ValueError(
                "`LiDAR` needs an augmentation to make views with, and a model that trains on "
                "ready crops has none. Received: augmentation=None. Give one: "
                "`LiDAR(images, augmentation=kd.MultiCrop(...))`."
            )
        self.mean, self.std = augmentation.mean, augmentation.std
        super().prepare()
        # Not normalised yet: the extractor does that, as with images.
        changes = {
            "num_global_crops": self.num_views,
            "num_local_crops": 0,
            "mean": 0.0,
            "std": 1.0,
        }
        self._views = changed(augmentation, seed=self.seed, **changes)
        self._first_state = ops.convert_to_numpy(self._views.seed_generator.state)

    def measure(self):
        self._views.seed_generator.state.assign(self._first_state)
        features = self._extractor.extract(self.view_batches())
        grouped = features.reshape(-1, self.num_views, features.shape[-1])
        return {self.name: evaluation.lidar(grouped)}

    def view_batches(self):
        for images, _ in batches(self.images, self.batch_size):
            views = backend.numpy_of(self._views(images)["global_crops"])  # (B, views, S, S, C)
            yield views.reshape(-1, *views.shape[2:])


class ScheduleLogger(Monitor):
    """Puts what follows a schedule into the logs, as it was in the last update.

    `learning_rate`, `weight_decay`, `teacher_momentum` (if the teacher moves),
    `teacher_temperature` and `student_temperature`. The norms of the gradients of backbone and
    heads come from the optimizer, which has them at hand: with `kd.AdamW(..., log=True)` they join
    these as `backbone_gradient_norm`, `dino_head_gradient_norm` and `ibot_head_gradient_norm`.

    Args:
        every: Int, at least 1. Epochs from one look to the next.
        every_steps: Int or `None`: batches, see `Monitor`.

    Attributes:
        records: List of dicts, see `Monitor`.
    """

    def measure(self):
        return scheduled_values(self.model)


def scheduled_values(model):
    """What `ScheduleLogger` logs, a dict of floats; before the first update, what that will use."""
    step = last(model.step)
    optimizer = backend.bare_optimizer(model)
    # Keras's own schedules count batches, also under gradient accumulation.
    clock = optimizer.iterations if isinstance(optimizer, AdamW) else optimizer._iterations
    rate = optimizer._learning_rate
    if isinstance(rate, keras.optimizers.schedules.LearningRateSchedule):
        rate = rate(last(clock))
    else:
        rate = optimizer.learning_rate
    values = {
        "learning_rate": rate,
        "weight_decay": value_at(optimizer.weight_decay or 0.0, last(clock)),
        **{name: value_at(value, step) for name, value in model.schedules.items()},
    }
    return {name: float(ops.convert_to_numpy(value)) for name, value in values.items()}


def last(count):
    """The number, counted from 0, of the last update; 0 before the first."""
    return max(int(count) - 1, 0)


def changed(layer, **changes):
    """A layer with other settings and, but for those, the same; it shares no random state."""
    return type(layer).from_config({**layer.get_config(), "name": None, **changes})
