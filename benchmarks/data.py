"""How many images per second arrive: read from files, and cut into crops.

    KERAS_BACKEND=jax python benchmarks/data.py --json data.json

`files`: `image_folder` over JPEGs of 500 x 375 pixels that it makes itself, to canvases of
`--canvas` pixels; from the folder, from a tar file of them and from the caches, beside what Keras
has for it, `image_dataset_from_directory`. Batches are only counted.

`crops`: `MultiCrop` compiled as in a training step, beside the same operations in Pillow (two
threads, two processes), in `tf.image` and in KerasCV's layers (both in `tf.data`, as many parallel
calls as cores), all from uint8 images in memory to normalised float32 crops. `tf.image` and KerasCV
change brightness, contrast, saturation and hue in this order always, ours and Pillow's order is
random; KerasCV resizes bilinearly, which is the best it has. All contestants take turns, one batch
each per round; `ratio` is the median over rounds of their images/s over those of the faster Pillow.

`step`: MultiCrop's share of a whole training step of a ViT-S/16 on images of 160 pixels.

`first` is the first call in seconds: tracing and compilation.
"""

import argparse
import functools
import multiprocessing
import os
import random
import statistics
import tarfile
import tempfile
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import keras
import measure
import numpy as np
from measure import Setting
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

# Image size, global and local crop size, local crops; two global crops.
VIEWS = {"2x128+4x64": (160, 128, 64, 4), "2x224+8x96": (256, 224, 96, 8)}
SCALES = {"global": (0.32, 1.0), "local": (0.05, 0.32)}
RATIOS = (3 / 4, 4 / 3)
MEAN, STD = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
RATES = {"images/s": ".0f", "low": ".0f", "high": ".0f", "ratio": ".2f", "first": ".1f"}
SECONDS = {"what": "", "median": ".3f", "low": ".3f", "high": ".3f", "share": ".1%", "first": ".1f"}


def crops_of(views):
    """Size, kind, probability of blur and of solarization of each crop of an image."""
    _, large, small, count = VIEWS[views]
    return [
        (large, "global", 1.0, 0.0),
        (large, "global", 0.1, 0.2),
        *[(small, "local", 0.5, 0.0)] * count,
    ]


