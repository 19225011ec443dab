import functools

import keras
import keras_hub
import ml_dtypes
import numpy as np
import pytest
from golden import numpy
from keras import ops

from keras_dinov3 import EncoderExtras
from keras_dinov3.encoder import encode
from keras_dinov3.evaluation import (
    FeatureExtractor,
    extract_features,
    knn_accuracy,
    knn_predict,
    lidar,
    rankme,
    resize,
)

COMPILED = keras.config.backend() != "torch"
MEAN, STD = np.array([0.4, 0.5, 0.6], "float32"), np.array([0.2, 0.25, 0.5], "float32")


def make_backbone(seed=0, channels=3, **kwargs):
    keras.utils.set_random_seed(seed)
    backbone = keras_hub.models.DINOV3Backbone(
        patch_size=4,
        num_layers=1,
        hidden_dim=16,
        num_heads=2,
        intermediate_dim=24,
        num_register_tokens=2,
        image_shape=(8, 8, channels),
        **kwargs,
    )
    generator = np.random.default_rng(seed)  # the Hub's small initial weights hide mistakes
    backbone.set_weights([0.3 * generator.normal(size=w.shape) for w in backbone.get_weights()])
    return backbone


class Reference(keras.Model):
    """Class and patch tokens of normalised images, compiled for speed only."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone
        self.built = True

    def call(self, images):
        tokens = encode(self.backbone, images)
        return tokens.cls, tokens.patches


@functools.cache
def reference(backbone, shape):  # one per shape: TensorFlow forgets the sizes of a second one
    return Reference(backbone)


def direct(backbone, images):
    """Features without the extractor, from images of range 0-255."""
    normal = (images.astype("float32") / 255 - MEAN) / STD
    cls, patches = reference(backbone, normal.shape).predict_on_batch(normal)
    mean_patch = patches.mean(1)
    return {
        "cls": cls,
        "mean_patch": mean_patch,
        "cls_mean_patch": np.concatenate([cls, mean_patch], 1),
        "patches": patches,
    }


def make_extractor(backbone, **kwargs):
    return FeatureExtractor(backbone, **{"mean": MEAN.tolist(), "std": STD.tolist(), **kwargs})


@pytest.fixture(scope="module")
def backbone():
    return make_backbone()


@pytest.fixture(scope="module")
def extractor(backbone):
    return make_extractor(backbone)


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(1).integers(0, 256, (7, 8, 12, 3), "uint8")


@pytest.fixture(scope="module")
def labels():
    return np.arange(7) * 10


@pytest.fixture(scope="module")
def expected(backbone, images):
    return direct(backbone, images)["cls"]


# Extraction


@pytest.mark.parametrize("feature", ["cls", "mean_patch", "cls_mean_patch", "patches"])
def test_features_are_the_tokens(backbone, images, feature):
    features = make_extractor(backbone, feature=feature).extract(images, batch_size=3)
    assert features.dtype == "float32"
    np.testing.assert_allclose(features, direct(backbone, images)[feature], atol=1e-5)


def test_features_are_those_of_the_hub(backbone, images):
    square = images[:, :, :8]
    normal = (square.astype("float32") / 255 - MEAN) / STD
    tokens = numpy(backbone({"pixel_values": normal}))  # class, 2 registers, patches
    features = make_extractor(backbone, feature="cls_mean_patch").extract(square)
    np.testing.assert_allclose(features[:, :16], tokens[:, 0], atol=1e-5)
    np.testing.assert_allclose(features[:, 16:], tokens[:, 3:].mean(1), atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", ml_dtypes.bfloat16])
def test_float_images(extractor, images, expected, dtype):
    features = extractor.extract((images / 255).astype(dtype))
    np.testing.assert_allclose(
        features, expected, atol=1e-5 if dtype in ("float32", "float64") else 0.05
    )


@pytest.fixture(scope="module")
def gray():
    return make_backbone(channels=1)


def test_default_statistics(backbone, gray, images):
    rgb = make_extractor(backbone, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    np.testing.assert_array_equal(extract_features(backbone, images), rgb.extract(images))
    half = make_extractor(gray, mean=0.5, std=0.25)
    np.testing.assert_array_equal(
        extract_features(gray, images[..., :1]), half.extract(images[..., :1])
    )


def kinds(images, labels):
    import grain
    import tensorflow as tf
    import torch

    slices = [slice(0, 3), slice(3, 6), slice(6, 7)]  # the last batch is short

    class Sequence(keras.utils.PyDataset):
        def __len__(self):
            return 3

        def __getitem__(self, index):
            return images[slices[index]], labels[slices[index]]

    pairs = torch.utils.data.TensorDataset(torch.tensor(images), torch.tensor(labels))
    records = [(image, label) for image, label in zip(images, labels, strict=True)]
    return {
        "arrays": (images, labels),
        "lists of labels": (images, labels.tolist()),
        "tensors": (ops.convert_to_tensor(images), ops.convert_to_tensor(labels)),
        "batches": [(images[s], labels[s]) for s in slices],
        "generator": ((images[s], labels[s]) for s in slices),
        "tf.data": tf.data.Dataset.from_tensor_slices((images, labels)).batch(3),
        "PyDataset": Sequence(),
        "DataLoader": torch.utils.data.DataLoader(pairs, batch_size=3),
        "grain": grain.MapDataset.source(records).to_iter_dataset().batch(3),
    }


@pytest.mark.parametrize("kind", kinds(np.zeros((7, 8, 12, 3)), np.zeros(7)))
def test_kinds_of_data(extractor, images, labels, expected, kind):
    data = kinds(images, labels)[kind]
    features, found = extractor.extract(data, batch_size=3)
    np.testing.assert_allclose(features, expected, atol=1e-5)
    np.testing.assert_array_equal(found, labels)


def test_data_without_labels(extractor, images, expected):
    import tensorflow as tf
    import torch

    dataset = torch.utils.data.TensorDataset(torch.tensor(images))
    extract = extractor.extract
    for data in (
        ops.convert_to_tensor(images),
        [images[:4], images[4:]],
        tf.data.Dataset.from_tensor_slices(images).batch(4),
        torch.utils.data.DataLoader(dataset, batch_size=4),  # yields [images]
    ):
        np.testing.assert_allclose(extract(data, batch_size=4), expected, atol=1e-5)


def test_shuffled_data_keep_their_labels(extractor, images, expected):
    import tensorflow as tf

    data = tf.data.Dataset.from_tensor_slices((images, np.arange(7))).shuffle(7, seed=1).batch(3)
    features, order = extractor.extract(data)
    assert sorted(order) == list(range(7)) and list(order) != sorted(order)
    np.testing.assert_allclose(features, expected[order], atol=1e-5)


def test_batches_of_growing_size(extractor, images, expected):
    data = [images[:1], images[1:4], images[4:6], images[6:]]
    np.testing.assert_allclose(extractor.extract(data), expected, atol=1e-5)


def test_progress_bar(extractor, images, capsys):
    extractor.extract(images, batch_size=3, verbose=1)
    printed = capsys.readouterr().out
    assert "1/Unknown" in printed and "3/Unknown" in printed
    extractor.extract(images, batch_size=3)
    assert capsys.readouterr().out == ""


# Size


@pytest.mark.parametrize("size", [(5, 3), (6, 20), (31, 5), (13, 14)])
def test_resize_is_the_one_of_keras(size):
    x = np.random.default_rng(0).random((2, 13, 9, 3)).astype("float32")
    ours = numpy(resize(ops.convert_to_tensor(x), size))
    kerass = ops.image.resize(x, size, interpolation="bicubic", antialias=True)
    np.testing.assert_allclose(ours, numpy(kerass), atol=2e-5)


@pytest.mark.parametrize(
    "size, image_size, grid",
    [
        ((9, 14), None, (2, 4)),  # 14 is half-way between 12 and 16
        ((1, 5), None, (1, 1)),
        ((9, 14), 12, (3, 3)),
        ((9, 14), (4, 12), (1, 3)),
        ((8, 12), (8, 12), (2, 3)),
    ],
)
def test_image_size(backbone, size, image_size, grid):
    images = np.random.default_rng(0).random((2, *size, 3)).astype("float32")
    make = make_extractor(backbone, feature="patches", image_size=image_size)
    features = make.extract(images)
    assert features.shape == (2, grid[0] * grid[1], 16)
    target = (4 * grid[0], 4 * grid[1])
    resized = numpy(ops.image.resize(images, target, interpolation="bicubic", antialias=True))
    expected = direct(backbone, resized * 255)["patches"]
    np.testing.assert_allclose(features, expected, atol=1e-4)


# Weights and compilation


class Counting(FeatureExtractor):
    calls = 0

    def call(self, images):
        self.calls += 1
        assert None not in tuple(images.shape)
        return super().call(images)


def test_traced_once_per_shape_and_always_current(images):
    backbone = make_backbone()
    counting = Counting(backbone, mean=MEAN.tolist(), std=STD.tolist())
    for factor in (1.0, 0.5, -1.0):
        backbone.set_weights([factor * w for w in backbone.get_weights()])
        features = counting.extract(images, batch_size=3)  # 3, 3 and 1
        np.testing.assert_allclose(features, direct(backbone, images)["cls"], atol=1e-5)
    assert counting.calls == (1 if COMPILED else 9)
    for _ in range(2):  # other sizes, there and back
        counting.extract(images[:, :, :8], batch_size=3)
        counting.extract(images[:, :4], batch_size=3)
        counting.extract(images, batch_size=3)
    assert counting.calls == (3 if COMPILED else 27)


def test_compiled_by_xla(backbone, images, expected):
    """As TensorFlow does by default where there is a GPU; resizing included."""
    compiled = make_extractor(backbone, image_size=(8, 12))
    compiled.jit_compile = COMPILED
    np.testing.assert_allclose(compiled.extract(images), expected, atol=1e-5)
    stretched = images.repeat(3, axis=1)  # to 24 pixels and back
    eager = make_extractor(backbone, image_size=(8, 12))
    eager.run_eagerly = True
    np.testing.assert_allclose(compiled.extract(stretched), eager.extract(stretched), atol=1e-4)


def test_shares_the_weights_of_the_backbone(backbone):
    ours = {id(variable) for variable in make_extractor(backbone).variables}
    assert ours == {id(variable) for variable in backbone.variables}


class Classifier(keras.Model):
    """A backbone trained by `fit`, which is what matters here."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone
        self.head = keras.layers.Dense(2)
        self.head.build((None, 16))
        self.built = True

    def call(self, images):
        return self.head(encode(self.backbone, images).cls)


