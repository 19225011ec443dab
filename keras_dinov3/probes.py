"""Classifiers on frozen features: a grid of linear probes, logistic regression, few labels."""

import math
import warnings

import numpy as np
from keras import ops

from keras_dinov3.features import checked_sides

MAX_STEPS = 400  # of L-BFGS
GRID = tuple(float(10.0**power) for power in range(-5, 2))  # strengths `C` of logistic regression
RATES = (1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.2, 0.5, 1.0)


def linear_probe(
    train_features,
    train_labels,
    test_features,
    test_labels,
    learning_rates=RATES,
    epochs=20,
    batch_size=256,
    momentum=0.9,
    weight_decay=0.0,
    val_fraction=0.1,
    seed=0,
):
    """Accuracy of a linear classifier trained by SGD, the best of a grid of learning rates.

    One classifier for each rate; all of them are trained in one pass over the same batches, as one
    matrix product. The rate falls to 0 by half a cosine. Features are standardised by the training
    images. The classifier that does best on a part of the training images, which is held out with
    its classes in proportion, is the one that is tested.

    Args:
        train_features: Float array of shape `(n, D)`.
        train_labels: `n` class labels.
        test_features: Float array of shape `(m, D)`.
        test_labels: `m` class labels.
        learning_rates: Several positive floats.
        epochs: Int. Passes over the training images.
        batch_size: Int.
        momentum: Float from 0 to 1, of SGD.
        weight_decay: Float. Decay of the weights, in the gradient.
        val_fraction: Float between 0 and 1. The part that is held out.
        seed: Int, for the part and the order.

    Returns:
        Dict: `accuracy` and `balanced_accuracy` (the mean over classes) on the test images,
        `learning_rate`, and `val_accuracies`, a dict from each rate.

    Raises:
        ValueError: If arrays do not fit each other, there is one class, or a rate is not positive.

    Reference:
        [Oquab et al., 2023](https://arxiv.org/abs/2304.07193), appendix B.3 (a grid in one pass).
    """
    sides = checked_sides(train_features, train_labels, test_features, test_labels)
    train_features, train_labels, test_features, test_labels = sides
    rates = np.ravel(learning_rates).astype("float32")
    if not len(rates) or not (np.isfinite(rates) & (rates > 0)).all():
        raise ValueError(
            f"`learning_rates` must be positive floats. Received: learning_rates={learning_rates}."
        )
    classes, targets = np.unique(train_labels, return_inverse=True)
    fit, val = stratified_split(targets, val_fraction, seed)
    mean, scale = standardization(train_features)
    rng = np.random.default_rng(seed)
    num_rates, num_classes, width = len(rates), len(classes), train_features.shape[1]
    kernel = ops.zeros((width, num_rates * num_classes))
    bias = ops.zeros((num_rates * num_classes,))
    velocities = [kernel, bias]
    batch_size = min(batch_size, len(fit))
    steps_per_epoch = len(fit) // batch_size
    rates_wide = np.repeat(rates, num_classes)
    for step in range(epochs * steps_per_epoch):
        if step % steps_per_epoch == 0:
            order = rng.permutation(fit)
        start = step % steps_per_epoch * batch_size
        rows = np.sort(order[start : start + batch_size])
        x = ops.convert_to_tensor((train_features[rows] - mean) / scale)
        shape = (batch_size, num_rates, num_classes)
        probabilities = ops.softmax(ops.reshape(ops.matmul(x, kernel) + bias, shape))
        wanted = ops.one_hot(ops.convert_to_tensor(targets[rows]), num_classes)[:, None]
        error = ops.reshape((probabilities - wanted) / batch_size, (batch_size, -1))
        gradients = [
            ops.matmul(ops.transpose(x), error) + weight_decay * kernel,
            ops.sum(error, axis=0),
        ]
        share = 0.5 * (1.0 + math.cos(math.pi * step / (epochs * steps_per_epoch)))
        rate = ops.convert_to_tensor((share * rates_wide).astype("float32"))
        velocities = [momentum * v + g for v, g in zip(velocities, gradients, strict=True)]
        kernel = kernel - rate * velocities[0]
        bias = bias - rate * velocities[1]

    def predicted(features):
        found = []
        for start in range(0, len(features), 4096):
            x = ops.convert_to_tensor((features[start : start + 4096] - mean) / scale)
            logits = ops.reshape(ops.matmul(x, kernel) + bias, (-1, num_rates, num_classes))
            found.append(classes[ops.convert_to_numpy(ops.argmax(logits, axis=-1))])
        return np.concatenate(found)  # (n, rates)

    held_out = predicted(train_features[val])
    accuracies = np.mean(held_out == train_labels[val, None], axis=0)
    best = int(accuracies.argmax())
    return {
        **scores(predicted(test_features)[:, best], test_labels),
        "learning_rate": float(rates[best]),
        "val_accuracies": {
            f"{rate:g}": float(x) for rate, x in zip(rates, accuracies, strict=True)
        },
    }


