"""The alarms' rules on plain numbers, and their truth table on runs made to fail."""

import math
import re

import pytest

import keras_dinov3 as kd
from keras_dinov3 import alarms

K = 50
HEALTHY = {
    "target_entropy": 2.0,
    "target_kl": 1.0,
    "target_information": 1.5,
    "prototypes_used": 0.8,
    "feature_std": 0.7,
    "teacher_distance": 0.05,
    "weight_norm": 10.0,
}
SETTINGS = {
    "teacher_temperature": 0.07,
    "student_temperature": 0.1,
    "teacher_momentum": 0.99,
    "learning_rate": 1e-3,
    "num_prototypes": K,
    "centering": "sinkhorn_knopp",
    "koleo_weight": 0.1,
    "batch_size": 64,
    "total_steps": 20_000,
}
BROKEN = {  # kind: what the look shows, what the settings are, what the message must hold
    "flat_targets": (
        {"target_entropy": 0.999 * math.log(K), "target_kl": 0.001, "target_information": 0.0},
        {"teacher_temperature": 0.12},
        r"flat.*`teacher_temperature` 0\.12 -> 0\.04\.\.0\.07",
    ),
    "one_target": (
        {"target_entropy": 0.3, "target_kl": 0.01, "target_information": 0.001},
        {"centering": kd.SoftmaxCentering(momentum=1.0)},
        r"one target.*sinkhorn_knopp.*1 -> 0\.9",
    ),
    "teacher_is_student": (
        {"teacher_distance": 0.0},
        {"teacher_momentum": 0.0},
        r"momentum 0\b.*WarmupCosine\(0\.995, 20000, end=1\.0\)",
    ),
    "diverged": (
        {"target_kl": 9.0},
        {"learning_rate": 0.1},
        r"worse than a uniform guess: a loss of 11.*`learning_rate` 0\.1 -> 0\.00033\.\.0\.001",
    ),
}


def looks(count, start=10, **values):
    return [{"epoch": i // 3, "step": start * (i + 1), **HEALTHY, **values} for i in range(count)]


def fired(records, patience=3, **settings):
    watch = alarms.Watch(patience)
    return [alarm for r in records for alarm in watch.look(r, {**SETTINGS, **settings})]


def test_a_healthy_run_is_silent():
    assert fired(looks(20)) == []


@pytest.mark.parametrize("kind", BROKEN)
def test_each_alarm_fires_once_and_says_since_when_and_what_to_try(kind):
    values, settings, message = BROKEN[kind]
    (alarm,) = fired([*looks(2), *looks(10, start=100, **values)], **settings)[:1]
    assert alarm["kind"] == kind
    assert pytest.approx(values) == {name: alarm["values"][name] for name in values}
    assert re.search(message, alarm["message"]), alarm["message"]
    assert len(fired(looks(10, **values), **settings)) == 1


def test_a_rule_must_hold_in_a_row():
    bad = BROKEN["diverged"][0]
    flicker = [looks(1, start=step, **(bad if step % 3 else {}))[0] for step in range(1, 20)]
    assert fired(flicker) == []
    (alarm,) = fired(flicker, patience=2)
    assert (alarm["since_step"], alarm["step"]) == (1, 2)


def test_nothing_fires_before_training():
    assert fired([{**looks(1, **BROKEN["diverged"][0])[0], "step": 0}] * 5) == []