def pictures(count, size, seed=0):
    """uint8 images of a few large blobs of colour and some noise."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), "uint8"))
        fine = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC), "int16")
        yield np.clip(fine + rng.integers(-12, 13, fine.shape), 0, 255).astype("uint8")


# Pillow


def pillow_crop(image, size, scale, blur, solarize):
    width, height = image.size
    for _ in range(10):
        area = width * height * random.uniform(*scale)
        ratio = np.exp(random.uniform(*np.log(RATIOS)))
        box_width, box_height = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
        if 0 < box_width <= width and 0 < box_height <= height:
            break
    else:
        box_width, box_height = width, height
    left, top = random.randint(0, width - box_width), random.randint(0, height - box_height)
    box = (left, top, left + box_width, top + box_height)
    crop = image.resize((size, size), Image.Resampling.BICUBIC, box)
    if random.random() < 0.5:
        crop = ImageOps.mirror(crop)
    if random.random() < 0.8:
        steps = [
            lambda x: ImageEnhance.Brightness(x).enhance(random.uniform(0.6, 1.4)),
            lambda x: ImageEnhance.Contrast(x).enhance(random.uniform(0.6, 1.4)),
            lambda x: ImageEnhance.Color(x).enhance(random.uniform(0.8, 1.2)),
            rotate_hue,
        ]
        random.shuffle(steps)
        for step in steps:
            crop = step(crop)
    if random.random() < 0.2:
        crop = crop.convert("L").convert("RGB")
    if random.random() < blur:
        crop = crop.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))
    if random.random() < solarize:
        crop = ImageOps.solarize(crop)
    return (np.asarray(crop, "float32") / 255.0 - MEAN) / STD


def rotate_hue(image):
    hue, saturation, value = image.convert("HSV").split()
    shift = round(random.uniform(-0.1, 0.1) * 255)
    hue = hue.point(lambda x: (x + shift) % 256)
    return Image.merge("HSV", (hue, saturation, value)).convert("RGB")


def pillow_crops(views, images):
    for pixels in images:
        image = Image.fromarray(pixels)
        for size, kind, blur, solarize in crops_of(views):
            pillow_crop(image, size, SCALES[kind], blur, solarize)


# tf.image and KerasCV


def tf_image_crops(views, image):
    """One image as in `pillow_crop`, with the operations of `tf.image`."""
    import tensorflow as tf

    def uniform(low, high):
        return tf.random.uniform((), low, high)

    def often(probability, function, x):
        return tf.cond(uniform(0.0, 1.0) < probability, lambda: function(x), lambda: x)

    def jitter(x):
        x = tf.clip_by_value(x * uniform(0.6, 1.4), 0.0, 1.0)
        x = tf.clip_by_value(tf.image.adjust_contrast(x, uniform(0.6, 1.4)), 0.0, 1.0)
        x = tf.image.adjust_saturation(x, uniform(0.8, 1.2))
        return tf.image.adjust_hue(x, uniform(-0.1, 0.1))

    def blur(x):
        kernel = tf.exp(-0.5 * tf.square(tf.range(-4.0, 5.0) / uniform(0.1, 2.0)))
        kernel = tf.tile(tf.reshape(kernel / tf.reduce_sum(kernel), (9, 1, 1, 1)), (1, 1, 3, 1))
        x = tf.pad(x[None], ((0, 0), (4, 4), (4, 4), (0, 0)), "REFLECT")
        x = tf.nn.depthwise_conv2d(x, kernel, (1, 1, 1, 1), "VALID")
        return tf.nn.depthwise_conv2d(x, tf.transpose(kernel, (1, 0, 2, 3)), (1, 1, 1, 1), "VALID")[
            0
        ]

    crops = []
    for size, kind, blurred, solarized in crops_of(views):
        start, extent, _ = tf.image.sample_distorted_bounding_box(
            tf.shape(image),
            tf.zeros((1, 0, 4)),
            area_range=SCALES[kind],
            aspect_ratio_range=RATIOS,
            max_attempts=10,
            use_image_if_no_bounding_boxes=True,
        )
        x = tf.cast(tf.slice(image, start, extent), "float32") / 255.0
        x = tf.image.resize(x, (size, size), "bicubic", antialias=True)
        x = tf.image.random_flip_left_right(tf.clip_by_value(x, 0.0, 1.0))
        x = often(0.8, jitter, x)
        x = often(0.2, lambda x: tf.repeat(tf.image.rgb_to_grayscale(x), 3, -1), x)
        x = often(blurred, blur, x) if blurred < 1 else blur(x)
        x = often(solarized, lambda x: tf.where(x >= 0.5, 1.0 - x, x), x) if solarized else x
        crops.append((tf.ensure_shape(x, (size, size, 3)) - MEAN) / STD)
    return crops


def keras_cv_crops(views):
    """A function of a batch of images, made of KerasCV's layers."""
    import keras_cv
    import tensorflow as tf

    layers = keras_cv.layers

    def pipeline(size, kind, blurred, solarized):
        steps = [
            layers.RandomCropAndResize((size, size), SCALES[kind], RATIOS),
            layers.RandomFlip(),
            layers.RandomApply(
                layers.RandomColorJitter((0, 255), (-0.4, 0.4), 0.4, 0.2, 0.1), rate=0.8
            ),
            layers.RandomApply(layers.Grayscale(3), rate=0.2),
            layers.RandomApply(layers.RandomGaussianBlur(9, (0.1, 2.0)), rate=blurred),
        ]
        if solarized:
            threshold = keras_cv.core.ConstantFactorSampler(128)
            steps.append(
                layers.RandomApply(
                    layers.Solarization((0, 255), threshold_factor=threshold), rate=solarized
                )
            )
        return steps

    pipelines = [pipeline(*crop) for crop in crops_of(views)]

    def crops(images):
        made = []
        for steps in pipelines:
            x = tf.cast(images, "float32")
            for step in steps:
                x = step(x, training=True)
            made.append((x / 255.0 - MEAN) / STD)
        return made

    return crops


# Contestants


