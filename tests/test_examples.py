"""The scripts in `examples/`, cut short and run as a user runs them."""

import os
import pathlib
import re
import subprocess
import sys

import keras
from PIL import Image

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"


def run(arguments):
    environment = {**os.environ, "KERAS_BACKEND": keras.config.backend(), "PYTHONUNBUFFERED": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(EXAMPLES.parent), *sys.path])
    process = subprocess.run(
        [sys.executable, *arguments],
        cwd=EXAMPLES,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=600,
    )
    assert process.returncode == 0, process.stdout
    return process.stdout


def test_demo(tmp_path):
    """The demo on few images; it raises if the preset that it writes gives other features."""
    output = run(
        [str(EXAMPLES / "demo_digits.py")] + f"--epochs 1 --digits 40 --output {tmp_path}".split()
    )
    for name in ("raw pixels", "untrained backbone", "trained teacher"):
        assert 0 <= float(re.search(rf"{name} +([\d.]+)%", output)[1]) <= 100
    for name in ("curves.png", "patch_pca.png", "crops.png"):
        with Image.open(tmp_path / name) as picture:
            assert min(picture.size) > 100
    assert (tmp_path / "backbone" / "config.json").exists()
