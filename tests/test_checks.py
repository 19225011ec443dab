import keras
import numpy as np
import pytest
import tiny

import keras_dinov3 as kd
from keras_dinov3.checks import check_batch


@pytest.fixture(scope="module")
def model():
    return tiny.model()


@pytest.fixture(scope="module")
def crop_model():
    return tiny.model(augmentation=None, masking=None, max_masked_patches=40)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_prototypes": 0}, r"num_prototypes.*at least 1.*Received"),
        ({"num_patch_prototypes": -3}, r"`num_patch_prototypes`.*or None.*Received.*=-3"),
        ({"num_patch_prototypes": 0}, r"`num_patch_prototypes`.*at least 1.*=0"),
        ({"head_num_layers": 0}, "`head_num_layers`.*at least 1"),
        ({"head_hidden_dim": 2.5}, "`head_hidden_dim`.*integer.*2.5"),
        ({"koleo_top_k": 0}, "`koleo_top_k`.*at least 1"),
        ({"sinkhorn_iterations": 0}, "`sinkhorn_iterations`.*at least 1"),
        ({"student_temperature": None}, "`student_temperature`.*number or a schedule"),
        ({"dino_weight": 0, "ibot_weight": 0.0, "koleo_weight": 0}, "At least one loss"),
        ({"masking": "random"}, "`masking`.*RandomMasking.*'random'"),
        ({"augmentation": "none"}, "`augmentation`.*MultiCrop.*'none'"),
        ({"teacher_ema": 0.99}, "`teacher_ema`.*TeacherEMA.*0.99"),
        ({"extras": {"norm": "rms"}}, "`extras`.*EncoderExtras"),
        ({"ibot_average": "images"}, "`ibot_average`.*'crops', 'patches'.*'images'"),
        ({"koleo_distance": "angle"}, "`koleo_distance`.*'angle'"),
        ({"koleo_crops": 0}, "`koleo_crops`.*or None"),
        ({"local_weight": -1}, "`local_weight`.*at least 0"),
        (
            {"augmentation": tiny.multi_crop(num_global_crops=1, num_local_crops=0)},
            "one global crop, no local crop.*dino_weight=0",
        ),
        ({"student_temperature": 0.0}, "student_temperature.*greater than 0"),
        ({"teacher_temperature": kd.WarmupCosine(0.0, 5)}, "teacher_temperature.*greater than 0"),
        ({"koleo_weight": -1.0}, "koleo_weight.*at least 0"),
        ({"dino_weight": float("inf")}, "dino_weight.*less than inf"),
        ({"seed": 1.5}, "`seed` must be an integer.*1.5"),
        ({"teacher": tiny.backbone(num_heads=4)}, "num_heads=2 and 4.*teacher_ema=None"),
        ({"drop_path_rate": 1.0}, "drop_path_rate.*less than 1"),
        ({"max_masked_patches": 0}, "max_masked_patches.*at least 1"),
        ({"centering": "softmax"}, "sinkhorn_knopp.*SoftmaxCentering"),
        (
            {"augmentation": tiny.multi_crop(global_crop_size=30)},
            r"`global_crop_size` must be multiples.*30x30 pixels.*Nearest to 30: 24, 32",
        ),
        (
            {"augmentation": tiny.multi_crop(local_crop_size=(16, 20))},
            r"`local_crop_size`.*Nearest to 20: 16, 24",
        ),
    ],
)
def test_settings(config, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        tiny.model(**config)


def test_a_backbone_without_mask_token():
    with pytest.raises(ValueError, match="use_mask_token=False"):
        tiny.model(backbone=tiny.backbone(use_mask_token=False))
    tiny.model(
        backbone=tiny.backbone(use_mask_token=False), masking=None, ibot_weight=0
    )  # what the message says would work


def test_teacher_of_another_width():
    wide = tiny.backbone(hidden_dim=64)
    with pytest.raises(ValueError, match=r"width 32.*width 64.*teacher_ema=None"):
        tiny.model(teacher=wide)
    assert tiny.model(teacher=wide, teacher_ema=None).teacher is wide


def test_a_teacher_ema_given_later_is_checked_too():
    model = tiny.model(teacher=tiny.backbone(hidden_dim=64), teacher_ema=None)
    with pytest.raises(ValueError, match="must have its architecture"):
        model.fit(tiny.images(), callbacks=kd.callbacks.TeacherEMA(0.9), verbose=0)
    with pytest.raises(ValueError, match="teacher_ema=0.9"):
        model.teacher_ema = 0.9


def test_teachers_that_cannot_be():
    student = tiny.backbone()
    with pytest.raises(ValueError, match="a backbone of its own"):
        tiny.model(backbone=student, teacher=student)
    with pytest.raises(ValueError, match="same channels. Received: 3 and 1"):
        gray = tiny.backbone(image_shape=(*tiny.GLOBAL, 1))
        tiny.model(teacher=gray, teacher_ema=None)
    coarse = tiny.backbone(patch_size=4)
    with pytest.raises(ValueError, match="patch_size=8 and 4.*ibot_weight=0"):
        tiny.model(teacher=coarse, teacher_ema=None)
    tiny.model(teacher=coarse, teacher_ema=None, ibot_weight=0, masking=None)
    with pytest.raises(ValueError, match=r"`global_crop_size`.*patch_size=5"):
        coarse = tiny.backbone(patch_size=5)
        tiny.model(teacher=coarse, teacher_ema=None, ibot_weight=0, masking=None)


def test_weights_of_16_bits():
    with pytest.raises(ValueError, match="bfloat16 weights.*mixed_bfloat16"):
        tiny.model(backbone=tiny.backbone(dtype="bfloat16"))


def test_local_crops_that_are_not_made_may_have_any_size():
    model = tiny.model(augmentation=tiny.multi_crop(num_local_crops=0, local_crop_size=13))
    assert [mean.name for mean in model.term_means] == [
        "dino_global_loss",
        "ibot_loss",
        "koleo_loss",
    ]


def test_predict_says_where_features_are():
    with pytest.raises(NotImplementedError, match="FeatureExtractor.*export_backbone"):
        tiny.model().predict(tiny.images())


def test_compile_takes_no_losses():
    model = tiny.model()
    with pytest.raises(ValueError, match="has its own losses.*'loss': 'mse'.*KNN"):
        model.compile("adam", loss="mse")
    with pytest.raises(ValueError, match="accuracy"):
        model.compile("adam", metrics=["accuracy"])


def test_an_unsupported_backbone():
    with pytest.raises(TypeError, match="DINOV3Backbone"):
        tiny.model(backbone=keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)]))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (tiny.images()[0], r"\(B, H, W, C\)"),
        (tiny.images(channels=1), "3 channels"),
        (np.moveaxis(tiny.images(), -1, 1), r"channels first: use `np.moveaxis"),
        (tiny.images().astype("float32"), r"from 0 to 1.*divide by 255 or cast to uint8"),
        (tiny.images(dtype="float32") * 2 - 1, r"from 0 to 1.*not yet normalised"),
        (tiny.images().astype("int32"), "uint8 from 0 to 255.*int32"),
        (np.where(tiny.images() > 9, np.nan, 0).astype("float32"), "must be finite"),
        (tiny.images(0), "at least one image"),
        (tiny.images(1), r"at least 2.*batch of 1.*koleo_weight=0"),
        (tiny.crops(), r"Ready crops.*Received: keys"),
        (list(tiny.images()), r"\(40, 36, 3\).*for a list of them, `np.stack\(images\)`"),
        ([3, 4], "must come in batches.*starts with int"),
        (17, "must be arrays, or batches of them.*17"),
        ([], "at least one image"),
        (iter([]), "at least one image"),
    ],
)
def test_images_before_any_compute(model, data, message):
    if isinstance(data, dict):
        data = {"crops": data["global_crops"]}
    with pytest.raises((ValueError, TypeError), match=f"(?s){message}"):
        model.fit(data, verbose=0)
    assert int(model.step) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "`batch_size`.*at least 1.*0"),
        ({"batch_size": 2.5}, "`batch_size` must be an integer.*2.5"),
        ({"validation_split": 0.2}, r"validation_data=images\[-n:\]"),
        ({"validation_data": tiny.images(height=30, channels=1)}, "3 channels"),
        ({"validation_data": tiny.images().astype("float32")}, "divide by 255"),
        ({"validation_data": iter([tiny.images()])}, "a generator only once"),
    ],
)
def test_fit_arguments_before_any_compute(model, arguments, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        model.fit(tiny.images(), verbose=0, **arguments)
    assert int(model.step) == 0


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"koleo_top_k": 4}, "at least 5.*koleo_top_k=4"),
        ({"masking": kd.BlockMasking(mask_probability=0.0)}, "masking that hides no patch"),
        ({"masking": kd.RandomMasking(0.01)}, "At least one patch must be masked"),
        (
            {"augmentation": tiny.multi_crop(global_crop_size=(8, 32), global_blur_probability=0)},
            "two rows and two columns.*RandomMasking",
        ),
    ],
)
def test_settings_that_do_not_fit_the_batch(config, message):
    model = tiny.model(**config)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        model.fit(tiny.images(), verbose=0)


