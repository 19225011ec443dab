"""Where a training step's time goes, and how close it is to the machine's limit.

    KERAS_BACKEND=torch python benchmarks/step.py --size S --global_crop_size 128 \\
        --local_crop_size 64 --num_local_crops 4 --batch_size 4 --prototypes 4096

The first row is the whole step that `fit` runs, on images held ready, with crops and masks made in
it. The others are its parts, each compiled by itself as the step compiles them: on JAX and
TensorFlow one function, on torch what the model itself runs. Whole and parts take turns, one call
each per round; a share is the median over rounds of part / whole. Shares need not add up to 100 %,
because a compiler treats the whole otherwise than the parts. On torch, `student` keeps what the
backward pass needs, as in training. `losses` are given their targets, `sinkhorn` makes them.
`forward` is all up to the loss, `backward` the loss with its gradients minus that. `ema` moves the
teacher.

`GFLOP/s` is over the operations that `Setting.flops` in measure.py counts, `utilisation` that over
a large matrix product in the same dtype, which takes its turn like the parts. The memory is the
most that was held during the whole step, after it was compiled.

Then, on a model so small that its step hardly takes time: what `fit` adds to each step on the host,
bare, and with a progress bar and a CSV log.
"""

import contextlib
import io
import os
import statistics
import tempfile

import keras
import measure
from keras import ops
from measure import Setting

PARTS = "crops masks teacher student heads sinkhorn losses forward backward optimizer ema".split()


def make_parts(model, images):
    """The parts, a dict from name to a function that runs one and waits for it."""
    from keras_dinov3 import backend
    from keras_dinov3.encoder import encode, merge
    from keras_dinov3.prototypes import project, project_all

    trainable, others = model.trainable_variables, model.non_trainable_variables
    optimizer = model.optimizer
    shapes, model.train_shapes = model.train_shapes, None  # the parts get other arrays
    parts = {}

    def in_step(function):
        def run(*inputs):
            with backend.compiled_pieces(model.compiles_pieces):
                return function(*inputs)

        return run

    def part(name, function, *inputs, writes=()):
        """Adds a part under a name, and returns what it computes."""
        written = {id(variable) for variable in writes}
        reads = [v for v in [*trainable, *others, *optimizer.variables] if id(v) not in written]
        run = measure.compiled(in_step(function), reads, list(writes), model.jit_compile)
        parts[name] = lambda: run(*inputs)
        return run(*inputs)

    def make_masks(crops):
        return model.make_views(crops, True)[2:4]

    def teach(crops):
        return encode(model.teacher, merge(crops["global_crops"]), extras=model.teacher_extras)

    def study(crops, masks):
        return model.study(crops["global_crops"], crops.get("local_crops"), masks, True)

    def heads(teacher, student, slots):
        chunk = model.prototype_chunk_size
        outputs = [project(model.teacher_dino_head, teacher.cls, chunk)]
        tokens = [ops.expand_dims(tokens.cls, 0) for tokens in student]
        outputs += project_all(model.student_dino_head, tokens, chunk)
        if slots is not None:
            sides = (model.teacher_ibot_head, teacher), (model.student_ibot_head, student[0])
            for head, tokens in sides:
                patches = ops.take(merge(tokens.patches), slots.index, axis=0)
                outputs.append(project(head, patches, chunk))
        return outputs

    def sinkhorn(outputs):
        temperature = ops.convert_to_tensor(0.07, "float32")
        targets = [model.class_targets(outputs["teacher_global"], temperature, training=True)]
        if "teacher_patches" in outputs:
            targets.append(
                model.patch_targets(
                    outputs["teacher_patches"],
                    temperature,
                    weights=outputs["slots"].valid,
                    training=True,
                )
            )
        return targets

    def losses(outputs, targets):
        with given(model, class_targets=targets[0], patch_targets=targets[-1]):
            return model.loss_and_terms(outputs, training=True)[0]

    def loss(images):
        return model.loss_and_terms(model(images, training=True), training=True)[0]

    def update(gradients):
        with measure.no_grad():
            optimizer.apply(gradients, trainable)

    def move():
        with measure.no_grad():
            model.update_teacher(ops.ones((), "int32"))

    images = measure.tensors(images)
    crops = part("crops", model.augmentation, images)
    masks, slots = part("masks", make_masks, crops)
    teacher = part("teacher", teach, crops)
    student = part("student", study, crops, masks)
    part("heads", heads, teacher, student, slots)
    outputs = measure.compiled(
        in_step(lambda images: model(images, training=True)),
        [*trainable, *others],
        (),
        model.jit_compile,
    )(images)
    targets = part("sinkhorn", sinkhorn, outputs)
    part("losses", losses, outputs, targets)
    part("forward", loss, images)
    gradients_of = measure.loss_and_gradients(loss, trainable, others)
    _, gradients = part("backward", gradients_of, images)
    part("optimizer", update, gradients, writes=[*trainable, *optimizer.variables])
    part("ema", move, writes=others)
    model.train_shapes = shapes
    return parts


