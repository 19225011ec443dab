"""Figures show the arrays they are given, where they belong."""

import numpy as np
import pytest

from keras_dinov3.figures import attention_figure, map_figure, norms_figure, similarity_figure


@pytest.fixture
def images():
    return np.random.default_rng(1).integers(0, 256, (3, 8, 12, 3), "uint8")


def shown(figure):
    return [np.asarray(axes.images[0].get_array()) for axes in figure.axes if axes.images]


def test_similarity_figure_marks_the_patch(images):
    similarity = np.random.default_rng(0).uniform(-1, 1, (3, 2, 3))
    figure = similarity_figure(images, similarity, (1, 1, 2))
    pictures = shown(figure)
    for index in range(3):
        np.testing.assert_array_equal(pictures[index], images[index])
        np.testing.assert_array_equal(pictures[3 + index], similarity[index])
    marked = [axes for axes in figure.axes if axes.lines]
    assert len(marked) == 1
    np.testing.assert_array_equal(marked[0].images[0].get_array(), images[1])
    # The middle of patch (1, 2) of four pixels a side; pixels are counted from their middles.
    assert marked[0].lines[0].get_xydata().tolist() == [[9.5, 5.5]]


def test_attention_figure_has_a_picture_for_each_head(images):
    maps = np.random.default_rng(0).random((3, 2, 4, 2, 3))
    for token, title in ((0, "the class token"), (1, "register 1")):
        figure = attention_figure(images, maps, token)
        pictures = shown(figure)
        assert len(pictures) == 3 * 5 and title in figure.get_suptitle()
        np.testing.assert_array_equal(pictures[5], images[1])
        for head in range(4):
            np.testing.assert_array_equal(pictures[6 + head], maps[1, token, head])


def test_norms_figure_marks_what_stands_out(images):
    rng = np.random.default_rng(0)
    outliers = np.zeros((3, 1, 2, 3), bool)
    outliers[2, 0, 1, 0] = True
    norms = {
        "prefix": rng.random((3, 1, 3)),
        "patches": rng.random((3, 1, 2, 3)),
        "outliers": outliers,
    }
    figure = norms_figure(images, norms)
    pictures = shown(figure)
    for index in range(3):
        np.testing.assert_array_equal(pictures[index], images[index])
        np.testing.assert_array_equal(pictures[3 + index], norms["patches"][index, 0])
    marks = [line.get_xydata().tolist() for axes in figure.axes for line in axes.lines]
    assert [[0.0, 1.0]] in marks
    assert f"{1 / 18:.1%}" in figure.get_suptitle()
    labels = figure.axes[-1].get_legend_handles_labels()[1]
    assert labels == ["class token", "register 1", "register 2", "patches"] or set(labels) == {
        "patches",
        "class token",
        "register 1",
        "register 2",
    }


def test_map_figure_names_the_classes():
    points = np.random.default_rng(0).normal(size=(7, 2))
    labels = np.array([4, 4, 9, 9, 9, 4, 2])
    (axes,) = map_figure(points, labels, ["cat", "dog", "emu"]).axes
    drawn = {c.get_label(): np.asarray(c.get_offsets()) for c in axes.collections}
    assert list(drawn) == ["cat", "dog", "emu"]
    np.testing.assert_allclose(drawn["dog"], points[labels == 4])
    (axes,) = map_figure(points).axes
    assert len(axes.collections) == 1 and axes.get_legend() is None
