"""Named recipes: all settings of a training as plain data, filled in from the size of the problem.

```python
recipe = kd.recipes.get("tiny").suggest(num_images=20_000, batch_size=128, epochs=60, image_size=32)
print(recipe)  # every setting, and why it has its value
model = recipe.build(seed=0)  # a compiled `DINOv3`
model.fit(images, batch_size=128, epochs=60)
```
"""

import copy
import dataclasses
import difflib
import importlib.resources
import inspect
import json
import math

import keras
import keras_hub

from keras_dinov3.alignment import PatchAlignment
from keras_dinov3.augment import MultiCrop
from keras_dinov3.callbacks import TeacherEMA
from keras_dinov3.extras import EncoderExtras
from keras_dinov3.families import check_backbone, patch_size_of
from keras_dinov3.gram import GramAnchor
from keras_dinov3.image_model import spread
from keras_dinov3.lora import LoRA
from keras_dinov3.masking import BlockMasking, RandomMasking
from keras_dinov3.model import DINOv3
from keras_dinov3.optimizers import AdamW
from keras_dinov3.preservation import Preserve
from keras_dinov3.presets import normalization_of, preset_of, read_preset
from keras_dinov3.schedules import WarmupCosine, check_count, check_range
from keras_dinov3.suggestions import check_plan, suggestions

OF_PRESET = ("patch_size", "hidden_dim")  # it has them; `suggest` needs them without it
MASKINGS = {"block": BlockMasking, "random": RandomMasking}
# Where each section's settings go; of a schedule the length in updates is the run's.
SECTIONS = {
    "backbone": None,
    "augmentation": MultiCrop,
    "masking": None,
    "model": DINOv3,
    "extras": EncoderExtras,
    "lora": LoRA,
    "gram": GramAnchor,
    "alignment": PatchAlignment,
    "preserve": Preserve,
    "teacher": TeacherEMA,
    "optimizer": AdamW,
}


# Sections that are each one argument of `DINOv3`.
OBJECTS = {name: name for name in ("extras", "lora", "gram", "alignment", "preserve")}
OBJECTS["teacher"] = "teacher_ema"


