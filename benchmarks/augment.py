"""How many images per second `MultiCrop` augments, beside a Pillow pipeline of the same steps.

    KERAS_BACKEND=jax python benchmarks/augment.py --batch_size 16

The recipe is the default one: 2 crops of 224 and 8 of 96 pixels from images of 256. Pillow runs
in this process, on one core; a loader with n workers does up to n times as much. `first` is the
first call, with the compilation in it.
"""

import argparse
import random
import time

import keras
import numpy as np
from keras import ops
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from keras_dinov3.augment import IMAGENET_MEAN, IMAGENET_STD, MultiCrop


def compiled(layer):
    """The layer as a training step runs it: compiled by JAX and by XLA, eager in PyTorch."""
    if keras.config.backend() == "jax":
        import jax

        state = [variable.value for variable in layer.variables]
        return jax.jit(lambda images: layer.stateless_call([], state, images)[0])
    if keras.config.backend() == "tensorflow":
        import tensorflow as tf

        return tf.function(layer, jit_compile=True)
    return layer


def pillow_crop(image, size, scale, blur, solarize):
    width, height = image.size
    for _ in range(10):
        area = width * height * random.uniform(*scale)
        ratio = np.exp(random.uniform(np.log(3 / 4), np.log(4 / 3)))
        box_width, box_height = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
        if 0 < box_width <= width and 0 < box_height <= height:
            break
    else:
        box_width, box_height = width, height
    left, top = random.randint(0, width - box_width), random.randint(0, height - box_height)
    box = (left, top, left + box_width, top + box_height)
    crop = image.crop(box).resize((size, size), Image.Resampling.BICUBIC)
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
    pixels = np.asarray(crop, "float32") / 255.0
    return (pixels - np.float32(IMAGENET_MEAN)) / np.float32(IMAGENET_STD)


def rotate_hue(image):
    hue, saturation, value = image.convert("HSV").split()
    shift = round(random.uniform(-0.1, 0.1) * 255)
    hue = hue.point(lambda x: (x + shift) % 256)
    return Image.merge("HSV", (hue, saturation, value)).convert("RGB")


def pillow_crops(images):
    for pixels in images:
        image = Image.fromarray(pixels)
        views = [(224, (0.32, 1.0), 1.0, 0.0), (224, (0.32, 1.0), 0.1, 0.2)]
        views += [(96, (0.05, 0.32), 0.5, 0.0)] * 8
        for view in views:
            pillow_crop(image, *view)


def seconds(function, repeats):
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return times


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()

    # a few large blobs of colour
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (arguments.batch_size, 8, 8, 3), dtype="uint8")
    images = np.stack([Image.fromarray(x).resize((256, 256)) for x in coarse])
    function, tensor = compiled(MultiCrop(seed=0)), ops.convert_to_tensor(images)

    def multi_crop():
        crops = function(tensor)
        for crop in crops.values():  # one number back: waits for the device
            ops.convert_to_numpy(ops.sum(crop))

    (first,) = seconds(multi_crop, 1)
    ours = arguments.batch_size / min(seconds(multi_crop, arguments.repeats))
    few = images[:4]
    pillow = len(few) / min(seconds(lambda: pillow_crops(few), arguments.repeats))
    print(
        f"{keras.config.backend()}: MultiCrop {ours:.1f} images/s (first call {first:.1f} s), "
        f"Pillow on one core {pillow:.1f} images/s, ratio {ours / pillow:.2f}"
    )


if __name__ == "__main__":
    main()
