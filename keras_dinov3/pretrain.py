"""A run from a folder of images to a trained backbone, with all that it leaves in a folder."""

import dataclasses
import importlib.util
import json
import os
import pathlib
import platform
from importlib.metadata import PackageNotFoundError, version

import keras
import numpy as np
from PIL import Image

from keras_dinov3 import backend
from keras_dinov3.callbacks import KNN, CollapseMonitor, Guard, Pictures, RankMe, ScheduleLogger
from keras_dinov3.data import image_folder
from keras_dinov3.evaluation import knn_accuracy
from keras_dinov3.image_files import TarredFile, find_all, image_suffixes
from keras_dinov3.recipes import Recipe
from keras_dinov3.report import write_report

HELD_OUT = 0.1  # share of the labelled images that k-NN classifies if there are no test images
MAX_NEIGHBOURS = 20_000  # labelled images that k-NN looks at
MAX_CACHED = 4e9  # bytes of decoded images that are kept in memory
NUM_MEASURED = 1024  # images whose mean and deviation the crops are normalised by
NUM_WATCHED, NUM_RANKED = 128, 2048  # images of `CollapseMonitor` and `RankMe`
NUM_SHOWN, NUM_PICTURES = 8, 5  # images in the pictures, and times that these are drawn
FEATURE = "cls_mean_patch"  # what these look at
NUM_MEASUREMENTS = 20  # of k-NN and rank in a run
MAX_IMAGE_SIZE = 256  # pixels, where the size is chosen by the images
PACKAGES = ("keras-dinov3", "keras", "keras-hub", "numpy", "torch", "jax", "tensorflow")


