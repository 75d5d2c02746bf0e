"""No file is lost: what may be written where, whose files are moved or removed, one run a folder, hashes of caches."""

import hashlib
import importlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import typing
from dataclasses import dataclass, fields
from pathlib import Path

import pipelines
import pytest
import torch
from ddpm_models import Place, write_judge
from PIL import Image
from safetensors.torch import save_file
from short_runs import ROOT, flags

from barrier_diffusers.data.encoding import cached_tensors
from barrier_diffusers.data.generated_images import Illustrator
from barrier_diffusers.data.prompt_files import PromptRow
from barrier_diffusers.evaluation.image_folder import generate_folder, read_folder
from barrier_diffusers.evaluation.report import read_run
from barrier_diffusers.models.generation import SamplingConfig
from barrier_diffusers.utils import locks
from barrier_diffusers.utils.checks import OUTPUT, PathRule, rules, rules_of, section_class
from barrier_diffusers.utils.command_line import parse_config
from barrier_diffusers.utils.files import save_whole, written_whole
from barrier_diffusers.utils.locks import FolderLock
from barrier_diffusers.utils.output_folder import in_output_folder, output_folder

sys.path.insert(0, str(ROOT / "train_scripts"))

SETTINGS = {
    "unlearn_sd": "barrier_diffusers.workflow.settings:UnlearnConfig",
    "evaluate_sd": "barrier_diffusers.evaluation.settings:EvaluateConfig",
    "run_pipeline": "barrier_diffusers.workflow.workflow:WorkflowConfig",
    "sweep": "barrier_diffusers.workflow.sweeps:SweepConfig",
    "report": "report:ReportConfig",
    "score": "score_text_to_image:ScoreConfig",
    "train_classifier": "train_classifier:ClassifierConfig",
    "train_text_to_image": "train_text_to_image:TrainConfig",
    "prepare": "prepare_fashion_mnist:PrepareConfig",
    "classifier train": "classification_ext.settings:TrainConfig",
    "classifier unlearn": "classification_ext.settings:UnlearnConfig",
    "classifier evaluate": "classification_ext.settings:EvaluateConfig",
    "ddpm train": "ddpm_ext.settings:TrainConfig",
    "ddpm unlearn": "ddpm_ext.settings:UnlearnConfig",
    "ddpm evaluate": "ddpm_ext.settings:EvaluateConfig",
    "ddpm sample": "ddpm_ext.sample:SampleConfig",
}


def settings_of(name):
    module, kind = SETTINGS[name].split(":")
    return getattr(importlib.import_module(module), kind)


# settings that hold text and never name a file; a checkpoint is read from output_dir itself
WORDS = set(
    """anchor anchor_prompt attacks attention_backend attribute attributes caption_column caption_template
    compile_backend concept concept_column concept_synonyms dataset_subset exclude_concepts exclude_labels
    extra_words forget_class forget_prompts hub_model_id image_column initial_label initial_words label_column
    labels meta_adapter_targets name project prompts protocol resume_from_checkpoint retain_concepts
    retain_prompts revision split stages targets test_split token_starts trade_off train_split validation_prompt
    variant vocabulary_package wandb_sweep words""".split()
)


def texts(kind, prefix=""):
    """(dotted name, rule) of every field that holds text."""
    hints, known = typing.get_type_hints(kind), rules_of(kind)
    for field in fields(kind):
        section = section_class(hints[field.name])
        if section is not None:
            yield from texts(section, f"{prefix}{field.name}.")
        elif holds_text(hints[field.name]):
            yield f"{prefix}{field.name}", known.get(field.name)


def holds_text(hint):
    if typing.get_origin(hint) is typing.Literal:
        return False
    return hint is str or any(holds_text(part) for part in typing.get_args(hint))


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_that_holds_text_is_a_path_or_a_word(name):
    loose = [
        setting
        for setting, rule in texts(settings_of(name))
        if rule is None and setting.rpartition(".")[2] not in WORDS
    ]
    assert not loose, f"{loose}: give them a rule (FILE, FOLDER, MODEL, DATA, OUTPUT ...), or add them to WORDS"
    paths = [setting for setting, rule in texts(settings_of(name)) if isinstance(rule, PathRule)]
    assert not {setting.rpartition(".")[2] for setting in paths} & WORDS


