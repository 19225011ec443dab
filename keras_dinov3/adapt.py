"""High-resolution adaptation: a trained backbone goes on in crops of several, larger sizes."""

import copy
import dataclasses
import json
import pathlib

import keras
import keras_hub

from keras_dinov3.encoder import grid_of
from keras_dinov3.families import check_backbone, patch_size_of
from keras_dinov3.gram import GramAnchor
from keras_dinov3.image_model import spread
from keras_dinov3.mixed import MixedCrops
from keras_dinov3.model import DINOv3
from keras_dinov3.optimizers import AdamW
from keras_dinov3.presets import preset_of
from keras_dinov3.pretrain import plan_run, recipe_of
from keras_dinov3.recipes import Recipe, scheduled
from keras_dinov3.suggestions import rate_for

EPOCHS = 10
# Of the optimizer, when the heads are those of the run.
HEADS = {"freeze_last_layer_steps": 0, "freeze_backbone_steps": 0, "head_multiplier": 1.0}
GRAM_WEIGHT, RATE = 2.0, 1e-4  # the rate for 128 images
# For a preset, which does not tell how it was trained.
SETTINGS = {
    "augmentation": {"num_local_crops": 8},
    "masking": {"kind": "block"},
    "optimizer": {"weight_decay": 0.04, "part_clipnorm": 3.0},
}


@dataclasses.dataclass(frozen=True)
class Adaptation(Recipe):
    """A `Recipe` that goes on with a trained backbone in `MixedCrops`, held by a `GramAnchor`.

    The Gram teacher is the backbone as it was, which stays.

    Args:
        name: As in `Recipe`, as are `summary`, `plan` and `reasons`.
        summary: Text.
        settings: As in `Recipe`, with a `"preset"` as the backbone and no sizes of crops.
        plan: Dict or `None`.
        reasons: Dict.
        sizes: List, as in `MixedCrops`.
        probabilities: List, as in `MixedCrops`, or `None`.
        gram_weight: Number of at least 0. Weight of the Gram loss; at 0 there is no anchor.
        checkpoint: Path of the checkpoint.keras whose heads go on, too. `None`: new heads.

    Reference:
        [Siméoni et al., 2025](https://arxiv.org/abs/2508.10104), section 5.1.
    """

    sizes: list = dataclasses.field(default_factory=list)
    probabilities: list | None = None
    gram_weight: float = GRAM_WEIGHT
    checkpoint: str | None = None

    def suggest(self, num_images, batch_size=64, epochs=EPOCHS, image_size=224):
        """As `Recipe.suggest`, without sizes of crops: `sizes` has them.

        Args:
            num_images: Int.
            batch_size: Int.
            epochs: Int.
            image_size: Int or pair of them.

        Returns:
            `Adaptation` with a `plan`.
        """
        found = super().suggest(num_images, batch_size, epochs, image_size)
        settings, reasons = copy.deepcopy(found.settings), dict(found.reasons)
        for side in ("global_crop_size", "local_crop_size"):
            settings["augmentation"].pop(side, None)
            reasons.pop(f"augmentation.{side}", None)
        if "learning_rate" not in self.settings.get("optimizer", {}):
            rate, reasons["optimizer.learning_rate"] = rate_for(batch_size, RATE)
            settings["optimizer"]["learning_rate"] = rate
        return dataclasses.replace(found, settings=settings, reasons=reasons)

    def build(self, seed=None):
        """As `Recipe.build`.

        Args:
            seed: Int or `None`.

        Returns:
            Compiled `DINOv3`.
        """
        total_steps = self.total_steps
        if seed is not None:
            keras.utils.set_random_seed(seed)
        crops = self.settings.get("augmentation", {})
        anchor = GramAnchor(self.build_backbone(), weight=self.gram_weight)
        model = DINOv3(
            self.build_backbone(),
            augmentation=MixedCrops(self.sizes, self.probabilities, spread(seed, 0), **crops),
            gram=anchor if self.gram_weight else None,
            seed=seed,
            **self.arguments(total_steps, seed),
        )
        if self.checkpoint is not None:
            trained = keras.saving.load_model(self.checkpoint, compile=False)
            for sides, (_, old) in zip(
                model.student_and_teacher, trained.student_and_teacher, strict=True
            ):
                for side in sides:
                    side.set_weights(old.get_weights())
        optimizer = self.settings.get("optimizer", {})
        model.compile(
            AdamW(**{name: scheduled(value, total_steps) for name, value in optimizer.items()})
        )
        return model

    def __str__(self):
        own = ("sizes", "probabilities", "gram_weight", "checkpoint")
        lines = [f"{name:24} {json.dumps(getattr(self, name))}" for name in own]
        return "\n".join([super().__str__(), "", "[adaptation]", *lines])


