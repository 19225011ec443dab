"""What the benchmarks share: the setting that is measured, timing, counting, printing, JSON.

Nothing here is run by itself. A script makes a `Setting` from its flags, times functions that
`compiled` has made, and gives rows (dicts of raw numbers) to `report`.
"""

import argparse
import contextlib
import dataclasses
import importlib.metadata
import json
import math
import os
import platform
import resource
import statistics
import sys
import time
from pathlib import Path

import keras
import numpy as np

# Keras, the engine and NumPy only: the peers' processes also import this file, and hold none of
# our code. `Setting`'s methods import what they need.

SIZES = {  # layers, width, heads
    "Ti": (12, 192, 3),
    "S": (12, 384, 6),
    "B": (12, 768, 12),
    "L": (24, 1024, 16),
}
NUM_REGISTERS = 4
HEAD = {"head_hidden_dim": 2048, "head_bottleneck_dim": 256, "head_num_layers": 3}

# Further keyword arguments of `DINOv3` that the scripts take as flags: name to what `add_argument`
# takes, such as {"drop_path_rate": {"type": float, "default": 0.0}}.
OPTIONS = {
    "drop_path_rate": {"type": float, "default": 0.0},
    "remat": {"choices": ("none", "blocks", "full"), "default": "none"},
    "prototype_chunk_size": {"type": int},
}


