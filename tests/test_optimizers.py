import json

import keras
import keras_hub
import meta
import numpy as np
import pytest
import tiny
from golden import Golden, close, numpy
from keras import ops

import keras_dinov3 as kd
from keras_dinov3.roles import Role
from keras_dinov3.schedules import value_at

BACKEND = keras.config.backend()


# The reference's eight steps


@pytest.fixture(scope="module")
def golden():
    return Golden("fb_trajectory")


def golden_model(golden, side, **config):
    """A model with the weights `initial_student`, `final_teacher`, ... on both sides."""
    h = golden.hyperparameters
    model = kd.DINOv3(
        keras_hub.models.DINOV3Backbone(
            patch_size=h["patch"],
            num_layers=h["depth"],
            hidden_dim=h["embed_dim"],
            num_heads=h["num_heads"],
            intermediate_dim=4 * h["embed_dim"],
            num_register_tokens=h["storage"],
            image_shape=(h["gs"], h["gs"], 3),
            layer_norm_eps=1e-6,
        ),
        num_prototypes=h["K"],
        num_patch_prototypes=h["Kp"],
        head_hidden_dim=h["hid"],
        head_bottleneck_dim=h["bot"],
        student_temperature=h["student_temp"],
        dino_weight=h["dino_loss_weight"],
        ibot_weight=h["ibot_loss_weight"],
        koleo_weight=h["kw"],
        augmentation=None,
        masking=None,
        **config,
    )
    for place in ("student", "teacher"):
        meta.load(meta.model_weights(model, place), golden.arrays, f"{side}/")
    return model


def parameters(model, side="student"):
    """The variables behind each parameter of the reference, whose q, k and v are one."""
    return {name: weight.variables for name, weight in meta.model_weights(model, side).items()}


def vectors(model, side):
    """Each parameter as one float64 vector."""
    variables = parameters(model, side)
    return {
        name: np.concatenate([numpy(v).ravel() for v in vs]).astype("float64")
        for name, vs in variables.items()
    }


def golden_settings(golden):
    """Optimizer, teacher temperature and teacher rule of the eight steps."""
    optim, teacher = golden.hyperparameters["optim"], golden.hyperparameters["teacher"]
    epochs, length = optim["epochs"], golden.hyperparameters["OFFICIAL_EPOCH_LENGTH"]

    def schedule(peak, end, **kwargs):
        return kd.WarmupCosine.from_epochs(
            peak,
            epochs,
            length,
            end=end,
            warmup_reaches_peak=True,
            cosine_reaches_end=False,
            **kwargs,
        )

    optimizer = kd.AdamW(
        schedule(optim["lr"], optim["min_lr"], warmup_epochs=optim["warmup_epochs"]),
        weight_decay=schedule(optim["weight_decay"], optim["weight_decay_end"]),
        beta_1=optim["adamw_beta1"],
        beta_2=optim["adamw_beta2"],
        epsilon=golden.hyperparameters["adamw_eps"],
        layerwise_decay=optim["layerwise_decay"],
        patch_embed_multiplier=optim["patch_embed_lr_mult"],
        freeze_last_layer_steps=optim["freeze_last_layer_epochs"] * length,
        part_clipnorm=optim["clip_grad"],
        log=True,
    )
    config = {
        "teacher_temperature": schedule(
            teacher["teacher_temp"],
            teacher["teacher_temp"],
            start=teacher["warmup_teacher_temp"],
            warmup_epochs=teacher["warmup_teacher_temp_epochs"],
        ),
        "teacher_ema": kd.callbacks.TeacherEMA(
            schedule(teacher["momentum_teacher"], teacher["final_momentum_teacher"])
        ),
    }
    return optimizer, config


def golden_crops(golden):
    """The crops of all steps, image-major: axis 0 is step and image."""
    steps, batch_size = golden.hyperparameters["steps"], golden.hyperparameters["B"]

    def image_major(x, num_crops):  # from rows [crop 0 of all images, crop 1 of all images, ...]
        x = x.reshape(steps, num_crops, batch_size, *x.shape[2:])
        return np.moveaxis(x, 1, 2).reshape(steps * batch_size, num_crops, *x.shape[3:])

    crops = {
        name: image_major(np.moveaxis(golden[f"in/{name}"], 2, -1), count)
        for name, count in (("global_crops", 2), ("local_crops", golden.hyperparameters["nl"]))
    }
    return {**crops, "masks": image_major(golden["in/masks"], 2)}


