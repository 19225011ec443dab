"""What features are worth: extraction from images, weighted k-NN, RankMe; NumPy in and out."""

import keras
import numpy as np
from keras import ops

from keras_dinov3 import backend
from keras_dinov3.augment import MultiCrop, as_pair
from keras_dinov3.batches import from_directory
from keras_dinov3.checks import check_pixels
from keras_dinov3.encoder import encode, grid_of
from keras_dinov3.families import channels_of, check_backbone, patch_size_of
from keras_dinov3.image_ops import resize

FEATURES = ("cls", "mean_patch", "cls_mean_patch", "patches")


def extract_features(backbone, data, batch_size=64, verbose=0, **kwargs):
    """`FeatureExtractor(backbone, **kwargs).extract(data, ...)`, for when it is needed once.

    Args:
        backbone: A `keras_hub.models.DINOV3Backbone`.
        data: As in `FeatureExtractor.extract`, as are the returned value and what is raised.
        batch_size: Int, images per step where `data` are arrays.
        verbose: 0, or 1 for a progress bar.
        **kwargs: `feature`, `mean`, `std`, `image_size` and `extras` of `FeatureExtractor`.

    Returns:
        float32 NumPy array of features, or `(features, labels)` if the data carry labels.
    """
    return FeatureExtractor(backbone, **kwargs).extract(data, batch_size, verbose)


