"""Which alarms fire: runs broken in one way each, and healthy ones, on the demo's digits.

    KERAS_BACKEND=torch python benchmarks/alarms.py --epochs 3 --seeds 0 1 2

A row is a run of `examples/demo_digits.py` with one setting changed. It says which alarms of
`callbacks.CollapseMonitor` fired, at which step and since when, the numbers of the last look, and
k-NN before and after. `--json` keeps every look. In so short a run KoLeo does most of the work, so
k-NN may rise although the targets teach nothing: the alarms are about the targets.
"""

import argparse
import json
import pathlib
import sys
import time
import warnings

import keras

sys.path.append(str(pathlib.Path(__file__).parents[1] / "examples"))

import demo_digits

import keras_dinov3 as kd

RATE = 2e-3
RUNS = {  # settings of the model, and of its optimizer, that differ from the demo's
    "healthy": {},
    "healthy, softmax centering": {"centering": kd.SoftmaxCentering()},
    "no KoLeo": {"koleo_weight": 0.0},
    "teacher temperature 0.12": {"teacher_temperature": 0.12},
    "momentum 0": {"teacher_ema": kd.callbacks.TeacherEMA(0.0)},
    "no centering": {"centering": kd.SoftmaxCentering(momentum=1.0)},  # it stays where it began: 0
    "learning rate x 100": {"learning_rate": 100 * RATE},
}
EXPECTED = {
    "no KoLeo": "flat_targets",  # nothing else spreads a new backbone's features in so short a run
    "teacher temperature 0.12": "flat_targets",
    "momentum 0": "teacher_is_student",
    "no centering": "one_target",
    "learning rate x 100": "diverged",
}
SHOWN = ("target_entropy", "target_information", "patch_target_information", "weight_norm")


def build(steps, seed, learning_rate=RATE, **settings):
    """The demo's model with other settings, new from `seed`."""
    config = demo_digits.build_model(steps, seed).get_config()
    for name, value in settings.items():
        config[name] = keras.saving.serialize_keras_object(value)
    keras.utils.set_random_seed(seed)
    model = kd.DINOv3.from_config(config)
    rate = kd.WarmupCosine(learning_rate, steps, warmup_steps=steps // 20, end=learning_rate / 100)
    model.compile(kd.AdamW(rate, weight_decay=0.04, part_clipnorm=3.0))
    return model


def run(name, seed, epochs, every_steps, images, train, test):
    model = build(epochs * (len(images) // demo_digits.BATCH_SIZE), seed, **RUNS[name])
    monitor = kd.callbacks.CollapseMonitor(images[:256:4], every_steps=every_steps)
    knn = kd.callbacks.KNN(train, test, epochs, feature=demo_digits.FEATURE, batch_size=256)
    start, end = time.time(), "finished"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model.fit(
                images,
                batch_size=demo_digits.BATCH_SIZE,
                epochs=epochs,
                verbose=0,
                callbacks=[monitor, knn],
            )
        except FloatingPointError:
            end = "not finite"
    return {
        "run": name,
        "seed": seed,
        "end": end,
        "alarms": monitor.alarms,
        "records": monitor.records,
        "knn": [accuracy for _, accuracy in knn.history],
        "seconds": time.time() - start,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--runs", nargs="+", choices=list(RUNS), default=list(RUNS))
    parser.add_argument("--digits", type=int, default=demo_digits.NUM_TRAIN)
    parser.add_argument("--every_steps", type=int, default=10, help="from one look to the next")
    parser.add_argument("--json", type=pathlib.Path)
    args = parser.parse_args()
    data = demo_digits.load_data(args.digits, False)
    results, wrong = [], 0
    for seed in args.seeds:
        for name in args.runs:
            result = run(name, seed, args.epochs, args.every_steps, *data)
            results.append(result)
            fired = {alarm["kind"]: alarm for alarm in result["alarms"]}
            expected = EXPECTED.get(name)
            is_right = expected in fired if expected else not fired
            wrong += not is_right
            last = result["records"][-1]
            print(
                f"{name:28} seed {seed}  {'as expected' if is_right else 'NOT AS EXPECTED':16}",
                ", ".join(
                    f"{kind} at {alarm['step']} (since {alarm['since_step']})"
                    for kind, alarm in fired.items()
                )
                or "silent",
                f"\n    {result['end']}, step {last['step']}:",
                "  ".join(f"{key} {last[key]:.3f}" for key in SHOWN),
                " k-NN",
                " -> ".join(f"{100 * accuracy:.1f} %" for accuracy in result["knn"]),
                f" {result['seconds']:.0f} s",
                flush=True,
            )
            for alarm in fired.values():
                print(f"    [{alarm['kind']}] {alarm['message']}", flush=True)
            if args.json:
                args.json.write_text(json.dumps(results, indent=1))
    print(f"{len(results) - wrong} of {len(results)} runs as expected.")


if __name__ == "__main__":
    main()
