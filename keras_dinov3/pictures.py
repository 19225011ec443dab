"""`Pictures`: what the teacher sees in the same images, drawn during training."""

import pathlib

from keras_dinov3 import backend
from keras_dinov3.figures import (
    attention_figure,
    figure_class,
    norms_figure,
    save,
    similarity_figure,
)
from keras_dinov3.maps import attention_maps, patch_similarity, token_norms
from keras_dinov3.monitors import Monitor, changed
from keras_dinov3.visualize import crops, patch_pca, patch_pca_figure

KINDS = ("patch_pca", "similarity", "attention", "norms")


class Pictures(Monitor):
    """Draws what the teacher sees in a few images, before training and now and then.

    In `path`: crops.png once, what the student is shown of them, and for each kind and time
    `<kind>_<epochs>.png`, the number of epochs in six digits. It draws nothing at random that the
    training would.

    Args:
        images: `(n, H, W, C)`, uint8 from 0 to 255 or float from 0 to 1; 4 to 16 are plenty.
        path: Folder for the pictures.
        every: Int, at least 1. Epochs from one time to the next; the last epoch is drawn too.
        kinds: Some of `"patch_pca"` (patch features as colours), `"similarity"` (with the patch in
            the middle of the first image), `"attention"` (of the class token by head), `"norms"`
            (lengths of tokens).
        image_size: `None`, int or `(height, width)` in pixels; a larger one than in training gives
            finer pictures.
        log_dir: Folder of TensorBoard, which then shows them too. It needs TensorFlow, under any
            backend.

    Raises:
        ValueError: If a kind is unknown, or there are no images.
        ImportError: If Matplotlib is missing, or TensorFlow for TensorBoard.
    """

    def __init__(
        self,
        images,
        path,
        every=1,
        kinds=("patch_pca", "attention"),
        image_size=None,
        log_dir=None,
    ):
        super().__init__(every)
        figure_class()  # if it is missing, say so before the work
        unknown = set(kinds) - set(KINDS)
        images = backend.numpy_of(images)
        if unknown or images.ndim != 4 or not len(images):
            raise ValueError(
                f"`kinds` must be among {KINDS}, and `images` (n, H, W, C). "
                f"Received: kinds={tuple(kinds)}, images of shape {images.shape}."
            )
        self.images = images
        self.path = pathlib.Path(path)
        self.kinds = tuple(kinds)
        self.image_size = image_size
        self.writer = None if log_dir is None else backend.image_writer(str(log_dir))

    def prepare(self):
        augmentation = self.model.augmentation
        self._normalization = {name: getattr(augmentation, name, None) for name in ("mean", "std")}
        if augmentation is not None and not (self.path / "crops.png").exists():
            copies = CopiedViews(self.model)
            crops(copies, self.images[:6], path=self.path / "crops.png")

    def on_epoch_end(self, epoch, logs=None):
        super().on_epoch_end(epoch, logs)
        is_last = epoch + 1 == (self.params or {}).get("epochs")
        if is_last and (epoch + 1) % self.every:
            self._record(epoch + 1)

    def _record(self, epoch):
        super()._record(epoch)
        settings = {
            **self._normalization,
            "image_size": self.image_size,
            "extras": self.model.learned[1],
        }
        for kind in self.kinds:
            path = self.path / f"{kind}_{epoch:06d}.png"
            save(self.figure(kind, settings), path)
            if self.writer is not None:
                self.writer(kind, path, epoch)

    def figure(self, kind, settings):
        """The Matplotlib figure of a kind, now."""
        backbone, images = self.model.learned[0], self.images
        if kind == "patch_pca":
            return patch_pca_figure(images, patch_pca(backbone, images, **settings))
        if kind == "similarity":
            patch = self.middle(settings)
            return similarity_figure(
                images, patch_similarity(backbone, images, patch, **settings), patch
            )
        if kind == "attention":
            return attention_figure(images, attention_maps(backbone, images, **settings))
        return norms_figure(images, token_norms(backbone, images, **settings))

    def middle(self, settings):
        grid = patch_pca(self.model.learned[0], self.images[:1], **settings).shape[1:3]
        return tuple(n // 2 for n in grid)

    def measure(self):
        return {}


class CopiedViews:
    """Augmentation and masking of a model with random states of their own, for `crops`."""

    def __init__(self, model):
        self.augmentation = changed(model.augmentation, seed=0)
        self.masking = None if model.masking is None else changed(model.masking, seed=0)
        self.student = model.student