@keras.saving.register_keras_serializable(package="keras_dinov3")
class FeatureExtractor(keras.Model):
    """Images in, frozen features of a backbone out, compiled once per batch shape.

    It reads the backbone's own weights and has none itself, so it always shows their
    present values: make it once and call `extract` as often as wanted during training.

    Args:
        backbone: A `keras_hub.models.DINOV3Backbone`.
        feature: What stands for an image. `"cls"`: the class token, `(D,)`; `"mean_patch"`: the
            mean of the patch tokens, `(D,)`; `"cls_mean_patch"`: both, `(2 * D,)`;
            `"patches"`: every patch token, row by row, `(N, D)`.
        mean: Number, one per channel, or `None`, as in `MultiCrop`; use those of training.
        std: The same.
        image_size: Int or `(height, width)` in pixels, multiples of the backbone's patch size.
            Images of other sizes are resized (bicubic, antialiased). `None`: to the
            multiples nearest to their own size.
        extras: `EncoderExtras` of the backbone, such as `model.teacher_extras`, or `None`.
        **kwargs: Keyword arguments of `keras.Model`.

    Call arguments:
        images: `(B, H, W, C)`, uint8 from 0 to 255 or float from 0 to 1.

    Returns:
        float32 tensor of shape `(B, D)`, `(B, 2 * D)` or `(B, N, D)`.

    Raises:
        TypeError: If `backbone` is of no supported family.
        ValueError: If `feature` is unknown, `image_size` is no multiple of the patch size, or
            the images do not fit the backbone.
    """

    def __init__(
        self,
        backbone,
        feature="cls",
        mean=None,
        std=None,
        image_size=None,
        extras=None,
        **kwargs,
    ):
        super().__init__(**{"autocast": False, **kwargs})
        check_backbone(backbone)
        if feature not in FEATURES:
            raise ValueError(f"`feature` must be one of {FEATURES}. Received: feature={feature!r}.")
        if image_size is not None:
            grid_of(as_pair(image_size), patch_size_of(backbone), "image_size")
        self.backbone = backbone
        self.feature = feature
        self.mean = mean
        self.std = std
        self.image_size = image_size
        self.extras = extras
        self.built = True  # no weights to make
        self._normalize = MultiCrop(mean=mean, std=std).normalize
        self._functions = {}  # batch shape and dtype -> compiled function

    def call(self, images):
        size = self.input_size(images.shape[1:3])
        images = resize(self._normalize(images), size)
        tokens = encode(self.backbone, images, extras=self.extras)
        cls, patches = (ops.cast(x, "float32") for x in (tokens.cls, tokens.patches))
        if self.feature == "patches":
            return patches
        mean_patch = ops.mean(patches, axis=1)
        both = ops.concatenate([cls, mean_patch], axis=-1)
        return {"cls": cls, "mean_patch": mean_patch, "cls_mean_patch": both}[self.feature]

    def input_size(self, size):
        """The `(height, width)` that images of `size` are resized to."""
        if self.image_size is not None:
            return as_pair(self.image_size)
        patch_size = patch_size_of(self.backbone)
        return tuple(max(int(n / patch_size + 0.5), 1) * patch_size for n in size)

    def extract(self, data, batch_size=64, verbose=0):
        """Features of all images in `data`, in their order.

        Args:
            data: Images or `(images, labels)` as arrays, or an iterable of batches of either:
                `tf.data.Dataset`, `PyDataset`, torch `DataLoader`, grain, list, generator.
                Images are `(B, H, W, C)`, uint8 from 0 to 255 or float from 0 to 1.
            batch_size: Int, images per step where `data` are arrays; iterables bring their
                own. A last, shorter batch is padded so that nothing is compiled again.
            verbose: 0, or 1 for a progress bar.

        Returns:
            float32 NumPy array of shape `(n, D)`, `(n, 2 * D)` or `(n, N, D)`, or a pair
            `(features, labels)` if the data carry labels.

        Raises:
            ValueError: If the data are empty or endless, or not images as described.
        """
        features, labels, full_size = [], [], 0
        progress = keras.utils.Progbar(None, verbose=verbose, unit_name="batch")
        for images, batch_labels in batches(data, batch_size):
            check_pixels("images", images, channels_of(self.backbone), rank=4)
            if images.dtype != "uint8":
                images = images.astype("float32")  # not all devices know float64
            full_size = max(full_size, len(images))
            features.append(self._predict(images, full_size))
            labels.append(batch_labels)
            progress.update(len(labels))
        if not features:
            raise ValueError(f"`data` must hold at least one image. Received: {data!r}.")
        progress.update(len(labels), finalize=True)
        features = np.concatenate(features)
        return features if labels[0] is None else (features, np.concatenate(labels))

    def _predict(self, images, full_size):
        count = len(images)
        if count < full_size:
            images = images[np.arange(full_size) % count]
        # One function per shape: TensorFlow would trace a shared one with unknown sizes.
        key = (images.shape, images.dtype.name)
        self.predict_function = self._functions.get(key)
        features = self.predict_on_batch(images)
        self._functions[key] = self.predict_function
        return features[:count]

    def get_config(self):
        return {
            **super().get_config(),
            "backbone": keras.saving.serialize_keras_object(self.backbone),
            "feature": self.feature,
            "mean": self.mean,
            "std": self.std,
            "image_size": self.image_size,
            "extras": keras.saving.serialize_keras_object(self.extras),
        }

    @classmethod
    def from_config(cls, config):
        backbone, extras = (
            keras.saving.deserialize_keras_object(config[name]) for name in ("backbone", "extras")
        )
        if extras is not None:
            extras.build_for(backbone)
        return cls(**{**config, "backbone": backbone, "extras": extras})


def batches(data, batch_size):
    """Yields `(images, labels)` in NumPy from any supported `data`; labels may be `None`."""
    is_endless = getattr(data, "num_batches", 0) is None  # PyDataset
    if is_endless or (hasattr(data, "cardinality") and int(data.cardinality()) == -1):  # tf.data
        raise ValueError(f"`data` must end. Received: {data!r}; take as many batches as needed.")
    if isinstance(data, tuple) or hasattr(data, "shape"):
        images, labels = split(data)
        if labels is not None and len(images) != len(labels):
            raise ValueError(
                "There must be one label per image. "
                f"Received: {len(images)} images, {len(labels)} labels."
            )
        parts = (images,) if labels is None else (images, labels)
        starts = range(0, len(images), batch_size)
        data = ([part[start : start + batch_size] for part in parts] for start in starts)
    for batch in from_directory(data):
        images, labels = split(batch)
        yield backend.numpy_of(images), None if labels is None else backend.numpy_of(labels)


