"""Image folders and tar files in, batches out; broken files are skipped and counted."""

import os
import random
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import keras
import numpy as np

from keras_dinov3.image_cache import read_images
from keras_dinov3.image_files import (
    classes_of,
    find_all,
    first_few,
    height_and_width,
    image_suffixes,
    load_image,
    reason,
)
from keras_dinov3.schedules import check_count


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
    prefetch=2,
    num_threads=None,
    verbose=1,
):
    """Batches of the images in a folder and its subfolders, or in tar files, for `fit`.

    A file counts as an image if Pillow knows its suffix; hidden files and folders are left out,
    links are followed (not in tar files). Every such file is decoded once at the start, in
    parallel. Those that cannot be, and therefore are skipped, are counted in one warning and named
    in `.unreadable`. JPEGs much larger than needed are decoded at a fraction of their size.

    Tar files are read in place, at any member; nothing is unpacked.

    TFRecord files have a reader in TensorFlow, and `fit` takes its batches under every backend:

    ```python
    features = {"image/encoded": tf.io.FixedLenFeature([], tf.string)}
    read = lambda x: tf.io.decode_jpeg(tf.io.parse_single_example(x, features)["image/encoded"], 3)
    resize = keras.layers.Resizing(256, 256, crop_to_aspect_ratio=True, dtype="uint8")
    data = tf.data.TFRecordDataset(paths).map(lambda x: resize(read(x)), tf.data.AUTOTUNE)
    data = data.batch(64, drop_remainder=True).prefetch(2)
    ```

    Args:
        directory: Path of the folder, or of an uncompressed tar file, or a list of such files.
        image_size: Int or `(height, width)` in pixels. Images are scaled to cover this size,
            keeping their aspect ratio, and cropped around their centre.
        batch_size: Int. Images in a batch.
        labels: `None` for images alone, or `"folders"`: the subfolders of `directory` are the
            classes, numbered in the order of their names, and batches are `(images, labels)`. In
            tar files, folders that all images share do not count, unless there are no others.
        shuffle: Whether to draw a new order for each epoch.
        seed: Int for that order. Default: from `random`, which `keras.utils.set_random_seed` seeds.
        drop_remainder: Whether to leave out a short last batch (other images in each epoch, if
            shuffled). Training needs equal batches; for evaluation pass `False`.
        check: Whether to decode all files at the start. If false, which saves that pass over a
            very large folder, a broken file is found when its turn comes and the next one that
            can be read takes its place.
        cache: Whether to keep the decoded images in memory, in one uint8 array of
            `height * width * 3` bytes for each (`.images.nbytes` in all). A path ending in `.npy`:
            in this file instead, of which the system holds in memory what fits; it is used again
            by later runs, as long as the image files have the same names, sizes and times.
        prefetch: Int. Batches that are decoded ahead while the model trains on another.
        num_threads: Int. Threads that decode, here and during `fit`. Default: one per CPU core.
        verbose: 1 shows a progress bar during the check, 0 does not.

    Returns:
        `ImageBatches`, a `keras.utils.PyDataset`.

    Raises:
        ValueError: If `directory` is not there or holds no readable image, if a tar file is
            compressed or damaged, if an argument is out of range, or if `labels="folders"` meets
            an image outside of a subfolder.
    """
    if labels not in (None, "folders"):
        raise ValueError(f'`labels` must be None or "folders". Received: labels={labels!r}.')
    image_size = height_and_width(image_size)
    suffixes = image_suffixes()
    directory, seen = find_all(directory)
    found = {
        file: folders for file, folders in seen if os.path.splitext(file)[1].lower() in suffixes
    }
    files, class_names = list(found), None
    if labels == "folders":
        classes = classes_of(found)
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
        prefetch=prefetch,
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

    `image_folder` makes one of a folder or tar files; make one yourself for files listed in
    another way.

    The order is a function of `seed` and `position`, the steps made before the epoch.
    `DINOv3.fit` sets it from the model's step, so that a resumed run goes on in the same order;
    elsewhere `on_epoch_end` counts it. Other models' `fit` by default also shuffles the batches
    as a whole, with Python's `random`; `fit(shuffle=False)` leaves them in the order given here.

    The images of a batch are decoded in parallel, and so are those of the next `prefetch` batches
    while the model trains on this one. With `workers` above 1 Keras itself reads ahead instead, but
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
        images: The decoded images, uint8 `(n, H, W, 3)`, or `None` to read them from the files
            whenever they are needed.
        rows: List of ints: where in `images` each file's image is. `None`: in the files' order.
        unreadable: Dict of the paths already found unreadable and the reasons, or `None`.
        prefetch: Int. Batches that are decoded ahead, in the order of their use: `prefetch *
            batch_size * height * width * 3` bytes.
        num_threads: Int. Threads that decode. Default: one per CPU core.
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
        rows=None,
        unreadable=None,
        prefetch=2,
        num_threads=None,
        **kwargs,
    ):
        super().__init__(len(files), shuffle, seed, **kwargs)
        check_count("batch_size", batch_size, at_least=1)
        check_count("prefetch", prefetch)
        if num_threads is not None:
            check_count("num_threads", num_threads, at_least=1)
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
        self.rows = np.arange(len(files)) if rows is None else np.asarray(rows)
        self.unreadable = {} if unreadable is None else unreadable
        self.prefetch = prefetch
        self.num_threads = num_threads
        self._forget_threads()

    @property
    def num_batches(self):
        full, rest = divmod(len(self.files), self.batch_size)
        return full if self.drop_remainder or rest == 0 else full + 1

    def __len__(self):
        return self.num_batches

    def __getitem__(self, index):
        if not 0 <= index < len(self):
            raise IndexError(f"There are {len(self)} batches. Received: index={index}.")
        if self.images is not None:
            members = self._members(index)
            images = np.asarray(self.images[self.rows[members]])
        else:
            loaded = [future.result() for future in self._begin(index)]
            images, members, failed = zip(*loaded, strict=True)
            failed = {path: why for failures in failed for path, why in failures.items()}
            new = {path: why for path, why in failed.items() if path not in self.unreadable}
            self.unreadable.update(new)
            if new:
                warnings.warn(
                    f"Replaced {len(new)} files that could not be read.{first_few(new)}",
                    stacklevel=2,
                )
            images = np.stack(images)
        return images if self.labels is None else (images, self.labels[list(members)])

    def _members(self, index):
        return self.order[index * self.batch_size : (index + 1) * self.batch_size]

    def _begin(self, index):
        """Futures of the images of a batch; those of the batches after it are started too."""
        with self._lock:
            if self._pool is None or self._process != os.getpid():  # threads do not survive a fork
                self._pool = ThreadPoolExecutor(self.num_threads or os.cpu_count())
                self._process, self._ahead = os.getpid(), {}
            is_next = index in (0, self._last + 1)
            reads_ahead = is_next and self.workers <= 1 and not self.use_multiprocessing
            end = min(index + self.prefetch, len(self) - 1) if reads_ahead else index
            for key in list(self._ahead):
                position, batch = key
                if position != self.position or (reads_ahead and not index <= batch <= end):
                    for future in self._ahead.pop(key):
                        future.cancel()
            for batch in range(index, end + 1):
                if (self.position, batch) not in self._ahead:
                    work = [self._pool.submit(self._load, m) for m in self._members(batch)]
                    self._ahead[self.position, batch] = work
            self._last = index
            return self._ahead.pop((self.position, index))

    def _load(self, index):
        """The image at `index`, or the next one that can be read; its index; what failed."""
        failed = {}
        for candidate in (*range(index, len(self.files)), *range(index)):
            path = self.files[candidate]
            try:
                return load_image(path, self.image_size), candidate, failed
            except Exception as error:  # Pillow's decoders raise nearly every type
                failed[path] = reason(error, path)
        raise ValueError(
            f"None of the {len(self.files)} files can be read."
            + first_few({**self.unreadable, **failed})
        )

    def _forget_threads(self):
        self._lock = threading.Lock()
        self._pool = self._process = None
        self._ahead = {}  # futures of the images of a batch, by position and index
        self._last = -1  # index of the batch last asked for

    def __getstate__(self):
        state = self.__dict__.copy()
        for name in ("_lock", "_pool", "_process", "_ahead", "_last"):
            del state[name]
        if isinstance(self.images, np.memmap):
            state["images"] = self.images.filename
        return state

    def __setstate__(self, state):
        self.__dict__.update(state)
        if isinstance(self.images, str):
            self.images = np.load(self.images, mmap_mode="r")
        self._forget_threads()

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
            self.part(np.sort(order[held_out:]), self.shuffle, self.drop_remainder),
            self.part(np.sort(order[:held_out]), shuffle=False, drop_remainder=False),
        )

    def part(self, members, shuffle, drop_remainder):
        """The images at these positions of `files`, as batches of their own."""
        return ImageBatches(
            [self.files[index] for index in members],
            self.image_size,
            self.batch_size,
            labels=None if self.labels is None else self.labels[members],
            class_names=self.class_names,
            shuffle=shuffle,
            seed=self.seed,
            drop_remainder=drop_remainder,
            images=self.images,
            rows=self.rows[members],
            unreadable=self.unreadable,
            prefetch=self.prefetch,
            num_threads=self.num_threads,
            workers=self.workers,
            use_multiprocessing=self.use_multiprocessing,
            max_queue_size=self.max_queue_size,
        )