def check_final(golden, model, side):
    other = golden_model(golden, "initial_student")
    initial, weights = vectors(other, side), meta.model_weights(other, side)
    stored = golden.part(f"final_{side}/")  # of the student, a few
    for name in stored.keys() & weights.keys():
        weights[name].load(stored[name])
    names = [name for name in golden.case["param_names"] if name in stored]
    assert len(names) >= (12 if side == "student" else len(initial))
    reference, finals = vectors(other, side), vectors(model, side)
    for name in names:
        actual = finals[name]
        error = np.linalg.norm(actual - reference[name])
        movement = np.linalg.norm(reference[name] - initial[name])
        assert movement > 0 and error <= 1e-2 * movement, (name, error / movement)


def test_golden_trajectory_by_train_on_batch(golden):
    optimizer, config = golden_settings(golden)
    model = golden_model(golden, "initial_student", **config)
    model.compile(optimizer)
    initial, moved = vectors(model, "student"), {"student": [], "teacher": []}
    crops, batch_size = golden_crops(golden), golden.hyperparameters["B"]
    for step in range(golden.hyperparameters["steps"]):
        rows = slice(step * batch_size, (step + 1) * batch_size)
        logs = model.train_on_batch({k: x[rows] for k, x in crops.items()}, return_dict=True)
        for ours, reference in (
            ("loss", "out/total_loss"),
            ("dino_global_loss", "out/dino_global_crops_loss"),
            ("dino_local_loss", "out/dino_local_crops_loss"),
            ("koleo_loss", "out/koleo_loss"),
            ("ibot_loss", "out/ibot_loss"),
        ):
            close(np.array(logs[ours]), golden[reference][step], 1e-4, 0, f"{ours}, step {step}")
        for name in ("backbone", "dino_head", "ibot_head"):
            norm, reference = logs[f"{name}_gradient_norm"], golden[f"out/grad_norm_{name}"]
            close(np.array(norm), reference[step], 1e-3, 0, f"norm of {name}, step {step}")
        for name, key in (("learning_rate", "lr_f64"), ("weight_decay", "weight_decay_f64")):
            reference = golden[f"schedule/{key}"]
            bound = 2e-7 * reference.max()  # float32
            assert logs[name] == pytest.approx(reference[step], rel=0, abs=bound)
        for side in moved:
            now = vectors(model, side)
            moves = [np.linalg.norm(now[n] - initial[n]) for n in golden.case["param_names"]]
            moved[side].append(moves)
    for side, moves in moved.items():
        golden.check(np.array(moves), f"out/{side}_delta_norms")
    check_final(golden, model, "teacher")
    check_final(golden, model, "student")


def test_golden_trajectory_by_fit(golden):
    optimizer, config = golden_settings(golden)
    model = golden_model(
        golden, "initial_student", teacher_temperature=config["teacher_temperature"]
    )
    model.compile(optimizer)
    history = model.fit(
        golden_crops(golden),
        batch_size=golden.hyperparameters["B"],
        shuffle=False,
        verbose=0,
        callbacks=[config["teacher_ema"]],
    ).history
    close(np.mean(history["loss"]), np.mean(golden["out/total_loss"]), 1e-4, 0, "mean loss")
    assert history["learning_rate"] == [pytest.approx(golden["schedule/lr_f64"][-1], rel=1e-6)]
    check_final(golden, model, "teacher")


