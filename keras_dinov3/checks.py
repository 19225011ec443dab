"""Settings and data that cannot work, met before anything is computed."""

import math

import numpy as np

from keras_dinov3 import backend
from keras_dinov3.alignment import PatchAlignment
from keras_dinov3.augment import MultiCrop, as_pair
from keras_dinov3.encoder import grid_of
from keras_dinov3.extras import EncoderExtras
from keras_dinov3.families import channels_of, check_backbone, patch_size_of
from keras_dinov3.gram import GramAnchor
from keras_dinov3.heads import check_teacher_heads
from keras_dinov3.known_tokens import KNOWN, check_known_tokens
from keras_dinov3.lora import check_lora
from keras_dinov3.masking import BlockMasking, RandomMasking
from keras_dinov3.preservation import Preserve
from keras_dinov3.schedules import check_range, is_count, is_zero
from keras_dinov3.targets import SoftmaxCentering
from keras_dinov3.terms import terms_of

COUNTS = ("num_prototypes", "num_patch_prototypes", "head_hidden_dim", "head_bottleneck_dim")
COUNTS += ("head_num_layers", "koleo_top_k", "koleo_crops", "sinkhorn_iterations")
COUNTS += ("max_masked_patches", "prototype_chunk_size")
OPTIONAL = ("num_patch_prototypes", "koleo_crops", "max_masked_patches", "prototype_chunk_size")
CHOICES = {"ibot_average": ("crops", "patches"), "koleo_distance": ("euclidean", "cosine")}
CHOICES["remat"] = ("none", "blocks", "full")
# Of backbones: settings that no shape of a weight shows.
FUNCTION_SETTINGS = ("num_heads", "patch_size", "rope_theta", "hidden_activation", "layer_norm_eps")
FUNCTION_SETTINGS += ("use_gated_mlp", "use_swiglu_ffn", "apply_layernorm")
KINDS = {"gram": GramAnchor, "alignment": PatchAlignment, "preserve": Preserve}  # see `terms.TERMS`
WEIGHTS = ("dino_weight", "ibot_weight", "koleo_weight")


def check_settings(model):
    """Says which settings of a `DINOv3` contradict each other or its backbone."""
    student = model.student
    for name in COUNTS:
        value = getattr(model, name)
        if not is_count(value, at_least=1) and not (value is None and name in OPTIONAL):
            raise ValueError(
                f"`{name}` must be an integer of at least 1{', or None' * (name in OPTIONAL)}. "
                f"Received: {name}={value!r}."
            )
    check_chunks(model.prototype_chunk_size, model.head_sizes)
    for name in ("student_temperature", "teacher_temperature"):
        check_range(name, getattr(model, name), above=0)
    for name, choices in CHOICES.items():
        if getattr(model, name) not in choices:
            raise ValueError(
                f"`{name}` must be one of {choices}. Received: {name}={getattr(model, name)!r}."
            )
    if not isinstance(model.extras, (EncoderExtras, type(None))):
        raise ValueError(
            f"`extras` must be an `EncoderExtras` layer, or None. Received: {model.extras!r}."
        )
    check_lora(model.lora)
    for name in (*WEIGHTS, "local_weight"):
        check_range(name, getattr(model, name), low=0, below=math.inf)
    if all(is_zero(getattr(model, name)) for name in WEIGHTS):
        raise ValueError(f"At least one loss must have a weight. Received: 0 for all of {WEIGHTS}.")
    check_range("drop_path_rate", model.drop_path_rate, low=0, below=1, scheduled=False)
    if model.centering != "sinkhorn_knopp" and not isinstance(model.centering, SoftmaxCentering):
        raise ValueError(
            '`centering` must be "sinkhorn_knopp" or a `SoftmaxCentering` layer. '
            f"Received: centering={model.centering!r}."
        )
    if not isinstance(model.augmentation, (MultiCrop, type(None))):
        raise ValueError(
            '`augmentation` must be a `MultiCrop` layer, "multi_crop" for one with its defaults, '
            f"or None for ready crops. Received: augmentation={model.augmentation!r}."
        )
    if not isinstance(model.masking, (BlockMasking, RandomMasking, type(None))):
        raise ValueError(
            '`masking` must be a `BlockMasking` or `RandomMasking` layer, "block" for the first '
            f"with its defaults, or None. Received: masking={model.masking!r}."
        )
    if model.masking is not None and not getattr(student, "use_mask_token", True):
        raise ValueError(
            "`masking` needs a backbone with a mask token. Received a backbone with "
            "use_mask_token=False. Build it with `use_mask_token=True`, or train without "
            "masks: `masking=None, ibot_weight=0`."
        )
    if student.variable_dtype in ("bfloat16", "float16"):
        raise ValueError(
            "The backbone's weights must be float32: in 16 bits, the small steps of optimizer and "
            f"teacher round to nothing. Received: {student.variable_dtype} weights. For 16-bit "
            'arithmetic on float32 weights, build the backbone with dtype="mixed_bfloat16".'
        )
    check_teacher(model)
    check_teacher_ema(model.teacher_ema, student, model.teacher)
    check_terms(model)
    crops = crops_of(model.augmentation)
    for global_size, local_size, _ in sizes_of(model.augmentation):
        for backbone in (student, model.teacher):
            grid_of(global_size, patch_size_of(backbone), "global_crop_size")
        if crops["local"][0]:
            grid_of(local_size, patch_size_of(student), "local_crop_size")
    if crops:
        check_pairs(crops["global"][0], crops["local"][0], model)


