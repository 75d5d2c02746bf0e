"""Protocols of evaluate_sd.py on the embedded pipeline, on prompt files, and on images made earlier."""

import csv
import json
import sys
import time

import pytest
import torch
from forks import Script
from PIL import Image
from safetensors.torch import save_file
from short_evaluations import twin_of_base
from short_runs import BASE, ROOT

from barrier_diffusers.data.prompt_files import PromptRow, write_prompts
from barrier_diffusers.evaluation.lpips import alexnet
from barrier_diffusers.evaluation.nudity import PARTS
from barrier_diffusers.evaluation.settings import EvaluateConfig
from barrier_diffusers.utils.command_line import parse_config, run_script

sys.path.insert(0, str(ROOT / "train_scripts"))

from evaluate_sd import main

CLASSIFIER = "assets/fashion_classifier"
EXTRACTORS = f"[classifier={CLASSIFIER}]"
WORDS = {
    "pretrained_model_name_or_path": str(BASE),
    "resolution": 32,
    "attacks": "[]",
    "evaluation.sampling.num_inference_steps": 2,
    "evaluation.images_per_label": 2,
    "fidelity.kid_subsets": 3,
}
DATA = {"train_data_dir": "assets/fashion_images", "evaluation.classifier": CLASSIFIER}


def as_flags(output, **changes):
    settings = {**WORDS, **changes, "output_dir": output}
    return [word for name, value in settings.items() if value is not None for word in (f"--{name}", str(value))]


def evaluate(output, **changes):
    main(parse_config(EvaluateConfig, as_flags(output, **changes)))
    return json.loads((output / "metrics.json").read_text())


@pytest.fixture(autouse=True)
def in_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture
def prompts(tmp_path):
    """Five sneakers and three others, with seeds of their own."""
    things = ["sneaker"] * 5 + ["dress", "bag", "coat"]
    rows = [PromptRow(str(100 + i), f"a photo of a red {word}", 40 + i, None, word) for i, word in enumerate(things)]
    write_prompts(tmp_path / "prompts.csv", rows)
    return tmp_path / "prompts.csv"


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    """An AlexNet of random weights, as torchvision saves it."""
    path = tmp_path_factory.mktemp("backbone") / "alexnet.safetensors"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_file({f"features.{name}": value for name, value in alexnet().state_dict().items()}, path)
    return path


def test_killed_in_the_middle_and_restarted_is_the_same_file(tmp_path):
    changes = {**DATA, "concept": "sneaker", "evaluation.images_per_label": 4, "fidelity.extractors": EXTRACTORS}
    changes |= {"evaluation.sampling.num_inference_steps": 5, "evaluation.sampling.batch_size": 4}
    evaluate(tmp_path / "whole", **changes)
    killed = tmp_path / "killed"
    script = Script("barrier_diffusers.scripts.evaluate_sd", as_flags(killed, **changes), tmp_path / "said")
    while len(made := list(killed.glob("images/concepts/after/*.png"))) < 8:
        assert script.is_running, f"it ended before it could be killed: {script.output[-2000:]}"
        time.sleep(0.02)
    script.kill()
    made = list(killed.glob("images/concepts/after/*.png"))
    assert 8 <= len(made) < 40 and not (killed / "metrics.json").exists()
    times = {path.name: path.stat().st_mtime_ns for path in made}
    evaluate(killed, **changes)
    assert (killed / "metrics.json").read_bytes() == (tmp_path / "whole/metrics.json").read_bytes()
    names = [path.name for path in (tmp_path / "whole/images/concepts/after").iterdir()]
    assert len(names) == 42
    for name in names:
        parts = [folder / "images/concepts/after" / name for folder in (killed, tmp_path / "whole")]
        assert parts[0].read_bytes() == parts[1].read_bytes()
    for name, moment in times.items():
        assert (killed / "images/concepts/after" / name).stat().st_mtime_ns == moment
    with pytest.raises(ValueError, match="holds another run; name another folder or set --overwrite_output_dir"):
        evaluate(killed, **changes)  # finished


def test_style_with_classifier_lpips_clip_and_fidelity(tmp_path, clip_folder, backbone, capsys):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_file(
            {f"features.{name}": value for name, value in alexnet().state_dict().items()}, tmp_path / "a.safetensors"
        )
    style = {**DATA, "protocol": "style", "concept_column": "style", "concept": "pencil sketch"}
    style |= {"base_model": twin_of_base(tmp_path / "twin"), "lpips.weights": backbone, "clip": clip_folder}
    record = evaluate(tmp_path / "run", **style, **{"fidelity.extractors": EXTRACTORS})
    assert record["classes"]["per_style_after"].keys() == {"photo", "pencil sketch"}
    assert record["classes"]["details"]["class_accuracy_after"]["num_images"] == 2  # of the photos
    lpips = record["lpips"]
    assert (lpips["forgotten"], lpips["retained"], lpips["difference"]) == (0, 0, 0)  # the base gives the same images
    assert lpips["details"]["num_forgotten"] == lpips["details"]["num_retained"] == 2
    score = record["clip_score"]
    assert score["before"] == score["after"] and score["after"]["details"]["forgotten"]["num_images"] == 2
    assert record["fidelity"]["after"]["details"]["classifier"]["num_reference_images"] == 300  # photos alone
    printed = capsys.readouterr().out
    assert "LPIPS before - after" in printed and "CLIP score" in printed and "fid classifier" in printed


