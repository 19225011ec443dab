import keras
import numpy as np
import pytest
from golden import Golden, numpy
from keras import ops

from keras_dinov3.schedules import WarmupCosine, check_range, deserialize, serialize, value_at

FLOAT32 = 2e-7  # two roundings, relative to the largest value


def slow(
    step,
    peak,
    total_steps,
    warmup_steps=0,
    start=0.0,
    end=0.0,
    cosine_steps=None,
    freeze_steps=0,
    warmup_reaches_peak=False,
    cosine_reaches_end=True,
    truncate_extra=0.0,
):
    """The docstring's formula in float64."""
    if cosine_steps is None:
        cosine_steps = total_steps - freeze_steps - warmup_steps
    if step < freeze_steps:
        return 0.0
    step -= freeze_steps
    if step < warmup_steps:
        length = warmup_steps - 1 if warmup_reaches_peak else warmup_steps
        return start + (peak - start) * step / max(length, 1)
    step -= warmup_steps
    if step < cosine_steps:
        drawn = int((1 + truncate_extra) * cosine_steps)
        length = max(drawn - 1 if cosine_reaches_end else drawn, 1)
        height = (1 + np.cos(np.pi * step / length)) / 2
        if truncate_extra and cosine_steps > 1:
            last = (1 + np.cos(np.pi * (cosine_steps - 1) / length)) / 2
            height = (height - last) / (1 - last)
        return end + (peak - end) * height
    return end


def values(schedule, num_steps):
    return np.array([numpy(schedule(step)) for step in range(num_steps)])


def check(schedule, expected, rtol=1e-12):
    """`schedule` equals float64 numbers: in double precision, and by the backend's float32."""
    exact = schedule.values(np.arange(len(expected)))
    assert exact.dtype == "float64"
    bound = np.abs(expected).max()
    np.testing.assert_allclose(exact, expected, rtol=0, atol=rtol * bound)
    for actual in (values(schedule, len(expected)), numpy(schedule(np.arange(len(expected))))):
        assert actual.dtype == "float32"
        np.testing.assert_allclose(actual, expected, rtol=0, atol=FLOAT32 * bound)


@pytest.mark.parametrize("case", ["a", "b", "c", "d", "gram_like"])
def test_equals_linear_warmup_cosine_decay(case):
    golden = Golden("fb_schedules")
    name = "linear_warmup_cosine_decay(start,peak,end,warmup,total,cosine)"
    start, peak, end, warmup, total, cosine = golden.hyperparameters[name][case]
    schedule = WarmupCosine(peak, total, warmup, start, end, cosine)
    check(schedule, golden[f"linear_warmup_cosine_decay/{case}_f64"])


@pytest.mark.parametrize("case", ["a", "b", "c", "d", "temp_like"])
def test_equals_the_older_cosine_scheduler(case):
    golden = Golden("fb_schedules")
    settings = golden.hyperparameters["CosineScheduler"][case]
    extra = settings.get("trunc_extra", 0.0)
    schedule = WarmupCosine(
        settings["base_value"],
        settings["total_iters"],
        warmup_steps=settings.get("warmup_iters", 0),
        start=settings.get("start_warmup_value", 0.0),
        end=settings["final_value"],
        freeze_steps=settings.get("freeze_iters", 0),
        warmup_reaches_peak=True,
        cosine_reaches_end=extra > 0,
        truncate_extra=extra,
    )
    check(schedule, golden[f"CosineScheduler/{case}_f64"])


@pytest.mark.parametrize("name", ["lr", "weight_decay", "momentum", "teacher_temp"])
def test_equals_the_older_schedules_of_a_training_run(name):
    golden = Golden("fb_schedules")
    settings = golden.hyperparameters["build_schedulers_v1"]
    optim = settings["optim"]
    peak, end, more = {
        "lr": (optim["lr"], 1e-6, {"warmup_epochs": optim["warmup_epochs"]}),
        "weight_decay": (0.04, 0.4, {}),
        "momentum": (0.992, 1.0, {}),
        "teacher_temp": (
            0.07,
            0.07,
            {"warmup_epochs": settings["teacher"]["warmup_teacher_temp_epochs"], "start": 0.04},
        ),
    }[name]
    schedule = WarmupCosine.from_epochs(
        peak,
        optim["epochs"],
        settings["train"]["OFFICIAL_EPOCH_LENGTH"],
        end=end,
        warmup_reaches_peak=True,
        cosine_reaches_end=False,
        **more,
    )
    check(schedule, golden[f"build_schedulers_v1/{name}_f64"])