def place(folder):
    """Files that settings name; returns the words that each script needs besides."""
    for name in ("model", "data", "other", "judge"):
        (folder / name / "sub").mkdir(parents=True)
        (folder / name / "config.json").write_text("{}")
    write_judge(folder / "judge")
    (folder / "sweep.yaml").write_text("a: 1")
    (folder / "code.py").write_text("")
    (folder / "link").symlink_to(folder / "model")
    concept = ["--concept=bag"]
    judged = ["--protocol=class", "--forget_prompts=[a bag]", "--attacks=[]", "--evaluation.classifier=TMP/judge"]
    ddpm = ["--data.train_data_dir=TMP/data"]
    model = ["--pretrained_model_name_or_path=TMP/model"]
    labels = ["--train_data_dir=TMP/data", "--forget_class=bag"]
    return {
        "unlearn_sd": [*model, *concept],
        "evaluate_sd": [*model, *concept, *judged],
        "sweep": ["--sweep=TMP/sweep.yaml"],
        "report": ["--compare=[TMP/model]"],
        "score": ["--pipeline=TMP/model", "--data_dir=TMP/data", "--classifier=TMP/judge"],
        "train_classifier": ["--train_data_dir=TMP/data"],
        "train_text_to_image": ["--train_data_dir=TMP/data", "--work_dir=TMP/work"],
        "prepare": ["--source_dir=TMP/data"],
        "classifier train": ["--train_data_dir=TMP/data"],
        "classifier unlearn": [*model, *labels],
        "classifier evaluate": [*model, *labels],
        "ddpm train": ddpm,
        "ddpm unlearn": [*model, *concept, *ddpm, "--evaluation.judge=TMP/judge"],
        "ddpm evaluate": [*model, *ddpm, "--evaluation.judge=TMP/judge"],
        "ddpm sample": model,
    }


