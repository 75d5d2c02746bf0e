"""What is measured on generated images, against numbers worked out by hand; the scripts' files; the embedded DDPM."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from ddpm_models import LABELS, Place
from PIL import Image

from barrier_diffusers.evaluation.judge import Judge
from barrier_diffusers.evaluation.manifold import entropy, inception_score, precision_recall
from barrier_diffusers.models.generation import SamplingConfig, generate
from barrier_diffusers.utils.command_line import parse_config
from barrier_diffusers.utils.files import file_names
from ddpm_ext import evaluate as evaluate_script
from ddpm_ext import sample as sample_script
from ddpm_ext.loading import load_pipeline
from ddpm_ext.metrics import evaluate, make_evaluation_labels, make_judge, real_images
from ddpm_ext.pipeline import ClassConditionalDDPMPipeline
from ddpm_ext.settings import EvaluateConfig, LabelEvaluationConfig, LabelledDataConfig

ROOT = Path(__file__).resolve().parent.parent
FASHION = ROOT / "assets" / "fashion_ddpm"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return Place(tmp_path_factory.mktemp("ddpm"))


def test_precision_and_recall_by_hand():
    real = torch.tensor([[0.0], [1.0], [2.0], [10.0]])  # distances to the nearest other: 1, 1, 1, 8
    generated = torch.tensor([[0.5], [2.9], [19.0], [19.5]])  # 2.4, 2.4, 0.5, 0.5
    found = precision_recall(real, generated, neighbours=1)
    assert found == {"precision": 50.0, "recall": 75.0}  # 19 and 19.5 lie 9 and more from 10; 10 lies in no ball
    assert precision_recall(real, real, neighbours=2) == {"precision": 100.0, "recall": 100.0}
    with pytest.raises(ValueError, match="4 neighbours"):
        precision_recall(real, generated, neighbours=4)


def test_equal_rows_are_their_own_neighbours_once():
    rows = torch.zeros(5, 3)
    assert precision_recall(rows, rows + 1, neighbours=1) == {"precision": 0.0, "recall": 0.0}


def test_inception_score_and_entropy_by_hand():
    sure = torch.eye(4)
    assert inception_score(sure) == pytest.approx(4)
    assert inception_score(sure[:1].repeat(7, 1)) == pytest.approx(1)
    assert inception_score(torch.full((5, 4), 0.25)) == pytest.approx(1)
    half = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.5, 0.5]])  # marginal 1/4, 1/2, 1/4
    assert inception_score(half) == pytest.approx(math.exp(0.5 * math.log(2)))
    assert entropy(half).tolist() == pytest.approx([math.log(2)] * 2)
    assert entropy(sure).tolist() == [0.0] * 4
    with pytest.raises(ValueError, match="at least one image"):
        inception_score(half[:0])


def test_ink_is_black_on_white_padded_to_the_judges_side(place):
    judge = make_judge(LabelEvaluationConfig(str(place.judge), rendering="ink"), LABELS)
    judge.classifier.resolution = 11
    photo = np.full((2, 8, 8, 1), 255, np.uint8)
    shown = judge.render(photo)
    assert shown.shape == (2, 11, 11, 3) and shown.dtype == np.uint8
    assert (shown[:, 1:9, 1:9] == 0).all() and shown.sum() == 2 * 3 * 255 * (121 - 64)
    plain = make_judge(LabelEvaluationConfig(str(place.judge)), LABELS).render(photo)
    assert plain.shape == (2, 8, 8, 3) and (plain == 255).all()


def test_every_retained_label_is_compared(place):
    pipeline, data = load_pipeline(str(place.base)), LabelledDataConfig(str(place.data))
    config = LabelEvaluationConfig(str(place.judge), images_per_label=3)
    assert len(real_images(config, data, pipeline, ["boot"])) == 16
    assert len(real_images(config, data, pipeline, [])) == 24
    assert real_images(LabelEvaluationConfig(str(place.judge), split=None), data, pipeline, []) is None
    questions = make_evaluation_labels(
        LabelEvaluationConfig(images_per_label=3, images_per_retained_label=2), LABELS, ["boot"]
    )
    assert questions.labels == ["boot"] * 3 + ["bag"] * 2 + ["coat"] * 2


def test_the_scores_of_known_answers(place, monkeypatch):
    config = LabelEvaluationConfig(str(place.judge), images_per_label=2, neighbours=1)
    judge, questions = make_judge(config, LABELS), make_evaluation_labels(config, LABELS, ["boot"])
    images = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 1), dtype=np.uint8)
    # asked: boot boot bag bag coat coat; before all right, after boot is seen as bag once and coat as boot once
    answers = [[1, 1, 0, 0, 2, 2], [0, 1, 0, 0, 1, 2]]
    beliefs = iter([torch.eye(3)[rows] for rows in answers])
    monkeypatch.setattr(Judge, "probabilities", lambda *_: next(beliefs))
    embedded, features = [], judge.extractor.features
    monkeypatch.setattr(judge.extractor, "features", lambda *given: embedded.append(len(given[0])) or features(*given))
    scores = evaluate(config, judge, questions, images, images, images[2:])
    assert (scores["unlearning_accuracy"], scores["forget_accuracy_after"]) == (50.0, 50.0)
    assert (scores["retain_accuracy_before"], scores["retain_accuracy_after"]) == (100.0, 75.0)
    assert scores["forget_entropy_before"] == scores["forget_entropy_after"] == 0
    same = scores["retained_after"]  # the generated images are the real ones
    assert same["precision_classifier"] == same["recall_classifier"] == 100
    assert same["fid_classifier"] == pytest.approx(0, abs=1e-4)
    assert scores["retained_before"]["is_classifier"] == pytest.approx(2)
    assert embedded == [4, 4, 4]  # real, before, after: each set once
    assert same["details"]["num_images"] == 4 and scores["seeds"] == {"first": 1000, "last": 1005}


def twin_of(base, folder):
    """A copy with other bytes that gives the same images: a bias of zeros is minus zero."""
    pipeline = load_pipeline(str(base))
    bias = pipeline.unet.conv_norm_out.bias
    assert not bias.any()
    with torch.no_grad():
        bias.neg_()
    pipeline.save_pretrained(folder)
    return folder


def test_a_pipeline_that_is_its_own_base(place, tmp_path):
    words = place.words(tmp_path / "judged", {"pretrained_model_name_or_path": place.base, "concept": "boot"})
    words = [word for word in words if word not in ("--report_to", "none")]
    words += ["--base_model", str(place.base), "--evaluation.judge", str(place.judge)]
    with pytest.raises(ValueError, match="has the weights of what is judged, so before and after are the same"):
        evaluate_script.main(parse_config(EvaluateConfig, words))


def test_evaluate_and_sample_scripts(place, tmp_path, capsys):
    words = place.words(tmp_path / "judged", {"pretrained_model_name_or_path": place.base, "concept": "boot"})
    words = [word for word in words if word not in ("--report_to", "none")]
    short = {
        "base_model": twin_of(place.base, tmp_path / "twin"),
        "evaluation.judge": place.judge,
        "evaluation.images_per_label": 5,
    }
    short["evaluation.sampling.num_inference_steps"] = 2
    words += [word for name, value in short.items() for word in (f"--{name}", str(value))]
    evaluate_script.main(parse_config(EvaluateConfig, words))
    scores = json.loads((tmp_path / "judged" / "evaluation.json").read_text())
    assert scores["retain_accuracy_drop"] == 0 and scores["num_images"] == 15
    assert scores["retained_before"] == scores["retained_after"]
    assert {"weights_hash", "folder"} < set(scores["judge"]) and scores["scheduler"] == "DDIMScheduler"
    config = sample_script.SampleConfig(
        pretrained_model_name_or_path=str(place.base),
        output_dir=str(tmp_path / "samples"),
        labels=["coat"],
        images_per_label=2,
        scheduler="ddpm",
        sampling=SamplingConfig(2, 1.0),
    )
    sample_script.main(config)
    assert sorted(path.name for path in (tmp_path / "samples").glob("[!.]*")) == ["coat_0.png", "coat_1.png"]
    assert Image.open(tmp_path / "samples" / "coat_0.png").size == (8, 8)
    with pytest.raises(ValueError, match="nobody judges"):
        EvaluateConfig(
            pretrained_model_name_or_path="x",
            output_dir="y",
            data=LabelledDataConfig("z"),
            evaluation=LabelEvaluationConfig(None),
        )


def test_labels_that_are_paths_stay_in_the_folder(place, tmp_path):
    pipeline = load_pipeline(str(place.base))
    labels = ["../../x", "/etc/..", ".hidden"]
    ClassConditionalDDPMPipeline(pipeline.unet, pipeline.scheduler, labels, 2).save_pretrained(tmp_path / "base")
    config = sample_script.SampleConfig(
        pretrained_model_name_or_path=str(tmp_path / "base"),
        output_dir=str(tmp_path / "a" / "samples"),
        images_per_label=1,
        sampling=SamplingConfig(1, 1.0),
    )
    sample_script.main(config)
    written = {path.relative_to(tmp_path / "a" / "samples").as_posix() for path in (tmp_path / "a").rglob("*.png")}
    assert written == {"_.._x_0.png", "_etc__0.png", "hidden_0.png"} and not list(tmp_path.glob("*.png"))


def test_file_names_differ_and_are_short():
    texts = ["a/b", "a b", "A_b", "a/b", "..", "", "x" * 300]
    names = file_names(texts)
    assert names == {"a/b": "a_b", "a b": "a_b-2", "A_b": "A_b-3", "..": "_", "": "_-2", "x" * 300: "x" * 40}


def test_the_embedded_ddpm_draws_what_is_asked(monkeypatch):
    monkeypatch.chdir(ROOT)
    pipeline = load_pipeline(str(FASHION))
    size = sum(path.stat().st_size for path in (FASHION / "unet").iterdir())
    assert size < 6e6 and len(pipeline.labels) == 10
    labels = ["trouser", "bag", "boot", "t-shirt"] * 2
    images = generate(pipeline, labels, SamplingConfig(15, 3.0))
    judge = make_judge(LabelEvaluationConfig(rendering="ink"), pipeline.labels)
    answers = judge.recognise(judge.probabilities(judge.render(images)))
    assert sum(answer == label for answer, label in zip(answers, labels, strict=True)) >= 7
