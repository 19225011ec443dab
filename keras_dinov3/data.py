"""Image folders in, batches out; files that cannot be read are skipped and counted."""

import os
import random
import warnings
from concurrent.futures import ThreadPoolExecutor

import keras
import numpy as np
from PIL import Image, ImageOps

from keras_dinov3.schedules import check_count, is_count

# Formats that Pillow names but opens only with another program, if at all.
NOT_DECODED = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}


def image_folder(
    directory,
    image_size,
    batch_size,
    labels=None,
    shuffle=True,
    seed=None,
    drop_remainder=True,
    check=True,
    cache=False,
    num_threads=None,
    verbose=1,
):
    """Batches of the images in a folder and its subfolders, for `fit`.

    A file counts as an image if Pillow knows its suffix; hidden files and folders are left out,
    links are followed. Every such file is decoded once at the start, in parallel. Those that
    cannot be, and therefore are skipped, are counted in one warning and named in `.unreadable`.

    Args:
        directory: Path of the folder.
        image_size: Int or `(height, width)` in pixels. Images are scaled to cover this size,
            keeping their aspect ratio, and cropped around their centre.
        batch_size: Int. Images in a batch.
        labels: `None` for images alone, or `"folders"`: the subfolders of `directory` are the
            classes, numbered in the order of their names, and batches are `(images, labels)`.
        shuffle: Whether to draw a new order for each epoch.
        seed: Int for that order. Default: from `random`, which `keras.utils.set_random_seed` seeds.
        drop_remainder: Whether to leave out a short last batch (other images in each epoch, if
            shuffled). Training needs equal batches; for evaluation pass `False`.
        check: Whether to decode all files at the start. If false, which saves that pass over a
            very large folder, a broken file is found when its turn comes and the next one that
            can be read takes its place.
        cache: Whether to keep the decoded images in memory: `height * width * 3` bytes each.
        num_threads: Int. Threads that decode, here and during `fit`. Default: one per CPU core.
        verbose: 1 shows a progress bar during the check, 0 does not.

    Returns:
        `ImageBatches`, a `keras.utils.PyDataset`.

    Raises:
        ValueError: If `directory` is not a folder or holds no readable image, if an argument
            is out of range, or if `labels="folders"` meets an image outside of a subfolder.
    """
    directory = os.fspath(directory)
    if not os.path.isdir(directory):
        raise ValueError(f"`directory` must be an existing folder. Received: {directory}")
    if labels not in (None, "folders"):
        raise ValueError(f'`labels` must be None or "folders". Received: labels={labels!r}.')
    image_size = height_and_width(image_size)
    suffixes = image_suffixes()
    seen = list(find_files(directory))
    files = [path for path in seen if os.path.splitext(path)[1].lower() in suffixes]
    class_names = None
    if labels == "folders":
        classes = [top_folder(path, directory) for path in files]
        class_names = sorted(set(classes))

    images, unreadable = None, {}
    if check or cache:
        images, unreadable = read_images(files, image_size, cache, num_threads, verbose)
    if len(unreadable) == len(files):
        raise ValueError(
            f"No readable image in {directory}: {len(seen)} files seen, {len(files)} of them with "
            f"the suffix of an image ({', '.join(sorted(suffixes))})." + first_few(unreadable)
        )
    if unreadable:
        warnings.warn(
            f"Skipped {len(unreadable)} of {len(files)} image files in {directory} because they "
            f"could not be read.{first_few(unreadable)} `.unreadable` names all.",
            stacklevel=2,
        )
    readable = [index for index, path in enumerate(files) if path not in unreadable]
    return ImageBatches(
        [files[index] for index in readable],
        image_size,
        batch_size,
        labels=class_names and [class_names.index(classes[index]) for index in readable],
        class_names=class_names,
        shuffle=shuffle,
        seed=seed,
        drop_remainder=drop_remainder,
        images=images,
        unreadable=unreadable,
        num_threads=num_threads,
    )


