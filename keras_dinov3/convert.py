"""DINOv3 weights as Meta and Hugging Face store them, to Keras Hub backbones and back."""

import inspect
import json
import math
import pathlib
import re
import types
import warnings
from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

import keras
import keras_hub
import numpy as np
import safetensors
import safetensors.numpy
from keras import ops

from keras_dinov3 import backend
from keras_dinov3.extras import RMS
from keras_dinov3.model import DINOv3
from keras_dinov3.rope import rope_periods
from keras_dinov3.schedules import is_count

# Meta's and Hugging Face's checkpoints


def load_meta(model, state_dict, part="student"):
    """Loads one side of a checkpoint of Meta's training code into that side of a model.

    Names: `backbone.*`, `dino_head.*` and `ibot_head.*`, all of them needed. `storage_tokens` go to
    the registers of the backbone, or of its `EncoderExtras` if it has none. Wrappers around them
    (`module.`, `_orig_mod.`, `model.`, also as nested dicts) are looked through. If there are
    names under `student.` or `teacher.`, only those of `part` are read. A Gram teacher has no
    heads.

    Args:
        model: `DINOv3` of the checkpoint's sizes.
        state_dict: Dict of name to array, as `read_weights` returns it.
        part: `"student"`, `"teacher"` or `"gram_teacher"`: which side of the checkpoint, and of
            the model.

    Raises:
        TypeError: If `model` is no `DINOv3`.
        ValueError: If weights are unknown, missing or of another shape than the model's. All are
            named, and the model is left as it was.

    Reference:
        [Siméoni et al., 2025](https://arxiv.org/abs/2508.10104); names of github.com/
        facebookresearch/dinov3.
    """
    if not isinstance(model, DINOv3):
        raise TypeError(f"`model` must be a `DINOv3`. Received: type {type(model).__name__}.")
    arrays = side_of(state_dict, part)
    if part == "gram_teacher":
        backbone, extras, heads = *gram_teacher_of(model), {}
    else:
        index = SIDES.index(part)
        backbone, extras, *heads = (pair[index] for pair in model.student_and_teacher)
        heads = dict(zip(("dino_head", "ibot_head"), heads, strict=True))
    check_family(backbone)
    sizes = sizes_of(backbone)
    places = with_extras(under("backbone.", meta_places(sizes)), extras, backbone.hidden_dim)
    for name, head in heads.items():
        places |= under(f"{name}.", head_places(head, backbone.hidden_dim))
    buffers = {f"backbone.{name}": array for name, array in meta_buffers(sizes, extras).items()}
    check(arrays, places, buffers, f"the {part} of this `DINOv3`")
    assign(types.SimpleNamespace(backbone=backbone, extras=extras, **heads), places, arrays)


def backbone_from_meta(state_dict, num_heads, part="teacher", **config):
    """Makes a Keras Hub backbone of weights in Meta's names.

    Width, depth, patch size, registers, MLP, biases and the base of the rotary periods are those
    of the arrays. What weights do not tell has the value of Meta's released models.

    Args:
        state_dict: Dict of name to array, as `read_weights` returns it: a released backbone
            (`cls_token`, `blocks.0.norm1.weight`, ...), or a training checkpoint, of which the
            backbone of `part` is taken and the heads are left.
        num_heads: Int. Attention heads, which no array tells.
        part: `"student"`, `"teacher"` or `"gram_teacher"`. Side of a training checkpoint.
        **config: Arguments of `keras_hub.models.DINOV3Backbone`, in place of what is found:
            `layer_norm_eps` (default 1e-5, Meta's `layernormbf16`; its `layernorm` has 1e-6),
            `image_shape` (default 14 x 14 patches), `rope_theta`, `dtype`, ... Also `image_size`,
            two ints (height, width) in pixels: `image_shape` with the channels of the weights.

    Returns:
        `keras_hub.models.DINOV3Backbone` with float32 weights, unless `dtype` says otherwise.

    Raises:
        ValueError: If weights are unknown, missing or misshapen, or if they have no place in a
            `DINOV3Backbone`: a norm for class tokens (`cls_norm`), norms without bias, blocks
            without layer scale. All are named. (`local_cls_norm` is for training alone and is
            left out with a warning; `load_meta` loads it into a model with such `extras`.)

    Reference:
        [Siméoni et al., 2025](https://arxiv.org/abs/2508.10104); names of github.com/
        facebookresearch/dinov3.
    """
    arrays = side_of(state_dict, part)
    if any(name.startswith("backbone.") for name in arrays):
        arrays = {
            name.removeprefix("backbone."): array
            for name, array in arrays.items()
            if not name.startswith(("dino_head.", "ibot_head."))
        }
    left_out = sorted(name for name in arrays if name.startswith("local_cls_norm."))
    if left_out:
        warnings.warn(
            f"Left out {', '.join(left_out)}: the norm of local crops' class tokens in training, "
            "which features do not depend on.",
            stacklevel=2,
        )
        arrays = {name: array for name, array in arrays.items() if name not in left_out}
    found = meta_config(arrays, num_heads)
    return new_backbone(arrays, found, config, meta_places, meta_buffers, "a `DINOV3Backbone`")


