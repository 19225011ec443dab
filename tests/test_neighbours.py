import numpy as np
import pytest

from keras_dinov3 import neighbours
from keras_dinov3.neighbours import knn_accuracy, knn_predict, retrieval

# Weighted k-NN


def clusters(n=41, m=13, width=6, classes=5, seed=0):
    generator = np.random.default_rng(seed)
    centers = generator.normal(size=(classes, width))
    labels = generator.integers(0, classes, n + m)
    features = centers[labels] + generator.normal(size=(n + m, width))
    features *= generator.uniform(0.1, 9, (n + m, 1))  # lengths must not matter
    features = features.astype("float32")
    return features[:n], labels[:n], features[n:], labels[n:]


def slow_knn(train, train_labels, queries, k, temperature):
    predicted = []
    for query in queries.astype("float64"):
        cosines = [
            np.dot(query, row) / np.linalg.norm(query) / np.linalg.norm(row)
            for row in train.astype("float64")
        ]
        votes = dict.fromkeys(sorted(set(train_labels)), 0.0)
        for index in sorted(range(len(train)), key=lambda i, c=cosines: -c[i])[:k]:
            votes[train_labels[index]] += np.exp(cosines[index] / temperature)
        predicted.append(max(votes, key=votes.get))
    return np.array(predicted)


@pytest.mark.parametrize("k", [1, 4, 41])
@pytest.mark.parametrize("temperature", [0.07, 0.5, 100.0])
def test_knn_against_loops(k, temperature):
    train, train_labels, queries, labels = clusters()
    predicted = knn_predict(train, train_labels, queries, k, temperature)
    expected = slow_knn(train, train_labels, queries, k, temperature)
    np.testing.assert_array_equal(predicted, expected)
    accuracy = knn_accuracy(train, train_labels, queries, labels, k=k, temperature=temperature)
    assert accuracy == np.mean(expected == labels)


def test_knn_against_scikit_learn():
    from sklearn.neighbors import KNeighborsClassifier

    train, train_labels, queries, labels = clusters(n=300, m=100, seed=2)
    model = KNeighborsClassifier(
        20, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07)
    ).fit(train, train_labels)
    np.testing.assert_array_equal(knn_predict(train, train_labels, queries), model.predict(queries))
    assert 0.3 < model.score(queries, labels) < 1
    assert knn_accuracy(train, train_labels, queries, labels) == model.score(queries, labels)


def test_temperature_and_k_change_the_vote():
    # One near neighbour of class 7 against two farther ones of class 3.
    train = np.array([[1.0, 0.1], [1.0, 0.5], [1.0, -0.5]])
    query = np.array([[1.0, 0.0]])
    assert knn_predict(train, [7, 3, 3], query, k=3, temperature=0.07) == [7]
    assert knn_predict(train, [7, 3, 3], query, k=3, temperature=1.0) == [3]
    assert knn_predict(train, [7, 3, 3], query, k=1, temperature=1.0) == [7]


def test_several_k_at_once_and_chunks():
    data = clusters()
    train, train_labels, queries, labels = data
    together = knn_predict(train, train_labels, queries, k=[2, 9], temperature=2.0, chunk_size=4)
    assert list(together) == [2, 9] and (together[2] != together[9]).any()
    accuracies = knn_accuracy(*data, k=(9, 2), temperature=2.0, chunk_size=1)
    assert list(accuracies) == [9, 2]
    for k in (2, 9):
        alone = knn_predict(train, train_labels, queries, k, temperature=2.0)
        np.testing.assert_array_equal(together[k], alone)
        assert accuracies[k] == np.mean(alone == labels)


def test_labels_of_any_type():
    train, train_labels, queries, labels = clusters()
    names = np.array(["ant", "bee", "cat", "dog", "elk"])
    expected = names[knn_predict(train, train_labels, queries)]
    predicted = knn_predict(train, names[train_labels], queries)
    np.testing.assert_array_equal(predicted, expected)
    columns = knn_accuracy(train, train_labels[:, None], queries, labels[:, None].astype("float"))
    assert columns == np.mean(expected == names[labels])


