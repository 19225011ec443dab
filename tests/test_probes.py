import sys

import numpy as np
import pytest

from keras_dinov3 import probes
from keras_dinov3.probes import few_shot, linear_probe, logistic_regression


def clusters(n=90, m=45, width=6, classes=3, noise=1.0, seed=0):
    """Columns of very different scales; labels are texts, in no order."""
    rng = np.random.default_rng(seed)
    centers = rng.normal(size=(classes, width))
    labels = rng.permutation(np.arange(n + m) % classes)
    features = centers[labels] + noise * rng.normal(size=(n + m, width))
    features = (features * 10.0 ** np.arange(-2, width - 2) + 3).astype("float32")
    labels = np.array(["cat", "ant", "bee", "dog", "elk"])[labels]
    return features[:n], labels[:n], features[n:], labels[n:]


def slow_probe(sides, rate, epochs, batch_size, momentum, weight_decay, seed):
    """One classifier, by itself, in float64."""
    train, train_labels, test, test_labels = sides
    classes = sorted(set(train_labels))
    targets = np.array([classes.index(label) for label in train_labels])
    fit, _ = probes.stratified_split(targets, 0.2, seed)
    mean, scale = train.mean(axis=0), train.std(axis=0)
    x, rng = (train.astype("float64") - mean) / scale, np.random.default_rng(seed)
    weights, bias = np.zeros((x.shape[1], len(classes))), np.zeros(len(classes))
    speeds = [0.0, 0.0]
    steps = len(fit) // batch_size
    for epoch in range(epochs):
        order = rng.permutation(fit)
        for index in range(steps):
            rows = order[index * batch_size : (index + 1) * batch_size]
            logits = x[rows] @ weights + bias
            p = np.exp(logits - logits.max(axis=1, keepdims=True))
            p /= p.sum(axis=1, keepdims=True)
            error = (p - np.eye(len(classes))[targets[rows]]) / batch_size
            gradients = [x[rows].T @ error + weight_decay * weights, error.sum(axis=0)]
            speeds = [momentum * v + g for v, g in zip(speeds, gradients, strict=True)]
            now = rate * (1 + np.cos(np.pi * (epoch * steps + index) / (epochs * steps))) / 2
            weights, bias = weights - now * speeds[0], bias - now * speeds[1]
    predicted = ((test - mean) / scale @ weights + bias).argmax(axis=1)
    return np.mean(np.array(classes)[predicted] == test_labels)


@pytest.mark.parametrize("rate", [0.01, 0.3])
def test_a_probe_of_the_grid_is_one_trained_alone(rate):
    sides = clusters(noise=1.5)
    settings = {"epochs": 3, "batch_size": 20, "momentum": 0.8, "weight_decay": 0.01, "seed": 4}
    alone = linear_probe(*sides, learning_rates=rate, val_fraction=0.2, **settings)
    assert alone["accuracy"] == pytest.approx(slow_probe(sides, rate, **settings))
    rates = [1e-4, rate, 5.0]
    together = linear_probe(*sides, learning_rates=rates, val_fraction=0.2, **settings)
    key = f"{rate:g}"
    assert together["val_accuracies"][key] == pytest.approx(alone["val_accuracies"][key])
    best = max(together["val_accuracies"].values())
    assert together["val_accuracies"][f"{together['learning_rate']:g}"] == best


def test_probe_and_regression_learn_and_say_what_they_chose():
    sides = clusters(n=300, m=150, classes=5)
    centers = {label: sides[0][sides[1] == label].mean(axis=0) for label in set(sides[1])}
    scale = sides[0].std(axis=0)
    nearest = [
        min(centers, key=lambda label, x=x: np.sum(((x - centers[label]) / scale) ** 2))
        for x in sides[2]
    ]
    by_center = np.mean(np.array(nearest) == sides[3])
    for found in (linear_probe(*sides), logistic_regression(*sides)):
        assert found["accuracy"] == pytest.approx(by_center, abs=0.1) and by_center > 0.5
    assert linear_probe(*sides, seed=1) == linear_probe(*sides, seed=1)


def test_logistic_regression_against_scikit_learn():
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import balanced_accuracy_score
    from sklearn.preprocessing import StandardScaler

    train, train_labels, test, test_labels = clusters(noise=1.5)
    train, train_labels = train[:70], train_labels[:70]  # classes of different sizes
    found = logistic_regression(train, train_labels, test, test_labels, strengths=[0.1])
    scaler = StandardScaler().fit(train)
    model = LogisticRegression(C=0.1, max_iter=400).fit(scaler.transform(train), train_labels)
    predicted = model.predict(scaler.transform(test))
    assert found["accuracy"] == np.mean(predicted == test_labels)
    assert found["balanced_accuracy"] == balanced_accuracy_score(test_labels, predicted)
    assert found["C"] == 0.1


