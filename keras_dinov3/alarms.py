"""The alarms of `CollapseMonitor`: which numbers mean that a run fails, and what to try then.

A rule is a function of the values of a look, of those of the first, and of the settings of the run.
It returns `None` while all is well, else what it saw and what to try, in words. Rules know no
model, so that any case can be put to them as plain numbers.
"""

import json
import math
import numbers
import os
import warnings

from keras_dinov3.optimizers import scaled_learning_rate

# Found on runs of the demo's digits, and far from what either side showed: benchmarks/alarms.py.
NOTHING = 0.01  # nats that a target says about its image, below which all images have one target
FLAT = 0.98  # of the largest entropy, above which that one target is the uniform one
GUESS = 1.5  # times the loss of a uniform guess
GROWTH = 3  # times their first length: as far as weights grow soon after the start,
DOUBLING = 1000  # and updates in which they may double after that


class Watch:
    """Puts every look to the rules; each kind of alarm fires once.

    What may be a passing state, as at the start of every run, must last for `patience` updates;
    the others for two looks.

    Args:
        patience: Int. Updates. `None`: a tenth of the run, but at least 100.
    """

    def __init__(self, patience=None):
        self.patience = patience
        self._since = {}  # kind -> the first of the records for which it holds without a break
        self._fired = set()
        self._first = None

    def look(self, record, settings):
        """The alarms that fire now.

        Args:
            record: Dict with `epoch`, `step` and the values of `CollapseMonitor`.
            settings: Dict, see `CollapseMonitor.settings`.

        Returns:
            List of dicts.
        """
        self._first = self._first or record
        patience = self.patience or max((settings["total_steps"] or 0) // 10, 100)
        alarms = []
        for rule, is_slow in RULES.items():
            kind = rule.__name__
            found = rule(record, self._first, settings) if record["step"] > 0 else None
            if found is None:
                self._since.pop(kind, None)
                continue
            since = self._since.setdefault(kind, record)
            lasts = record["step"] - since["step"] >= (patience if is_slow else 1)
            # A student that has diverged may do anything else, and for that reason alone.
            if lasts and kind not in self._fired and "diverged" not in self._fired:
                self._fired.add(kind)
                alarms.append(alarm_of(kind, since, record, *found))
        return alarms


def alarm_of(kind, since, record, saw, advice):
    return {
        "kind": kind,
        "step": record["step"],
        "epoch": record["epoch"],
        "since_step": since["step"],
        "since_epoch": since["epoch"],
        "message": f"{saw}, since step {since['step']} (epoch {since['epoch']}). Try {advice}.",
        "values": {name: v for name, v in record.items() if name not in ("epoch", "step")},
    }


def announce(alarm, path=None):
    """Warns, and appends the alarm to a file of JSON lines."""
    warnings.warn(f"[{alarm['kind']}] {alarm['message']}", stacklevel=2)
    if path is not None:
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        with open(path, "a") as file:
            file.write(json.dumps(alarm) + "\n")


def flat_targets(record, first, settings):
    """The teacher's targets are uniform, for class tokens and patches alike."""
    kinds = target_kinds(record, settings)
    if any(information > NOTHING or share < FLAT for _, share, information in kinds):
        return None
    temperature, student = settings["teacher_temperature"], settings["student_temperature"]
    share = min(share for _, share, _ in kinds)
    saw = f"The teacher's targets are flat: their entropy is {100 * share:.2f} % of the largest"
    if temperature < 0.2 * student:  # sharp enough, had the images been apart
        spread = f"the deviation of the features is {record['feature_std']:.2g} of 1"
        return saw, f"{koleo_advice(settings)}: {spread}"
    low, high = 0.4 * student, 0.7 * student
    if temperature <= high + 1e-6:  # float32
        low, high = 0.1 * temperature, 0.5 * temperature
    return saw, (
        f"`teacher_temperature` {temperature:.2g} -> {low:.2g}..{high:.2g} "
        f"(`student_temperature` is {student:.2g})"
    )


def one_target(record, first, settings):
    """All class tokens, or all patches, have one target, and it is not the uniform one."""
    same = [
        (name, information)
        for name, share, information in target_kinds(record, settings)
        if share < FLAT and information < NOTHING
    ]
    if not same:
        return None
    name, information = same[0]
    saw = f"All {name} get one target: it says {max(information, 0):.4f} nats about its image"
    saw += f", and {100 * record['prototypes_used']:.2g} % of the prototypes are in use"
    if settings["centering"] == "sinkhorn_knopp":
        return saw, f"{koleo_advice(settings)}, and {rate_advice(settings)}"
    momentum = settings["centering"].momentum
    advice = '`centering="sinkhorn_knopp"`'
    if momentum > 0.95:
        advice += f", or `SoftmaxCentering(momentum)` {momentum:.4g} -> 0.9, so that centers follow"
    return saw, advice


def teacher_is_student(record, first, settings):
    """The teacher is less than an average of two of the student's states."""
    momentum = settings.get("teacher_momentum")
    if momentum is None or not (momentum < 0.5 or record["teacher_distance"] < 1e-9):
        return None
    total = settings["total_steps"]
    low = min(max(1 - 100 / total, 0.9), 0.996) if total else 0.992
    schedule = f"kd.WarmupCosine({low:.3g}, {total}, end=1.0)" if total else f"{low:.3g}"
    saw = (
        f"The teacher is the student itself: momentum is {momentum:.2g}, and their weights "
        f"differ by {100 * record['teacher_distance']:.2g} %"
    )
    return saw, f"momentum {momentum:.2g} -> {low:.3g}..1: `callbacks.TeacherEMA({schedule})`"


def diverged(record, first, settings):
    """The weights have grown beyond what training does, or the loss is above that of a guess."""
    growth = record["weight_norm"] / first["weight_norm"]
    updates = record["step"] - first["step"]
    guess = math.log(settings["num_prototypes"])
    loss = record["target_entropy"] + record["target_kl"]
    if growth > max(GROWTH, 2 ** (updates / DOUBLING)):
        saw = f"The student's weights are {growth:.2g} times as long as {updates} updates before"
    elif loss > GUESS * guess:
        saw = f"The student's loss is {loss:.3g}, more than the {guess:.3g} of a uniform guess"
    else:
        return None
    return saw, rate_advice(settings)


def target_kinds(record, settings):
    """What is known of the targets of class tokens and patches.

    Returns:
        List of tuples: what has the targets, their entropy as a share of the largest, and what
        they say about an image, in nats.
    """
    kinds = [("class tokens", "", "num_prototypes"), ("patches", "patch_", "num_patch_prototypes")]
    return [
        (
            name,
            record[f"{prefix}target_entropy"] / math.log(max(settings[count], 2)),
            record[f"{prefix}target_information"],
        )
        for name, prefix, count in kinds
        if f"{prefix}target_entropy" in record
    ]


def koleo_advice(settings):
    weight = settings["koleo_weight"]
    if not isinstance(weight, numbers.Real):  # a schedule
        return "a higher `koleo_weight`, such as 0.3"
    return f"`koleo_weight` {weight:.2g} -> {max(3 * weight, 0.3):.2g}"


def rate_advice(settings):
    rate, batch_size = settings["peak_learning_rate"], settings["batch_size"]
    usual = min(scaled_learning_rate(1e-3, batch_size), rate / 10)
    return (
        f"`learning_rate` {rate:.2g} -> {usual / 3:.1g}..{usual:.1g} "
        f"(AdamW, {batch_size} images per update)"
    )


RULES = {  # rule: whether it must hold for long
    flat_targets: True,
    one_target: True,
    teacher_is_student: False,
    diverged: False,
}
