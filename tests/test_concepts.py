"""Where concepts come from, several at once and one after another; on the embedded pipeline."""

import json

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from tiny_encoders import FASHION

from barrier_diffusers.data.concepts import ConceptConfig, DataNeeds, concepts_of, load_concepts
from barrier_diffusers.data.encoding import encode_moments, encode_prompts
from barrier_diffusers.data.erased_concepts import (
    ERASED_NAME,
    ErasedConcepts,
    as_json,
    captions_of,
    read_erased,
    rows_about_others,
)
from barrier_diffusers.data.generated_images import write_image_folder
from barrier_diffusers.data.readers import take_evenly
from barrier_diffusers.evaluation.accuracy import erasure_metrics
from barrier_diffusers.evaluation.erasure import (
    ImageEvaluationConfig,
    check_evaluation_prompts,
    make_evaluation_prompts,
)
from barrier_diffusers.models.denoiser import PipelineDenoiser
from barrier_diffusers.models.generation import SamplingConfig
from barrier_diffusers.objectives import ObjectiveConfig
from barrier_diffusers.training import nearest_label
from barrier_diffusers.training.seeds import seeded
from barrier_diffusers.utils.words import mentions, similar_words

SKETCHES = ErasedConcepts(["pencil sketch"], ["a pencil sketch of a red bag", "a pencil sketch of a red boot"])
IMAGES = FASHION.parent / "fashion_images"
FEW = {"num_generated_images": 3, "generation": SamplingConfig(num_inference_steps=1)}


@pytest.fixture(scope="module")
def pipeline():
    return StableDiffusionPipeline.from_pretrained(FASHION, dtype=torch.float32)


@pytest.fixture
def load(pipeline, tmp_path):
    def run(needs=DataNeeds(), erased=(), **settings):  # noqa: B008
        return load_concepts(ConceptConfig(**settings), pipeline, tmp_path / "cache", "hash", 0, needs, erased)

    return run


def pictures(folder, count, columns):
    write_image_folder(folder, np.zeros((count, 32, 32, 3), dtype=np.uint8), columns)


def test_several_classes_each_with_its_anchor(load):
    data = load(concept=["sneaker", "bag"], train_data_dir=str(IMAGES))
    assert set(data.concepts) == {"sneaker", "bag"} and not {"sneaker", "bag"} & set(data.labels)
    anchors = data.anchors(["boot", "coat"], None, 0)
    for caption, anchor in zip(data.forget["text"], anchors, strict=True):
        assert anchor == caption.replace("sneaker", "boot").replace("bag", "coat")


def test_the_nearest_label_is_the_one_whose_prompts_are_answered_most_alike(pipeline, load, tmp_path, monkeypatch):
    monkeypatch.setattr(nearest_label, "NUM_IMAGES", 3)
    labels = ["trouser", "boot", "bag"]
    data = load(concept=["sneaker", "dress"], train_data_dir=str(IMAGES), max_forget_images=20)
    data.labels = labels
    asked = {"resolution": 32, "seed": 5, "batch_size": 2, "cache": tmp_path, "base_hash": "x"}
    chosen = nearest_label.nearest_labels(data, pipeline, **asked)
    denoiser, expected = PipelineDenoiser(pipeline), {}
    for concept in ("sneaker", "dress"):
        mine = [row for row, own in enumerate(data.concepts) if own == concept]
        rows = data.forget.select([mine[place] for place in take_evenly(range(len(mine)), 3, 5)])
        moments, totals = encode_moments(pipeline.vae, rows, "image", 32), dict.fromkeys(labels, 0.0)
        generator = seeded(5, "nearest label", 0)
        for part in [slice(0, 2), slice(2, 3)] * nearest_label.NUM_DRAWS:
            drawn, captions = denoiser.noised(moments[part], generator), rows["text"][part]

            def answer(texts, drawn=drawn):
                with torch.no_grad():
                    return denoiser.predict(
                        pipeline.unet, drawn.noisy, drawn.timesteps, encode_prompts(pipeline, texts)
                    )

            own = answer(captions)
            for label in labels:
                other = answer([caption.replace(concept, label) for caption in captions])
                totals[label] += len(captions) * float((other - own).square().mean())
        expected[concept] = min(totals, key=totals.get)
    assert chosen == expected and chosen["sneaker"] == "boot"
    monkeypatch.setattr(nearest_label, "label_distances", None)  # it is cached
    assert nearest_label.nearest_labels(data, pipeline, **asked) == chosen
    data.nearest = chosen
    for caption, anchor in zip(data.forget["text"], data.anchors(None, None, 0), strict=True):
        assert anchor == caption.replace("sneaker", chosen["sneaker"]).replace("dress", chosen["dress"])


