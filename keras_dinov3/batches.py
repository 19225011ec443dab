"""Any kind of training data in, full batches out; Keras alone lets the last one be short."""

import copy
import itertools

import keras
import numpy as np

from keras_dinov3 import backend
from keras_dinov3.data import ShuffledBatches
from keras_dinov3.image_ops import check_value_range


def full_batches(data, batch_size=None, shuffle=False, seed=None):
    """Drops short last batches, so that every step has the same shapes.

    Args:
        data: Arrays `(n, H, W, C)`, a dict of arrays, or batches: `tf.data.Dataset`,
            `PyDataset`, torch `DataLoader`, grain dataset or loader, list, generator. Arrays and
            batches may be `(images, labels)`.
        batch_size: Int, for arrays. Default 32; if there are fewer images, all of them.
        shuffle: Whether to shuffle arrays anew for each epoch.
        seed: Int, for the shuffling. Default: from `random`, which
            `keras.utils.set_random_seed` seeds.

    Returns:
        Data that `keras.Model.fit` takes, and its first batch.

    Raises:
        TypeError: If the data are of no such kind.
        ValueError: If there is no image.
    """
    if isinstance(data, tuple) and data:  # (images, labels)
        data = data[0]
    if is_arrays(data):
        data = ArrayBatches(data, 32 if batch_size is None else batch_size, shuffle, seed)
        return data, data[0]
    if batch_size is not None:
        raise ValueError(
            "`batch_size` goes with arrays; these data come in batches already. "
            f"Received: batch_size={batch_size}, data of type {type(data).__name__}."
        )
    if isinstance(data, keras.utils.PyDataset):
        return full_py_dataset(data)
    if not hasattr(data, "__iter__"):
        raise TypeError(
            "The data must be arrays, or batches of them: `tf.data.Dataset`, `PyDataset`, torch "
            f"`DataLoader`, grain dataset or loader, list, generator. Received: {data!r}."
        )
    if isinstance(data, (list, tuple)):
        if not data:
            raise empty(data)
        return BatchList(data), data[0]
    data = from_directory(data)
    if hasattr(data, "to_iter_dataset"):  # grain.MapDataset, whose filter would leave gaps
        data = data.to_iter_dataset()
    batches = iter(data)
    first = next(batches, None)
    if first is None:
        raise empty(data)
    batch_size = size_of(first)
    if hasattr(data, "__next__"):  # a generator; Keras wants tuples
        batches = itertools.chain([first], batches)
        batches = (checked(b, first) for b in batches if is_full(b, batch_size))
        return ((inputs_of(batch),) for batch in batches), first
    if hasattr(data, "element_spec"):  # tf.data.Dataset
        if not all(spec.shape.is_fully_defined() for spec in keras.tree.flatten(data.element_spec)):
            data = backend.full_tf_batches(data, first)
    elif hasattr(data, "filter"):  # grain.IterDataset
        data = data.filter(lambda batch: is_full(batch, batch_size))
    elif hasattr(data, "batch_sampler"):  # torch DataLoader
        data = full_loader(data, first)
    elif type(data).__module__.startswith("grain"):
        data = full_grain_loader(data, batch_size)
    return data, first


def is_arrays(data):
    return hasattr(data, "shape") or isinstance(data, dict)


def inputs_of(batch):
    """The images or the dict of crops in a batch, which may hold labels too."""
    return batch[0] if isinstance(batch, (tuple, list)) and len(batch) else batch


def checked(batch, first):
    """`batch`, if its images have the size of those in the first one."""
    shapes, expected = (
        [tuple(array.shape[1:]) for array in keras.tree.flatten(inputs_of(b))]
        for b in (batch, first)
    )
    if shapes != expected:
        raise ValueError(
            f"All batches must hold arrays of one size, so that the step is compiled once. "
            f"Received: {shapes} after {expected}. Resize or crop the images to one size."
            + " Images and their labels go in a tuple, not in a list."
            * (() in shapes)
        )
    return in_range(batch)


def from_directory(data):
    """Brings what `keras.utils.image_dataset_from_directory` yields from 0-255 to 0-1.

    Any other data stay as they are: floats from 0 to 255 cannot be told from broken ones.
    """
    if not hasattr(data, "file_paths"):
        return data

    def scale(*batch):
        if len(batch) == 1:
            (batch,) = batch  # images, or grain's tuple
        images, *labels = batch if isinstance(batch, tuple) else (batch,)
        return (images / 255.0, *labels) if labels else images / 255.0

    return data.map(scale)


def full_loader(loader, first):
    """A torch `DataLoader` like `loader` that drops its short last batch."""
    is_bare = not isinstance(first, (tuple, list))
    drops_last = getattr(loader.batch_sampler, "drop_last", None)  # None: batches of any sizes
    if loader.batch_size is not None and size_of(first) < loader.batch_size:
        raise ValueError(
            "The data must fill at least one batch. Received: "
            f"{size_of(first)} images and batch_size={loader.batch_size}. Use a smaller one."
        )
    if drops_last and not is_bare:
        return loader
    kept = ("num_workers", "collate_fn", "pin_memory", "timeout", "worker_init_fn", "generator")
    kept += ("multiprocessing_context", "prefetch_factor", "persistent_workers")
    settings = {name: getattr(loader, name) for name in kept}
    batch_size = size_of(first) if drops_last is None else None
    settings["collate_fn"] = Collate(loader.collate_fn, is_bare, batch_size)
    if loader.batch_sampler is None:  # batches are the dataset's own
        settings["batch_size"] = None
    elif drops_last is None:  # those of a sampler of another class
        settings["batch_sampler"] = loader.batch_sampler
    elif any(base.__name__ == "IterableDataset" for base in type(loader.dataset).__mro__):
        settings.update(batch_size=loader.batch_size, drop_last=True)  # takes no sampler
    else:
        settings["batch_sampler"] = copy.copy(loader.batch_sampler)
        settings["batch_sampler"].drop_last = True
    return type(loader)(loader.dataset, **settings)


