"""Alphabets and label encoders."""

import pytest

from lemma_fast.recognizers import charset
from lemma_fast.recognizers.charset import collapse_ctc, filter_label
from lemma_fast.training.data.labels import (
    encode_ctc_labels,
    encode_focus_labels,
    encode_prior_labels,
)


@pytest.mark.parametrize(
    ("name", "text", "ids"),
    [
        ("FOCUS", "09az", [1, 10, 11, 36]),
        ("PRIOR", "az190", [1, 26, 27, 35, 36]),
        ("MORAN", "0az", [0, 10, 35]),
        ("ASTER", "0aZ~", [0, 10, 61, 93]),
        ("PARSEQ", "0aZ~", [1, 11, 62, 94]),
    ],
)
def test_class_ids_are_the_published_ones(name, text, ids):
    alphabet = getattr(charset, name)
    assert alphabet.encode(text) == ids
    assert alphabet.decode([*ids, alphabet.end, *ids]) == text


def test_special_ids_are_left_out():
    assert charset.ASTER.decode([10, 96, 11, 94, 12]) == "ab"
    assert charset.PARSEQ.decode([11, 96, 12]) == "ab"


def test_unknown_character_is_named():
    with pytest.raises(ValueError, match="'!'"):
        charset.FOCUS.encode("a!")


def test_filter():
    assert filter_label("Don't, CAFÉ 42²") == "dontcaf42"


def test_focus_labels_shift_right_and_pad():
    labels = encode_focus_labels(["Ab", "", "1"], pad_to=4)
    assert labels.inputs.tolist() == [[0, 11, 12, 0], [0, 0, 0, 0], [0, 2, 0, 0]]
    assert labels.targets.tolist() == [[11, 12, 0, 0], [0, 0, 0, 0], [2, 0, 0, 0]]
    assert labels.lengths.tolist() == [3, 1, 2]
    assert labels.live().sum(1).tolist() == [3, 1, 2]


def test_focus_label_that_does_not_fit_is_named():
    with pytest.raises(ValueError, match="'abc' and its end need 4 positions, pad_to is 3"):
        encode_focus_labels(["a", "abc"], pad_to=3)


def test_prior_labels_keep_a_null_inside_the_word():
    """The published quirk: this stream is not filtered."""
    assert encode_prior_labels(["Don't"], 7).tolist() == [[4, 15, 14, 0, 20, 0, 0]]
    assert encode_prior_labels(["Don't"], 7, filtered=True).tolist() == [[4, 15, 14, 20, 0, 0, 0]]


def test_prior_labels_are_cut():
    assert encode_prior_labels(["abcd"], 2).tolist() == [[1, 2]]


def test_ctc_labels_and_greedy_paths():
    labels = encode_ctc_labels(["b0", "", "A!"])
    assert labels.targets.tolist() == [12, 1, 11]
    assert labels.lengths.tolist() == [2, 0, 1]
    # a blank between two equal classes keeps both
    assert collapse_ctc([0, 5, 5, 0, 5, 6, 6, 0]) == [5, 5, 6]
