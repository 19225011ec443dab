import gc
import io
import os
import pickle
import random
import re
import tarfile
import threading
import time
import warnings

import keras
import numpy as np
import pytest
from PIL import Image

from keras_dinov3 import data as data_module
from keras_dinov3.data import ImageBatches, image_folder

SIZE = (6, 10)  # height, width


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), "uint8")


def plain(value):
    return Image.new("RGB", (SIZE[1], SIZE[0]), (value,) * 3)


def write_plain(folder, count, start=0):
    """Images `00.png`, `01.png`, ... of one grey value each, which so names the image."""
    folder.mkdir(parents=True, exist_ok=True)
    for value in range(start, start + count):
        plain(value).save(folder / f"{value:02}.png")


def values_of(images):
    """The grey values of a batch of plain images."""
    assert images.dtype == "uint8" and images.shape[1:] == (*SIZE, 3)
    assert (images == images[:, :1, :1, :1]).all()
    return images[:, 0, 0, 0].tolist()


def folder_of(directory, batch_size=3, **kwargs):
    return image_folder(directory, SIZE, batch_size, **{"verbose": 0, **kwargs})


# ---- which files ----


def test_finds_images_in_nested_folders_in_order(tmp_path):
    write_plain(tmp_path, 1, start=2)
    write_plain(tmp_path / "01 deep" / "er", 2)
    plain(3).save(tmp_path / "UPPER.PNG")
    plain(4).save(tmp_path / "x.tiff")
    (tmp_path / "notes.txt").write_text("no image")
    plain(5).save(tmp_path / ".hidden.png")
    write_plain(tmp_path / ".thumbnails", 1, start=6)
    data = folder_of(tmp_path, batch_size=5, shuffle=False)
    assert values_of(data[0]) == [0, 1, 2, 3, 4]
    assert data.unreadable == {}


def test_follows_links_but_not_in_circles(tmp_path):
    write_plain(tmp_path / "elsewhere", 2)
    write_plain(tmp_path / "images" / "a", 2, start=2)
    os.symlink(tmp_path / "elsewhere", tmp_path / "images" / "b")
    os.symlink(tmp_path / "images", tmp_path / "images" / "a" / "up")
    data = folder_of(tmp_path / "images", batch_size=4, shuffle=False)
    assert values_of(data[0]) == [2, 3, 0, 1]


def break_files(folder):
    """Four files that cannot be read, each for another reason."""
    for name, suffix in (("cut", "jpg"), ("cut", "png")):
        path = folder / f"{name}.{suffix}"
        Image.fromarray(noise(40, 50)).save(path)
        path.write_bytes(path.read_bytes()[:-600])
    (folder / "empty.webp").touch()
    os.symlink(folder / "nowhere", folder / "link.bmp")
    return sorted(str(folder / name) for name in ("cut.jpg", "cut.png", "empty.webp", "link.bmp"))


def test_skips_and_counts_unreadable_files(tmp_path):
    write_plain(tmp_path, 6)
    broken = break_files(tmp_path)
    with pytest.warns(UserWarning) as caught:
        data = folder_of(tmp_path, shuffle=False)
    (message,) = [str(warning.message) for warning in caught]
    assert f"Skipped 4 of 10 image files in {tmp_path}" in message
    assert f"{broken[0]} (image file is truncated" in message and broken[3] not in message
    assert sorted(data.unreadable) == broken and all(data.unreadable.values())
    assert [values_of(batch) for batch in data] == [[0, 1, 2], [3, 4, 5]]