class Watch(keras.callbacks.Callback):
    def __init__(self, backbone, images):
        super().__init__()
        self.extractor = Counting(backbone, mean=MEAN.tolist(), std=STD.tolist())
        self.images = images
        self.features = []
        self.expected = []

    def on_epoch_end(self, epoch, logs=None):
        self.features.append(self.extractor.extract(self.images, batch_size=3))
        self.expected.append(direct(self.extractor.backbone, self.images)["cls"])


def train(images, watch):
    backbone = make_backbone(seed=3)
    keras.utils.set_random_seed(4)
    model = Classifier(backbone)
    model.compile(keras.optimizers.Adam(1e-2), "mse")
    callbacks = [Watch(backbone, images)] if watch else []
    x = images[:6].astype("float32") / 255
    y = np.eye(2, dtype="float32")[np.arange(6) % 2]
    history = model.fit(x, y, batch_size=2, epochs=3, shuffle=False, verbose=0, callbacks=callbacks)
    return history.history["loss"], model.get_weights(), callbacks


def test_inside_fit(images):
    losses, weights, (watch,) = train(images, watch=True)
    assert np.abs(watch.features[0] - watch.features[2]).max() > 1e-2
    np.testing.assert_allclose(watch.features, watch.expected, atol=1e-5)
    assert watch.extractor.calls == (1 if COMPILED else 9)
    other_losses, other_weights, _ = train(images, watch=False)
    np.testing.assert_array_equal(losses, other_losses)
    for ours, others in zip(weights, other_weights, strict=True):
        np.testing.assert_array_equal(ours, others)