def check_terms(model):
    sizes, gram = sizes_of(model.augmentation), model.gram
    named = [size for _, _, size in sizes if size is not None]
    if named and (gram is None or getattr(gram, "is_live", False)):
        raise ValueError(
            "Sizes of Gram crops are for a `GramAnchor` with a Gram teacher of its own. Received: "
            f"{named} and gram={gram and gram.source!r}. Leave them out of `sizes`."
        )
    for name, kind in KINDS.items():
        term = getattr(model, name)
        if not isinstance(term, (kind, type(None))):
            raise ValueError(
                f"`{name}` must be a `{kind.__name__}`, or None. Received: {name}={term!r}."
            )
    for term in terms_of(model).values():
        term.check(model)


def check_chunks(chunk_size, head_sizes):
    """Says which chunks of prototypes would be of one size."""
    common = math.gcd(*head_sizes.values())
    if chunk_size is not None and common % chunk_size:
        divisors = [n for n in range(1, common + 1) if common % n == 0]
        nearest = [n for n in divisors if n < chunk_size][-1:]
        nearest += [n for n in divisors if n > chunk_size][:1]
        raise ValueError(
            "`prototype_chunk_size` must divide the prototypes of both heads. Received: "
            f"prototype_chunk_size={chunk_size}, num_prototypes={head_sizes['dino']}, "
            f"num_patch_prototypes={head_sizes['ibot']}. "
            f"Nearest: {', '.join(str(n) for n in nearest)}."
        )


def check_teacher(model):
    student, teacher = model.student, model.teacher
    check_backbone(teacher)
    if teacher is student:
        raise ValueError(
            "`teacher` must be a backbone of its own, since only the student is trained. Received: "
            "the same object twice. Leave `teacher=None` for a copy of the backbone."
        )
    if channels_of(student) != channels_of(teacher):
        raise ValueError(
            "Student and teacher see the same crops, so they need the same channels. Received: "
            f"{channels_of(student)} and {channels_of(teacher)}."
        )
    check_teacher_heads(model)
    sizes = [patch_size_of(backbone) for backbone in (student, teacher)]
    if sizes[0] != sizes[1] and not is_zero(model.ibot_weight):
        raise ValueError(
            "iBOT compares patch with patch, so student and teacher need the same patch size. "
            f"Received: patch_size={sizes[0]} and {sizes[1]}. Class tokens "
            "alone: `ibot_weight=0, masking=None`."
        )


def check_teacher_ema(teacher_ema, student, teacher, student_alone=None):
    """Says why a teacher cannot follow its student, who alone may have some `EncoderExtras`."""
    if teacher_ema is None:
        return
    if student_alone is not None:
        raise ValueError(
            "A teacher that follows the student must compute the same function of its weights. "
            "Received: a model made with `teacher_ema=None` and a `teacher` of its own, to which "
            "its `extras` do not apply, nor its `lora`. Build the model with this `teacher_ema`."
        )
    settings = [
        {name: getattr(side, name, None) for name in FUNCTION_SETTINGS}
        for side in (student, teacher)
    ]
    changed = [name for name in FUNCTION_SETTINGS if settings[0][name] != settings[1][name]]
    shapes = [[tuple(w.shape) for w in side.weights] for side in (student, teacher)]
    if changed and shapes[0] == shapes[1]:
        received = ", ".join(
            f"{name}={settings[0][name]!r} and {settings[1][name]!r}" for name in changed
        )
        raise ValueError(
            "A teacher that follows the student must compute the same function of its weights. "
            f"Received: {received}. Build both alike, or pass `teacher_ema=None`."
        )
    if shapes[0] != shapes[1]:
        raise ValueError(
            "A teacher that follows the student must have its architecture. Received: "
            f"student of width {student.hidden_dim} and {student.num_layers} blocks, teacher "
            f"of width {teacher.hidden_dim} and {teacher.num_layers} blocks. To distil from "
            "a different, frozen teacher, pass `teacher_ema=None`."
        )


