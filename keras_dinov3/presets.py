"""Backbones from Keras Hub presets and from the folders of runs."""

import json
import pathlib

import keras_hub

from keras_dinov3.families import check_backbone


def preset_of(name):
    """What `Backbone.from_preset` takes: of the folder of a run, the backbone in it.

    Args:
        name: Name or folder of a preset, or folder of a run of `keras-dinov3 pretrain`.

    Returns:
        Text.

    Raises:
        ValueError: If it is a folder that holds neither.
    """
    folder = pathlib.Path(name)
    if not folder.is_dir():
        return str(name)
    for place in (folder / "backbone", folder):
        if (place / "config.json").is_file():
            return str(place.resolve())
    raise ValueError(
        "A backbone is the name of a Keras Hub preset, its folder, or the folder of a run that has "
        f"ended. Received: {name}, which holds neither config.json nor backbone/config.json."
    )


def read_preset(name, image_shape=None, **kwargs):
    """A backbone with its weights, with a mask token if its class can have one.

    Args:
        name: As in `preset_of`.
        image_shape: `(height, width, channels)` that a `DINOV3Backbone` is built for, whose
            weights fit images of any size. Others keep that of the preset.
        **kwargs: Other arguments of `keras_hub.models.Backbone.from_preset`, such as `dtype`.

    Returns:
        Keras Hub backbone. A mask token that the preset lacks is new, as at the start of training.

    Raises:
        TypeError: If the backbone is of no supported family.
        ValueError: If there is no such preset.
    """
    backbone = keras_hub.models.Backbone.from_preset(preset_of(name), **kwargs)
    check_backbone(backbone)
    config = backbone.get_config()
    changes = {}
    if image_shape is not None and isinstance(backbone, keras_hub.models.DINOV3Backbone):
        changes["image_shape"] = tuple(image_shape)
    if not config.get("use_mask_token", True):
        changes["use_mask_token"] = True
    if all(config[key] == value for key, value in changes.items()):
        return backbone
    changed = type(backbone).from_config({**config, **changes})
    is_new = "use_mask_token" in changes
    places = [w for w in changed.weights if not (is_new and w.name == "mask_token")]
    for place, weight in zip(places, backbone.weights, strict=True):
        place.assign(weight)
    return changed


def normalization_of(name):
    """The mean and std, one per channel, of the images that a run has seen.

    Args:
        name: As in `preset_of`.

    Returns:
        Dict with `"mean"` and `"std"`; both are `None` if `name` is no folder of a run.
    """
    settings = pathlib.Path(name) / "settings.json"
    augmentation = {}
    if settings.is_file():
        augmentation = json.loads(settings.read_text())["recipe"]["settings"]["augmentation"]
    return {key: augmentation.get(key) for key in ("mean", "std")}