def test_golden_trajectory_schedules(golden):
    optimizer, config = golden_settings(golden)
    steps = range(golden.hyperparameters["steps"])
    frozen = optimizer.freeze_last_layer_steps
    values = {
        "momentum": config["teacher_ema"].momentum,
        "teacher_temp": config["teacher_temperature"],
        "last_layer_lr": optimizer._learning_rate,
    }
    for name, schedule in values.items():
        reference = golden[f"schedule/{name}_f64"]
        actual = np.array([float(value_at(schedule, step)) for step in steps])
        if name == "last_layer_lr":
            actual[:frozen] = 0
        np.testing.assert_allclose(actual, reference, rtol=0, atol=2e-7 * reference.max())


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_golden_rate_of_a_frozen_last_layer(version):
    golden = Golden("fb_schedules")
    settings = golden.hyperparameters[f"build_schedulers_{version}"]
    epochs, length = settings["optim"]["epochs"], settings["train"]["OFFICIAL_EPOCH_LENGTH"]
    lr = settings["optim"] if version == "v1" else settings["schedules"]["lr"]
    peak, end = (lr["lr"], 1e-6) if version == "v1" else (lr["peak"], lr["end"])
    if version == "v2":
        batch_size = settings["train"]["batch_size_per_gpu"]
        peak, end = (kd.scaled_learning_rate(x, batch_size) for x in (peak, end))
    is_old = version == "v1"
    schedule = kd.WarmupCosine.from_epochs(
        peak,
        epochs,
        length,
        warmup_epochs=lr["warmup_epochs"],
        end=end,
        warmup_reaches_peak=is_old,
        cosine_reaches_end=not is_old,
    )
    optimizer = kd.AdamW(schedule, freeze_last_layer_steps=lr["freeze_last_layer_epochs"] * length)
    optimizer.build([keras.Variable(np.zeros(2, "float32"))])
    rates = []
    for step in range(epochs * length):
        optimizer.iterations.assign(step)
        rates.append(float(optimizer.rates(schedule(step)).last_layer_rate))
    expected = golden[f"build_schedulers_{version}/last_layer_lr_f64"]
    close(np.array(rates), expected, 2e-7, 0)  # float32, as in the step
    assert np.sum(expected == 0) >= 10


def test_multipliers_are_those_of_the_reference(golden):
    optimizer, _ = golden_settings(golden)
    model = golden_model(golden, "initial_student")
    optimizer.build(model.trainable_variables)
    found = parameters(model)
    assert sum(len(variables) for variables in found.values()) == len(model.trainable_variables)
    for name, group in golden.case["param_groups"].items():
        for variable in found[name]:
            multipliers = optimizer.multipliers(variable)
            assert multipliers.rate == pytest.approx(group["lr_multiplier"], rel=1e-12), name
            assert multipliers.decay == group["wd_multiplier"], name
            assert multipliers.is_last_layer == group["is_last_layer"], name


# The formula


SHAPES = [(3, 5), (7,), (1, 1, 4), (5, 2), (2,), (4, 3), ()]
ROLES = [
    Role("backbone", 3, "patch_embed"),
    Role("backbone", 3, decays=False),
    Role("backbone", 1),
    Role("dino_head", 0, "last_layer"),
    Role("dino_head", 0, "head", decays=False),
    Role("ibot_head", 0, "head"),
    None,
]
SETTINGS = {
    "beta_1": 0.8,
    "beta_2": 0.97,
    "epsilon": 0.03,  # large, so that its place in the formula shows
    "layerwise_decay": 0.7,
    "patch_embed_multiplier": 0.2,
    "head_multiplier": 1.5,
    "head_decay_multiplier": 0.4,
    "freeze_last_layer_steps": 2,
    "freeze_backbone_steps": 2,
    "part_clipnorm": 1.3,
}
NUM_STEPS = 6


def rate_schedule():
    return kd.WarmupCosine(0.1, NUM_STEPS, warmup_steps=2, start=0.03, end=0.01)


def decay_schedule():
    return kd.WarmupCosine(0.3, NUM_STEPS, end=1.2)


def variables_and_gradients(roles=ROLES, num_steps=NUM_STEPS):
    rng = np.random.default_rng(0)
    variables = [keras.Variable(rng.normal(size=shape).astype("float32")) for shape in SHAPES]
    for variable, role in zip(variables, roles, strict=True):
        if role is not None:
            variable.role = role
    scales = [3.0, 0.5, 1.0, 0.1, 0.1, 2.0, 1.0]  # one part is below the clipping norm
    gradients = [
        [
            (s * rng.normal(size=shape)).astype("float32")
            for s, shape in zip(scales, SHAPES, strict=True)
        ]
        for _ in range(num_steps)
    ]
    return variables, gradients


