"""What the nearest neighbours of features say: weighted k-NN and retrieval."""

import numpy as np
from keras import ops

from keras_dinov3.features import check_widths, checked_features, checked_labels, row_norms

BANK_CHUNK = 65_536  # neighbours compared at a time
RANKED_NUMBERS = 2**26  # cosines that `retrieval` sorts at a time


def knn_predict(train_features, train_labels, features, k=20, temperature=0.07, chunk_size=1024):
    """Labels by weighted vote of the most similar training images.

    Each of the `k` nearest votes for its own label with weight `exp(cosine / temperature)`. Beside
    the features, memory holds `chunk_size` times 65,536 cosines at most, however many they are.

    Args:
        train_features: Float array of shape `(n, D)`, of any norm. float32 is not copied.
        train_labels: `n` class labels of any type, shape `(n,)` or `(n, 1)`.
        features: Float array of shape `(m, D)`.
        k: Int from 1 to `n`, or several.
        temperature: Positive float; the lower, the more the nearest neighbours decide.
        chunk_size: Int. Rows of `features` compared at a time.

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
    check_widths(train_features, features)
    counts = np.ravel(k).tolist()
    if not counts or min(counts) < 1 or max(counts) > len(train_features):
        raise ValueError(
            "`k` must be from 1 to the number of training features. "
            f"Received: k={k}, {len(train_features)} training features."
        )
    if not temperature > 0:
        raise ValueError(f"`temperature` must be positive. Received: temperature={temperature}.")

    classes, train_classes = np.unique(train_labels, return_inverse=True)
    cosines, neighbours = nearest(train_features, features, max(counts), chunk_size)
    # Weights relative to the nearest one's: the same vote, and nothing overflows.
    weights = np.exp((cosines - cosines[:, :1]).astype("float64") / temperature)
    chosen = {count: [] for count in counts}
    for start in range(0, len(features), chunk_size):
        rows = slice(start, start + chunk_size)
        voters, shares = train_classes[neighbours[rows]], weights[rows]
        bins = voters + len(classes) * np.arange(len(voters))[:, None]
        for count in counts:
            votes = np.bincount(
                bins[:, :count].ravel(), shares[:, :count].ravel(), len(voters) * len(classes)
            )
            chosen[count].append(votes.reshape(len(voters), -1).argmax(axis=1))
    labels = {count: classes[np.concatenate(rows)] for count, rows in chosen.items()}
    return labels if np.ndim(k) else labels[k]


def nearest(bank, features, k, chunk_size):
    """Cosines and rows of the `k` nearest of `bank` `(n, D)`: two arrays `(m, k)`, best first."""
    chunks, best = [], []
    for start in range(0, len(features), chunk_size):
        chunk = features[start : start + chunk_size]
        chunks.append(ops.convert_to_tensor(chunk / row_norms(chunk)))
        best.append((np.empty((len(chunk), 0), "float32"), np.empty((len(chunk), 0), "int64")))
    for start in range(0, len(bank), BANK_CHUNK):  # outside, so that the bank is read once
        part = bank[start : start + BANK_CHUNK]
        columns = ops.transpose(ops.convert_to_tensor(part / row_norms(part)))
        for index, chunk in enumerate(chunks):
            found = ops.top_k(ops.matmul(chunk, columns), min(k, len(part)))
            values, rows = (ops.convert_to_numpy(x) for x in found)
            values = np.concatenate([best[index][0], values], axis=1)
            rows = np.concatenate([best[index][1], rows + start], axis=1)
            order = np.argsort(-values, axis=1, kind="stable")[:, :k]
            best[index] = tuple(np.take_along_axis(x, order, axis=1) for x in (values, rows))
    return tuple(np.concatenate(parts) for parts in zip(*best, strict=True))


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


def retrieval(features, labels, gallery_features=None, gallery_labels=None, k=(1, 5, 10)):
    """How well images find others of their class: mean average precision and recall.

    For each query the gallery is ranked by cosine. Its average precision is the mean, over the
    gallery images of its class, of the share of that class among all that rank as high; its recall
    at `k` is 1 if one of its class is among the first `k`. Queries whose class the gallery does not
    have are left out.

    Args:
        features: Float array of shape `(m, D)`, the queries.
        labels: `m` class labels.
        gallery_features: Float array of shape `(n, D)`. `None`: the queries find each other, and
            none finds itself.
        gallery_labels: `n` class labels.
        k: Int, or several.

    Returns:
        Dict of floats from 0 to 1: `"map"`, and `"recall@1"` and so on.

    Raises:
        ValueError: If arrays do not fit each other, or no query has its class in the gallery.

    Reference:
        Average precision over the whole ranking: Manning, Raghavan & Schütze, Introduction to
        Information Retrieval, 2008, section 8.4. Recall at k: [Jégou et al.,
        2011](https://doi.org/10.1109/TPAMI.2010.57).
    """
    features = checked_features("features", features)
    labels = checked_labels("labels", labels, len(features))
    among_themselves = gallery_features is None
    gallery = features if among_themselves else gallery_features
    gallery = checked_features("gallery_features", gallery)
    gallery_labels = labels if among_themselves else gallery_labels
    gallery_labels = checked_labels("gallery_labels", gallery_labels, len(gallery))
    check_widths(gallery, features)
    counts = np.ravel(k).tolist()
    if not counts or min(counts) < 1:
        raise ValueError(f"`k` must be at least 1. Received: k={k}.")

    columns = ops.transpose(ops.convert_to_tensor(gallery / row_norms(gallery)))
    precisions, ranks = [], []
    chunk_size = max(RANKED_NUMBERS // len(gallery), 1)
    for start in range(0, len(features), chunk_size):
        chunk = features[start : start + chunk_size]
        cosines = ops.matmul(ops.convert_to_tensor(chunk / row_norms(chunk)), columns)
        cosines = np.array(ops.convert_to_numpy(cosines))
        rows = np.arange(len(chunk))
        if among_themselves:
            cosines[rows, start + rows] = -np.inf
        order = np.argsort(-cosines, axis=1, kind="stable")
        if among_themselves:
            order = order[:, :-1]
        relevant = gallery_labels[order] == labels[start : start + chunk_size, None]
        relevant = relevant[relevant.any(axis=1)]
        precision = np.cumsum(relevant, axis=1) / np.arange(1, relevant.shape[1] + 1)
        precisions.append((precision * relevant).sum(axis=1) / relevant.sum(axis=1))
        ranks.append(relevant.argmax(axis=1) + 1)
    precisions, ranks = np.concatenate(precisions), np.concatenate(ranks)
    if not len(ranks):
        raise ValueError(
            "Some query must have its class in the gallery. Received: none of "
            f"{np.unique(labels)[:5].tolist()} among {np.unique(gallery_labels)[:5].tolist()}."
        )
    recalls = {f"recall@{count}": float(np.mean(ranks <= count)) for count in counts}
    return {"map": float(np.mean(precisions)), **recalls}