def test_config_and_saving(backbone, images, tmp_path):
    before = make_extractor(backbone, feature="cls_mean_patch", image_size=(12, 8), name="features")
    again = FeatureExtractor.from_config(before.get_config())
    assert again.get_config() == before.get_config()
    assert again.extras is None
    extras = EncoderExtras(untie_cls_norm=True, rope_normalize="max").build_for(backbone)
    varied = make_extractor(backbone, extras=extras).get_config()
    varied = FeatureExtractor.from_config(varied).extras
    assert varied.rope_normalize == "max" and varied.cls_norm is not None
    assert (again.feature, again.image_size) == ("cls_mean_patch", (12, 8))
    assert (again.mean, again.std) == (MEAN.tolist(), STD.tolist())
    before.save(tmp_path / "features.keras")
    loaded = keras.saving.load_model(tmp_path / "features.keras")
    np.testing.assert_allclose(loaded.extract(images), before.extract(images), atol=1e-6)


def test_mixed_precision(images, expected):
    low = make_backbone(dtype="mixed_bfloat16")
    features = make_extractor(low).extract(images)
    assert features.dtype == "float32"
    error = np.abs(features - expected).max()
    assert 1e-5 < error < 0.1 * np.abs(expected).max()  # computed in bfloat16, yet near


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


