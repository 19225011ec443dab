"""The protocol of further loss terms: which ones a model has, and that they go together."""

from types import SimpleNamespace

import pytest
import tiny

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


def test_all_terms_together():
    terms = {name: kind() for name, kind in KINDS.items()}
    terms["alignment"].min_patches = 3
    model = tiny.model(**terms)
    logs = model.fit(tiny.images(2 * tiny.B), batch_size=tiny.B, verbose=0).history
    for name in ("gram_loss", "alignment_loss", "preservation_loss"):
        assert logs[name][0] > 0
    assert model.bad_terms() == ([], None)


def test_a_term_must_say_what_it_compares():
    class Empty(Term):
        weight = 1.0

    term = Empty()
    assert term.is_on and term.build_for(None) is term and not term.needs_masks
    for call in (term.log_weights, lambda: term.see({}, None, None, None, 0)):
        with pytest.raises(NotImplementedError):
            call()
