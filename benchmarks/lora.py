"""What low-rank adapters save against full training, and that merging them changes no feature.

    KERAS_BACKEND=torch python benchmarks/lora.py --size S --rank 8

Three models of one setting, each in a process of its own: all of the backbone trains, adapters of
query and value, and adapters of all projections. `trainable` are the numbers that train, backbone
and heads, and `share` those of the backbone over its weights. `gradients` and `optimizer` are the
bytes of the gradients and of the optimizer's state, counted from the variables. `peak` is what a
`fit` on ready crops held at most, after a first one has compiled, beyond what the process held
before there was a model: by the allocator on a GPU, else resident memory. `median` are seconds of
a step.

Then the adapters' `B` get random values of deviation 0.02. `difference` is the largest between the
class and patch tokens of `learned` and those of `export_backbone()`; `moved` is that between
`learned` and the frozen backbone by itself.
"""

import gc
import math
import multiprocessing

import keras
import measure
import numpy as np
from measure import Setting

VARIANTS = {  # name to projections, `None` without adapters
    "full": None,
    "query, value": ("query", "value"),
    "all projections": ("query", "key", "value", "output", "up", "down"),
}
STEPS_OF_FIT = 3


def num_bytes(variables):
    return sum(math.prod(v.shape) * np.dtype(v.dtype).itemsize for v in variables)


def count(variables):
    return sum(math.prod(v.shape) for v in variables)


def features(backbone, images, extras=None):
    """Class and patch tokens of images, float32 `(B, 1 + N, D)`."""
    import keras_dinov3 as kd

    tokens = kd.encode(backbone, images, extras=extras)
    parts = (keras.ops.cast(x, "float32") for x in (tokens.cls[:, None], tokens.patches))
    return np.concatenate([keras.ops.convert_to_numpy(part) for part in parts], axis=1)


def differences(model, images):
    """Largest changes of features: by merging, and by the adapters."""
    rng = np.random.default_rng(0)
    backbone, extras = model.learned
    for factors in extras.lora.factors:
        for _, b in factors.values():
            b.assign(0.02 * rng.standard_normal(b.shape, "float32"))
    learned = features(backbone, images, extras)
    merged, plain = features(model.export_backbone(), images), features(backbone, images)
    return {
        "difference": float(np.abs(merged - learned).max()),
        "moved": float(np.abs(plain - learned).max()),
    }


def row_of(variant, setting, rank, steps):
    """The numbers of a variant, a dict."""
    import keras_dinov3 as kd

    measure.forget_peak_memory()
    before = measure.peak_memory()
    projections = VARIANTS[variant]
    lora = None if projections is None else kd.LoRA(rank, projections=projections)
    masked = int(setting.masked_counts().sum())
    model = setting.model(augmentation=None, max_masked_patches=masked, lora=lora)
    batch = setting.batch()
    model.fit([batch] * 2, verbose=0)
    gc.collect()
    measure.forget_peak_memory()
    model.fit([batch] * STEPS_OF_FIT, verbose=0)
    peak = measure.peak_memory() - before
    step = measure.bare_step(model, batch)
    trainable = model.trainable_variables
    in_backbone = model.student.trainable_variables + model.student_extras.trainable_variables
    row = {
        "variant": variant,
        "trainable": count(trainable),
        "share": count(in_backbone) / count(model.student.weights),
        "gradients": num_bytes(trainable),
        "optimizer": num_bytes(model.optimizer.variables),
        "peak": peak,
        **measure.timed(step, steps),
    }
    images = batch["global_crops"][:, 0]
    return row if lora is None else row | differences(model, keras.ops.convert_to_tensor(images))


def in_new_process(function, *arguments):
    """What a function returns, in a process that holds nothing else."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def main():
    parser = Setting.parser(__doc__, batch_size=2)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    arguments = parser.parse_args()
    setting = Setting.of(arguments)
    rows = [
        in_new_process(row_of, variant, setting, arguments.rank, arguments.steps)
        for variant in arguments.variants
    ]
    formats = {
        "variant": "",
        "trainable": ",",
        "share": ".2%",
        "gradients": ".2e",
        "optimizer": ".2e",
        "peak": ".2e",
        "median": ".3f",
        "difference": ".1e",
        "moved": ".1e",
    }
    title = f"ViT-{setting.size}, {setting.dtype}, rank {arguments.rank}: bytes and seconds"
    more = {"setting": vars(setting), "rank": arguments.rank}
    measure.report(title, rows, formats, arguments.json, **more)


if __name__ == "__main__":
    main()
