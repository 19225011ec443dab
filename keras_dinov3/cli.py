"""The command `keras-dinov3`: its flags are arguments of the same name in Python."""

import argparse
import json
import pathlib
import shlex
import sys

import keras_hub

from keras_dinov3 import (
    adapt,
    convert,
    data,
    evaluation,
    features,
    presets,
    pretrain,
    recipes,
    report,
)
from keras_dinov3.commands import add_adapt, add_convert, add_pretrain

WEIGHT_FILES = (".safetensors", ".pth", ".pt")
FILES = (*WEIGHT_FILES, ".bin", ".h5", ".keras", ".npz", ".onnx")  # that no folder is named like


def main(argv=None):
    """Runs a command line.

    Args:
        argv: List of strings. `None`: those of the process.

    Returns:
        Exit code: 0, or 2 with one message on stderr.
    """
    arguments = parser().parse_args(argv)
    arguments.line = sys.argv[1:] if argv is None else argv
    try:
        arguments.run(arguments)
    except (ImportError, OSError, TypeError, ValueError) as error:
        print(f"keras-dinov3 {arguments.command}: {error}", file=sys.stderr)
        return 2
    return 0


def parser():
    main_parser = argparse.ArgumentParser(prog="keras-dinov3", description=__doc__)
    commands = main_parser.add_subparsers(dest="command", required=True)
    add_convert(commands).set_defaults(run=run_convert)
    add_pretrain(commands).set_defaults(run=run_pretrain)
    add_adapt(commands).set_defaults(run=run_adapt)
    add_evaluate(commands)
    add_report(commands)
    return main_parser


def run_convert(arguments):
    source, target = pathlib.Path(arguments.source), pathlib.Path(arguments.target)
    if not source.exists():
        raise FileNotFoundError(f"There is no file or folder {source}.")
    if target.exists():
        raise FileExistsError(f"{target} exists and is not overwritten.")
    source_kind = arguments.source_kind or kind_of(source)
    target_kind = arguments.target_kind
    if target_kind is None:
        folder_kind = "huggingface" if source_kind == "keras" else "keras"
        target_kind = "meta" if target.suffix in WEIGHT_FILES else folder_kind
    if target_kind == "meta" and target.suffix not in WEIGHT_FILES:
        raise ValueError(
            f"A target of kind meta must end in {', '.join(WEIGHT_FILES)}. Received: {target}."
        )
    if target_kind != "meta" and target.suffix in FILES:
        raise ValueError(
            f"A target of kind {target_kind} is a folder, and {target} has the name of a file. "
            "Give a name without such an ending; files of weights end in "
            f"{', '.join(WEIGHT_FILES)}."
        )
    backbone = read_backbone(source, source_kind, arguments)
    write_backbone(backbone, target, target_kind)
    print(f"{source} ({source_kind}) is now {target} ({target_kind}).")


def kind_of(source):
    """The format of an existing file or folder."""
    if source.is_file() and source.suffix in WEIGHT_FILES:
        return "meta"
    config = source / "config.json"
    if config.is_file():
        try:
            content = json.loads(config.read_text(encoding="utf-8"))
        except ValueError:
            content = None
        if isinstance(content, dict) and "model_type" in content:
            return "huggingface"
        if isinstance(content, dict) and "registered_name" in content:
            return "keras"
    raise ValueError(
        f"{source} is neither a .pth or .safetensors file nor a folder with the config.json of a "
        "Hugging Face model or Keras Hub preset. If it is one, say which by `--from`."
    )


def read_backbone(source, kind, arguments):
    names = ("layer_norm_eps", "image_size")
    given = {name: getattr(arguments, name) for name in names}
    given = {name: value for name, value in given.items() if value is not None}
    if kind == "huggingface":
        return convert.backbone_from_huggingface(source, dtype=arguments.dtype, **given)
    if kind == "keras":
        if given:
            raise ValueError(
                "`--layer-norm-eps` and `--image-size` are for sources of meta and huggingface. "
                f"A Keras Hub preset tells them itself. Received: {source} and {given}."
            )
        return read_preset(source, arguments.dtype)
    if arguments.num_heads is None:
        raise ValueError(
            "Weights in Meta's format do not tell the number of attention heads. Give it by "
            "`--num-heads`: 6 for ViT-S, 12 for ViT-B, 16 for ViT-L, 20 for ViT-H+, 32 for ViT-7B."
        )
    weights = convert.read_weights(source)
    return convert.backbone_from_meta(
        weights, arguments.num_heads, arguments.part, dtype=arguments.dtype, **given
    )


def read_preset(folder, dtype):
    try:
        # An absolute path is never taken for the name of a preset to download.
        return keras_hub.models.DINOV3Backbone.from_preset(str(folder.resolve()), dtype=dtype)
    except Exception as error:  # whatever damaged JSON and HDF5 lead to
        raise ValueError(
            f"{folder} is no readable Keras Hub preset of a `DINOV3Backbone`: {error}"
        ) from error