def check_pairs(num_global_crops, num_local_crops, model):
    is_alone = num_global_crops == 1 and num_local_crops == 0 and model.ignore_diagonal
    if is_alone and not is_zero(model.dino_weight):
        raise ValueError(
            "The DINO loss compares different crops of an image, so there must be two. Received: "
            f"one global crop, no local crop and dino_weight={model.dino_weight}. Use two global "
            "crops, add local ones, or set `dino_weight=0`."
        )


def crops_of(augmentation):
    """By kind, the number of crops per image and their size in pixels; nothing if unknown."""
    if augmentation is None:
        return {}
    return {
        kind: (
            getattr(augmentation, f"num_{kind}_crops"),
            as_pair(getattr(augmentation, f"{kind}_crop_size")),
        )
        for kind in ("global", "local")
    }


def sizes_of(augmentation):
    """`crop_sizes` of the layer; none if it is unknown."""
    return [] if augmentation is None else augmentation.crop_sizes


def check_batch(batch, model):
    """Says why a batch of images or crops does not fit the model; returns its size."""
    inputs = batch[0] if isinstance(batch, (tuple, list)) and len(batch) else batch
    crops = crops_of(model.augmentation)
    if isinstance(inputs, dict):
        lists = [name for name, array in inputs.items() if not hasattr(array, "shape")]
        if lists:
            raise ValueError(
                "Ready crops are a dict of arrays or tensors. Received: "
                f"{type(inputs[lists[0]]).__name__} for `{lists[0]}`. Stack them: `np.stack(...)`."
            )
        arrays = check_crops(
            {name: backend.numpy_of(array) for name, array in inputs.items()}, model
        )
        crops = {
            kind: (array.shape[1], array.shape[2:4])
            for kind, array in (
                ("global", arrays["global_crops"]),
                ("local", arrays.get("local_crops")),
            )
            if array is not None
        }
    else:
        if not hasattr(inputs, "shape"):
            raise ValueError(
                "A batch must be images (B, H, W, C), (images, labels) or a dict of ready crops. "
                f"Received: {type(inputs).__name__}."
            )
        if model.augmentation is None:
            raise ValueError(
                "With `augmentation=None` the data must be dicts of ready crops, "
                '{"global_crops": (B, G, S, S, C), ...}. Received: images of shape '
                f"{tuple(inputs.shape)}. Give `DINOv3` a `MultiCrop` to train on images."
            )
        arrays = {"images": backend.numpy_of(inputs)}
        check_pixels("images", arrays["images"], channels_of(model.student), 4)
    check_known_tokens(arrays, model)
    sizes = {name: len(array) for name, array in arrays.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"All arrays of a batch must hold the same images. Received: {sizes}.")
    batch_size = next(iter(sizes.values()))
    num_global_crops, size = crops["global"]
    check_pairs(num_global_crops, crops.get("local", (0,))[0], model)
    if "masks" not in arrays:
        sizes = [size] if "images" not in arrays else [x[0] for x in sizes_of(model.augmentation)]
        for size in sizes:
            check_masking(model, batch_size, num_global_crops, size)
    if not is_zero(model.koleo_weight) and batch_size <= model.koleo_top_k:
        raise ValueError(
            "KoLeo compares the images of a batch, so a batch needs at least "
            f"{model.koleo_top_k + 1}. Received: a batch of {batch_size} with koleo_weight="
            f"{model.koleo_weight}, koleo_top_k={model.koleo_top_k}. Use a larger batch (32 and "
            "more train well) or `koleo_weight=0`."
        )
    return batch_size


def check_masking(model, batch_size, num_crops, size):
    num_masked = 0
    if model.masking is not None:
        grid_size = grid_of(size, patch_size_of(model.student), "global_crops")
        num_masked = model.masking.num_masked(batch_size, num_crops, grid_size)
    needing = [name for name, term in terms_of(model).items() if term.needs_masks]
    if needing and model.masking is None:
        raise ValueError(
            "What tells masked from unmasked patches needs masks. Received: such settings of "
            f"{', '.join(f'`{name}`' for name in needing)}, masking=None and data without `masks`."
        )
    if num_masked == 0 and not is_zero(model.ibot_weight):
        hides = "masking=None" if model.masking is None else "masking that hides no patch"
        raise ValueError(
            "The iBOT loss needs masked patches. Received: ibot_weight="
            f"{model.ibot_weight}, {hides} and data without `masks`. "
            "Set `ibot_weight=0`, give `DINOv3` a `masking` layer or bring masks."
        )


