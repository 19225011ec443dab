"""The rules of the package that a reader relies on, checked in its source."""

import ast
import pathlib
import re

import pytest

import keras_dinov3

PACKAGE = pathlib.Path(keras_dinov3.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
MODULES = {path.relative_to(PACKAGE).as_posix(): path.read_text() for path in FILES}

ENGINES = ("torch", "jax", "tensorflow")  # and jaxlib, torchvision, tensorflow_text, ...
IMPORTERS = ("__import__", "importlib.import_module")
BACKEND_QUESTIONS = ("keras.config.backend", "keras.backend.backend", "keras.src.backend.backend")


def backend_specific(source, name):
    """Lists `name:line: what` for imports of an engine and for questions about the backend."""
    tree = ast.parse(source)
    full_names = imported_names(tree)
    found = []
    for node in ast.walk(tree):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            modules = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Call) and full_name(node.func, full_names) in IMPORTERS:
            modules = [arg.value for arg in node.args if isinstance(arg, ast.Constant)]
        elif isinstance(node, ast.Attribute | ast.Name):
            modules = [full_name(node, full_names)]
        elif isinstance(node, ast.Constant) and node.value == "KERAS_BACKEND":
            found.append((node.lineno, "reads KERAS_BACKEND"))
        for module in modules:
            if str(module).startswith(ENGINES) and not isinstance(node, ast.Attribute | ast.Name):
                found.append((node.lineno, f"imports {module}"))
            elif module in BACKEND_QUESTIONS:
                found.append((node.lineno, f"asks {module}"))
    return [f"{name}:{line}: {what}" for line, what in sorted(set(found))]


