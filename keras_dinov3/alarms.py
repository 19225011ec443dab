"""The alarms of `CollapseMonitor`: which numbers mean that a run fails, and what to try then.

A rule is a function of the values of one look and of the settings of the run. It returns `None`
while all is well, else what it saw and what to try, in words. Rules know no model, so that any
case can be put to them as plain numbers.
"""

import json
import math
import os
import warnings

from keras_dinov3.optimizers import scaled_learning_rate

FLAT = 0.98  # of the largest entropy
SAME = 0.02  # nats of information below which targets do not tell images apart
GUESS = 1.5  # times the loss of a uniform guess


class Watch:
    """Puts every look to the rules; each kind of alarm fires once.

    Args:
        patience: Int. Looks in a row for which a rule must hold.
    """

    def __init__(self, patience):
        self.patience = patience
        self._streaks = {}  # kind -> the records for which it has held without a break
        self._fired = set()

    def look(self, record, settings):
        """The alarms that fire now.

        Args:
            record: Dict with `epoch`, `step` and the values of `CollapseMonitor`.
            settings: Dict, see `CollapseMonitor.settings`.

        Returns:
            List of dicts.
        """
        alarms = []
        if record["step"] == 0:
            return alarms  # nothing has been trained that could have failed
        for rule in RULES:
            kind = rule.__name__
            found = rule(record, settings)
            streak = self._streaks.setdefault(kind, [])
            if found is None:
                streak.clear()
                continue
            streak.append(record)
            if len(streak) >= self.patience and kind not in self._fired:
                self._fired.add(kind)
                alarms.append(alarm_of(kind, streak[0], record, *found))
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


def flat_targets(record, settings):
    """The teacher's targets are nearly uniform: no image has a prototype of its own."""
    largest = math.log(settings["num_prototypes"])
    if record["target_entropy"] < FLAT * largest:
        return None
    temperature, student = settings["teacher_temperature"], settings["student_temperature"]
    low, high = 0.4 * student, 0.7 * student
    if temperature <= high:
        low, high = 0.1 * temperature, 0.5 * temperature
    saw = (
        f"The teacher's targets are flat: their entropy is {record['target_entropy']:.3f} of at "
        f"most log({settings['num_prototypes']}) = {largest:.3f}"
    )
    return saw, (
        f"`teacher_temperature` {temperature:.3g} -> {low:.2g}..{high:.2g} (student: {student:.3g})"
    )


def one_target(record, settings):
    """All images have one target, and it is not the uniform one."""
    if record["target_entropy"] >= FLAT * math.log(settings["num_prototypes"]):
        return None
    if record["target_information"] > SAME:
        return None
    saw = (
        "All images get one target: it says "
        f"{record['target_information']:.4f} nats about its image, and "
        f"{100 * record['prototypes_used']:.3g} % of the prototypes are in use"
    )
    if settings["centering"] == "sinkhorn_knopp":
        weight = settings["koleo_weight"]
        weight = weight if isinstance(weight, float | int) and weight > 0 else 0.1
        advice = f"`koleo_weight` {settings['koleo_weight']} -> {3 * weight:.2g}, or a lower rate: "
        return saw, advice + rate_advice(settings)
    momentum = settings["centering"].momentum
    advice = '`centering="sinkhorn_knopp"`'
    if momentum > 0.99:
        advice += f", or `SoftmaxCentering(momentum=...)` {momentum:.4g} -> 0.9, so that it moves"
    return saw, advice


def teacher_is_student(record, settings):
    """The teacher is an average of less than two of the student's states."""
    momentum = settings.get("teacher_momentum")
    if momentum is None or not (momentum < 0.5 or record["teacher_distance"] < 1e-9):
        return None
    total = settings["total_steps"]
    low = 0.9 if not total else min(max(1 - 100 / total, 0.9), 0.996)
    schedule = f"kd.WarmupCosine({low:.3g}, {total}, end=1.0)" if total else f"{low:.3g}"
    saw = (
        f"The teacher is all but the student itself: momentum {momentum:.3g}, and its weights "
        f"differ by {100 * record['teacher_distance']:.2g} %"
    )
    return saw, f"`teacher_ema=kd.callbacks.TeacherEMA({schedule})`: {momentum:.3g} -> {low:.3g}..1"


def diverged(record, settings):
    """The student predicts the targets worse than a uniform guess would."""
    guess = math.log(settings["num_prototypes"])
    loss = record["target_entropy"] + record["target_kl"]
    if loss < GUESS * guess:
        return None
    saw = (
        f"The student is worse than a uniform guess: a loss of {loss:.3g} instead of "
        f"log({settings['num_prototypes']}) = {guess:.3g}"
    )
    return saw, rate_advice(settings)


def rate_advice(settings):
    rate = settings["learning_rate"]
    usual = min(scaled_learning_rate(1e-3, settings["batch_size"]), rate / 10)
    return (
        f"`learning_rate` {rate:.2g} -> {usual / 3:.2g}..{usual:.2g} at {settings['batch_size']} "
        "images per update"
    )


RULES = (flat_targets, one_target, teacher_is_student, diverged)