class ShuffledBatches(keras.utils.PyDataset):
    """Batches whose `order` is a function of `seed` and `position`, the steps made before."""

    def __init__(self, count, shuffle, seed, **kwargs):
        super().__init__(**kwargs)
        self.count = count
        self.shuffle = shuffle
        self.seed = random.randrange(2**31) if seed is None else seed
        self.position = 0

    @property
    def position(self):
        return self._position

    @position.setter
    def position(self, position):
        self._position = position
        self.order = np.arange(self.count)
        if self.shuffle:
            self.order = np.random.default_rng((self.seed, position)).permutation(self.order)

    def on_epoch_end(self):
        self.position += len(self)


class ImageBatches(ShuffledBatches):
    """Batches of image files: uint8 `(B, H, W, 3)`, or `(images, labels)`.

    `image_folder` makes one of a folder; make one yourself for files listed in another way.

    The order is a function of `seed` and `position`, the steps made before the epoch.
    `DINOv3.fit` sets it from the model's step, so that a resumed run goes on in the same order;
    elsewhere `on_epoch_end` counts it. Other models' `fit` by default also shuffles the batches
    as a whole, with Python's `random`; `fit(shuffle=False)` leaves them in the order given here.

    The images of a batch are decoded in parallel. With `workers` above 1 Keras reads ahead, but
    then (Keras 3.15 on PyTorch and JAX) repeats some batches and leaves out others.

    Args:
        files: List of paths.
        image_size: Int or `(height, width)` in pixels.
        batch_size: Int. Images in a batch.
        labels: List of ints, one per file, or `None`.
        class_names: List of strings that the labels number, or `None`.
        shuffle: Whether to draw a new order for each epoch.
        seed: Int for that order. Default: drawn from Python's `random`.
        drop_remainder: Whether to leave out a short last batch.
        images: List of the decoded images, uint8 `(H, W, 3)`, or `None` to read them from the
            files whenever they are needed.
        unreadable: Dict of the paths already found unreadable and the reasons, or `None`.
        num_threads: Int. Threads that decode a batch. Default: one per CPU core.
        **kwargs: Keyword arguments of `keras.utils.PyDataset`: `workers`,
            `use_multiprocessing`, `max_queue_size`.

    Attributes:
        unreadable: Dict from path to reason. A file that fails only later is added, with a
            warning (not with `use_multiprocessing`, where it stays in the other process), and
            the next file that can be read takes its place, so that batches stay full.

    Raises:
        ValueError: If there are not enough files for a batch, or not as many labels as files.
    """

    def __init__(
        self,
        files,
        image_size,
        batch_size,
        labels=None,
        class_names=None,
        shuffle=True,
        seed=None,
        drop_remainder=True,
        images=None,
        unreadable=None,
        num_threads=None,
        **kwargs,
    ):
        super().__init__(len(files), shuffle, seed, **kwargs)
        check_count("batch_size", batch_size, at_least=1)
        if len(files) < (batch_size if drop_remainder else 1):
            raise ValueError(
                f"There must be at least one batch. Received: {len(files)} readable images with "
                f"batch_size={batch_size}. A smaller batch, or `drop_remainder=False`, would do."
            )
        if labels is not None and len(labels) != len(files):
            raise ValueError(
                "There must be one label per file. "
                f"Received: {len(labels)} labels, {len(files)} files."
            )
        self.files = list(files)
        self.image_size = height_and_width(image_size)
        self.batch_size = batch_size
        self.labels = None if labels is None else np.asarray(labels, "int32")
        self.class_names = class_names
        self.drop_remainder = drop_remainder
        self.images = images
        self.unreadable = {} if unreadable is None else unreadable
        self.num_threads = num_threads

    @property
    def num_batches(self):
        full, rest = divmod(len(self.files), self.batch_size)
        return full if self.drop_remainder or rest == 0 else full + 1

    def __len__(self):
        return self.num_batches

    def __getitem__(self, index):
        if not 0 <= index < len(self):
            raise IndexError(f"There are {len(self)} batches. Received: index={index}.")
        members = self.order[index * self.batch_size : (index + 1) * self.batch_size]
        if self.images is not None:
            images = [self.images[member] for member in members]
        else:
            known = len(self.unreadable)
            with ThreadPoolExecutor(self.num_threads or os.cpu_count()) as pool:
                images, members = zip(*pool.map(self._load, members), strict=True)
            new = dict(list(self.unreadable.items())[known:])
            if new:
                warnings.warn(
                    f"Replaced {len(new)} files that could not be read.{first_few(new)}",
                    stacklevel=2,
                )
        images = np.stack(images)
        return images if self.labels is None else (images, self.labels[list(members)])

    def _load(self, index):
        """The image at `index`, or the next one that can be read, and its index."""
        for candidate in (*range(index, len(self.files)), *range(index)):
            path = self.files[candidate]
            try:
                return load_image(path, self.image_size), candidate
            except Exception as error:  # Pillow's decoders raise nearly every type
                self.unreadable[path] = reason(error, path)
        raise ValueError(
            f"None of the {len(self.files)} files can be read." + first_few(self.unreadable)
        )

    def split(self, fraction, seed=0):
        """Two disjoint parts, for instance to hold out images for `callbacks.KNN`.

        Args:
            fraction: Float between 0 and 1. Share of the images in the second part.
            seed: Int that chooses them.

        Returns:
            Two `ImageBatches`: the first like this one; the second, held out, in the order of
            the files and with its short last batch.

        Raises:
            ValueError: If a part would hold no image.
        """
        held_out = round(fraction * len(self.files))
        if not 0 < held_out < len(self.files):
            raise ValueError(
                "Both parts of a split need an image. "
                f"Received: fraction={fraction} of {len(self.files)} images."
            )
        order = np.random.default_rng(seed).permutation(len(self.files))
        return (
            self._part(np.sort(order[held_out:]), self.shuffle, self.drop_remainder),
            self._part(np.sort(order[:held_out]), shuffle=False, drop_remainder=False),
        )

    def _part(self, members, shuffle, drop_remainder):
        return ImageBatches(
            [self.files[index] for index in members],
            self.image_size,
            self.batch_size,
            labels=None if self.labels is None else self.labels[members],
            class_names=self.class_names,
            shuffle=shuffle,
            seed=self.seed,
            drop_remainder=drop_remainder,
            images=None if self.images is None else [self.images[index] for index in members],
            unreadable=self.unreadable,
            num_threads=self.num_threads,
            workers=self.workers,
            use_multiprocessing=self.use_multiprocessing,
            max_queue_size=self.max_queue_size,
        )


