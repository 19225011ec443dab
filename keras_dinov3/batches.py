"""Any kind of training data in, full batches out; Keras alone lets the last one be short."""

import copy
import itertools

import keras
import numpy as np
from keras import ops

from keras_dinov3 import backend


def full_batches(data, batch_size=None, shuffle=False, seed=None):
    """Drops short last batches, so that every step has the same shapes.

    Args:
        data: Arrays `(n, H, W, C)`, a dict of arrays, or batches: `tf.data.Dataset`,
            `PyDataset`, torch `DataLoader`, grain dataset or loader, generator.
        batch_size: Int, for arrays. Default 32; if there are fewer images, all of them.
        shuffle: Whether to shuffle arrays anew for each epoch.
        seed: Int, for the shuffling.

    Returns:
        Data that `keras.Model.fit` takes, and its first batch.

    Raises:
        ValueError: If there is no image.
    """
    if hasattr(data, "shape") or isinstance(data, dict):
        data = ArrayBatches(data, batch_size or 32, shuffle, seed)
        return data, data[0]
    if batch_size is not None:
        raise ValueError(
            "`batch_size` goes with arrays; these data come in batches already. "
            f"Received: batch_size={batch_size}, data of type {type(data).__name__}."
        )
    if isinstance(data, keras.utils.PyDataset):
        return full_py_dataset(data)
    data = from_directory(data)
    if hasattr(data, "to_iter_dataset"):  # grain.MapDataset, whose filter would leave gaps
        data = data.to_iter_dataset()
    is_generator = hasattr(data, "__next__")
    batches = iter(data)
    first = next(batches, None)
    if first is None:
        raise empty(data)
    batch_size = size_of(first)
    if is_generator:  # Keras wants tuples
        full = (b for b in itertools.chain([first], batches) if size_of(b) == batch_size)
        return (b if isinstance(b, tuple) else (b,) for b in full), first
    if hasattr(data, "element_spec"):  # tf.data.Dataset
        if not all(spec.shape.is_fully_defined() for spec in keras.tree.flatten(data.element_spec)):
            data = backend.full_tf_batches(data, first)
    elif hasattr(data, "filter"):  # grain.IterDataset
        data = data.filter(lambda batch: size_of(batch) == batch_size)
    elif getattr(data, "batch_sampler", None) is not None:  # torch DataLoader
        data = full_loader(data, first)
    return data, first


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
    is_dict = isinstance(first, dict)
    if getattr(loader.batch_sampler, "drop_last", True) and not is_dict:
        return loader
    batch_sampler = copy.copy(loader.batch_sampler)
    batch_sampler.drop_last = True
    kept = ("num_workers", "collate_fn", "pin_memory", "timeout", "worker_init_fn", "generator")
    kept += ("multiprocessing_context", "prefetch_factor", "persistent_workers")
    settings = {name: getattr(loader, name) for name in kept}
    if is_dict:  # Keras takes the keys of a bare dict for a tuple of arrays
        settings["collate_fn"] = InTuple(loader.collate_fn)
    return type(loader)(loader.dataset, batch_sampler=batch_sampler, **settings)


class InTuple:
    """A collate function whose batch comes in a tuple of one; workers can pickle it."""

    def __init__(self, collate):
        self.collate = collate

    def __call__(self, samples):
        return (self.collate(samples),)


def full_py_dataset(data):
    if data.num_batches == 0:
        raise empty(data)
    first = data[0]
    last = first if data.num_batches in (None, 1) else data[data.num_batches - 1]
    return (WithoutLast(data) if size_of(last) < size_of(first) else data), first


def size_of(batch):
    return len(keras.tree.flatten(batch)[0])


def empty(data):
    return ValueError(
        f"The data must hold at least one image. Received: an empty {type(data).__name__}."
    )


class ArrayBatches(keras.utils.PyDataset):
    """Full batches of an array, or of a dict of arrays; the images left over change by epoch."""

    def __init__(self, arrays, batch_size, shuffle, seed):
        super().__init__()
        sizes = {len(array) for array in keras.tree.flatten(arrays)}
        if len(sizes) > 1:
            raise ValueError(
                f"All arrays must hold the same number of images. Received: {sorted(sizes)}."
            )
        if sizes in (set(), {0}):
            raise empty(arrays)
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1. Received: {batch_size}.")
        self.arrays = keras.tree.map_structure(ops.convert_to_numpy, arrays)
        self.order = np.arange(sizes.pop())
        self.batch_size = min(batch_size, len(self.order))
        self.generator = np.random.default_rng(seed) if shuffle else None
        self.on_epoch_end()

    def __len__(self):
        return len(self.order) // self.batch_size

    def __getitem__(self, index):
        chosen = self.order[index * self.batch_size : (index + 1) * self.batch_size]
        return keras.tree.map_structure(lambda array: array[chosen], self.arrays)

    def on_epoch_end(self):
        if self.generator is not None:
            self.order = self.generator.permutation(len(self.order))


class WithoutLast(keras.utils.PyDataset):
    """A `PyDataset` without its short last batch."""

    def __init__(self, data):
        super().__init__(data.workers, data.use_multiprocessing, data.max_queue_size)
        self.data = data

    def __len__(self):
        return self.data.num_batches - 1

    def __getitem__(self, index):
        return self.data[index]

    def on_epoch_begin(self):
        self.data.on_epoch_begin()

    def on_epoch_end(self):
        self.data.on_epoch_end()