@pytest.mark.parametrize("name", ["lr", "weight_decay", "momentum", "teacher_temp"])
def test_equals_the_schedules_of_a_training_run(name):
    golden = Golden("fb_schedules")
    settings = golden.hyperparameters["build_schedulers_v2"]
    epoch = settings["train"]["OFFICIAL_EPOCH_LENGTH"]
    scale = 1.0
    if name == "lr":
        scale = 4 * np.sqrt(settings["train"]["batch_size_per_gpu"] / 1024)
    wanted = settings["schedules"][name]
    schedule = WarmupCosine(
        wanted["peak"] * scale,
        total_steps=settings["optim"]["epochs"] * epoch,
        warmup_steps=wanted["warmup_epochs"] * epoch,
        start=wanted["start"],
        end=wanted["end"] * scale,
        cosine_steps=wanted["cosine_epochs"] * epoch if "cosine_epochs" in wanted else None,
    )
    check(schedule, golden[f"build_schedulers_v2/{name}_f64"])


@pytest.mark.parametrize(
    "arguments",
    [
        dict(peak=2.0, total_steps=13, warmup_steps=4, start=0.5, end=-1.0, cosine_steps=6),
        dict(peak=3.0, total_steps=1),
        dict(peak=3.0, total_steps=5, warmup_steps=2, end=0.25, cosine_steps=1),
        dict(peak=3.0, total_steps=5, warmup_steps=2, end=0.25, cosine_steps=0),
        dict(peak=3.0, total_steps=4, warmup_steps=4, start=1, end=2),
        dict(peak=2.0, total_steps=13, warmup_steps=4, start=0.5, end=-1.0, freeze_steps=3),
        dict(peak=2.0, total_steps=9, warmup_steps=1, start=0.5, warmup_reaches_peak=True),
        dict(peak=2.0, total_steps=9, warmup_steps=5, start=0.5, warmup_reaches_peak=True),
        dict(peak=2.0, total_steps=9, warmup_steps=3, end=0.5, cosine_reaches_end=False),
        dict(peak=2.0, total_steps=9, warmup_steps=8, end=0.5, cosine_reaches_end=False),
        dict(peak=2.0, total_steps=19, warmup_steps=3, end=0.5, truncate_extra=0.4),
        dict(peak=2.0, total_steps=19, cosine_steps=11, end=0.5, truncate_extra=1.5),
        dict(peak=2.0, total_steps=5, end=0.5, truncate_extra=0.1),  # too little to matter
        dict(peak=2.0, total_steps=4, warmup_steps=3, end=0.5, truncate_extra=3.0),
        dict(peak=2.0, total_steps=6, freeze_steps=6, end=0.5),
    ],
)
def test_equals_the_formula_and_stays_at_the_end(arguments):
    expected = [slow(step, **arguments) for step in range(arguments["total_steps"] + 4)]
    check(WarmupCosine(**arguments), np.array(expected))


def test_lengths_in_epochs():
    settings = dict(peak=2.0, start=0.5, end=1.0, truncate_extra=0.5)
    by_epochs = WarmupCosine.from_epochs(
        epochs=4,
        steps_per_epoch=10,
        warmup_epochs=0.26,
        cosine_epochs=2,
        freeze_epochs=1,
        **settings,
    )
    by_steps = WarmupCosine(
        total_steps=40, warmup_steps=3, cosine_steps=20, freeze_steps=10, **settings
    )
    assert by_epochs.get_config() == by_steps.get_config()
    assert WarmupCosine.from_epochs(2.0, 4, 10).cosine_steps is None
    assert WarmupCosine.from_epochs(2.0, 4, 10).values().shape == (40,)
    with pytest.raises(ValueError, match="`steps_per_epoch` must be .*Received: steps_per_epoch=0"):
        WarmupCosine.from_epochs(2.0, 4, 0)
    with pytest.raises(ValueError, match="`warmup_epochs` must be .*Received: warmup_epochs=nan"):
        WarmupCosine.from_epochs(2.0, 4, 10, warmup_epochs=float("nan"))
    # 7.5 and 7.5 steps: each by itself would be 8, and together more than there are.
    halves = WarmupCosine.from_epochs(1.0, 3, 5, warmup_epochs=1.5, cosine_epochs=1.5)
    assert (halves.warmup_steps, halves.cosine_steps) == (8, 7)