def test_one_ready_crop_leaves_no_pair(crop_model):
    crops = tiny.crops(masked=0.2)
    one = {name: crops[name][:, :1] for name in ("global_crops", "masks")}
    with pytest.raises(ValueError, match="one global crop, no local crop"):
        crop_model.train_on_batch(one)


def ready(**changes):
    return {**tiny.crops(masked=0.3), **changes}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (tiny.images(), r"augmentation=None.*ready crops"),
        (ready(extra=np.zeros((4, 1))), "keys.*extra"),
        ({"local_crops": tiny.crops()["local_crops"]}, "global_crops"),
        (ready(global_crops=np.zeros((4, 2, 30, 24, 3), "float32")), "Nearest to 30: 24, 32"),
        (ready(local_crops=np.zeros((4, 3, 16, 12, 3), "float32")), "Nearest to 12: 8, 16"),
        (ready(global_crops=np.zeros((4, 2, 32, 24, 3), "uint8")), "normalised floats"),
        (ready(local_crops=np.zeros((4, 16, 8, 3), "float32")), r"\(B, crops, H, W, C\)"),
        (ready(masks=np.zeros((4, 2, 11), bool)), r"masks.*\(4, 2, 12\).*\(4, 2, 11\)"),
        (ready(masks=np.ones((4, 2, 12), bool)), "96 hidden patches, max_masked_patches=40"),
        (ready(local_crops=np.zeros((3, 3, 16, 8, 3), "float32")), "same"),
        (tiny.crops(), "iBOT loss needs masked patches"),
    ],
)
def test_crops_before_any_compute(crop_model, data, message):
    for train in (crop_model.fit, crop_model.train_on_batch):
        with pytest.raises(Exception, match=f"(?s){message}") as error:
            train(data)
        assert isinstance(error.value, ValueError)
    assert int(crop_model.step) == 0