OVERLAPS = {
    "the base itself": ("unlearn_sd", ["--output_dir=TMP/model"], "output_dir .* is the same as pretrained_model"),
    "a folder around the base": ("unlearn_sd", ["--output_dir=TMP"], "output_dir .* contains pretrained_model"),
    "a folder in the base": ("unlearn_sd", ["--output_dir=TMP/model/run"], "output_dir .* lies in pretrained_model"),
    "the base by a link": ("unlearn_sd", ["--output_dir=TMP/link"], "output_dir .* is the same as pretrained_model"),
    "below a link": ("unlearn_sd", ["--output_dir=TMP/link/new"], "output_dir .* lies in pretrained_model"),
    "with dots": ("unlearn_sd", ["--output_dir=TMP/data/../model"], "is the same as pretrained_model"),
    "in other case": ("unlearn_sd", ["--output_dir=TMP/MODEL"], "is the same as pretrained_model"),
    "at home": ("unlearn_sd", ["--output_dir=~/model"], "is the same as pretrained_model"),
    "data": ("unlearn_sd", ["--train_data_dir=TMP/data", "--output_dir=TMP/data/run"], "lies in train_data_dir"),
    "forget images": ("unlearn_sd", ["--forget_data_dir=TMP/data/sub", "--output_dir=TMP/data"], "contains forget"),
    "retain images": ("unlearn_sd", ["--retain_data_dir=TMP/other", "--output_dir=TMP/other"], "retain_data_dir"),
    "cache in the data": ("unlearn_sd", ["--output_dir=TMP/new", "--cache_dir=TMP/model/c"], "cache_dir .* lies in"),
    "cache that is the output": (
        "unlearn_sd",
        ["--output_dir=TMP/new", "--cache_dir=TMP/new"],
        "is the same as output_dir",
    ),
    "cache around the output": (
        "unlearn_sd",
        ["--output_dir=TMP/new/run", "--cache_dir=TMP/new"],
        "contains output_dir",
    ),
    "code of one's own": ("unlearn_sd", ["--objective.module=TMP/code.py", "--output_dir=TMP"], "TMP"),
    "classifier": ("unlearn_sd", ["--evaluation.classifier=TMP/judge", "--output_dir=TMP/judge"], "classifier"),
    "judged model": ("evaluate_sd", ["--output_dir=TMP/model"], "is the same as pretrained_model"),
    "base of the judged": (
        "evaluate_sd",
        ["--base_model=TMP/other", "--output_dir=TMP/other/e"],
        "lies in base_model",
    ),
    "references": (
        "evaluate_sd",
        ["--fidelity.reference_dir=TMP/other", "--output_dir=TMP/other"],
        "fidelity.reference_dir",
    ),
    "an extractor's weights": (
        "evaluate_sd",
        ["--fidelity.extractors=[classifier=TMP/other]", "--output_dir=TMP/other/e"],
        "lies in fidelity.extractors",
    ),
    "cache of references": (
        "evaluate_sd",
        ["--output_dir=TMP/new", "--fidelity.cache_dir=TMP/model"],
        "fidelity.cache_dir .* is the same as",
    ),
    "sweep file": ("sweep", ["--output_dir=TMP"], "output_dir .* contains sweep"),
    "report over an input": ("score", ["--output=TMP/data/scores.json"], "output .* lies in data_dir"),
    "picture among the data": ("score", ["--output=TMP/s.json", "--picture=TMP/data/a.png"], "picture .* lies in"),
    "one file for both": ("score", ["--output=TMP/s", "--picture=TMP/s"], "picture .* is the same as output"),
    "classifier's data": ("train_classifier", ["--output_dir=TMP/data"], "is the same as train_data_dir"),
    "recipe's data": ("train_text_to_image", ["--output_dir=TMP/data/o"], "lies in train_data_dir"),
    "recipe's work": ("train_text_to_image", ["--output_dir=TMP/work"], "work_dir .* is the same as output_dir"),
    "photos": ("prepare", ["--output_dir=TMP/data"], "is the same as source_dir"),
    "two outputs": ("prepare", ["--output_dir=TMP/o", "--images_dir=TMP/o/i"], "images_dir .* lies in output_dir"),
    "train a classifier": ("classifier train", ["--output_dir=TMP/data"], "is the same as train_data_dir"),
    "unlearn a classifier": ("classifier unlearn", ["--output_dir=TMP/model"], "is the same as pretrained_model"),
    "judge a classifier": ("classifier evaluate", ["--output_dir=TMP/model"], "is the same as pretrained_model"),
    "shadows": (
        "classifier evaluate",
        ["--evaluation.shadow_models=[TMP/other]", "--output_dir=TMP/other/e"],
        "lies in evaluation.shadow_models",
    ),
    "train a DDPM": ("ddpm train", ["--output_dir=TMP/data/run"], "lies in data.train_data_dir"),
    "unlearn a DDPM": ("ddpm unlearn", ["--output_dir=TMP/model"], "is the same as pretrained_model"),
    "a DDPM's judge": ("ddpm unlearn", ["--output_dir=TMP/judge"], "is the same as evaluation.judge"),
    "judge a DDPM": ("ddpm evaluate", ["--output_dir=TMP/model"], "is the same as pretrained_model"),
    "sample a DDPM": ("ddpm sample", ["--output_dir=TMP/model/images"], "lies in pretrained_model"),
}


@pytest.mark.parametrize("name", OVERLAPS)
def test_nothing_is_written_where_something_is_read(name, tmp_path, monkeypatch):
    script, changes, message = OVERLAPS[name]
    monkeypatch.setenv("HOME", str(tmp_path))
    words = [word.replace("TMP", str(tmp_path)) for word in [*place(tmp_path)[script], *changes]]
    before = snapshot(tmp_path)
    with pytest.raises(ValueError, match=message.replace("TMP", re.escape(str(tmp_path)))) as refused:
        parse_config(settings_of(script), words)
    assert "nothing is written where something else" in str(refused.value)
    assert snapshot(tmp_path) == before


ALLOWED = {
    "cache in the output": ("unlearn_sd", ["--output_dir=TMP/new", "--cache_dir=TMP/new/c"]),
    "beside one another": ("unlearn_sd", ["--output_dir=TMP/model-2", "--cache_dir=TMP/cache"]),
    "a report in the run": ("report", ["--output=TMP/model/page.html"]),
}