def slow(weights, gradients, rates, decays, roles, settings):
    """The docstring's formula in float64, one number after the other; also the last norms."""
    s = settings
    weights = [w.astype("float64") for w in weights]
    means, squares = [0 * w for w in weights], [0 * w for w in weights]
    roles = [role or Role() for role in roles]
    for t, (rate, decay) in enumerate(zip(rates, decays, strict=True), start=1):
        norms = {}
        for role, gradient in zip(roles, gradients[t - 1], strict=True):
            norms[role.part] = norms.get(role.part, 0.0) + np.sum(gradient.astype("float64") ** 2)
        norms = {name: np.sqrt(total) for name, total in norms.items()}
        for i, role in enumerate(roles):
            g = gradients[t - 1][i].astype("float64")
            if s["part_clipnorm"]:
                g = g * min(1.0, s["part_clipnorm"] / (norms[role.part] + 1e-6))
            is_head = role.kind in ("head", "last_layer")
            lr = rate * s["layerwise_decay"] ** role.depth
            lr *= s["patch_embed_multiplier"] if role.kind == "patch_embed" else 1
            lr *= s["head_multiplier"] if is_head else 1
            lr *= role.kind != "last_layer" or t > s["freeze_last_layer_steps"]
            frozen = s["freeze_backbone_steps"]
            lr *= min(max(t - frozen, 0) / frozen, 1) if role.part == "backbone" and frozen else 1
            wd = decay * role.decays * (s["head_decay_multiplier"] if is_head else 1)
            weights[i] = weights[i] * (1 - lr * wd)
            means[i] = s["beta_1"] * means[i] + (1 - s["beta_1"]) * g
            squares[i] = s["beta_2"] * squares[i] + (1 - s["beta_2"]) * g**2
            mean = means[i] / (1 - s["beta_1"] ** t)
            square = squares[i] / (1 - s["beta_2"] ** t)
            weights[i] = weights[i] - lr * mean / (np.sqrt(square) + s["epsilon"])
    return weights, norms


def apply_all(optimizer, gradients, variables):
    for step in gradients:
        optimizer.apply([ops.convert_to_tensor(g) for g in step], variables)


def check_equal(variables, expected, tolerance=3e-6):
    for i, (variable, reference) in enumerate(zip(variables, expected, strict=True)):
        np.testing.assert_allclose(
            numpy(variable), reference, rtol=0, atol=tolerance, err_msg=str(i)
        )


def test_equals_the_formula():
    variables, gradients = variables_and_gradients()
    before = [numpy(v).copy() for v in variables]
    optimizer = kd.AdamW(rate_schedule(), decay_schedule(), log=True, **SETTINGS)
    apply_all(optimizer, gradients, variables)
    rates, decays = rate_schedule().values(), decay_schedule().values()
    expected, norms = slow(before, gradients, rates, decays, ROLES, SETTINGS)
    check_equal(variables, expected)
    logs = {name: float(value) for name, value in optimizer.logs().items()}
    assert logs == {
        "learning_rate": pytest.approx(rates[-1], rel=1e-6),
        "weight_decay": pytest.approx(decays[-1], rel=1e-6),
        "backbone_gradient_norm": pytest.approx(norms["backbone"], rel=1e-6),
        "dino_head_gradient_norm": pytest.approx(norms["dino_head"], rel=1e-6),
        "ibot_head_gradient_norm": pytest.approx(norms["ibot_head"], rel=1e-6),
        "gradient_norm": pytest.approx(norms[""], rel=1e-6),
    }
    assert norms["dino_head"] < SETTINGS["part_clipnorm"] < norms["backbone"]


@pytest.mark.parametrize("name", [*SETTINGS, "learning_rate", "weight_decay", "roles"])
def test_each_setting_matters(name):
    """Else `test_equals_the_formula` could pass without it."""
    results = []
    for is_changed in (False, True):
        roles = [None] * len(ROLES) if is_changed and name == "roles" else ROLES
        variables, gradients = variables_and_gradients(roles)
        settings = {"learning_rate": rate_schedule(), "weight_decay": decay_schedule(), **SETTINGS}
        if is_changed and name != "roles":
            settings[name] = {
                "part_clipnorm": None,
                "freeze_last_layer_steps": 1,
                "freeze_backbone_steps": 1,
                "beta_1": 0.7,
            }.get(name, 0.5)
        apply_all(kd.AdamW(**settings), gradients, variables)
        results.append(np.concatenate([numpy(v).ravel() for v in variables]))
    assert np.max(np.abs(results[0] - results[1])) > 1e-3


