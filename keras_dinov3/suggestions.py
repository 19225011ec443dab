"""What `Recipe.suggest` fills in: a value for the size of the problem, and why."""

import math

from keras_dinov3.augment import as_pair
from keras_dinov3.schedules import check_count

PATCH_SIZES = (16, 8, 4, 2)
PATCHES_PER_SIDE = 8  # at least, where the patch size is free
LONG_RUN = 20_000  # updates from which the methods' own temperatures work
IMAGES_PER_PROTOTYPE = 64
USUAL_WIDTH = 768  # of a backbone that has weights


def check_plan(num_images, batch_size, epochs, image_size):
    """The size of the problem as a dict; `image_size` as `[height, width]`.

    Args:
        num_images: Int.
        batch_size: Int.
        epochs: Int.
        image_size: Int or pair of them, in pixels.

    Raises:
        ValueError: If something is no count, or there would be no update.
    """
    check_count("num_images", num_images, at_least=2)
    check_count("batch_size", batch_size, at_least=2)  # KoLeo compares images
    check_count("epochs", epochs, at_least=1)
    image_size = list(as_pair(image_size))
    for side in image_size:
        check_count("image_size", side, at_least=8)
    if batch_size > num_images:
        raise ValueError(
            "There must be at least one whole batch. "
            f"Received: batch_size={batch_size}, num_images={num_images}. A batch of "
            f"{max(num_images // 8, 2)} would do."
        )
    return {
        "num_images": num_images,
        "batch_size": batch_size,
        "epochs": epochs,
        "image_size": image_size,
    }


def suggestions(settings, plan):
    """Values for what the size of the problem decides.

    Args:
        settings: Dict of a recipe's settings by section. Those that it has are kept by `suggest`;
            here they decide what depends on them.
        plan: What `check_plan` returned.

    Returns:
        Dict from `"section.setting"` to pairs of a value, as in a recipe, and a reason.

    Raises:
        ValueError: If the images have no whole number of patches.
    """
    num_images, batch_size = plan["num_images"], plan["batch_size"]
    total_steps = plan["epochs"] * (num_images // batch_size)
    backbone, found = settings.get("backbone", {}), {}
    patch_size, goes_on = backbone.get("patch_size"), "preset" in backbone
    if patch_size is None and not goes_on:
        patch_size, found["backbone.patch_size"] = patch_size_for(plan["image_size"])
    check_patches(plan["image_size"], patch_size or 16)
    return {
        **found,
        **crops_for(plan["image_size"], patch_size or 16),
        "model.num_prototypes": prototypes_for(num_images),
        "model.teacher_temperature": temperature_for(total_steps),
        "teacher.momentum": momentum_for(total_steps),
        "optimizer.learning_rate": rate_for(batch_size),
        "optimizer.freeze_last_layer_steps": (
            total_steps // 100,
            "a hundredth of the run, as one epoch of a hundred",
        ),
        **(gently(total_steps, batch_size, backbone.get("hidden_dim")) if goes_on else {}),
    }


def gently(total_steps, batch_size, width):
    """What a backbone needs that knows something already, under heads that do not."""
    width = width or USUAL_WIDTH
    rate, reason = rate_for(batch_size, 1e-3 * min(128 / width, 1))
    return {
        "teacher.momentum": momentum_for(total_steps, 1.0, least=0.95, most=0.998),
        "optimizer.learning_rate": (rate, f"{reason}; less the wider the backbone, here {width}"),
        "optimizer.head_multiplier": (10.0, "the heads are new, the backbone is not"),
        "optimizer.layerwise_decay": (0.8, "what is near the pixels is needed for any images"),
        "optimizer.freeze_backbone_steps": (
            total_steps // 10,
            f"new heads learn from the backbone as it is for a tenth of {total_steps} updates",
        ),
    }


def check_patches(image_size, patch_size):
    for side in image_size:
        if side % patch_size:
            below = max(side // patch_size, 1) * patch_size
            raise ValueError(
                f"`image_size` must be a multiple of the patch size, {patch_size}. Received: "
                f"image_size={image_size}. Nearest to {side}: {below}, {below + patch_size}."
            )


def patch_size_for(image_size):
    side = min(image_size)
    fitting = [size for size in PATCH_SIZES if all(n % size == 0 for n in image_size)]
    fine = [size for size in fitting if side >= size * PATCHES_PER_SIDE]
    if not fitting:
        raise ValueError(
            "`image_size` must be even, a multiple of a patch size. "
            f"Received: image_size={image_size}."
        )
    size = (fine or fitting[-1:])[0]
    grid = " x ".join(str(n // size) for n in image_size)
    return size, (size, f"{grid} patches; fewer than {PATCHES_PER_SIDE} a side show too little")


def crops_for(image_size, patch_size):
    """Square crops in whole patches."""

    def multiple(pixels, at_least):
        return max(round(pixels / patch_size), at_least) * patch_size

    side = min(image_size)
    large = min(multiple(0.75 * side, 2), multiple(224, 2), side // patch_size * patch_size)
    small = min(multiple(0.43 * large, 2), large)
    sigma = round(0.1 + 1.9 * large / 224, 3)
    return {
        "augmentation.global_crop_size": (
            large,
            f"three quarters of {side} pixels, at most 224, in patches of {patch_size}",
        ),
        "augmentation.local_crop_size": (small, "0.43 of it, as 96 of 224"),
        "augmentation.blur_sigma": ([0.1, sigma], "as wide, for such crops, as 2.0 for 224 pixels"),
    }


def prototypes_for(num_images):
    power = round(math.log2(num_images / IMAGES_PER_PROTOTYPE)) if num_images else 0
    return (
        2 ** min(max(power, 6), 16),
        f"about one for {IMAGES_PER_PROTOTYPE} images, from 64 to 65536",
    )


def temperature_for(total_steps):
    if total_steps < LONG_RUN:
        return (
            0.005,
            f"{total_steps} updates are few: targets must be far sharper than predictions (0.1) "
            "for small differences between images to grow",
        )
    share = round(min(30_000 / total_steps, 0.3), 3)
    schedule = {"peak": 0.07, "start": 0.04, "end": 0.07, "warmup": share}
    return schedule, f"the recipe's; the warm-up is the first {share:.0%} of {total_steps} updates"


def momentum_for(total_steps, speed=1.25, least=0.9, most=0.994):
    start = round(min(max(1 - speed / math.sqrt(total_steps), least), most), 4)
    horizon = 1 / (1 - start)
    return (
        {"peak": start, "end": 1.0},
        f"at first the teacher remembers {horizon:.0f} of {total_steps} updates, at the end all",
    )


def rate_for(batch_size, rate=1e-3):
    """From a rate at 128 images, by the square root."""
    peak = round(rate * math.sqrt(batch_size / 128), 8)
    return (
        {"peak": peak, "warmup": 0.1, "end": round(peak / 100, 8)},
        f"{rate:g} at 128 images, by the square root for {batch_size}; warm-up: a tenth of the run",
    )