def test_lpips_and_clip_suffice_for_styles(tmp_path, clip_folder, backbone, prompts):
    first = evaluate(tmp_path / "one", **{**style_of(prompts), "clip": clip_folder})
    assert "classes" not in first and first["clip_score"]["after"]["details"]["retained"]["num_images"] == 3
    with torch.random.fork_rng():
        save_file(
            {f"features.{name}": value for name, value in alexnet().state_dict().items()}, tmp_path / "a.safetensors"
        )
    evaluate(tmp_path / "two", **{**style_of(prompts), "clip": clip_folder, "evaluation.sampling.guidance_scale": 9})
    folders = {"images_dir": "two", "base_images_dir": "one"}
    folders = {name: tmp_path / run / "images/concepts/after" for name, run in folders.items()}
    folders |= {"pretrained_model_name_or_path": None, "lpips.weights": backbone}
    compared = evaluate(tmp_path / "three", **{**style_of(None), **folders})
    assert compared["lpips"]["forgotten"] > 0 and compared["lpips"]["details"]["num_forgotten"] == 5
    assert compared["images_made_from"]["sampling"]["guidance_scale"] == 9
    assert {"images", "base_images"} <= set(compared["hashes"])


def style_of(file):
    return {"protocol": "style", "concept": "sneaker", "prompts.file": file}


def test_prompt_files_and_folders_give_what_the_pipeline_gives(tmp_path, prompts):
    asked = {"concept": "sneaker", "prompts.file": prompts, "evaluation.classifier": CLASSIFIER}
    made = evaluate(tmp_path / "made", **asked)
    folder = tmp_path / "made/images/concepts/after"
    assert {path.name for path in folder.glob("*.png")} == {f"{100 + index}_0.png" for index in range(8)}
    details = made["classes"]["details"]
    assert details["unlearning_accuracy"]["num_images"] == 5
    assert details["retain_accuracy_after"]["num_images"] == 3
    judged = {"concept": "sneaker", "evaluation.classifier": CLASSIFIER, "pretrained_model_name_or_path": None}
    again = evaluate(tmp_path / "again", **judged, images_dir=folder)
    assert again["classes"] == made["classes"] and "unet" not in again["hashes"]
    assert again["images_made_from"]["hashes"]["unet"] == made["hashes"]["unet"]
    assert not (tmp_path / "again/images").exists()


def test_lists_of_prompts_and_an_attack_that_needs_no_image(tmp_path):
    lists = {"forget_prompts": '["a photo of a red sneaker"]', "retain_prompts": '["a photo of a red bag"]'}
    record = evaluate(
        tmp_path / "run", **lists, concept="sneaker", attacks="[misspelled]", **{"evaluation.classifier": CLASSIFIER}
    )
    assert record["classes"]["details"]["retain_accuracy_after"]["num_images"] == 2
    assert record["attacks"][0]["pre_attack"]["value"] == 100 - record["classes"]["unlearning_accuracy"]
    assert (tmp_path / "run/attacks.png").is_file()


def test_nudity_on_a_pipeline_and_on_photographs(tmp_path, prompts, capsys):
    pytest.importorskip("nudenet")
    data = pytest.importorskip("skimage").data
    record = evaluate(tmp_path / "run", protocol="nudity", **{"nudity.file": prompts, "nudity.images_per_prompt": 2})
    assert record["nudity"]["after"]["num_images"] == 16 and "before" not in record["nudity"]
    assert "attacks" not in record and "classes" not in record
    folder = tmp_path / "photographs"
    folder.mkdir()
    for index, photo in enumerate((data.astronaut, data.coffee, data.rocket)):
        Image.fromarray(photo()).save(folder / f"{index}_0.png")
    write_prompts(folder / "prompts.csv", [PromptRow(str(index), "a photo", index) for index in range(3)])
    judged = {"protocol": "nudity", "images_dir": folder, "pretrained_model_name_or_path": None}
    counts = evaluate(tmp_path / "judged", **judged)["nudity"]["after"]
    assert counts["images_with"] == dict.fromkeys(PARTS, 0) and counts["num_images"] == 3
    assert counts["threshold"] == 0.6 and counts["details"]["version"].startswith("3.")
    assert "exposed parts at 0.6" in " ".join(capsys.readouterr().out.split())


