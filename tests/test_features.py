import functools

import keras
import keras_hub
import ml_dtypes
import numpy as np
import pytest
from golden import numpy
from keras import ops

from keras_dinov3 import EncoderExtras
from keras_dinov3.encoder import encode, encode_layers
from keras_dinov3.features import FeatureExtractor, extract_features
from keras_dinov3.image_ops import resize

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


@pytest.mark.parametrize("feature", ["cls", "mean_patch", "cls_mean_patch", "patches"])
@pytest.mark.parametrize("layers", [2, [0, -1], [1]])
def test_features_of_several_layers(images, feature, layers):
    keras.utils.set_random_seed(1)
    backbone = keras_hub.models.DINOV3Backbone(
        patch_size=4,
        num_layers=3,
        hidden_dim=16,
        num_heads=2,
        intermediate_dim=24,
        image_shape=(8, 8, 3),
    )
    settings = {"feature": feature, "mean": 0.5, "std": 0.5}
    features = extract_features(backbone, images, layers=layers, **settings)
    numbers = range(1, 3) if layers == 2 else layers
    pixels = ops.convert_to_tensor(images / 255.0 * 2.0 - 1.0, "float32")
    tokens = encode_layers(backbone, pixels, list(numbers))
    cls, patches = (
        np.concatenate([numpy(getattr(t, n)) for t in tokens], -1) for n in ("cls", "patches")
    )
    expected = {
        "cls": cls,
        "mean_patch": patches.mean(axis=1),
        "cls_mean_patch": np.concatenate([cls, patches.mean(axis=1)], -1),
        "patches": patches,
    }[feature]
    np.testing.assert_allclose(features, expected, atol=1e-4)
    extractor = FeatureExtractor(backbone, layers=layers, **settings)
    again = FeatureExtractor.from_config(extractor.get_config())
    again.backbone.set_weights(backbone.get_weights())
    np.testing.assert_allclose(again.extract(images), features, atol=1e-5)


def test_layers_that_are_not_there(backbone):
    with pytest.raises(ValueError, match="`layers`.*from 1 to 1.*layers=2"):
        FeatureExtractor(backbone, layers=2)
