"""How long it takes until the first step is done, and whether anything compiles after it.

    python benchmarks/compile.py --size S --backends jax tensorflow

Each row is a process of its own, started fresh, without compilation caches on the disk. `first
step` runs from the construction of the model to the end of its first step on images held ready,
with crops of two sizes made in it; `import` is what comes before, from the start of the process.
Then it makes 50 more steps and counts what was traced or compiled in them: on JAX, calls of the
Python step and compilations that JAX reports; on TensorFlow, calls of the Python step, which its
graph makes only when it is traced; on torch, graphs that `torch.compile` has made. None is right.
"""

import dataclasses
import multiprocessing
import os
import statistics
import time
import traceback

import keras
import measure
from measure import Setting

JIT_COMPILE = {"torch": ["auto", "true"], "jax": ["auto"], "tensorflow": ["auto", "true", "false"]}


def compilations(model):
    """A function that says how often this model's step has been traced and compiled so far."""
    counts = {}

    def count(what):
        counts[what] = counts.get(what, 0) + 1

    backend = keras.config.backend()
    if backend == "torch":
        import torch

        def graphs():
            return {"graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"]}

        return graphs
    if backend == "jax":
        from jax import monitoring

        def listen(event, duration, **kwargs):
            if event.endswith("backend_compile_duration"):
                count("compilations")

        monitoring.register_event_duration_secs_listener(listen)
    train_step = model.train_step

    def counted(*args):
        count("traces")
        return train_step(*args)

    model.train_step = counted
    return lambda: dict(counts)


def work(connection, setting, steps, started):
    """A fresh process: makes a model and its first step, then counts compilations."""
    try:
        import keras_dinov3  # noqa: F401

        imported = time.time() - started
        images = setting.images()
        augmentation = setting.multi_crop()
        measure.wait(measure.tensors(images))  # the engine itself has started
        start = time.perf_counter()
        model = setting.model(augmentation=augmentation)
        made = time.perf_counter() - start
        count = compilations(model)
        step = measure.bare_step(model, images)
        step()
        first = time.perf_counter() - start
        before = count()
        times = measure.seconds(step, steps)
        after = count()
        connection.send(
            {
                "import": imported,
                "model": made,
                "first step": first,
                "step": statistics.median(times),
                "before": sum(before.values()),
                "after": sum(after.values()) - sum(before.values()),
                "counts": {"first step": before, "all": after},
            }
        )
    except Exception:
        connection.send(traceback.format_exc())


def main():
    parser = Setting.parser(__doc__)
    parser.add_argument("--backends", nargs="+", default=list(JIT_COMPILE), choices=JIT_COMPILE)
    parser.add_argument("--steps", type=int, default=50)
    arguments = parser.parse_args()
    setting = Setting.of(arguments)
    os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    context, rows = multiprocessing.get_context("spawn"), []
    for backend in arguments.backends:
        given = arguments.jit_compile
        for jit_compile in JIT_COMPILE[backend] if given == "auto" else [given]:
            os.environ["KERAS_BACKEND"] = backend
            case = dataclasses.replace(setting, jit_compile=jit_compile)
            here, there = context.Pipe()
            process = context.Process(target=work, args=(there, case, arguments.steps, time.time()))
            process.start()
            there.close()
            row = here.recv()
            process.join()
            if isinstance(row, str):
                raise RuntimeError(f"{backend} with jit_compile={jit_compile} failed.\n{row}")
            rows.append({"backend": backend, "jit_compile": jit_compile, **row})
    layers = setting.shape[0]
    title = (
        f"ViT-{setting.size}, {layers} layers, in seconds; `after`: traces and compilations in "
        f"{arguments.steps} further steps"
    )
    formats = {
        "backend": "",
        "jit_compile": "",
        "import": ".1f",
        "model": ".1f",
        "first step": ".1f",
        "step": ".3f",
        "before": "d",
        "after": "d",
    }
    more = {"setting": vars(setting)}
    measure.report(title, rows, formats, arguments.json, arguments.backends, **more)


if __name__ == "__main__":
    main()