def split(batch):
    """`(images, labels)` from a batch of any form that Keras takes; labels may be `None`."""
    if hasattr(batch, "shape"):
        return batch, None
    if isinstance(batch, (tuple, list)) and len(batch) in (1, 2, 3):  # a third: sample weights
        return (*batch, None)[:2]
    held = f"a dict with keys {list(batch)}" if isinstance(batch, dict) else type(batch).__name__
    raise ValueError(f"A batch must be images or (images, labels). Received: {held}.")


def knn_predict(train_features, train_labels, features, k=20, temperature=0.07, chunk_size=256):
    """Labels by weighted vote of the most similar training images.

    Each of the `k` nearest votes for its own label with weight `exp(cosine / temperature)`.

    Args:
        train_features: Float array of shape `(n, D)`, of any norm.
        train_labels: `n` class labels of any type, shape `(n,)` or `(n, 1)`.
        features: Float array of shape `(m, D)`.
        k: Int from 1 to `n`, or several.
        temperature: Positive float; the lower, the more the nearest neighbours decide.
        chunk_size: Int. Rows of `features` compared at a time, `chunk_size * n` cosines.

    Returns:
        Array of `m` labels; for several `k`, a dict from each to such an array. Where votes
        are equal, the label that sorts first.

    Raises:
        ValueError: If lengths or widths differ, `k` or `temperature` are out of range, or
            features are empty or not finite.

    Reference:
        [Wu et al., 2018](https://arxiv.org/abs/1805.01978), section 3.4;
        [Caron et al., 2021](https://arxiv.org/abs/2104.14294), section 4.1.
    """
    train_features = checked_features("train_features", train_features)
    features = checked_features("features", features)
    train_labels = checked_labels("train_labels", train_labels, len(train_features))
    if train_features.shape[1] != features.shape[1]:
        raise ValueError(
            "Both feature arrays must have the same width. Received: "
            f"train_features.shape={train_features.shape}, features.shape={features.shape}."
        )
    counts = np.ravel(k).tolist()
    if not counts or min(counts) < 1 or max(counts) > len(train_features):
        raise ValueError(
            "`k` must be from 1 to the number of training features. "
            f"Received: k={k}, {len(train_features)} training features."
        )
    if not temperature > 0:
        raise ValueError(f"`temperature` must be positive. Received: temperature={temperature}.")

    classes, train_classes = np.unique(train_labels, return_inverse=True)
    bank = ops.convert_to_tensor(unit_rows(train_features).T)  # (D, n)
    chosen = {count: [] for count in counts}
    for start in range(0, len(features), chunk_size):
        chunk = ops.convert_to_tensor(unit_rows(features[start : start + chunk_size]))
        nearest = ops.top_k(ops.matmul(chunk, bank), max(counts))  # sorted, (chunk, max k)
        cosines, neighbors = (ops.convert_to_numpy(x) for x in nearest)
        # Weights relative to the nearest one's: the same vote, and nothing overflows.
        weights = np.exp((cosines - cosines[:, :1]).astype("float64") / temperature)
        bins = train_classes[neighbors] + len(classes) * np.arange(len(cosines))[:, None]
        for count in counts:
            votes = np.bincount(
                bins[:, :count].ravel(), weights[:, :count].ravel(), len(cosines) * len(classes)
            )
            chosen[count].append(votes.reshape(len(cosines), -1).argmax(axis=1))
    labels = {count: classes[np.concatenate(rows)] for count, rows in chosen.items()}
    return labels if np.ndim(k) else labels[k]


def knn_accuracy(train_features, train_labels, test_features, test_labels, k=20, **kwargs):
    """Share of the test images that `knn_predict` gives their own label.

    Args:
        train_features: As in `knn_predict`, as are `train_labels` and `k`.
        train_labels: `n` class labels.
        test_features: Float array of shape `(m, D)`.
        test_labels: `m` class labels.
        k: Int from 1 to `n`, or several.
        **kwargs: `temperature` and `chunk_size` of `knn_predict`.

    Returns:
        Float from 0 to 1; for several `k`, a dict from each to such a float.

    Raises:
        ValueError: As `knn_predict`, and if test features and labels differ in number.
    """
    test_labels = checked_labels("test_labels", test_labels, len(test_features))
    predicted = knn_predict(train_features, train_labels, test_features, np.ravel(k), **kwargs)
    accuracy = {k: float(np.mean(labels == test_labels)) for k, labels in predicted.items()}
    return accuracy if np.ndim(k) else accuracy[k]