def test_for_other_models_it_is_plain_adamw():
    variables, gradients = variables_and_gradients([None] * len(ROLES))
    before = [numpy(v).copy() for v in variables]
    settings = {**SETTINGS, "part_clipnorm": None, "epsilon": 1e-8}
    optimizer = kd.AdamW(0.01, 0.3, **settings)
    apply_all(optimizer, gradients, variables)
    plain = [Role()] * len(ROLES)
    rates, decays = [0.01] * NUM_STEPS, [0.3] * NUM_STEPS
    check_equal(variables, slow(before, gradients, rates, decays, plain, settings)[0])
    others, _ = variables_and_gradients([None] * len(ROLES))
    apply_all(
        keras.optimizers.AdamW(0.01, 0.3, beta_1=0.8, beta_2=0.97, epsilon=1e-10), gradients, others
    )
    check_equal(variables, [numpy(v) for v in others], 1e-5)  # which decays no second time


def test_update_step_alone_equals_apply():
    """On torch, `apply` takes another path: all weights at once."""
    results = []
    for alone in (True, False):
        variables, gradients = variables_and_gradients(num_steps=1)
        optimizer = kd.AdamW(0.1, 0.5, **{**SETTINGS, "part_clipnorm": None})
        optimizer.build(variables)
        tensors = [ops.convert_to_tensor(g) for g in gradients[0]]
        if alone:
            for gradient, variable in zip(tensors, variables, strict=True):
                optimizer.update_step(gradient, variable, 0.1)
        else:
            optimizer.apply(tensors)
        results.append([numpy(v) for v in variables])
    check_equal(results[0], results[1], 1e-6)


def test_excluded_variables_do_not_decay():
    variables, gradients = variables_and_gradients(num_steps=1)
    optimizer = kd.AdamW(0.1, 0.5)
    optimizer.exclude_from_weight_decay(var_list=[variables[0]])
    optimizer.build(variables)
    assert [optimizer.multipliers(v).decay for v in variables] == [0, 0, 1, 1, 0, 1, 1]


def test_frozen_last_layer_stays_while_its_moments_move():
    variables, gradients = variables_and_gradients(num_steps=3)
    last = variables[3]
    before = numpy(last).copy()
    optimizer = kd.AdamW(0.1, 0.5, freeze_last_layer_steps=2)
    apply_all(optimizer, gradients[:2], variables)
    np.testing.assert_array_equal(numpy(last), before)
    assert all(np.all(numpy(moment) != 0) for moment in optimizer.moments(last))
    apply_all(optimizer, gradients[2:], variables)
    assert np.all(numpy(last) != before)


def test_a_missing_gradient_keeps_the_parts_apart():
    variables, gradients = variables_and_gradients(num_steps=1)
    before = [numpy(v).copy() for v in variables]
    optimizer = kd.AdamW(0.1, 0.5, **SETTINGS)
    optimizer.build(variables)
    tensors = [ops.convert_to_tensor(g) for g in gradients[0]]
    with pytest.warns(UserWarning, match="Gradients do not exist"):
        optimizer.apply([None, *tensors[1:]], variables)
    assert np.array_equal(numpy(variables[0]), before[0])
    expected, _ = slow(before[1:], [gradients[0][1:]], [0.1], [0.5], ROLES[1:], SETTINGS)
    check_equal(variables[1:], expected)


def test_bfloat16_weights_stay_bfloat16():
    variable = keras.Variable(np.ones((3, 4), "float32"), dtype="bfloat16")
    optimizer = kd.AdamW(0.1, 0.5, part_clipnorm=1.0, log=True)
    optimizer.apply([ops.ones((3, 4), dtype="bfloat16")], [variable])
    expected = 1 * (1 - 0.1 * 0.5) - 0.1
    np.testing.assert_allclose(numpy(ops.cast(variable, "float32")), expected, rtol=1e-2)