def full_grain_loader(loader, batch_size):
    """A `grain.DataLoader` like `loader` without short batches; made anew, as Keras does."""
    import grain

    class IsFull(grain.transforms.Filter):
        def filter(self, batch):
            return is_full(batch, batch_size)

    options = loader._multiprocessing_options
    return grain.DataLoader(
        data_source=loader._data_source,
        sampler=loader._sampler,
        operations=[*loader._operations, IsFull()],
        worker_count=options.num_workers,
        worker_buffer_size=options.per_worker_buffer_size,
        shard_options=loader._shard_options,
        read_options=loader._read_options,
    )


class Collate:
    """What a loader's own collate function makes, as `fit` needs it; workers can pickle it.

    A bare batch comes in a tuple: Keras would take the keys of a dict, or the rows of a tensor, for
    separate arrays. Given a `batch_size`, a batch of another is an error.
    """

    def __init__(self, collate, is_bare, batch_size):
        self.collate = collate
        self.is_bare = is_bare
        self.batch_size = batch_size

    def __call__(self, samples):
        batch = self.collate(samples)
        if self.batch_size is not None and size_of(batch) != self.batch_size:
            raise ValueError(
                "A batch sampler or data set of your own must make batches of one size, so that "
                f"the step is compiled once. Received: a batch of {size_of(batch)} after a first "
                f"one of {self.batch_size}. Leave out what does not fill a batch."
            )
        return (batch,) if self.is_bare else batch


def full_py_dataset(data):
    if data.num_batches == 0:
        raise empty(data)
    first = data[0]
    last = first if data.num_batches in (None, 1) else data[data.num_batches - 1]
    return FullBatches(data, first, size_of(last) < size_of(first)), first


def in_range(batch):
    """A batch, if its images, when they are floats, lie about between 0 and 1."""
    images = inputs_of(batch)
    if hasattr(images, "shape"):
        check_value_range(images)
    return batch


def size_of(batch):
    first = keras.tree.flatten(batch)[0]
    if not getattr(first, "shape", ()):
        raise ValueError(
            "The data must come in batches: arrays (B, H, W, C), or dicts of arrays. Received: "
            f"a batch that starts with {type(first).__name__}."
        )
    return len(first)


def is_full(batch, batch_size):
    """Whether a batch is as large as the first one, which none may exceed."""
    size = size_of(batch)
    if size > batch_size:
        raise ValueError(
            "The first batch must be a full one: smaller ones are dropped, so that the step is "
            f"compiled once. Received: a batch of {size} after a first one of {batch_size}."
        )
    return size == batch_size


def empty(data):
    return ValueError(
        f"The data must hold at least one image. Received: an empty {type(data).__name__}."
    )


class ArrayBatches(ShuffledBatches):
    """Full batches of an array, or of a dict of arrays; the images left over change by epoch."""

    def __init__(self, arrays, batch_size, shuffle, seed):
        sizes = {len(array) for array in keras.tree.flatten(arrays)}
        if len(sizes) > 1:
            raise ValueError(
                f"All arrays must hold the same number of images. Received: {sorted(sizes)}."
            )
        if sizes in (set(), {0}):
            raise empty(arrays)
        if not isinstance(batch_size, (int, np.integer)) or batch_size < 1:
            raise ValueError(
                f"`batch_size` must be an integer of at least 1. Received: {batch_size!r}."
            )
        super().__init__(sizes.pop(), shuffle, seed)
        self.arrays = keras.tree.map_structure(backend.numpy_of, arrays)
        in_range(self.arrays)
        self.batch_size = min(batch_size, self.count)

    def __len__(self):
        return self.count // self.batch_size

    def __getitem__(self, index):
        chosen = self.order[index * self.batch_size : (index + 1) * self.batch_size]
        return keras.tree.map_structure(lambda array: array[chosen], self.arrays)


class BatchList(keras.utils.PyDataset):
    """The full batches in a list of them."""

    def __init__(self, batches):
        super().__init__()
        batch_size = size_of(batches[0])
        self.batches = [
            inputs_of(checked(batch, batches[0])) for batch in batches if is_full(batch, batch_size)
        ]

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, index):
        return keras.tree.map_structure(backend.numpy_of, self.batches[index])


class FullBatches(keras.utils.PyDataset):
    """A `PyDataset` whose batches have all one size, without a short last one."""

    def __init__(self, data, first, without_last):
        super().__init__(data.workers, data.use_multiprocessing, data.max_queue_size)
        self.data = data
        self.first = keras.tree.map_structure(lambda array: array[:1], inputs_of(first))
        self.batch_size = size_of(first)
        self.without_last = without_last

    @property
    def num_batches(self):
        count = self.data.num_batches
        return count if count is None else count - self.without_last

    def __len__(self):
        return self.num_batches

    def __getitem__(self, index):
        batch = self.data[index]
        if size_of(batch) != self.batch_size:
            raise ValueError(
                "All batches of a `PyDataset` but the last must have the size of the first. "
                f"Received: batch {index} of {size_of(batch)} images, the first of "
                f"{self.batch_size}."
            )
        return checked(batch, self.first)

    @property
    def position(self):
        return getattr(self.data, "position", None)

    @position.setter
    def position(self, position):
        self.data.position = position

    def on_epoch_begin(self):
        self.data.on_epoch_begin()

    def on_epoch_end(self):
        self.data.on_epoch_end()
