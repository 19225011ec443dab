"""What features are worth; arrays in, numbers out."""

import time

import numpy as np
from keras import ops

from keras_dinov3 import backend
from keras_dinov3.features import (
    FeatureExtractor,
    checked_features,
    extract_features,
    row_norms,
)
from keras_dinov3.neighbours import knn_accuracy, knn_predict, retrieval
from keras_dinov3.probes import few_shot, linear_probe, logistic_regression
from keras_dinov3.segmentation import segmentation_probe

__all__ = [
    "FeatureExtractor",
    "alignment",
    "evaluate",
    "extract_features",
    "few_shot",
    "knn_accuracy",
    "knn_predict",
    "lidar",
    "linear_probe",
    "logistic_regression",
    "rankme",
    "retrieval",
    "segmentation_probe",
    "uniformity",
]


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
    features = checked_views(features, at_least=2).astype("float64")
    n, q, width = features.shape
    means = features.mean(axis=1)
    between = np.cov(means, rowvar=False, bias=True).reshape(width, width)
    apart = (features - means[:, None]).reshape(n * q, width)
    within = apart.T @ apart / (n * q) + delta * np.eye(width)
    half = np.linalg.inv(np.linalg.cholesky(within))  # as good as the root: same eigenvalues
    values = np.maximum(np.linalg.eigvalsh(half @ between @ half.T), 0.0)
    p = values / max(values.sum(), epsilon) + epsilon
    return float(np.exp(-np.sum(p * np.log(p))))


def uniformity(features, t=2.0, chunk_size=1024):
    """How evenly unit features cover the sphere; the lower, the more.

    `log(mean(exp(-t * |x - y|**2)))` over all pairs of different images.

    Args:
        features: Float array of shape `(n, D)`, `n` at least 2, of any norm.
        t: Positive float.
        chunk_size: Int. Rows compared with all at a time.

    Returns:
        Float: 0 where all features are one, about `-2 * t` for many on a wide sphere.

    Raises:
        ValueError: If there is only one image, or features are not finite.

    Reference:
        [Wang & Isola, 2020](https://arxiv.org/abs/2005.10242), equation 2.
    """
    features = checked_features("features", features)
    if len(features) < 2:
        raise ValueError(f"`features` must hold two images at least. Received: {len(features)}.")
    total = 0.0
    unit = ops.convert_to_tensor(features / row_norms(features))
    for start in range(0, len(features), chunk_size):
        cosines = ops.matmul(unit[start : start + chunk_size], ops.transpose(unit))
        total += float(np.exp(2 * t * (ops.convert_to_numpy(cosines) - 1.0)).sum(dtype="float64"))
    pairs = len(features) * (len(features) - 1)
    return float(np.log((total - len(features)) / pairs))


def alignment(features, alpha=2.0):
    """How far apart the unit features of one image's views are; the lower, the closer.

    `mean(|x - y|**alpha)` over all pairs of views of each image.

    Args:
        features: Float array of shape `(n, q, D)`: of `n` images `q` views each.
        alpha: Positive float.

    Returns:
        Float from 0 to `2**alpha`.

    Raises:
        ValueError: If there are fewer than two views, or features are not finite.

    Reference:
        [Wang & Isola, 2020](https://arxiv.org/abs/2005.10242), equation 1.
    """
    features = checked_views(features, at_least=1)
    n, q, width = features.shape
    rows = features.reshape(n * q, width)
    unit = (rows / row_norms(rows)).reshape(n, q, width)
    first, second = np.triu_indices(q, 1)
    distances = np.linalg.norm(unit[:, first] - unit[:, second], axis=-1)
    return float(np.mean(distances.astype("float64") ** alpha))


def checked_views(features, at_least):
    """Features `(n, q, D)` of so many images at least, two views each or more."""
    features = backend.numpy_of(features)
    if features.ndim != 3 or len(features) < at_least or features.shape[1] < 2:
        raise ValueError(
            f"`features` must have shape (images, views, width), with {at_least} images and 2 "
            f"views at least. Received: features.shape={features.shape}."
        )
    rows = features.reshape(-1, features.shape[-1])
    return checked_features("features", rows).reshape(features.shape)


def evaluate(backbone, train, test, k=(10, 20), few=(1, 10), seed=0, verbose=1, **kwargs):
    """All that labelled images say about frozen features.

    Args:
        backbone: As in `FeatureExtractor`.
        train: `(images, labels)` or anything that yields such batches.
        test: The same.
        k: Several ints: neighbours of k-NN.
        few: Several ints: labelled images per class, as many as there are.
        seed: Int, for splits and draws.
        verbose: 0, or 1 for progress bars.
        **kwargs: Settings of `FeatureExtractor`.

    Returns:
        Dict that JSON can hold: `knn`, `linear_probe`, `logistic_regression`, `few_shot` (left out
        if a class has fewer images), `retrieval` of test images in the training images, `rankme`
        and `uniformity` of the training images, `images`, `classes`, `width` and `seconds`.

    Raises:
        ValueError: If the data have no labels, or as the functions of these names.
    """
    extractor, seconds, found = FeatureExtractor(backbone, **kwargs), {}, {}

    def timed(name, function):
        start = time.perf_counter()
        result = function()
        seconds[name] = round(time.perf_counter() - start, 2)
        return result

    sides = [
        timed(name, lambda data=data: extractor.extract(data, verbose=verbose))
        for name, data in (("features_train", train), ("features_test", test))
    ]
    if not all(isinstance(side, tuple) for side in sides):
        raise ValueError(
            "`train` and `test` must hold a label for each image: `(images, labels)`, or batches "
            "of them. Received: images alone."
        )
    arrays = (*sides[0], *sides[1])
    features = sides[0][0]
    counts = np.unique(np.ravel(sides[0][1]), return_counts=True)[1]
    few = [n for n in few if n < counts.min()]
    accuracies = timed("knn", lambda: knn_accuracy(*arrays, k=list(k)))
    found["knn"] = {str(count): accuracy for count, accuracy in accuracies.items()}
    found["linear_probe"] = timed("linear_probe", lambda: linear_probe(*arrays, seed=seed))
    found["logistic_regression"] = timed(
        "logistic_regression", lambda: logistic_regression(*arrays, seed=seed)
    )
    if few:
        found["few_shot"] = timed("few_shot", lambda: few_shot(*arrays, n=few, seed=seed))
    found["retrieval"] = timed("retrieval", lambda: retrieval(*sides[1], *sides[0]))
    found["rankme"] = timed("rankme", lambda: rankme(features))
    some = np.random.default_rng(seed).permutation(len(features))[:4096]
    found["uniformity"] = timed("uniformity", lambda: uniformity(features[some]))
    return {
        **found,
        "images": {"train": len(features), "test": len(sides[1][0])},
        "classes": len(counts),
        "width": features.shape[1],
        "seconds": seconds,
    }
