"""A frozen teacher's tokens of global crops, computed once and kept on disk."""

import hashlib
import json
import os

import keras
import numpy as np
from keras import ops

from keras_dinov3 import backend
from keras_dinov3.augment import MultiCrop, as_pair
from keras_dinov3.encoder import encode, grid_of, merge
from keras_dinov3.families import channels_of, check_backbone, patch_size_of
from keras_dinov3.image_cache import read_json
from keras_dinov3.known_tokens import CachedBatches, CachedTeacher, drawn
from keras_dinov3.schedules import check_count

MANIFEST = "teacher.json"
KEEP_EVERY = 20  # batches from one note of how far the caching has come to the next


def cache_teacher(
    teacher,
    images,
    directory,
    augmentation,
    views=1,
    seed=0,
    extras=None,
    dtype="float16",
    batch_size=32,
    verbose=1,
):
    """Computes a teacher's tokens of global crops once, for training without the teacher.

    Each image gets `views` draws of its global crops, which are kept too: the teacher would have to
    see any new ones. Local crops, which only students see, stay new in every step. Training then
    repeats the same `views * G` global crops of an image, epoch by epoch one view after another.

    An image takes `views * G * (h * w * C + (N + 1) * D * b)` bytes, with `b` 2 for float16 and 4
    for float32: 0.30 MB per crop of 224 pixels with patches of 16 and a width of 384 (float16), and
    0.55 MB with one of 1024. The progress bar says how much it is.

    Files are memory-mapped arrays in NumPy's format and a JSON file that describes them, which is
    written last. When it is interrupted, the next call with the same arguments goes on; a cache
    that is finished is used again.

    ```python
    augmentation = kd.MultiCrop()
    cache = kd.cache_teacher(teacher, images, "cache", augmentation, views=4)
    model = kd.DINOv3(
        student, teacher=cache.stand_in(), teacher_ema=None, augmentation=augmentation
    )
    model.compile()
    model.fit(cache.batches(images, 64, augmentation), epochs=8)
    ```

    Args:
        teacher: Backbone, as `teacher` of `DINOv3`.
        images: `(n, H, W, C)`, uint8 0-255 or float 0-1, in memory or memory-mapped, such as the
            `images` of `image_folder(..., cache="images.npy")`.
        directory: Path of a folder, which is made if there is none.
        augmentation: `MultiCrop` whose global crops are drawn. They are kept as uint8, which is
            what both the teacher and the students then see.
        views: Int, `V`. Draws of the global crops of each image.
        seed: Int. Seeds the draws.
        extras: The teacher's `EncoderExtras`, or `None`.
        dtype: `"float16"` or `"float32"`, in which tokens are kept.
        batch_size: Int. Images in one forward pass, so this times `G` crops.
        verbose: 1 shows a progress bar, 0 does not.

    Returns:
        `TeacherCache`.

    Raises:
        TypeError: If `teacher` is of no supported family.
        ValueError: If an argument is out of range, the directory holds a cache of other arguments,
            or the teacher's tokens are not finite in `dtype`.
    """
    check_backbone(teacher)
    check_augmentation(augmentation)
    check_count("views", views, at_least=1)
    check_count("seed", seed)
    check_count("batch_size", batch_size, at_least=1)
    if dtype not in ("float16", "float32"):
        raise ValueError(f'`dtype` must be "float16" or "float32". Received: dtype={dtype!r}.')
    check_images(images, channels_of(teacher))
    wanted = {
        "teacher": f"{type(teacher).__name__}, {teacher.num_layers} blocks",
        "weights": fingerprint_of_teacher(teacher, extras),
        "images": fingerprint_of_images(images),
        "augmentation": global_settings(augmentation),
        "views": views,
        "seed": seed,
        "dtype": dtype,
        "patch_size": patch_size_of(teacher),
        "arrays": shapes_of(len(images), views, augmentation, teacher),
    }
    directory = os.fspath(directory)
    os.makedirs(directory, exist_ok=True)
    if read_json(os.path.join(directory, MANIFEST)) is None:
        fill(directory, wanted, teacher, extras, images, augmentation, batch_size, verbose)
    cache = TeacherCache(directory)
    cache.compare(wanted)
    return cache


