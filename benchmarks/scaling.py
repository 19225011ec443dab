"""How the time of a step grows with batch, local crops, prototypes, tokens and depth.

    KERAS_BACKEND=jax python benchmarks/scaling.py

One number is varied at a time around the setting that the flags give. The models of an axis are
all made first and then take turns, so that a machine that changes its speed slows all of them.
Steps run on ready crops. `tokens` are those of a global crop.

`exponent` is `p` of the law `c + a * x**p` with the smallest squared error in the log of the times:
for each of many constants `c` from 0 to 95 % of the smallest time, `a` and `p` are those of a line
through `log(time - c)` over `log(x)`. `constant` is `c` as a share of the smallest time. Where the
constant is most of the time, the exponent says little. `end slope` is the slope between the last
two points on log-log axes, nothing subtracted, which is at most `p`.
"""

import dataclasses
import math
import statistics

import measure
from measure import Setting

# Axis to field of the setting, and factors of its value.
AXES = {
    "batch": ("batch_size", (1, 2, 4, 8)),
    "local crops": ("num_local_crops", (1, 2, 4, 8)),
    "prototypes": ("prototypes", (1, 4, 16, 64)),
    "tokens": ("global_crop_size", (1, 1.5, 2, 3)),
    "depth": ("num_layers", (1, 2, 4, 8)),
}
BASE = {
    "size": "Ti",
    "num_layers": 2,
    "global_crop_size": 64,
    "local_crop_size": 32,
    "num_local_crops": 2,
    "prototypes": 1024,
}


def settings_of(axis, base, num_points):
    """Pairs of what is varied and a setting."""
    field, factors = AXES[axis]
    points = []
    for factor in factors[:num_points]:
        value = int(getattr(base, field) * factor)
        setting = dataclasses.replace(base, **{field: value})
        x = 1 + measure.NUM_REGISTERS + setting.grid**2 if axis == "tokens" else value
        points.append((x, setting))
    return points


def time_axis(points, rounds, steps):
    """Times of each point, a list of lists of seconds."""
    calls = []
    for _, setting in points:
        masked = int(setting.masked_counts().sum())
        model = setting.model(augmentation=None, max_masked_patches=masked)
        calls.append(measure.bare_step(model, setting.batch()))
        measure.seconds(calls[-1], 2)
    times = [[] for _ in points]
    for _ in range(rounds):
        for call, found in zip(calls, times, strict=True):
            found += measure.seconds(call, steps)
    return times


def main():
    parser = Setting.parser(__doc__, **BASE)
    parser.add_argument("--axes", nargs="+", default=list(AXES), choices=AXES)
    parser.add_argument("--points", type=int, default=4, choices=(2, 3, 4))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="of a point in each round")
    arguments = parser.parse_args()
    base = Setting.of(arguments)
    rows = []
    for axis in arguments.axes:
        points = settings_of(axis, base, arguments.points)
        times = time_axis(points, arguments.rounds, arguments.steps)
        x = [value for value, _ in points]
        medians = [statistics.median(found) for found in times]
        constant, _, exponent = measure.fitted_exponent(x, medians)
        end_slope = math.log(medians[-1] / medians[-2]) / math.log(x[-1] / x[-2])
        for index, (value, setting) in enumerate(points):
            row = {"axis": axis, "x": value, **measure.spread(times[index])}
            row["GFLOP"] = sum(setting.flops().values()) / 1e9
            rows.append(row)
        rows[-1].update(
            {"exponent": exponent, "constant": constant / min(medians), "end slope": end_slope}
        )
    formats = {
        "axis": "",
        "x": "d",
        "median": ".4f",
        "low": ".4f",
        "high": ".4f",
        "GFLOP": ".1f",
        "exponent": ".2f",
        "constant": ".0%",
        "end slope": ".2f",
    }
    title = f"Time of a step in seconds around ViT-{base.size} with {base.shape[0]} layers"
    measure.report(title, rows, formats, arguments.json, setting=vars(base))


if __name__ == "__main__":
    main()
