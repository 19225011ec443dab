import json

import numpy as np
import pytest
import tiny

from keras_dinov3 import evaluation
from keras_dinov3.evaluation import alignment, evaluate, lidar, rankme, uniformity

# RankMe


def test_rankme_formula():
    features = np.random.default_rng(0).normal(size=(23, 7)) * np.arange(1, 8)
    p = np.linalg.svd(features, compute_uv=False)
    p = p / p.sum() + 1e-7
    expected = np.exp(-(p * np.log(p)).sum())
    assert 1.5 < expected < 6.5
    for x in (features, features.T, 100 * features):
        np.testing.assert_allclose(rankme(x), expected, rtol=1e-4)


def test_rankme_of_few_wide_features():
    basis, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(2000, 3)))
    np.testing.assert_allclose(rankme(basis.T), 3, rtol=1e-4)  # `epsilon` counts 3 times only


def test_rankme_limits():
    basis, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(9, 9)))
    np.testing.assert_allclose(rankme(basis[:, :5]), 5, rtol=1e-4)
    np.testing.assert_allclose(rankme(np.ones((9, 5))), 1, rtol=1e-4)  # collapsed


def test_rankme_errors():
    with pytest.raises(ValueError, match="finite.*1 of 2"):
        rankme([[0.0, 1.0], [np.nan, 1.0]])


def test_lidar_is_the_rank_of_a_discriminant_analysis():
    """Images that differ in `r` directions, views that differ in others: rank `r`."""
    rng = np.random.default_rng(0)
    n, q, width, rank = 300, 6, 12, 4
    means = np.zeros((n, 1, width))
    means[..., :rank] = rng.choice([-1.0, 1.0], (n, 1, rank))
    noise = np.zeros((n, q, width))
    noise[..., rank:] = rng.normal(size=(n, q, width - rank))
    noise -= noise.mean(axis=1, keepdims=True)
    rotation, _ = np.linalg.qr(rng.normal(size=(width, width)))
    assert lidar((means + noise) @ rotation) == pytest.approx(rank, rel=0.02)

    # With W = B = I both are whole; against scikit-learn's discriminant analysis.
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    features = rng.normal(size=(n, q, width)) + means * 0.7
    classes = np.repeat(np.arange(n), q)
    analysis = LinearDiscriminantAnalysis(solver="eigen").fit(features.reshape(-1, width), classes)
    p = analysis.explained_variance_ratio_
    expected = np.exp(-np.sum(p * np.log(p)))
    assert lidar(features, delta=1e-9) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("shape", [(8, 5), (1, 3, 5), (8, 1, 5)])
def test_lidar_needs_images_and_views(shape):
    with pytest.raises(ValueError, match="images, views, width.*2 images and 2 views"):
        lidar(np.ones(shape))


def test_uniformity_against_loops():
    features = np.random.default_rng(0).normal(size=(9, 4)) * np.arange(1, 10)[:, None]
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    for t in (2.0, 0.5):
        pairs = [np.exp(-t * np.sum((unit[i] - unit[j]) ** 2)) for i in range(9) for j in range(i)]
        for chunk_size in (4, 100):
            found = uniformity(features, t, chunk_size)
            assert found == pytest.approx(np.log(np.mean(pairs)), rel=1e-5)
    assert uniformity(np.ones((5, 3))) == pytest.approx(0, abs=1e-5)
    wide = np.random.default_rng(0).normal(size=(200, 500))
    assert uniformity(wide) == pytest.approx(-4.0, abs=0.05)  # nearly orthogonal: |x - y|**2 is 2
    with pytest.raises(ValueError, match="two images"):
        uniformity(np.ones((1, 3)))


def test_alignment_against_loops():
    features = np.random.default_rng(0).normal(size=(5, 3, 4)) * np.arange(1, 6)[:, None, None]
    unit = features / np.linalg.norm(features, axis=-1, keepdims=True)
    for alpha in (2.0, 1.0):
        pairs = [
            np.linalg.norm(unit[n, i] - unit[n, j]) ** alpha
            for n in range(5)
            for i in range(3)
            for j in range(i)
        ]
        assert alignment(features, alpha) == pytest.approx(np.mean(pairs), rel=1e-5)
    assert alignment(np.ones((1, 2, 3))) == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match="images, views, width"):
        alignment(np.ones((4, 1, 3)))


def test_evaluate_is_the_sum_of_its_parts():
    """Of images whose colour is their class everything is known, and JSON holds the answers."""
    rng = np.random.default_rng(0)

    def side(count, seed):
        labels = np.arange(count) % 3
        images = tiny.images(count, 32, 24, seed=seed) // 4
        images[np.arange(count), :, :, labels] += 150
        order = rng.permutation(count)
        return images[order], labels[order]

    train, test = side(60, 1), side(30, 2)
    backbone = tiny.backbone()
    found = evaluate(backbone, train, test, k=(1, 5), few=(2, 30), feature="mean_patch", verbose=0)
    assert json.loads(json.dumps(found)) == found
    assert found["images"] == {"train": 60, "test": 30}
    assert (found["classes"], found["width"]) == (3, 32)
    features = evaluation.extract_features(backbone, train[0], feature="mean_patch")
    others = evaluation.extract_features(backbone, test[0], feature="mean_patch")
    sides = (features, train[1], others, test[1])
    accuracies = evaluation.knn_accuracy(*sides, k=[1, 5])
    assert found["knn"] == {"1": accuracies[1], "5": accuracies[5]}
    assert found["linear_probe"] == evaluation.linear_probe(*sides)
    assert found["logistic_regression"] == evaluation.logistic_regression(*sides)
    assert found["few_shot"] == evaluation.few_shot(*sides, n=[2])  # no class has 30
    assert found["retrieval"] == evaluation.retrieval(others, test[1], features, train[1])
    assert found["rankme"] == rankme(features)
    assert found["logistic_regression"]["accuracy"] > 0.9
    with pytest.raises(ValueError, match="a label for each image"):
        evaluate(backbone, train[0], test, verbose=0)