class TeacherCache:
    """What `cache_teacher` has written.

    Args:
        directory: Path of the folder.

    Attributes:
        crops: Global crops, uint8 `(n, V, G, h, w, C)`, memory-mapped, as are the others.
        cls: The teacher's class tokens of these, `(n, V, G, D)`.
        patches: Its patch tokens, `(n, V, G, N, D)`.
        about: Dict that says what they were made from.

    Raises:
        ValueError: If there is no cache, or one that is not finished or damaged.
    """

    def __init__(self, directory):
        self.directory = os.fspath(directory)
        self.about = read_json(os.path.join(self.directory, MANIFEST))
        if self.about is None:
            raise ValueError(
                "A cache is read when it is finished, which its description shows. Received: "
                f"{self.directory} without {MANIFEST}. Call `cache_teacher` with the arguments "
                "that it was begun with, which goes on."
            )
        for name, shape in self.about["arrays"].items():
            dtype = "uint8" if name == "crops" else self.about["dtype"]
            path = self.path(name)
            array = np.load(path, mmap_mode="r") if os.path.exists(path) else None
            found = None if array is None else (list(array.shape), array.dtype.name)
            if found != (shape, dtype):
                raise ValueError(
                    f"{path} must be as {MANIFEST} beside it says: {shape}, {dtype}. Received: "
                    f"{found or 'no such file'}. Remove the folder and cache again."
                )
            setattr(self, name, array)

    def path(self, name):
        return os.path.join(self.directory, f"{name}.npy")

    def compare(self, wanted):
        """Raises a `ValueError` if the cache was made from anything else than `wanted`, a dict."""
        different = {
            name: (value, self.about[name])
            for name, value in wanted.items()
            if value != self.about[name]
        }
        if different:
            pairs = "; ".join(f"{name}: {a}, cached: {b}" for name, (a, b) in different.items())
            raise ValueError(
                "A cache is for the teacher, images, crops and seed that it was made from. "
                f"Received: {self.directory}, made from others ({pairs}). Choose another folder."
            )

    def check_teacher(self, teacher, extras=None):
        """Raises a `ValueError` if the cache was made by another teacher.

        Args:
            teacher: Backbone.
            extras: Its `EncoderExtras`, or `None`.
        """
        self.compare({"weights": fingerprint_of_teacher(teacher, extras)})

    def stand_in(self):
        """A `CachedTeacher` to be `teacher` of a `DINOv3`, when the teacher itself is too large."""
        settings = {"patch_size": self.about["patch_size"], "hidden_dim": self.cls.shape[-1]}
        return CachedTeacher(**settings, image_shape=tuple(self.crops.shape[-3:]))

    def batches(self, images, batch_size, augmentation, shuffle=True, seed=0, **kwargs):
        """Data for `fit`: ready crops with the teacher's tokens.

        Args:
            images: The images that were cached.
            batch_size: Int. Images in a batch; a short last batch is left out.
            augmentation: `MultiCrop`. Its global crops are those that were cached, its local
                crops are made here, anew in each step.
            shuffle: Whether to draw a new order for each epoch.
            seed: Int, for the order and the local crops. What a step sees follows from it and the
                number of the step, so that a resumed run goes on.
            **kwargs: Keyword arguments of `keras.utils.PyDataset`.

        Returns:
            `keras.utils.PyDataset` of dicts: `"global_crops"`, `"local_crops"`, `"teacher_cls"`
            `(B, G, D)` and `"teacher_patches"` `(B, G, N, D)`. Epoch `e` has view `e % V`.

        Raises:
            ValueError: If these are not the images or global crops that were cached.
        """
        check_augmentation(augmentation)
        check_images(images, self.crops.shape[-1])
        settings = global_settings(augmentation)
        self.compare({"images": fingerprint_of_images(images), "augmentation": settings})
        return CachedBatches(self, images, batch_size, augmentation, shuffle, seed, **kwargs)


class TeacherPass(keras.Model):
    """A teacher's tokens of normalised crops `(B, G, h, w, C)`, compiled.

    Args:
        teacher: Backbone.
        extras: Its `EncoderExtras`, or `None`.
    """

    def __init__(self, teacher, extras):
        super().__init__(autocast=False)
        self.teacher = teacher
        self.extras = extras
        self.built = True

    def call(self, crops):
        tokens = encode(self.teacher, merge(crops), extras=self.extras)
        return {
            name: ops.reshape(ops.cast(x, "float32"), (*crops.shape[:2], *x.shape[1:]))
            for name, x in (("cls", tokens.cls), ("patches", tokens.patches))
        }