def write_backbone(backbone, target, kind):
    if kind == "huggingface":
        convert.backbone_to_huggingface(backbone, target)
    elif kind == "keras":
        backbone.save_to_preset(str(target))
    else:
        convert.write_weights(convert.backbone_to_meta(backbone), target)


def run_pretrain(arguments):
    if arguments.resume:
        fixed = ("recipe", "backbone", "guard", "batch_size", "epochs", "image_size", "dtype")
        resume(arguments, fixed)
        return
    if arguments.backbone is None:
        recipe = recipes.get(arguments.recipe or "tiny")
    else:
        if arguments.recipe is not None:
            raise ValueError(
                "A `--backbone` has the recipe `continue`. Received: --recipe "
                f"{arguments.recipe} too. Print that one as JSON (--json), edit it, and give it."
            )
        recipe = recipes.continue_from(arguments.backbone)
    guard, goes_on = arguments.guard, "preset" in recipe.settings.get("backbone", {})
    if guard is not None and not goes_on:
        raise ValueError(
            "`--guard` is for a backbone that knows something already. Received: --guard "
            f"{guard} without `--backbone`."
        )
    guard = None if guard == "off" or not goes_on else guard or "restore"
    if arguments.dtype:
        recipe = recipe.changed(backbone={"dtype": arguments.dtype})
    recipe = pretrain.plan_run(
        source_of(arguments),
        recipe,
        arguments.batch_size,
        arguments.epochs,
        size_of(arguments),
        arguments.test is not None,
    )
    if arguments.json:
        print(json.dumps(recipe.get_config(), indent=2))
    else:
        train(arguments, recipe, guard)


def run_adapt(arguments):
    if arguments.resume:
        fixed = ("backbone", "sizes", "probabilities", "gram_weight", "learning_rate")
        resume(arguments, (*fixed, "batch_size", "epochs", "image_size", "dtype"))
        return
    for name, what in (
        ("backbone", "a run's folder or a preset"),
        ("sizes", "GLOBAL:LOCAL or GLOBAL:LOCAL:GRAM in pixels, several with commas"),
    ):
        if getattr(arguments, name) is None:
            raise ValueError(f"`--{name}` is needed: {what}. Received: none.")
    given = arguments.probabilities
    weight = arguments.gram_weight
    recipe = adapt.plan_adaptation(
        source_of(arguments),
        arguments.backbone,
        adapt.parse_sizes(arguments.sizes),
        None if given is None else adapt.parse_probabilities(given),
        adapt.GRAM_WEIGHT if weight is None else weight,
        arguments.learning_rate,
        arguments.batch_size,
        arguments.epochs,
        size_of(arguments),
        arguments.dtype,
        arguments.test is not None,
    )
    train(arguments, recipe)


def resume(arguments, fixed):
    """Goes on with the run in `--output`, whose settings, `fixed`, must not be given."""
    if arguments.output is None:
        raise ValueError("`--resume` needs `--output`, the folder of the run.")
    fixed = (*fixed, "seed", "dry_run")
    given = [f"--{n.replace('_', '-')}" for n in fixed if getattr(arguments, n)]
    if given:
        raise ValueError(f"A resumed run keeps its settings. Received: {', '.join(given)}.")
    found = pretrain.resume(arguments.output, arguments.images, arguments.test)
    print_results(found, arguments.output)


def source_of(arguments):
    if arguments.images is None:
        raise ValueError("`--images` is needed: a folder or tar file of images.")
    return pretrain.Source(arguments.images)


def size_of(arguments):
    size = arguments.image_size
    return size[0] if size and len(size) == 1 else size


def train(arguments, recipe, guard=None):
    """Prints the recipe and, unless it is a dry run, trains by it."""
    print(recipe, flush=True)
    if arguments.dry_run:
        return
    if arguments.output is None:
        raise ValueError("`--output` is needed: a folder for the run that does not exist yet.")
    line = " ".join(["keras-dinov3", *map(shlex.quote, arguments.line)])
    found = pretrain.pretrain(
        arguments.images,
        arguments.output,
        recipe,
        arguments.test,
        arguments.seed or 0,
        command=line,
        guard=guard,
    )
    print_results(found, arguments.output)


def print_results(found, output):
    print(f"{found['images']} images, {found['unreadable']} unreadable files skipped.")
    if "knn" in found:
        print(f"k-NN of raw pixels: {found['raw_pixels']:.1%}")
        for epoch, accuracy in dict(found["knn"][:1] + found["knn"][-1:]).items():
            print(f"k-NN after {epoch} epochs: {accuracy:.1%}")
    print(f"The trained backbone is in {output}/backbone; the rest of the run beside it.")