def test_ends_are_exact():
    schedule = WarmupCosine(0.992, total_steps=1000, warmup_steps=100, start=0.5, end=1.0)
    exact = {0: 0.5, 100: 0.992, 999: 1.0, 1000: 1.0, 10**7: 1.0}
    for step, value in exact.items():
        assert numpy(schedule(step)) == np.float32(value)
    assert numpy(WarmupCosine(1e-3, total_steps=7)(6)) == 0.0


def compiled(function):
    if keras.config.backend() == "jax":
        import jax

        return [jax.jit(function)]
    if keras.config.backend() == "tensorflow":
        import tensorflow as tf

        return [tf.function(function), tf.function(function, jit_compile=True)]
    return [function]


def test_takes_any_kind_of_step_also_compiled():
    schedule = WarmupCosine(2.0, total_steps=20, warmup_steps=5)
    expected = slow(9, 2.0, 20, 5)
    variable = keras.Variable(9, dtype="int32", trainable=False)
    steps = [9, 9.0, np.int64(9), ops.convert_to_tensor(9), ops.convert_to_tensor(9.0), variable]
    for value in [schedule(step) for step in steps]:
        assert keras.backend.standardize_dtype(value.dtype) == "float32"
        assert value.shape == ()
        np.testing.assert_allclose(numpy(value), expected, rtol=FLOAT32)
    for function in compiled(schedule.__call__):
        actual = [numpy(function(ops.convert_to_tensor(step))) for step in range(24)]
        np.testing.assert_allclose(actual, values(schedule, 24), rtol=0, atol=2 * FLOAT32)


def test_drives_a_keras_optimizer():
    schedule = WarmupCosine(0.5, total_steps=4, warmup_steps=2, start=0.1)
    optimizer = keras.optimizers.SGD(learning_rate=schedule)
    optimizer = keras.optimizers.SGD.from_config(optimizer.get_config())
    weight = keras.Variable([10.0])
    optimizer.build([weight])
    for step in range(5):
        before = numpy(weight)
        optimizer.apply([ops.ones((1,))], [weight])
        moved = before - numpy(weight)
        np.testing.assert_allclose(moved, slow(step, 0.5, 4, 2, 0.1), atol=2e-6)


def test_value_at_reads_numbers_and_schedules():
    schedule = WarmupCosine(2.0, total_steps=20, warmup_steps=5)
    keras_schedule = keras.optimizers.schedules.ExponentialDecay(3.0, 10, 0.5)
    cases = [(0.07, 0.07), (1, 1.0), (ops.convert_to_tensor(0.5), 0.5)]
    cases += [(schedule, slow(3, 2.0, 20, 5)), (keras_schedule, 3.0 * 0.5**0.3)]
    for value, expected in cases:
        actual = value_at(value, ops.convert_to_tensor(3))
        assert keras.backend.standardize_dtype(actual.dtype) == "float32"
        assert actual.shape == ()
        np.testing.assert_allclose(numpy(actual), expected, rtol=1e-6)


def test_config_round_trip():
    arguments = dict(peak=2.0, total_steps=13, warmup_steps=4, start=0.5, end=1.0, cosine_steps=6)
    arguments |= dict(freeze_steps=2, warmup_reaches_peak=True, cosine_reaches_end=True)
    arguments |= dict(truncate_extra=0.3)
    schedule = WarmupCosine(**arguments)
    assert schedule.get_config() == arguments
    assert {name: getattr(schedule, name) for name in arguments} == arguments
    assert WarmupCosine(1.0, 10).get_config()["cosine_steps"] is None
    for again in (
        deserialize(serialize(schedule)),
        keras.optimizers.schedules.deserialize(keras.optimizers.schedules.serialize(schedule)),
    ):
        assert type(again) is WarmupCosine
        assert again.get_config() == arguments