@pytest.mark.parametrize(
    ("column", "concept", "anchor"), [("colour", "red", "blue"), ("style", "pencil sketch", "photo")]
)
def test_by_another_column(load, column, concept, anchor):
    data = load(concept=concept, concept_column=column, train_data_dir=str(IMAGES), max_forget_images=20)
    assert len(data.forget) == 20 and all(concept in caption for caption in data.forget["text"])
    assert not any(f" {concept} " in caption for caption in data.retain["text"])
    assert all(anchor in caption for caption in data.anchors(anchor, None, 0))
    drawn = data.anchors(None, None, 0)
    assert all(any(label in caption for label in data.labels) for caption in drawn)


def test_image_folders(load, tmp_path):
    pictures(tmp_path / "mine", 5, {})
    pictures(tmp_path / "rest", 4, {"text": ["a hat", "a tree", "a hat", "a car"]})
    folders = {"forget_data_dir": str(tmp_path / "mine"), "retain_data_dir": str(tmp_path / "rest")}
    data = load(concept="mug", forget_prompts=["a mug", "my mug"], **folders)
    assert list(data.forget["text"]) == ["a mug", "my mug", "a mug", "my mug", "a mug"]
    assert list(data.retain["text"]) == ["a hat", "a tree", "a hat", "a car"]
    assert data.forget[0]["image"].size == (32, 32) and data.anchors("cup", None, 0)[1] == "my cup"


def test_a_folder_without_captions_needs_prompts(load, tmp_path):
    pictures(tmp_path / "rest", 2, {})
    with pytest.raises(ValueError, match="has no column 'text': set retain_prompts"):
        load(concept="mug", retain_data_dir=str(tmp_path / "rest"), **FEW)


def test_prompts_alone(load, tmp_path):
    settings = {"concept": ["bag", "boot"], "forget_prompts": ["a red bag", "a boot"], "retain_prompts": ["a dress"]}
    settings["retain_prompts"] += ["", "NA", "1984", "more prompts than images to make"]
    data = load(**settings, **FEW)
    assert list(data.retain["text"]) == settings["retain_prompts"]
    assert data.concepts == ["bag", "boot", "bag"] and len(data.retain) == 5
    folders = sorted((tmp_path / "cache").glob("generated-*"))
    times = [folder.stat().st_mtime_ns for folder in folders]
    assert len(folders) == 2 and "prompts" in json.loads((folders[0] / "manifest.json").read_text())
    load(**settings, **FEW)
    assert [folder.stat().st_mtime_ns for folder in sorted((tmp_path / "cache").glob("generated-*"))] == times
    prompts_only = load(DataNeeds(forget_images=False, retain_images=False), **settings, **FEW)
    assert prompts_only.forget.column_names == ["text"]


def test_which_concept_a_prompt_is_about():
    assert concepts_of(["anything"], {"bag": ["bag"]}) == ["bag"]
    names = {"bag": ["bag", "purse"], "shirt": ["shirt"], "t-shirt": ["t-shirt"]}
    assert concepts_of(["a Bag", "two t-shirt", "a purse"], names) == ["bag", "t-shirt", "bag"]


def test_synonyms_are_forgotten_left_out_and_exchanged_like_the_name(load):
    names = ["sneaker", "gym shoe", "boot"]
    data = load(concept="sneaker", concept_synonyms=names[1:], train_data_dir=str(IMAGES), **FEW)
    assert len(data.forget) == 144
    for row, text in enumerate(data.forget["text"]):
        assert mentions(text, names[row % 3]), (row, text)
    assert not any(mentions(text, "boot") for text in data.retain["text"])  # another class of the data
    assert all(mentions(text, "bag") for text in data.anchors("bag", None, 0))
    assert data.config.names == {"sneaker": names}
    erased = ErasedConcepts(["sneaker"], [], data.config.synonyms)
    assert erased.is_named_by(["two gym shoes", "a shoe"]) == [True, False]
    assert as_json([erased, ErasedConcepts(["bag"], [])])[1] == {"concepts": ["bag"], "captions": []}