def plan_adaptation(
    source,
    backbone,
    sizes,
    probabilities=None,
    gram_weight=GRAM_WEIGHT,
    learning_rate=None,
    batch_size=None,
    epochs=None,
    image_size=None,
    dtype=None,
    has_test=False,
):
    """How to adapt a backbone to larger crops of these images, before they are read.

    Of a run all settings go on, schedules at the value where they ended, but for what the length
    of the new one decides: learning rate and teacher momentum.

    Args:
        source: `pretrain.Source`.
        backbone: Folder of a run of `pretrain` or `adapt`, or name or folder of a preset.
        sizes: As in `MixedCrops`.
        probabilities: As in `MixedCrops`.
        gram_weight: As in `Adaptation`.
        learning_rate: Number, the largest. `None`: a tenth of that of a new training.
        batch_size: As in `plan_run`.
        epochs: Int. `None`: 10.
        image_size: Int or `(height, width)` in pixels that images have before they are cut.
            `None`: that of the largest global or Gram crop.
        dtype: Dtype policy of the computation. `None`: the run's, or float32.
        has_test: As in `plan_run`.

    Returns:
        `Adaptation` with a plan.

    Raises:
        ValueError: If the sizes do not suit the backbone, or something cannot be read.
    """
    folder = pathlib.Path(backbone)
    settings, checkpoint = copy.deepcopy(SETTINGS), None
    preset = preset_of(backbone)
    if (folder / "settings.json").is_file():
        settings, checkpoint = settings_of(folder)
    loaded = keras_hub.models.Backbone.from_preset(preset, load_weights=False)
    check_backbone(loaded)
    crops = MixedCrops(sizes, probabilities)
    for global_size, local_size, gram_size in crops.crop_sizes:
        named = {"global": global_size, "local": local_size, "gram": gram_size or global_size}
        for kind, size in named.items():
            grid_of(size, patch_size_of(loaded), f"{kind} crops")
    if image_size is None:
        sides = [size for global_size, _, gram in crops.crop_sizes for size in (global_size, gram)]
        image_size = [max(column) for column in zip(*filter(None, sides), strict=True)]
    settings["backbone"] = {
        "preset": preset,
        "patch_size": patch_size_of(loaded),
        "hidden_dim": loaded.hidden_dim,
        "dtype": dtype or settings.get("backbone", {}).get("dtype", "float32"),
    }
    if learning_rate is not None:
        rate = {"peak": learning_rate, "warmup": 0.1, "end": learning_rate / 100}
        settings["optimizer"] = {**settings.get("optimizer", {}), "learning_rate": rate}
    adaptation = Adaptation(
        "adapt",
        f"{backbone} goes on in crops of {len(sizes)} sizes",
        settings,
        sizes=[list(size) for size in sizes],
        probabilities=probabilities,
        gram_weight=gram_weight,
        checkpoint=checkpoint,
    )
    return plan_run(source, adaptation, batch_size, epochs or EPOCHS, image_size, has_test)


def settings_of(folder):
    """How a run was trained, as it ended, and the path of its checkpoint or `None`."""
    recipe = recipe_of(json.loads((folder / "settings.json").read_text())["recipe"])
    settings = {
        section: {
            name: value.get("end", 0.0) if isinstance(value, dict) else value
            for name, value in values.items()
            if (section, name) not in (("optimizer", "learning_rate"), ("teacher", "momentum"))
        }
        for section, values in {"augmentation": {}, "optimizer": {}, **recipe.settings}.items()
    }
    settings.pop("gram", None)  # there is a new anchor
    for name in ("global_crop_size", "local_crop_size", "blur_sigma"):
        settings["augmentation"].pop(name, None)
    checkpoint = folder / "checkpoint.keras"
    if not checkpoint.is_file():
        for name in HEADS:
            settings["optimizer"].pop(name, None)
        return settings, None
    settings["optimizer"] |= HEADS
    return settings, str(checkpoint.resolve())


def parse_sizes(text):
    """`"512:112:1024,768:160"`: `[(512, 112, 1024), (768, 160)]`, or a ValueError."""
    try:
        sizes = [tuple(int(side) for side in part.split(":")) for part in text.split(",")]
    except ValueError:
        sizes = []
    if not sizes or not all(len(size) in (2, 3) and min(size) > 0 for size in sizes):
        raise ValueError(
            "`--sizes` must be pixels of global, local and, if they are not to be twice the "
            "global ones, Gram crops: GLOBAL:LOCAL or GLOBAL:LOCAL:GRAM, several with commas. "
            f"Received: {text!r}. For example: 512:112:1024,768:160."
        )
    return sizes


def parse_probabilities(text):
    """`"0.7,0.3"`: `[0.7, 0.3]`, or a ValueError."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(
            f"`--probabilities` must be numbers with commas. Received: {text!r}. For example: "
            "0.7,0.3."
        ) from None