@pytest.mark.parametrize("name", ALLOWED)
def test_what_may_stand_together(name, tmp_path):
    script, changes = ALLOWED[name]
    words = [word.replace("TMP", str(tmp_path)) for word in [*place(tmp_path)[script], *changes]]
    parse_config(settings_of(script), words)


def snapshot(folder):
    """Every file below a folder with its hash, and every link with where it leads."""
    found = {}
    for path in sorted(Path(folder).rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            found[name] = os.readlink(path)
        elif path.is_file():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


@dataclass
class Settings:
    """Of a script that writes a small model and a number."""

    output_dir: str
    overwrite_output_dir: bool = False
    resume_from_checkpoint: str | None = None
    value: str = "1"

    RULES = rules(output_dir=OUTPUT)


def script(config, fail=None, checkpoint=None):
    """One run; `fail` is raised or called after the weights are written."""

    @in_output_folder()
    def main(config):
        output = Path(config.output_dir)
        assert not (output / "metrics.json").exists()
        if checkpoint:
            (output / "checkpoints" / checkpoint).mkdir(parents=True)
        (output / "unet").mkdir(exist_ok=True)
        (output / "unet/weights").write_text(config.value)
        if callable(fail):
            fail()
        elif fail is not None:
            raise fail
        (output / "metrics.json").write_text(json.dumps({"value": config.value}))

    main(config)


@pytest.fixture
def finished(tmp_path):
    """A finished run."""
    script(Settings(str(tmp_path / "run")))
    return tmp_path / "run"


def visible(folder):
    return {name for name in snapshot(folder) if not name.startswith(".")}


def test_a_finished_run_is_only_overwritten_when_asked(finished):
    before = snapshot(finished)
    with pytest.raises(ValueError, match="holds another run; name another folder or set --overwrite_output_dir"):
        script(Settings(str(finished), value="2"))
    assert snapshot(finished) == before
    script(Settings(str(finished), True, value="2"))
    assert visible(finished) == {"unet/weights", "metrics.json"}
    assert (finished / "unet/weights").read_text() == "2"
    assert sorted(path.name for path in finished.iterdir() if path.name[0] == ".") == [".barrier_run.json"]


@pytest.mark.parametrize("error", [ValueError("a typo"), KeyError("a bug"), KeyboardInterrupt(), SystemExit(143)])
def test_after_a_failure_the_old_run_is_back_at_once(error, finished, capsys):
    before = snapshot(finished)
    with pytest.raises(type(error)):
        script(Settings(str(finished), True, value="2"), error)
    assert snapshot(finished) == before
    assert "is as it was before this run" in capsys.readouterr().err


def run_and_die(folder, checkpoint=None, value="2"):
    """In a process of its own: it ends as a killed one does, with everything half done."""
    script(Settings(str(folder), True, value=value), lambda: os._exit(9), checkpoint)


def killed(*arguments):
    process = multiprocessing.get_context("fork").Process(target=run_and_die, args=arguments)
    process.start()
    process.join()
    assert process.exitcode == 9


def test_after_a_kill_the_old_run_is_back_at_the_next_start(finished, capsys):
    before = snapshot(finished)
    killed(finished)
    assert (finished / "unet/weights").read_text() == "2" and not (finished / "metrics.json").exists()
    with pytest.raises(ValueError, match="holds another run"):
        script(Settings(str(finished)))
    assert "a run was killed; what was there before it is back" in capsys.readouterr().err
    assert snapshot(finished) == before
    killed(finished)
    script(Settings(str(finished), True, value="3"))
    assert (finished / "unet/weights").read_text() == "3" and visible(finished) == {"unet/weights", "metrics.json"}


def test_new_checkpoints_stay_beside_the_old_results(finished):
    killed(finished, "step-5")
    (finished / "checkpoints/step-5/file").write_text("new")
    with pytest.raises(ValueError, match="holds another run"):
        script(Settings(str(finished)))
    assert (finished / "unet/weights").read_text() == "1" and (finished / "metrics.json").is_file()
    assert (finished / "checkpoints/step-5/file").read_text() == "new"
    script(Settings(str(finished), resume_from_checkpoint="latest", value="4"))  # sets the old results aside
    assert (finished / "unet/weights").read_text() == "4"
    assert (finished / "checkpoints/step-5/file").read_text() == "new"


def test_old_checkpoints_are_not_lost_to_new_ones(tmp_path):
    folder = tmp_path / "run"
    script(Settings(str(folder)), checkpoint="step-9")
    (folder / "checkpoints/step-9/file").write_text("old")
    killed(folder, "step-5")
    with pytest.raises(ValueError, match="holds another run"):
        script(Settings(str(folder)))
    kept = {path.parent.parent.name for path in folder.rglob("file")}
    assert kept == {"checkpoints-before-1"} and (folder / "checkpoints/step-5").is_dir()


@pytest.mark.parametrize("moment", range(1, 8))
def test_killed_while_it_sets_aside_or_puts_back_nothing_is_lost(moment, finished):
    before = snapshot(finished)

    def die():
        calls, replace = [], os.replace

        def counting(*arguments):
            calls.append(None)
            if len(calls) == moment:
                os._exit(9)
            replace(*arguments)

        os.replace = counting
        script(Settings(str(finished), True, value="2"), ValueError("and it comes back"))

    process = multiprocessing.get_context("fork").Process(target=die)
    process.start()
    process.join()
    with pytest.raises(ValueError, match="holds another run"):
        script(Settings(str(finished)))
    assert snapshot(finished) == before


FOREIGN = {
    "web extension": {"manifest.json": '{"name": "extension", "manifest_version": 3}', ".git/HEAD": "ref", "a.js": ""},
    "manifest that is a list": {"manifest.json": "[]", "photo.png": "x"},
    "versions of others": {"manifest.json": '{"versions": {"other": "1"}}'},
    "a model": {"model_index.json": "{}", "unet/config.json": "{}"},
    "text": {"thesis.tex": "x"},
}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", FOREIGN)
def test_somebody_elses_folder_is_refused(name, overwrite, tmp_path):
    for file, content in FOREIGN[name].items():
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text(content)
    before = snapshot(tmp_path)
    for resume in (None, "latest"):
        with pytest.raises(ValueError, match="holds other files, which no run wrote"):
            script(Settings(str(tmp_path), overwrite, resume))
    assert snapshot(tmp_path) == before


EARLIER = {
    "unlearned": {"manifest.json": {"versions": {"barrier-diffusers": "0.1"}, "settings": {}}, "unet/w": "w"},
    "evaluated": {"metrics.json": {"versions": {"barrier-diffusers": "0.1"}}},
    "stopped after its barrier": {"barrier_config.json": {"lambda_interval": 1, "targets": []}},
    "stopped while training": {"checkpoints/step-2/checkpoint.json": {"step": 2}},
    "trained from scratch": {"training_config.json": {"train_data_dir": "x", "vae": {}, "unet": {}}},
}


@pytest.mark.parametrize("name", EARLIER)
def test_runs_of_earlier_versions_count_as_ours_and_others_files_among_them_stay(name, tmp_path):
    for file, content in {**EARLIER[name], "notes.txt": "mine", ".git/HEAD": "ref", "cache/latents-1.x": ""}.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError, match="holds another run"):
        script(Settings(str(tmp_path)))
    script(Settings(str(tmp_path), True))
    found = {file for file in snapshot(tmp_path) if not file.startswith(".barrier")}
    assert found == {"unet/weights", "metrics.json", "notes.txt", ".git/HEAD", "cache/latents-1.x"}


