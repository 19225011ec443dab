"""The scripts of `benchmarks/` run, and what they count is right."""

import json
import os
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import knn
import lora
import measure
import scaling
import sizes
import step
from measure import Setting

TINY = {
    "size": "Ti",
    "num_layers": 1,
    "patch_size": 8,
    "global_crop_size": 32,
    "local_crop_size": 16,
    "num_local_crops": 3,
    "batch_size": 2,
    "prototypes": 11,
}


def flags(**settings):
    return [f"--{name}={value}" for name, value in {**TINY, **settings}.items()]


def test_flops_are_those_of_each_matrix_product():
    setting = Setting(**TINY)
    width, masked = 192, int(setting.masked_counts().sum())

    def product(m, k, n):
        return sum(2 for _ in range(m) for _ in range(n)) * k

    def encoder(patches):  # of one crop: the patch embedding, and the block
        length, head_dim = 1 + 4 + patches, 64
        block = 4 * product(length, width, width)  # query, key, value, output
        block += 3 * product(length, head_dim, length)  # three heads' scores
        block += 3 * product(length, length, head_dim)  # and weighted values
        block += product(length, width, 4 * width) + product(length, 4 * width, width)
        return product(patches, 8 * 8 * 3, width), block

    def head(rows):
        sizes = (width, 2048, 2048, 256, 11)
        return sum(product(rows, k, n) for k, n in zip(sizes, sizes[1:], strict=False))

    (embed_global, block_global), (embed_local, block_local) = encoder(16), encoder(4)
    embed, blocks = 4 * embed_global + 6 * embed_local, 4 * block_global + 6 * block_local
    student_heads = head(4 + 6) + head(masked)
    assert setting.flops() == {
        "teacher": 4 * (embed_global + block_global),
        "student": embed + blocks,
        "heads": head(4) + head(masked) + student_heads,
        "backward": embed + 2 * blocks + 2 * student_heads,
    }


def test_masks_are_as_many_as_block_masking_makes():
    import keras_dinov3 as kd

    for batch_size, size in [(2, 32), (3, 64), (8, 128)]:
        setting = Setting(**{**TINY, "batch_size": batch_size, "global_crop_size": size})
        expected = kd.BlockMasking().target_counts(batch_size, 2, (setting.grid, setting.grid))
        assert sorted(setting.masked_counts()) == sorted(expected)
        masks = setting.batch()["masks"]
        assert masks.shape == (batch_size, 2, setting.grid**2)
        assert sorted(masks.reshape(2 * batch_size, -1).sum(1)) == sorted(expected)


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_exponent_of_an_exact_law(power):
    x = np.array([1.0, 2.0, 4.0, 8.0])
    constant, factor, found = measure.fitted_exponent(x, 3.0 + 2.0 * x**power)
    np.testing.assert_allclose((constant, factor, found), (3.0, 2.0, power), rtol=0.05)
    constant, _, found = measure.fitted_exponent(x[:3], 2.0 * x[:3] ** power)
    assert constant == 0
    np.testing.assert_allclose(found, power)


def test_step_times_every_part(tmp_path, monkeypatch, capsys):
    path = tmp_path / "step.json"
    arguments = flags(num_local_crops=1, json=path, steps=2, fit_steps=0)
    monkeypatch.setattr(sys, "argv", ["step.py", *arguments])
    monkeypatch.setattr(measure, "matmul", lambda dtype: (lambda: None, 2**20))
    step.main()
    content = json.loads(path.read_text())
    rows = {row["part"]: row for row in content["rows"]}
    assert list(rows) == ["step", *step.PARTS]
    assert all(row["median"] > 0 for part, row in rows.items() if part != "backward")
    assert rows["forward"]["median"] > rows["losses"]["median"]
    parts = [rows[part]["GFLOP"] for part in ("teacher", "student", "heads", "backward")]
    np.testing.assert_allclose(rows["step"]["GFLOP"], sum(parts))
    rate = 1e9 * rows["step"]["GFLOP"] / rows["step"]["median"]
    np.testing.assert_allclose(rows["step"]["utilisation"], rate / content["matmul_rate"])
    assert content["setting"]["prototypes"] == 11
    assert "utilisation" in capsys.readouterr().out


