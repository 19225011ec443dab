"""Flags of commands whose code is elsewhere; `cli.py` has the others and runs them all."""

from keras_dinov3 import convert, recipes

KINDS = ("meta", "huggingface", "keras")


def add_convert(commands):
    command = commands.add_parser(
        "convert",
        help="bring a backbone from one format of weights to another",
        description="Brings a DINOv3 backbone from one format of weights to another: meta "
        "(a .pth or .safetensors file in the names of Meta's repository), huggingface (a folder "
        "with config.json and model.safetensors) or keras (a Keras Hub preset folder).",
    )
    command.add_argument("source", help="file or folder to read")
    command.add_argument("target", help="file or folder to write; it must not exist yet")
    command.add_argument(
        "--from",
        dest="source_kind",
        choices=KINDS,
        help="format of the source; default: what the path looks like",
    )
    command.add_argument(
        "--to",
        dest="target_kind",
        choices=KINDS,
        help="format of the target; default: meta for a .pth or .safetensors file, else keras, or "
        "huggingface if the source is keras",
    )
    command.add_argument(
        "--num-heads", type=int, help="attention heads, which files of meta do not tell"
    )
    command.add_argument(
        "--layer-norm-eps",
        type=float,
        help="epsilon of the norms, which files of meta do not tell: 1e-5 for layernormbf16, its "
        "released models; 1e-6 for layernorm. Default: that of the source, 1e-5 for meta",
    )
    command.add_argument(
        "--image-size",
        type=int,
        nargs=2,
        metavar=("HEIGHT", "WIDTH"),
        help="pixels that the backbone is built for, multiples of the patch size. Default: that of "
        "the source, 14 x 14 patches for meta",
    )
    command.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="dtype of the written weights; training needs float32. Default: %(default)s",
    )
    command.add_argument(
        "--part",
        choices=convert.SIDES,
        default="teacher",
        help="side of a training checkpoint of meta; default: %(default)s",
    )
    return command


def add_run(command):
    """The flags of every command that trains; returns what adds more."""
    add = command.add_argument
    add("--images", help="folder or tar file of images; needed unless it is a --resume")
    add("--output", help="folder for the run; needed unless it is a --dry-run")
    add("--test", help="folder or tar file with the same subfolders, for k-NN")
    add("--batch-size", type=int, help="images in one update. Default: 64")
    add("--seed", type=int, help="default: 0")
    add("--resume", action="store_true", help="go on with the run in --output")
    add("--dry-run", action="store_true", help="print the settings and why, and train nothing")
    return add


def add_pretrain(commands):
    command = commands.add_parser(
        "pretrain",
        help="train on a folder of images without labels",
        description="Trains on a folder of images, or a tar file of them. If all lie in several "
        "subfolders, these are taken for classes, and k-NN says during the run how good the "
        "features are; training does not see them.",
    )
    add = add_run(command)
    add(
        "--recipe",
        help=f"{', '.join(recipes.RECIPES)}, or the path of a JSON file that holds one, such as a "
        "run's settings.json. Default: tiny",
    )
    add("--backbone", help="go on with a Keras Hub preset or a run, by the recipe `continue`")
    add(
        "--guard",
        choices=("stop", "restore", "off"),
        help="with --backbone, when features become worse than they were: stop, or put the best "
        "weights back and stop. Default: restore",
    )
    add("--epochs", type=int, help="default: 100")
    add("--image-size", type=int, nargs="+", metavar="PIXELS", help="one side, or height and width")
    add("--dtype", help="of the computation: float32, mixed_bfloat16. Default: the recipe's")
    add("--json", action="store_true", help="print them as JSON, to be edited, for --recipe")
    return command


def add_adapt(commands):
    command = commands.add_parser(
        "adapt",
        help="go on with a trained backbone in larger crops of several sizes",
        description="High-resolution adaptation: goes on with a trained backbone in crops of "
        "several sizes, while a Gram anchor holds its patches' similarities to those of the "
        "backbone as it was. Writes a run's folder as pretrain does.",
    )
    add = add_run(command)
    add("--backbone", help="folder of a run, whose settings and heads go on too, or a preset")
    add(
        "--sizes",
        help="pixels of global, local and Gram crops, one of which is drawn for each update, such "
        "as 512:112:1024,768:160. Gram crops that are not given are twice the global ones",
    )
    add("--probabilities", help="of the sizes, such as 0.7,0.3. Default: all alike")
    add("--gram-weight", type=float, help="of the Gram loss; 0 for no anchor. Default: 2")
    add("--learning-rate", type=float, help="default: a tenth of that of a new training")
    add("--epochs", type=int, help="default: 10")
    add(
        "--image-size",
        type=int,
        nargs="+",
        metavar="PIXELS",
        help="one side, or height and width, before crops are cut. Default: the largest crop's",
    )
    add("--dtype", help="of the computation: float32, mixed_bfloat16. Default: the run's")
    return command