def test_without_data_the_prompts_are_all_names_of_the_concept():
    names = {"concept": ["sneaker", "bag"], "concept_synonyms": {"sneaker": ["gym shoe"]}}
    config = ConceptConfig(**names, retain_prompts=["a boot"])
    assert config.forget_prompts == ["sneaker", "gym shoe", "bag"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"concept_synonyms": ["Sneakers"]}, "names 'Sneakers', which is already there as 'sneaker'"),
        ({"concept_synonyms": ["gym shoe", "gym-shoe"]}, "already there as 'gym shoe'"),
        ({"concept_synonyms": {"boot": ["wellington"]}}, "words for 'boot', which concept does not name"),
        ({"concept": ["sneaker", "bag"], "concept_synonyms": ["purse"]}, "but there are several concepts"),
        ({"concept_synonyms": [" "]}, "has an empty name"),
        ({"concept_synonyms": ["gym shoe"], "retain_prompts": ["a gym shoe"]}, "names 'gym shoe', which is to be"),
    ],
)
def test_synonyms_that_contradict_something_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        ConceptConfig(**{"concept": "sneaker", **changes})


def test_an_anchor_that_is_a_synonym_is_refused():
    with pytest.raises(ValueError, match="is to be forgotten itself, as it names 'gym shoe'"):
        ObjectiveConfig(anchor="gym shoes").anchors_of(["sneaker"], ["gym shoe"])


def test_what_was_erased_before_is_retained_as_the_model_shows_it_now(load):
    settings = {"concept": "sneaker", "train_data_dir": str(IMAGES), "max_retain_images": 10, **FEW}
    data = load(erased=[SKETCHES], **settings)
    captions = list(data.retain["text"])
    assert captions[10:] == [SKETCHES.captions[0], SKETCHES.captions[1], SKETCHES.captions[0]]
    assert not any("pencil sketch" in caption for caption in captions[:10])
    assert data.retain[12]["image"].size == (32, 32)
    without_images = load(DataNeeds(retain_images=False), erased=[SKETCHES], **settings)
    assert list(without_images.retain["text"]) == captions and without_images.retain.column_names == ["text"]
    unread = load(DataNeeds(retain=False), erased=[SKETCHES], **settings)
    assert len(unread.retain) == 10


def test_nothing_that_is_to_be_forgotten_now_is_retained(load):
    settings = {"concept": "bag", "train_data_dir": str(IMAGES), "max_retain_images": 10, **FEW}
    data = load(erased=[SKETCHES], **settings)
    assert not set(data.forget["text"]) & {*data.retain["text"], *data.retain_captions}
    assert set(data.retain["text"][10:]) == {"a pencil sketch of a red boot"}
    again = load(erased=[ErasedConcepts(["bag"], sorted(set(data.forget["text"])))], **settings)
    assert len(again.retain) == 10 and not set(again.retain_captions) & set(again.forget["text"])


def test_an_edit_reads_captions_alone(load):
    needs = DataNeeds(forget_images=False, retain_images=False, retain=False, edit=True)
    data = load(needs, erased=[SKETCHES], concept="hat", forget_prompts=["a hat"], **FEW)
    assert list(data.forget["text"]) == ["a hat"] * 3
    assert set(data.retain["text"]) == set(SKETCHES.captions) == set(data.retain_captions)


FORMS = {  # caption, names -> words that may be one of them in another form
    "Russian": ("две красные кроссовки", ["кроссовка"], ["кроссовки"]),
    "Russian, no ending": ("пара кроссовок", ["кроссовка"], ["кроссовок"]),
    "German": ("in alten Turnschuhen", ["Turnschuh"], ["turnschuhen"]),
    "Italian": ("tre scarpe", ["scarpa"], ["scarpe"]),
    "Greek": ("δύο γάτες", ["γάτα"], []),  # too short to tell
    "last word of several": ("bei alten Meistern", ["alter Meister"], ["meistern"]),
    "a form that has a rule": ("two sneakers", ["sneaker"], []),
    "another name": ("in den Schuhen", ["Schuh", "Schuhen"], []),
    "another word that begins alike": ("a booth", ["boot"], ["booth"]),
    "a longer word": ("bootstrapping", ["boot"], []),
    "no borders": ("赤いスニーカーズ", ["スニーカー"], []),
    "short": ("a bagel", ["bag"], []),
}


@pytest.mark.parametrize("name", FORMS)
def test_forms_of_a_word_that_no_rule_knows_are_pointed_out(name):
    text, names, expected = FORMS[name]
    assert similar_words(text, names) == expected


