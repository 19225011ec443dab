"""One whole training step of ours beside the same step built from installed packages.

    pip install -e ".[torch,jax,tensorflow,benchmarks]"
    python benchmarks/peers.py --threads 2 --json peers.json

All contestants get the same ready crops and masks, so augmentation is not compared: masked global
and plain local crops through a student, whole global crops through a teacher, class token heads on
all crops, patch heads on the masked patches only, DINO, iBOT and KoLeo losses, AdamW without
clipping, the teacher's moving average. Sizes, prototypes, registers and dtype are the same.

Each contestant lives in a process of its own, kept alive, and is asked in turn for a few steps at
a time, so that a machine that changes its speed slows all of them. The table has the first step
(compilation in it), median and quartiles of single steps, the median over rounds of the ratio to
the best peer of the same round, and `utilisation`: the counted operations per second as a share of
`rate`, that of a large matrix product, of which each contestant makes one per round, in the
contestant that is fastest at it.

Peers:

- `lightly`: `timm`'s `VisionTransformer` in lightly's `MaskedVisionTransformerTIMM`, lightly's
  `DINOProjectionHead`, `DINOLoss`, `IBOTPatchLoss`, `KoLeoLoss` and `update_momentum`; torch's
  AdamW in the fastest of its implementations, which is tried out. `lightly-compiled` has
  `torch.compile` around both encoders and the heads. The encoder has learned positions instead of
  rotary ones, which is less work. lightly has no Sinkhorn for these losses: its targets are the
  softmax after centering, which is less work too.
- `hub`: the layers of `keras_hub.models.DINOV3Backbone` called one after the other, since the
  backbone itself takes neither masks nor a second image size, with heads of Keras layers, lightly's
  losses written in `keras.ops`, and `keras.optimizers.AdamW`, in one compiled function (torch:
  eager, because compiling the whole takes minutes and then again at each step).
  `hub-tensorflow-xla` and `ours-tensorflow-xla` compile with XLA, which is what Keras does when it
  is not told otherwise. `hub-tensorflow` does not, and `ours-tensorflow` compiles pieces of the
  step with it, which is our default.
"""

import dataclasses
import multiprocessing
import os
import statistics
import sys
import time
import traceback

import keras
import measure
import numpy as np
from keras import ops

MOMENTUM = 0.994


def ours(setting, batch, jit_compile="auto"):
    setting = dataclasses.replace(setting, jit_compile=jit_compile)
    masked = int(setting.masked_counts().sum())
    model = setting.model(augmentation=None, max_masked_patches=masked)
    step = measure.bare_step(model, batch)
    return lambda: float(step()["loss"])


# lightly and timm


def import_torchvision():
    """lightly and timm import torchvision, of which nothing compiled is used here.

    PyPI's build of it belongs to the CUDA build of torch. On the CPU build it cannot be imported,
    because two operators that it adds to were not loaded; declaring them is enough.
    """
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    try:
        import torchvision
    except RuntimeError:
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        import torchvision
    torchvision.declared_operators = library  # as long as it lives, so do they


def lightly(setting, batch, compile=False):
    import torch

    import_torchvision()
    from lightly.loss import DINOLoss, IBOTPatchLoss, KoLeoLoss
    from lightly.models.utils import update_momentum

    torch.manual_seed(0)
    student, teacher = lightly_side(setting), lightly_side(setting)
    teacher.load_state_dict(student.state_dict())
    teacher.requires_grad_(False)
    encode_student, encode_teacher = student["encoder"].encode, teacher["encoder"].encode
    if compile:
        encode_student = torch.compile(encode_student, dynamic=False)
        encode_teacher = torch.compile(encode_teacher, dynamic=False)
        for side in (student, teacher):
            for name in ("dino_head", "ibot_head"):
                side[name].compile(dynamic=False)
    losses = [DINOLoss(setting.prototypes), IBOTPatchLoss(setting.prototypes), KoLeoLoss()]
    dino_loss, ibot_loss, koleo_loss = losses

    def channels_first(crops):  # (B, crops, S, S, 3) to (crops * B, 3, S, S), view by view
        crops = torch.as_tensor(crops).permute(1, 0, 4, 2, 3)
        return crops.reshape(-1, *crops.shape[2:]).contiguous()

    global_crops, local_crops = map(channels_first, (batch["global_crops"], batch["local_crops"]))
    masks = torch.as_tensor(batch["masks"]).transpose(0, 1)  # (G, B, N)
    masks = masks.reshape(-1, setting.grid, setting.grid)
    token_masks = torch.nn.functional.pad(masks.flatten(1), (1 + measure.NUM_REGISTERS, 0))
    masked = masks.flatten().nonzero().squeeze(1)
    num_prefix = 1 + measure.NUM_REGISTERS

    def patches(tokens):
        return tokens[:, num_prefix:].flatten(0, 1).index_select(0, masked)

    def views(logits):
        return list(logits.split(setting.batch_size))

    def loss():
        with torch.no_grad():
            tokens = encode_teacher(global_crops)
            teacher_classes = views(teacher["dino_head"](tokens[:, 0]))
            teacher_patches = teacher["ibot_head"](patches(tokens))
        tokens = encode_student(global_crops, mask=token_masks)
        classes = tokens[:, 0]
        local_classes = encode_student(local_crops)[:, 0]
        logits = student["dino_head"](torch.cat([classes, local_classes]))
        total = dino_loss(teacher_classes, views(logits))
        total = total + ibot_loss(teacher_patches, student["ibot_head"](patches(tokens)), masks)
        for crops in views(classes):
            total = total + 0.1 * koleo_loss(crops)
        return total

    def step_with(optimizer):
        optimizer.zero_grad(set_to_none=True)
        value = loss()
        value.backward()
        optimizer.step()
        update_momentum(student, teacher, MOMENTUM)
        return value.item()

    parameters = [p for p in student.parameters() if p.requires_grad]
    optimizer = fastest_adamw(parameters)
    return lambda: step_with(optimizer)