class Source:
    """The image files of a folder or tar file, before any is decoded.

    Args:
        directory: Path, or list of tar files.

    Attributes:
        count: How many files have the suffix of an image.
        has_classes: Whether all of them lie in subfolders, and in more than one.

    Raises:
        ValueError: If there is no such folder, or no image in it.
    """

    def __init__(self, directory):
        suffixes = image_suffixes()
        name, found = find_all(directory)
        found = {
            file: folders
            for file, folders in found
            if os.path.splitext(file)[1].lower() in suffixes
        }
        if not found:
            raise ValueError(f"No readable image in {name}.")
        self.files, folders = list(found), list(found.values())
        self.count = len(found)
        self.has_classes = all(folders) and len({parts[0] for parts in folders}) > 1

    def usual_size(self, multiple):
        """The median of the shorter sides of some images, at most 256, as a multiple of this."""
        sides = []
        for file in self.files[:: max(self.count // 64, 1)]:
            try:
                with Image.open(file.open() if isinstance(file, TarredFile) else file) as image:
                    sides.append(min(image.size))
            except Exception:  # Pillow raises nearly every type; loading counts what is broken
                continue
        side = min(np.median(sides) if sides else MAX_IMAGE_SIZE, MAX_IMAGE_SIZE)
        return max(int(side / multiple + 0.5), 1) * multiple


def plan_run(source, recipe, batch_size=None, epochs=None, image_size=None, has_test=False):
    """The recipe for these images, before they are read.

    Args:
        source: `Source`.
        recipe: `Recipe`. If it has a plan, that says what is not given here.
        batch_size: Int. `None`: 64, or fewer for few images.
        epochs: Int. `None`: 100.
        image_size: Int or `(height, width)` in pixels. `None`: that of most images, at most 256.
        has_test: Whether there are test images, so that none is held out for k-NN.

    Returns:
        `Recipe` with a plan for as many images as will be trained on.
    """
    recipe.check_backbone()
    planned = recipe.plan or {}
    num_images = source.count
    if source.has_classes and not has_test:
        num_images -= round(HELD_OUT * num_images)
    backbone = recipe.settings["backbone"]
    multiple = backbone.get("patch_size", 16 if "preset" in backbone else 8)
    batch_size = batch_size or planned.get("batch_size") or min(64, max(num_images // 4, 2))
    image_size = image_size or planned.get("image_size") or source.usual_size(multiple)
    return recipe.suggest(
        num_images, batch_size, epochs or planned.get("epochs") or 100, image_size
    )


def pretrain(images, output, recipe, test=None, seed=0, command=None, guard=None, verbose="auto"):
    """Trains by a recipe and leaves all there is to know in a folder.

    In `output`: settings.json (the recipe with its reasons, the command, the versions), log.csv
    (losses, k-NN, rank, monitors, schedules), alarms.jsonl if something went wrong,
    checkpoint.keras, backbone/, the teacher as a Keras Hub preset, and with Matplotlib pictures/
    and report.html.

    Args:
        images: Folder of images, or tar file. If all lie in several subfolders, these are taken for
            classes, which k-NN uses and training does not see.
        output: Path of the run's folder, without a run in it.
        recipe: `Recipe` with a plan.
        test: Folder or tar file with the same classes, for k-NN. `None`: a tenth of `images`, which
            is not trained on then.
        seed: Int. Seeds everything.
        command: Text that is kept in settings.json, or `None`.
        guard: `action` of a `callbacks.Guard` for a backbone that knows something already; what its
            features were at the start is kept in guard.npz. `None`: none.
        verbose: As in `fit`.

    Returns:
        Dict: `images`, `unreadable` (numbers of files), and if there are classes `raw_pixels` (the
        accuracy of k-NN without any backbone) and `knn`, a list of pairs of epoch and accuracy.

    Raises:
        ValueError: If images, recipe and folder do not suit each other. Nothing is written then.
    """
    output = pathlib.Path(output)
    if (output / "settings.json").exists():
        raise ValueError(f"{output} holds a run. Resume it, or choose another folder.")
    keras.utils.set_random_seed(seed)
    sides = data, _, _ = load_images(images, recipe, test, seed)
    recipe = recipe.suggest(**{**recipe.plan, "num_images": len(data.files)})
    recipe = recipe.changed(augmentation=normalization(data, recipe))
    model = recipe.build(seed)
    settings = {
        "command": command,
        "recipe": recipe.get_config(),
        "images": str(images),
        "test": None if test is None else str(test),
        "seed": seed,
        "guard": guard,
        "unreadable": len(data.unreadable),
        "environment": environment(),
    }
    output.mkdir(parents=True, exist_ok=True)
    (output / "settings.json").write_text(json.dumps(settings, indent=2))
    return train(model, sides, output, recipe.plan["epochs"], seed, guard, verbose)


def resume(output, images=None, test=None, verbose="auto"):
    """Goes on with a run after its last whole epoch, exactly as if it had not stopped.

    Args:
        output: Path of the run's folder.
        images: Where the images are now. `None`: where they were.
        test: The same for the test images.
        verbose: As in `fit`.

    Returns:
        As `pretrain`.

    Raises:
        ValueError: If there is no run to go on with, or it is at its end, or the images are others.
    """
    output = pathlib.Path(output)
    checkpoint = output / "checkpoint.keras"
    if not checkpoint.exists():
        raise ValueError(
            f"{output} holds no checkpoint: a run is resumed after its first epoch. "
            "Start it anew in another folder."
        )
    settings = json.loads((output / "settings.json").read_text())
    recipe, seed = recipe_of(settings["recipe"]), settings["seed"]
    guard, alarms = settings.get("guard"), output / "alarms.jsonl"
    if alarms.exists() and '"kind": "unlearns"' in alarms.read_text():
        raise ValueError(
            f"The guard has ended the run in {output}, and says in alarms.jsonl why. Begin another "
            "in another folder, by what it says to try."
        )
    model = keras.saving.load_model(checkpoint)
    epochs, total_steps = recipe.plan["epochs"], recipe.total_steps
    if int(model.step) >= total_steps and (output / "backbone").exists():
        raise ValueError(f"The run in {output} has had its {epochs} epochs.")
    sides = load_images(images or settings["images"], recipe, test or settings["test"], seed)
    if len(sides[0].files) != recipe.plan["num_images"]:
        raise ValueError(
            "A resumed run needs the images that it began with. Received: "
            f"{len(sides[0].files)} images, where there were {recipe.plan['num_images']}."
        )
    return train(model, sides, output, epochs, seed, guard, verbose, resumes=True)


def recipe_of(config):
    """The recipe of a run; what one of `adapt` has besides, its checkpoint knows."""
    names = {field.name for field in dataclasses.fields(Recipe)}
    return Recipe.from_config({name: value for name, value in config.items() if name in names})


def train(model, sides, output, epochs, seed, guard, verbose, resumes=False):
    """`fit` with all callbacks, and what is written at the end."""
    data, neighbours, queries = sides
    every = max(epochs // NUM_MEASUREMENTS, 1)
    watched = some_of(data, NUM_WATCHED, seed)
    ranked = some_of(data, NUM_RANKED, seed)
    callbacks = [
        CollapseMonitor(all_of(watched), path=output / "alarms.jsonl", seed=seed),
        RankMe(ranked, every, feature=FEATURE),
        ScheduleLogger(),
    ]
    if guard is not None:
        paths = {"path": output / "alarms.jsonl", "start_path": output / "guard.npz"}
        k = min(10, max(len(ranked.files) // 2 - 1, 1))
        guard = Guard(ranked, guard, every=every, k=k, feature=FEATURE, **paths)
        callbacks.append(guard)
    checkpoint = Checkpoint(output / "checkpoint.keras")
    can_draw = importlib.util.find_spec("matplotlib") is not None
    if can_draw:
        shown = all_of(some_of(data if queries is None else queries, NUM_SHOWN, seed))
        callbacks.append(Pictures(shown, output / "pictures", max(epochs // NUM_PICTURES, 1)))
    callbacks += [
        keras.callbacks.CSVLogger(output / "log.csv", append=resumes),
        checkpoint,
    ]
    if queries is not None:
        knn = KNN(neighbours, queries, every, feature=FEATURE)
        callbacks.insert(0, knn)
    first = int(model.step) // len(data)
    if first < epochs:
        model.fit(data, epochs=epochs, initial_epoch=first, callbacks=callbacks, verbose=verbose)
    if guard is not None and guard.alarm is not None:
        checkpoint.save(model)  # the weights that were put back
    model.export_backbone().save_to_preset(str(output / "backbone"))
    if can_draw:
        write_report(output)
    found = {"images": len(data.files), "unreadable": len(data.unreadable)}
    if queries is not None:
        found["raw_pixels"] = raw_pixel_accuracy(neighbours, queries)
        found["knn"] = knn.history
    return found


def load_images(images, recipe, test, seed):
    """The training images and, with classes, the two sides of k-NN, else `None`."""
    source = Source(images)
    image_size, batch_size = recipe.plan["image_size"], recipe.plan["batch_size"]
    cache = source.count * 3 * image_size[0] * image_size[1] <= MAX_CACHED

    def load(directory, **kwargs):
        return image_folder(directory, image_size, batch_size, seed=seed, cache=cache, **kwargs)

    if test is not None and not source.has_classes:
        raise ValueError(
            "Test images are for k-NN, which needs classes: all training images in subfolders, "
            f"and in more than one. Received: images={images}, test={test}."
        )
    data = load(images, labels="folders" if source.has_classes else None)
    if test is not None:
        queries = load(test, labels="folders", shuffle=False, drop_remainder=False)
        if queries.class_names != data.class_names:
            raise ValueError(
                "The test images must have the class subfolders of the training images. "
                f"Received: {queries.class_names} and {data.class_names}."
            )
    elif source.has_classes:
        data, queries = data.split(HELD_OUT, seed)
    else:
        return data, None, None
    return data, some_of(data, MAX_NEIGHBOURS, seed), queries


def some_of(data, count, seed):
    """So many of the images, drawn once, in the order of their files."""
    chosen = np.random.default_rng(seed).permutation(len(data.files))[:count]
    return data.part(np.sort(chosen), shuffle=False, drop_remainder=False)


def all_of(batches):
    """All images of some batches as one array."""
    return np.concatenate([batch[0] if isinstance(batch, tuple) else batch for batch in batches])


def normalization(data, recipe):
    """Mean and std of the images, one per channel from 0 to 1; a preset keeps what it knows."""
    if "preset" in recipe.settings["backbone"]:
        return {}
    pixels = all_of(some_of(data, NUM_MEASURED, seed=0)).reshape(-1, 3) / 255
    measured = {"mean": pixels.mean(axis=0), "std": np.maximum(pixels.std(axis=0), 1e-3)}
    return {name: [round(float(x), 4) for x in values] for name, values in measured.items()}


def environment():
    """Versions and machine, as texts."""
    found = {"python": platform.python_version(), "machine": platform.machine()}
    found |= {"system": platform.system(), "cpu_cores": os.cpu_count()}
    found["backend"] = backend.name()
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


class Checkpoint(keras.callbacks.Callback):
    """Saves all that the next step depends on after each epoch.

    The file is replaced in one move, so that an interrupted write cannot harm it.

    Args:
        path: Path of the file, ending in `.keras`.
    """

    def __init__(self, path):
        super().__init__()
        self.path = path

    def on_epoch_end(self, epoch, logs=None):
        self.save(self.model)

    def save(self, model):
        new = self.path.with_name("unfinished.keras")
        model.save(new)
        os.replace(new, self.path)


def raw_pixel_accuracy(neighbours, queries):
    """k-NN of the pixels themselves, which features must beat to be worth anything."""
    sides = []
    for side in (neighbours, queries):
        sides += [all_of(side).reshape(len(side.files), -1) / 255, side.labels]
    return knn_accuracy(*sides)
