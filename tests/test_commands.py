"""Flags of commands: each says what it is for, and none is lost on the way to its function."""

import argparse
import re

import pytest

from keras_dinov3 import adapt, cli


def actions(name):
    """The flags of a command."""
    (commands,) = (a for a in cli.parser()._actions if isinstance(a, argparse._SubParsersAction))
    return commands.choices[name]._actions


@pytest.mark.parametrize("name", ["convert", "pretrain", "adapt", "evaluate", "report"])
def test_each_flag_has_a_help_text(name, capsys):
    assert all(action.help for action in actions(name))
    with pytest.raises(SystemExit):
        cli.main([name, "--help"])
    assert re.search(rf"usage: keras-dinov3 {name}", capsys.readouterr().out)


def test_defaults_are_those_that_the_help_tells():
    flags = {action.dest: action for action in actions("adapt")}
    assert f"Default: {adapt.GRAM_WEIGHT:g}" in flags["gram_weight"].help
    assert f"default: {adapt.EPOCHS}" in flags["epochs"].help
    arguments = cli.parser().parse_args(["convert", "a", "b"])
    assert (arguments.part, arguments.dtype, arguments.run) == (
        "teacher",
        "float32",
        cli.run_convert,
    )