def test_strengths_are_tried_until_they_are_worse(monkeypatch):
    tried = []

    class Model:
        def __init__(self, strength):
            self.strength = strength

        def score(self, features, labels):
            return {1e-3: 0.5, 1e-2: 0.7, 0.1: 0.695, 1.0: 0.68, 10.0: 0.9}[self.strength]

    def fitted(features, labels, strength, max_steps):
        tried.append(strength)
        return Model(strength)

    monkeypatch.setattr(probes, "fitted", fitted)
    grid = [10.0, 1.0, 0.1, 1e-2, 1e-3]
    strength, accuracies = probes.chosen_strength((0, 0), (0, 0), grid, 5)
    assert strength == 1e-2 and tried == [1e-3, 1e-2, 0.1, 1.0] == list(accuracies)


def test_few_labels():
    sides = clusters(n=300, m=150)
    found = few_shot(*sides, n=(1, 30), draws=4)
    assert list(found) == ["1", "30"]
    for of_n in found.values():
        assert len(of_n["accuracies"]) == 4 and len(set(of_n["accuracies"])) > 1
        assert of_n["mean"] == pytest.approx(np.mean(of_n["accuracies"]))
        assert of_n["std"] == pytest.approx(np.std(of_n["accuracies"], ddof=1))
    assert found["30"]["mean"] > found["1"]["mean"]
    assert few_shot(*sides, n=1, draws=2) == few_shot(*sides, n=1, draws=2)
    # All there are, once: logistic regression of scikit-learn on standardised features.
    from sklearn.linear_model import LogisticRegression

    train, train_labels, test, test_labels = sides
    rows = [np.flatnonzero(train_labels == label)[:90] for label in sorted(set(train_labels))]
    train, train_labels = train[np.concatenate(rows)], train_labels[np.concatenate(rows)]
    sides = (train, train_labels, test, test_labels)
    mean, scale = train.mean(axis=0), train.std(axis=0)
    model = LogisticRegression(C=1.0, max_iter=400).fit((train - mean) / scale, train_labels)
    expected = model.score((test - mean) / scale, test_labels)
    found = few_shot(*sides, n=90, draws=1)["90"]["mean"]
    assert found == pytest.approx(expected)


def test_the_part_held_out_has_all_classes_in_proportion():
    targets = np.array([0] * 50 + [1] * 20 + [2] * 2 + [3])
    fit, val = probes.stratified_split(targets, 0.2, seed=1)
    assert sorted([*fit, *val]) == list(range(73))
    assert np.bincount(targets[val], minlength=4).tolist() == [10, 4, 1, 0]
    other = probes.stratified_split(targets, 0.2, seed=2)[1]
    assert not np.array_equal(val, other)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"train_labels": ["a"] * 4}, "at least two classes.*'a'"),
        ({"train_labels": ["a", "b"]}, "`train_labels`.*one class label per feature"),
        ({"test_labels": ["a"] * 3}, "`test_labels`"),
        ({"test_features": np.ones((2, 4))}, "same width"),
        ({"train_features": np.full((4, 3), np.nan)}, "finite"),
    ],
)
@pytest.mark.parametrize("function", [linear_probe, logistic_regression, few_shot])
def test_errors_of_all(function, change, message):
    arguments = {
        "train_features": np.ones((4, 3)),
        "train_labels": list("abab"),
        "test_features": np.ones((2, 3)),
        "test_labels": list("ab"),
    }
    with pytest.raises(ValueError, match=message):
        function(**{**arguments, **change})


def test_errors_of_each(monkeypatch):
    sides = clusters()
    for rates in ([], [0.0], [-1.0], [np.nan]):
        with pytest.raises(ValueError, match="`learning_rates` must be positive"):
            linear_probe(*sides, learning_rates=rates)
    with pytest.raises(ValueError, match="`val_fraction`.*between 0 and 1"):
        linear_probe(*sides, val_fraction=1.0)
    with pytest.raises(ValueError, match="smallest class.*n=91, .. images"):
        few_shot(*sides, n=91)
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(ImportError, match=r"pip install keras-dinov3\[evaluation\]"):
        logistic_regression(*sides)
