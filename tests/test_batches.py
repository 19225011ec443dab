"""Every kind of data that `fit` takes, and that only full batches reach the step."""

import keras
import numpy as np
import pytest
import tiny

import keras_dinov3 as kd
from keras_dinov3.batches import full_batches
from keras_dinov3.checks import check_batch
from keras_dinov3.features import batches

COUNT = 2 * tiny.B + 3  # two full batches and a rest
IMAGES = tiny.images(COUNT)
LABELS = np.arange(COUNT)


class Batches(keras.utils.PyDataset):
    def __len__(self):
        return -(-COUNT // tiny.B)

    def __getitem__(self, index):
        chosen = slice(index * tiny.B, (index + 1) * tiny.B)
        return IMAGES[chosen], LABELS[chosen]


def tf_dataset(*arrays):
    import tensorflow as tf

    return tf.data.Dataset.from_tensor_slices(arrays if len(arrays) > 1 else arrays[0])


def loader(images, labels=None, **settings):
    import torch

    tensors = [torch.from_numpy(a) for a in (images, labels) if a is not None]
    dataset = torch.utils.data.TensorDataset(*tensors)
    return torch.utils.data.DataLoader(dataset, batch_size=tiny.B, shuffle=True, **settings)


def grain_dataset(kind):
    import grain

    data = grain.MapDataset.source(IMAGES).batch(tiny.B)
    return data.to_iter_dataset() if kind == "iter" else data


def stream_loader():
    import torch

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(IMAGES)

    return torch.utils.data.DataLoader(Stream(), batch_size=tiny.B)


def grain_loader(drop_remainder):
    import grain

    sampler = grain.samplers.IndexSampler(COUNT, num_epochs=1, shuffle=True, seed=0)
    operations = [grain.transforms.Batch(tiny.B, drop_remainder=drop_remainder)]
    return grain.DataLoader(data_source=IMAGES, sampler=sampler, operations=operations)


def folder(path):
    for index in range(COUNT):
        keras.utils.save_img(path / f"{index}.png", IMAGES[index])
    return keras.utils.image_dataset_from_directory(
        path, labels=None, image_size=IMAGES.shape[1:3], batch_size=tiny.B, verbose=False
    )


KINDS = {
    "array": lambda path: IMAGES,
    "tf.data": lambda path: tf_dataset(IMAGES).batch(tiny.B),
    "tf.data with labels": lambda path: tf_dataset(IMAGES, LABELS).batch(tiny.B),
    "tf.data of static shape": lambda path: tf_dataset(IMAGES).batch(tiny.B, True),
    "PyDataset": lambda path: Batches(),
    "DataLoader": lambda path: loader(IMAGES),
    "DataLoader with labels": lambda path: loader(IMAGES, LABELS),
    "grain map": lambda path: grain_dataset("map"),
    "grain iter": lambda path: grain_dataset("iter"),
    "grain DataLoader": lambda path: grain_loader(drop_remainder=True),
    "grain DataLoader with a rest": lambda path: grain_loader(drop_remainder=False),
    "DataLoader of a stream": lambda path: stream_loader(),
    "array with labels": lambda path: (IMAGES, LABELS),
    "list": lambda path: [Batches()[0], list(Batches()[1]), Batches()[2]],
    "generator": lambda path: (IMAGES[i : i + tiny.B] for i in range(0, COUNT, tiny.B)),
    "generator of lists": lambda path: (list(Batches()[i]) for i in range(3)),
    "kd.data.image_folder": lambda path: (
        folder(path) and kd.data.image_folder(path, IMAGES.shape[1:3], tiny.B, verbose=0)
    ),
}


@pytest.fixture(scope="module")
def model():
    return tiny.model()


@pytest.mark.parametrize("kind", KINDS)
def test_fit_takes(model, kind, tmp_path):
    before = int(model.step)
    history = model.fit(KINDS[kind](tmp_path), epochs=1, verbose=0, **sizes(kind)).history
    assert int(model.step) - before == 2  # the rest is dropped
    assert np.isfinite(history["loss"][0])


def sizes(kind):
    return {"batch_size": tiny.B} if kind.startswith("array") else {}


@pytest.mark.parametrize("kind", ["array", "tf.data", "PyDataset", "DataLoader", "list"])
def test_validation_data_takes(model, kind, tmp_path):
    """Also images of another size than those of training."""
    data = tiny.images(5, height=33, seed=4) if kind == "array" else KINDS[kind](tmp_path)
    history = model.fit(IMAGES, batch_size=tiny.B, validation_data=data, verbose=0).history
    assert {"val_loss", "val_ibot_loss"} <= set(history)


def test_fit_takes_two_epochs_of_a_list_and_batches_with_labels(model):
    before = int(model.step)
    model.fit([IMAGES[:4], IMAGES[4:8]], epochs=2, verbose=0)
    model.train_on_batch((IMAGES[:4], LABELS[:4]))
    model.test_on_batch([IMAGES[:4], LABELS[:4]])
    assert int(model.step) - before == 5


@pytest.mark.parametrize("kind", ["list", "generator", "tf.data"])
def test_images_of_several_sizes(model, kind):
    batches = [IMAGES[:4], IMAGES[4:8, 2:]]
    data = batches
    if kind == "generator":
        data = (batch for batch in batches)
    elif kind == "tf.data":
        import tensorflow as tf

        spec = tf.TensorSpec((None, None, None, 3), "uint8")
        data = tf.data.Dataset.from_generator(lambda: iter(batches), output_signature=spec)
    with pytest.raises(Exception, match="All batches must hold arrays of one size"):
        model.fit(data, verbose=0)
    assert all(np.all(np.isfinite(w)) for w in model.teacher.get_weights())  # nothing is lost


def test_a_short_first_batch_does_not_hide_the_full_ones(model):
    parts = [IMAGES[:2], IMAGES[: tiny.B]]
    for data in (parts, iter(parts)):
        with pytest.raises(ValueError, match="a batch of 4 after a first one of 2"):
            model.fit(data, verbose=0)
    with pytest.raises(ValueError, match="labels go in a tuple"):
        model.fit([IMAGES, LABELS], verbose=0)


def test_batches_of_odd_sizes_never_reach_the_step():
    class Odd(Batches):
        def __getitem__(self, index):
            return IMAGES[: 2 if index == 1 else tiny.B]

    data, _ = full_batches(Odd())
    assert len(data) == 3 and len(data[2]) == tiny.B
    with pytest.raises(ValueError, match="batch 1 of 2 images, the first of 4"):
        data[1]
    import torch

    images = torch.utils.data.TensorDataset(torch.from_numpy(IMAGES))
    sampler = [[0, 1, 2, 3], [4, 5]]
    data, _ = full_batches(torch.utils.data.DataLoader(images, batch_sampler=sampler))
    with pytest.raises(ValueError, match="a batch of 2 after a first one of 4"):
        list(data)


def test_fit_takes_a_loader_of_bfloat16():
    import torch

    images = torch.rand(tiny.B, *IMAGES.shape[1:]).to(torch.bfloat16)
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images), batch_size=tiny.B)
    model = tiny.model()
    assert check_batch(next(iter(data)), model) == tiny.B
    if keras.config.backend() == "torch":  # Keras itself hands no bfloat16 to the others
        model.fit(data, verbose=0)
        assert int(model.step) == 1