def load_image(path, image_size):
    """Reads one image file of any format and mode that Pillow decodes.

    The camera's orientation tag is applied, transparency put on white, and the first frame of
    an animation taken. 16-bit grey keeps its full range; 32-bit integers and floats, which have
    no range of their own, are stretched from their least to their greatest value.

    Args:
        path: Path of the file.
        image_size: Int or `(height, width)` in pixels. The image is scaled (bicubic, with
            antialiasing) to cover this size and cropped around its centre.

    Returns:
        uint8 array `(height, width, 3)`, RGB.

    Raises:
        Exception: Of nearly any type, from Pillow, if the file is broken.
    """
    height, width = height_and_width(image_size)
    with Image.open(path) as image:
        # JPEG decodes at a fraction of its size for less; twice the target hides the difference.
        image.draft(None, (2 * max(height, width),) * 2)
        image = to_rgb(ImageOps.exif_transpose(image))
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


def read_images(files, image_size, keep, num_threads, verbose):
    """Decodes all files; returns the images (`None` if not to `keep`) and what went wrong."""

    def read(path):
        try:
            image = load_image(path, image_size)
        except Exception as error:  # Pillow's decoders raise nearly every type
            return None, reason(error, path)
        return (image if keep else None), None

    images, unreadable = [], {}
    progress = keras.utils.Progbar(len(files), verbose=verbose, interval=1.0, unit_name="image")
    with ThreadPoolExecutor(num_threads or os.cpu_count()) as pool:
        for start in range(0, len(files), 256):  # blocks, since `map` queues all it is given
            block = files[start : start + 256]
            for path, (image, error) in zip(block, pool.map(read, block), strict=True):
                if error:
                    unreadable[path] = error
                elif keep:
                    images.append(image)
            progress.update(start + len(block))
    return (images if keep else None), unreadable


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


def top_folder(path, directory):
    parts = os.path.relpath(path, directory).split(os.sep)
    if len(parts) == 1:
        raise ValueError(
            '`labels="folders"` needs every image in a subfolder of `directory`, which names its '
            f"class. Received: {path}. Use `labels=None` for images without classes."
        )
    return parts[0]


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
