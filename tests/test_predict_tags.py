"""Entities in tags: equal to seqeval's on any sequence, and to what conlleval printed."""

import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st
from seqeval import scheme as seqeval_schemes
from seqeval.metrics import f1_score, precision_score, recall_score
from seqeval.metrics.sequence_labeling import get_entities

from espalier.predict.tags import entities, scheme_of, strict_entities
from finetune.tasks.tag.metrics import MostFrequent, metrics, one_tag

TYPES = ("-PER", "-LOC", "-a-b", "")


def sequences(prefixes: str):
    """Sentences of any tags: most are malformed."""
    tags = st.sampled_from([prefix + kind for prefix in prefixes for kind in TYPES] + ["O"] * 3)
    return st.lists(tags, max_size=8)


def pairs(prefixes: str):
    """Right and predicted tags of a few sentences, as long as each other."""
    tags = st.sampled_from([prefix + kind for prefix in prefixes for kind in TYPES] + ["O"] * 3)
    return st.lists(st.lists(st.tuples(tags, tags), min_size=1, max_size=8), min_size=1, max_size=5)


@given(sequences("BIES"))
def test_entities_are_those_of_seqeval(tags):
    assert [(kind, begin, end - 1) for kind, begin, end in entities(tags)] == get_entities(tags)


@pytest.mark.parametrize("scheme, prefixes", [("IOB2", "BI"), ("IOB1", "BI"), ("IOBES", "BIES")])
def test_strict_entities_are_those_of_seqeval(scheme, prefixes):
    @given(sequences(prefixes))
    def check(tags):
        (theirs,) = seqeval_schemes.Entities([tags], getattr(seqeval_schemes, scheme)).entities
        assert strict_entities(tags, scheme) == [(entity.tag, entity.start, entity.end) for entity in theirs]

    check()


@pytest.mark.parametrize("scheme, prefixes", [("IOB2", "BI"), ("IOB1", "BI"), ("IOBES", "BIES")])
def test_figures_are_those_of_seqeval(scheme, prefixes):
    @given(pairs(prefixes))
    def check(sentences):
        right, predicted = ([[pair[side] for pair in sentence] for sentence in sentences] for side in (0, 1))
        found, _ = metrics(right, predicted, scheme)
        strict = {"mode": "strict", "scheme": getattr(seqeval_schemes, scheme)}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = {
                "f1": f1_score(right, predicted),
                "precision": precision_score(right, predicted),
                "recall": recall_score(right, predicted),
                "strict_f1": f1_score(right, predicted, **strict),
            }
        assert {name: found[name] for name in expected} == pytest.approx(expected)

    check()


CHUNKS = """
rarely B-ADVP I-ADVP|even B-ADVP I-ADVP|under B-PP B-PP|the B-NP O|circumstances I-NP I-NP|, O O|they B-NP B-NP
"""


def test_where_conlleval_and_the_strict_reading_differ():
    """An I behind an O begins an entity for conlleval, which published tables use, and none strictly (seqeval#57)."""
    cells = [cell.split() for cell in CHUNKS.strip().split("|")]
    right, predicted = ([row[column] for row in cells] for column in (1, 2))
    # Two adverbs of one word each are right, and predicted as one of two: no hit. circumstances is no whole phrase.
    assert entities(predicted) == [("ADVP", 0, 2), ("PP", 2, 3), ("NP", 4, 5), ("NP", 6, 7)]
    assert strict_entities(predicted, "IOB2") == [("PP", 2, 3), ("NP", 6, 7)]
    found, rows = metrics([right], [predicted], "IOB2")
    assert found == pytest.approx(
        {"f1": 4 / 9, "precision": 2 / 4, "recall": 2 / 5, "strict_f1": 4 / 7, "accuracy": 4 / 7}
    )
    assert {row["name"]: (row["hit"], row["right"], row["predicted"]) for row in rows} == {
        "ADVP": (0, 2, 1), "NP": (1, 2, 2), "PP": (1, 1, 1),
    }  # fmt: skip


@pytest.mark.parametrize(
    "tags, scheme",
    [
        ("O B-a I-a O", "IOB2"),
        ("B-a B-a O", "IOB2"),
        ("O I-a I-a O I-b B-b", "IOB1"),
        ("O I-a I-a B-a O", "IOB1"),
        ("O B-a E-a S-b", "IOBES"),
        ("O B-a L-a U-b", "IOBES"),
        ("B M E S S", "IOBES"),
        ("O B I I O", "IOB2"),
        ("I-a E-a O", "IOE2"),
        ("NOUN VERB X", None),
        ("B-a I-a X", None),
        ("O O", None),
        ("I O", None),
        ("-LRB- NN $, B", None),
    ],
)
def test_schemes_are_told_by_the_use_of_tags(tags, scheme):
    assert scheme_of([tags.split()]) == scheme


def test_other_letters_of_iobes_mean_the_same():
    """Word segmentation (B, M, E, S) and BILOU; in its default mode seqeval takes neither (seqeval#71)."""
    assert entities("B M E S B E".split()) == [("_", 0, 3), ("_", 3, 4), ("_", 4, 6)]
    bilou = "B-x I-x L-x U-y O B-y L-x".split()
    theirs = seqeval_schemes.Entities([bilou], seqeval_schemes.BILOU).entities[0]
    assert strict_entities(bilou, "IOBES") == [(entity.tag, entity.start, entity.end) for entity in theirs]


def test_tags_of_words_have_accuracy_and_figures_of_each():
    from sklearn.metrics import f1_score

    right, predicted = "N N V A A V".split(), "N V V A N D".split()
    found, rows = metrics([right[:2], right[2:]], [predicted[:2], predicted[2:]], None)
    each = dict(
        zip("ADNV", f1_score(right, predicted, labels=list("ADNV"), average=None, zero_division=0), strict=True)
    )
    assert {row["name"]: row["f1"] for row in rows} == pytest.approx(each)
    assert found == pytest.approx({"accuracy": 0.5, "macro_f1": sum(each.values()) / 4})


def test_the_baseline_is_the_most_frequent_tag_of_each_word():
    baseline = MostFrequent([["Paris", "is", "Paris"], ["Paris", "is"]], [["L", "O", "P"], ["L", "O"]])
    assert baseline.tags([["Paris", "was"], []]) == [["L", "L"], []]
    baseline = MostFrequent([["a", "b", "c"]], [["O", "O", "X"]])
    assert baseline.tags([["c", "new"]]) == [["X", "O"]]


def test_one_tag_for_all_is_warned_of():
    warning = one_tag([["O", "B-x"]], [["O", "O"]])
    assert warning and warning.startswith("warning: every validation word is tagged 'O'") and "\n" not in warning
    assert one_tag([["O", "O"]], [["O", "O"]]) is None and one_tag([["O", "B-x"]], [["O", "B-x"]]) is None