def test_fit_takes_two_epochs_of_a_loader(model):
    before = int(model.step)
    model.fit(loader(IMAGES), epochs=2, verbose=0)
    assert int(model.step) - before == 4


def test_labels_beside_arrays_are_ignored(model):
    model.fit(IMAGES, LABELS, batch_size=tiny.B, verbose=0)


@pytest.fixture(scope="module")
def float_model():
    return tiny.model()


def test_fit_takes_a_directory_of_keras(float_model, tmp_path):
    """`image_dataset_from_directory` yields floats from 0 to 255."""
    data = folder(tmp_path)
    float_model.fit(data, verbose=0)
    assert int(float_model.step) == 2
    with pytest.raises(ValueError, match="divide by 255"):
        float_model.fit(data.map(lambda x: x), verbose=0)


@pytest.mark.parametrize("format", ["tf", "grain"])
@pytest.mark.parametrize("labels", [None, "inferred"])
def test_a_directory_of_keras_is_scaled(format, labels, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        keras.utils.save_img(tmp_path / name / "1.png", IMAGES[0], scale=False)
    data = keras.utils.image_dataset_from_directory(
        tmp_path,
        labels=labels,
        image_size=IMAGES.shape[1:3],
        batch_size=2,
        format=format,
        verbose=False,
    )
    _, first = full_batches(data)
    images = first[0] if labels else first
    np.testing.assert_allclose(images[0], IMAGES[0] / 255.0, atol=1e-6)
    (images, given), *_ = batches(data, 1)
    np.testing.assert_allclose(images[1], IMAGES[0] / 255.0, atol=1e-6)
    assert (given is None) == (labels is None)


def test_fit_takes_keras_cv_layers_in_a_pipeline(float_model):
    keras_cv = pytest.importorskip("keras_cv")
    before = int(float_model.step)
    augment = keras_cv.layers.Augmenter(
        [
            keras_cv.layers.RandomFlip(),
            keras_cv.layers.RandomColorJitter((0, 255), 0.1, 0.1, 0.1, 0.1),
            keras_cv.layers.RandomGaussianBlur(3, 0.5),
        ]
    )
    data = tf_dataset(IMAGES.astype("float32")).batch(tiny.B, drop_remainder=True)
    data = data.map(lambda x: augment({"images": x})["images"] / 255.0)
    float_model.fit(data, verbose=0)
    assert int(float_model.step) - before == 2


@pytest.fixture(scope="module")
def crop_model():
    return tiny.model(augmentation=None, masking=None, max_masked_patches=50)


@pytest.mark.parametrize("kind", ["array", "tf.data", "DataLoader"])
def test_fit_takes_ready_crops_with_masks(crop_model, kind):
    crops = tiny.crops(COUNT, masked=0.3)
    before = int(crop_model.step)
    if kind == "array":
        crop_model.fit(crops, batch_size=tiny.B, verbose=0)
    elif kind == "tf.data":
        crop_model.fit(tf_dataset(crops).batch(tiny.B), verbose=0)
    else:
        import torch

        dataset = [{name: array[i] for name, array in crops.items()} for i in range(COUNT)]
        crop_model.fit(torch.utils.data.DataLoader(dataset, batch_size=tiny.B), verbose=0)
    assert int(crop_model.step) - before == 2


def test_a_tf_dataset_of_unknown_length_has_the_same_means(crop_model):
    crops = tiny.crops(2 * tiny.B, masked=0.3)
    known = tf_dataset(crops).batch(tiny.B, drop_remainder=True)
    unknown = tf_dataset(crops).batch(tiny.B)
    logs = [crop_model.evaluate(data, verbose=0, return_dict=True) for data in (known, unknown)]
    assert logs[0] == pytest.approx(logs[1], rel=1e-6)


def test_fit_takes_crops_made_by_multi_crop_in_a_pipeline(crop_model):
    crop = tiny.multi_crop()
    data = tf_dataset(IMAGES).batch(tiny.B, drop_remainder=True).map(crop)
    model = tiny.model(augmentation=None)  # masks of its own
    model.fit(data, verbose=0)
    assert int(model.step) == 2


def test_arrays_are_shuffled_anew_and_the_rest_changes():
    data, first = full_batches(np.arange(11)[:, None], 4, shuffle=True, seed=1)
    epochs = []
    for epoch in range(6):
        data.position = 2 * epoch  # steps made so far
        assert len(data) == 2
        epochs.append([int(i) for batch in range(2) for i in data[batch][:, 0]])
    assert all(len(set(epoch)) == 8 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 6
    assert set().union(*epochs) == set(range(11))
    again, _ = full_batches(np.arange(11)[:, None], 4, shuffle=True, seed=1)
    assert [int(i) for i in again[0][:, 0]] == epochs[0][:4]


def test_arrays_take_their_seed_from_python():
    orders = []
    for seed in (3, 3, 4):
        keras.utils.set_random_seed(seed)
        data, _ = full_batches(np.arange(11)[:, None], 4, shuffle=True)
        orders.append(data.order.tolist())
    assert orders[0] == orders[1] != orders[2]


def test_a_resumed_fit_goes_on_in_the_same_order(tmp_path):
    crops = tiny.crops(COUNT, masked=0.3)
    losses = []
    for stop in (None, 1):
        # A large epsilon: see test_model.py
        model = tiny.model(
            keras.optimizers.AdamW(1e-3, epsilon=1e-3), augmentation=None, masking=None
        )
        if stop:
            model.fit(crops, batch_size=tiny.B, epochs=stop, verbose=0)
            model.save(tmp_path / "model.keras")
            model = keras.models.load_model(tmp_path / "model.keras")
        history = model.fit(
            crops, batch_size=tiny.B, initial_epoch=stop or 0, epochs=3, verbose=0
        ).history
        losses.append(history["loss"][-2:])
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    assert abs(losses[0][0] - losses[0][1]) > 1e-3  # other images each time


def test_fewer_images_than_a_batch():
    data, first = full_batches(np.arange(3)[:, None], 4)
    assert len(data) == 1 and len(first) == 3


def test_batch_size_is_for_arrays():
    with pytest.raises(ValueError, match="batch_size.*arrays"):
        full_batches(Batches(), 4)
    with pytest.raises(ValueError, match="at least 1"):
        full_batches(IMAGES, -2)


def test_a_loader_keeps_its_settings():
    data, _ = full_batches(loader(IMAGES, num_workers=0, timeout=0))
    assert len(data) == 2 and data.batch_sampler.drop_last
    complete = loader(IMAGES, drop_last=True)
    assert full_batches(complete)[0] is complete


def test_a_loader_that_fills_no_batch():
    torch = pytest.importorskip("torch")
    images = torch.tensor(tiny.images(7))
    data = torch.utils.data.TensorDataset(images)
    with pytest.raises(ValueError, match="at least one batch. Received: 7 images and batch_size=9"):
        full_batches(torch.utils.data.DataLoader(data, batch_size=9))


def test_images_that_change_their_size_or_range_later():
    class Batches(keras.utils.PyDataset):
        def __init__(self, batches):
            super().__init__()
            self.list = batches

        def __len__(self):
            return len(self.list)

        def __getitem__(self, index):
            return self.list[index]

    first = tiny.images(3, dtype="float32")
    for later, message in (
        (tiny.images(3, height=48, dtype="float32"), "arrays of one size"),
        (255 * first, "must be from 0 to 1"),
    ):
        for kind in (Batches, list, iter):
            with pytest.raises(ValueError, match=message):
                data, _ = full_batches(kind([first, later, first]))
                list(data) if kind is iter else [data[i] for i in range(len(data))]
    with pytest.raises(ValueError, match="must be from 0 to 1"):
        full_batches(np.concatenate([first, first, 255 * first]), batch_size=3)