def backbone_to_meta(backbone):
    """The weights of a Keras Hub backbone in Meta's names and layouts.

    Weights that came from Meta return with the same bytes, with one exception. Meta masks the key
    bias by keeping it and multiplying it with 0; the Hub (`use_key_bias=False`) has none, so its
    values return as zeros, which is also how Meta initialises them. The mask `attn.qkv.bias_mask`
    and `rope_embed.periods` are no weights in the Hub; they are computed anew, in float32 (some
    released files round the periods to bfloat16).

    Args:
        backbone: `keras_hub.models.DINOV3Backbone`.

    Returns:
        Dict of name to NumPy array, each in the dtype of the backbone's weight. A mask token that
        the backbone has not is left out.

    Raises:
        TypeError: If `backbone` is of another family.
        ValueError: If the biases or the activation are none that Meta's model has.
    """
    check_family(backbone)
    sizes = sizes_of(backbone)
    return {**collect(backbone, meta_places(sizes)), **meta_buffers(sizes)}


def backbone_from_huggingface(folder, **config):
    """Makes a Keras Hub backbone of a Hugging Face `DINOv3ViTModel` folder.

    Args:
        folder: Path of a folder with `config.json` and either `model.safetensors` or
            `model.safetensors.index.json` and its shards. What `config.json` leaves out has the
            default of `DINOv3ViTConfig`. An `image_size` that is not whole patches is rounded
            down. `pos_embed_shift`, `pos_embed_jitter` and `pos_embed_rescale`, which vary
            positions in training alone, have no place in the Hub's class and are not read; give
            them to `EncoderExtras(rope_shift=..., rope_jitter=..., rope_rescale=...)`.
        **config: Arguments of `keras_hub.models.DINOV3Backbone`, in place of the folder's:
            `image_shape`, `dtype`, ..., or `image_size`, as for `backbone_from_meta`.

    Returns:
        `keras_hub.models.DINOV3Backbone` with float32 weights, unless `dtype` says otherwise.

    Raises:
        FileNotFoundError: If `config.json` or the weights are missing.
        ValueError: If a file is damaged or of another model, or if weights are unknown, missing or
            misshapen. All are named.

    Reference:
        `DINOv3ViTModel` of the `transformers` library.
    """
    folder = pathlib.Path(folder)
    found = huggingface_config(read_json(folder / "config.json"), folder / "config.json")
    arrays = flatten(read_huggingface_weights(folder))
    found["use_mask_token"] = HUGGINGFACE["mask"] in arrays
    if found["num_layers"] > len(arrays):  # before each of them gets a table of names
        raise ValueError(
            f"`num_hidden_layers` of config.json is {found['num_layers']}, but {folder} holds only "
            f"{len(arrays)} arrays."
        )
    return new_backbone(
        arrays, found, config, huggingface_places, huggingface_buffers, "the model of config.json"
    )