def test_without_check_the_next_file_stands_in(tmp_path):
    write_plain(tmp_path / "a", 1)
    broken = break_files(tmp_path / "a")
    write_plain(tmp_path / "b", 3, start=1)
    data = folder_of(tmp_path, batch_size=4, labels="folders", shuffle=False, check=False)
    assert data.unreadable == {} and len(data) == 2
    with pytest.warns(UserWarning, match="Replaced 4 files that could not be read. First: "):
        images, labels = data[0]
    assert sorted(data.unreadable) == broken
    assert values_of(images) == [0, 1, 1, 1] and labels.tolist() == [0, 1, 1, 1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # warned once
        images, labels = data[1]
    assert values_of(images) == [1, 1, 2, 3] and labels.tolist() == [1, 1, 1, 1]


def test_a_file_lost_during_training_does_not_stop_it(tmp_path):
    write_plain(tmp_path, 4)
    data = folder_of(tmp_path, batch_size=4, shuffle=False)
    os.remove(tmp_path / "03.png")
    with pytest.warns(UserWarning, match="03.png"):
        assert values_of(data[0]) == [0, 1, 2, 0]  # after the last comes the first
    for path in tmp_path.iterdir():
        os.remove(path)
    with pytest.raises(ValueError, match="None of the 4 files can be read. First: .*03.png"):
        data[0]


def test_cached_images_need_no_files(tmp_path):
    write_plain(tmp_path, 6)
    read = folder_of(tmp_path, seed=4)
    cached = folder_of(tmp_path, seed=4, cache=True)
    expected = [values_of(batch) for batch in read]
    for path in tmp_path.iterdir():
        os.remove(path)
    assert [values_of(batch) for batch in cached] == expected
    assert cached.images.shape == (6, *SIZE, 3) and cached.images.nbytes == 6 * 6 * 10 * 3
    parts = cached.split(0.5)
    assert sorted(v for part in parts for batch in part for v in values_of(batch)) == [*range(6)]
    for part in parts:  # the same memory, not a copy
        assert part.images is cached.images


def test_images_cached_in_a_file_go_with_their_labels(tmp_path):
    write_plain(tmp_path / "in" / "a", 3)
    broken = break_files(tmp_path / "in" / "a")
    write_plain(tmp_path / "in" / "b", 3, start=3)
    expected = [[0, 1, 2], [3, 4, 5]]
    for _ in range(2):  # made, then found
        with pytest.warns(UserWarning, match="Skipped 4 of 10"):
            data = folder_of(
                tmp_path / "in", labels="folders", cache=tmp_path / "c.npy", shuffle=False
            )
        assert sorted(data.unreadable) == broken and isinstance(data.images, np.memmap)
        assert [values_of(images) for images, _ in data] == expected
        assert [labels.tolist() for _, labels in data] == [[0, 0, 0], [1, 1, 1]]
    state = pickle.dumps(data)
    assert len(state) < 4000  # not the images
    assert [values_of(images) for images, _ in pickle.loads(state)] == expected


# ---- tar files ----


def write_tar(path, values, kind=tarfile.PAX_FORMAT):
    """A tar file of plain images, from a dict of member name to grey value, or to `bytes`."""
    with tarfile.open(path, "w", format=kind) as tar:
        for name, value in values.items():
            content = value
            if not isinstance(value, bytes):
                buffer = io.BytesIO()
                plain(value).save(buffer, "PNG")
                content = buffer.getvalue()
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def test_tar_file_gives_the_batches_of_the_folder_in_it(tmp_path):
    write_plain(tmp_path / "in" / "cat" / "deep", 2, start=3)
    write_plain(tmp_path / "in" / "ant", 3)
    write_plain(tmp_path / "in" / "cat.b", 2, start=5)
    broken = break_files(tmp_path / "in" / "ant")
    (tmp_path / "in" / "ant" / "notes.txt").write_text("no image")
    (tmp_path / "in" / "ant" / ".hidden.png").write_text("")
    with tarfile.open(tmp_path / "in.tar", "w") as tar:
        for path in sorted((tmp_path / "in").rglob("*"), reverse=True):
            tar.add(path, path.relative_to(tmp_path), recursive=False)
    settings = {"labels": "folders", "batch_size": 2, "seed": 6}
    with pytest.warns(UserWarning, match="Skipped 4 of 11 image files"):
        folder = folder_of(tmp_path / "in", **settings)
    with pytest.warns(UserWarning, match="Skipped 3 of 10 image files in .*in.tar because"):
        tarred = folder_of(tmp_path / "in.tar", **settings)
    assert sorted(tarred.unreadable) == [p.replace("/in/", "/in.tar/in/") for p in broken[:3]]
    assert tarred.class_names == folder.class_names == ["ant", "cat", "cat.b"]
    assert [f.replace("/in.tar", "") for f in tarred.files] == folder.files
    for (images, labels), (expected, classes) in zip(tarred, folder, strict=True):
        np.testing.assert_array_equal(images, expected)
        np.testing.assert_array_equal(labels, classes)
    assert sorted(os.listdir(tmp_path)) == ["in", "in.tar"]  # nothing unpacked


def test_several_tar_files_are_one_set_of_images(tmp_path):
    write_tar(tmp_path / "b.tar", {"all/x/0.png": 0, "all/y/0.png": 1})
    write_tar(tmp_path / "a.tar", {"all/x/0.png": 2, "all/z/0.png": 3}, tarfile.GNU_FORMAT)
    paths = [tmp_path / "b.tar", str(tmp_path / "a.tar")]
    data = folder_of(paths, batch_size=4, labels="folders", shuffle=False, cache=True)
    images, labels = data[0]
    assert values_of(images) == [0, 1, 2, 3] and labels.tolist() == [0, 1, 0, 2]
    assert data.class_names == ["x", "y", "z"]  # `all` is no class
    data = folder_of(paths, batch_size=4, shuffle=False, check=False, drop_remainder=False)
    assert values_of(pickle.loads(pickle.dumps(data))[0]) == [0, 1, 2, 3]
    assert sum(len(values_of(part[0])) for part in data.split(0.5)) == 4


def test_one_class_in_a_tar_file_keeps_its_name(tmp_path):
    write_tar(tmp_path / "a.tar", {"./all/x/0.png": 0, "./all/x/1.png": 1})
    data = folder_of(tmp_path / "a.tar", batch_size=2, labels="folders", shuffle=False)
    assert data.class_names == ["x"] and data[0][1].tolist() == [0, 0]
    write_tar(tmp_path / "b.tar", {"x/0.png": 0, "1.png": 1})
    with pytest.raises(ValueError, match=r'labels="folders".*b.tar/1.png'):
        folder_of(tmp_path / "b.tar", batch_size=2, labels="folders")


def test_a_file_lost_inside_a_tar_file_does_not_stop_training(tmp_path):
    write_tar(tmp_path / "a.tar", {"0.png": 0, "1.png": b"no image", "2.png": 2})
    data = folder_of(tmp_path / "a.tar", shuffle=False, check=False)
    with pytest.warns(UserWarning, match="Replaced 1 files.* First: .*a.tar/1.png"):
        assert values_of(data[0]) == [0, 2, 2]


def test_paths_that_do_not_go_together(tmp_path):
    write_plain(tmp_path / "in", 1)
    write_tar(tmp_path / "a.tar", {"0.png": 0})
    with pytest.raises(ValueError, match="must all be tar files. Received a folder.*in"):
        folder_of([tmp_path / "a.tar", tmp_path / "in"])
    with pytest.raises(ValueError, match=r"existing folder.*Received: \[\]"):
        folder_of([])
    with pytest.raises(ValueError, match="No readable image in 2 tar files: 2 files seen, 0 of"):
        write_tar(tmp_path / "b.tar", {"0.txt": b""})
        write_tar(tmp_path / "c.tar", {"0.txt": b""})
        folder_of([tmp_path / "b.tar", tmp_path / "c.tar"])


# ---- batches ----


def test_labels_number_the_subfolders(tmp_path):
    write_plain(tmp_path / "cat" / "deep", 2, start=3)
    write_plain(tmp_path / "ant", 3)
    write_plain(tmp_path / "dog", 2, start=5)
    data = folder_of(tmp_path, batch_size=7, labels="folders", shuffle=False)
    images, labels = data[0]
    assert data.class_names == ["ant", "cat", "dog"]
    assert labels.dtype == "int32" and labels.tolist() == [0, 0, 0, 1, 1, 2, 2]
    assert values_of(images) == [0, 1, 2, 3, 4, 5, 6]
    images, labels = folder_of(tmp_path, batch_size=7, labels="folders", seed=1)[0]
    assert [0 if v < 3 else 1 if v < 5 else 2 for v in values_of(images)] == labels.tolist()


def epoch_of(data):
    return [values_of(batch) for batch in data]


def test_order_follows_seed_and_position(tmp_path):
    write_plain(tmp_path, 12)
    data, same, other = (folder_of(tmp_path, seed=seed) for seed in (7, 7, 8))
    first = epoch_of(data)
    assert sorted(sum(first, [])) == list(range(12)) != sum(first, [])
    assert epoch_of(data) == first == epoch_of(same) != epoch_of(other)
    data.on_epoch_end()
    second = epoch_of(data)
    assert sorted(sum(second, [])) == list(range(12)) and second != first
    same.position = len(same)  # as when training resumes
    assert epoch_of(same) == second


def test_default_seed_comes_from_python(tmp_path):
    write_plain(tmp_path, 12)
    orders = []
    for seed in (3, 3, 4):
        random.seed(seed)
        orders.append(epoch_of(folder_of(tmp_path)))
    assert orders[0] == orders[1] != orders[2]


@pytest.mark.parametrize(
    "count, drop_remainder, sizes", [(8, True, [3, 3]), (8, False, [3, 3, 2]), (6, False, [3, 3])]
)
def test_last_batch(tmp_path, count, drop_remainder, sizes):
    write_plain(tmp_path, count)
    data = folder_of(tmp_path, drop_remainder=drop_remainder)
    assert [len(batch) for batch in data] == sizes
    assert len(data) == data.num_batches == len(sizes)
    with pytest.raises(IndexError, match=f"index={len(sizes)}"):
        data[len(sizes)]


def test_split_shares_out_every_image(tmp_path):
    write_plain(tmp_path / "a", 5)
    write_plain(tmp_path / "b", 6, start=5)
    data = folder_of(tmp_path, labels="folders", seed=2)
    train, held_out = data.split(0.4)
    again, _ = data.split(0.4)
    other, _ = data.split(0.4, seed=1)
    assert train.files == again.files != other.files
    assert len(train.files) == 7 and len(train) == 2 and len(held_out) == 2
    values = [value for images, _ in held_out for value in values_of(images)]
    labels = [label for _, labels in held_out for label in labels]
    assert len(values) == 4 and values == sorted(values)
    assert labels == [int(value >= 5) for value in values]
    assert sorted(train.files + held_out.files) == data.files
    assert train.unreadable is data.unreadable and train.class_names == ["a", "b"]


def test_batches_of_a_list_of_files(tmp_path):
    write_plain(tmp_path, 3)
    files = [str(tmp_path / f"{i:02}.png") for i in (2, 0, 1)]
    data = ImageBatches(files, SIZE, 2, labels=[5, 3, 4], shuffle=False, drop_remainder=False)
    batches = [(values_of(images), labels.tolist()) for images, labels in data]
    assert batches == [([2, 0], [5, 3]), ([1], [4])]


# ---- reading ahead ----


@pytest.fixture
def decoded(monkeypatch):
    """The names of the files that have been decoded, in the order in which that began."""
    names, load = [], data_module.load_image

    def spy(path, image_size):
        names.append(os.path.basename(path))
        return load(path, image_size)

    monkeypatch.setattr(data_module, "load_image", spy)
    return names


def settled(names, count):
    """Whether `count` files have been decoded and no more are."""
    end = time.monotonic() + 5
    while len(names) < count and time.monotonic() < end:
        time.sleep(0.002)
    time.sleep(0.05)
    return len(names) == count


def ahead_of(tmp_path, count=12, **kwargs):
    write_plain(tmp_path, count)
    return folder_of(tmp_path, **{"check": False, "shuffle": False, "batch_size": 2, **kwargs})


@pytest.mark.parametrize("prefetch", [0, 1, 3])
def test_decodes_the_next_batches_and_no_more(tmp_path, decoded, prefetch):
    data = ahead_of(tmp_path, prefetch=prefetch)
    assert values_of(data[0]) == [0, 1] and settled(decoded, 2 + 2 * prefetch)
    assert values_of(data[1]) == [2, 3] and settled(decoded, 4 + 2 * prefetch)
    assert [values_of(data[i]) for i in range(2, 6)] == [[4, 5], [6, 7], [8, 9], [10, 11]]
    assert settled(decoded, 12) and sorted(decoded) == [f"{i:02}.png" for i in range(12)]
    assert data._ahead == {}


def test_reading_ahead_changes_no_batch(tmp_path):
    epochs = []
    for prefetch in (0, 2, 100):
        data = ahead_of(tmp_path, shuffle=True, seed=3, prefetch=prefetch)
        epochs.append([])
        for _ in range(3):
            epochs[-1].append(epoch_of(data))
            data.on_epoch_end()
    assert epochs[0] == epochs[1] == epochs[2] and epochs[0][0] != epochs[0][1]


def test_a_new_position_drops_what_was_decoded_for_the_old_one(tmp_path, decoded):
    data = ahead_of(tmp_path, shuffle=True, seed=3, prefetch=2)
    first = values_of(data[0])
    data.position = 60
    second = epoch_of(data)
    assert data._ahead == {} and sorted(sum(second, [])) == list(range(12))
    data.position = 0
    assert values_of(data[0]) == first != second[0]


def test_batches_out_of_turn_are_not_followed(tmp_path, decoded):
    data = ahead_of(tmp_path, prefetch=2)
    assert values_of(data[4]) == [8, 9] and settled(decoded, 2)
    assert values_of(data[0]) == [0, 1] and settled(decoded, 8)
    assert values_of(data[5]) == [10, 11] and settled(decoded, 10)  # as `fit` looks at the last
    assert values_of(data[0]) == [0, 1] and settled(decoded, 12)  # 1 and 2 are still there
    assert values_of(data[1]) == [2, 3] and settled(decoded, 14)


@pytest.mark.parametrize("settings", [{"workers": 2}, {"use_multiprocessing": True}])
def test_where_keras_reads_ahead_this_does_not(tmp_path, decoded, settings):
    write_plain(tmp_path, 6)
    files = sorted(str(path) for path in tmp_path.iterdir())
    data = ImageBatches(files, SIZE, 2, shuffle=False, prefetch=2, **settings)
    assert values_of(data[0]) == [0, 1] and settled(decoded, 2)


def test_threads_stay_while_needed_and_end_with_the_data(tmp_path):
    before = set(threading.enumerate())
    data = ahead_of(tmp_path, num_threads=3)
    for _ in range(4):
        epoch_of(data)
    threads = set(threading.enumerate()) - before
    assert len(threads) == 3
    del data
    gc.collect()
    for thread in threads:
        thread.join(timeout=5)
    assert not set(threading.enumerate()) - before


def test_an_error_while_reading_ahead_comes_with_its_batch(tmp_path, monkeypatch):
    data = ahead_of(tmp_path, prefetch=2)
    load = data_module.load_image

    def fail(path, image_size):
        if path.endswith(("02.png", "03.png")):
            raise KeyboardInterrupt  # no fault of a file
        return load(path, image_size)

    monkeypatch.setattr(data_module, "load_image", fail)
    assert values_of(data[0]) == [0, 1]
    with pytest.raises(KeyboardInterrupt):
        data[1]
    assert values_of(data[2]) == [4, 5]


def test_pickled_in_the_middle_of_an_epoch(tmp_path):
    data = ahead_of(tmp_path, shuffle=True, seed=2)
    expected = epoch_of(data)
    data[0]
    copy = pickle.loads(pickle.dumps(data))
    assert [values_of(copy[i]) for i in range(1, 6)] == expected[1:]


class Counter(keras.Model):
    """Its weights count down how often each image came."""

    def __init__(self, count):
        super().__init__()
        self.counts = self.add_weight(shape=(count,), initializer="zeros", name="counts")

    def call(self, images):
        values = keras.ops.cast(images[:, 0, 0, 0], "int32")
        seen = keras.ops.one_hot(values, self.counts.shape[0])
        return keras.ops.sum(seen * self.counts, axis=-1)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        return keras.ops.sum(y_pred)


@pytest.mark.parametrize("settings", [{}, {"prefetch": 0}, {"cache": True}])
def test_fit_sees_every_image_once_per_epoch(tmp_path, settings):
    write_plain(tmp_path, 9)
    data = folder_of(tmp_path, seed=1, **settings)
    model = Counter(9)
    model.compile(optimizer=keras.optimizers.SGD(1.0))  # each sight of an image subtracts one
    for epochs in (1, 2):
        model.fit(data, epochs=epochs, initial_epoch=epochs - 1, verbose=0)
        counts = keras.ops.convert_to_numpy(model.counts)
        np.testing.assert_array_equal(counts, np.full(9, -epochs))


def test_resumed_fit_sees_the_order_of_an_uninterrupted_one(tmp_path):
    write_plain(tmp_path, 12)
    files = [str(path) for path in sorted(tmp_path.iterdir())]
    model = Counter(12)
    model.compile(optimizer="sgd")

    class Recorder(ImageBatches):
        seen = ()

        def __getitem__(self, index):
            images = super().__getitem__(index)
            self.seen += tuple(values_of(images))
            return images

    def last_epoch(start, end):
        data = Recorder(files, SIZE, 3, seed=5)
        data.position = start * len(data)
        model.fit(data, initial_epoch=start, epochs=end, shuffle=False, verbose=0)
        return data.seen[-12:]

    assert last_epoch(0, 3) == last_epoch(2, 3) != last_epoch(0, 2)
    assert sorted(last_epoch(0, 2)) == list(range(12))


def test_verbose_shows_progress(tmp_path, capsys):
    write_plain(tmp_path, 3)
    folder_of(tmp_path)
    assert capsys.readouterr().out == ""
    folder_of(tmp_path, verbose=1)
    assert "3/3" in capsys.readouterr().out


# ---- bad input ----


def test_folder_without_images_says_what_is_there(tmp_path):
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(ValueError) as error:
        folder_of(tmp_path)
    message = str(error.value)
    assert f"{tmp_path}: 1 files seen, 0 of them" in message and ".jpeg" in message


def test_folder_of_broken_images_says_why(tmp_path):
    break_files(tmp_path)
    with pytest.raises(ValueError, match=r"(?s)4 files seen, 4 of them .* First: .*truncated"):
        folder_of(tmp_path)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"image_size": 0}, "positive int or a pair"),
        ({"image_size": (8, 8, 3)}, r"image_size=\(8, 8, 3\)"),
        ({"image_size": 0.5}, "image_size=0.5"),
        ({"batch_size": 0}, "at least 1. Received: batch_size=0"),
        ({"batch_size": 6}, "5 readable images with batch_size=6.*drop_remainder=False"),
        ({"labels": "names"}, "labels='names'"),
        ({"prefetch": -1}, "at least 0. Received: prefetch=-1"),
        ({"num_threads": 0, "check": False}, "at least 1. Received: num_threads=0"),
        ({"cache": "images.npz"}, "ending in .npy. Received: cache='images.npz'"),
        ({"labels": "folders"}, "00.png. Use `labels=None`"),
        ({"directory": "absent"}, "existing folder.*Received: absent"),
    ],
)
def test_bad_arguments(tmp_path, arguments, message):
    write_plain(tmp_path, 5)
    valid = {"directory": tmp_path, "image_size": SIZE, "batch_size": 2, "verbose": 0}
    with pytest.raises(ValueError, match=message):
        image_folder(**{**valid, **arguments})


