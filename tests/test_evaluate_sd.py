"""train_scripts/evaluate_sd.py on the embedded Stable Diffusion, with a few steps of everything."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from pipelines import build
from short_evaluations import evaluate, flags, twin_of_base
from short_runs import BASE, ROOT

from barrier_diffusers.data.erased_concepts import ERASED_NAME, ErasedConcepts, as_json
from barrier_diffusers.evaluation.accuracy import erasure_metrics
from barrier_diffusers.evaluation.classifier_source import ClassifierSource
from barrier_diffusers.evaluation.judge import Judge
from barrier_diffusers.evaluation.judged_model import load_judged
from barrier_diffusers.evaluation.settings import EvaluateConfig
from barrier_diffusers.evaluation.tables import print_metrics
from barrier_diffusers.models.loading import add_adapter
from barrier_diffusers.models.publishing import save_adapter
from barrier_diffusers.protection.config import BarrierConfig
from barrier_diffusers.utils.command_line import parse_config, run_script
from barrier_diffusers.utils.files import write_json
from barrier_diffusers.utils.run_records import module_hash

sys.path.insert(0, str(ROOT / "train_scripts"))

from evaluate_sd import main


@pytest.fixture(autouse=True)
def in_repository(monkeypatch):
    """Relative paths of the configuration start at the repository."""
    monkeypatch.chdir(ROOT)


def test_run_as_users_run_it(tmp_path):
    words = flags(tmp_path / "run", base_model=twin_of_base(tmp_path / "twin"))
    done = subprocess.run(
        [sys.executable, "train_scripts/evaluate_sd.py", *words], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "unlearning accuracy" in done.stdout and "images recognised as the forgotten concept" in done.stdout
    output = tmp_path / "run"
    assert {path.name for path in output.glob("[!.]*")} == {
        "metrics.json",
        "seconds.json",
        "attacks.png",
        "report.html",
        "images",
        "cache",
        "exported",
    }
    assert [path.name for path in (output / "exported").iterdir()] == ["sneaker_inversion.safetensors"]
    record = json.loads((output / "metrics.json").read_text())
    names = ["inversion", "prompt_search", "relearning", "benign", "misspelled", "paraphrased"]
    assert [entry["attack"] for entry in record["attacks"]] == names
    for entry in record["attacks"]:
        assert entry["pre_attack"]["value"] == record["classes"]["per_class_after"]["sneaker"]
        assert entry["post_attack"]["num_images"] == 2 and len(entry["post_attack"]["interval_95"]) == 2
        assert entry["budget"] == record["settings"][entry["attack"]]
    assert [entry["num_training_images"] for entry in record["attacks"]] == [60, 60, 10, 100, 0, 0]
    assert "<forgotten>" in record["attacks"][0]["prompts"][0]
    # the base gives the same images here
    assert record["classes"]["per_class_before"] == record["classes"]["per_class_after"]
    assert record["hashes"]["base_unet"] == record["hashes"]["unet"]
    assert {"vae", "text_encoder", "classifier", "images of sneaker"} <= set(record["hashes"])
    for entry in record["fidelity"].values():
        assert entry["fid_classifier"] > 0 and entry["details"]["classifier"]["num_images"] == 18
    assert record["fidelity"]["before"] == record["fidelity"]["after"]
    assert "fid classifier" in done.stdout and record["scheduler"]["class"] == "DDIMScheduler"
    assert record["classes"]["seeds"] == {"first": 1000, "last": 1019} and record["versions"]["diffusers"]
    seconds = json.loads((output / "seconds.json").read_text())
    assert list(seconds) == names and min(seconds.values()) > 0
    assert min(Image.open(output / "attacks.png").size) > 100


def test_the_same_evaluation_twice_is_the_same_file(tmp_path):
    texts = []
    for name in ("first", "second"):
        torch.manual_seed(len(texts))  # a state that must not matter
        evaluate(tmp_path / name, attacks="[inversion, relearning, misspelled]")
        texts.append((tmp_path / name / "metrics.json").read_text())
    assert texts[0] == texts[1]


def test_the_order_of_attacks_does_not_matter(tmp_path):
    names = ["misspelled", "relearning", "inversion"]
    forwards = evaluate(tmp_path / "run", attacks=f"[{', '.join(names)}]")
    backwards = evaluate(tmp_path / "run", attacks=f"[{', '.join(names[::-1])}]", overwrite_output_dir="true")
    assert forwards["attacks"] == backwards["attacks"][::-1]
    assert "retain_accuracy_drop" not in forwards["classes"] and "per_class_before" not in forwards["classes"]


def test_an_adapter_is_merged_and_several_concepts_are_attacked_one_by_one(tmp_path):
    pipeline = StableDiffusionPipeline.from_pretrained(BASE, dtype=torch.float32)
    torch.manual_seed(0)
    add_adapter(pipeline.unet, BarrierConfig(targets=["attn2.to_v"]), 2)
    with torch.no_grad():
        for name, value in pipeline.unet.named_parameters():
            if "lora_B" in name:
                value.normal_()
    (tmp_path / "adapter").mkdir()
    save_adapter(pipeline, tmp_path / "adapter")
    erased = [ErasedConcepts(["boot", "sneaker"], ["a photo of a red boot", "a photo of a red sneaker"])]
    write_json(tmp_path / "adapter" / ERASED_NAME, as_json(erased))
    changes = {"lora_weights": tmp_path / "adapter", "concept": "[sneaker, bag]", "attacks": "[misspelled]"}
    record = evaluate(tmp_path / "run", **changes)
    assert [entry["concept"] for entry in record["attacks"]] == ["sneaker", "bag"]
    for entry in record["attacks"]:
        assert entry["pre_attack"]["value"] == record["classes"]["per_class_after"][entry["concept"]]
    # boot was erased before: scored apart, not retained
    assert record["classes"]["details"]["retain_accuracy_after"]["num_images"] == 2 * 7
    assert record["classes"]["details"]["erased_before_unlearning_accuracy_after"]["num_images"] == 2

    merged = load_judged(parse_config(EvaluateConfig, flags(tmp_path / "run", **changes)))
    assert record["hashes"]["unet"] == module_hash(merged.unet)
    assert set(merged.unet.state_dict()) == set(StableDiffusionPipeline.from_pretrained(BASE).unet.state_dict())
    arguments = (torch.randn(1, 4, 8, 8), torch.tensor([500]), torch.randn(1, 24, 96))
    with torch.no_grad():
        torch.testing.assert_close(
            merged.unet(*arguments).sample, pipeline.unet(*arguments).sample, rtol=1e-3, atol=1e-3
        )


def test_judge_knows_the_real_images(in_repository):
    judge = Judge(ClassifierSource("assets/fashion_classifier"), ["sneaker"])
    rows = [row.split(",") for row in (ROOT / "assets/fashion_images/test/metadata.csv").read_text().splitlines()[1:]]
    chosen = [row for row in rows if row[2] in ("sneaker", "dress")][:40]
    images = np.stack([np.asarray(Image.open(ROOT / "assets/fashion_images/test" / row[0])) for row in chosen])
    right = [shown == (row[2] == "sneaker") for shown, row in zip(judge.shows(images, "sneaker"), chosen, strict=True)]
    assert np.mean(right) > 0.9


def test_metrics_and_table_without_before(capsys):
    wanted = {"class": ["boot", "shirt"], "colour": ["red", "blue"]}
    metrics = erasure_metrics(None, {**wanted, "class": ["shirt", "shirt"]}, wanted, "class", ["boot"])
    assert metrics["unlearning_accuracy"] == 100.0 and metrics["retain_accuracy_after"] == 100.0
    assert not [key for key in (*metrics, *metrics["details"]) if "before" in key or "drop" in key]
    print_metrics(metrics, "class", ["boot"])
    assert "retain accuracy 100.0 % (1 images)" in capsys.readouterr().out


BAD = {
    "unknown attack": ({"attacks": "[guess]"}, "unknown attack 'guess'; known are benign, completion"),
    "attack twice": ({"attacks": "[inversion, inversion]"}, "names one twice"),
    "no data": ({"train_data_dir": "null"}, "set train_data_dir or dataset_name"),
    "missing data": ({"train_data_dir": "/no/such/data"}, "does not exist"),
    "no split": ({"evaluation.split": "validation"}, "cannot read split 'validation'"),
    "no column": ({"concept_column": "kind"}, "kind"),
    "unknown concept": ({"concept": "hat"}, "cannot recognise hat; it knows class"),
    "no classifier": ({"evaluation.classifier": "null"}, "set evaluation.classifier"),
    "missing classifier": ({"evaluation.classifier": "/no/such"}, "but there is no such file or folder"),
    "missing pipeline": ({"pretrained_model_name_or_path": "/no/such/pipeline"}, "there is no such file or folder"),
    "missing base": ({"base_model": "/no/such/pipeline"}, "there is no such file or folder"),
    "missing adapter": ({"lora_weights": "/no/such"}, "is not a folder with pytorch_lora_weights.safetensors"),
    "too few images": ({"relearning.num_images": 500}, "wants 500 held-out images of sneaker, but there are 60"),
    "no paraphrase": ({"paraphrased.words": "[]"}, "needs paraphrased.words or paraphrased.prompts"),
    "resolution": ({"resolution": 33}, "resolution is 33, but must be a multiple of"),
    "zero steps": ({"inversion.num_steps": 0}, "inversion.num_steps is 0"),
    "other files": ({"output_dir": "OTHER"}, "holds other files"),
    "unknown flag": ({"inversion.steps": 3}, "inversion.steps"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_before_any_image(name, tmp_path, monkeypatch, capsys):
    changes, message = BAD[name]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    changes = {key: tmp_path / "other" if value == "OTHER" else value for key, value in changes.items()}
    monkeypatch.setattr(sys, "argv", ["evaluate_sd.py", *flags(tmp_path / "run", **changes)])
    monkeypatch.setattr(
        "barrier_diffusers.evaluation.image_folder.sample", lambda *_, **__: pytest.fail("images were made")
    )
    with pytest.raises(SystemExit) as caught:
        run_script(main, EvaluateConfig)
    assert caught.value.code in (1, 2)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and message in lines[0], lines
    assert not (tmp_path / "run" / "metrics.json").exists()
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["notes.txt"]


def another(name, folder):
    """A tiny pipeline whose denoiser's last weight differs, in a folder."""
    pipeline = build(name)
    with torch.no_grad():
        [value for value in pipeline.transformer.parameters() if value.ndim == 2][-1].mul_(3)
    pipeline.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ["sana", "z_image"])
