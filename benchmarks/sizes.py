"""What each size of crops costs in a run of mixed sizes: to compile, in a step, in memory.

    KERAS_BACKEND=jax python benchmarks/sizes.py --sizes 64:32 96:48 128:64

All sizes are of one model with `MixedCrops`, in one process, as in a run. `first` is the first step
of a size with all that is compiled for it. `memory` is the most held in further steps of that
size: on a GPU by the allocator, which JAX cannot make forget the sizes before; on a CPU resident in
the process, with what earlier sizes left. So give small sizes first. `traces` counts, in a size's
first step, calls of the Python step on JAX and TensorFlow, whose compiled steps make none, and
on torch graphs that `torch.compile` has made. Then steps of sizes that are drawn, as in training,
are counted once more: none should be traced or compiled in them.
"""

import dataclasses
import time

import measure
from compile import compilations
from measure import Setting


def parsed(text):
    """`"64:32:128"`: `(64, 32, 128)`, pixels of global, local and Gram crops."""
    return tuple(int(side) for side in text.split(":"))


def mixed_model(setting, sizes):
    """A `DINOv3` with `MixedCrops`; if there are Gram crops, with a `GramAnchor`."""
    import keras_dinov3 as kd

    config = setting.multi_crop().get_config()
    for name in ("name", "global_crop_size", "local_crop_size"):
        del config[name]
    gram = kd.GramAnchor() if any(len(size) == 3 for size in sizes) else None
    return setting.model(augmentation=kd.MixedCrops(sizes, **config), gram=gram)


def main():
    parser = Setting.parser(__doc__, size="Ti")
    parser.add_argument("--sizes", nargs="+", type=parsed, default=[(64, 32), (96, 48), (128, 64)])
    parser.add_argument("--steps", type=int, default=10, help="of each size, and of mixed ones")
    arguments = parser.parse_args()
    sizes = arguments.sizes
    largest = max(size[0] for size in sizes)
    setting = dataclasses.replace(Setting.of(arguments), global_crop_size=largest)
    images = setting.images()
    model = mixed_model(setting, sizes)
    count = compilations(model)
    step = measure.bare_step(model, images)
    layer, rows = model.augmentation, []
    draw = layer.draw
    for index, size in enumerate(sizes):
        layer.draw = lambda seed, batch, index=index: index
        before = count()
        start = time.perf_counter()
        step()
        row = {"size": ":".join(map(str, size)), "first": time.perf_counter() - start}
        measure.forget_peak_memory()
        row |= measure.spread(measure.seconds(step, arguments.steps))
        row["memory"] = measure.peak_memory() / 1e6
        row["traces"] = sum(
            count().get(kind, 0) - before.get(kind, 0) for kind in ("traces", "graphs")
        )
        rows.append(row)
    layer.draw = draw
    before = count()
    measure.seconds(step, arguments.steps)
    further = sum(count().values()) - sum(before.values())
    title = (
        f"ViT-{setting.size}, {setting.shape[0]} layers, batch {setting.batch_size}, crops of "
        f"{len(sizes)} sizes: seconds, MB; {further} traces and compilations in "
        f"{arguments.steps} further steps of drawn sizes"
    )
    formats = {
        "size": "",
        "first": ".1f",
        "median": ".3f",
        "low": ".3f",
        "high": ".3f",
        "memory": ".0f",
        "traces": "d",
    }
    more = {"setting": vars(setting), "after": further}
    measure.report(title, rows, formats, arguments.json, **more)


if __name__ == "__main__":
    main()