def lightly_side(setting):
    """Encoder and heads of student or teacher."""
    import torch
    from lightly.models.modules import DINOProjectionHead, MaskedVisionTransformerTIMM
    from timm.models.vision_transformer import VisionTransformer

    num_layers, width, num_heads = setting.shape
    vit = VisionTransformer(
        img_size=setting.global_crop_size,
        patch_size=setting.patch_size,
        embed_dim=width,
        depth=num_layers,
        num_heads=num_heads,
        num_classes=0,
        reg_tokens=measure.NUM_REGISTERS,
        no_embed_class=True,
        init_values=1.0,  # of the layer scale
        dynamic_img_size=True,
    )
    sizes = {"hidden_dim": measure.HEAD["head_hidden_dim"]}
    sizes["bottleneck_dim"] = measure.HEAD["head_bottleneck_dim"]
    heads = {
        name: DINOProjectionHead(width, output_dim=setting.prototypes, **sizes)
        for name in ("dino_head", "ibot_head")
    }
    encoder = MaskedVisionTransformerTIMM(vit, pos_embed_initialization="learn")
    return torch.nn.ModuleDict({"encoder": encoder, **heads})


def fastest_adamw(parameters):
    """torch's AdamW in the implementation that updates these parameters fastest."""
    import torch

    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    options = [{"fused": True}, {"foreach": True}, {"foreach": False}]
    times = {}
    for index, option in enumerate(options):
        trial = torch.optim.AdamW(parameters, lr=0.0, weight_decay=0.0, **option)
        measure.seconds(trial.step)  # makes its state
        times[index] = min(measure.seconds(trial.step, 3))
    option = options[min(times, key=times.get)]
    return torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.04, **option)


# Keras Hub