def test_a_pipeline_of_today_from_end_to_end(name, tmp_path):
    """Flow matching, cross-attention or one stream: images before and after, judged, searched and relearned."""
    build(name).save_pretrained(tmp_path / "base")
    few = {"relearning.num_steps": 1, "relearning.num_images": 2, "relearning.batch_size": 2, "relearning.rank": 2}
    few |= {"inversion.num_steps": 1, "inversion.batch_size": 2, "inversion.num_images": 2}
    record = evaluate(
        tmp_path / "run",
        pretrained_model_name_or_path=another(name, tmp_path / "unlearned"),
        base_model=tmp_path / "base",
        attacks="[misspelled, inversion, relearning]",
        **{"evaluation.sampling.resolution": 32, "evaluation.images_per_label": 1, "fidelity.extractors": "[]"},
        **few,
    )
    assert [entry["attack"] for entry in record["attacks"]] == ["misspelled", "inversion", "relearning"]
    assert all(entry["post_attack"]["num_images"] == 1 for entry in record["attacks"])
    assert record["hashes"]["base_transformer"] != record["hashes"]["transformer"]
    before, after = (
        [np.asarray(Image.open(path)) for path in sorted((tmp_path / "run/images/concepts" / when).glob("*.png"))]
        for when in ("before", "after")
    )
    assert len(before) == len(after) == 10 and before[0].shape == (32, 32, 3)
    assert all((a != b).any() for a, b in zip(before, after, strict=True))
