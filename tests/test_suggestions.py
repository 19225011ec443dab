"""What is suggested for the size of a problem: laws, the method's own numbers far out, errors."""

import pytest

from keras_dinov3 import recipes
from keras_dinov3.suggestions import check_plan, suggestions


def suggest(num_images=20_000, batch_size=64, epochs=100, image_size=224, settings=None):
    plan = check_plan(num_images, batch_size, epochs, image_size)
    found = suggestions(settings or {"backbone": {}}, plan)
    return {name: value for name, (value, _) in found.items()}


def test_more_images_want_more_prototypes():
    counts = [suggest(n)["model.num_prototypes"] for n in (64, 1000, 20_000, 10**6, 10**8)]
    assert counts == sorted(counts)
    assert (counts[0], counts[2], counts[-1]) == (64, 256, 65536)
    assert all(count & (count - 1) == 0 for count in counts)  # chunks divide powers of two


def test_longer_runs_have_slower_teachers_and_come_to_the_methods_own_numbers():
    runs = [suggest(10**6, 1000, epochs) for epochs in (1, 10, 100, 10_000)]
    momenta = [run["teacher.momentum"]["peak"] for run in runs]
    assert momenta == sorted(momenta) and momenta[0] >= 0.9 and momenta[-1] == 0.994
    assert all(run["teacher.momentum"]["end"] == 1.0 for run in runs)
    temperature = runs[-1]["model.teacher_temperature"]
    assert (temperature["start"], temperature["peak"], temperature["end"]) == (0.04, 0.07, 0.07)
    assert runs[0]["model.teacher_temperature"] < 0.05
    frozen = [run["optimizer.freeze_last_layer_steps"] for run in runs]
    assert frozen == [10, 100, 1000, 100_000]


def test_the_rate_follows_the_root_of_the_batch():
    peaks = [suggest(batch_size=n)["optimizer.learning_rate"]["peak"] for n in (32, 128, 512)]
    assert peaks[1] / peaks[0] == pytest.approx(2, rel=1e-3)
    assert peaks[2] / peaks[1] == pytest.approx(2, rel=1e-3)


@pytest.mark.parametrize(
    "image_size, patch, large, small",
    [
        (32, 4, 24, 12),
        (64, 8, 48, 24),
        (96, 8, 72, 32),
        (128, 16, 96, 48),
        ((224, 256), 16, 160, 64),
        (512, 16, 224, 96),
        (28, 2, 20, 8),
        (10, 2, 8, 4),
    ],
)
def test_crops_are_whole_patches_within_the_image(image_size, patch, large, small):
    found = suggest(image_size=image_size)
    assert found["backbone.patch_size"] == patch
    assert found["augmentation.global_crop_size"] == large
    assert found["augmentation.local_crop_size"] == small
    assert large % patch == small % patch == 0


def test_a_given_patch_size_decides_the_crops():
    found = suggest(image_size=224, settings={"backbone": {"patch_size": 14}})
    assert "backbone.patch_size" not in found
    assert found["augmentation.global_crop_size"] == 168
    found = suggest(image_size=224, settings={"backbone": {"preset": "some"}})
    assert "backbone.patch_size" not in found and found["augmentation.local_crop_size"] == 64


def test_a_backbone_that_has_weights_is_treated_gently():
    settings = {"backbone": {"preset": "some", "patch_size": 8, "hidden_dim": 1024}}
    new, old = (
        suggest(image_size=64, settings=x) for x in ({"backbone": {"patch_size": 8}}, settings)
    )
    rate = new["optimizer.learning_rate"]["peak"]
    assert old["optimizer.learning_rate"]["peak"] == pytest.approx(rate / 8, abs=1e-8)
    settings["backbone"].pop("hidden_dim")  # as if it were 768
    old_of_usual_width = suggest(image_size=64, settings=settings)
    assert old_of_usual_width["optimizer.learning_rate"]["peak"] == pytest.approx(
        rate / 6, abs=1e-8
    )
    assert old["teacher.momentum"]["peak"] > new["teacher.momentum"]["peak"]
    assert old["optimizer.freeze_backbone_steps"] > 0 and old["optimizer.layerwise_decay"] < 1
    assert not {"optimizer.freeze_backbone_steps", "optimizer.layerwise_decay"} & set(new)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"num_images": 1}, "`num_images`.*at least 2"),
        ({"batch_size": 1}, "`batch_size`.*at least 2"),
        ({"epochs": 0}, "`epochs`.*at least 1"),
        ({"num_images": 20}, "one whole batch.*A batch of 2 would do"),
        ({"image_size": 33}, "must be even"),
        ({"image_size": 4}, "`image_size`.*at least 8"),
        ({"image_size": 100, "settings": {"backbone": {"patch_size": 16}}}, "100: 96, 112"),
    ],
)
def test_errors_teach(arguments, message):
    with pytest.raises(ValueError, match=message):
        suggest(**arguments)


def test_every_suggestion_has_its_reason():
    plan = check_plan(1000, 10, 10, 32)
    for name, (value, reason) in suggestions({"backbone": {}}, plan).items():
        assert value is not None and len(reason) > 10, name
    assert recipes.get("small").suggest(1000, 10, 10, 32).reasons.keys() >= {
        "model.num_prototypes",
        "teacher.momentum",
        "optimizer.learning_rate",
        "model.teacher_temperature",
    }