def test_what_somebody_put_among_the_files_of_a_run_is_not_moved(finished):
    (finished / "unet/notes.txt").write_text("mine")
    before = snapshot(finished)
    with pytest.raises(ValueError, match="that no run wrote: unet/notes.txt"):
        script(Settings(str(finished), True))
    assert snapshot(finished) == before
    (finished / "unet/notes.txt").rename(finished / "notes.txt")
    script(Settings(str(finished), True, value="2"))
    assert visible(finished) == {"unet/weights", "metrics.json", "notes.txt"}


def test_links_are_neither_followed_nor_written_through(finished, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "mine").write_text("mine")
    (finished / "unet/weights").unlink()
    (finished / "unet").rmdir()
    (finished / "unet").symlink_to(outside)
    (finished / "metrics.json").unlink()
    (finished / "metrics.json").symlink_to(outside / "mine")
    (finished / ".barrier_run.json").unlink()
    (finished / "manifest.json").write_text(json.dumps({"versions": {"barrier-diffusers": "0.1"}}))
    script(Settings(str(finished), True, value="2"))
    assert snapshot(outside) == {"mine": hashlib.sha256(b"mine").hexdigest()}
    assert (finished / "unet/weights").read_text() == "2" and not (finished / "unet").is_symlink()
    (finished / "cache").symlink_to(outside)
    with pytest.raises(ValueError, match="cache' is a link to .*, and nothing is written through a link"):
        script(Settings(str(finished), True))
    assert (finished / "unet/weights").read_text() == "2"