def logistic_regression(
    train_features,
    train_labels,
    test_features,
    test_labels,
    strengths=GRID,
    val_fraction=0.2,
    max_steps=MAX_STEPS,
    seed=0,
):
    """Accuracy of logistic regression by L-BFGS, its strength chosen on held-out images.

    Features are standardised by the training images. Strengths are tried from the least on, until
    one is a whole point of accuracy below the best; with the best, all training images are
    fitted once more.

    Args:
        train_features: Float array of shape `(n, D)`.
        train_labels: `n` class labels.
        test_features: Float array of shape `(m, D)`.
        test_labels: `m` class labels.
        strengths: Positive floats, scikit-learn's `C`: the inverse of the penalty.
        val_fraction: Float between 0 and 1. Part of the training images that is held out to choose
            by, with its classes in proportion.
        max_steps: Int. Steps of L-BFGS.
        seed: Int, for that part.

    Returns:
        Dict: `accuracy`, `balanced_accuracy` (the mean over classes), `C`, and `val_accuracies`, a
        dict from each strength that was tried.

    Raises:
        ValueError: If arrays do not fit each other, or there is one class.
        ImportError: If scikit-learn is missing.

    Reference:
        [Oquab et al., 2023](https://arxiv.org/abs/2304.07193), appendix B.3 (logistic regression).
    """
    sides = checked_sides(train_features, train_labels, test_features, test_labels)
    train_features, train_labels, test_features, test_labels = sides
    fit, val = stratified_split(np.unique(train_labels, return_inverse=True)[1], val_fraction, seed)
    strength, accuracies = chosen_strength(
        (train_features[fit], train_labels[fit]),
        (train_features[val], train_labels[val]),
        strengths,
        max_steps,
    )
    model = fitted(train_features, train_labels, strength, max_steps)
    return {
        **scores(model.predict(test_features), test_labels),
        "C": strength,
        "val_accuracies": {f"{tried:g}": value for tried, value in accuracies.items()},
    }


def chosen_strength(fit, val, strengths, max_steps):
    """The best `C` on `val`, and the accuracies of all that were tried."""
    accuracies = {}
    for strength in sorted(np.ravel(strengths).tolist()):
        accuracies[strength] = float(fitted(*fit, strength, max_steps).score(*val))
        if accuracies[strength] < max(accuracies.values()) - 0.01:
            break
    return max(accuracies, key=accuracies.get), accuracies