def test_knn_survives_small_temperatures_and_zero_features():
    train, train_labels, queries, labels = clusters()
    nearest = knn_predict(train, train_labels, queries, k=1)
    with np.errstate(over="raise", invalid="raise"):
        cold = knn_predict(train, train_labels, queries, k=20, temperature=1e-5)
        np.testing.assert_array_equal(cold, nearest)
        knn_predict(train, train_labels, 0 * queries)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"train_labels": np.zeros(3)}, r"`train_labels`.*shape \(5,\).*\(3,\)"),
        ({"train_labels": np.eye(5)}, r"argmax"),
        ({"test_labels": np.zeros(3)}, r"`test_labels`.*shape \(2,\).*\(3,\)"),
        ({"k": 6}, "from 1 to the number.*k=.*6.*, 5 training"),
        ({"k": [1, 0]}, "from 1 to the number"),
        ({"k": []}, "from 1 to the number"),
        ({"temperature": 0.0}, "positive.*temperature=0.0"),
        ({"test_features": np.ones((2, 4))}, "same width"),
        ({"train_features": np.ones((5, 2, 3))}, r"shape \(images, width\)"),
        ({"test_features": np.ones((0, 3)), "test_labels": []}, "at least one image"),
        (
            {"train_features": [[0] * 3] * 3 + [[np.nan] * 3, [np.inf] * 3]},
            "2 of 5.*row 3.*diverged",
        ),
    ],
)
def test_knn_errors(change, message):
    arguments = {
        "train_features": np.ones((5, 3)),
        "train_labels": np.arange(5),
        "test_features": np.ones((2, 3)),
        "test_labels": np.arange(2),
        "k": 2,
    }
    with pytest.raises(ValueError, match=message):
        knn_accuracy(**{**arguments, **change})


def test_knn_over_chunks_of_the_bank(monkeypatch):
    """The bank in parts of seven, some with fewer rows than there are neighbours to find."""
    train, train_labels, test, _ = clusters()
    expected = knn_predict(train, train_labels, test, [1, 10, 41])
    monkeypatch.setattr(neighbours, "BANK_CHUNK", 7)
    for k, labels in knn_predict(train, train_labels, test, [1, 10, 41], chunk_size=4).items():
        np.testing.assert_array_equal(labels, expected[k])


def test_float32_features_are_not_copied():
    features = np.ones((5, 3), "float32")
    assert neighbours.checked_features("features", features) is features


# Retrieval


def test_retrieval_by_hand():
    """Angles on a circle: the ranking is that of distances in degrees."""
    gallery = np.deg2rad([0.0, 10.0, 20.0, 30.0, 40.0])
    labels = np.array(["a", "b", "a", "b", "c"])
    queries = np.deg2rad([-3.0, 43.0, 21.0])

    def points(angles, length=2.0):
        return length * np.stack([np.cos(angles), np.sin(angles)], axis=1)

    found = retrieval(points(queries), ["a", "b", "x"], points(gallery), labels, k=[1, 2, 3])
    # a: ranks 1, 3: (1/1 + 2/3) / 2. b, from 43: 40 c, 30 b, 20 a, 10 b: (1/2 + 2/4) / 2.
    assert found["map"] == pytest.approx((5 / 6 + 1 / 2) / 2)
    assert (found["recall@1"], found["recall@2"], found["recall@3"]) == (0.5, 1.0, 1.0)
    own = retrieval(points(gallery), labels, k=1)  # c has no other and is left out
    # a at 0: 10 b, 20 a; b at 10: 0 a, 20 a, 30 b; a at 20: 10 b, 30 b, (0 a, 40 c); b: 20 a, 40 c
    assert own["recall@1"] == 0.0
    expected = [1 / 2, 1 / 3, 1 / 3, 1 / 3]
    assert own["map"] == pytest.approx(np.mean(expected), abs=0.03)


def test_retrieval_against_scikit_learn(monkeypatch):
    from sklearn.metrics import average_precision_score

    gallery, gallery_labels, queries, labels = clusters(n=60, m=17)
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (queries, gallery)]
    cosines = unit[0] @ unit[1].T
    precisions, first = [], []
    for row, label in zip(cosines, labels, strict=True):
        relevant = gallery_labels == label
        if relevant.any():
            precisions.append(average_precision_score(relevant, row))
            first.append(relevant[row.argmax()])
    monkeypatch.setattr(neighbours, "RANKED_NUMBERS", 300)  # five queries at a time
    found = retrieval(queries, labels, gallery, gallery_labels, k=(1, 60))
    assert found["map"] == pytest.approx(np.mean(precisions), abs=1e-6)
    assert found["recall@1"] == pytest.approx(np.mean(first))
    assert found["recall@60"] == 1.0


@pytest.mark.parametrize(
    "arguments, message",
    [
        (([[1.0, 0.0]], [0], [[1.0, 0.0]], [1]), "its class in the gallery"),
        (([[1.0, 0.0]], [0], [[1.0]], [0]), "same width"),
        (([[1.0, 0.0]], [0, 1]), "`labels`"),
        (([[np.nan, 0.0]], [0]), "finite"),
    ],
)
def test_retrieval_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        retrieval(*arguments)
    with pytest.raises(ValueError, match="`k` must be at least 1"):
        retrieval(np.eye(2), [0, 0], k=0)