def test_a_folder_that_cannot_be_written_in_is_deleted_whole(finished):
    (finished / "unet").chmod(0o500)
    script(Settings(str(finished), True, value="2"))
    assert (finished / "unet/weights").read_text() == "2"
    assert not [path for path in finished.iterdir() if path.name.startswith(".run-before")]


LEFT = {  # what killed runs leave -> what the next start makes of it
    "checkpoints/.step-4/model.safetensors": None,
    "checkpoints/.old-step-2/file": None,
    "checkpoints/.old-step-3/file": "checkpoints/step-3/file",  # its replacement never came
    ".metrics.json.123": None,
    "unet/.weights.123": None,
    ".pipeline/unet/w": None,
    "cache/.latents-1.safetensors.4194305": None,
    "cache/.notes.2024": "cache/.notes.2024",
    ".notes.2024": ".notes.2024",
}


def test_leftovers_of_kills_go_at_the_next_start(finished):
    (finished / "checkpoints/step-2").mkdir(parents=True)
    for name in LEFT:
        (finished / name).parent.mkdir(parents=True, exist_ok=True)
        (finished / name).write_text("x")
    (finished / ".barrier_run.json").write_text(
        (finished / ".barrier_run.json").read_text().replace('"finished": true', '"finished": false')
    )
    script(Settings(str(finished), resume_from_checkpoint="latest"))
    left = {name for name in snapshot(finished) if not name.startswith(".barrier")}
    assert left == {"unet/weights", "metrics.json", *filter(None, LEFT.values())}


def hold(folder, ready, done):
    with output_folder(Settings(str(folder))):
        ready.set()
        done.wait(60)


def test_two_runs_in_one_folder(tmp_path):
    context = multiprocessing.get_context("fork")
    ready, done = context.Event(), context.Event()
    first = context.Process(target=hold, args=(tmp_path / "run", ready, done))
    first.start()
    assert ready.wait(60)
    said = f"another process works in .*, process {first.pid} on .*, since .*: wait for it, or name another output_dir"
    with pytest.raises(ValueError, match=said):
        script(Settings(str(tmp_path / "run"), True))
    done.set()
    first.join()
    script(Settings(str(tmp_path / "run"), True))
    assert not (tmp_path / "run/.lock").exists()


def test_the_lock_of_a_killed_process_blocks_nobody(tmp_path):
    killed(tmp_path / "run")
    assert (tmp_path / "run/.lock").is_file()
    script(Settings(str(tmp_path / "run"), True))


def test_processes_of_one_group_share_the_folder(tmp_path, monkeypatch):
    with output_folder(Settings(str(tmp_path / "run"))):
        monkeypatch.setenv("RANK", "1")
        script(Settings(str(tmp_path / "run")))


WITHOUT_LOCKS = """
import sys
sys.modules["fcntl"] = None
import json, os, socket
from pathlib import Path
import barrier_diffusers.workflow.workflow, barrier_diffusers.utils.output_folder
from barrier_diffusers.utils.locks import FolderLock
folder = Path(sys.argv[1])
with FolderLock(folder):
    try:
        FolderLock(folder).__enter__()
        raise SystemExit("two at once")
    except ValueError as error:
        print(error)
(folder / ".lock-held").write_text(json.dumps({"pid": 4194305, "host": socket.gethostname()}))
with FolderLock(folder):
    print("stale lock taken")
print(sorted(os.listdir(folder)))
"""


