"""Data as people have it: each case by name, with an input made on the fly and the right value or the message."""

import unicodedata

import pytest

from barrier_diffusers.data.captions import labels_in_texts, swap_concept
from barrier_diffusers.data.concepts import ConceptConfig
from barrier_diffusers.data.erased_concepts import ErasedConcepts, rows_about_others
from barrier_diffusers.evaluation.attacks.base import rename_concept
from barrier_diffusers.objectives import ObjectiveConfig
from barrier_diffusers.utils.words import mentions

DECOMPOSED = unicodedata.normalize("NFD", "café")

NAMED = {  # what names what: text, name
    "plural": ("two sneakers", "sneaker"),
    "singular of a plural": ("a sneaker", "sneakers"),
    "plural in -es": ("old churches", "church"),
    "plural in -ies": ("babies", "baby"),
    "plural in -ves": ("kitchen knives", "knife"),
    "plural in -oes": ("heroes", "hero"),
    "irregular plural": ("nude people", "nude person"),
    "capitals": ("a RED Sneaker", "sneaker"),
    "sharp s": ("STRASSE", "straße"),
    "two spaces": ("by Van  Gogh", "van gogh"),
    "space that does not break": ("by Van\u00a0Gogh", "van gogh"),
    "hyphen for a space": ("a Van-Gogh sky", "van gogh"),
    "underscore, as tags have": ("van_gogh, sky", "van gogh"),
    "space for a hyphen": ("a t shirt", "t-shirt"),
    "neither": ("a tshirt", "t-shirt"),
    "hyphen that does not break": ("a t\u2011shirt", "t-shirt"),
    "compound": ("a Van Gogh-style sky", "Van Gogh"),
    "genitive": ("Van Gogh's sky", "van gogh"),
    "decomposed accent": (f"a {DECOMPOSED}", "café"),
    "composed accent": ("a café", DECOMPOSED),
    "full width": ("ｓｎｅａｋｅｒ", "sneaker"),
    "invisible character": ("snea\u200bker", "sneaker"),
    "Chinese": ("梵高的画", "梵高"),
    "Japanese": ("赤いスニーカーの写真", "スニーカー"),
    "Latin within Japanese": ("赤いsneakerの写真", "sneaker"),
    "Korean with a particle": ("한국의 음식", "한국"),
    "decomposed Korean": (unicodedata.normalize("NFD", "한국 음식"), "한국"),
    "Thai": ("ภาพแมวสีแดง", "แมว"),
    "Greek capitals": ("ΜΙΑ ΓΑΤΑ", "γατα"),
}
NOT_NAMED = {
    "part of a word": ("shirtless", "shirt"),
    "end of a word": ("a sweatshirt", "shirt"),
    "a word with one letter before": ("a red t-shirt", "shirt"),
    "the same at the beginning": ("T-shirt", "shirt"),
    "other accent": ("a resume", "résumé"),
    "no plural": ("a dres", "dress"),
    "digits": ("sneaker2", "sneaker"),
    "another word": ("a boot", "bag"),
    "nothing": ("", "boot"),
}


@pytest.mark.parametrize("name", NAMED)
def test_a_name_is_found_however_it_is_typed(name):
    text, concept = NAMED[name]
    assert mentions(text, concept)
    assert labels_in_texts([text], ["zebra", concept]) == [concept]
    assert rows_about_others(["a zebra", text], [ErasedConcepts([concept], [])]) == [0]
    for swapped in (swap_concept(text, concept, "<x>"), rename_concept([text], concept, "<x>")[0]):
        assert "<x>" in swapped and not mentions(swapped, concept)
    if text.isascii():
        with pytest.raises(ValueError, match="names .* which is to be forgotten itself"):
            ObjectiveConfig(name="rl", anchor_prompt=text).anchors_of([concept])


@pytest.mark.parametrize("name", NOT_NAMED)
def test_other_words_are_not_found(name):
    text, concept = NOT_NAMED[name]
    assert not mentions(text, concept) and labels_in_texts([text], [concept]) == [None]
    assert rows_about_others([text], [ErasedConcepts([concept], [])]) == [0]
    with pytest.raises(ValueError, match="does not name the concept"):
        swap_concept(text, concept, "x")


EXCHANGED = {  # caption, concept, other words -> the caption with these
    "one": ("a photo of a red Sneaker", "sneaker", "boot", "a photo of a red boot"),
    "plural": ("two sneakers and a sneaker", "sneaker", "ankle boot", "two ankle boots and a ankle boot"),
    "plural in -es": ("two sneakers", "sneaker", "church", "two churches"),
    "nothing else changes": ("A  Van-Gogh   sky,  é", "van gogh", "Monet", "A  Monet   sky,  é"),
    "a token has no plural": ("sneakers", "sneaker", "<token>", "<token>"),
    "decomposed": (f"a {DECOMPOSED} in {DECOMPOSED[:3]}", "café", "bar", "a bar in caf"),
    "Japanese": ("赤いスニーカーの写真", "スニーカー", "ブーツ", "赤いブーツの写真"),
    "a backslash is no pattern": ("a boot", "boot", r"\1", r"a \1"),
}


@pytest.mark.parametrize("name", EXCHANGED)
def test_words_are_exchanged(name):
    caption, concept, words, expected = EXCHANGED[name]
    assert swap_concept(caption, concept, words) == expected


REFUSED_ANCHORS = {  # settings of the objective, concepts
    "the concept": ({"anchor": "sneaker"}, ["sneaker"]),
    "but for case": ({"anchor": "Sneaker"}, ["sneaker"]),
    "but for a space": ({"anchor": " sneaker "}, ["sneaker"]),
    "but for a hyphen": ({"anchor": "van-gogh"}, ["Van Gogh"]),
    "its plural": ({"anchor": "sneakers"}, ["sneaker"]),
    "a kind of it": ({"anchor": "old sneaker"}, ["sneaker"]),
    "another concept of the list": ({"anchor": ["boot", "Sneaker"]}, ["sneaker", "bag"]),
    "a prompt that names it": ({"anchor_prompt": "a photo of a SNEAKER"}, ["sneaker"]),
}


@pytest.mark.parametrize("name", REFUSED_ANCHORS)
def test_an_anchor_that_names_the_concept_is_refused(name):
    settings, concepts = REFUSED_ANCHORS[name]
    with pytest.raises(ValueError, match=r"objective.anchor(_prompt)? .* names .* to be forgotten itself"):
        ObjectiveConfig(**settings).anchors_of(concepts)


def test_anchors_that_are_retained_are_accepted():
    assert ObjectiveConfig(anchor="t-shirt").anchors_of(["shirt"]) == ["t-shirt"]
    assert ObjectiveConfig(anchor="shirt").anchors_of(["t-shirt"]) == ["shirt"]
    assert ObjectiveConfig(anchor="pickup truck").anchors_of(["truck"], labels=True) == ["pickup truck"]


REFUSED_CONCEPTS = {
    "blank": ({"concept": " "}, "concept is empty"),
    "twice": ({"concept": ["sneaker", "Sneakers"]}, "names 'Sneakers' twice, also as 'sneaker'"),
    "retain prompt": (
        {"concept": "sneaker", "retain_prompts": ["a boot", "two Sneakers"]},
        "retain prompt 'two Sneakers' names 'sneaker'",
    ),
}


@pytest.mark.parametrize("name", REFUSED_CONCEPTS)
def test_concepts_that_would_train_against_themselves_are_refused(name):
    settings, message = REFUSED_CONCEPTS[name]
    with pytest.raises(ValueError, match=message):
        ConceptConfig(**settings)