def fill(directory, about, teacher, extras, images, augmentation, batch_size, verbose):
    """Writes a cache, or what is left of one, beside its place; then renames it."""
    part = os.path.join(directory, f"{MANIFEST}.part")
    paths = {name: os.path.join(directory, f"{name}.npy") for name in about["arrays"]}
    begun = read_json(part)
    goes_on = begun is not None and begun["about"] == about
    goes_on = goes_on and all(os.path.exists(f"{path}.part") for path in paths.values())
    if not goes_on and os.path.exists(part):
        os.remove(part)  # never beside arrays of others
    arrays = {
        name: np.lib.format.open_memmap(
            f"{paths[name]}.part",
            "r+" if goes_on else "w+",
            "uint8" if name == "crops" else about["dtype"],
            tuple(shape),
        )
        for name, shape in about["arrays"].items()
    }
    changes = {"name": None, "num_local_crops": 0, "mean": 0.0, "std": 1.0}
    views = MultiCrop.from_config({**augmentation.get_config(), **changes})
    run, count = TeacherPass(teacher, extras), len(images)
    size = sum(array.nbytes for array in arrays.values())
    sizes = [("MB_per_image", size / count / 1e6), ("GB_in_all", size / 1e9)]
    progress = keras.utils.Progbar(
        count, verbose=verbose, unit_name="image", stateful_metrics=[name for name, _ in sizes]
    )
    starts = range(begun["done"] if goes_on else 0, count, batch_size)
    for number, start in enumerate(starts):
        stop = min(start + batch_size, count)
        rows = np.arange(start, start + batch_size) % count  # full, so that it is compiled once
        batch = np.asarray(images[rows])
        for view in range(about["views"]):
            crops = drawn(views, batch, about["seed"], start * about["views"] + view)
            crops = np.rint(crops * 255).astype("uint8")
            found = run.predict_on_batch(backend.numpy_of(augmentation.normalize(crops)))
            for name, values in {"crops": crops, **found}.items():
                with np.errstate(over="ignore"):  # what becomes infinite is found below
                    values = backend.numpy_of(values)[: stop - start].astype(arrays[name].dtype)
                if not np.isfinite(values).all():
                    raise ValueError(
                        f"The teacher's tokens must be finite in {about['dtype']}. Received: NaN "
                        f"or infinity for images {start} to {stop - 1}. If its weights are right, "
                        '`dtype="float32"` has room for larger values.'
                    )
                arrays[name][start:stop, view] = values
        if number % KEEP_EVERY == KEEP_EVERY - 1 or stop == count:
            for array in arrays.values():
                array.flush()
            write_json(part, {"about": about, "done": stop})
        progress.update(stop, sizes, finalize=stop == count)
    for path in paths.values():
        os.replace(f"{path}.part", path)
    write_json(os.path.join(directory, MANIFEST), about)
    os.remove(part)


def global_settings(augmentation):
    """What global crops depend on, but for the seed, as JSON gives it back."""
    config = keras.saving.serialize_keras_object(augmentation)["config"]
    left_out = ("name", "seed", "dtype", "trainable", "num_local_crops")
    kept = {k: v for k, v in config.items() if k not in left_out and not k.startswith("local_")}
    return json.loads(json.dumps(kept))


def shapes_of(count, views, augmentation, teacher):
    """The shape of each array, as lists."""
    size = as_pair(augmentation.global_crop_size)
    grid = grid_of(size, patch_size_of(teacher), "global_crop_size")
    axes = [count, views, augmentation.num_global_crops]
    return {
        "crops": [*axes, *size, channels_of(teacher)],
        "cls": [*axes, teacher.hidden_dim],
        "patches": [*axes, grid[0] * grid[1], teacher.hidden_dim],
    }


def fingerprint_of_teacher(teacher, extras):
    """Of all that a teacher's tokens depend on: class, settings and weights."""
    digest = hashlib.sha256(type(teacher).__name__.encode())
    for layer in (teacher, extras):
        if layer is not None:
            config = {k: v for k, v in layer.get_config().items() if k not in ("name", "trainable")}
            digest.update(json.dumps(config, sort_keys=True, default=str).encode())
            for weight in layer.weights:
                digest.update(np.ascontiguousarray(ops.convert_to_numpy(weight)).tobytes())
    return digest.hexdigest()


def fingerprint_of_images(images):
    """Of their shape and type, and of 256 of them, evenly spaced: all would take long to read."""
    digest = hashlib.sha256(repr((tuple(images.shape), str(images.dtype))).encode())
    for row in np.unique(np.linspace(0, len(images) - 1, 256).astype(int)):
        digest.update(np.ascontiguousarray(images[row]).tobytes())
    return digest.hexdigest()


def write_json(path, content):
    """All of a file or nothing."""
    with open(f"{path}.new", "w") as file:
        json.dump(content, file)
    os.replace(f"{path}.new", path)


def check_augmentation(augmentation):
    if not isinstance(augmentation, MultiCrop):
        raise ValueError(
            "`augmentation` must be a `MultiCrop`, whose global crops are cached. "
            f"Received: augmentation={augmentation!r}."
        )
    if len(augmentation.crop_sizes) > 1:
        raise ValueError(
            "A cache holds crops of one size. Received: `MixedCrops` of "
            f"{len(augmentation.crop_sizes)} sizes. Give a `MultiCrop`."
        )


def check_images(images, channels):
    shape = getattr(images, "shape", ())
    if not (
        isinstance(images, np.ndarray) and len(shape) == 4 and shape[-1] == channels and shape[0]
    ):
        raise ValueError(
            f"`images` must be a NumPy array (n, H, W, {channels}), in memory or memory-mapped. "
            f"Received: {type(images).__name__} of shape {tuple(shape)}. "
            '`image_folder(..., cache="images.npy").images` is one.'
        )
