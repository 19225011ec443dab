"""Image files one by one: finding them in folders and in tar files, and decoding them."""

import io
import os
import tarfile

import numpy as np
from PIL import Image, ImageOps

from keras_dinov3.schedules import is_count

# Formats that Pillow names but opens only with another program, if at all.
NOT_DECODED = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
COMPRESSED = {  # how files start, and what unpacks them
    b"\x1f\x8b": "gunzip",
    b"BZh": "bunzip2",
    b"\xfd7zXZ\x00": "unxz",
    b"\x28\xb5\x2f\xfd": "unzstd",
}


class TarredFile(str):
    """A file inside an uncompressed tar file, as text `archive/name`; nothing is unpacked.

    Attributes:
        archive: Path of the tar file.
        start: Byte of the archive at which the file begins.
        length: Its length in bytes.
    """

    __slots__ = ("archive", "start", "length")

    def __new__(cls, text, archive, start, length):
        file = super().__new__(cls, text)
        file.archive, file.start, file.length = archive, start, length
        return file

    def __getnewargs__(self):
        return str(self), self.archive, self.start, self.length

    def open(self):
        """The contents, as a file in memory."""
        with open(self.archive, "rb") as archive:
            archive.seek(self.start)
            content = archive.read(self.length)
        if len(content) < self.length:
            raise OSError(f"{self.archive} has become shorter")
        return io.BytesIO(content)


def load_image(path, image_size):
    """Reads one image file of any format and mode that Pillow decodes.

    The camera's orientation tag is applied, transparency put on white, and the first frame of
    an animation taken. 16-bit grey keeps its full range; 32-bit integers and floats, which have
    no range of their own, are stretched from their least to their greatest value.

    Args:
        path: Path of the file, or a `TarredFile`.
        image_size: Int or `(height, width)` in pixels. The image is scaled (bicubic, with
            antialiasing) to cover this size and cropped around its centre.

    Returns:
        uint8 array `(height, width, 3)`, RGB.

    Raises:
        Exception: Of nearly any type, from Pillow, if the file is broken.
    """
    height, width = height_and_width(image_size)
    source = path.open() if isinstance(path, TarredFile) else path
    with Image.open(source) as image:
        # JPEG decodes at a fraction of its size for less; twice the target hides the difference.
        image.draft(None, (2 * max(height, width),) * 2)
        ImageOps.exif_transpose(image, in_place=True)
        image = to_rgb(image)
    return np.array(ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC))


def to_rgb(image):
    if image.mode == "F" or image.mode.startswith("I"):
        values = np.nan_to_num(np.asarray(image, "float32"), posinf=0.0, neginf=0.0)
        low, high = values.min(), values.max()
        if image.mode != "F" and 0 <= low and high <= 65535:
            low, high = 0, 65535
        values = (values - low) * (255 / max(high - low, np.finfo("float32").tiny))
        image = Image.fromarray(np.rint(values).astype("uint8"))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def find_all(directory):
    """Name of the data, and all files in a folder or in tar files with their folders, a tuple."""
    if isinstance(directory, (list, tuple)):
        archives = list(dict.fromkeys(os.fspath(path) for path in directory))
    else:
        archives = [os.fspath(directory)]
    missing = [path for path in archives if not os.path.exists(path)]
    if missing or not archives:
        raise ValueError(
            "`directory` must be an existing folder, or one or several tar files. "
            f"Received: {missing[0] if missing else directory}"
        )
    folders = [path for path in archives if os.path.isdir(path)]
    if folders and len(archives) > 1:
        raise ValueError(
            f"Several paths must all be tar files. Received a folder among them: {folders[0]}. "
            "A folder of links to all image folders would do."
        )
    if folders:
        files = list(find_files(*folders))
        names = [os.path.relpath(file, *folders).split(os.sep) for file in files]
        return folders[0], [(file, tuple(n[:-1])) for file, n in zip(files, names, strict=True)]
    seen = [pair for archive in archives for pair in find_tarred_files(archive)]
    inside = [folders for _, folders in seen]
    shared = os.path.commonprefix(inside)  # folders above all, which no name of a class is
    depth = len(shared[:-1] if all(folders == shared for folders in inside) else shared)
    name = archives[0] if len(archives) == 1 else f"{len(archives)} tar files"
    return name, [(file, folders[depth:]) for file, folders in seen]