def test_without_fcntl(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_LOCKS, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "another process works in" in done.stdout and "stale lock taken" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


def test_pids_that_are_no_process_are_not_alive():
    assert locks.is_alive(os.getpid()) and not locks.is_alive(4194305) and not locks.is_alive(0)


def test_a_typo_in_a_label_keeps_the_finished_run(tmp_path):
    world = Place(tmp_path)
    world.unlearn(tmp_path / "run")
    before = snapshot(tmp_path / "run")
    with pytest.raises(ValueError, match="no label 'boots'"):
        world.unlearn(tmp_path / "run", concept="boots", overwrite_output_dir="true")
    after = snapshot(tmp_path / "run")
    assert {name: after[name] for name in before} == before
    assert {name for name in after if name not in before} <= {name for name in after if name.startswith("cache/")}
    with FolderLock(tmp_path / "run"), pytest.raises(ValueError, match="another process works in"):
        world.unlearn(tmp_path / "run", overwrite_output_dir="true")
    assert snapshot(tmp_path / "run").keys() == after.keys()


def test_a_checkpoint_of_an_earlier_version_is_gone_on_from_with_a_warning(tmp_path, capsys):
    world = Place(tmp_path)
    _, whole = world.unlearn(tmp_path / "whole")
    world.unlearn(tmp_path / "run", checkpointing_steps=2)
    folder = tmp_path / "run/checkpoints/step-2"
    (folder / "checkpoint.json").unlink()
    (folder / "history.bin").rename(folder / "custom_checkpoint_0.pkl")
    _, resumed = world.unlearn(tmp_path / "run", resume_from_checkpoint="latest")
    assert "was written by an earlier version, without hashes and settings" in capsys.readouterr().err
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value)
    histories = [json.loads((tmp_path / run / "manifest.json").read_text())["history"] for run in ("whole", "run")]
    assert histories[0] == histories[1]


def test_a_folder_of_photos_is_no_split_that_may_be_replaced(tmp_path):
    from prepare_fashion_mnist import require_own_images

    (tmp_path / "train").mkdir()
    (tmp_path / "train/00000.png").write_bytes(b"x")
    require_own_images(tmp_path / "train")
    (tmp_path / "train/holiday.jpg").write_bytes(b"x")
    with pytest.raises(ValueError, match="holds other files, holiday.jpg for one"):
        require_own_images(tmp_path / "train")


def unlearn_until(words, name):
    """A run that is killed when a file of this name has been moved to its place."""
    from unlearn_sd import main

    from barrier_diffusers.workflow.settings import UnlearnConfig

    replace = os.replace

    def killing(source, target):
        replace(source, target)
        if Path(target).name == name:
            os._exit(9)

    os.replace = killing
    os.chdir(ROOT)
    main(parse_config(UnlearnConfig, words))


def test_a_kill_after_the_weights_leaves_nothing_that_looks_whole(tmp_path):
    cheap = {"max_train_steps": 1, "evaluation.classifier": "null", "evaluation.images_per_label": 1}
    words = flags(tmp_path / "run", cache_dir=tmp_path / "cache", **cheap)
    process = multiprocessing.get_context("fork").Process(target=unlearn_until, args=(words, "model_index.json"))
    process.start()
    process.join()
    assert process.exitcode == 9
    assert (tmp_path / "run/model_index.json").is_file() and (tmp_path / "run/erased_concepts.json").is_file()
    with pytest.raises(ValueError, match="holds no metrics.json"):
        read_run(tmp_path / "run")


def test_a_flipped_bit_in_a_cached_tensor_is_found(tmp_path):
    path, made = tmp_path / "latents-1.safetensors", []

    def compute():
        made.append(None)
        return {"a": torch.arange(1000.0), "b": torch.ones(3, dtype=torch.bfloat16)}

    for _ in range(2):
        found = cached_tensors(path, compute)
        assert torch.equal(found["a"], torch.arange(1000.0)) and len(made) == 1
    content = bytearray(path.read_bytes())
    content[-1000] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"cache file '{re.escape(str(path))}' is damaged.*: delete it"):
        cached_tensors(path, compute)