def check_crops(crops, model):
    terms = terms_of(model).values()
    needed = {"global_crops", *(name for term in terms for name in term.crop_names)}
    unknown = set(crops) - needed - {"local_crops", "masks", *KNOWN}
    if unknown or needed - set(crops):
        raise ValueError(
            'Ready crops are a dict with "global_crops" (B, G, S, S, C) and optionally '
            '"local_crops" (B, L, s, s, C) and "masks" (B, G, N); for a `GramAnchor` with a Gram '
            'teacher of its own also "gram_crops" (B, G, T, T, C), the same boxes, larger; for a '
            '`PatchAlignment` of different crops "global_boxes" (B, G, 4), "global_flips" (B, G); '
            'of a cached teacher "teacher_cls" (B, G, D) and "teacher_patches" (B, G, N, D). '
            f"Received: keys {sorted(crops)}; needed: {sorted(needed)}."
        )
    channels, patch_size = channels_of(model.student), patch_size_of(model.student)
    if crops["global_crops"].ndim > 1 and crops["global_crops"].shape[1] == 0:
        raise ValueError(
            "`global_crops` must hold at least one crop of each image. Received: shape "
            f"{crops['global_crops'].shape}."
        )
    for name in crops.keys() & {"global_crops", "local_crops", "gram_crops"}:
        check_pixels(name, crops[name], channels, 5, normalized=True)
        backbone = model.gram.backbone if name == "gram_crops" else model.student
        grid_of(crops[name].shape[2:4], patch_size_of(backbone), name)
    for term in terms:
        term.check_crops(crops)
    if "masks" in crops:
        masks, (height, width) = crops["masks"], crops["global_crops"].shape[2:4]
        num_patches = (height // patch_size) * (width // patch_size)
        shape = (*crops["global_crops"].shape[:2], num_patches)
        check_mask_shape(masks, shape)
        if not getattr(model.student, "use_mask_token", True):
            raise ValueError(
                "`masks` need a backbone with a mask token. Received a backbone with "
                "use_mask_token=False. Build it with `use_mask_token=True`."
            )
        if masks.dtype != bool and not np.all((masks == 0) | (masks == 1)):
            raise ValueError(
                "`masks` must be bool, or numbers that are 0 or 1, true where a patch is hidden. "
                f"Received: {masks.dtype} with other values. Probabilities: `masks > 0.5`."
            )
        num_masked = int(np.sum(masks.astype(bool)))
        if model.max_masked_patches is not None and num_masked > model.max_masked_patches:
            raise ValueError(
                "`masks` may hide at most `max_masked_patches` patches in a batch. Received: "
                f"{num_masked} hidden patches, max_masked_patches={model.max_masked_patches}. "
                "Raise it, or leave it None for a slot for every patch."
            )
    return crops


def check_mask_shape(masks, shape):
    if tuple(masks.shape) != shape:
        raise ValueError(
            f"`masks` must have shape (images, global crops, patches)={shape}. "
            f"Received: masks.shape={tuple(masks.shape)}."
        )


def check_pixels(name, images, channels, rank, normalized=False):
    """Checks rank, channels, dtype and range of NumPy images."""
    axes = "(B, H, W, C)" if rank == 4 else "(B, crops, H, W, C)"
    if images.ndim != rank:
        hint = " For one image, `images[None]`; for a list of them, `np.stack(images)`."
        raise ValueError(
            f"`{name}` must have shape {axes}, channels last. Received: shape {images.shape}."
            + hint * (images.ndim == rank - 1 == 3)
        )
    if images.shape[-1] != channels:
        hint = ""
        if images.shape[-3] == channels:
            hint = f" These look like channels first: use `np.moveaxis({name}, -3, -1)`."
        raise ValueError(
            f"`{name}` must have the backbone's {channels} channels in the last axis of {axes}. "
            f"Received: shape {images.shape}.{hint}"
        )
    if images.size == 0 or images.dtype == "uint8" and not normalized:
        return  # no local crops, for instance
    if images.dtype.kind != "f" and images.dtype.name != "bfloat16":
        kind = "normalised floats" if normalized else "uint8 from 0 to 255 or float from 0 to 1"
        raise ValueError(f"`{name}` must be {kind}. Received: dtype {images.dtype}.")
    low, high = float(images.min()), float(images.max())
    if not (np.isfinite(low) and np.isfinite(high)):
        raise ValueError(f"`{name}` must be finite. Received: values from {low} to {high}.")
    if normalized and max(-low, high) > 100:
        raise ValueError(
            f"`{name}` must be normalised: near mean 0 and deviation 1. Received: values from "
            f"{low:.4g} to {high:.4g}. `MultiCrop(mean=..., std=...).normalize` does that."
        )
    if not normalized and (low < -0.5 or high > 1.5):
        raise ValueError(
            f"Float `{name}` must be from 0 to 1, not yet normalised. Received: values from "
            f"{low:.4g} to {high:.4g}. For 0 to 255, divide by 255 or cast to uint8."
        )
