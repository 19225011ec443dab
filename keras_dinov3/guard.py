"""`Guard`: a run that unlearns what its backbone knew is stopped."""

import math
import os
import pathlib

import keras
import numpy as np

from keras_dinov3.alarms import announce
from keras_dinov3.evaluation import knn_accuracy, rankme
from keras_dinov3.monitors import FeatureMonitor
from keras_dinov3.neighbours import nearest
from keras_dinov3.schedules import check_count, check_range

ACTIONS = ("stop", "restore")


class Guard(FeatureMonitor):
    """Stops training when features become worse than they were at the start.

    Before the first step, and now and then in training, it looks at the features of some images.
    With labels, half of the images vote on the other half: `guard_knn`, the accuracy of that
    weighted k-NN. Without, `guard_rankme`, the effective rank, and `guard_agreement`, the share of
    each image's `k` nearest neighbours that were so at the start. What it sees is in the logs
    under these names. When a value falls too far, a warning says so and what to try.

    Args:
        images: Images, or `(images, labels)`, or anything that yields such batches, always the
            same; some hundreds to thousands. Of the kind on which the backbone must stay good.
        action: `"stop"`: training ends. `"restore"`: and the model gets back the weights it had
            when it was last (with labels: most) within bounds; the optimizer and the count of
            steps are left, and so are files that other callbacks have written. A loss that is not
            finite ends `fit` by an error before, and nothing is put back.
        max_drop: Float in [0, 1). How far the accuracy may fall.
        max_rank_drop: Float in [0, 1). Share of its first value that the rank may lose.
        min_agreement: Float in [0, 1]. Agreement that must remain.
        every: Int, at least 1. Epochs from one look to the next.
        every_steps: Int: batches, see `Monitor`. `None`: only at the ends of epochs.
        k: Int, number of neighbours.
        path: Path of a file to which the alarm is appended as a line of JSON, or `None`.
        start_path: Path of a `.npz` file for the features of the start, to which a run that is
            resumed is compared too. `None`: it is compared with what it is resumed from.
        feature: `"cls"`, `"mean_patch"` or `"cls_mean_patch"`.
        mean: Number or one per channel, as in `MultiCrop`. `None`: the mean of the model's
            augmentation.
        std: The same.
        image_size: `None` (the images' own size, rounded to whole patches), int or
            `(height, width)` in pixels.
        batch_size: Int. Images in one forward pass.

    Attributes:
        records: List of dicts, see `Monitor`.
        alarm: Dict of what ended the run, or `None`: `message`, `step`, `epoch`, `values` and more.

    Raises:
        ValueError: If an argument is outside its range or the data cannot be read again; before
            training, if there are too few images.
    """

    def __init__(
        self,
        images,
        action="stop",
        max_drop=0.02,
        max_rank_drop=0.3,
        min_agreement=0.3,
        every=1,
        every_steps=None,
        k=10,
        path=None,
        start_path=None,
        feature="cls_mean_patch",
        mean=None,
        std=None,
        image_size=None,
        batch_size=64,
    ):
        data = {"images": images}
        super().__init__(
            data, every, every_steps, feature, mean, std, image_size, batch_size, "guard"
        )
        if action not in ACTIONS:
            raise ValueError(f"`action` must be one of {ACTIONS}. Received: action={action!r}.")
        check_range("max_drop", max_drop, low=0, below=1, scheduled=False)
        check_range("max_rank_drop", max_rank_drop, low=0, below=1, scheduled=False)
        check_range("min_agreement", min_agreement, low=0, high=1, scheduled=False)
        check_count("k", k, at_least=1)
        self.action = action
        self.max_drop = max_drop
        self.max_rank_drop = max_rank_drop
        self.min_agreement = min_agreement
        self.k = k
        self.path = path
        self.start_path = None if start_path is None else pathlib.Path(start_path)
        self.alarm = None

    @property
    def history(self):
        return [(r["epoch"], r.get("guard_knn", r.get("guard_agreement"))) for r in self.records]

    def prepare(self):
        super().prepare()
        self.alarm = self._first = self._best = None

    def measure(self):
        features = self._extractor.extract(self.images, self.batch_size)
        features, labels = features if isinstance(features, tuple) else (features, None)
        if len(features) < 2 * self.k + 2:
            raise ValueError(
                f"`Guard` needs at least {2 * self.k + 2} images for k={self.k}. Received: "
                f"{len(features)}. Give more, or a smaller `k`."
            )
        if self._first is None:
            self._first = self.features_of_the_start(features)
            self._first_values = values_of(self._first, self._first, labels, self.k)
        return values_of(features, self._first, labels, self.k)

    def features_of_the_start(self, features):
        """These, or those that the run has kept before it was stopped."""
        if self.start_path is None:
            return features
        if int(self.model.step) > 0 and self.start_path.exists():
            with np.load(self.start_path, allow_pickle=False) as file:
                first = file["features"]
            if first.shape != features.shape:
                raise ValueError(
                    f"{self.start_path} must hold the features of this run at its start, of shape "
                    f"{features.shape}. Received: {first.shape}. Give the images of then."
                )
            return first
        self.start_path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.start_path.with_name("unfinished.npz")
        np.savez(unfinished, features=features)
        os.replace(unfinished, self.start_path)
        return features

    def _record(self, epoch):
        if self.alarm is not None:
            return
        super()._record(epoch)
        record, limits = self.records[-1], self.limits()
        broken = [name for name, limit in limits.items() if not record[name] >= limit - 1e-6]
        if broken:
            self.alarm = self.alarm_of(record, limits, broken)
            announce(self.alarm, self.path)
            self.model.stop_training = True
        elif self.action == "restore":
            value = record.get("guard_knn", 0.0)
            if self._best is None or value >= self._best[0]:
                self._best = value, record, self.model.get_weights()

    def limits(self):
        """The least that each value may be."""
        first = self._first_values
        if "guard_knn" in first:
            return {"guard_knn": first["guard_knn"] - self.max_drop}
        return {
            "guard_rankme": first["guard_rankme"] * (1 - self.max_rank_drop),
            "guard_agreement": self.min_agreement,
        }

    def alarm_of(self, record, limits, broken):
        saw = ", ".join(
            f"{name} is {record[name]:.3g} where it began with {self._first_values[name]:.3g} and "
            f"may fall to {limits[name]:.3g}"
            for name in broken
        )
        since = self._best[1] if self._best else self.records[0]
        then = "Training stops"
        if self._best:
            then += f" and the weights of step {since['step']} are put back"
        optimizer = self.model.optimizer
        rate = float(keras.ops.convert_to_numpy(optimizer.learning_rate))
        return {
            "kind": "unlearns",
            "step": record["step"],
            "epoch": record["epoch"],
            "since_step": since["step"],
            "since_epoch": since["epoch"],
            "message": f"The features became worse than at the start: {saw}, at step "
            f"{record['step']}. {then}. Try a lower learning rate than {rate:.2g}, more "
            "`freeze_backbone_steps` for new heads, a teacher momentum closer to 1, a "
            "`GramAnchor`, or LoRA: `recipes.continue_from` has such settings",
            "values": {name: record[name] for name in limits},
        }

    def on_train_end(self, logs=None):
        # Not before: on JAX the weights live in the loop of `fit`.
        if self.alarm is not None and self._best is not None:
            step = int(self.model.step)
            self.model.set_weights(self._best[2])
            self.model.step.assign(step)


def values_of(features, first, labels, k):
    """What `Guard` logs: features `(n, D)` beside those of the start `(n, D)`."""
    if not np.isfinite(features).all():
        names = ("guard_rankme", "guard_agreement") if labels is None else ("guard_knn",)
        return dict.fromkeys(names, math.nan)
    if labels is not None:
        bank, queries = np.array_split(np.random.default_rng(0).permutation(len(features)), 2)
        accuracy = knn_accuracy(
            features[bank], labels[bank], features[queries], labels[queries], k=k
        )
        return {"guard_knn": accuracy}
    now, then = (neighbours_of(x, k) for x in (features, first))
    shared = (now[:, :, None] == then[:, None, :]).sum(axis=(1, 2))
    return {"guard_rankme": rankme(features), "guard_agreement": float(np.mean(shared / k))}


def neighbours_of(features, k):
    """Rows of the `k` nearest others of each: int array `(n, k)`."""
    _, rows = nearest(features, features, k + 1, chunk_size=1024)
    is_other = rows != np.arange(len(rows))[:, None]
    is_other[is_other.all(axis=1), -1] = False  # twins: the row itself was not among the nearest
    return rows[is_other].reshape(len(rows), k)
