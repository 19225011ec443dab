"""Images in, frozen features out, in NumPy; and what the functions that take features check."""

import keras
import numpy as np
from keras import ops

from keras_dinov3 import backend
from keras_dinov3.augment import MultiCrop, as_pair
from keras_dinov3.batches import from_directory
from keras_dinov3.checks import check_pixels
from keras_dinov3.encoder import block_numbers, encode, encode_layers, grid_of
from keras_dinov3.families import channels_of, check_backbone, patch_size_of
from keras_dinov3.image_ops import resize

POOLED = ("cls", "mean_patch", "cls_mean_patch")  # one vector for an image
FEATURES = (*POOLED, "patches")


def extract_features(backbone, data, batch_size=64, verbose=0, **kwargs):
    """`FeatureExtractor(backbone, **kwargs).extract(data, ...)`, for when it is needed once.

    Args:
        backbone: A `keras_hub.models.DINOV3Backbone`.
        data: As in `FeatureExtractor.extract`, as are the returned value and what is raised.
        batch_size: Int, images per step where `data` are arrays.
        verbose: 0, or 1 for a progress bar.
        **kwargs: `feature`, `layers`, `mean`, `std`, `image_size` and `extras` of
            `FeatureExtractor`.

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
        layers: Int: the last so many blocks, or a list of block numbers, as in `encode_layers`;
            their features, each after the final norm, are put side by side, which multiplies `D`.
            `None`: the last block.
        **kwargs: Keyword arguments of `keras.Model`.

    Call arguments:
        images: `(B, H, W, C)`, uint8 from 0 to 255 or float from 0 to 1.

    Returns:
        float32 tensor of shape `(B, D)`, `(B, 2 * D)` or `(B, N, D)`, `D` being the backbone's
        width times the number of layers.

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
        layers=None,
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
        self.layers_used = layers
        if layers is not None:
            block_numbers(layers, backbone)
        self.built = True  # no weights to make
        # It draws nothing; without a seed it would take one from Python's random state.
        self._normalize = MultiCrop(mean=mean, std=std, seed=0).normalize
        self._functions = {}  # batch shape and dtype -> compiled function

    def call(self, images):
        layers = self.tokens_of(images)
        cls, patches = (
            ops.cast(ops.concatenate([getattr(tokens, kind) for tokens in layers], -1), "float32")
            for kind in ("cls", "patches")
        )
        if self.feature == "patches":
            return patches
        mean_patch = ops.mean(patches, axis=1)
        both = ops.concatenate([cls, mean_patch], axis=-1)
        return {"cls": cls, "mean_patch": mean_patch, "cls_mean_patch": both}[self.feature]

    def prepared(self, images):
        """Images as the backbone takes them: normalised, and resized to whole patches."""
        return resize(self._normalize(images), self.input_size(images.shape[1:3]))

    def tokens_of(self, images, normalize=True):
        """`Tokens` of each of the layers."""
        images = self.prepared(images)
        if self.layers_used is None:
            return [encode(self.backbone, images, extras=self.extras)]
        return encode_layers(
            self.backbone, images, self.layers_used, normalize=normalize, extras=self.extras
        )

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
            "layers": self.layers_used,
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


def row_norms(features):
    """The length of each row, `(n, 1)` float32, never 0."""
    squares = np.einsum("nd,nd->n", features, features, dtype="float64")
    return np.maximum(np.sqrt(squares), 1e-12).astype("float32")[:, None]


def checked_features(name, features):
    """Features as float32 `(n, D)`; an array that is already so is not copied."""
    features = backend.numpy_of(features).astype("float32", copy=False)
    if features.ndim != 2 or not features.size:
        raise ValueError(
            f"`{name}` must have shape (images, width) and hold at least one image. "
            f"Received: {name}.shape={features.shape}."
        )
    # The sum of a row is finite where all of it is, unless that is near float32's end.
    bad = np.flatnonzero(~np.isfinite(features.sum(axis=1, dtype="float64")))
    if len(bad):
        raise ValueError(
            f"`{name}` must be finite. Received: NaN or infinity in {len(bad)} of "
            f"{len(features)} rows, first in row {bad[0]}. If the images are finite, the "
            "weights have diverged: go back to an earlier checkpoint with a lower rate."
        )
    return features


def checked_sides(train_features, train_labels, features, labels):
    """Both sides of an evaluation, checked on their own and against each other."""
    train_features = checked_features("train_features", train_features)
    features = checked_features("test_features", features)
    train_labels = checked_labels("train_labels", train_labels, len(train_features))
    labels = checked_labels("test_labels", labels, len(features))
    check_widths(train_features, features)
    if len(np.unique(train_labels)) < 2:
        raise ValueError(
            "A classifier needs at least two classes. "
            f"Received: train_labels with {np.unique(train_labels).tolist()} alone."
        )
    return train_features, train_labels, features, labels


def check_widths(train_features, features):
    if train_features.shape[1] != features.shape[1]:
        raise ValueError(
            "Both feature arrays must have the same width. Received: "
            f"train_features.shape={train_features.shape}, features.shape={features.shape}."
        )


def checked_labels(name, labels, count):
    labels = backend.numpy_of(labels)
    if labels.shape not in ((count,), (count, 1)):
        raise ValueError(
            f"`{name}` must hold one class label per feature, shape ({count},). "
            f"Received: {name}.shape={labels.shape}. From one-hot rows: `labels.argmax(-1)`."
        )
    return labels.ravel()