@dataclasses.dataclass
class Setting:
    """What a step is made of; each field is a flag of the same name.

    `options` are keyword arguments of `DINOv3`, those of `OPTIONS` when it comes from flags.
    """

    size: str = "S"
    num_layers: int = 0  # 0: those of `size`
    patch_size: int = 16
    global_crop_size: int = 128
    local_crop_size: int = 64
    num_global_crops: int = 2
    num_local_crops: int = 4
    batch_size: int = 4
    prototypes: int = 4096
    dtype: str = "float32"
    jit_compile: str = "auto"  # "auto", "true" or "false"
    options: dict = dataclasses.field(default_factory=dict)

    @staticmethod
    def parser(doc, **defaults):
        """An `ArgumentParser` with a flag for each field, and `--json`."""
        text, command = doc.split("\n")[0], argparse.RawDescriptionHelpFormatter
        parser = argparse.ArgumentParser(description=text, formatter_class=command)
        choices = {
            "size": SIZES,
            "dtype": ("float32", "mixed_bfloat16"),
            "jit_compile": ("auto", "true", "false"),
        }
        for field in dataclasses.fields(Setting):
            if field.name != "options":
                parser.add_argument(
                    f"--{field.name}",
                    type=field.type,
                    default=defaults.get(field.name, field.default),
                    choices=choices.get(field.name),
                )
        for name, how in OPTIONS.items():
            parser.add_argument(f"--{name}", **how)
        parser.add_argument("--json", type=Path, help="where to write the numbers")
        return parser

    @classmethod
    def of(cls, arguments):
        """The setting that parsed flags describe."""
        names = [field.name for field in dataclasses.fields(cls) if field.name != "options"]
        options = {name: getattr(arguments, name) for name in OPTIONS}
        return cls(**{name: getattr(arguments, name) for name in names}, options=options)

    @property
    def shape(self):
        """Layers, width and heads."""
        num_layers, width, num_heads = SIZES[self.size]
        return self.num_layers or num_layers, width, num_heads

    @property
    def jit(self):
        """`jit_compile` as Keras takes it."""
        return {"auto": "auto", "true": True, "false": False}[self.jit_compile]

    def backbone_config(self):
        """Keyword arguments of `keras_hub.models.DINOV3Backbone`."""
        num_layers, width, num_heads = self.shape
        return {
            "patch_size": self.patch_size,
            "num_layers": num_layers,
            "hidden_dim": width,
            "num_heads": num_heads,
            "intermediate_dim": 4 * width,
            "num_register_tokens": NUM_REGISTERS,
            "image_shape": (self.global_crop_size, self.global_crop_size, 3),
            "dtype": self.dtype,
        }

    def model(self, **options):
        """A compiled `DINOv3`; `options` are further keyword arguments."""
        import keras_hub

        import keras_dinov3 as kd

        keras.utils.set_random_seed(0)
        backbone = keras_hub.models.DINOV3Backbone(**self.backbone_config())
        options = {"seed": 0, **HEAD, **self.options, **options}
        model = kd.DINOv3(backbone, num_prototypes=self.prototypes, **options)
        model.compile(kd.AdamW(1e-4, weight_decay=0.04), jit_compile=self.jit)
        return model

    def multi_crop(self):
        import keras_dinov3 as kd

        sizes = self.global_crop_size, self.local_crop_size
        counts = self.num_global_crops, self.num_local_crops
        blur = (1.0, *[0.1] * (counts[0] - 1)), (0.0, *[0.2] * (counts[0] - 1))
        return kd.MultiCrop(
            *sizes,
            *counts,
            global_blur_probability=blur[0],
            global_solarize_probability=blur[1],
            seed=0,
        )

    def images(self):
        """uint8 images `(B, H, W, 3)`, an eighth larger than the global crops: blobs of colour."""
        side = self.global_crop_size * 9 // 8
        coarse = np.random.default_rng(0).integers(0, 256, (self.batch_size, 8, 8, 3), "uint8")
        cell = -(-side // 8)
        return coarse.repeat(cell, 1).repeat(cell, 2)[:, :side, :side]

    def masked_counts(self):
        """Masked patches of each global crop of a batch, as `BlockMasking` counts by default."""
        crops, patches = self.batch_size * self.num_global_crops, self.grid**2
        edges = np.linspace(0.1, 0.5, crops // 2 + 1, dtype="float32")[1:]
        return np.int32([*(np.float32(patches) * edges), *[0] * (crops - len(edges))])

    @property
    def grid(self):
        return self.global_crop_size // self.patch_size

    def batch(self):
        """Ready crops and masks as NumPy arrays, what `fit` takes with `augmentation=None`."""
        rng = np.random.default_rng(0)

        def crops(count, size):
            shape = (self.batch_size, count, size, size, 3)
            return rng.standard_normal(shape, "float32")

        masks = np.zeros((self.batch_size * self.num_global_crops, self.grid**2), bool)
        for mask, count in zip(masks, self.masked_counts(), strict=True):
            mask[rng.permutation(len(mask))[:count]] = True
        batch = {
            "global_crops": crops(self.num_global_crops, self.global_crop_size),
            "masks": masks.reshape(self.batch_size, self.num_global_crops, -1),
        }
        if self.num_local_crops:
            batch["local_crops"] = crops(self.num_local_crops, self.local_crop_size)
        return batch

    def flops(self):
        """Floating point operations of the step's matrix products, by part.

        A product of `(m, k)` and `(k, n)` counts `2 m k n`. A backward pass counts two products
        for each forward one, and one for the patch embedding, whose input needs no gradient.
        Elementwise work, softmax, norms, losses, optimizer and augmentation count 0.
        """
        num_layers, width, _ = self.shape

        def encoder(crops, size):
            patches = (size // self.patch_size) ** 2
            length = 1 + NUM_REGISTERS + patches
            embed = 2 * patches * self.patch_size**2 * 3 * width
            attention = 2 * length * 4 * width**2 + 4 * length**2 * width
            feed = 2 * length * 8 * width**2
            return crops * embed, crops * num_layers * (attention + feed)

        def head(rows):
            hidden, bottleneck = HEAD["head_hidden_dim"], HEAD["head_bottleneck_dim"]
            sizes = [width, *[hidden] * (HEAD["head_num_layers"] - 1), bottleneck, self.prototypes]
            return 2 * rows * sum(a * b for a, b in zip(sizes, sizes[1:], strict=False))

        num_global = self.batch_size * self.num_global_crops
        num_local = self.batch_size * self.num_local_crops
        masked = int(self.masked_counts().sum())
        teacher = encoder(num_global, self.global_crop_size)
        local = encoder(num_local, self.local_crop_size)
        embed, blocks = (a + b for a, b in zip(teacher, local, strict=True))
        student_heads = head(num_global + num_local + masked)
        return {
            "teacher": sum(teacher),
            "student": embed + blocks,
            "heads": student_heads + head(num_global + masked),
            "backward": embed + 2 * blocks + 2 * student_heads,
        }


# Compiling


def is_on_gpu():
    backend = keras.config.backend()
    if backend == "jax":
        import jax

        return jax.default_backend() == "gpu"
    if backend == "tensorflow":
        import tensorflow as tf

        return bool(tf.config.list_physical_devices("GPU"))
    import torch

    return torch.cuda.is_available()


def wait(values=None):
    """Returns when the device has computed `values` and all before them."""
    backend = keras.config.backend()
    if backend == "jax":
        import jax

        jax.block_until_ready(values)
    elif backend == "tensorflow":
        import tensorflow as tf

        tf.test.experimental.sync_devices()
    else:
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize()
    return values


def compiled(function, reads=(), writes=(), jit_compile="auto"):
    """`function` as a training step runs it: compiled by JAX and TensorFlow, as it is on torch.

    Args:
        function: Function of tensors. It may read the variables `reads` and `writes` and assign
            `writes`; what it assigns to others (seeds) may be lost.
        reads: List of `keras.Variable`.
        writes: List of `keras.Variable`. On JAX their buffers become their own successors, as in
            training; the variables themselves keep their values.
        jit_compile: As in `keras.Model.compile`; of TensorFlow only.

    Returns:
        A function that waits for its outputs.
    """
    backend = keras.config.backend()
    if backend == "jax":
        import jax

        def pure(writes_now, reads_now, *inputs):
            state = [*zip(writes, writes_now, strict=True), *zip(reads, reads_now, strict=True)]
            with keras.StatelessScope(state) as scope:
                outputs = function(*inputs)
            return outputs, [scope.get_current_value(v) for v in writes]

        pure = jax.jit(pure, donate_argnums=0)
        state = [jax.numpy.copy(v.value) for v in writes]

        def run(*inputs):
            nonlocal state
            outputs, state = pure(state, [v.value for v in reads], *inputs)
            return jax.block_until_ready((outputs, state))[0]

        return run
    if backend == "tensorflow":
        import tensorflow as tf

        function = tf.function(function, jit_compile=bool(jit_compile), reduce_retracing=True)
    return lambda *inputs: wait(function(*inputs))


def loss_and_gradients(loss, trainable, others=()):
    """A function of the inputs of `loss`, to be compiled, that returns the loss and its gradients.

    Args:
        loss: Function of tensors that returns a scalar.
        trainable: List of `keras.Variable`.
        others: List of further variables that `loss` reads or assigns.
    """
    backend = keras.config.backend()

    def on_jax(*inputs):
        import jax

        values = [v.value for v in others]

        def pure(trainable_now):
            state = [*zip(trainable, trainable_now, strict=True)]
            state += zip(others, values, strict=True)
            with keras.StatelessScope(state) as scope:
                result = loss(*inputs)
            return result, [scope.get_current_value(v) for v in others]

        value_and_grad = jax.value_and_grad(pure, has_aux=True)
        (result, changed), gradients = value_and_grad([v.value for v in trainable])
        for variable, value in zip(others, changed, strict=True):
            variable.assign(value)
        return result, gradients

    def on_tensorflow(*inputs):
        import tensorflow as tf

        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch([v.value for v in trainable])
            result = loss(*inputs)
        return result, tape.gradient(result, [v.value for v in trainable])

    def on_torch(*inputs):
        for variable in trainable:
            variable.value.grad = None
        result = loss(*inputs)
        result.backward()
        return result.detach(), [v.value.grad for v in trainable]

    return {"jax": on_jax, "tensorflow": on_tensorflow, "torch": on_torch}[backend]


def no_grad():
    """A context in which torch records nothing for a backward pass."""
    if keras.config.backend() != "torch":
        return contextlib.nullcontext()
    import torch

    return torch.no_grad()


def tensors(batch):
    """A tree of NumPy arrays as tensors on the device."""
    return keras.tree.map_structure(keras.ops.convert_to_tensor, batch)


def bare_step(model, batch):
    """The function that `fit` calls for each step, on a batch held ready, and nothing around it.

    The first call traces and compiles. Each call returns the logs when the device is done.
    """
    batch = tensors(batch)
    model.declare(batch)
    model.make_train_function()
    if keras.config.backend() == "torch":
        return lambda: wait(model.train_function([(batch,)]))
    if keras.config.backend() == "tensorflow":
        return lambda: wait(model.train_function(iter([(batch,)])))
    if not model.metrics[0].variables:  # they are made by the first symbolic call
        model._symbolic_build(data_batch=(batch, None, None))
    parts = (
        model.trainable_variables,
        model.non_trainable_variables,
        model.optimizer.variables,
        model.metrics_variables,
    )
    import jax

    state = tuple([jax.numpy.copy(v.value) for v in variables] for variables in parts)

    def step():
        nonlocal state
        logs, state = model.train_function(state, iter([(batch,)]))
        return jax.block_until_ready((logs, state))[0]

    return step


# Timing


def seconds(function, repeats=1):
    """How long each of `repeats` calls takes, a list."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return times


def spread(times):
    """Median and quartiles of seconds, a dict."""
    low, median, high = statistics.quantiles(times, n=4) if len(times) > 1 else times * 3
    return {"median": median, "low": low, "high": high}


def timed(function, steps, warm_up=1):
    """`spread` of `steps` calls, with the first call of all and `warm_up` more apart."""
    (first,) = seconds(function)
    seconds(function, warm_up)
    return {**spread(seconds(function, steps)), "first": first}


def matmul(dtype="float32"):
    """What is held to be the machine's limit: a function that multiplies two large matrices.

    Returns:
        The function, which waits for the product, and the operations in one.
    """
    side = 8192 if is_on_gpu() else 2048
    dtype = "bfloat16" if dtype == "mixed_bfloat16" else dtype
    rng = np.random.default_rng(0)
    a, b = (keras.ops.cast(rng.standard_normal((side, side), "float32"), dtype) for _ in range(2))
    product = compiled(keras.ops.matmul)
    seconds(lambda: product(a, b), 2)  # compiles
    return lambda: product(a, b), 2 * side**3


def fitted_exponent(x, times):
    """`(c, a, p)` of `c + a * x**p`, the constant being the largest share that fits best.

    For each constant from 0 to just below the smallest time, a line through `log(times - c)` over
    `log(x)` gives `a` and `p`; the constant with the smallest squared error in `log(times)` wins.
    With fewer than four points the constant is 0.
    """
    x, times = np.asarray(x, float), np.asarray(times, float)
    best = None
    for share in np.linspace(0, 0.95, 96) if len(x) > 3 else [0.0]:
        constant = share * times.min()
        power, offset = np.polyfit(np.log(x), np.log(times - constant), 1)
        fitted = constant + np.exp(offset) * x**power
        error = float(np.sum((np.log(fitted) - np.log(times)) ** 2))
        if best is None or error < best[0]:
            best = error, constant, math.exp(offset), float(power)
    return best[1:]


# Memory


def peak_memory():
    """Most bytes held so far: by the allocator on a GPU, else resident in this process."""
    if is_on_gpu():
        return _gpu_peak()
    try:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.split("VmHWM:")[1].split()[0])
    except (OSError, IndexError):
        unit = 1 if sys.platform == "darwin" else 1024
        return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _gpu_peak():
    backend = keras.config.backend()
    if backend == "torch":
        import torch

        return torch.cuda.max_memory_allocated()
    if backend == "jax":
        import jax

        return jax.local_devices()[0].memory_stats()["peak_bytes_in_use"]
    import tensorflow as tf

    return tf.config.experimental.get_memory_info("GPU:0")["peak"]


def forget_peak_memory():
    """Starts `peak_memory` anew where the system allows it, so that compilation does not count."""
    backend = keras.config.backend()
    if is_on_gpu() and backend == "torch":
        import torch

        torch.cuda.reset_peak_memory_stats()
    elif is_on_gpu() and backend == "tensorflow":
        import tensorflow as tf

        tf.config.experimental.reset_memory_stats("GPU:0")
    else:
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            pass


# Printing


def facts(packages=()):
    """The machine and the versions, a dict.

    Args:
        packages: Names of packages, when others ran than this process's backend.
    """
    backend = keras.config.backend()
    packages = ["keras", *(packages or [backend])]
    affinity = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count()))
    found = {
        "backend": backend,
        "device": "gpu" if is_on_gpu() else "cpu",
        "cpu": _cpu_name(),
        "cores": len(affinity(0)),
        "threads": os.environ.get("OMP_NUM_THREADS"),  # None: the engine's default
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in packages},
        },
    }
    if backend == "torch":
        import torch

        found["threads"] = torch.get_num_threads()
        if torch.cuda.is_available():
            found["device"] = torch.cuda.get_device_name()
    return found


def _cpu_name():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def report(title, rows, formats, json_path=None, packages=(), **more):
    """Prints rows as a table, and writes them with `facts` and `more` as JSON.

    Args:
        title: Str, above the table.
        rows: List of dicts of raw values.
        formats: Dict from key to how it is printed, the columns in their order. A value that is
            missing or `None` is left blank.
        json_path: Where to write. `None`: nowhere.
        packages: As in `facts`.
        **more: What else goes into the file.
    """
    machine = facts(packages)
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    threads = f", {machine['threads']} threads" if machine["threads"] else ""
    print(f"\n{title}\n{machine['cpu']}, {machine['cores']} cores{threads}; {versions}")
    print_table(None, rows, formats)
    if json_path is not None:
        content = {"title": title, "facts": machine, **more, "rows": rows}
        json_path.write_text(json.dumps(content, indent=1) + "\n")


def print_table(title, rows, formats):
    """Prints rows below a title; see `report`."""
    if title:
        print(f"\n{title}")
    cells = [list(formats)]
    for row in rows:
        values = ((row.get(key), how) for key, how in formats.items())
        cells.append(["" if value is None else format(value, how) for value, how in values])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        texts = (
            text.ljust(width) if how in ("", "s") else text.rjust(width)
            for text, width, how in zip(line, widths, formats.values(), strict=True)
        )
        print("  ".join(texts).rstrip())