@dataclasses.dataclass(frozen=True)
class Recipe:
    """All settings of a training, as numbers, texts and lists only, so that JSON can hold them.

    A setting that follows a schedule is a dict of the arguments of `WarmupCosine`, but for those
    that count updates: `warmup` is the share of the run that it takes, from 0 to 1, and the total
    is the run's.

    Args:
        name: Text.
        summary: Text, one sentence: what it is for.
        settings: Dict from sections to their settings. `"backbone"`: `"class"`, the name of a
            backbone in `keras_hub.models`, and its arguments, or `"preset"` and its `"patch_size"`
            and `"hidden_dim"`, see `continue_from`. `"masking"`: `"kind"`, `"block"` or
            `"random"`, and the layer's arguments. Arguments of the same name:
            `"augmentation"` of `MultiCrop`, `"model"` of `DINOv3`, `"extras"` of
            `EncoderExtras`, `"lora"` of `LoRA`, `"gram"` of `GramAnchor`, `"alignment"` of
            `PatchAlignment`, `"preserve"` of `Preserve`, `"teacher"` of `callbacks.TeacherEMA`,
            `"optimizer"` of `AdamW`.
        plan: Dict with `num_images`, `batch_size`, `epochs` and `image_size`, or `None` before
            `suggest`.
        reasons: Dict from `"section.setting"` to a sentence: why `suggest` chose this value.

    Raises:
        ValueError: If there is no such section or setting.
    """

    name: str
    summary: str
    settings: dict
    plan: dict | None = None
    reasons: dict = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        for section, settings in self.settings.items():
            check_name("section", section, SECTIONS)
            if SECTIONS[section] is not None:
                known = inspect.signature(SECTIONS[section].__init__).parameters
                for setting in settings:
                    check_name(f"setting of `{section}`", setting, set(known) - {"self", "kwargs"})

    def suggest(self, num_images, batch_size=64, epochs=100, image_size=224):
        """This recipe with what depends on the size of the problem filled in.

        Args:
            num_images: Int. Training images.
            batch_size: Int, at least 2. Images in one update.
            epochs: Int, at least 1.
            image_size: Int or `(height, width)` in pixels, to which images are scaled and cropped
                before they are cut into crops.

        Returns:
            `Recipe` with a `plan`, and a reason for each value that was chosen. What the recipe
            says itself stays.

        Raises:
            ValueError: If the run has no update, or no patch size fits the images.
        """
        plan = check_plan(num_images, batch_size, epochs, image_size)
        settings, reasons = copy.deepcopy(self.settings), dict(self.reasons)
        for name, (value, reason) in suggestions(self.settings, plan).items():
            section, setting = name.split(".")
            if setting not in settings.setdefault(section, {}):
                settings[section][setting] = value
                reasons[name] = reason
        return dataclasses.replace(self, settings=settings, plan=plan, reasons=reasons)

    def changed(self, **sections):
        """This recipe with other settings: `recipe.changed(model={"koleo_weight": 0.3})`.

        Args:
            **sections: Dicts of settings by section; the others stay.

        Returns:
            `Recipe`; what was changed has no reason any more.
        """
        settings = copy.deepcopy(self.settings)
        for section, new in sections.items():
            settings[section] = {**settings.get(section, {}), **new}
        gone = {f"{section}.{setting}" for section, new in sections.items() for setting in new}
        reasons = {name: why for name, why in self.reasons.items() if name not in gone}
        return dataclasses.replace(self, settings=settings, reasons=reasons)

    @property
    def total_steps(self):
        """Updates of the whole run."""
        if self.plan is None:
            raise ValueError(
                f"The recipe {self.name!r} does not know how long the run is. Call "
                "`recipe.suggest(num_images=..., batch_size=..., epochs=..., image_size=...)`."
            )
        return self.plan["epochs"] * (self.plan["num_images"] // self.plan["batch_size"])

    def arguments(self, total_steps, seed=None):
        """The method alone: arguments of `DINOv3` but for the backbone and the augmentation.

        Args:
            total_steps: Int. Updates of the whole run.
            seed: Int for masks and drop path, or `None`.

        Returns:
            Dict of arguments of `DINOv3`.
        """
        parts = {
            section: {name: scheduled(value, total_steps) for name, value in settings.items()}
            for section, settings in self.settings.items()
        }
        arguments = dict(parts.get("model", {}))
        if "masking" in parts:
            layer = MASKINGS[parts["masking"].pop("kind", "block")]
            arguments["masking"] = layer(**parts["masking"], seed=spread(seed, 1))
        for section, argument in OBJECTS.items():
            if section in parts:
                arguments[argument] = SECTIONS[section](**parts[section])
        return arguments

    def check_backbone(self):
        """Raises a `ValueError` if the recipe does not say which backbone is trained."""
        if not {"class", "preset"} & self.settings.get("backbone", {}).keys():
            raise ValueError(
                f"The recipe {self.name!r} goes on from a backbone that has weights. Received: no "
                '`preset` in its section "backbone". Call `recipes.continue_from(preset)`, or '
                "give the command a `--backbone` in its place."
            )

    def build_backbone(self):
        """The Keras Hub backbone, new or from its preset, for images of the plan's size."""
        settings = dict(self.settings.get("backbone", {}))
        shape = {}
        if self.plan is not None:
            shape["image_shape"] = (*self.plan["image_size"], 3)
        if "preset" in settings:
            arguments = {k: v for k, v in settings.items() if k not in ("preset", *OF_PRESET)}
            return read_preset(settings["preset"], **arguments, **shape)
        self.check_backbone()
        return getattr(keras_hub.models, settings.pop("class"))(**{**settings, **shape})

    def build(self, seed=None):
        """The model, compiled, ready for `fit`.

        Args:
            seed: Int. Seeds everything that is drawn: weights, crops, masks. `None`: at random.

        Returns:
            Compiled `DINOv3`.

        Raises:
            ValueError: If `suggest` has not been called.
        """
        total_steps = self.total_steps
        if seed is not None:
            keras.utils.set_random_seed(seed)
        augmentation = MultiCrop(**self.settings.get("augmentation", {}), seed=spread(seed, 0))
        arguments = self.arguments(total_steps, seed)
        model = DINOv3(self.build_backbone(), augmentation=augmentation, seed=seed, **arguments)
        settings = {
            name: scheduled(value, total_steps)
            for name, value in self.settings.get("optimizer", {}).items()
        }
        model.compile(AdamW(**settings))
        return model

    def __str__(self):
        lines = [f"{self.name}: {self.summary}"]
        if self.plan is not None:
            plan = {**self.plan, "updates": self.total_steps}
            lines += ["", *(f"{name:24} {value}" for name, value in plan.items())]
        for section, settings in self.settings.items():
            lines += ["", f"[{section}]"]
            for name, value in settings.items():
                reason = self.reasons.get(f"{section}.{name}")
                line = f"{name:24} {json.dumps(value)}"
                lines.append(f"{line:44} {reason}" if reason else line)
        return "\n".join(lines)

    def get_config(self):
        """All of it as a dict that JSON can hold; `Recipe.from_config` takes it back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_config(cls, config):
        """The recipe of a `get_config`.

        Raises:
            ValueError: If something in it is unknown or missing.
        """
        fields = {field.name for field in dataclasses.fields(cls)}
        for name in config:
            check_name("entry of a recipe", name, fields)
        missing = {"name", "summary", "settings"} - set(config)
        if missing:
            raise ValueError(f"A recipe needs `name`, `summary`, `settings`. Missing: {missing}.")
        return cls(**config)


def check_name(what, name, known):
    if name not in known:
        near = difflib.get_close_matches(str(name), sorted(known), 1)
        hint = f"Did you mean {near[0]!r}?" if near else f"There are: {', '.join(sorted(known))}."
        raise ValueError(f"There is no {what} of this name. Received: {name!r}. {hint}")


def scheduled(value, total_steps):
    """A setting as an object: a dict becomes a `WarmupCosine` over the whole run."""
    if not isinstance(value, dict):
        return value
    value = dict(value)
    warmup_steps = round(value.pop("warmup", 0.0) * total_steps)
    return WarmupCosine(value.pop("peak"), total_steps, warmup_steps=warmup_steps, **value)


with importlib.resources.files(__package__).joinpath("recipes.json").open(encoding="utf-8") as file:
    RECIPES = {config["name"]: Recipe.from_config(config) for config in json.load(file)}


def get(name):
    """A recipe by its name, or from a JSON file that holds one.

    Args:
        name: A key of `RECIPES`, or the path of a file whose name ends in `.json`: a recipe's
            `get_config()`, or a run's settings.json, which has it under `"recipe"`.

    Returns:
        `Recipe`.

    Raises:
        ValueError: If there is no such recipe, or the file holds none.
    """
    if not str(name).endswith(".json"):
        check_name("recipe", name, RECIPES)
        return RECIPES[name]
    try:
        with open(name, encoding="utf-8") as file:
            config = json.load(file)
        config = config.get("recipe", config)
        if "sizes" in config:
            raise ValueError("it is of a run of `adapt`. Go on with that by its `--backbone`")
        return Recipe.from_config(config)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{name} holds no recipe: {error}") from error


def continue_from(preset, gram_weight=0.1, preservation_weight=0.1, lora_rank=None):
    """The recipe for going on from released weights without ruining them.

    Released backbones come without heads. New heads learn on the frozen backbone first
    (`freeze_backbone_steps`); then it follows with a rate that is smaller the wider it is and the
    further down (`layerwise_decay`), under a slow teacher. Patch similarities are held to those at
    the start by a `GramAnchor`, class tokens by `Preserve`; with a `LoRA` only low-rank adapters
    train. What is left to chance, `callbacks.Guard` watches.

    ```python
    recipe = kd.recipes.continue_from("runs/mine").suggest(
        num_images=3000, batch_size=64, epochs=20, image_size=64
    )
    model = recipe.build(seed=0)
    model.fit(images, batch_size=64, epochs=20, callbacks=[kd.callbacks.Guard(some_images)])
    ```

    Args:
        preset: Name or folder of a Keras Hub preset, or folder of a run of `keras-dinov3 pretrain`,
            whose normalisation of images is taken too.
        gram_weight: Number. Weight of the Gram loss; with 0 there is none. With 1 a short
            run learned nothing new.
        preservation_weight: Number. Weight of the loss that keeps class tokens; with 0 there is
            none. As for `gram_weight`.
        lora_rank: Int. Rank of adapters of all attention projections. `None`: the backbone itself
            trains.

    Returns:
        `Recipe` with the backbone's place and patch size.

    Raises:
        TypeError: If the backbone is of no supported family.
        ValueError: If there is no such preset, or a weight or the rank are out of range.
    """
    for key, weight in (("gram", gram_weight), ("preservation", preservation_weight)):
        check_range(f"{key}_weight", weight, low=0, below=math.inf, scheduled=False)
    if lora_rank is not None:
        check_count("lora_rank", lora_rank, at_least=1)
    normalization = {key: x for key, x in normalization_of(preset).items() if x is not None}
    preset = preset_of(preset)
    backbone = keras_hub.models.Backbone.from_preset(preset, load_weights=False)
    check_backbone(backbone)
    width = backbone.hidden_dim
    sections = {
        "backbone": {
            "preset": preset,
            "patch_size": patch_size_of(backbone),
            "hidden_dim": width,
        },
        "model": {
            "head_hidden_dim": min(2 * width, 2048),
            "head_bottleneck_dim": min(width // 2, 256),
        },
    }
    if gram_weight:
        sections["gram"] = {"source": "teacher", "weight": gram_weight}
    if preservation_weight:
        sections["preserve"] = {"weight": preservation_weight}
    if lora_rank is not None:
        projections = ["query", "key", "value", "output"]
        sections["lora"] = {"rank": lora_rank, "projections": projections}
    return get("continue").changed(**sections, augmentation=normalization)
