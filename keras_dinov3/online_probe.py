"""`LinearProbe`: a linear classifier that is trained beside the run and never touches it."""

import keras
import numpy as np

from keras_dinov3 import backend
from keras_dinov3.features import batches, checked_labels
from keras_dinov3.monitors import FeatureMonitor, synchronize
from keras_dinov3.schedules import check_count


class LinearProbe(FeatureMonitor):
    """Accuracy of a linear classifier on the teacher's features, in the logs as `linear_probe`.

    The classifier is trained while the model is: after a training step, one step of its own on
    labelled images. Features enter it as arrays, standardised by running means, so no gradient
    and no weight of it can reach the model. It follows features that change, so it shows how they
    grow; for a final number use `evaluation`. Its weights are not saved with the model: in a
    resumed run it starts anew.

    `linear_probe_loss` in the logs is the mean loss of its steps since the last measurement.
    Before the first it knows nothing: its accuracy is the share of one class.

    Args:
        train: `(images, labels)` or anything that yields such batches: what it is trained on.
        val: The same: what its accuracy is measured on.
        every: Int, at least 1. Epochs from one measurement to the next.
        train_every: Int, at least 1. Training steps of the model to one of the classifier, which
            costs a forward pass of `batch_size` images and waits for the device.
        optimizer: Keras optimizer of its own, or the name of one. `None`: Adam at a rate of 0.01.
        feature: `"cls"`, `"mean_patch"` or `"cls_mean_patch"`.
        mean: Number or one per channel, as in `KNN`.
        std: The same.
        image_size: `None`, int or `(height, width)` in pixels, as in `KNN`.
        batch_size: Int. Images in one step, and in one forward pass.
        seed: Int, for the order of the training images where they are arrays.
        name: Name of the accuracy in the logs.
        every_steps: Int or `None`, as in `KNN`.

    Attributes:
        classifier: `keras.Model` from features to logits.
        classes: NumPy array of the labels that the logits stand for.
        records: List of dicts, see `Monitor`.
        history: List of `(epoch, accuracy)`.

    Raises:
        ValueError: If an argument is outside its range or the data cannot be read again; before
            training, if they hold no labels, or `val` a label that `train` does not.

    Reference:
        [Chen et al., 2020](https://arxiv.org/abs/2002.05709), appendix B.10 (a classifier trained
        at the same time, its gradients stopped);
        [He et al., 2022](https://arxiv.org/abs/2111.06377), appendix A.1 (features standardised
        without scale and offset).
    """

    def __init__(
        self,
        train,
        val,
        every=1,
        train_every=1,
        optimizer=None,
        feature="cls",
        mean=None,
        std=None,
        image_size=None,
        batch_size=64,
        seed=0,
        name="linear_probe",
        every_steps=None,
    ):
        data = {"train": train, "val": val}
        super().__init__(data, every, every_steps, feature, mean, std, image_size, batch_size, name)
        check_count("train_every", train_every, at_least=1)
        check_count("seed", seed)
        self.train_every = train_every
        self.optimizer = optimizer
        self.seed = seed
        self.classifier = None

    def prepare(self):
        super().prepare()
        if self.classifier is None:
            labels = {side: self.labels(side) for side in ("train", "val")}
            self.classes = np.unique(labels["train"])
            unknown = np.setdiff1d(labels["val"], self.classes)
            if len(unknown):
                raise ValueError(
                    "`val` may hold only labels that `train` holds, to be learned. Received: "
                    f"{unknown[:5].tolist()} in `val` alone."
                )
            self.classifier = self.make_classifier()
        self._losses = []
        self._batches = self.endless_batches()

    def labels(self, side):
        """All labels of one side, `(n,)`."""
        labels = [labels for _, labels in batches(getattr(self, side), self.batch_size)]
        if not labels or labels[0] is None:
            raise ValueError(
                f"`{type(self).__name__}` needs a label for each image. Received: images alone in "
                f"`{side}`. Give `(images, labels)`, or batches of them."
            )
        labels = np.concatenate(labels)
        return checked_labels("labels", labels, len(labels))

    def make_classifier(self):
        width = self.model.learned[0].hidden_dim * (2 if self.feature == "cls_mean_patch" else 1)
        layers = [
            keras.layers.BatchNormalization(center=False, scale=False, momentum=0.9),
            # Zeros: any start will do, and none is drawn, which would move the run's random state.
            keras.layers.Dense(len(self.classes), kernel_initializer="zeros"),
        ]
        classifier = keras.Sequential([keras.Input((width,)), *layers])
        classifier.compile(
            self.optimizer or keras.optimizers.Adam(1e-2),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        )
        return classifier

    def endless_batches(self):
        """`(images, labels)` again and again; arrays in a new order each time."""
        rng = np.random.default_rng(self.seed)
        while True:
            data = self.train
            if isinstance(data, tuple):
                order = rng.permutation(len(data[0]))
                data = shuffled(map(backend.numpy_of, data), order, self.batch_size)
            full_size = 0
            for images, labels in batches(data, self.batch_size):
                full_size = max(full_size, len(images))
                if len(images) == full_size:  # static shapes: a shorter last batch waits its turn
                    yield images, labels

    def on_train_batch_end(self, batch, logs=None):
        before = self._count
        super().on_train_batch_end(batch, logs)
        if before // self.train_every < self._count // self.train_every:
            self.train_once()

    def train_once(self):
        """One step of the classifier on the next batch."""
        synchronize(self.model)
        images, labels = next(self._batches)
        features = self._extractor.extract(images, len(images))
        targets = np.searchsorted(self.classes, np.ravel(labels))
        loss = self.classifier.train_on_batch(features, targets)
        self._losses.append(float(loss))

    def measure(self):
        features, labels = self.labelled_features("val")
        logits = self.classifier.predict(features, batch_size=len(features), verbose=0)
        correct = self.classes[np.argmax(logits, axis=-1)] == np.ravel(labels)
        # Of zeros, which it starts from, the loss is that of a guess.
        loss = np.mean(self._losses) if self._losses else np.log(len(self.classes))
        self._losses = []
        return {self.name: float(np.mean(correct)), f"{self.name}_loss": float(loss)}


def shuffled(arrays, order, batch_size):
    """Batches of arrays in a given order."""
    arrays = list(arrays)
    for start in range(0, len(order), batch_size):
        yield [array[order[start : start + batch_size]] for array in arrays]