def test_serialize_leaves_numbers_and_schedules_alone():
    schedule = WarmupCosine(1.0, 10)
    assert serialize(0.07) == 0.07
    assert deserialize(0.07) == 0.07
    assert deserialize(schedule) is schedule
    assert deserialize(None) is None


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(total_steps=0), "`total_steps` must be an integer of at least 1: it counts opti"),
        (dict(total_steps=-5), "times updates per epoch. Received: total_steps=-5."),
        (dict(total_steps=99.6), "Received: total_steps=99.6. Nearest: 100."),
        (dict(total_steps=None), "Received: total_steps=None."),
        (dict(total_steps=True), "Received: total_steps=True."),
        (dict(total_steps=10, warmup_steps=-1), "`warmup_steps` must be an integer of at least 0"),
        (dict(total_steps=10, warmup_steps=11), "Received: warmup_steps=11, total_steps=10."),
        (dict(total_steps=10, cosine_steps=-1), "`cosine_steps` must be an integer of at least 0"),
        (dict(total_steps=10, warmup_steps=4, cosine_steps=7), "warmup_steps=4. Largest: 6."),
        (dict(total_steps=10, freeze_steps=-1), "`freeze_steps` must be an integer of at least 0"),
        (
            dict(total_steps=10, warmup_steps=6, freeze_steps=5),
            "`warmup_steps` and `freeze_steps` must be at most `total_steps`; they count optimizer "
            "updates, not epochs. Received: warmup_steps=6, total_steps=10, freeze_steps=5.",
        ),
        (dict(total_steps=10, cosine_steps=8, freeze_steps=3), "freeze_steps=3. Largest: 7."),
        (dict(total_steps=10, truncate_extra=-0.1), "Received: truncate_extra=-0.1."),
        (dict(total_steps=10, truncate_extra=float("inf")), "`truncate_extra` must be a finite"),
        (
            dict(total_steps=10, truncate_extra=0.5, cosine_reaches_end=False),
            "`truncate_extra` needs `cosine_reaches_end=True`. Received: cosine_reaches_end=False",
        ),
        (dict(total_steps=10, peak=float("nan")), "`peak` must be a finite number"),
        (dict(total_steps=10, end=float("inf")), "`end` must be a finite number"),
        (dict(total_steps=10, start="0.1"), "Received: start='0.1'."),
    ],
)
def test_bad_settings_are_explained(arguments, message):
    with pytest.raises(ValueError) as error:
        WarmupCosine(**{"peak": 1.0, **arguments})
    assert message in str(error.value)


def test_check_range_says_the_rule():
    check_range("x", 0.5, above=0, low=0.5, high=0.5)
    check_range("x", WarmupCosine(0.9, 10, start=7.0, end=1.0), low=0, high=1)  # no warmup
    check_range("x", ops.convert_to_tensor(-1.0), low=0)
    cases = [
        (0.0, {"above": 0}, "`x` must be greater than 0. Received: x=0.0."),
        (float("nan"), {"above": 0}, "Received: x=nan."),
        (1.5, {"low": 0, "high": 1}, "`x` must be at least 0 and at most 1. Received: x=1.5."),
        (-0.1, {"low": 0, "high": 1}, "Received: x=-0.1."),
        (WarmupCosine(0.9, 10, end=1.1), {"high": 1}, "Received: x=WarmupCosine(peak=0.9, tot"),
        (WarmupCosine(0.9, 10, 5, start=-1.0), {"low": 0}, "start=-1.0"),
        (1.0, {"low": 0, "below": 1}, "`x` must be at least 0 and less than 1. Received: x=1.0."),
        ("0.9", {"low": 0}, "must be a number or a schedule, such as `WarmupCosine`. Received"),
        (None, {"low": 0}, "Received: x=None"),
        (WarmupCosine(0.9, 10, freeze_steps=5, end=0.5), {"above": 0}, "freeze_steps=5"),
        (
            keras.optimizers.schedules.PiecewiseConstantDecay([500], [0.9, 1.5]),
            {"high": 1},
            "which is 0.9, 0.9, 0.9, 0.9, 1.5,",
        ),
    ]
    for value, bounds, message in cases:
        with pytest.raises(ValueError) as error:
            check_range("x", value, **bounds)
        assert message in str(error.value)


def test_functions_of_the_step_get_a_float():
    step = ops.convert_to_tensor(3, "int32")
    assert float(value_at(lambda step: 0.07 + 0.01 * step, step)) == pytest.approx(0.1)
    check_range("temperature", lambda step: 0.07 + 0.0 * step, above=0)
    # It reaches 0 in float32, but long after any run it is made for.
    check_range("temperature", keras.optimizers.schedules.ExponentialDecay(0.07, 10, 0.9), above=0)
