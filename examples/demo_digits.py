"""Pretrains a small DINOv3 on handwritten digits and says whether it learned; no download.

    make demo                 # or: KERAS_BACKEND=jax python examples/demo_digits.py

Each of scikit-learn's digits is pasted at a random place and in a random size on a larger, black
canvas, so that comparing pixels is a poor way to tell them apart: four canvases per digit to train
on without labels, and one of them with its label for k-NN.
`--output` gets log.csv, curves.png, patch_pca.png, crops.png and backbone/, a Keras Hub preset.
"""

import argparse
import pathlib
import time

import keras
import keras_hub
import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

import keras_dinov3 as kd
from keras_dinov3.evaluation import FeatureExtractor, knn_accuracy

CANVAS, SMALLEST, LARGEST = 32, 10, 12  # pixels
COPIES = 4  # canvases per digit
NUM_TRAIN, NUM_VALIDATION = 1000, 350  # digits; the other 447 are the test set
BATCH_SIZE = 64
K = 20
FEATURE = "mean_patch"  # so short a run teaches the patches more than the class token


def paste(digits, seed):
    """Digits `(n, 8, 8)` from 0 to 16, each on a canvas of its own: uint8 `(n, 32, 32, 1)`."""
    rng = np.random.default_rng(seed)
    canvases = np.zeros((len(digits), CANVAS, CANVAS, 1), "uint8")
    for canvas, digit in zip(canvases, digits, strict=True):
        size = rng.integers(SMALLEST, LARGEST + 1)
        top, left = rng.integers(0, CANVAS - size + 1, 2)
        image = Image.fromarray((digit * (255 / 16)).astype("uint8"))
        image = image.resize((size, size), Image.Resampling.BICUBIC)
        canvas[top : top + size, left : left + size, 0] = np.asarray(image)
    return canvases


def load_data(num_train, validate):
    """Training images, a quarter of them with labels, and test images with labels.

    `validate` takes other test images, to choose settings by.
    """
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.images))
    train = order[:NUM_TRAIN][:num_train]
    held_out = slice(NUM_TRAIN, NUM_TRAIN + NUM_VALIDATION)
    test = order[held_out] if validate else order[NUM_TRAIN + NUM_VALIDATION :]
    images = paste(np.repeat(digits.images[train], COPIES, axis=0), seed=1)
    labelled = images[::COPIES], digits.target[train]
    test = np.repeat(test, COPIES)
    return images, labelled, (paste(digits.images[test], seed=2), digits.target[test])


def build_model(num_steps, seed):
    keras.utils.set_random_seed(seed)
    backbone = keras_hub.models.DINOV3Backbone(
        patch_size=4,
        num_layers=2,
        hidden_dim=128,
        num_heads=16,
        intermediate_dim=512,
        num_register_tokens=1,
        rope_theta=4.0,  # periods 1 and 2 of coordinates from -1 to 1: short, as the grid is small
        image_shape=(CANVAS, CANVAS, 1),
    )
    augmentation = kd.MultiCrop(
        global_crop_size=20,
        local_crop_size=12,
        num_local_crops=2,
        global_crop_scale=(0.5, 1.0),
        local_crop_scale=(0.3, 0.7),
        flip_probability=0.0,  # a mirrored digit is another sign
        color_jitter_probability=0.0,  # nor does the black ground change its brightness
        global_blur_probability=0.0,
        local_blur_probability=0.0,
        global_solarize_probability=0.0,
        grayscale_probability=0.0,
        seed=seed,
    )
    model = kd.DINOv3(
        backbone,
        num_prototypes=64,
        ibot_weight=0.1,
        # It spreads the images apart, which does most of the work in so short a run: the DINO
        # terms hardly leave log(64) = 4.16.
        koleo_weight=0.3,
        head_hidden_dim=256,
        head_bottleneck_dim=64,
        # The crops of an image share its digit and, nearly, the digit's place. Shifted
        # coordinates hide the place, so the digit is what is left to learn.
        extras=kd.EncoderExtras(rope_shift=1.0),
        # A new backbone gives all images nearly the same logits. Small differences grow where
        # targets are much sharper than predictions.
        student_temperature=0.1,
        teacher_temperature=0.01,
        augmentation=augmentation,
        # The teacher must follow fast to learn anything in a few hundred steps.
        teacher_ema=kd.callbacks.TeacherEMA(kd.WarmupCosine(0.9, num_steps, end=1.0)),
        seed=seed,
    )
    model.compile(
        kd.AdamW(
            kd.WarmupCosine(2e-3, num_steps, warmup_steps=num_steps // 20, end=2e-5),
            weight_decay=0.04,
            part_clipnorm=3.0,
        ),
        jit_compile=keras.config.backend() == "jax",
    )
    return model


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--digits", type=int, default=NUM_TRAIN, help="to train on; at most 1000")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("demo_output"))
    parser.add_argument("--validate", action="store_true", help="score on held-out training data")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    start = time.time()

    images, train, test = load_data(args.digits, args.validate)
    model = build_model(args.epochs * (len(images) // BATCH_SIZE), args.seed)
    extractor = FeatureExtractor(model.teacher, feature=FEATURE)

    def knn():
        return knn_accuracy(*extractor.extract(train, 256), *extractor.extract(test, 256), k=K)

    pixels = [side[0].reshape(len(side[0]), -1) / 255.0 for side in (train, test)]
    scores = {"raw pixels": knn_accuracy(pixels[0], train[1], pixels[1], test[1], k=K)}
    scores["untrained backbone"] = knn()
    backend = keras.config.backend()
    print(f"Pretraining on {len(images)} unlabelled canvases with {backend} ...", flush=True)
    watch = kd.callbacks.KNN(train, test, every=2, k=K, feature=FEATURE, batch_size=256)
    model.fit(
        images,
        batch_size=BATCH_SIZE,
        epochs=args.epochs,
        verbose=2,
        callbacks=[watch, keras.callbacks.CSVLogger(args.output / "log.csv")],
    )
    scores["trained teacher"] = knn()

    print(f"\nk-NN of {len(test[0])} test images among {len(train[0])} (k={K}, chance 10%):")
    for name, score in scores.items():
        print(f"  {name:20} {100 * score:5.1f}%")

    model.export_backbone().save_to_preset(str(args.output / "backbone"))
    loaded = keras_hub.models.DINOV3Backbone.from_preset(str(args.output / "backbone"))
    normalized = model.augmentation.normalize(test[0][:64])
    expected = kd.encode(model.teacher, normalized)
    expected = keras.ops.concatenate(
        [expected.cls[:, None], expected.registers, expected.patches], 1
    )
    tokens = loaded({"pixel_values": normalized})
    difference = float(keras.ops.convert_to_numpy(keras.ops.max(keras.ops.abs(tokens - expected))))
    print(f"\nPreset {args.output / 'backbone'}, loaded by plain Keras Hub: features differ by at")
    print(f"most {difference:.1e}.")
    assert difference < 1e-5, "the exported preset gives other features"

    references = {name: scores[name] for name in ("raw pixels", "untrained backbone")}
    kd.visualize.training_curves(args.output / "log.csv", args.output / "curves.png", references)
    kd.visualize.patch_pca(model.teacher, test[0][:16], path=args.output / "patch_pca.png")
    kd.visualize.crops(model, test[0][:6], path=args.output / "crops.png")
    print(f"Pictures in {args.output}: curves, patch_pca, crops. {time.time() - start:.0f} s.")


if __name__ == "__main__":
    main()