@contextlib.contextmanager
def given(model, **targets):
    """A context in which the model's targets are these arrays."""
    before = {name: getattr(model, name) for name in targets}
    for name, array in targets.items():
        setattr(model, name, lambda *args, _array=array, **kwargs: _array)
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(model, name, function)


def time_fit(steps, repeats):
    """Seconds per step of the bare step and of two kinds of `fit`, a dict of lists."""
    setting = Setting(
        "Ti", 1, 16, global_crop_size=32, local_crop_size=16, num_local_crops=1, prototypes=16
    )
    masked = int(setting.masked_counts().sum())
    model = setting.model(augmentation=None, max_masked_patches=masked, head_hidden_dim=16)
    batch = setting.batch()

    def fit(count, **options):
        with contextlib.redirect_stdout(io.StringIO()):
            model.fit([batch] * count, **options)

    few, times = 5, {"bare step": [], "fit": [], "fit with bar and log": []}
    with tempfile.TemporaryDirectory() as folder:
        logger = keras.callbacks.CSVLogger(os.path.join(folder, "log.csv"))
        kinds = {
            "fit": {"verbose": 0},
            "fit with bar and log": {"verbose": 1, "callbacks": [logger]},
        }
        for repeat in range(repeats + 1):
            for name, options in kinds.items():
                # Two lengths, so that what a call of `fit` costs once is not counted.
                short, long = (
                    measure.seconds(lambda n=n, options=options: fit(n, **options))[0]
                    for n in (few, few + steps)
                )
                if repeat:  # the first compiles
                    times[name].append((long - short) / steps)
            step = measure.bare_step(model, batch)
            measure.seconds(step, 2)
            if repeat:
                times["bare step"].append(sum(measure.seconds(step, steps)) / steps)
    return times


def main():
    parser = Setting.parser(__doc__)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--fit_steps", type=int, default=50, help="0: leave `fit` out")
    arguments = parser.parse_args()
    setting = Setting.of(arguments)
    model, images = setting.model(augmentation=setting.multi_crop()), setting.images()

    matmul, matmul_flops = measure.matmul(setting.dtype)
    step = measure.bare_step(model, images)
    (first,) = measure.seconds(step)
    measure.forget_peak_memory()
    measure.seconds(step, 2)
    memory = measure.peak_memory()
    calls = {"step": step, "matmul": matmul, **make_parts(model, images)}
    times = {name: [] for name in calls}
    for round in range(arguments.steps + 1):
        for name, call in calls.items():
            (elapsed,) = measure.seconds(call)
            if round:  # the first is a warm-up
                times[name].append(elapsed)
    pairs = zip(times["backward"], times["forward"], strict=True)
    times["backward"] = [both - forward for both, forward in pairs]

    rate = matmul_flops / statistics.median(times["matmul"])
    flops = setting.flops()
    flops["step"] = sum(flops.values())
    flops["forward"] = flops["step"] - flops["backward"]
    rows = []
    for name in ("step", *PARTS):
        row = {"part": name, **measure.spread(times[name])}
        row["share"] = statistics.median(
            part / whole for part, whole in zip(times[name], times["step"], strict=True)
        )
        if name in flops:
            row["GFLOP"] = flops[name] / 1e9
            row["GFLOP/s"] = row["GFLOP"] / row["median"]
            row["utilisation"] = 1e9 * row["GFLOP/s"] / rate
        rows.append(row)
    numbers = {"first_step": first, "peak_memory": memory, "matmul_rate": rate}
    title = (
        f"ViT-{setting.size}, {setting.dtype}: first step after {first:.1f} s, peak memory "
        f"{memory / 1e6:.0f} MB, matrix product {rate / 1e9:.0f} GFLOP/s. Times in seconds."
    )
    formats = {
        "part": "",
        "median": ".4f",
        "low": ".4f",
        "high": ".4f",
        "share": ".1%",
        "GFLOP": ".1f",
        "GFLOP/s": ".0f",
        "utilisation": ".0%",
    }
    fit_rows = []
    if arguments.fit_steps:
        fit_times = time_fit(arguments.fit_steps, repeats=5)
        bare = statistics.median(fit_times["bare step"])
        for name, values in fit_times.items():
            row = {"what": name} | {k: 1e3 * v for k, v in measure.spread(values).items()}
            fit_rows.append({**row, "overhead": row["median"] - 1e3 * bare})
    more = {"setting": vars(setting), **numbers, "fit": fit_rows}
    measure.report(title, rows, formats, arguments.json, **more)
    if fit_rows:
        formats = {"what": "", "median": ".2f", "low": ".2f", "high": ".2f", "overhead": ".2f"}
        measure.print_table("A tiny model's step on the host, in milliseconds", fit_rows, formats)


if __name__ == "__main__":
    main()
