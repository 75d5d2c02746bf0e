"""Fifty mistakes of users: each ends in one clear line and a status other than 0, before any work is done."""

import shutil
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from scripts import the_script
from short_runs import ROOT
from sweep_files import write as write_sweep

from barrier_diffusers.utils.command_line import run_script

FASHION = ["--config", "train_scripts/configs/fashion_class.yaml"]
JUDGE = ["--config", "train_scripts/configs/evaluate_fashion.yaml", "--base_model=null"]
JUDGE += ["--pretrained_model_name_or_path=assets/fashion_sd"]
PIPELINE = ["--config", "train_scripts/configs/pipeline_fashion_class.yaml"]
CLASSES = ["--config", "classification_ext/configs/fashion_class.yaml"]
TRAINED = ["--config", "classification_ext/configs/fashion_train.yaml"]
JUDGED = ["--pretrained_model_name_or_path=assets/fashion_resnet", "--train_data_dir=assets/fashion_mnist"]
LABELS = ["--config", "ddpm_ext/configs/unlearn_fashion.yaml"]
DDPM = ["--data.train_data_dir=assets/fashion_mnist"]
GENERATOR = ["--train_data_dir=assets/fashion_images", "--report_to=none"]

# script, words (OUT, TMP: folders of the test), what the line says
CASES = {
    "unlearn: unknown flag": ("unlearn_sd", [*FASHION, "--learnig_rate=1"], "learnig_rate"),
    "unlearn: no number": ("unlearn_sd", [*FASHION, "--learning_rate=fast"], "learning_rate"),
    "unlearn: no such config": ("unlearn_sd", ["--config", "TMP/none.yaml"], "none.yaml"),
    "unlearn: broken config": ("unlearn_sd", ["--config", "TMP/broken.yaml"], "broken.yaml"),
    "unlearn: missing setting": ("unlearn_sd", ["--concept=bag"], "required: "),
    "unlearn: no pipeline": ("unlearn_sd", [*FASHION, "--pretrained_model_name_or_path=/no/such"], "/no/such"),
    "unlearn: no data": ("unlearn_sd", [*FASHION, "--train_data_dir=/no/such"], "train_data_dir '/no/such' does not"),
    "unlearn: two sources": ("unlearn_sd", [*FASHION, "--dataset_name=x"], "not both"),
    "unlearn: no column": ("unlearn_sd", [*FASHION, "--concept_column=kind"], "kind"),
    "unlearn: unknown concept": ("unlearn_sd", [*FASHION, "--concept=hat"], "hat"),
    "unlearn: empty concept": ("unlearn_sd", [*FASHION, "--concept="], "concept is empty"),
    "unlearn: unknown objective": ("unlearn_sd", [*FASHION, "--objective.name=forget"], "forget"),
    "unlearn: unread setting": ("unlearn_sd", [*FASHION, "--objective.eta=2"], "eta"),
    "unlearn: zero steps": ("unlearn_sd", [*FASHION, "--max_train_steps=0"], "max_train_steps is 0"),
    "unlearn: no such maps": ("unlearn_sd", [*FASHION, "--barrier.targets=[attn9.to_q]"], "attn9.to_q"),
    "unlearn: percentiles": (
        "unlearn_sd",
        [*FASHION, "--barrier.lower_percentile=2"],
        "barrier.lower_percentile is 2",
    ),
    "unlearn: contradiction": ("unlearn_sd", [*FASHION, "--barrier.constraint=projection"], "no protection loss"),
    "unlearn: resolution": ("unlearn_sd", [*FASHION, "--resolution=33"], "resolution is 33"),
    "unlearn: no such judge": ("unlearn_sd", [*FASHION, "--evaluation.classifier=/no/such"], "no such file or folder"),
    "unlearn: other files": ("unlearn_sd", [*FASHION, "--output_dir=TMP/mine"], "holds other files"),
    "unlearn: a file": ("unlearn_sd", [*FASHION, "--output_dir=TMP/mine/notes.txt"], "is a file"),
    "unlearn: no checkpoint": ("unlearn_sd", [*FASHION, "--resume_from_checkpoint=step-9"], "no checkpoint 'step-9'"),
    "unlearn: a pickle": ("unlearn_sd", [*FASHION, "--pretrained_model_name_or_path=TMP/model.ckpt"], "pickle"),
    "evaluate: unknown protocol": ("evaluate_sd", [*JUDGE, "--protocol=taste"], "unknown protocol 'taste'"),
    "evaluate: unknown attack": ("evaluate_sd", [*JUDGE, "--attacks=[guess]"], "unknown attack 'guess'"),
    "evaluate: nothing judged": ("evaluate_sd", [*JUDGE, "--pretrained_model_name_or_path=null"], "what is judged?"),
    "evaluate: no images": ("evaluate_sd", [*JUDGE, "--images_dir=/no/such"], "one of the two"),
    "evaluate: no adapter": ("evaluate_sd", [*JUDGE, "--lora_weights=/no/such"], "pytorch_lora_weights.safetensors"),
    "evaluate: no prompts": ("evaluate_sd", [*JUDGE, "--nudity.file=/no/such.csv"], "/no/such.csv"),
    "evaluate: other files": ("evaluate_sd", [*JUDGE, "--output_dir=TMP/mine"], "holds other files"),
    "generate: nothing to do": (
        "generate_sd",
        ["--protocol=nudity", "--images_dir=TMP/mine", "--attacks=[]"],
        "nothing",
    ),
    "generate: unknown concept": ("generate_sd", [*JUDGE, "--concept=hat", "--attacks=[]"], "hat"),
    "train: no data": ("train_text_to_image", ["--train_data_dir=/no/such", "--work_dir=TMP/work"], "/no/such"),
    "train: no vocabulary": (
        "train_text_to_image",
        [*GENERATOR, "--text.vocabulary_package=no_such_package", "--work_dir=TMP/work"],
        "CLIP's vocabulary is missing",
    ),
    "train: zero batch": ("train_text_to_image", ["--unet.train_batch_size=0"], "unet.train_batch_size is 0"),
    "train: a tracker": ("train_text_to_image", ["--report_to=paper"], "report_to"),
    "classifier: no data": ("train_classifier", ["--train_data_dir=/no/such"], "/no/such"),
    "classifier: no column": (
        "train_classifier",
        ["--train_data_dir=assets/fashion_images", "--attributes=[kind]"],
        "kind",
    ),
    "score: no pipeline": ("score_text_to_image", ["--pipeline=/no/such", "--output=OUT/scores.json"], "/no/such"),
    "prepare: no photos": ("prepare_fashion_mnist", ["--source_dir=/no/such"], "source_dir is '/no/such'"),
    "pipeline: no kind": ("run_pipeline", [], "no kind is given"),
    "pipeline: unknown stage": ("run_pipeline", [*PIPELINE, "--stages=[paint]"], "unknown stage paint"),
    "pipeline: broken config": ("run_pipeline", ["--config", "TMP/broken.yaml"], "broken.yaml"),
    "pipeline: bad stage setting": (
        "run_pipeline",
        [*PIPELINE, "--unlearn.rank=-1"],
        "unlearn: rank is -1, but must be in [0, 4096]",
    ),
    "pipeline: its own setting": ("run_pipeline", [*PIPELINE, "--evaluate.lora_weights=x"], "evaluate.lora_weights"),
    "pipeline: eval_only": ("run_pipeline", [*PIPELINE, "--eval_only=true"], "there is no complete"),
    "pipeline: other files": ("run_pipeline", [*PIPELINE, "--output_dir=TMP/mine"], "holds other files"),
    "sweep: no file": ("sweep", ["--sweep=/no/such.yaml"], "there is no file '/no/such.yaml'"),
    "sweep: unknown method": ("sweep", ["--sweep=TMP/method.yaml"], "method is 'guess'"),
    "sweep: bad trial": ("sweep", ["--sweep=TMP/trial.yaml"], "trial --unlearn.learning_rate=1: "),
    "sweep: zero trials": ("sweep", ["--sweep=fashion_class", "--num_trials=0"], "num_trials is 0"),
    "images: nothing forgotten": (
        "classification_ext.unlearn",
        [*CLASSES, "--forget_class=null"],
        "nothing is to be forgotten",
    ),
    "images: unknown label": ("classification_ext.unlearn", [*CLASSES, "--forget_class=hat"], "hat"),
    "images: unknown method": ("classification_ext.unlearn", [*CLASSES, "--method.name=hope"], "hope"),
    "images: no classifier": (
        "classification_ext.unlearn",
        [*CLASSES, "--pretrained_model_name_or_path=/no/such"],
        "/no/such",
    ),
    "images: fraction": (
        "classification_ext.unlearn",
        [*CLASSES, "--forget_class=null", "--forget_fraction=2"],
        "forget_fraction is 2",
    ),
    "images: unknown network": ("classification_ext.train", [*TRAINED, "--model_name_or_path=resnet7"], "resnet7"),
    "images: judged for what": ("classification_ext.evaluate", JUDGED, "nothing was to be forgotten"),
    "labels: no data": ("ddpm_ext.unlearn", [*LABELS, "--data.train_data_dir=/no/such"], "/no/such"),
    "labels: unknown label": ("ddpm_ext.unlearn", [*LABELS, "--concept=hat"], "hat"),
    "labels: no model": ("ddpm_ext.unlearn", [*LABELS, "--pretrained_model_name_or_path=/no/such"], "/no/such"),
    "labels: an edit": ("ddpm_ext.unlearn", [*LABELS, "--objective.name=uce"], "cross-attention"),
    "labels: zero steps": ("ddpm_ext.train", [*DDPM, "--max_train_steps=0"], "max_train_steps is 0"),
}