# Errors


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"feature": "token"}, r"one of \('cls', .*feature='token'"),
        ({"image_size": 10}, "multiples of `patch_size`.*10x10.*Nearest to 10: 8, 12"),
        ({"image_size": (8, 3)}, "8x3.*Nearest to 3: 4"),
    ],
)
def test_constructor_errors(backbone, kwargs, message):
    with pytest.raises(ValueError, match=message):
        FeatureExtractor(backbone, **kwargs)


def endless_tf():
    import tensorflow as tf

    return tf.data.Dataset.from_tensors(np.zeros((8, 8, 3), "uint8")).batch(1).repeat()


class EndlessSequence(keras.utils.PyDataset):
    num_batches = None

    def __getitem__(self, index):
        return np.zeros((2, 8, 8, 3), "uint8")


ZEROS = np.zeros((2, 8, 8, 3), "float32")


@pytest.mark.parametrize(
    "data, message",
    [
        ([], "at least one image"),
        (ZEROS[:0], "at least one image"),
        (ZEROS[0], r"\(B, H, W, C\).*\(8, 8, 3\)"),
        (np.zeros((2, 3, 8, 8), "uint8"), r"\(2, 3, 8, 8\).*channels first.*moveaxis"),
        (np.zeros((2, 8, 8, 1), "uint8"), r"3 channels.*\(2, 8, 8, 1\)"),
        (np.zeros((2, 8, 8, 3), "int64"), "uint8 from 0 to 255 or float.*int64"),
        (ZEROS + 255, "from 0 to 1.*255.*divide by 255"),
        (ZEROS - 1, "from 0 to 1.*-1"),
        (ZEROS + np.nan, "finite.*nan"),
        ((ZEROS, [1, 2, 3]), "2 images, 3 labels"),
        ([{"image": ZEROS}], r"A batch must be.*dict with keys \['image'\]"),
        (endless_tf, "must end"),
        (EndlessSequence, "must end"),
    ],
)
def test_data_errors(extractor, data, message):
    with pytest.raises(ValueError, match=message):
        extractor.extract(data() if callable(data) else data)


def test_statistics_of_other_channels(gray, images):
    with pytest.raises(
        ValueError, match="`mean` must be one number or one per channel.*1 channels"
    ):
        extract_features(gray, images[..., :1], mean=MEAN.tolist())


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
    with pytest.raises(ValueError, match="images, views, width.*two images and two views"):
        lidar(np.ones(shape))