def contestants(views, images, pools):
    """Functions that make all crops of a batch, by name."""
    import tensorflow as tf

    _, large, small, count = VIEWS[views]
    layer = Setting(global_crop_size=large, local_crop_size=small, num_local_crops=count)
    layer = layer.multi_crop()
    run = measure.compiled(layer, writes=[layer.seed_generator.state])
    tensor = measure.tensors(images)

    def in_pool(pool):
        parts = np.array_split(images, CORES)
        return lambda: list(pool.map(functools.partial(pillow_crops, views), parts))

    def all_of(dataset):  # finite: nothing is made ahead of its turn
        return lambda: list(dataset)

    dataset = tf.data.Dataset.from_tensor_slices(images)
    each = dataset.map(functools.partial(tf_image_crops, views), CORES).batch(len(images))
    few = dataset.batch(-(-len(images) // CORES))
    return {
        f"MultiCrop, {keras.config.backend()}": lambda: run(tensor),
        **{f"Pillow, {CORES} {kind}": in_pool(pool) for kind, pool in pools.items()},
        "tf.image": all_of(each),
        "KerasCV": all_of(few.map(keras_cv_crops(views), CORES)),
    }


def compare_crops(views, batch_size, repeats, pools):
    side = VIEWS[views][0]
    images = np.stack(list(pictures(batch_size, (side, side))))
    functions = contestants(views, images, pools)
    first = {name: measure.seconds(function)[0] for name, function in functions.items()}
    for function in functions.values():
        measure.seconds(function, 2)
    rounds = [
        {name: batch_size / measure.seconds(function)[0] for name, function in functions.items()}
        for _ in range(repeats)
    ]
    rows = []
    for name in functions:
        spread = measure.spread([rates[name] for rates in rounds])
        best = [max(rate for n, rate in rates.items() if "Pillow" in n) for rates in rounds]
        ratios = [rates[name] / pillow for rates, pillow in zip(rounds, best, strict=True)]
        spread["images/s"] = spread.pop("median")
        rows.append({"what": name, **spread, "ratio": statistics.median(ratios)})
        rows[-1]["first"] = first[name]
    return rows


# Files


def write_images(folder, count):
    for index, pixels in enumerate(pictures(count, (500, 375))):
        os.makedirs(f"{folder}/{index % 4}", exist_ok=True)
        Image.fromarray(pixels).save(f"{folder}/{index % 4}/{index:05}.jpg", quality=90)
    with tarfile.open(f"{folder}.tar", "w") as tar:
        tar.add(folder, ".")


def compare_files(count, batch_size, canvas, repeats):
    from keras_dinov3.data import image_folder

    with tempfile.TemporaryDirectory() as place:
        folder = os.path.join(place, "images")
        write_images(folder, count)
        settings = {"image_size": canvas, "batch_size": batch_size, "check": False, "verbose": 0}
        sources = {
            "folder": lambda: image_folder(folder, **settings),
            "tar file": lambda: image_folder(f"{folder}.tar", **settings),
            "cached": lambda: image_folder(folder, **settings, cache=True),
            "cached in a file": lambda: image_folder(folder, **settings, cache=f"{place}/c.npy"),
            "image_dataset_from_directory": lambda: keras.utils.image_dataset_from_directory(
                folder,
                labels=None,
                batch_size=batch_size,
                image_size=(canvas, canvas),
                crop_to_aspect_ratio=True,
                interpolation="bicubic",
                verbose=False,
            ),
        }
        first, data = {}, {}
        for name, make in sources.items():
            first[name] = measure.seconds(lambda: data.update({name: make()}))[0]  # noqa: B023
        times = {name: [] for name in data}
        for _ in range(repeats + 1):
            for name, batches in data.items():
                times[name] += measure.seconds(lambda: [len(batch) for batch in batches])  # noqa: B023
        seen = count // batch_size * batch_size
        rows = []
        for name, seconds in times.items():
            spread = measure.spread([seen / second for second in seconds[1:]])
            spread["images/s"] = spread.pop("median")
            rows.append({"what": name, **spread, "first": first[name]})
        return rows


# Step


def share_of_step(steps):
    setting = Setting()
    images = np.stack(list(pictures(setting.batch_size, (160, 160))))
    model = setting.model(augmentation=setting.multi_crop())
    step, layer = measure.bare_step(model, images), setting.multi_crop()
    crops = measure.compiled(layer, writes=[layer.seed_generator.state])
    crops = functools.partial(crops, measure.tensors(images))
    first = [measure.seconds(function)[0] for function in (step, crops)]
    measure.seconds(step)
    times = [(measure.seconds(step)[0], measure.seconds(crops)[0]) for _ in range(steps)]
    rows = []
    for index, name in enumerate(("step", "MultiCrop")):
        seconds = [pair[index] for pair in times]
        rows.append({"what": name, **measure.spread(seconds), "first": first[index]})
    rows[1]["share"] = statistics.median(crop / whole for whole, crop in times)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=9, help="rounds")
    parser.add_argument("--images", type=int, default=512, help="files; 0: leave files out")
    parser.add_argument("--canvas", type=int, default=256, help="pixels that files are scaled to")
    parser.add_argument("--steps", type=int, default=7, help="0: leave the training step out")
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    arguments = parser.parse_args()
    random.seed(0)
    tables = {}

    with (
        ProcessPoolExecutor(CORES, multiprocessing.get_context("fork")) as processes,
        ThreadPoolExecutor(CORES) as threads,
    ):
        pools = {"threads": threads, "processes": processes}
        list(processes.map(abs, range(4 * CORES)))  # started before the engine has threads
        for views in VIEWS:
            rows = compare_crops(views, arguments.batch_size, arguments.repeats, pools)
            tables[f"crops {views}, from {VIEWS[views][0]} pixels"] = rows
    if arguments.images:
        settings = (arguments.batch_size, arguments.canvas, arguments.repeats)
        rows = compare_files(arguments.images, *settings)
        tables[f"files, to {arguments.canvas} pixels"] = rows
    step = share_of_step(arguments.steps) if arguments.steps else []

    measure.report(
        "Images per second",
        [{"part": part, **row} for part, rows in tables.items() for row in rows],
        {"part": "", "what": "", **RATES},
        arguments.json,
        arguments={name: str(value) for name, value in vars(arguments).items()},
        step=step,
    )
    if step:
        measure.print_table("ViT-S/16, 2x128+4x64 crops, batch 4, seconds", step, SECONDS)


if __name__ == "__main__":
    main()
