"""Pretrains a small DINOv3 on a folder of images: from scratch, or from a preset.

    python examples/pretrain_folder.py --images photos --output runs/photos
    python examples/pretrain_folder.py --images photos --output runs/photos --resume

The second line goes on after the last whole epoch, exactly as if the run had not stopped.
If all images lie in subfolders, these are taken for classes, and weighted k-NN on images that are
held out (or on those of `--test`) says before, during and after training how good the features
are. The labels are for that only: training does not see them. `KERAS_BACKEND` chooses torch, jax
or tensorflow.

In `--output`: log.csv, curves.png, patch_pca.png, checkpoint.keras, and backbone/, the trained
teacher, which `keras_hub.models.DINOV3Backbone.from_preset` loads.
"""

import argparse
import importlib.util
import json
import os
import pathlib

import keras
import keras_hub
import numpy as np

import keras_dinov3 as kd
from keras_dinov3.encoder import grid_of

HELD_OUT = 0.1  # share of the labelled images that k-NN classifies if there is no `--test`
MAX_NEIGHBOURS = 10_000  # k-NN looks at no more labelled images than these


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--images", required=True, help="folder of images, with or without class subfolders")
    add("--test", help="folder with the same class subfolders, for k-NN")
    add("--output", type=pathlib.Path, default=pathlib.Path("runs/pretrain"))
    add("--image-size", type=int, default=96, help="pixels; images are scaled and cropped to it")
    add("--crop-size", type=int, default=64, help="pixels of the two global crops")
    add("--local-crop-size", type=int, default=32, help="pixels of the four local crops")
    add("--batch-size", type=int, default=64)
    add("--epochs", type=int, default=20)
    add("--learning-rate", type=float, default=1e-3)
    add("--prototypes", type=int, default=256, help="few for few images; 65536 for millions")
    add("--seed", type=int, default=0)
    add("--mixed-bfloat16", action="store_true", help="faster on GPU and TPU")
    add("--resume", action="store_true", help="continue the run in --output")
    add("--preset", help="start from this preset, which settles the options below")
    add("--patch-size", type=int, default=8)
    add("--width", type=int, default=192)
    add("--depth", type=int, default=6)
    add("--heads", type=int, default=3)
    return parser, parser.parse_args()


