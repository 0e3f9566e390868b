"""The phenomena and fields of BLiMP's 67 paradigms (Warstadt et al. 2020, table 4), by the names of its files.

Paradigms that its files call s-selection count as argument structure, as in the paper's results.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Kind(NamedTuple):
    phenomenon: str
    field: str


_PARADIGMS = {
    ("anaphor_agreement", "morphology"): "anaphor_gender_agreement anaphor_number_agreement",
    ("argument_structure", "syntax"): "animate_subject_passive animate_subject_trans causative drop_argument "
    "inchoative intransitive passive_1 passive_2 transitive",
    ("binding", "syntax_semantics"): "principle_A_c_command principle_A_case_1 principle_A_case_2 "
    "principle_A_domain_1 principle_A_domain_2 principle_A_domain_3 principle_A_reconstruction",
    ("control_raising", "syntax_semantics"): "existential_there_object_raising existential_there_subject_raising "
    "expletive_it_object_raising tough_vs_raising_1 tough_vs_raising_2",
    ("determiner_noun_agreement", "morphology"): "determiner_noun_agreement_1 determiner_noun_agreement_2 "
    "determiner_noun_agreement_irregular_1 determiner_noun_agreement_irregular_2 determiner_noun_agreement_with_adj_2 "
    "determiner_noun_agreement_with_adj_irregular_1 determiner_noun_agreement_with_adj_irregular_2 "
    "determiner_noun_agreement_with_adjective_1",
    ("ellipsis", "syntax"): "ellipsis_n_bar_1 ellipsis_n_bar_2",
    ("filler_gap_dependency", "syntax"): "wh_questions_object_gap wh_questions_subject_gap "
    "wh_questions_subject_gap_long_distance wh_vs_that_no_gap wh_vs_that_no_gap_long_distance wh_vs_that_with_gap "
    "wh_vs_that_with_gap_long_distance",
    ("irregular_forms", "morphology"): "irregular_past_participle_adjectives irregular_past_participle_verbs",
    ("island_effects", "syntax"): "adjunct_island complex_NP_island "
    "coordinate_structure_constraint_complex_left_branch coordinate_structure_constraint_object_extraction "
    "left_branch_island_echo_question left_branch_island_simple_question sentential_subject_island wh_island",
    ("npi_licensing", "semantics"): "matrix_question_npi_licensor_present npi_present_1 npi_present_2 "
    "only_npi_licensor_present sentential_negation_npi_licensor_present",
    ("npi_licensing", "syntax_semantics"): "only_npi_scope sentential_negation_npi_scope",
    ("quantifiers", "semantics"): "existential_there_quantifiers_1 existential_there_quantifiers_2 "
    "superlative_quantifiers_1 superlative_quantifiers_2",
    ("subject_verb_agreement", "morphology"): "distractor_agreement_relational_noun "
    "distractor_agreement_relative_clause irregular_plural_subject_verb_agreement_1 "
    "irregular_plural_subject_verb_agreement_2 regular_plural_subject_verb_agreement_1 "
    "regular_plural_subject_verb_agreement_2",
}
PARADIGMS = {name: Kind(*kind) for kind, names in _PARADIGMS.items() for name in names.split()}


class Paradigm(NamedTuple):
    """How many pairs of a paradigm a model gets right."""

    name: str
    right: int
    pairs: int


def summary(paradigms: Sequence[Paradigm]) -> dict[str, dict[str, float | list[float]]]:
    """`paradigms`, and where there are some of BLiMP `phenomena` and `fields`: of each the accuracy, which is the mean
    of its paradigms', and under NAME_interval what holds it in 95 of 100 cases, its paradigms being given."""
    groups: dict[str, dict[str, list[Paradigm]]] = {"paradigms": {one.name: [one] for one in paradigms}}
    for one in paradigms:
        if kind := PARADIGMS.get(one.name):
            groups.setdefault("phenomena", {}).setdefault(kind.phenomenon, []).append(one)
            groups.setdefault("fields", {}).setdefault(kind.field, []).append(one)
    return {
        what: {
            key: value
            for name, own in named.items()
            for key, value in ((name, accuracy(own)), (f"{name}_interval", accuracy_interval(own)))
        }
        for what, named in groups.items()
    }


def accuracy(paradigms: Sequence[Paradigm]) -> float:
    return float(np.mean([one.right / one.pairs for one in paradigms]))


def accuracy_interval(paradigms: Sequence[Paradigm], *, samples: int = 1000, seed: int = 0) -> list[float]:
    """95 % by the bootstrap within each paradigm: pairs drawn anew are right as often as a binomial number says."""
    from espalier.intervals import interval

    random = np.random.default_rng(seed)
    drawn = [random.binomial(one.pairs, one.right / one.pairs, samples) / one.pairs for one in paradigms]
    return list(interval(np.mean(drawn, axis=0)))