# In Keras


def regression(optimizer, batch_size, epochs=2, **compile_settings):
    """A small network after `fit`: its weights and the optimizer."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(24, 5)).astype("float32"), rng.normal(size=(24, 2)).astype("float32")
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [keras.layers.Input((5,)), keras.layers.Dense(7, activation="gelu"), keras.layers.Dense(2)]
    )
    model.compile(optimizer, loss="mse", **compile_settings)
    model.fit(x, y, batch_size=batch_size, epochs=epochs, shuffle=False, verbose=0)
    return [numpy(w) for w in model.weights], model


def adamw(**kwargs):
    config = {"part_clipnorm": 0.5, "log": True, "epsilon": 1e-3, **kwargs}
    return kd.AdamW(rate_schedule(), decay_schedule(), **config)


def test_accumulated_steps_equal_one_big_batch():
    big, model = regression(adamw(), 8)
    assert int(model.optimizer.iterations) == NUM_STEPS
    small, other = regression(adamw(gradient_accumulation_steps=2), 4)
    assert int(other.optimizer.iterations) == NUM_STEPS
    for a, b in zip(small, big, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)
    for name, value in model.optimizer.logs().items():  # the norm is that of the mean gradient
        assert float(other.optimizer.logs()[name]) == pytest.approx(float(value), rel=1e-5), name
    unclipped, _ = regression(adamw(part_clipnorm=None), 8)
    assert np.max(np.abs(unclipped[0] - big[0])) > 1e-3


def test_loss_scaling_changes_nothing_and_skips_bad_steps():
    plain, _ = regression(adamw(), 8)
    scaled, model = regression(keras.optimizers.LossScaleOptimizer(adamw(), 1024.0), 8)
    for a, b in zip(plain, scaled, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)
    fixed, _ = regression(adamw(loss_scale_factor=1024.0), 8)
    for a, b in zip(plain, fixed, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)
    model.train_on_batch(np.full((8, 5), np.nan, "float32"), np.zeros((8, 2), "float32"))
    assert int(model.optimizer.iterations) == NUM_STEPS
    for a, b in zip(scaled, model.weights, strict=True):
        np.testing.assert_array_equal(a, numpy(b))


@pytest.mark.skipif(BACKEND == "torch", reason="Keras compiles torch models on request only")
def test_compiled_equals_eager():
    compiled, _ = regression(adamw(), 8, jit_compile=True)
    eager, _ = regression(adamw(), 8, run_eagerly=True)
    for a, b in zip(compiled, eager, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)


def full_adamw(**kwargs):
    return kd.AdamW(
        kd.WarmupCosine(1e-2, 20, warmup_steps=2, start=5e-3),
        weight_decay=kd.WarmupCosine(0.04, 20, end=0.4),
        layerwise_decay=0.9,
        patch_embed_multiplier=0.2,
        part_clipnorm=0.5,
        freeze_last_layer_steps=1,
        epsilon=1e-3,  # rounding noise in gradients that are 0 makes no whole steps
        log=True,
        **kwargs,
    )


LOGS = {"learning_rate", "weight_decay"} | {
    f"{part}_gradient_norm" for part in ("backbone", "dino_head", "ibot_head")
}


def test_save_and_load_go_on_exactly(tmp_path):
    model = tiny.model(
        full_adamw(gradient_accumulation_steps=2), backbone=tiny.backbone(num_layers=1)
    )
    before = [numpy(kernel).copy() for kernel in prototypes(model)]
    history = model.fit(tiny.images(12), batch_size=tiny.B, verbose=0).history
    assert set(history) >= LOGS
    assert int(model.step) == int(model.optimizer.iterations) == 1  # and half of the next
    assert history["learning_rate"] == [pytest.approx(5e-3)]
    assert history["weight_decay"] == [pytest.approx(0.04)]
    for a, b in zip(before, prototypes(model), strict=True):
        np.testing.assert_array_equal(a, numpy(b))  # frozen
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert type(loaded.optimizer) is kd.AdamW
    assert loaded.optimizer.get_config() == model.optimizer.get_config()
    for a, b in zip(model.optimizer.variables, loaded.optimizer.variables, strict=True):
        np.testing.assert_array_equal(numpy(a), numpy(b))
    for a, b in zip(model.trainable_variables, loaded.trainable_variables, strict=True):
        assert model.optimizer.multipliers(a) == loaded.optimizer.multipliers(b)
    batch = tiny.images(seed=5)
    for step in range(3):
        expected = model.train_on_batch(batch, return_dict=True)
        actual = loaded.train_on_batch(batch, return_dict=True)
        assert actual == pytest.approx(expected, rel=2e-3 if step else 1e-5)
    assert int(loaded.step) == 3
    for a, b in zip(model.weights, loaded.weights, strict=True):
        np.testing.assert_allclose(numpy(a), numpy(b), rtol=0, atol=1e-6)
    for a, b in zip(before, prototypes(loaded), strict=True):
        assert np.any(a != numpy(b))  # thawed


def prototypes(model):
    heads = (model.student_dino_head, model.student_ibot_head)
    return [head.prototypes.kernel for head in heads]


def test_loss_scaling_of_a_model_with_logs():
    # JAX has no float16 products on a CPU; loss scaling is the same without.
    dtype = "float32" if BACKEND == "jax" else "mixed_float16"
    optimizer = full_adamw()
    if BACKEND == "jax":
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
    model = tiny.model(optimizer, backbone=tiny.backbone(dtype=dtype, num_layers=1))
    assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    before = numpy(model.student.layernorm.gamma).copy()
    for _ in range(12):  # the scale falls until gradients are finite
        logs = model.train_on_batch(tiny.images(), return_dict=True)
        if int(model.optimizer.iterations) == 2:
            break
    assert int(model.step) == int(model.optimizer.iterations) == 2
    assert set(logs) >= LOGS and all(np.isfinite(value) for value in logs.values())
    assert 0 < logs["backbone_gradient_norm"] < 100  # of gradients, not of scaled ones
    assert np.any(numpy(model.student.layernorm.gamma) != before)


def test_logs_are_there_on_request_only():
    for log in (False, True):
        optimizer = kd.AdamW(1e-3, log=log)
        assert optimizer.logs() == {}
        optimizer.build([keras.Variable([1.0])])
        names = {"learning_rate", "weight_decay", "gradient_norm"}
        assert set(optimizer.logs()) == (names if log else set())


# Arguments


def test_config_round_trip():
    optimizer = kd.AdamW(
        rate_schedule(), decay_schedule(), log=True, gradient_accumulation_steps=3, **SETTINGS
    )
    config = json.loads(json.dumps(keras.optimizers.serialize(optimizer)))
    copy = keras.optimizers.deserialize(config)
    assert type(copy) is type(optimizer)
    assert copy.get_config() == optimizer.get_config()
    assert copy.weight_decay.get_config() == decay_schedule().get_config()
    for name, value in SETTINGS.items():
        assert getattr(copy, name) == value != getattr(kd.AdamW(), name), name
    plain = kd.AdamW.from_config(kd.AdamW(1, weight_decay=0.2).get_config())
    assert float(plain.learning_rate) == 1.0 and plain.weight_decay == 0.2


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"learning_rate": -1.0}, "`learning_rate` must be at least 0. Received: learning_rate=-1"),
        ({"learning_rate": kd.WarmupCosine(-1.0, 5)}, "`learning_rate` must be at least 0"),
        ({"learning_rate": "0.1"}, "`learning_rate` must be a number or a schedule"),
        ({"weight_decay": -0.1}, "`weight_decay` must be at least 0. Received: weight_decay=-0.1"),
        ({"weight_decay": kd.WarmupCosine(0.1, 5, end=-1)}, "`weight_decay` must be at least 0"),
        ({"weight_decay": None}, "`weight_decay` must be a number or a schedule"),
        ({"weight_decay": keras.Variable(0.1)}, "`weight_decay` must be a number or a schedule"),
        ({"weight_decay": lambda step: 0.1}, "`weight_decay` must be a number or a schedule"),
        ({"beta_1": 1.0}, "`beta_1` must be at least 0 and less than 1. Received: beta_1=1.0"),
        ({"beta_2": -0.1}, "`beta_2` must be at least 0 and less than 1. Received: beta_2=-0.1"),
        ({"epsilon": 0}, "`epsilon` must be greater than 0. Received: epsilon=0."),
        ({"layerwise_decay": 0.0}, "`layerwise_decay` must be greater than 0 and at most 1"),
        ({"layerwise_decay": 1.1}, "Received: layerwise_decay=1.1"),
        ({"layerwise_decay": kd.WarmupCosine(0.9, 9)}, "`layerwise_decay` must be a number."),
        ({"beta_1": kd.WarmupCosine(0.9, 9)}, "`beta_1` must be a number."),
        ({"freeze_last_layer_steps": True}, "Received: freeze_last_layer_steps=True"),
        ({"patch_embed_multiplier": -1}, "`patch_embed_multiplier` must be at least 0"),
        ({"head_multiplier": -1}, "`head_multiplier` must be at least 0"),
        ({"head_decay_multiplier": -1}, "`head_decay_multiplier` must be at least 0"),
        ({"freeze_last_layer_steps": 1.5}, "updates, that is, epochs times updates per epoch. Rec"),
        ({"freeze_last_layer_steps": -1}, "Received: freeze_last_layer_steps=-1"),
        ({"freeze_backbone_steps": -1}, "Received: freeze_backbone_steps=-1"),
        ({"part_clipnorm": 0}, "`part_clipnorm` must be greater than 0"),
        (
            {"part_clipnorm": 1.0, "clipnorm": 2.0},
            "one way only. Received: part_clipnorm=1.0 and {'clipnorm': 2.0}. Leave one of them",
        ),
    ],
)
def test_bad_arguments_are_explained(arguments, message):
    with pytest.raises(ValueError) as error:
        kd.AdamW(**arguments)
    assert message in str(error.value)


def test_scaled_learning_rate():
    assert kd.scaled_learning_rate(1e-3, 64) == pytest.approx(1e-3)
    assert kd.scaled_learning_rate(1e-3, 1024) == pytest.approx(4e-3)
    assert kd.scaled_learning_rate(1e-3, 2048) == pytest.approx(4e-3 * 2**0.5)
    assert kd.scaled_learning_rate(1e-3, 512, "linear_wrt_256") == pytest.approx(2e-3)
    golden = Golden("fb_schedules")
    settings = golden.hyperparameters["build_schedulers_v2"]
    peak = kd.scaled_learning_rate(
        settings["schedules"]["lr"]["peak"],
        settings["train"]["batch_size_per_gpu"],
        settings["optim"]["scaling_rule"],
    )
    assert peak == pytest.approx(golden["build_schedulers_v2/lr_f64"].max(), rel=1e-12)
    with pytest.raises(ValueError, match="`rule` must be one of .*sqrt_wrt_1024.*rule='square'"):
        kd.scaled_learning_rate(1e-3, 64, "square")
    with pytest.raises(ValueError, match="`batch_size` must be at least 1 .*batch_size=0"):
        kd.scaled_learning_rate(1e-3, 0)
    for batch_size in (float("nan"), float("inf"), "64"):
        with pytest.raises(ValueError, match="`batch_size` must be"):
            kd.scaled_learning_rate(1e-3, batch_size)
    with pytest.raises(ValueError, match="`learning_rate` must be a number"):
        kd.scaled_learning_rate(kd.WarmupCosine(1e-3, 10), 64)


def test_exclusion_from_decay_after_loading(tmp_path):
    optimizer = kd.AdamW(1e-3, 0.5)
    optimizer.exclude_from_weight_decay(var_names=["cls_token"])
    model = tiny.model(optimizer)
    token = model.student.embeddings.cls_token
    optimizer.build(model.trainable_variables)
    assert optimizer.multipliers(token).decay == 0
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    token, optimizer = loaded.student.embeddings.cls_token, loaded.optimizer
    assert optimizer.multipliers(token).decay == 1  # as the docstring says
    optimizer.exclude_from_weight_decay(var_names=["cls_token"])
    assert optimizer.multipliers(token).decay == 0
    optimizer.exclude_from_weight_decay(var_list=[loaded.student.layernorm.gamma])
    assert optimizer.multipliers(token).decay == 1