def test_a_line_says_which_captions_are_left_out_and_which_may_have_been_meant(load, tmp_path, capsys):
    captions = ["une botte", "rote Turnschuhe", "ein Turnschuh", "zwei Mützen", "eine Mütze", "ein Hut"]
    pictures(tmp_path / "images", 6, {"text": captions, "kind": ["botte", "x", "x", "x", "x", "x"]})
    settings = {"concept": "botte", "concept_column": "kind", "train_data_dir": str(tmp_path / "images"), **FEW}
    data = load(erased=[ErasedConcepts(["Turnschuh"], [], ["Mütze", "Mützen"])], **settings)
    assert sorted(data.retain["text"]) == ["ein Hut", "rote Turnschuhe"]
    said = capsys.readouterr().out
    assert (
        "3 of 5 retain captions are about what was erased before (Turnschuh), like 'ein Turnschuh'; left out" in said
    )
    assert "neither the concept nor what was erased before: 'turnschuhe' in 'rote Turnschuhe'. If" in said
    assert "add them to concept_synonyms, or to the synonyms in the base's erased_concepts.json" in said
    load(erased=[ErasedConcepts(["Turnschuh"], [], ["Turnschuhe", "Mütze", "Mützen"])], **settings)
    said = capsys.readouterr().out
    assert "4 of 5 retain captions" in said and "neither" not in said


def test_record_of_erased_concepts(tmp_path):
    assert read_erased(str(tmp_path)) == [] and read_erased("no/such-repository") == []
    (tmp_path / ERASED_NAME).write_text(json.dumps(as_json([SKETCHES])))
    assert read_erased(str(tmp_path)) == [SKETCHES]
    assert captions_of([SKETCHES, SKETCHES]) == SKETCHES.captions
    assert rows_about_others(["a Pencil Sketch of a hat", "a photo", SKETCHES.captions[0]], [SKETCHES]) == [1]
    for wrong in ("{", '[{"concept": "a"}]'):
        (tmp_path / ERASED_NAME).write_text(wrong)
        with pytest.raises(ValueError, match="cannot be read"):
            read_erased(str(tmp_path))


def test_evaluation_prompts_about_what_was_erased_before():
    own = ConceptConfig(concept="bag", forget_prompts=["a bag"], retain_prompts=["a boot"])
    asked = make_evaluation_prompts(ImageEvaluationConfig(images_per_label=2), own, [SKETCHES])
    assert asked.labels == ["everything else"] * 2 + ["bag"] * 2 + ["pencil sketch"] * 2
    assert asked.erased_before == ["pencil sketch"] and asked.prompts[4:] == SKETCHES.captions
    with pytest.raises(ValueError, match="asks for anything that is retained: set retain_prompts"):
        make_evaluation_prompts(
            ImageEvaluationConfig(classifier=str(FASHION.parent / "fashion_classifier")), ConceptConfig(concept="bag")
        )


def test_looking_at_the_evaluation_prompts_draws_no_random_number():
    evaluation = ImageEvaluationConfig(classifier=str(FASHION.parent / "fashion_classifier"), images_per_label=1)
    config = ConceptConfig(concept="bag", forget_prompts=["a bag"], retain_prompts=["a boot"])
    torch.manual_seed(0)
    expected = torch.rand(())
    torch.manual_seed(0)
    check_evaluation_prompts(evaluation, make_evaluation_prompts(evaluation, config))
    assert torch.rand(()) == expected


def test_metrics_keep_what_was_erased_before_apart():
    wanted = {"class": ["bag", "bag", "boot", "boot"], "style": ["sketch", "photo", "sketch", "photo"]}
    before = {"class": ["bag", "bag", "boot", "boot"], "style": ["photo"] * 4}
    after = {"class": ["boot", "boot", "boot", "bag"], "style": ["sketch", "photo", "photo", "photo"]}
    metrics = erasure_metrics(before, after, wanted, "class", ["bag"], ["sketch"])
    assert metrics["unlearning_accuracy"] == 100
    assert (metrics["retain_accuracy_before"], metrics["retain_accuracy_after"]) == (100, 0)
    assert metrics["details"]["retain_accuracy_after"]["num_images"] == 1
    names = [f"erased_before_unlearning_accuracy_{when}" for when in ("before", "after")]
    assert [metrics[name] for name in names] == [100, 50]
    assert not any("erased" in key for key in erasure_metrics(before, after, wanted, "class", ["bag"]))