def test_bad_lists_and_splits(tmp_path):
    with pytest.raises(ValueError, match="2 labels, 1 files"):
        ImageBatches(["a.png"], SIZE, 1, labels=[0, 1])
    with pytest.raises(ValueError, match="0 readable images with batch_size=4"):
        ImageBatches([], SIZE, 4, drop_remainder=False)
    data = ImageBatches(["a.png", "b.png"], SIZE, 1)
    for fraction in (0.0, 1.0, 0.1):
        with pytest.raises(ValueError, match=f"fraction={fraction} of 2 images"):
            data.split(fraction)


def test_the_docstring_reads_tfrecord_files(tmp_path):
    import tensorflow as tf

    paths = [str(tmp_path / "a.tfrecord")]
    with tf.io.TFRecordWriter(paths[0]) as writer:
        for value in range(64):
            jpeg = tf.io.encode_jpeg(np.full((30, 40, 3), 2 * value, "uint8")).numpy()
            feature = tf.train.Feature(bytes_list=tf.train.BytesList(value=[jpeg]))
            features = tf.train.Features(feature={"image/encoded": feature})
            writer.write(tf.train.Example(features=features).SerializeToString())
    (code,) = re.findall(r"```python\n(.*?)```", image_folder.__doc__, re.DOTALL)
    names = {"tf": tf, "keras": keras, "paths": paths}
    exec("\n".join(line[4:] for line in code.splitlines()), names)
    (batch,) = names["data"].as_numpy_iterator()
    assert batch.shape == (64, 256, 256, 3) and batch.dtype == "uint8"
    assert np.abs(batch.mean(axis=(1, 2, 3)) - 2 * np.arange(64)).max() <= 2
