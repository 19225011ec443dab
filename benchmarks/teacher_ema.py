"""What moving the teacher costs: step time with and without `TeacherEMA`, in one run.

    KERAS_BACKEND=torch python benchmarks/teacher_ema.py

Prints the median of single steps of each, alternating, after warm-up and compilation, and that of
the ratio of neighbouring steps.
"""

import statistics
import time

import keras
import keras_hub
import numpy as np

import keras_dinov3 as kd

STEPS, WARM_UP, BATCH_SIZE = 30, 3, 16


def build(teacher_ema):
    keras.utils.set_random_seed(0)
    backbone = keras_hub.models.DINOV3Backbone(
        patch_size=16,
        num_layers=4,
        hidden_dim=192,
        num_heads=3,
        intermediate_dim=768,
        image_shape=(96, 96, 3),
    )
    model = kd.DINOv3(
        backbone,
        num_prototypes=1024,
        head_hidden_dim=512,
        head_bottleneck_dim=128,
        augmentation=kd.MultiCrop(96, 48, num_local_crops=2, seed=0),
        teacher_ema=teacher_ema,
        seed=0,
    )
    # Without XLA on TensorFlow: compiling two models takes longer than all the steps.
    model.compile(keras.optimizers.AdamW(1e-4), jit_compile=keras.config.backend() == "jax")
    return model


def seconds(model, images):
    start = time.perf_counter()
    model.train_on_batch(images, return_dict=True)  # reading the logs waits for the device
    return time.perf_counter() - start


def main():
    images = np.random.default_rng(0).integers(0, 256, (BATCH_SIZE, 128, 128, 3)).astype("uint8")
    models = {"without": build(None), "with": build(kd.callbacks.TeacherEMA(0.99))}
    times = {name: [] for name in models}
    for step in range(WARM_UP + STEPS):
        for name, model in models.items():
            elapsed = seconds(model, images)
            if step >= WARM_UP:
                times[name].append(elapsed)
    medians = {name: statistics.median(values) for name, values in times.items()}
    shares = [b / a - 1 for a, b in zip(times["without"], times["with"], strict=True)]
    low, share, high = statistics.quantiles(shares, n=4)
    print(
        f"{keras.config.backend()}: {1e3 * medians['without']:.1f} ms without, "
        f"{1e3 * medians['with']:.1f} ms with: {100 * share:+.1f} % "
        f"(quartiles {100 * low:+.1f} and {100 * high:+.1f}) from step to neighbouring step"
    )


if __name__ == "__main__":
    main()