def backbone_to_huggingface(backbone, folder):
    """Writes a backbone as a folder that Hugging Face's `DINOv3ViTModel.from_pretrained` reads.

    Arrays that came from there return with the same bytes, if `dtype` kept theirs. So does what
    `config.json` says of the model, but for settings that the Hub's class does not know:
    `pos_embed_shift`, `pos_embed_jitter` and `pos_embed_rescale` are left out, and `transformers`
    takes its defaults in training (features at inference do not depend on them); `image_size` is
    in whole patches.

    Args:
        backbone: `keras_hub.models.DINOV3Backbone`. A mask token that it has not is left out;
            `transformers` then starts from zeros.
        folder: Path. Made if missing; `config.json` and `model.safetensors` in it are replaced.

    Raises:
        TypeError: If `backbone` is of another family.
        ValueError: If the activation has no name there.
    """
    check_family(backbone)
    sizes = sizes_of(backbone)
    if sizes["hidden_activation"] not in ACTIVATIONS:
        raise ValueError(
            f"`hidden_activation` must be one of {', '.join(ACTIVATIONS)} to have the same meaning "
            f"at Hugging Face. Received: {sizes['hidden_activation']!r}."
        )
    shape = sizes["image_shape"]
    height, width = shape[1:] if is_channels_first(sizes) else shape[:2]
    config = {
        "architectures": ["DINOv3ViTModel"],
        "model_type": "dinov3_vit",
        "dtype": backbone.dtype_policy.variable_dtype,
        "num_channels": sizes["num_channels"],
        "image_size": height if height == width else [height, width],
        **{theirs: sizes[ours] for ours, (theirs, _) in HUGGINGFACE_CONFIG.items()},
    }
    arrays = collect(backbone, huggingface_places(sizes))
    arrays.update(huggingface_buffers(sizes))
    folder = pathlib.Path(folder)
    write_weights(arrays, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


# Files


def read_weights(path):
    """Reads a file of weights: `.safetensors`, or `.pth` and `.pt` (needs torch).

    Args:
        path: Path of the file. Torch's files are read without running code from them.

    Returns:
        Dict of name to NumPy array in the file's dtype. Nested dicts, as in training checkpoints,
        become one with dots: `{"teacher": {"norm.weight": ...}}` is `"teacher.norm.weight"`.
        Entries that are no arrays are left out.

    Raises:
        FileNotFoundError: If there is no such file.
        ImportError: If the file is torch's and torch is not installed.
        ValueError: If the file is damaged, of another kind or holds no arrays.
    """
    path = pathlib.Path(path)
    if path.suffix not in (".safetensors", ".pth", ".pt"):
        raise ValueError(
            f"Weights are read from .safetensors, .pth and .pt files. Received: {path}."
        )
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    try:
        if path.suffix == ".safetensors":
            weights = safetensors.numpy.load_file(path)
        else:
            weights = flatten(backend.load_torch_file(path))
    except ImportError:
        raise
    except Exception as error:  # parsers of two formats, with an open list of complaints
        # torch's words are left out: they advise to run the code in the file.
        said = f" ({first_line(error)})" if path.suffix == ".safetensors" else ""
        raise ValueError(
            f"{path} cannot be read as a {path.suffix} file of weights: it is damaged, of another "
            f"kind, or holds more than arrays in dicts{said}."
        ) from error
    if not weights:
        raise ValueError(f"{path} holds no arrays.")
    return weights


def write_weights(arrays, path):
    """Writes a dict of name to array as a `.safetensors`, or a `.pth` or `.pt` file (needs torch).

    Args:
        arrays: Dict of name to NumPy array.
        path: Path of the file, replaced if it exists. Its folder is made if missing.

    Raises:
        ImportError: If the file is to be torch's and torch is not installed.
        OSError: If the file cannot be written.
        ValueError: If the name ends otherwise.
    """
    path = pathlib.Path(path)
    if path.suffix not in (".safetensors", ".pth", ".pt"):
        raise ValueError(
            f"Weights are written to .safetensors, .pth and .pt files. Received: {path}."
        )
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()  # fails as files do; the two writers have errors of their own
    if path.suffix == ".safetensors":
        # transformers refuses files that do not say that their layout is torch's.
        safetensors.numpy.save_file(arrays, path, metadata={"format": "pt"})
    else:
        backend.save_torch_file(arrays, path)


def read_huggingface_weights(folder):
    if (folder / "model.safetensors").exists():
        return read_weights(folder / "model.safetensors")
    index_path = folder / "model.safetensors.index.json"
    if not index_path.exists():
        raise FileNotFoundError(
            f"{folder} holds neither model.safetensors nor model.safetensors.index.json."
        )
    shards = read_json(index_path).get("weight_map")
    if not isinstance(shards, dict) or not all(
        isinstance(file, str) and re.fullmatch(r"[\w.-]+\.safetensors", file)
        for file in shards.values()
    ):
        raise ValueError(
            f"`weight_map` of {index_path} must map names to .safetensors files beside it."
        )
    arrays, wrong = {}, []
    for file in sorted(set(shards.values())):
        held = read_weights(folder / file)
        mapped = {name for name, where in shards.items() if where == file}
        wrong += [f"{file} lacks {name}" for name in sorted(mapped - held.keys())]
        wrong += [f"{file} also holds {name}" for name in sorted(held.keys() - mapped)]
        arrays.update(held)
    if wrong:
        raise ValueError(f"{index_path} and its shards must agree. Received: {'; '.join(wrong)}.")
    return arrays


def read_json(path):
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # also text that is not UTF-8
        raise ValueError(f"{path} is no JSON: {first_line(error)}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object. Received: {type(content).__name__}.")
    return content


def first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# Where each array lies


class Place(NamedTuple):
    """Where an array of a checkpoint lies in a Keras model."""

    shape: tuple  # of the array
    paths: tuple  # weights that are joined along the array's first axis; None: zeros
    axes: tuple | None = None  # which of the array's axes are the weight's, in its order


MATRIX = (1, 0)  # (out, in) to (in, out)
PATCHES = (2, 3, 1, 0)  # (out, in, h, w) to (h, w, in, out)
QKV = ("query", "key", "value")
META = {
    "cls": "cls_token",
    "registers": "storage_tokens",
    "mask": "mask_token",
    "patches": "patch_embed.proj",
    "block": "blocks",
    "qkv": "attn.qkv",
    "output": "attn.proj",
    "layer_scale": "ls{}.gamma",
}
META_MLP = {"up_proj": "mlp.fc1", "down_proj": "mlp.fc2"}
META_GATED_MLP = {"gate_proj": "mlp.w1", "up_proj": "mlp.w2", "down_proj": "mlp.w3"}
META_ACTIVATIONS = {False: "gelu", True: "silu"}  # of plain and gated MLP
HUGGINGFACE = {
    "cls": "embeddings.cls_token",
    "registers": "embeddings.register_tokens",
    "mask": "embeddings.mask_token",
    "patches": "embeddings.patch_embeddings",
    "block": "layer",
    "query": "attention.q_proj",
    "key": "attention.k_proj",
    "value": "attention.v_proj",
    "output": "attention.o_proj",
    "layer_scale": "layer_scale{}.lambda1",
    "gate_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "down_proj": "mlp.down_proj",
}
# Argument of the Hub class: key of config.json and its default in `DINOv3ViTConfig`.
HUGGINGFACE_CONFIG = {
    "patch_size": ("patch_size", 16),
    "num_layers": ("num_hidden_layers", 12),
    "hidden_dim": ("hidden_size", 384),
    "num_heads": ("num_attention_heads", 6),
    "intermediate_dim": ("intermediate_size", 1536),
    "layer_scale_init_value": ("layerscale_value", 1.0),
    "num_register_tokens": ("num_register_tokens", 0),
    "hidden_activation": ("hidden_act", "gelu"),
    "use_gated_mlp": ("use_gated_mlp", False),
    "use_query_bias": ("query_bias", True),
    "use_key_bias": ("key_bias", False),
    "use_value_bias": ("value_bias", True),
    "use_proj_bias": ("proj_bias", True),
    "use_mlp_bias": ("mlp_bias", True),
    "attention_dropout": ("attention_dropout", 0.0),
    "drop_path_rate": ("drop_path_rate", 0.0),
    "layer_norm_eps": ("layer_norm_eps", 1e-5),
    "rope_theta": ("rope_theta", 100.0),
}
ACTIVATIONS = ("gelu", "silu", "relu")  # that mean the same at Hugging Face and in Keras


def backbone_places(sizes, names):
    """The arrays of a backbone: dict of name to `Place`.

    This is the one table of what a backbone holds; a weight that the Hub class gains is added here.

    Args:
        sizes: Dict of the arguments of `DINOV3Backbone`, and `num_channels`.
        names: Dict of role to name: `META` with one of its MLPs, or `HUGGINGFACE`.
    """
    width, hidden_dim, patch_size = (
        sizes[name] for name in ("hidden_dim", "intermediate_dim", "patch_size")
    )
    places = {}

    def dense(theirs, ours, shape, use_bias, axes=MATRIX):
        places[f"{theirs}.weight"] = Place(shape, (f"{ours}.kernel",), axes)
        if use_bias:
            places[f"{theirs}.bias"] = Place(shape[:1], (f"{ours}.bias",))

    def norm(theirs, ours):
        places[f"{theirs}.weight"] = Place((width,), (f"{ours}.gamma",))
        places[f"{theirs}.bias"] = Place((width,), (f"{ours}.beta",))

    places[names["cls"]] = Place((1, 1, width), ("embeddings.cls_token",))
    if sizes["num_register_tokens"]:
        shape = (1, sizes["num_register_tokens"], width)
        places[names["registers"]] = Place(shape, ("embeddings.register_tokens",))
    if sizes["use_mask_token"]:
        places[names["mask"]] = Place((1, 1, width), ("embeddings.mask_token",))
    shape = (width, sizes["num_channels"], patch_size, patch_size)
    dense(names["patches"], "embeddings.patch_embeddings.projection", shape, True, PATCHES)

    for index in range(sizes["num_layers"]):
        theirs, ours = f"{names['block']}.{index}.", f"encoder.layers.{index}."
        square = (width, width)
        norm(theirs + "norm1", ours + "norm1")
        if "qkv" in names:
            layers = [f"{ours}attention.{role}_dense" for role in QKV]
            biases = [sizes[f"use_{role}_bias"] for role in QKV]
            places[f"{theirs}{names['qkv']}.weight"] = Place(
                (3 * width, width), tuple(f"{layer}.kernel" for layer in layers), MATRIX
            )
            if any(biases):
                places[f"{theirs}{names['qkv']}.bias"] = Place(
                    (3 * width,),
                    tuple(
                        f"{layer}.bias" if bias else None
                        for layer, bias in zip(layers, biases, strict=True)
                    ),
                )
        else:
            for role in QKV:
                layer, bias = f"{ours}attention.{role}_dense", sizes[f"use_{role}_bias"]
                dense(theirs + names[role], layer, square, bias)
        output = f"{ours}attention.output_dense"
        dense(theirs + names["output"], output, square, sizes["use_proj_bias"])
        for scale in (1, 2):
            places[theirs + names["layer_scale"].format(scale)] = Place(
                (width,), (f"{ours}layer_scale{scale}.lambda1",)
            )
        norm(theirs + "norm2", ours + "norm2")
        for role in ("gate_proj", "up_proj", "down_proj"):
            if role != "gate_proj" or sizes["use_gated_mlp"]:
                shape = (width, hidden_dim) if role == "down_proj" else (hidden_dim, width)
                dense(theirs + names[role], f"{ours}mlp.{role}", shape, sizes["use_mlp_bias"])
    norm("norm", "layernorm")
    return places


def meta_places(sizes):
    check_meta_settings(sizes)
    mlp = META_GATED_MLP if sizes["use_gated_mlp"] else META_MLP
    places = backbone_places(sizes, {**META, **mlp})
    if "mask_token" in places:
        places["mask_token"] = places["mask_token"]._replace(shape=(1, sizes["hidden_dim"]))
    return places


def check_meta_settings(sizes):
    """Says which settings Meta's model has not, so that its weights would mean something else."""
    biases = tuple(sizes[f"use_{role}_bias"] for role in QKV)
    if biases not in ((True, True, True), (True, False, True), (False, False, False)):
        raise ValueError(
            "Meta's model has biases for query, key and value, for query and value, or for none. "
            f"Received: use_query_bias={biases[0]}, use_key_bias={biases[1]}, "
            f"use_value_bias={biases[2]}."
        )
    activation = sizes["hidden_activation"]
    if activation != META_ACTIVATIONS[sizes["use_gated_mlp"]]:
        raise ValueError(
            "Meta's model has the activation gelu in a plain MLP and silu in a gated one. "
            f"Received: hidden_activation={activation!r}, use_gated_mlp={sizes['use_gated_mlp']}."
        )


def head_places(head, width):
    """The arrays of a `DINOHead` on tokens of `width` features, in Meta's names."""
    layers = [f"hidden_layers.{index}" for index in range(head.num_layers - 1)] + ["bottleneck"]
    outputs = [head.hidden_dim] * (head.num_layers - 1) + [head.bottleneck_dim]
    places = {}
    for index, (layer, output) in enumerate(zip(layers, outputs, strict=True)):
        # Activations take the odd places; a single layer stands alone.
        name = "mlp" if len(layers) == 1 else f"mlp.{2 * index}"
        places[f"{name}.weight"] = Place((output, width), (f"{layer}.kernel",), MATRIX)
        places[f"{name}.bias"] = Place((output,), (f"{layer}.bias",))
        width = output
    shape = (head.num_prototypes, head.bottleneck_dim)
    places["last_layer.weight"] = Place(shape, ("prototypes.kernel",), MATRIX)
    return places


def with_extras(places, extras, width):
    """Places of a side's backbone (`backbone.*`) with the weights that `EncoderExtras` change."""
    if extras is None:  # a Gram teacher with a backbone of its own
        return places

    def is_used(name):
        is_beta = re.search(r"norm\d?\.bias$", name)
        is_scale = re.search(r"\.ls\d\.gamma$", name)
        return not (is_beta and extras.norm == RMS) and not (is_scale and not extras.layer_scale)

    if extras.register_tokens is not None:
        shape = tuple(extras.register_tokens.shape)
        places["backbone.storage_tokens"] = Place(shape, ("extras.register_tokens",))
    for name in ("cls_norm", "local_cls_norm"):
        if getattr(extras, name) is not None:
            for theirs, ours in (("weight", "gamma"), ("bias", "beta")):
                path = f"extras.{name}.{ours}"
                places[f"backbone.{name}.{theirs}"] = Place((width,), (path,))
    return {name: place for name, place in places.items() if is_used(name)}


def meta_buffers(sizes, extras=None):
    """Arrays of Meta's checkpoints that follow from the settings, and are compared with them."""
    width = sizes["hidden_dim"]
    head_dim = width // sizes["num_heads"]
    buffers = {"rope_embed.periods": periods(head_dim, sizes["rope_theta"])}
    if extras is not None and extras.rope_periods is not None:
        low, high = extras.rope_periods
        between = rope_periods(head_dim, min_period=low, max_period=high)
        buffers["rope_embed.periods"] = ops.convert_to_numpy(between)
    if sizes["use_query_bias"] and not sizes["use_key_bias"]:
        for index in range(sizes["num_layers"]):
            mask = np.repeat(np.array([1, 0, 1], "float32"), width)
            buffers[f"blocks.{index}.attn.qkv.bias_mask"] = mask
    return buffers


def huggingface_places(sizes):
    return backbone_places(sizes, HUGGINGFACE)


def huggingface_buffers(sizes):
    """`transformers` keeps an empty array where there are no register tokens."""
    if sizes["num_register_tokens"]:
        return {}
    return {HUGGINGFACE["registers"]: np.zeros((1, 0, sizes["hidden_dim"]), "float32")}


def periods(head_dim, theta):
    # Meta's are float32 throughout; for its base of 100 a power in float64 rounds to the same.
    exponents = 2 * np.arange(head_dim // 4, dtype="float32") / np.float32(head_dim // 2)
    return (float(theta) ** exponents.astype("float64")).astype("float32")


def under(prefix, places):
    return {
        prefix + name: place._replace(paths=tuple(p and prefix + p for p in place.paths))
        for name, place in places.items()
    }


# From arrays to settings


def check_family(backbone):
    if not isinstance(backbone, keras_hub.models.DINOV3Backbone):
        raise TypeError(
            "Meta's and Hugging Face's DINOv3 weights go with a `keras_hub.models.DINOV3Backbone`. "
            f"Received: type {type(backbone).__name__}."
        )


def sizes_of(backbone):
    kernel = backbone.embeddings.patch_embeddings.projection.kernel
    return {**backbone.get_config(), "num_channels": kernel.shape[-2]}


def is_channels_first(config):
    data_format = config.get("data_format") or keras.config.image_data_format()
    return data_format == "channels_first"


def meta_config(arrays, num_heads):
    """The arguments of a `DINOV3Backbone` that weights in Meta's names tell.

    In place of `image_shape`: `image_size`, `(height, width)`, and `num_channels`.
    """

    def usual(ending, axis, ndim, default=None):
        """The commonest length: an array of a wrong shape must not make all others wrong."""
        shapes = [a.shape for name, a in arrays.items() if name.endswith(ending)]
        lengths = Counter(shape[axis] for shape in shapes if len(shape) == ndim)
        return lengths.most_common(1)[0][0] if lengths else default

    def some(ending):
        return any(name.endswith(ending) for name in arrays)

    blocks = {match[1] for name in arrays if (match := re.match(r"blocks\.(\d+)\.", name))}
    width = usual(".norm1.weight", 0, 1) or usual("attn.qkv.weight", 1, 2)
    if not blocks or not width:
        shown = ", ".join(sorted(arrays)[:5])
        raise ValueError(
            "These are no DINOv3 backbone weights in Meta's names (cls_token, "
            f"blocks.0.norm1.weight, ...). Received {len(arrays)} arrays: {shown}, ..."
        )
    if not is_count(num_heads, at_least=1) or width % (4 * num_heads):
        raise ValueError(
            "`num_heads` must be an integer of at least 1, and 4 * `num_heads` a divisor of the "
            f"width {width} of these weights. Received: num_heads={num_heads!r}."
        )
    is_gated = some("mlp.w1.weight")
    up_proj = (META_GATED_MLP if is_gated else META_MLP)["up_proj"]
    has_bias = some("attn.qkv.bias")
    patch_size = usual("patch_embed.proj.weight", -1, 4, 1)
    return {
        "patch_size": patch_size,
        "num_layers": len(blocks),
        "hidden_dim": width,
        "num_heads": num_heads,
        "intermediate_dim": usual(f"{up_proj}.weight", 0, 2, 1),
        "num_register_tokens": usual("storage_tokens", 1, 3, 0),
        "use_mask_token": "mask_token" in arrays,
        "hidden_activation": META_ACTIVATIONS[is_gated],
        "use_gated_mlp": is_gated,
        "use_query_bias": has_bias,
        "use_key_bias": has_bias and not some("attn.qkv.bias_mask"),
        "use_value_bias": has_bias,
        "use_proj_bias": some("attn.proj.bias"),
        "use_mlp_bias": some((".fc1.bias", ".fc2.bias", ".w1.bias", ".w2.bias", ".w3.bias")),
        "image_size": (14 * patch_size, 14 * patch_size),
        "num_channels": usual("patch_embed.proj.weight", 1, 4, 3),
        "rope_theta": theta_of(arrays.get("rope_embed.periods"), width // num_heads),
    }


def theta_of(array, head_dim, default=100.0):
    """The base of Meta's periods, of as few digits as they allow; the default if they are none."""
    count = head_dim // 4
    if array is None or array.shape != (count,) or count == 1 or not is_float(array):
        return default
    found = array.astype("float64")
    if not (np.all(np.isfinite(found)) and found[-1] > 1):
        return default
    estimate = found[-1] ** (count / (count - 1))
    # Periods in float32 first, then those that a checkpoint rounded to bfloat16.
    for tolerance in (1e-6, ROUNDING):
        for digits in range(1, 8):
            theta = float(f"{estimate:.{digits}g}")
            if np.allclose(periods(head_dim, theta), found, rtol=tolerance, atol=0):
                return theta
    return default


def huggingface_config(config, path):
    """The same as `meta_config`, from a Hugging Face `config.json`."""
    if config.get("model_type") != "dinov3_vit":
        raise ValueError(
            f"`model_type` of {path} must be 'dinov3_vit'. Received: {config.get('model_type')!r}."
        )
    # Newer files keep the base with other settings of the rotary embedding.
    rope = config.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:
        config = {**config, "rope_theta": rope["rope_theta"]}
    wrong = []

    def value(key, default, least=None):
        found = config.get(key, default)
        kind = type(default)
        if kind is float and type(found) is int and found.bit_length() < 64:
            found = float(found)
        fits = type(found) is kind and (kind is not float or math.isfinite(found))
        if not fits or (least is not None and found < least):
            limit = "" if least is None else f" of at least {least}"
            wrong.append(f"{key}={found!r} (needs {kind.__name__}{limit})")
            return default
        return found

    found = {}
    for ours, (theirs, default) in HUGGINGFACE_CONFIG.items():
        least = {int: 1, float: 0}.get(type(default))
        found[ours] = value(theirs, default, 0 if ours == "num_register_tokens" else least)
    found["num_channels"] = value("num_channels", 3, 1)
    size = config.get("image_size", 224)
    size = size if isinstance(size, list) else [size, size]
    if len(size) != 2 or not all(
        type(length) is int and length >= found["patch_size"] for length in size
    ):
        wrong.append(f"image_size={config.get('image_size')!r} (needs one or two ints, in pixels)")
    if found["hidden_activation"] not in ACTIVATIONS:
        wrong.append(f"hidden_act={found['hidden_activation']!r} (of {', '.join(ACTIVATIONS)})")
    if found["hidden_dim"] % (4 * found["num_heads"]):
        wrong.append(
            f"hidden_size={found['hidden_dim']} (needs a multiple of 4 * num_attention_heads="
            f"{4 * found['num_heads']})"
        )
    if wrong:
        raise ValueError(f"{path} has settings that cannot be: {'; '.join(wrong)}.")
    # The position embedding is computed for whole patches only.
    found["image_size"] = [length // found["patch_size"] * found["patch_size"] for length in size]
    return found


# From names to sides

SIDES = ("student", "teacher", "gram_teacher")
# What frameworks and checkpoints put around a module: its name goes on behind.
WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
WRAPPERS |= {"model", "state_dict"}
# What a training checkpoint holds beside its student and teacher.
COMPANIONS = {"optimizer", "model_ema"}
COMPANIONS |= {"dino_loss", "ibot_patch_loss", "koleo_loss", "gram_loss"}


def gram_teacher_of(model):
    """The backbone that a model's Gram teacher has, and its extras."""
    if model.gram is None or model.gram.backbone is None:
        raise ValueError(
            "The model needs a Gram teacher with weights of its own. Received: a `DINOv3` with "
            f"gram={model.gram and model.gram.source!r}. Give it "
            '`gram=GramAnchor(source="teacher")`, or a backbone as its source.'
        )
    return model.gram.backbone, model.gram.extras


def side_of(state_dict, part):
    """The arrays of one side of a training checkpoint, or all of them if it has no sides."""
    if part not in SIDES:
        raise ValueError(f"`part` must be one of {SIDES}. Received: part={part!r}.")
    arrays = flatten(state_dict)
    tops = {name.split(".")[0] for name in arrays}
    if not tops.intersection({"student", "teacher", part}):
        others = COMPANIONS | {"gram_teacher"}
        return {name: a for name, a in arrays.items() if name.split(".")[0] not in others}
    if part not in tops:
        raise ValueError(f"The weights have no names under `{part}.`. Received: {sorted(tops)}.")
    others = COMPANIONS | set(SIDES) - {part}
    side = {}
    for name, array in arrays.items():
        if name.split(".")[0] not in others:
            add(side, name.removeprefix(f"{part}."), array)
    return side


def flatten(state_dict):
    """Nested dicts as one: dotted names without wrappers, to NumPy arrays; the rest is left out."""
    if not isinstance(state_dict, Mapping):
        raise ValueError(
            f"Weights must be a dict of name to array. Received: {type(state_dict).__name__}."
        )
    arrays = {}
    for key, value in state_dict.items():
        key = ".".join(part for part in str(key).split(".") if part not in WRAPPERS)
        if isinstance(value, Mapping):
            for name, array in flatten(value).items():
                add(arrays, f"{key}.{name}" if key else name, array)
        elif hasattr(value, "shape") and hasattr(value, "dtype"):
            add(arrays, key, backend.numpy_of(value))
    return arrays


def add(arrays, name, array):
    if name in arrays:
        raise ValueError(f"Two arrays have the name {name} once wrappers around it are removed.")
    arrays[name] = array


# In and out

ROUNDING = 0.02  # relative: periods may come in bfloat16, some of it computed
# Buffers that say nothing that is not known without them.
OPTIONAL = ("rope_embed.periods", HUGGINGFACE["registers"])
# What is wrong, a pattern of names, and why; of what is missing, only if none are there.
REASONS = (
    (
        "unknown",
        r"(^|\.)(local_)?cls_norm\.",
        "The Hub's class has one final norm; a `DINOv3` has more with `EncoderExtras("
        "untie_cls_norm=True, untie_local_cls_norm=True)`, see `load_meta`.",
    ),
    (
        "missing",
        r"(^|\.)norm\d?\.bias$",
        'The Hub\'s norms have a bias, which RMSNorm has not: `EncoderExtras(norm="rms")`.',
    ),
    (
        "missing",
        r"\.ls\d\.gamma$",
        "The Hub's blocks have layer scales: `EncoderExtras(layer_scale=False)`.",
    ),
    (
        "unknown, missing",
        r"\.bias_mask$",
        "A masked key bias goes with `use_query_bias=True` and `use_key_bias=False`.",
    ),
    (
        "of another shape, of another value",
        r"rope_embed\.periods$",
        "Periods must be those of the settings: `rope_theta ** (4 * i / head_dim)` for "
        "`i < head_dim / 4`, where `head_dim` is the width divided by `num_heads`, or between the "
        "two of `EncoderExtras(rope_periods=...)`.",
    ),
)


def new_backbone(arrays, found, config, make_places, make_buffers, what):
    """Builds a backbone of `config`, else of what was `found`, once all arrays are known to fit."""
    known = [*inspect.signature(keras_hub.models.DINOV3Backbone).parameters]
    known += ["trainable", "image_size"]
    unknown = [name for name in config if name not in known]
    if unknown:  # the Hub's class takes them in silence
        raise ValueError(
            f"Arguments of `DINOV3Backbone` must be among {', '.join(known)}. Received: "
            f"{', '.join(unknown)}."
        )
    if "image_shape" in config and "image_size" in config:
        raise ValueError(
            "The size of images is given in one way only. Received: "
            f"image_shape={config['image_shape']!r} and image_size={config['image_size']!r}."
        )
    shape = config.get("image_shape", (1, 1, 1))
    if not isinstance(shape, (tuple, list)) or len(shape) != 3:
        raise ValueError(
            "`image_shape` must be three integers, (height, width, channels) in pixels. "
            f"Received: image_shape={shape!r}."
        )
    is_given, patch_size = "image_size" in config, found["patch_size"]
    config = {**found, **config}
    size, num_channels = config.pop("image_size"), config.pop("num_channels")
    is_pair = isinstance(size, (tuple, list)) and len(size) == 2
    if is_given and not (
        is_pair
        and all(is_count(length, at_least=1) and length % patch_size == 0 for length in size)
    ):
        raise ValueError(
            "`image_size` must be two integers, (height, width) in pixels, and multiples of the "
            f"patch size {patch_size}. Received: image_size={size!r}."
        )
    is_first = is_channels_first(config)
    config.setdefault("image_shape", (num_channels, *size) if is_first else (*size, num_channels))
    sizes = {**config, "num_channels": config["image_shape"][0 if is_first else -1]}
    places = make_places(sizes)
    check(arrays, places, make_buffers(sizes), what)
    backbone = keras_hub.models.DINOV3Backbone(**config)
    assign(backbone, places, arrays)
    return backbone


def check(arrays, places, buffers, what):
    """Says which arrays do not fit, all in one error; else returns nothing."""
    problems = {"unknown": [], "missing": [], "of another shape": [], "of another value": []}
    for name, array in arrays.items():
        if name not in places and name not in buffers:
            problems["unknown"].append(name)
            continue
        shape = tuple(places[name].shape) if name in places else buffers[name].shape
        if tuple(array.shape) != shape:
            problems["of another shape"].append(f"{name} {tuple(array.shape)}, not {shape}")
        elif not is_float(array):
            problems["of another value"].append(f"{name} {array.dtype.name}, not float")
        elif name in buffers and not np.allclose(
            array.astype("float64"), buffers[name], rtol=ROUNDING, atol=0
        ):
            problems["of another value"].append(name)
    problems["missing"] = [
        name
        for name in (*places, *buffers)
        if name not in arrays and not (name in buffers and name.endswith(OPTIONAL))
    ]
    found = [f"{kind}: {', '.join(names)}" for kind, names in problems.items() if names]
    if not found:
        return

    def explains(kind, pattern):
        if kind == "missing" and any(re.search(pattern, name) for name in arrays):
            return False
        return any(re.search(pattern, item.split(" ")[0]) for item in problems[kind])

    reasons = [
        reason
        for kinds, pattern, reason in REASONS
        if any(explains(kind, pattern) for kind in kinds.split(", "))
    ]
    raise ValueError(
        f"The weights must be those of {what}; nothing was loaded. "
        + ". ".join([*(text[0].upper() + text[1:] for text in found), ""])
        + " ".join(reasons)
    )


def assign(module, places, arrays):
    """Puts checked arrays in their places."""
    for name, place in places.items():
        for path, array in zip(place.paths, np.split(arrays[name], len(place.paths)), strict=True):
            if path is None:
                continue
            variable = weight_at(module, path)
            if place.axes is not None:
                array = np.transpose(array, place.axes)
            dtype = keras.backend.standardize_dtype(variable.dtype)
            variable.assign(np.reshape(array, variable.shape).astype(dtype))


def collect(module, places):
    """Takes the arrays from their places."""
    arrays = {}
    for name, place in places.items():
        zeros = np.zeros((place.shape[0] // len(place.paths), *place.shape[1:]), "float32")
        parts = []
        for path in place.paths:
            if path is None:
                parts.append(zeros)
                continue
            variable = weight_at(module, path)
            # torch hands out bfloat16 as float32
            array = np.asarray(
                ops.convert_to_numpy(variable), keras.backend.standardize_dtype(variable.dtype)
            )
            parts.append(
                array if place.axes is None else np.transpose(array, np.argsort(place.axes))
            )
        parts = [part.astype(parts[0].dtype) for part in parts]
        arrays[name] = np.reshape(np.concatenate(parts), place.shape)
    return arrays


def weight_at(module, path):
    for name in path.split("."):
        module = module[int(name)] if name.isdigit() else getattr(module, name)
    return module


def is_float(array):
    return "float" in array.dtype.name  # bfloat16 too, which is no subtype of NumPy's