def test_coco_and_nudity_in_one_run(tmp_path, clip_folder, prompts, capsys):
    pytest.importorskip("nudenet")
    captions = tmp_path / "captions.csv"
    with (ROOT / "assets/fashion_images/test/metadata.csv").open() as file:
        rows = list(csv.DictReader(file))[:40:2]
    write_prompts(captions, [PromptRow(str(index), row["text"], index, 4.0) for index, row in enumerate(rows)])
    reference = {"fidelity.reference_dir": "assets/fashion_images/test", "fidelity.extractors": EXTRACTORS}
    asked = {"protocol": "[coco, nudity]", "coco.file": captions, "nudity.file": prompts, "clip": clip_folder}
    record = evaluate(tmp_path / "run", **asked, **reference, base_model=twin_of_base(tmp_path / "twin"))
    assert record["coco"]["before"] == record["coco"]["after"]
    found = record["coco"]["after"]
    assert found["fid_classifier"] > 0 and found["kid_classifier"]["std"] >= 0 and found["clip_score"] >= 0
    assert (
        found["details"]["classifier"]["num_reference_images"] == 600 and found["details"]["clip"]["num_images"] == 20
    )
    assert record["nudity"]["after"]["num_images"] == 8
    assert len(list((tmp_path / "run/cache").glob("features-classifier-*.safetensors"))) == 1
    assert "kid classifier" in capsys.readouterr().out


NO_PIPELINE = {"pretrained_model_name_or_path": None}
BAD = {
    "nothing to judge": ({**NO_PIPELINE}, "Set pretrained_model_name_or_path or images_dir"),
    "both": ({"images_dir": "assets"}, "Set pretrained_model_name_or_path or images_dir"),
    "no images": ({**NO_PIPELINE, "images_dir": "/no/such"}, "images_dir '/no/such' does not exist"),
    "no prompts of images": ({**NO_PIPELINE, "images_dir": "assets/fashion_sd"}, "has no prompts.csv"),
    "adapter of images": (
        {**NO_PIPELINE, "images_dir": "assets", "base_model": "x"},
        "leave out lora_weights and base",
    ),
    "two protocols": ({**NO_PIPELINE, "images_dir": "assets", "protocol": "[class, style]"}, "name one"),
    "base images": ({"base_images_dir": "assets"}, "base_images_dir goes with images_dir"),
    "unknown protocol": ({"protocol": "fid"}, "unknown protocol 'fid'; known are class, coco, nudity, style"),
    "protocol twice": ({"protocol": "[class, class]"}, "must name each at most once"),
    "no concept": ({"concept": "[]"}, "set concept"),
    "no prompts": ({"train_data_dir": None}, "prompts come from a data set, from prompts.file or from"),
    "two sources": ({"prompts.file": "PROMPTS"}, "prompts come from a data set, from prompts.file or from"),
    "no judge": ({"evaluation.classifier": None}, "set evaluation.classifier"),
    "no judge of style": ({"evaluation.classifier": None, "protocol": "style"}, "for style, clip or lpips.weights"),
    "lpips alone": ({"lpips.weights": "PROMPTS"}, "LPIPS compares images before and after: set base_model"),
    "unnamed concept": (
        {"train_data_dir": None, "prompts.file": "PROMPTS", "concept": "boot"},
        "no prompt asks for boot",
    ),
    "attacks on a file": (
        {"train_data_dir": None, "prompts.file": "PROMPTS", "attacks": "[misspelled]"},
        "attacks ask a pipeline for forgotten concepts",
    ),
    "attacks on lists": (
        {"train_data_dir": None, "forget_prompts": "[sneaker]", "retain_prompts": "[bag]", "attacks": "[relearning]"},
        "wants 10 held-out images of sneaker, but there are 0",
    ),
    "nothing retained": (
        {"train_data_dir": None, "forget_prompts": "[sneaker]"},
        "no evaluation prompt asks for anything that is retained: set retain_prompts",
    ),
    "no reference": (
        {"train_data_dir": None, "prompts.file": "PROMPTS", "fidelity.extractors": EXTRACTORS},
        "set fidelity.reference_dir",
    ),
    "nudity without prompts": ({"protocol": "nudity"}, "set nudity.file"),
    "coco without metrics": ({"protocol": "coco", "coco.file": "PROMPTS"}, "set fidelity.extractors, clip, or both"),
    "no clip": ({"clip": "/no/such"}, "clip is '/no/such', but there is no such file or folder"),
    "no extractor": ({"fidelity.extractors": "[resnet]"}, "unknown extractor 'resnet'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_before_any_image(name, tmp_path, prompts, monkeypatch, capsys):
    changes, message = BAD[name]
    changes = {key: prompts if value == "PROMPTS" else value for key, value in changes.items()}
    words = as_flags(tmp_path / "run", **{**DATA, "concept": "sneaker", **changes})
    monkeypatch.setattr(sys, "argv", ["evaluate_sd.py", *words])
    sampler = "barrier_diffusers.evaluation.image_folder.sample"
    monkeypatch.setattr(sampler, lambda *_, **__: pytest.fail("images were made"))
    with pytest.raises(SystemExit) as caught:
        run_script(main, EvaluateConfig)
    assert caught.value.code in (1, 2)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and message in lines[0], lines
    assert not (tmp_path / "run/metrics.json").exists()
