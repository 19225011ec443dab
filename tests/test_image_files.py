import io
import os
import pickle
import tarfile

import numpy as np
import pytest
from PIL import Image

from keras_dinov3.image_files import find_tarred_files, load_image

SIZE = (6, 10)  # height, width


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), "uint8")


def plain(value):
    return Image.new("RGB", (SIZE[1], SIZE[0]), (value,) * 3)


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


# ---- tar files ----


def tar_of(path, members):
    """Writes a tar file of `(name, content)`, or of ready `TarInfo`s, and returns its path."""
    with tarfile.open(path, "w") as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                name, content = member
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return str(path)


def test_finds_and_opens_members(tmp_path):
    long = "x" * 120 + "/" + "y" * 130  # longer than the oldest format allows
    contents = {"b/1": b"one", "a": b"", f"{long}/2": b"two" * 400, "b.c/3": b"three", "é": b"4"}
    archive = tar_of(tmp_path / "a.tar", contents.items())
    found = find_tarred_files(archive)
    order = ["a", "b/1", "b.c/3", f"{long}/2", "é"]  # as of folders, whose names are compared
    assert [str(file) for file, _ in found] == [f"{archive}/{name}" for name in order]
    assert [folders for _, folders in found][1:3] == [("b",), ("b.c",)]
    assert [file.open().read() for file, _ in found] == [contents[name] for name in order]
    again = pickle.loads(pickle.dumps(found[3][0]))
    assert again == found[3][0] and again.open().read() == b"two" * 400


def test_odd_members_are_left_out_and_odd_names_lead_nowhere(tmp_path):
    odd = []
    for name, kind in (("s", "SYMTYPE"), ("h", "LNKTYPE"), ("c", "CHRTYPE"), ("f", "FIFOTYPE")):
        info = tarfile.TarInfo(f"{name}.png")
        info.type, info.linkname = getattr(tarfile, kind), "/etc/passwd"
        odd.append(info)
    folder = tarfile.TarInfo("folder.png")
    folder.type = tarfile.DIRTYPE
    names = ["/etc/x.png", "../../up/y.png", "a/../z.png", "./w.png", ".hid/v.png", "a/.u.png"]
    (tmp_path / "at").mkdir()
    archive = tar_of(tmp_path / "at" / "a.tar", [*odd, folder, *((n, b"") for n in names)])
    found = [file.removeprefix(archive) for file, _ in find_tarred_files(archive)]
    assert found == ["/a/z.png", "/etc/x.png", "/up/y.png", "/w.png"]
    assert os.listdir(tmp_path) == ["at"] and os.listdir(tmp_path / "at") == ["a.tar"]


def test_the_last_of_two_members_with_one_name_counts(tmp_path):
    archive = tar_of(tmp_path / "a.tar", [("x", b"old"), ("y", b"-"), ("./x", b"new")])
    assert [f.open().read() for f, _ in find_tarred_files(archive)] == [b"new", b"-"]


@pytest.mark.parametrize("mode, program", [("gz", "gunzip"), ("bz2", "bunzip2"), ("xz", "unxz")])
def test_compressed_tar_files(tmp_path, mode, program):
    path = tmp_path / "a.tar"
    with tarfile.open(path, f"w:{mode}") as tar:
        tar.addfile(tarfile.TarInfo("x"))
    with pytest.raises(ValueError, match=f"not be compressed.*a.tar.*`{program} .*a.tar`"):
        find_tarred_files(str(path))


def test_damaged_tar_files(tmp_path):
    """Cut off anywhere, or with a broken header anywhere, it is an error, and never a short list.

    Members of 700 bytes take 512 + 1024 bytes each, and 1024 zero bytes end the archive.
    """
    path = tmp_path / "a.tar"
    whole = tar_of(path, [(name, bytes(700)) for name in "abc"])
    content = path.read_bytes()
    assert len(find_tarred_files(whole)) == 3 and not any(content[3 * 1536 :])
    for length in (100, 600, 1400, 1536, 1536 + 200, 3 * 1536 - 600, 3 * 1536):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match="Tar file cut off or damaged: .*a.tar|no tar file"):
            find_tarred_files(whole)
    for start in (0, 1536, 2 * 1536):
        path.write_bytes(content[:start] + b"\7" * 512 + content[start + 512 :])
        with pytest.raises(ValueError, match="damaged"):
            find_tarred_files(whole)
    path.write_bytes(b"no tar file" * 100)
    with pytest.raises(ValueError, match="`directory` must be a folder, or one or several tar"):
        find_tarred_files(whole)


def test_an_archive_that_became_shorter(tmp_path):
    archive = tar_of(tmp_path / "a.tar", [("x", b"123456")])
    ((file, _),) = find_tarred_files(archive)
    os.truncate(archive, file.start + 5)
    with pytest.raises(OSError, match="a.tar has become shorter"):
        file.open()
