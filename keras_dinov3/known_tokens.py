"""Data that bring a frozen teacher's tokens, so that it need not run, and what stands in for it."""

import threading

import keras
import keras_hub
import numpy as np
from keras import ops

from keras_dinov3 import backend
from keras_dinov3.augment import MultiCrop
from keras_dinov3.data import ShuffledBatches
from keras_dinov3.encoder import Tokens, grid_of, merge
from keras_dinov3.families import patch_size_of
from keras_dinov3.schedules import check_count

KNOWN = ("teacher_cls", "teacher_patches")  # of ready crops


def known_tokens(crops):
    """The teacher's `Tokens` of the global crops that ready crops bring, or `None`."""
    if KNOWN[0] not in crops:
        return None
    cls, patches = (ops.cast(merge(crops[name]), "float32") for name in KNOWN)
    return Tokens(cls, patches[:, :0], patches)  # no registers


def check_known_tokens(crops, model):
    """Says why the tokens that data bring are not those of a model's teacher."""
    given = {name: tuple(crops[name].shape) for name in KNOWN if name in crops}
    if not given and isinstance(model.teacher, CachedTeacher):
        raise ValueError(
            "The teacher is in a cache, so batches must bring its tokens. Received: a batch "
            f"without {' and '.join(f'`{name}`' for name in KNOWN)}. "
            "`TeacherCache.batches(...)` has them."
        )
    if not given:
        return
    if not model.has_foreign_teacher:
        raise ValueError(
            f"`{KNOWN[0]}` and `{KNOWN[1]}` are tokens of a frozen teacher. Received: them and a "
            "model whose teacher moves. Make it with a `teacher` and `teacher_ema=None`."
        )
    axes, width = tuple(crops["global_crops"].shape[:2]), model.teacher.hidden_dim
    size = crops["global_crops"].shape[2:4]
    grid = grid_of(size, patch_size_of(model.teacher), "global_crops")
    shapes = (*axes, width), (*axes, grid[0] * grid[1], width)
    wanted = dict(zip(KNOWN, shapes, strict=True))
    if given != wanted:
        raise ValueError(
            "The teacher's tokens must be those of the global crops. Received: "
            f"{given}; needed: {wanted}."
        )
    for name in KNOWN:
        if not (crops[name].dtype.kind == "f" and np.isfinite(crops[name]).all()):
            raise ValueError(
                f"`{name}` must be finite floats. Received: {crops[name].dtype}, or NaN or "
                "infinity among them."
            )


class CachedBatches(ShuffledBatches):
    """Batches of a `TeacherCache`, whose `batches` makes them and describes the arguments."""

    def __init__(self, cache, images, batch_size, augmentation, shuffle, seed, **kwargs):
        check_count("batch_size", batch_size, at_least=1)
        check_count("seed", seed)
        if batch_size > len(images):
            raise ValueError(
                "There must be at least one batch. Received: "
                f"{len(images)} images with batch_size={batch_size}."
            )
        self.cache = cache
        self.images = images
        self.batch_size = batch_size
        self.augmentation = augmentation
        self.local_crops = local_crops_alone(augmentation)
        self.lock = threading.Lock()
        super().__init__(len(images), shuffle, seed, **kwargs)

    def __len__(self):
        return self.count // self.batch_size

    def __getitem__(self, index):
        chosen = self.order[index * self.batch_size : (index + 1) * self.batch_size]
        view = self.position // len(self) % self.cache.about["views"]
        batch = {
            "global_crops": backend.numpy_of(
                self.augmentation.normalize(self.cache.crops[chosen, view])
            ),
            "teacher_cls": self.cache.cls[chosen, view],
            "teacher_patches": self.cache.patches[chosen, view],
        }
        if self.local_crops is not None:
            with self.lock:
                images = np.asarray(self.images[chosen])
                crops = drawn(self.local_crops, images, self.seed, self.position + index)
            batch["local_crops"] = crops
        return batch


@keras.saving.register_keras_serializable(package="keras_dinov3")
class CachedTeacher(keras_hub.models.DINOV3Backbone):
    """Stands in for a teacher whose tokens come with the data; it has its width and patches.

    It is never run: its single block is as small as can be, and its weights are NaN.

    Args:
        hidden_dim: Int, `D`.
        patch_size: Int, in pixels.
        image_shape: `(height, width, C)` of the global crops.
        **kwargs: Keyword arguments of `keras_hub.models.DINOV3Backbone`.
    """

    def __init__(self, hidden_dim, patch_size, image_shape, **kwargs):
        size = {"num_layers": 1, "num_heads": 1, "intermediate_dim": 1}
        settings = {"hidden_dim": hidden_dim, "patch_size": patch_size, "image_shape": image_shape}
        super().__init__(**{**kwargs, **size, **settings})
        self.set_weights([np.full(weight.shape, np.nan, "float32") for weight in self.weights])


def drawn(layer, images, seed, number):
    """The global crops of a `MultiCrop` by a seed and a number, float32 NumPy `(B, G, h, w, C)`."""
    state = np.random.SeedSequence((seed, number)).generate_state(1)[0] % 2**31
    layer.seed_generator.state.assign(np.array([state, 0]))
    return backend.numpy_of(layer(images)["global_crops"])


def local_crops_alone(augmentation):
    """A `MultiCrop` whose global crops are the local crops of another; `None` if it has none."""
    settings = augmentation.get_config()
    if settings["num_local_crops"] == 0:
        return None
    names = ("crop_size", "crop_scale", "blur_probability", "solarize_probability")
    changes = {f"global_{name}": settings[f"local_{name}"] for name in names}
    counts = {"num_global_crops": settings["num_local_crops"], "num_local_crops": 0}
    return MultiCrop.from_config({**settings, "name": None, **changes, **counts})