def imported_names(tree):
    """What each imported name stands for: `from keras import ops as o` gives o: keras.ops."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                first = alias.name.split(".")[0]
                names[alias.asname or first] = alias.name if alias.asname else first
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    return names


def full_name(node, names):
    """`a.b.c` with `a` replaced by what was imported under that name, or None."""
    if isinstance(node, ast.Name):
        return names.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        owner = full_name(node.value, names)
        return owner and f"{owner}.{node.attr}"
    return None


def calls_of_print(source, name):
    return [
        f"{name}:{node.lineno}: print"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and full_name(node.func, {}) == "print"
    ]


def asserts(source, name):
    return [
        f"{name}:{node.lineno}: assert"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Assert)
    ]


def not_a_name_list(source, name):
    """Statements other than imports, a docstring and the assignment of `__all__`."""

    def allowed(node):
        if isinstance(node, ast.Assign):
            return [ast.unparse(target) for target in node.targets] == ["__all__"]
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        return docstring or isinstance(node, ast.Import | ast.ImportFrom)

    return [
        f"{name}:{node.lineno}: {type(node).__name__}"
        for node in ast.parse(source).body
        if not allowed(node)
    ]


def undescribed_arguments(source, name):
    """Arguments that a docstring with an `Args:` section forgets; a class documents `__init__`."""
    missing = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef | ast.ClassDef):
            continue
        docstring, function = ast.get_docstring(node) or "", node
        if isinstance(node, ast.ClassDef):
            methods = [item for item in node.body if isinstance(item, ast.FunctionDef)]
            function = next((item for item in methods if item.name == "__init__"), None)
        if function is None or "Args:" not in docstring:
            continue
        section = docstring.split("Args:")[1]
        arguments = function.args.posonlyargs + function.args.args + function.args.kwonlyargs
        missing += [
            f"{name}:{node.lineno}: {node.name} does not describe `{argument.arg}`"
            for argument in arguments
            if argument.arg not in ("self", "cls")
            and not re.search(rf"^ *([\w`]+, )*`?{argument.arg}\b[^:]*:", section, re.MULTILINE)
        ]
    return missing


@pytest.mark.parametrize("name", sorted(MODULES))
def test_only_the_backend_package_knows_the_backend(name):
    if name == "backend/__init__.py":
        assert backend_specific(MODULES[name], name) == []
    elif name.startswith("backend/"):
        assert backend_specific(MODULES[name], name)  # else the checker has gone blind
    else:
        assert backend_specific(MODULES[name], name) == []


@pytest.mark.parametrize("name", sorted(MODULES))
def test_errors_are_raised_and_only_the_command_line_prints(name):
    assert asserts(MODULES[name], name) == []
    if name != "cli.py":
        assert calls_of_print(MODULES[name], name) == []


def test_the_package_is_flat_and_guessable():
    assert {path.parent for path in FILES} == {PACKAGE, PACKAGE / "backend"}
    assert not {"utils.py", "common.py", "base.py"} & set(MODULES)


def test_the_whole_training_step_can_be_read_in_one_sitting():
    assert len(MODULES["model.py"].splitlines()) <= 400


def test_init_lists_the_public_names_and_nothing_else():
    assert not_a_name_list(MODULES["__init__.py"], "__init__.py") == []
    assert sorted(set(keras_dinov3.__all__)) == sorted(keras_dinov3.__all__) != []
    for name in keras_dinov3.__all__:
        assert hasattr(keras_dinov3, name), name


def test_every_public_name_has_a_docstring_of_its_own():
    for name in keras_dinov3.__all__:
        thing = getattr(keras_dinov3, name)
        # A class without one would show its parent's.
        assert vars(thing).get("__doc__") if isinstance(thing, type) else thing.__doc__, name


@pytest.mark.parametrize("name", sorted(MODULES))
def test_docstrings_describe_every_argument(name):
    assert undescribed_arguments(MODULES[name], name) == []


# ---- the checkers can fail ----


@pytest.mark.parametrize(
    "line, what",
    [
        ("import torch", "imports torch"),
        ("import numpy, jax.numpy as jnp", "imports jax.numpy"),
        ("from tensorflow import data", "imports tensorflow"),
        ("from torchvision.io import read_image", "imports torchvision.io"),
        ("import importlib; importlib.import_module('jax')", "imports jax"),
        ("from importlib import import_module as load; load('jax')", "imports jax"),
        ("__import__('torch')", "imports torch"),
        ("import keras; keras.config.backend()", "asks keras.config.backend"),
        ("import keras; keras.backend.backend()", "asks keras.backend.backend"),
        ("from keras import config as c; c.backend()", "asks keras.config.backend"),
        ("import keras.config as c; ask = c.backend", "asks keras.config.backend"),
        ("from keras.config import backend", "asks keras.config.backend"),
        ("from keras import backend as b; b.backend()", "asks keras.backend.backend"),
        ("import os; os.environ['KERAS_BACKEND']", "reads KERAS_BACKEND"),
    ],
)
def test_checker_sees_backend_specific_code(line, what):
    source = f'"""Text."""\n\n\ndef function():\n    {line}\n'
    assert f"file.py:5: {what}" in backend_specific(source, "file.py")


@pytest.mark.parametrize(
    "line",
    [
        '"""Set KERAS_BACKEND=torch, or import torch."""',
        "from keras import ops; ops.convert_to_tensor(1)",
        "from keras_dinov3 import backend; backend.after_step(1, 2, 3)",
        "from keras_dinov3.backend import after_step",
        "from . import backend",
        "import keras; keras.backend.epsilon()",
        "torch_like = tensor.backend",
    ],
)
def test_checker_lets_other_code_pass(line):
    assert backend_specific(line, "file.py") == []


def test_other_checkers_can_fail():
    assert calls_of_print("x = 1\nprint(x)", "a.py") == ["a.py:2: print"]
    assert asserts("def f(x):\n    assert x", "a.py") == ["a.py:2: assert"]
    source = '"""Text."""\n\nimport os\n\n__all__ = ["os"]\nVERSION = 1\n\ndef f(): ...\n'
    assert not_a_name_list(source, "a.py") == ["a.py:6: Assign", "a.py:8: FunctionDef"]

    source = '''
class Layer:
    """A first thing.

    Args:
        second, third: Numbers.
    """

    def __init__(self, first, second, third, *args):
        """Undocumented here."""

def f(number, *, count=1):
    """Does it.

    Args:
        number: The count: of things.
    """
'''
    assert undescribed_arguments(source, "a.py") == [
        "a.py:2: Layer does not describe `first`",
        "a.py:12: f does not describe `count`",
    ]
