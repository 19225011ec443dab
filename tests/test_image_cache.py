import os

import numpy as np
import pytest
from PIL import Image

from keras_dinov3 import image_cache
from keras_dinov3.image_cache import read_images

SIZE = (4, 7)


def write(folder, count):
    """Plain images of values 0, 1, ...; the second one is broken."""
    paths = [str(folder / f"{value}.png") for value in range(count)]
    for value, path in enumerate(paths):
        Image.new("L", SIZE[::-1], value).save(path)
    (folder / "1.png").write_text("no image")
    return paths


def values_of(images):
    assert images.dtype == "uint8" and images.shape[1:] == (*SIZE, 3)
    return images[:, 0, 0, 0].tolist()


def read(files, cache):
    images, unreadable = read_images(files, SIZE, cache, num_threads=2, verbose=0)
    return None if images is None else values_of(images), [os.path.basename(p) for p in unreadable]


@pytest.fixture
def decoded(monkeypatch):
    names, load = [], image_cache.load_image
    monkeypatch.setattr(
        image_cache, "load_image", lambda path, size: names.append(path) or load(path, size)
    )
    return names


def test_keeps_those_that_can_be_read(tmp_path):
    files = write(tmp_path, 4)
    assert read(files, cache=False) == (None, ["1.png"])
    assert read(files, cache=True) == ([0, 2, 3], ["1.png"])


def test_a_file_is_used_again_until_something_changes(tmp_path, decoded):
    (tmp_path / "in").mkdir()
    files, path = write(tmp_path / "in", 4), tmp_path / "cache.npy"
    for _ in range(2):
        assert read(files, path) == ([0, 2, 3], ["1.png"])
        assert len(decoded) == 4
    assert sorted(os.listdir(tmp_path)) == ["cache.npy", "cache.npy.json", "in"]
    assert np.load(path).shape == (4, *SIZE, 3)

    Image.new("L", SIZE[::-1], 9).save(files[1])  # another size
    assert read(files, path) == ([0, 9, 2, 3], [])
    os.utime(files[1], ns=(0, 0))  # another time
    assert read(files, path) == ([0, 9, 2, 3], [])
    assert read(files[:2], path) == ([0, 9], [])  # other files
    assert len(decoded) == 4 + 4 + 4 + 2
    read_images(files[:2], (7, 4), path, None, 0)  # another size of the images
    assert len(decoded) == 4 + 4 + 4 + 2 + 2
    os.remove(path)
    assert read(files[:2], path) == ([0, 9], [])


def test_a_run_that_was_stopped_leaves_no_cache(tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    files, path = write(tmp_path / "in", 4), str(tmp_path / "cache.npy")
    assert read(files[2:], path) == ([2, 3], [])

    def stop(path, size):
        raise KeyboardInterrupt

    monkeypatch.setattr(image_cache, "load_image", stop)
    with pytest.raises(KeyboardInterrupt):
        read(files, path)
    assert read(files[2:], path) == ([2, 3], [])  # the old one is still whole
    monkeypatch.undo()
    assert read(files, path) == ([0, 2, 3], ["1.png"])


def test_no_other_file_is_overwritten(tmp_path):
    (tmp_path / "in").mkdir()
    files, path = write(tmp_path / "in", 2), tmp_path / "mine.npy"
    np.save(path, np.arange(3))
    with pytest.raises(ValueError, match="Received: .*mine.npy, which exists"):
        read(files, path)
    assert np.load(path).tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="ending in .npy"):
        read(files, tmp_path / "cache.zip")