@pytest.fixture(autouse=True)
def nothing_long(tmp_path, monkeypatch):
    """No step is trained and no image made; what the cases name is there."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(torch.Tensor, "backward", lambda *_, **__: pytest.fail("training began"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("mine")
    (tmp_path / "broken.yaml").write_text("a: [")
    (tmp_path / "model.ckpt").write_bytes(b"no weights")
    write_sweep(tmp_path / "method.yaml", method="guess")
    write_sweep(tmp_path / "trial.yaml")  # its pipeline.yaml is not there


def entries(folder):
    return sorted((str(path.relative_to(folder)), path.stat().st_size) for path in Path(folder).rglob("*"))


def test_there_are_fifty():
    assert len(CASES) >= 50


@pytest.mark.parametrize("name", CASES)
def test_one_line_and_nothing_touched(name, tmp_path, monkeypatch, capsys):
    script, words, message = CASES[name]
    if script.startswith("ddpm_ext") and not (ROOT / "ddpm_ext/unlearn.py").is_file():
        pytest.skip("no DDPM scripts")
    words = [word.replace("TMP", str(tmp_path)).replace("OUT", str(tmp_path / "out")) for word in words]
    if not any(word.startswith("--output_dir") for word in words) and script != "score_text_to_image":
        words.append(f"--output_dir={tmp_path / 'out'}")
    before, assets = entries(tmp_path), entries(ROOT / "assets")
    main, settings = the_script(script)
    monkeypatch.setattr(sys, "argv", [script, *words])
    with pytest.raises(SystemExit) as caught:
        run_script(main, settings)
    said = capsys.readouterr().err.splitlines()
    lines = [line for line in said if line.startswith("error: ")]
    assert len(lines) == 1 and message in lines[0] and len(lines[0]) < 700, said
    assert caught.value.code in (1, 2)
    assert not [line for line in said if "Traceback" in line]
    files = [entry for entry in entries(tmp_path) if not (tmp_path / entry[0]).is_dir()]
    assert files == [entry for entry in before if not (tmp_path / entry[0]).is_dir()]
    assert entries(ROOT / "assets") == assets


def test_a_damaged_image_is_one_line(tmp_path, monkeypatch, capsys):
    shutil.copytree(ROOT / "assets/fashion_images", tmp_path / "images")
    victim = tmp_path / "images/train/00000.png"
    Image.effect_noise((32, 32), 90).save(victim)
    victim.write_bytes(victim.read_bytes()[:200])
    main, settings = the_script("unlearn_sd")
    words = [*FASHION, f"--train_data_dir={tmp_path / 'images'}", f"--output_dir={tmp_path / 'out'}"]
    monkeypatch.setattr(sys, "argv", ["unlearn_sd", *words, "--report_to=none"])
    with pytest.raises(SystemExit) as caught:
        run_script(main, settings)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert caught.value.code == 1 and "00000.png) cannot be read" in line
    assert not (tmp_path / "out/unet").exists()