def test_masks_need_a_mask_token():
    backbone = tiny.backbone(use_mask_token=False)
    model = tiny.model(backbone=backbone, augmentation=None, masking=None, ibot_weight=0)
    with pytest.raises(ValueError, match="use_mask_token=True"):
        model.train_on_batch(tiny.crops(masked=0.3))


def test_heads_that_do_not_divide_the_width():
    with pytest.raises(ValueError, match="hidden_dim=32, num_heads=3"):
        tiny.model(backbone=tiny.backbone(num_heads=3))


@pytest.mark.parametrize("bad", [0.3, float("nan"), 2])
def test_masks_that_are_none(bad):
    ready = tiny.crops(masked=0.3)
    ready["masks"] = np.where(ready["masks"], bad, 0.0)
    model = tiny.model(masking=None, augmentation=None)
    with pytest.raises(ValueError, match="`masks` must be bool, or numbers that are 0 or 1"):
        model.train_on_batch(ready)


def test_crops_in_lists():
    ready = tiny.crops(masked=0.3)
    model = tiny.model(masking=None, augmentation=None)
    with pytest.raises(ValueError, match="Received: list for `global_crops`"):
        model.train_on_batch({**ready, "global_crops": list(ready["global_crops"])})


def test_no_local_and_no_global_crops():
    ready = tiny.crops(masked=0.3)
    model = tiny.model(masking=None, augmentation=None)
    check_batch({**ready, "local_crops": ready["local_crops"][:, :0]}, model)
    with pytest.raises(ValueError, match="at least one crop of each image"):
        check_batch({"global_crops": ready["global_crops"][:, :0]}, model)


def test_numpy_integers_are_integers():
    size = np.int64(5)
    model = tiny.model(num_prototypes=size, sinkhorn_iterations=size, koleo_top_k=np.int32(1))
    assert model.student_dino_head.num_prototypes == 5