def check_arguments(args):
    for name in ("image_size", "batch_size", "epochs", "patch_size", "width", "depth", "heads"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1.")
    if args.batch_size < 2:
        raise ValueError("--batch-size must be at least 2: KoLeo compares images.")
    if args.seed < 0:
        raise ValueError("--seed must be at least 0.")
    if not 0 < args.learning_rate < 1:
        raise ValueError("--learning-rate must be above 0 and below 1.")


def load_data(args):
    """The training images, and if there are classes the two sides of k-NN, else `None`."""

    def load(folder, **kwargs):
        return kd.data.image_folder(
            folder, args.image_size, args.batch_size, seed=args.seed, **kwargs
        )

    data = load(args.images, labels="folders" if has_classes(args.images) else None)
    print(f"{len(data.files)} images in {args.images}, {len(data.unreadable)} unreadable skipped")
    if args.test:
        test = load(args.test, labels="folders", shuffle=False, drop_remainder=False)
        if test.class_names != data.class_names:
            raise ValueError(
                "`--test` must have the class subfolders of `--images`. "
                f"Received: {test.class_names} and {data.class_names}."
            )
    elif data.labels is not None:
        data, test = data.split(HELD_OUT, args.seed)
    else:
        return data, None, None
    count = min(len(data.files), MAX_NEIGHBOURS)
    chosen = np.random.default_rng(args.seed).permutation(len(data.files))[:count]
    neighbours = kd.data.ImageBatches(
        [data.files[index] for index in chosen],
        args.image_size,
        args.batch_size,
        labels=data.labels[chosen],
        shuffle=False,
        drop_remainder=False,
    )
    return data, neighbours, test


def has_classes(folder):
    """Whether there are several subfolders and no image outside of them."""
    if not os.path.isdir(folder):
        return False  # the loader says what is wrong
    entries = [path for path in pathlib.Path(folder).iterdir() if not path.name.startswith(".")]
    loose = [path for path in entries if path.suffix.lower() in kd.data.image_suffixes()]
    return sum(path.is_dir() for path in entries) > 1 and not loose


def build_model(args):
    image_shape = (args.image_size, args.image_size, 3)
    if args.preset:
        backbone = keras_hub.models.DINOV3Backbone.from_preset(args.preset, image_shape=image_shape)
    else:
        if args.width % (4 * args.heads):
            raise ValueError("--width must be a multiple of 4 * --heads, for the rotary positions.")
        backbone = keras_hub.models.DINOV3Backbone(
            patch_size=args.patch_size,
            num_layers=args.depth,
            hidden_dim=args.width,
            num_heads=args.heads,
            intermediate_dim=4 * args.width,
            image_shape=image_shape,
        )
    grid_of(image_shape[:2], backbone.patch_size, "image_size")
    augmentation = kd.MultiCrop(
        args.crop_size,
        args.local_crop_size,
        num_local_crops=4,
        global_crop_scale=(0.4, 1.0),
        local_crop_scale=(0.1, 0.4),
        # as wide, for the crop's size, as the recipe's
        blur_sigma=(0.1, 0.1 + 1.9 * args.crop_size / 224),
        seed=args.seed,
    )
    return kd.DINOv3(
        backbone,
        num_prototypes=args.prototypes,
        head_hidden_dim=512,
        head_bottleneck_dim=128,
        # Images look alike to a small new backbone. Targets much sharper than predictions make
        # much of what differs; with the recipe's 0.07 the loss stays at log(prototypes).
        student_temperature=0.1,
        teacher_temperature=0.01,
        augmentation=augmentation,
        seed=args.seed,
    )


def compile_model(model, learning_rate, total_steps):
    # The teacher remembers about a hundredth of the run, and never more than the recipe's.
    momentum = min(max(1 - 100 / total_steps, 0.9), 0.994)
    model.teacher_ema = kd.callbacks.TeacherEMA(kd.WarmupCosine(momentum, total_steps, end=1.0))
    schedule = kd.WarmupCosine(learning_rate, total_steps, warmup_steps=total_steps // 10)
    model.compile(kd.AdamW(schedule, weight_decay=0.04, part_clipnorm=3.0))


class Checkpoint(keras.callbacks.Callback):
    """Saves weights, teacher, optimizer, step and random state after each epoch.

    The file is replaced in one move, so that an interrupted write cannot harm it.
    """

    def __init__(self, path):
        super().__init__()
        self.path = path

    def on_epoch_end(self, epoch, logs=None):
        new = self.path.with_name("unfinished.keras")
        self.model.save(new)
        os.replace(new, self.path)


def check_output(args):
    """Refuses to overwrite a run, and to resume one with other settings."""
    path, checkpoint = args.output / "settings.json", args.output / "checkpoint.keras"
    if args.resume != checkpoint.exists():
        what = "holds no checkpoint to --resume" if args.resume else "holds a run; add --resume"
        raise ValueError(f"{args.output} {what}, or choose another --output.")
    free = ("images", "test", "output", "resume")  # the folders may have moved
    settings = {name: value for name, value in vars(args).items() if name not in free}
    if args.resume:
        saved = json.loads(path.read_text())
        changed = [f"--{name.replace('_', '-')}" for name in saved if saved[name] != settings[name]]
        if changed:
            raise ValueError(f"A resumed run keeps its settings ({path}). Changed: {changed}.")
    args.output.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(settings, indent=2))


def main():
    parser, args = parse_arguments()
    out, checkpoint = args.output, args.output / "checkpoint.keras"
    if args.mixed_bfloat16:
        keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        check_arguments(args)
        keras.utils.set_random_seed(args.seed)
        model = None if args.resume else build_model(args)
        data, neighbours, test = load_data(args)
        check_output(args)
    except (OSError, ValueError) as error:
        parser.error(str(error))

    if args.resume:
        model = keras.saving.load_model(checkpoint)
        start_epoch = int(model.step) // len(data)
        if start_epoch >= args.epochs and (out / "backbone").exists():
            parser.error(f"The run in {out} has had its {args.epochs} epochs.")
    else:
        start_epoch = 0
        compile_model(model, args.learning_rate, args.epochs * len(data))

    callbacks, references = [], {}
    if test is not None:
        knn = kd.callbacks.KNN(neighbours, test, feature="cls_mean_patch")
        callbacks.append(knn)
        references["raw pixels"] = raw_pixel_accuracy(neighbours, test)
        print(f"k-NN of raw pixels: {references['raw pixels']:.1%}")
        start = "after resuming" if args.resume else "before training"
        print_accuracy = keras.callbacks.LambdaCallback(
            on_epoch_begin=lambda epoch, logs: (
                epoch == start_epoch and print(f"k-NN {start}: {knn.history[0][1]:.1%}")
            ),
        )
        callbacks.append(print_accuracy)
    callbacks.append(keras.callbacks.CSVLogger(out / "log.csv", append=args.resume))
    callbacks.append(Checkpoint(checkpoint))
    model.fit(data, epochs=args.epochs, initial_epoch=start_epoch, callbacks=callbacks)
    if test is not None and knn.history:  # none if only the export was left to do
        print(f"k-NN after training: {knn.history[-1][1]:.1%}")

    backbone = model.export_backbone()
    backbone.save_to_preset(str(out / "backbone"))
    if importlib.util.find_spec("matplotlib"):
        if test is not None and not args.resume:
            references["untrained"] = knn.history[0][1]
        kd.visualize.training_curves(out / "log.csv", out / "curves.png", references)
        batch = (test or data)[0]
        images = batch if test is None else batch[0]
        kd.visualize.patch_pca(backbone, images[:8], path=out / "patch_pca.png")
    print(f"{len(data.unreadable)} unreadable files skipped. Results are in {out}.")


def raw_pixel_accuracy(neighbours, test):
    """The accuracy that features must beat to be worth anything."""
    sides = []
    for side in (neighbours, test):
        images, labels = zip(*side, strict=True)
        sides += [np.concatenate(images).reshape(len(side.files), -1) / 255, np.concatenate(labels)]
    return kd.evaluation.knn_accuracy(*sides)


if __name__ == "__main__":
    main()
