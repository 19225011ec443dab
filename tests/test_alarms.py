"""The alarms' rules on plain numbers, and their truth table on runs made to fail."""

import json
import math
import re
import warnings

import keras
import numpy as np
import pytest
import tiny

import keras_dinov3 as kd
from keras_dinov3 import alarms
from keras_dinov3.callbacks import CollapseMonitor

K, K_PATCH = 50, 30
HEALTHY = {
    "target_entropy": 2.0,
    "target_kl": 1.0,
    "target_information": 1.5,
    "patch_target_entropy": 1.8,
    "patch_target_information": 1.2,
    "prototypes_used": 0.8,
    "feature_std": 0.02,
    "teacher_distance": 0.05,
    "weight_norm": 10.0,
}
FLAT = {
    "target_entropy": 0.999 * math.log(K),
    "target_kl": 0.001,
    "target_information": 0.001,
    "patch_target_entropy": 0.999 * math.log(K_PATCH),
    "patch_target_information": 0.0,
}
SETTINGS = {
    "teacher_temperature": 0.07,
    "student_temperature": 0.1,
    "teacher_momentum": 0.99,
    "learning_rate": 1e-3,
    "peak_learning_rate": 1e-3,
    "num_prototypes": K,
    "num_patch_prototypes": K_PATCH,
    "centering": "sinkhorn_knopp",
    "koleo_weight": 0.1,
    "batch_size": 64,
    "total_steps": 5000,
}
ONE = {"target_entropy": 0.3, "target_kl": 0.1, "target_information": 0.001}
CASES = [  # kind, what the look shows, what the settings are, what the message holds
    (
        "flat_targets",
        FLAT,
        {"teacher_temperature": 0.12},
        r"flat: their entropy is 99\.90 %.*`teacher_temperature` 0\.12 -> 0\.04\.\.0\.07",
    ),
    (
        "flat_targets",
        FLAT,
        {"teacher_temperature": 0.05},
        r"`teacher_temperature` 0\.05 -> 0\.005\.\.0\.025",
    ),
    (
        "flat_targets",
        FLAT,
        {"teacher_temperature": 0.01, "koleo_weight": 0.0},
        r"Try `koleo_weight` 0 -> 0\.3: the deviation of the features is 0\.02",
    ),
    (
        "flat_targets",
        FLAT,
        {"teacher_temperature": 0.01, "koleo_weight": kd.WarmupCosine(0.1, 10)},
        r"Try a higher `koleo_weight`, such as 0\.3",
    ),
    (
        "one_target",
        ONE,
        {"centering": kd.SoftmaxCentering(momentum=1.0)},
        r'All class tokens get one.*0\.0010 nats.*80 %.*"sinkhorn_knopp".* 1 -> 0\.9',
    ),
    (
        "one_target",
        ONE,
        {},
        r"`koleo_weight` 0\.1 -> 0\.3, and `learning_rate` 0\.001 -> 3e-05\.\.0\.0001",
    ),
    (
        "one_target",
        {"patch_target_entropy": 0.1, "patch_target_information": 0.0},
        {"centering": kd.SoftmaxCentering()},
        r'All patches get one target.*Try `centering="sinkhorn_knopp"`\.$',
    ),
    (
        "teacher_is_student",
        {"teacher_distance": 0.0},
        {"teacher_momentum": 0.0},
        r"momentum 0 -> 0\.98\.\.1: .*WarmupCosine\(0\.98, 5000, end=1\.0\)",
    ),
    ("teacher_is_student", {"teacher_distance": 0.0}, {"total_steps": None}, r"-> 0\.992\.\.1"),
    (
        "diverged",
        {"target_kl": 9.0},
        {"peak_learning_rate": 0.1},
        r"loss is 11.*3\.91 of a uniform.*`learning_rate` 0\.1 -> 0\.0003\.\.0\.001 .*64 images",
    ),
    ("diverged", {"weight_norm": 55.0}, {}, r"weights are 5\.5 times as long as 40 updates before"),
]