def rankme(features, epsilon=1e-7):
    """Effective rank: how many directions the features really use.

    `exp(-sum(p * log(p)))`, where `p` are the singular values of the features, scaled to sum
    1, plus `epsilon`.

    Args:
        features: Float array of shape `(n, D)`, not centred; `n` should be well above `D`.
        epsilon: Positive float.

    Returns:
        Float from 1 (all on a line) to about `min(n, D)`.

    Raises:
        ValueError: If features are empty or not finite.

    Reference:
        [Garrido et al., 2023](https://arxiv.org/abs/2210.02885), equation 1.
    """
    features = checked_features("features", features).astype("float64")
    if len(features) < features.shape[1]:
        features = features.T
    # Singular values from the small Gram matrix: exact enough in float64.
    singular = np.sqrt(np.maximum(np.linalg.eigvalsh(features.T @ features), 0.0))
    p = singular / max(singular.sum(), epsilon) + epsilon
    return float(np.exp(-np.sum(p * np.log(p))))


def lidar(features, delta=1e-4, epsilon=1e-7):
    """Effective rank of what features know of images beyond their views.

    With a class for each image, its views being the members: between images the covariance of the
    means is `B`, within images that of the views is `W + delta * I`. The value is
    `exp(-sum(p * log(p)))`, where `p` are the eigenvalues of `W**-0.5 @ B @ W**-0.5`, scaled to
    sum 1, plus `epsilon`.

    Args:
        features: Float array of shape `(n, q, D)`: of `n` images `q` views each; `n` should be
            above `D`.
        delta: Positive float.
        epsilon: Positive float.

    Returns:
        Float from 1 to about `min(n - 1, D)`.

    Raises:
        ValueError: If there are fewer than two images or views, or features are not finite.

    Reference:
        [Thilak et al., 2023](https://arxiv.org/abs/2312.04000), section 4.
    """
    features = backend.numpy_of(features)
    if features.ndim != 3 or min(features.shape[:2]) < 2:
        raise ValueError(
            "`features` must have shape (images, views, width), with two images and two views at "
            f"least. Received: features.shape={features.shape}."
        )
    n, q, width = features.shape
    features = checked_features("features", features.reshape(n * q, width)).astype("float64")
    features = features.reshape(n, q, width)
    means = features.mean(axis=1)
    between = np.cov(means, rowvar=False, bias=True).reshape(width, width)
    apart = (features - means[:, None]).reshape(n * q, width)
    within = apart.T @ apart / (n * q) + delta * np.eye(width)
    half = np.linalg.inv(np.linalg.cholesky(within))  # as good as the root: same eigenvalues
    values = np.maximum(np.linalg.eigvalsh(half @ between @ half.T), 0.0)
    p = values / max(values.sum(), epsilon) + epsilon
    return float(np.exp(-np.sum(p * np.log(p))))


def unit_rows(features):
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)


def checked_features(name, features):
    features = backend.numpy_of(features).astype("float32")
    if features.ndim != 2 or not features.size:
        raise ValueError(
            f"`{name}` must have shape (images, width) and hold at least one image. "
            f"Received: {name}.shape={features.shape}."
        )
    bad = np.flatnonzero(~np.isfinite(features).all(axis=1))
    if len(bad):
        raise ValueError(
            f"`{name}` must be finite. Received: NaN or infinity in {len(bad)} of "
            f"{len(features)} rows, first in row {bad[0]}. If the images are finite, the "
            "weights have diverged: go back to an earlier checkpoint with a lower rate."
        )
    return features


def checked_labels(name, labels, count):
    labels = backend.numpy_of(labels)
    if labels.shape not in ((count,), (count, 1)):
        raise ValueError(
            f"`{name}` must hold one class label per feature, shape ({count},). "
            f"Received: {name}.shape={labels.shape}. From one-hot rows: `labels.argmax(-1)`."
        )
    return labels.ravel()
