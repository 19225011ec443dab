"""The protocol of further loss terms: which ones a model has, and that they go together."""

from types import SimpleNamespace

import keras
import numpy as np
import pytest
import tiny
from golden import numpy

import keras_dinov3 as kd
from keras_dinov3.checks import KINDS
from keras_dinov3.terms import TERMS, Term, merged, terms_of


def test_terms_are_arguments_of_the_model_and_of_a_kind():
    assert tuple(KINDS) == TERMS and set(TERMS) <= set(kd.DINOv3.arguments())
    for kind in KINDS.values():
        assert issubclass(kind, Term)
        term = kind()
        assert len(term.log_weights()) == 1 and all(term.log_weights().values())


def test_terms_of_weight_0_are_left_out():
    terms = {"alignment": kd.PatchAlignment(weight=0), "preserve": kd.Preserve(weight=0.5)}
    assert terms_of(SimpleNamespace(**terms)) == {"preserve": terms["preserve"]}
    model = SimpleNamespace(gram=kd.GramAnchor(weight=0, log_parts=True), alignment=None)
    assert list(terms_of(model)) == ["gram"]  # its parts are logged
    assert merged([{"a": 1}, {}, {"b": 2}]) == {"a": 1, "b": 2}


@pytest.fixture(scope="module")
def trained():
    weight = kd.WarmupCosine(2.0, 8, warmup_steps=2)
    terms = {
        "gram": kd.GramAnchor(resolution_scale=1),
        "alignment": kd.PatchAlignment(weight=weight, min_patches=3),
        "preserve": kd.Preserve(weight=0.5, distance="squared"),
    }
    model = tiny.model(**terms)
    history = model.fit(tiny.images(2 * tiny.B), batch_size=tiny.B, epochs=2, verbose=0).history
    return model, history


def test_all_terms_together(trained):
    """The total is the sum of the terms, each times its weight at the step."""
    model, history = trained
    assert all(0 < loss < 1 for loss in history["alignment_loss"])
    logs = model.train_on_batch(tiny.images(), return_dict=True)
    total, terms = logs.pop("loss"), logs
    pairs, local = tiny.G * (tiny.G - 1), tiny.G * tiny.L
    weights = {
        "dino_global_loss": pairs / (pairs + local),
        "dino_local_loss": local / (pairs + local),
        "ibot_loss": 1.0,
        "koleo_loss": 0.1 * tiny.G,
        "gram_loss": 2.0,
        "alignment_loss": float(model.alignment.weight(4)),
        "preservation_loss": 0.5,
    }
    assert terms.keys() == weights.keys() and weights["alignment_loss"] > 1
    for name in ("gram_loss", "alignment_loss", "preservation_loss"):
        assert terms[name] > 0
    assert total == pytest.approx(sum(weights[name] * terms[name] for name in terms), rel=1e-5)
    assert model.bad_terms() == ([], None)


def test_terms_are_saved_with_the_model(trained, tmp_path):
    model, _ = trained
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    for name, term in terms_of(loaded).items():
        config = term.get_config()
        assert config == getattr(model, name).get_config()
        assert type(term).from_config(config).get_config() == config
        assert not term.trainable_variables
    assert list(terms_of(loaded)) == list(TERMS)
    assert loaded.alignment.pairs == "different" and loaded.preserve.distance == "squared"
    for a, b in zip(model.weights, loaded.weights, strict=True):
        np.testing.assert_array_equal(numpy(a), numpy(b), a.path)


def test_a_term_must_say_what_it_compares():
    class Empty(Term):
        weight = 1.0

    term = Empty()
    assert term.is_on and term.build_for(None) is term and not term.needs_masks
    for call in (term.log_weights, lambda: term.see({}, None, None, None, 0)):
        with pytest.raises(NotImplementedError):
            call()


def test_one_backbone_serves_two_terms_and_stays_the_users(tmp_path):
    backbone = tiny.backbone()
    model = tiny.model(gram=kd.GramAnchor(backbone), preserve=kd.Preserve(backbone))
    assert all(weight.trainable for weight in backbone.weights)
    sides = model.gram.backbone, model.preserve.backbone
    for side in sides:
        assert side is not backbone and not side.trainable
        for a, b in zip(side.get_weights(), backbone.get_weights(), strict=True):
            np.testing.assert_array_equal(a, b)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    for a, b in zip(model.weights, loaded.weights, strict=True):
        np.testing.assert_array_equal(numpy(a), numpy(b))