def classes_of(found):
    """The first folder of each file, from a dict of files and their folders."""
    for file, folders in found.items():
        if not folders:
            raise ValueError(
                '`labels="folders"` needs every image in a subfolder of `directory`, which names '
                f"its class. Received: {file}. Use `labels=None` for images without classes."
            )
    return [folders[0] for folders in found.values()]


def find_files(folder, above=frozenset()):
    """Yields the paths of all files below `folder` that are not hidden, sorted by name."""
    here = os.path.realpath(folder)
    if here in above:  # a link that leads back up
        return
    with os.scandir(folder) as entries:
        entries = sorted(entries, key=lambda entry: entry.name)
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from find_files(entry.path, above | {here})
        else:
            yield entry.path


def image_suffixes():
    """Suffixes that Pillow and its plugins read, asked anew since plugins may be added."""
    Image.init()
    return {
        suffix
        for suffix, name in Image.registered_extensions().items()
        if name in Image.OPEN and name not in NOT_DECODED
    }


def find_tarred_files(archive):
    """Lists the files in a tar file that are not hidden, in the order of an unpacked folder.

    Only their places are read. Links, devices and the like are left out. Names lead nowhere
    outside: of absolute ones and of `..` what remains is the name inside the archive. Of files
    with one name the last counts, as when unpacking.

    Returns:
        List of pairs: a `TarredFile` and the tuple of the folders that it is in.

    Raises:
        ValueError: If it is no tar file, or compressed, or cut off or damaged.
    """
    check_is_tar(archive)
    found = {}
    try:
        with tarfile.open(archive, "r:") as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # it would keep a large object for each
                parts = tuple(p for p in member.name.split("/") if p not in ("", ".", ".."))
                is_hidden = any(part.startswith(".") for part in parts)
                if parts and not is_hidden and member.isreg() and not member.issparse():
                    text = "/".join([archive, *parts])
                    found[parts] = TarredFile(text, archive, member.offset_data, member.size)
            end = tar.offset
    except (tarfile.TarError, ValueError, OverflowError) as error:
        raise damaged(archive, str(error)) from error
    # `tarfile` takes a damaged header for the end; there are two empty blocks at the real one
    with open(archive, "rb") as file:
        file.seek(end)
        block = file.read(512)
    if len(block) < 512 or any(block):
        raise damaged(archive, f"no end of archive at byte {end}, after {len(found)} files")
    return [(found[parts], parts[:-1]) for parts in sorted(found)]


def check_is_tar(archive):
    with open(archive, "rb") as file:
        start = file.read(512)
    for magic, program in COMPRESSED.items():
        if start.startswith(magic):
            raise ValueError(
                "Tar files must not be compressed, since images are read from any place in them "
                f"(JPEG and PNG hardly shrink anyway). Received: {archive}. To decompress it once: "
                f"`{program} {archive}`."
            )
    if not tarfile.is_tarfile(archive):
        raise ValueError(
            f"`directory` must be a folder, or one or several tar files. Received: {archive}, "
            "a file that is no tar file, or whose start is damaged."
        )


def damaged(archive, why):
    return ValueError(
        f"Tar file cut off or damaged: {archive} ({why}). Copy or make it again; "
        f"`tar -tf {archive}` lists what can be read."
    )


def height_and_width(image_size):
    size = tuple(image_size) if hasattr(image_size, "__len__") else (image_size, image_size)
    if len(size) != 2 or not all(is_count(side, at_least=1) for side in size):
        raise ValueError(
            "`image_size` must be a positive int or a pair (height, width) of them, in pixels. "
            f"Received: image_size={image_size}."
        )
    return size


def reason(error, path):
    """What the error says, without the path that Pillow and the system put into it."""
    return str(error).replace(repr(path), "").strip(": ") or type(error).__name__


def first_few(unreadable):
    names = [f"{path} ({why})" for path, why in list(unreadable.items())[:3]]
    return f" First: {', '.join(names)}." if names else ""