def test_scaling_fits_an_axis(tmp_path, monkeypatch):
    path = tmp_path / "scaling.json"
    arguments = flags(json=path, rounds=1)
    axes = ["--axes", "tokens", "--points", "2"]
    monkeypatch.setattr(sys, "argv", ["scaling.py", *arguments, *axes])
    scaling.main()
    rows = json.loads(path.read_text())["rows"]
    assert [row["x"] for row in rows] == [1 + 4 + 16, 1 + 4 + 36]
    assert "exponent" in rows[-1]


def test_sizes_are_traced_once_each(tmp_path, monkeypatch):
    path = tmp_path / "sizes.json"
    arguments = flags(num_local_crops=1, json=path, steps=2)
    monkeypatch.setattr(sys, "argv", ["sizes.py", *arguments, "--sizes", "16:16", "32:16:32"])
    sizes.main()
    content = json.loads(path.read_text())
    assert [row["size"] for row in content["rows"]] == ["16:16", "32:16:32"]
    traces = 0 if keras.config.backend() == "torch" else 1
    assert [row["traces"] for row in content["rows"]] == [traces, traces]
    assert content["after"] == 0
    assert all(row["first"] > 0 < row["median"] and row["memory"] > 0 for row in content["rows"])


def test_knn_beside_scikit_learn(tmp_path, monkeypatch):
    path = tmp_path / "knn.json"
    arguments = ["--bank=400", "--queries=200", "--width=6", "--k=3", "--rounds=1"]
    monkeypatch.setattr(sys, "argv", ["knn.py", *arguments, f"--json={path}"])
    knn.main()
    small, peer, whole = json.loads(path.read_text())["rows"]
    assert (small["bank"], small["queries"], peer["ratio"]) == (40, 2, 1.0)
    assert (whole["bank"], whole["queries"], whole["features"]) == (400, 200, 400 * 6 * 4)
    assert small["median"] > 0 and whole["median"] > 0 and whole["memory"] >= 0


def test_lora_beside_full_training(tmp_path, monkeypatch):
    path = tmp_path / "lora.json"
    names = "full", "query, value"
    arguments = flags(num_local_crops=1, json=path, rank=2, steps=2)
    monkeypatch.setattr(sys, "argv", ["lora.py", *arguments, "--variants", *names])
    monkeypatch.setattr(lora, "in_new_process", lambda function, *arguments: function(*arguments))
    lora.main()
    full, adapted = json.loads(path.read_text())["rows"]
    assert (full["variant"], adapted["variant"]) == names
    width = 192
    adapters = 2 * 2 * 2 * width + width  # of two projections, two matrices of rank 2; mask token
    assert adapted["share"] == pytest.approx(full["share"] * adapters / full_weights(width))
    assert full["trainable"] - adapted["trainable"] == full_weights(width) - adapters
    for row in (full, adapted):
        assert row["gradients"] == 4 * row["trainable"]
        assert 2 * row["gradients"] <= row["optimizer"] < 2 * row["gradients"] + 100
        assert row["median"] > 0
    assert adapted["difference"] < 1e-5 < 1e-2 < adapted["moved"]
    assert "difference" not in full


def test_a_process_of_its_own():
    assert lora.in_new_process(os.getpid) != os.getpid()


def full_weights(width):
    """Numbers of a backbone of one block and four registers, of the Hub's defaults."""
    tokens = (1 + 4 + 1) * width + 8 * 8 * 3 * width + width  # class, registers, mask; patches
    block = 4 * width**2 + 4 * width + 8 * width**2 + 5 * width + 2 * width + 4 * width
    return tokens + block + 2 * width