def few_shot(
    train_features,
    train_labels,
    test_features,
    test_labels,
    n=(1, 10),
    draws=5,
    strength=1.0,
    seed=0,
):
    """Accuracy with few labels: logistic regression on `n` images of each class.

    Args:
        train_features: Float array of shape `(N, D)`, to draw from.
        train_labels: `N` class labels.
        test_features: Float array of shape `(m, D)`.
        test_labels: `m` class labels.
        n: Int, labelled images of each class, or several.
        draws: Int. How often they are drawn anew.
        strength: Positive float, scikit-learn's `C`.
        seed: Int, for the draws.

    Returns:
        Dict from each `n` as text to a dict: `mean` and `std` over the draws, `accuracies`.

    Raises:
        ValueError: If arrays do not fit each other, or a class has fewer than `n` images.
        ImportError: If scikit-learn is missing.

    Reference:
        [Assran et al., 2022](https://arxiv.org/abs/2204.07141), section 5 (few labels, several
        draws).
    """
    sides = checked_sides(train_features, train_labels, test_features, test_labels)
    train_features, train_labels, test_features, test_labels = sides
    classes, targets, sizes = np.unique(train_labels, return_inverse=True, return_counts=True)
    counts, found = np.ravel(n).tolist(), {}
    if not counts or min(counts) < 1 or max(counts) > sizes.min():
        smallest = classes[sizes.argmin()]
        raise ValueError(
            "`n` must be from 1 to the images of the smallest class. "
            f"Received: n={n}, {sizes.min()} images of class {smallest}."
        )
    mean, scale = standardization(train_features)
    test_features = (test_features - mean) / scale
    for count in counts:
        accuracies = []
        for draw in range(draws):
            rng = np.random.default_rng((seed, count, draw))
            rows = np.concatenate(
                [
                    rng.choice(np.flatnonzero(targets == index), count, replace=False)
                    for index in range(len(classes))
                ]
            )
            x = (train_features[rows] - mean) / scale
            model = fitted(x, train_labels[rows], strength, MAX_STEPS, standardize=False)
            accuracies.append(float(model.score(test_features, test_labels)))
        spread = float(np.std(accuracies, ddof=1)) if draws > 1 else 0.0
        found[str(count)] = {
            "mean": float(np.mean(accuracies)),
            "std": spread,
            "accuracies": accuracies,
        }
    return found


def fitted(features, labels, strength, max_steps, standardize=True):
    """Logistic regression of scikit-learn, after standardisation by these features."""
    try:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    except ImportError as error:
        raise ImportError(
            "Logistic regression needs scikit-learn. Install it: "
            "`pip install keras-dinov3[evaluation]`."
        ) from error
    steps = [StandardScaler()] if standardize else []
    model = make_pipeline(*steps, LogisticRegression(C=strength, max_iter=max_steps))
    with warnings.catch_warnings():  # the number of steps is part of the method
        warnings.simplefilter("ignore", ConvergenceWarning)
        return model.fit(features, labels)


def standardization(features):
    """Mean and deviation of each column, `(D,)` float32; a constant column keeps its scale."""
    mean = features.mean(axis=0, dtype="float64")
    squares = np.zeros_like(mean)
    for start in range(0, len(features), 65_536):  # no copy of all
        squares += np.square(features[start : start + 65_536] - mean).sum(axis=0)
    scale = np.sqrt(squares / len(features))
    scale[scale < 1e-12] = 1.0
    return mean.astype("float32"), scale.astype("float32")


def stratified_split(targets, val_fraction, seed):
    """Rows to fit and rows held out, of each class in proportion, one at least if it has two."""
    if not 0 < val_fraction < 1:
        raise ValueError(
            f"`val_fraction` must be between 0 and 1. Received: val_fraction={val_fraction}."
        )
    rng, held_out = np.random.default_rng(seed), []
    for index in np.unique(targets):
        rows = rng.permutation(np.flatnonzero(targets == index))
        count = min(max(round(val_fraction * len(rows)), 1), len(rows) - 1)
        held_out.append(rows[:count])
    val = np.sort(np.concatenate(held_out))
    return np.setdiff1d(np.arange(len(targets)), val), val


def scores(predicted, labels):
    correct = predicted == labels
    by_class = [correct[labels == label].mean() for label in np.unique(labels)]
    return {"accuracy": float(correct.mean()), "balanced_accuracy": float(np.mean(by_class))}
