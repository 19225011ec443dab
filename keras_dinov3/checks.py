"""Settings and data that cannot work, met before anything is computed."""

import numpy as np

from keras_dinov3.encoder import check_backbone, grid_of
from keras_dinov3.schedules import check_range
from keras_dinov3.targets import SoftmaxCentering


def check_settings(model):
    """Says which settings of a `DINOv3` contradict each other or its backbone."""
    student, teacher = model.student, model.teacher
    check_backbone(teacher)
    if model.teacher_ema is not None:
        shapes = [[tuple(w.shape) for w in side.weights] for side in (student, teacher)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                "A teacher that follows the student must have its architecture. Received: "
                f"student of width {student.hidden_dim} and {student.num_layers} blocks, teacher "
                f"of width {teacher.hidden_dim} and {teacher.num_layers} blocks. To distil from "
                "a different, frozen teacher, pass `teacher_ema=None`."
            )
    if model.masking is not None and not student.use_mask_token:
        raise ValueError(
            "`masking` needs a backbone with a mask token. Received a backbone with "
            "use_mask_token=False. Build it with `use_mask_token=True`, or train without "
            "masks: `masking=None, ibot_weight=0`."
        )
    if model.augmentation is not None:
        for name in ("global_crop_size", "local_crop_size"):
            size = getattr(model.augmentation, name)
            size = size if isinstance(size, (tuple, list)) else (size, size)
            grid_of(size, student.patch_size, name)
    if not 0 <= model.drop_path_rate < 1:
        raise ValueError(
            "`drop_path_rate` must be at least 0 and less than 1. "
            f"Received: drop_path_rate={model.drop_path_rate}."
        )
    if model.max_masked_patches is not None and model.max_masked_patches < 1:
        raise ValueError(
            "`max_masked_patches` must be at least 1, or None for a slot for every patch. "
            f"Received: max_masked_patches={model.max_masked_patches}."
        )
    if model.centering != "sinkhorn_knopp" and not isinstance(model.centering, SoftmaxCentering):
        raise ValueError(
            '`centering` must be "sinkhorn_knopp" or a `SoftmaxCentering` layer. '
            f"Received: centering={model.centering!r}."
        )
    for name in ("student_temperature", "teacher_temperature"):
        check_range(name, getattr(model, name), above=0)
    for name in ("dino_weight", "ibot_weight", "koleo_weight"):
        check_range(name, getattr(model, name), low=0)


def check_batch(batch, model):
    """Says why a batch of NumPy images or crops does not fit the model; returns its size."""
    inputs = batch[0] if isinstance(batch, (tuple, list)) else batch
    if isinstance(inputs, dict):
        arrays = check_crops({name: as_numpy(array) for name, array in inputs.items()}, model)
    else:
        if model.augmentation is None:
            raise ValueError(
                "With `augmentation=None` the data must be dicts of ready crops, "
                '{"global_crops": (B, G, S, S, C), ...}. Received: images of shape '
                f"{tuple(inputs.shape)}. Give `DINOv3` a `MultiCrop` to train on images."
            )
        arrays = {"images": as_numpy(inputs)}
        check_pixels("images", arrays["images"], channels_of(model.student), 4)
    sizes = {name: len(array) for name, array in arrays.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"All arrays of a batch must hold the same images. Received: {sizes}.")
    if "masks" not in arrays and model.masking is None and not is_zero(model.ibot_weight):
        raise ValueError(
            "The iBOT loss needs masked patches. Received: ibot_weight="
            f"{model.ibot_weight}, masking=None and data without `masks`. "
            "Set `ibot_weight=0`, give `DINOv3` a `masking` layer or bring masks."
        )
    batch_size = next(iter(sizes.values()))
    if batch_size < 2 and not is_zero(model.koleo_weight):
        raise ValueError(
            "KoLeo compares the images of a batch, so a batch needs at least 2. Received: a "
            f"batch of {batch_size} with koleo_weight={model.koleo_weight}. Use a larger batch "
            "(32 and more train well) or `koleo_weight=0`."
        )
    return batch_size


def check_crops(crops, model):
    unknown = set(crops) - {"global_crops", "local_crops", "masks"}
    if unknown or "global_crops" not in crops:
        raise ValueError(
            'Ready crops are a dict with "global_crops" (B, G, S, S, C) and optionally '
            '"local_crops" (B, L, s, s, C) and "masks" (B, G, N). '
            f"Received: keys {sorted(crops)}."
        )
    channels, patch_size = channels_of(model.student), model.student.patch_size
    for name in crops.keys() - {"masks"}:
        check_pixels(name, crops[name], channels, 5, normalized=True)
        grid_of(crops[name].shape[2:4], patch_size, name)
    if "masks" in crops:
        masks, (height, width) = crops["masks"], crops["global_crops"].shape[2:4]
        num_patches = (height // patch_size) * (width // patch_size)
        shape = (*crops["global_crops"].shape[:2], num_patches)
        if masks.shape != shape:
            raise ValueError(
                f"`masks` must have shape (images, global crops, patches)={shape}. "
                f"Received: masks.shape={masks.shape}."
            )
        if not model.student.use_mask_token:
            raise ValueError(
                "`masks` need a backbone with a mask token. Received a backbone with "
                "use_mask_token=False. Build it with `use_mask_token=True`."
            )
        num_masked = int(np.sum(masks.astype(bool)))
        if model.max_masked_patches is not None and num_masked > model.max_masked_patches:
            raise ValueError(
                "`masks` may hide at most `max_masked_patches` patches in a batch. Received: "
                f"{num_masked} hidden patches, max_masked_patches={model.max_masked_patches}. "
                "Raise it, or leave it None for a slot for every patch."
            )
    return crops


def check_pixels(name, images, channels, rank, normalized=False):
    """Checks rank, channels, dtype and range of NumPy images."""
    axes = "(B, H, W, C)" if rank == 4 else "(B, crops, H, W, C)"
    if images.ndim != rank:
        raise ValueError(
            f"`{name}` must have shape {axes}, channels last. Received: shape {images.shape}."
        )
    if images.shape[-1] != channels:
        hint = ""
        if images.shape[-3] == channels:
            hint = f" These look like channels first: use `np.moveaxis({name}, -3, -1)`."
        raise ValueError(
            f"`{name}` must have the backbone's {channels} channels in the last axis of {axes}. "
            f"Received: shape {images.shape}.{hint}"
        )
    if images.dtype == "uint8" and not normalized:
        return
    if images.dtype.kind != "f" and images.dtype.name != "bfloat16":
        kind = "normalised floats" if normalized else "uint8 from 0 to 255 or float from 0 to 1"
        raise ValueError(f"`{name}` must be {kind}. Received: dtype {images.dtype}.")
    low, high = float(images.min()), float(images.max())
    if not (np.isfinite(low) and np.isfinite(high)):
        raise ValueError(f"`{name}` must be finite. Received: values from {low} to {high}.")
    if not normalized and (low < -0.5 or high > 1.5):
        raise ValueError(
            f"Float `{name}` must be from 0 to 1, not yet normalised. Received: values from "
            f"{low:.4g} to {high:.4g}. For 0 to 255, divide by 255 or cast to uint8."
        )


def is_zero(weight):
    """Whether a weight is the number 0, and not a schedule that may be."""
    return isinstance(weight, (int, float)) and weight == 0


def channels_of(backbone):
    return backbone.embeddings.patch_embeddings.projection.kernel.shape[-2]


def as_numpy(array):
    if hasattr(array, "detach"):  # a torch tensor, whatever the backend
        array = array.detach().cpu()
    return np.asarray(array)
