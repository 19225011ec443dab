"""What an update costs: `kd.AdamW` with all its rules against `keras.optimizers.AdamW`, in one run.

    KERAS_BACKEND=torch python benchmarks/optimizer.py

Both update copies of the same weights (a ViT-Ti/16 student with two heads, 8 million
numbers) with the same gradients, alternating. Prints the median of single updates of each, after
warm-up and compilation, and the median of the ratio of neighbours. Three pairs: the plain rule
against Keras's; rates by layer and scheduled decay as well; clipping by part against Keras's
clipping by global norm.
"""

import statistics
import time

import keras
import keras_hub
import numpy as np

import keras_dinov3 as kd
from keras_dinov3 import backend

STEPS, WARM_UP = 30, 3


def student_variables():
    backbone = keras_hub.models.DINOV3Backbone(
        patch_size=16,
        num_layers=12,
        hidden_dim=192,
        num_heads=3,
        intermediate_dim=768,
        image_shape=(96, 96, 3),
    )
    model = kd.DINOv3(backbone, num_prototypes=1024, head_hidden_dim=512, seed=0)
    return model.trainable_variables


def update_of(optimizer, gradients):
    """A function that makes one update and waits for it."""
    variables = student_variables()
    optimizer.build(variables)
    if keras.config.backend() == "jax":
        import jax

        def step(state, gradients):  # as in training, each buffer becomes its own successor
            weights, moments = optimizer.stateless_apply(state[1], gradients, state[0])
            return weights, moments

        step = jax.jit(step, donate_argnums=0)
        state = [v.value for v in variables], [v.value for v in optimizer.variables]

        def update():
            nonlocal state
            state = jax.block_until_ready(step(state, gradients))

        return update
    if keras.config.backend() == "tensorflow":
        import tensorflow as tf

        @tf.function(jit_compile=False)
        def apply():
            with backend.compiled_pieces(True):  # as in a step of `DINOv3`
                optimizer.apply(gradients, variables)

        def update():
            apply()
            float(optimizer.iterations)

        return update

    import torch

    def update():
        with torch.no_grad():
            optimizer.apply(gradients, variables)
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return update


def measure(name, ours, keras_own):
    rng = np.random.default_rng(0)
    gradients = [
        keras.ops.convert_to_tensor(1e-3 * rng.standard_normal(v.shape, "float32"))
        for v in student_variables()
    ]
    updates = {"keras": update_of(keras_own, gradients), "ours": update_of(ours, gradients)}
    times = {side: [] for side in updates}
    for step in range(WARM_UP + STEPS):
        # Each goes first every other time: the second finds other things in the cache.
        for side in list(updates)[:: 1 if step % 2 else -1]:
            start = time.perf_counter()
            updates[side]()
            if step >= WARM_UP:
                times[side].append(time.perf_counter() - start)
    medians = {side: 1e3 * statistics.median(values) for side, values in times.items()}
    ratio = statistics.median(a / b for a, b in zip(times["ours"], times["keras"], strict=True))
    print(
        f"{keras.config.backend()}, {name}: keras.optimizers.AdamW {medians['keras']:.1f} ms, "
        f"kd.AdamW {medians['ours']:.1f} ms: {ratio:.2f} times"
    )


def main():
    schedule = kd.WarmupCosine(1e-3, total_steps=1000, warmup_steps=10)
    rules = {
        "weight_decay": kd.WarmupCosine(0.04, total_steps=1000, end=0.4),
        "layerwise_decay": 0.9,
        "patch_embed_multiplier": 0.2,
        "freeze_last_layer_steps": 10,
    }
    own = keras.optimizers.AdamW
    measure("plain", kd.AdamW(schedule, 0.04), own(schedule, 0.04))
    measure("all rules", kd.AdamW(schedule, **rules), own(schedule, 0.04))
    measure(
        "all rules and clipping",
        kd.AdamW(schedule, part_clipnorm=3.0, log=True, **rules),
        own(schedule, 0.04, global_clipnorm=3.0),
    )


if __name__ == "__main__":
    main()