def test_a_cached_tensor_of_an_earlier_version_is_computed_anew(tmp_path, capsys):
    path = tmp_path / "latents-1.safetensors"
    save_file({"a": torch.zeros(3)}, path)
    for _ in range(2):
        assert torch.equal(cached_tensors(path, lambda: {"a": torch.ones(3)})["a"], torch.ones(3))
    assert capsys.readouterr().out.count("has no hash, as an earlier version left it: computed anew") == 1


@pytest.fixture(scope="module")
def pipeline():
    return pipelines.build("sd")


SAMPLING = SamplingConfig(num_inference_steps=1, batch_size=2)
DAMAGE = {
    "swapped": (lambda images: images[0].write_bytes(images[1].read_bytes()), "00000.png' is not as it was made"),
    "missing": (lambda images: images[1].unlink(), "00001.png' is missing"),
    "another": (lambda images: images[0].with_name("00009.png").write_bytes(b"x"), "00009.png' was not made with"),
    "caption": (lambda images: (images[0].parent / "metadata.jsonl").write_text("{}"), "metadata.jsonl' is not as"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_images_that_the_model_made_are_those_it_made(name, pipeline, tmp_path):
    change, message = DAMAGE[name]
    illustrate = Illustrator(pipeline, tmp_path, "hash", SAMPLING, "image", "text")
    assert len(illustrate(["a bag", "a boot"], 0)) == len(illustrate(["a bag", "a boot"], 0)) == 2
    (folder,) = tmp_path.iterdir()
    change(sorted((folder / "images").glob("*.png")))
    with pytest.raises(ValueError, match=f"{message}.*: delete the folder '{re.escape(str(folder))}'"):
        illustrate(["a bag", "a boot"], 0)


def test_images_of_an_earlier_version_are_made_anew(pipeline, tmp_path):
    illustrate = Illustrator(pipeline, tmp_path, "hash", SAMPLING, "image", "text")
    illustrate(["a bag"], 0)
    (folder,) = tmp_path.iterdir()
    made, manifest = snapshot(folder), json.loads((folder / "manifest.json").read_text())
    Image.new("RGB", (32, 32), "red").save(folder / "images/00000.png")
    (folder / "manifest.json").write_text(json.dumps({key: manifest[key] for key in manifest if key != "files"}))
    illustrate(["a bag"], 0)
    assert snapshot(folder) == made


def test_a_swapped_image_of_an_evaluation_is_found(pipeline, tmp_path):
    rows = [PromptRow("7", "a bag", 1), PromptRow("8", "a boot", 2)]
    generate_folder(pipeline, rows, SAMPLING, tmp_path / "images", {"unet": "a"})
    made = snapshot(tmp_path / "images")
    manifest = json.loads((tmp_path / "images/manifest.json").read_text())
    (tmp_path / "images/7_0.png").write_bytes((tmp_path / "images/8_0.png").read_bytes())
    for look in (
        lambda: generate_folder(pipeline, rows, SAMPLING, tmp_path / "images", {"unet": "a"}),
        lambda: read_folder(str(tmp_path / "images")),
    ):
        with pytest.raises(ValueError, match=r"7_0.png' is not as it was made: delete the folder"):
            look()
    del manifest["files"]
    (tmp_path / "images/manifest.json").write_text(json.dumps(manifest))
    generate_folder(pipeline, rows, SAMPLING, tmp_path / "images", {"unet": "a"})
    assert snapshot(tmp_path / "images") == made
    (tmp_path / "images/holiday.jpg").write_bytes(b"mine")
    with pytest.raises(ValueError, match="holds other files"):
        generate_folder(pipeline, rows, SAMPLING, tmp_path / "images", {"unet": "b"}, overwrite=True)
    assert (tmp_path / "images/holiday.jpg").read_bytes() == b"mine"


@pytest.mark.skipif(os.name != "posix", reason="Windows has no umask")
@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_whoever_the_umask_lets_reads_what_a_run_writes(umask, tmp_path):
    before = os.umask(umask)
    try:
        with written_whole(tmp_path / "one.safetensors") as temporary:
            save_file({"x": torch.zeros(1)}, temporary)
        save_whole(pipelines.sd().save_pretrained, tmp_path / "pipeline", last="model_index.json")
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 5
    assert {path.name: path.stat().st_mode & 0o777 for path in files} == {path.name: 0o666 & ~umask for path in files}