def looks(count, first=1, **values):
    return [
        {"epoch": i // 3, "step": 20 * i, **HEALTHY, **values} for i in range(first, first + count)
    ]


def fired(records, patience=None, **settings):
    watch = alarms.Watch(patience)
    return [alarm for r in records for alarm in watch.look(r, {**SETTINGS, **settings})]


@pytest.mark.parametrize(("kind", "values", "settings", "message"), CASES)
def test_each_alarm_fires_once_and_says_since_when_and_what_to_try(kind, values, settings, message):
    for broken in ({**values}, {}):
        records = [*looks(1, 0), *looks(40, **broken)]
        found = fired(records, **(settings if broken else {}))
        if not broken:
            assert found == []
            continue
        (alarm,) = found
        slow = kind in ("flat_targets", "one_target")
        # A tenth of 5000 updates; 100 of a run whose length is unknown.
        waits = 500 if slow and SETTINGS["total_steps"] else 20
        assert (alarm["kind"], alarm["since_step"], alarm["step"]) == (kind, 20, 20 + waits)
        assert alarm["values"] == {**HEALTHY, **values}
        assert re.search(message, alarm["message"]), alarm["message"]
        assert "since step 20 (epoch 0)" in alarm["message"]


def test_patience_is_in_updates_without_a_break():
    settings = {"teacher_temperature": 0.12}
    flicker = [*looks(3, 1, **FLAT), *looks(1, 4), *looks(4, 5, **FLAT)]
    assert fired(flicker, patience=80, **settings) == []
    (alarm,) = fired(flicker, patience=60, **settings)
    assert (alarm["since_step"], alarm["step"]) == (100, 160)
    assert fired(looks(6, **FLAT), total_steps=None) != []  # 100 updates
    assert fired(looks(6, **FLAT), total_steps=5000) == []


def test_patches_that_learn_are_not_flat():
    """As in the demo, whose class tokens say next to nothing for hundreds of steps."""
    learns = {"patch_target_entropy": 2.0, "patch_target_information": 0.8}
    assert fired(looks(40, **{**FLAT, **learns})) == []
    without_patches = [
        {name: v for name, v in record.items() if not name.startswith("patch")}
        for record in looks(40, **FLAT)
    ]
    assert [alarm["kind"] for alarm in fired(without_patches)] == ["flat_targets"]


def test_weights_may_grow_slowly():
    slow = [
        {**record, "weight_norm": 10 * (1 + record["step"] / 1000), "step": record["step"]}
        for record in looks(400, 0)
    ]
    assert fired(slow) == []


def test_after_divergence_no_consequence_is_announced():
    records = [*looks(1, 0), *looks(3, weight_norm=90.0), *looks(40, 4, **FLAT, weight_norm=90.0)]
    assert [alarm["kind"] for alarm in fired(records)] == ["diverged"]


def test_nothing_fires_before_training():
    assert fired([{**record, "step": 0} for record in looks(5, target_kl=90.0)]) == []


def test_alarms_are_warned_of_and_appended(tmp_path):
    path = tmp_path / "run" / "alarms.jsonl"
    found = fired(looks(4, teacher_distance=0.0)) + fired(looks(4, target_kl=9.0))
    for alarm in found:
        with pytest.warns(UserWarning, match=rf"\[{alarm['kind']}\].*since step 20"):
            alarms.announce(alarm, path)
    assert [json.loads(line) for line in path.read_text().splitlines()] == found


# ---- whole runs ----

RATE = 2e-3


def stripes(count):
    """Images of waves in a direction and colour of their own."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:40, :36] / 6.0
    angle, colour = rng.uniform(0, np.pi, (count, 1, 1)), rng.uniform(0, 255, (count, 1, 1, 3))
    waves = 0.5 + 0.5 * np.sin(x * np.cos(angle) + y * np.sin(angle))
    return (waves[..., None] * colour).astype("uint8")


def run(learning_rate=RATE, seed=3, path=None, **settings):
    """The kinds of alarm of 40 updates, a look every 5."""
    settings = {"teacher_temperature": 0.01, "koleo_weight": 0.3, **settings}
    settings.setdefault("teacher_ema", kd.callbacks.TeacherEMA(0.9))
    model = tiny.model(
        kd.AdamW(learning_rate, part_clipnorm=3.0),
        seed=seed,
        masking=kd.RandomMasking(),
        **settings,
    )
    images = stripes(40)
    monitor = CollapseMonitor(images[:32], every_steps=5, patience=20, path=path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.fit(images, batch_size=8, epochs=8, verbose=0, callbacks=monitor)
    return monitor


BROKEN = {
    "flat_targets": {"teacher_temperature": 0.12},
    "one_target": {"centering": kd.SoftmaxCentering(momentum=1.0)},  # never moves from 0
    "teacher_is_student": {"teacher_ema": kd.callbacks.TeacherEMA(0.0)},
    "diverged": {"learning_rate": 100 * RATE},
}


@pytest.mark.skipif(keras.config.backend() != "torch", reason="five runs: the quickest backend")
def test_truth_table(tmp_path):
    assert run().alarms == []
    for kind, settings in BROKEN.items():
        path = tmp_path / f"{kind}.jsonl"
        monitor = run(**settings, path=path)
        assert [alarm["kind"] for alarm in monitor.alarms] == [kind]
        assert [json.loads(line) for line in path.read_text().splitlines()] == monitor.alarms