def add_evaluate(commands):
    command = commands.add_parser(
        "evaluate",
        help="say how good a backbone's features are, by labelled images",
        description="Classifies test images by the frozen features of labelled ones: k-NN, a "
        "linear probe, logistic regression, few labels, retrieval.",
    )
    add = command.add_argument
    add("--backbone", required=True, help="Keras Hub preset, or folder of a run of pretrain")
    add("--train", required=True, help="folder with a subfolder for each class, or tar file")
    add("--test", required=True, help="the same, with the same classes")
    add("--output", help="JSON file for the results, which must not exist yet")
    add("--image-size", type=int, nargs="+", metavar="PIXELS", help="default: the backbone's")
    add("--feature", choices=features.POOLED, default="cls_mean_patch", help="default: %(default)s")
    add("--layers", type=int, help="the last so many blocks together. Default: the last")
    add("--k", type=int, nargs="+", default=[10, 20], help="neighbours. Default: 10 20")
    add("--few", type=int, nargs="+", default=[1, 10], help="labels per class. Default: 1 10")
    add("--batch-size", type=int, default=64, help="default: %(default)s")
    add("--mean", type=float, nargs="+", help="of the images in training, one per channel")
    add("--std", type=float, nargs="+", help="the same; default: a run's own, or ImageNet's")
    add("--seed", type=int, default=0, help="for splits and draws. Default: %(default)s")
    command.set_defaults(run=run_evaluate)


def run_evaluate(arguments):
    if arguments.output is not None and pathlib.Path(arguments.output).exists():
        raise FileExistsError(f"{arguments.output} exists and is not overwritten.")
    backbone = presets.read_preset(arguments.backbone)
    settings = presets.normalization_of(arguments.backbone)
    for name in ("mean", "std"):
        given = getattr(arguments, name)
        if given is not None:
            settings[name] = given[0] if len(given) == 1 else given
    size = arguments.image_size or list(backbone.image_shape[:2])
    settings["image_size"] = size = size * 2 if len(size) == 1 else size
    sides = [
        data.image_folder(
            directory,
            size,
            arguments.batch_size,
            labels="folders",
            shuffle=False,
            drop_remainder=False,
            check=False,
        )
        for directory in (arguments.train, arguments.test)
    ]
    if sides[0].class_names != sides[1].class_names:
        both = [set(side.class_names) for side in sides]
        raise ValueError(
            "`--train` and `--test` must have the same classes. Only one of them has: "
            f"{', '.join(sorted(both[0] ^ both[1])[:10])}."
        )
    found = evaluation.evaluate(
        backbone,
        *sides,
        k=arguments.k,
        few=arguments.few,
        seed=arguments.seed,
        feature=arguments.feature,
        layers=arguments.layers,
        **settings,
    )
    found = {
        "backbone": arguments.backbone,
        "train": arguments.train,
        "test": arguments.test,
        "feature": arguments.feature,
        "layers": arguments.layers,
        **settings,
        **found,
    }
    print_evaluation(found)
    if arguments.output is not None:
        pathlib.Path(arguments.output).write_text(json.dumps(found, indent=2))


def print_evaluation(found):
    rows = [(f"k-NN, k = {k}", value) for k, value in found["knn"].items()]
    for name in ("linear_probe", "logistic_regression"):
        chosen = {key: found[name][key] for key in ("learning_rate", "C") if key in found[name]}
        notes = ", ".join(f"{key} = {value:g}" for key, value in chosen.items())
        rows.append((f"{name.replace('_', ' ')}, {notes}", found[name]["accuracy"]))
    for n, of_n in found.get("few_shot", {}).items():
        rows.append((f"{n} per class, std {100 * of_n['std']:.1f}", of_n["mean"]))
    rows += [(f"retrieval, {name}", value) for name, value in found["retrieval"].items()]
    count = found["images"]
    print(
        f"{found['backbone']}: {count['test']} test images by {count['train']} labelled ones, "
        f"{found['classes']} classes, {found['feature']} of width {found['width']}, in %"
    )
    for name, value in rows:
        print(f"  {name:40} {100 * value:6.2f}")
    print(f"  {'RankMe':40} {found['rankme']:6.1f}  of {found['width']}")
    print(f"  {'uniformity':40} {found['uniformity']:6.2f}")


def add_report(commands):
    command = commands.add_parser(
        "report",
        help="make one HTML page of a run",
        description="Makes one HTML page of a run, with all pictures inside, which opens offline.",
    )
    command.add_argument("run_dir", help="folder of a run of pretrain")
    command.add_argument("--output", help="path of the page. Default: report.html in the folder")
    command.set_defaults(run=run_report)


def run_report(arguments):
    path = report.write_report(arguments.run_dir, arguments.output)
    print(f"{path}, {path.stat().st_size / 1e6:.1f} MB.")


if __name__ == "__main__":
    sys.exit(main())