def hub(setting, batch, jit_compile=True):
    keras.utils.set_random_seed(0)
    student, teacher = HubSide(setting), HubSide(setting)
    for source, target in zip(student.weights, teacher.weights, strict=True):
        target.assign(source)
        target.trainable = False
    trainable = student.weights
    optimizer = keras.optimizers.AdamW(1e-4, weight_decay=0.04)
    optimizer.build(trainable)
    centers = [keras.Variable(ops.zeros((setting.prototypes,)), trainable=False) for _ in range(2)]

    def by_view(crops):  # (B, crops, ...) to (crops * B, ...)
        crops = np.moveaxis(crops, 0, 1)
        return crops.reshape(-1, *crops.shape[2:])

    masks = by_view(batch["masks"])
    masked = np.flatnonzero(masks).astype("int32")
    weights = (1 / np.maximum(masks.sum(1), 1) / len(masks)).astype("float32")
    weights = weights[masked // masks.shape[1]]
    inputs = [by_view(batch["global_crops"]), by_view(batch["local_crops"]), masks, masked, weights]

    def loss(global_crops, local_crops, masks, masked, weights):
        tokens = teacher.encode(global_crops)
        teacher_classes = teacher.dino_head(tokens[:, 0])
        teacher_patches = teacher.ibot_head(hub_patches(tokens, masked))
        tokens = student.encode(global_crops, masks)
        classes = tokens[:, 0]
        both = ops.concatenate([classes, student.encode(local_crops)[:, 0]])
        logits = student.dino_head(both)
        total = hub_dino_loss(hub_targets(teacher_classes, centers[0]), logits, setting.batch_size)
        targets = hub_targets(teacher_patches, centers[1])
        log_probs = ops.log_softmax(student.ibot_head(hub_patches(tokens, masked)) / 0.1)
        total = total - ops.sum(ops.sum(targets * log_probs, axis=-1) * weights)
        for crops in ops.split(classes, setting.num_global_crops):
            total = total + 0.1 * hub_koleo_loss(crops)
        return total

    others = teacher.weights + centers
    gradients_of = measure.loss_and_gradients(loss, trainable, others)

    def step(*inputs):
        value, gradients = gradients_of(*inputs)
        with measure.no_grad():
            optimizer.apply(gradients, trainable)
            for source, target in zip(trainable, teacher.weights, strict=True):
                target.assign(MOMENTUM * target + (1 - MOMENTUM) * source)
        return value

    state = trainable + others + optimizer.variables
    step = measure.compiled(step, writes=state, jit_compile=jit_compile)
    inputs = measure.tensors(inputs)
    return lambda: float(step(*inputs))


class HubSide:
    """Backbone and heads of student or teacher; the backbone's layers are called directly."""

    def __init__(self, setting):
        import keras_hub

        self.backbone = keras_hub.models.DINOV3Backbone(**setting.backbone_config())
        self.dino_head, self.ibot_head = (hub_head(setting) for _ in range(2))
        modules = self.backbone, self.dino_head, self.ibot_head
        self.weights = [weight for module in modules for weight in module.weights]

    def encode(self, images, masks=None):
        backbone = self.backbone
        x, _ = backbone.encoder(
            backbone.embeddings(images, masks=masks),
            position_embeddings=backbone.rope_embedding(images),
            num_prefix_tokens=1 + measure.NUM_REGISTERS,
        )
        return backbone.layernorm(x)


def hub_head(setting):
    hidden, bottleneck = measure.HEAD["head_hidden_dim"], measure.HEAD["head_bottleneck_dim"]
    return keras.Sequential(
        [
            keras.Input((setting.shape[1],)),
            keras.layers.Dense(hidden, activation="gelu"),
            keras.layers.Dense(hidden, activation="gelu"),
            keras.layers.Dense(bottleneck),
            keras.layers.UnitNormalization(),
            keras.layers.Dense(setting.prototypes, use_bias=False),
        ]
    )


def hub_patches(tokens, masked):
    patches = tokens[:, 1 + measure.NUM_REGISTERS :]
    return ops.take(ops.reshape(patches, (-1, patches.shape[-1])), masked, axis=0)


def hub_targets(logits, center):
    """Softmax after centering; moves the center."""
    logits = ops.stop_gradient(logits)
    targets = ops.softmax((logits - center) / 0.07)
    center.assign(0.9 * center + 0.1 * ops.mean(logits, axis=0))
    return targets


def hub_dino_loss(targets, logits, batch_size):
    targets = ops.reshape(targets, (-1, batch_size, targets.shape[-1]))  # (T, B, K)
    logits = ops.reshape(logits, (-1, batch_size, logits.shape[-1]))  # (S, B, K)
    pairs = -ops.einsum("tbk,sbk->ts", targets, ops.log_softmax(logits / 0.1))
    keep = ops.ones(pairs.shape) - ops.eye(*pairs.shape)
    return ops.sum(pairs * keep) / (ops.sum(keep) * batch_size)


def hub_koleo_loss(features):
    z = ops.normalize(features, axis=-1, order=2, epsilon=1e-8)
    similarity = ops.matmul(z, ops.transpose(z)) - 3.0 * ops.eye(z.shape[0])
    nearest = ops.take(z, ops.argmax(ops.stop_gradient(similarity), axis=1), axis=0)
    distance = ops.sqrt(ops.sum(ops.square(z - nearest + 1e-8), axis=-1))
    return -ops.mean(ops.log(distance + 1e-8))


# Who takes part: name to backend, builder, and what it is built with

CONTESTANTS = {
    "lightly": ("torch", lightly, {}),
    "lightly-compiled": ("torch", lightly, {"compile": True}),
    "hub-torch": ("torch", hub, {}),
    "hub-jax": ("jax", hub, {}),
    "hub-tensorflow": ("tensorflow", hub, {"jit_compile": False}),
    "hub-tensorflow-xla": ("tensorflow", hub, {"jit_compile": True}),
    "ours-torch": ("torch", ours, {}),
    "ours-jax": ("jax", ours, {}),
    "ours-tensorflow": ("tensorflow", ours, {}),
    "ours-tensorflow-xla": ("tensorflow", ours, {"jit_compile": "true"}),
}


def work(connection, name, setting, batch):
    """A contestant's process: makes its step, then runs as many as it is asked for."""
    try:
        _, builder, options = CONTESTANTS[name]
        matmul, matmul_flops = measure.matmul(setting.dtype)
        start = time.perf_counter()
        step = builder(setting, batch, **options)
        loss = step()
        connection.send({"first": time.perf_counter() - start, "loss": loss})
        while count := connection.recv():
            (product,) = measure.seconds(matmul)
            connection.send((measure.seconds(step, count), matmul_flops / product))
        connection.send(measure.peak_memory())
    except Exception:
        connection.send(traceback.format_exc())


class Contestant:
    def __init__(self, name, setting, batch):
        # Read when the process imports Keras and its engine.
        os.environ["KERAS_BACKEND"] = CONTESTANTS[name][0]
        context = multiprocessing.get_context("spawn")
        self.name, self.rounds = name, []
        self.connection, there = context.Pipe()
        self.process = context.Process(target=work, args=(there, name, setting, batch))
        self.process.start()
        self.made = self.receive()

    def receive(self):
        answer = self.connection.recv()
        if isinstance(answer, str):
            self.process.join()
            raise RuntimeError(f"{self.name} failed.\n{answer}")
        return answer

    def run(self, count):
        self.connection.send(count)
        return self.receive()

    def end(self):
        self.peak_memory = self.run(0)
        self.process.join()


def main():
    parser = measure.Setting.parser(__doc__)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--contestants", nargs="+", default=list(CONTESTANTS), choices=CONTESTANTS)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3, help="of a contestant in each round")
    arguments = parser.parse_args()
    setting = measure.Setting.of(arguments)
    # Processes inherit both: JAX goes by the cores, torch and TensorFlow by the variables.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.threads])
    for name in ("OMP_NUM_THREADS", "TF_NUM_INTRAOP_THREADS"):
        os.environ[name] = str(arguments.threads)

    contestants, batch = [], setting.batch()
    for name in arguments.contestants:
        try:
            contestants.append(Contestant(name, setting, batch))
            print(f"{name}: first step after {contestants[-1].made['first']:.1f} s", flush=True)
        except RuntimeError as error:
            print(error, flush=True)
    for _ in range(1 + arguments.rounds):
        for contestant in contestants:
            contestant.rounds.append(contestant.run(arguments.steps))
    for contestant in contestants:
        contestant.end()
        del contestant.rounds[0]  # warm-up

    flops = sum(setting.flops().values())
    rates = {c.name: statistics.median(rate for _, rate in c.rounds) for c in contestants}
    limit = max(rates.values())
    medians = {c.name: [statistics.median(times) for times, _ in c.rounds] for c in contestants}
    peers = [name for name in medians if not name.startswith("ours")]
    best = min(peers, key=lambda name: statistics.median(medians[name]), default=None)
    rows = []
    for contestant in contestants:
        row = {"contestant": contestant.name, **contestant.made}
        row.update(measure.spread([t for times, _ in contestant.rounds for t in times]))
        row["rate"] = rates[contestant.name]
        if best:
            pairs = zip(medians[contestant.name], medians[best], strict=True)
            ratios = measure.spread([mine / its for mine, its in pairs])
            row.update({"ratio": ratios["median"], "ratios": ratios})
        row["utilisation"] = flops / row["median"] / limit
        row["memory"] = contestant.peak_memory
        row["rounds"] = contestant.rounds
        rows.append(row)
    title = (
        f"{flops / 1e9:.0f} GFLOP a step; matrix product {limit / 1e9:.0f} GFLOP/s; "
        f"best peer: {best}. Times in seconds."
    )
    formats = {
        "contestant": "",
        "first": ".1f",
        "median": ".3f",
        "low": ".3f",
        "high": ".3f",
        "ratio": ".2f",
        "utilisation": ".0%",
        "rate": ".3g",
        "memory": ".3g",
        "loss": ".3f",
    }
    packages = {CONTESTANTS[contestant.name][0] for contestant in contestants} | {"keras-hub"}
    if any(contestant.name.startswith("lightly") for contestant in contestants):
        packages |= {"lightly", "timm"}
    more = {"setting": vars(setting), "best_peer": best}
    measure.report(title, rows, formats, arguments.json, sorted(packages), **more)


if __name__ == "__main__":
    main()
