import os
import random
import warnings

import keras
import numpy as np
import pytest
from PIL import Image

from keras_dinov3.data import ImageBatches, image_folder, load_image

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


# ---- one image ----


def test_image_of_the_right_size_is_unchanged(tmp_path):
    pixels = noise(*SIZE)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    np.testing.assert_array_equal(load_image(tmp_path / "a.png", SIZE), pixels)


@pytest.mark.parametrize("height, width, kept", [(6, 16, np.s_[:, 3:13]), (12, 10, np.s_[3:9])])
def test_crops_around_the_centre(tmp_path, height, width, kept):
    pixels = noise(height, width)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    np.testing.assert_array_equal(load_image(tmp_path / "a.png", SIZE), pixels[kept])


def test_covers_the_size_when_enlarging_and_reducing(tmp_path):
    ramp = np.linspace(20, 220, 64).astype("uint8")
    pixels = np.broadcast_to(ramp[:, None, None], (64, 128, 3))  # brighter downwards
    Image.fromarray(pixels).save(tmp_path / "a.png")
    for side in (8, 200):
        image = load_image(tmp_path / "a.png", side).astype("float32")
        assert image.shape == (side, side, 3)
        expected = 20 + 200 * (np.arange(side) + 0.5) / side
        assert np.abs(image - expected[:, None, None]).max() < 200 / side + 4


def test_large_jpeg_looks_as_if_decoded_in_full(tmp_path):
    y, x = np.mgrid[:640, :960] / 640
    waves = [np.sin(170 * x + 30 * y), np.cos(190 * y), np.sin(80 * x * y)]
    pixels = (127 + 100 * np.stack(waves, -1)).astype("uint8")
    image = Image.fromarray(pixels)
    image.save(tmp_path / "a.jpg", quality=95)
    expected = np.asarray(image.crop((160, 0, 800, 640)).resize((90, 90), Image.Resampling.BICUBIC))
    error = np.abs(load_image(tmp_path / "a.jpg", 90).astype("int32") - expected)
    assert error.mean() < 1.5 and expected.std() > 60


@pytest.mark.parametrize(
    "orientation, upright",
    [
        (1, lambda stored: stored),
        (2, lambda stored: stored[:, ::-1]),
        (3, lambda stored: stored[::-1, ::-1]),
        (4, lambda stored: stored[::-1]),
        (5, lambda stored: stored.transpose(1, 0, 2)),
        (6, lambda stored: np.rot90(stored, -1)),
        (7, lambda stored: stored[::-1, ::-1].transpose(1, 0, 2)),
        (8, lambda stored: np.rot90(stored)),
    ],
)
def test_applies_the_orientation_tag(tmp_path, orientation, upright):
    stored = noise(*SIZE)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(stored).save(tmp_path / "a.png", exif=exif)
    expected = upright(stored)
    np.testing.assert_array_equal(load_image(tmp_path / "a.png", expected.shape[:2]), expected)


def saved_modes():
    """Pillow mode, file name, image, and the RGB of its only colour."""
    size = (SIZE[1], SIZE[0])
    palette = Image.new("P", size, 1)
    palette.putpalette([0, 0, 0, 10, 200, 30])
    transparent = palette.copy()
    transparent.info["transparency"] = 1
    grey16 = np.full(SIZE, 200 * 257, "uint16")
    ramp = np.full(SIZE, -3.0, "float32")
    ramp[0, 0] = 7.0  # only here to give the range
    return [
        ("1", "a.png", Image.new("1", size, 1), (255, 255, 255)),
        ("L", "a.png", Image.new("L", size, 40), (40, 40, 40)),
        ("LA", "a.png", Image.new("LA", size, (40, 0)), (255, 255, 255)),
        ("P", "a.gif", palette, (10, 200, 30)),
        ("P", "a.png", transparent, (255, 255, 255)),
        ("RGBA", "a.png", Image.new("RGBA", size, (50, 100, 150, 255)), (50, 100, 150)),
        ("RGBA", "a.webp", Image.new("RGBA", size, (0, 0, 0, 0)), (255, 255, 255)),
        ("RGBA", "a.tif", Image.new("RGBA", size, (0, 0, 0, 51)), (204, 204, 204)),
        ("CMYK", "a.tif", Image.new("CMYK", size, (0, 255, 0, 0)), (255, 0, 255)),
        ("I;16", "a.png", Image.fromarray(grey16), (200, 200, 200)),
        ("I", "a.pgm", Image.fromarray(grey16.astype("int32")), (200, 200, 200)),
        ("F", "a.tif", Image.fromarray(ramp), (0, 0, 0)),
    ]


@pytest.mark.parametrize("mode, name, image, colour", saved_modes())
def test_every_mode_becomes_rgb(tmp_path, mode, name, image, colour):
    image.save(tmp_path / name, **image.info)
    with Image.open(tmp_path / name) as opened:
        assert opened.mode == mode
    pixels = load_image(tmp_path / name, SIZE)
    assert pixels.shape == (*SIZE, 3) and pixels.dtype == "uint8"
    np.testing.assert_array_equal(pixels[-1, -1], colour)


def test_reads_float_range_despite_missing_values(tmp_path):
    values = np.full(SIZE, np.nan, "float32")
    values[0, :3] = [-2.0, 2.0, np.inf]
    Image.fromarray(values).save(tmp_path / "a.tif")
    pixels = load_image(tmp_path / "a.tif", SIZE)[..., 0]
    assert pixels[0, 0] == 0 and pixels[0, 1] == 255 and pixels[0, 2] == pixels[-1, -1] == 128


def test_takes_the_first_frame(tmp_path):
    plain(10).save(tmp_path / "a.gif", save_all=True, append_images=[plain(90)])
    assert (load_image(tmp_path / "a.gif", SIZE) == 10).all()


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
    assert sum(len(values_of(batch)) for part in cached.split(0.5) for batch in part) == 6


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


@pytest.mark.parametrize("cache", [False, True])
def test_fit_sees_every_image_once_per_epoch(tmp_path, cache):
    write_plain(tmp_path, 9)
    data = folder_of(tmp_path, seed=1, cache=cache)
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
        ({"labels": "folders"}, "00.png. Use `labels=None`"),
        ({"directory": "absent"}, "existing folder. Received: absent"),
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
