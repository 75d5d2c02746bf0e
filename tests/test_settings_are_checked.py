"""Settings are checked before the work: each mistake is one line that names the setting, and no weights are read.

The models that the cases name are copies without their weights: whoever tried to load one would fail with another
message.
"""

import functools
import importlib
import shutil
import socket
import subprocess
import sys
import threading
import time
from dataclasses import fields
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
from diffusers.optimization import SchedulerType
from pipelines import build
from short_runs import ROOT

from barrier_diffusers.models.loading import add_adapter, require_pipeline
from barrier_diffusers.protection.config import BarrierConfig
from barrier_diffusers.training.run_config import LR_SCHEDULERS, RunConfig
from barrier_diffusers.utils.checks import PathRule, Range, hints_of, looks_local, rules_of
from barrier_diffusers.utils.checks import section_class as section_of
from barrier_diffusers.utils.command_line import parse_config, run_script
from barrier_diffusers.utils.help_page import LINES, WIDTH, groups_of
from barrier_diffusers.utils.hub import _ask, require_on_hub, will_be_made

SETTINGS = {  # script -> its settings
    "barrier_diffusers.scripts.unlearn_sd": "barrier_diffusers.workflow.settings:UnlearnConfig",
    "barrier_diffusers.scripts.evaluate_sd": "barrier_diffusers.evaluation.settings:EvaluateConfig",
    "barrier_diffusers.scripts.generate_sd": "barrier_diffusers.evaluation.settings:EvaluateConfig",
    "barrier_diffusers.scripts.report": "barrier_diffusers.scripts.report:ReportConfig",
    "barrier_diffusers.scripts.restore": "barrier_diffusers.scripts.restore:RestoreConfig",
    "barrier_diffusers.scripts.export": "barrier_diffusers.scripts.export:ExportConfig",
    "barrier_diffusers.scripts.demo": "barrier_diffusers.workflow.demo:DemoConfig",
    "barrier_diffusers.scripts.sweep": "barrier_diffusers.workflow.sweeps:SweepConfig",
    "barrier_diffusers.scripts.run_pipeline": "barrier_diffusers.workflow.workflow:WorkflowConfig",
    "barrier_diffusers.scripts.score_text_to_image": "barrier_diffusers.scripts.score_text_to_image:ScoreConfig",
    "barrier_diffusers.scripts.train_classifier": "barrier_diffusers.scripts.train_classifier:ClassifierConfig",
    "barrier_diffusers.scripts.train_text_to_image": "barrier_diffusers.scripts.train_text_to_image:TrainConfig",
    "barrier_diffusers.scripts.prepare_fashion_mnist": "barrier_diffusers.scripts.prepare_fashion_mnist:PrepareConfig",
    "classification_ext.train": "classification_ext.settings:TrainConfig",
    "classification_ext.unlearn": "classification_ext.settings:UnlearnConfig",
    "classification_ext.evaluate": "classification_ext.settings:EvaluateConfig",
    "ddpm_ext.train": "ddpm_ext.settings:TrainConfig",
    "ddpm_ext.unlearn": "ddpm_ext.settings:UnlearnConfig",
    "ddpm_ext.evaluate": "ddpm_ext.settings:EvaluateConfig",
    "ddpm_ext.sample": "ddpm_ext.sample:SampleConfig",
}


def settings_class(script):
    module, name = SETTINGS[script].split(":")
    return getattr(importlib.import_module(module), name)


@pytest.fixture
def hollow(tmp_path, monkeypatch):
    """The working folder has the repository's assets, of which the models have no weights; wandb is not installed."""
    ignore = shutil.ignore_patterns("*.safetensors", "*.png")
    for name in ("fashion_sd", "fashion_ddpm", "fashion_resnet", "fashion_classifier"):
        shutil.copytree(ROOT / "assets" / name, tmp_path / "assets" / name, ignore=ignore)
    for name in ("fashion_images", "fashion_mnist"):
        (tmp_path / "assets" / name).symlink_to(ROOT / "assets" / name)
    for name in ("train_scripts", "classification_ext", "ddpm_ext"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "file").write_text("")
    (tmp_path / "list.yaml").write_text("barrier: [a]\n")
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refusal(script, words, monkeypatch, capsys):
    """The one line that a script ends in, run in this process."""
    module = importlib.import_module(script)
    what = module.parse if script.endswith("run_pipeline") else settings_class(script)
    monkeypatch.setattr(sys, "argv", [script, *words])
    with pytest.raises(SystemExit) as caught:
        run_script(module.main, what)
    assert caught.value.code in (1, 2)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line.removeprefix("error: ")


SD, JUDGE = "barrier_diffusers.scripts.unlearn_sd", "barrier_diffusers.scripts.evaluate_sd"
FLOW, SWEEP = "barrier_diffusers.scripts.run_pipeline", "barrier_diffusers.scripts.sweep"
CONFIGS = {
    SD: "train_scripts/configs/fashion_class.yaml",
    JUDGE: "train_scripts/configs/evaluate_fashion.yaml",
    FLOW: "train_scripts/configs/pipeline_fashion_class.yaml",
    "classification_ext.unlearn": "classification_ext/configs/fashion_class.yaml",
    "classification_ext.train": "classification_ext/configs/fashion_train.yaml",
    "classification_ext.evaluate": "classification_ext/configs/fashion_evaluate.yaml",
    "ddpm_ext.train": "ddpm_ext/configs/train_fashion.yaml",
    "ddpm_ext.unlearn": "ddpm_ext/configs/unlearn_fashion.yaml",
    "ddpm_ext.evaluate": "ddpm_ext/configs/evaluate_fashion.yaml",
}
GIVEN = {JUDGE: ["--pretrained_model_name_or_path=assets/fashion_sd", "--base_model=null"]}
CASES = {
    "gradient turned around": (SD, ["--max_grad_norm=-1"], "max_grad_norm is -1.0, but must be > 0"),
    "gradient cut to nothing": (SD, ["--max_grad_norm=0"], "max_grad_norm is 0.0, but must be > 0"),
    "negative sampling steps": (
        SD,
        ["--evaluation.sampling.num_inference_steps=-3"],
        "evaluation.sampling.num_inference_steps is -3, but must be at least 1",
    ),
    "no sampling steps": (
        JUDGE,
        ["--evaluation.sampling.num_inference_steps=0"],
        "evaluation.sampling.num_inference_steps is 0",
    ),
    "negative warm-up": (SD, ["--lr_warmup_steps=-1"], "lr_warmup_steps is -1, but must be at least 0"),
    "useless warm-up": (
        SD,
        ["--lr_warmup_steps=5", "--lr_scheduler=constant"],
        "constant has no warm-up",
    ),
    "endless warm-up": (
        SD,
        ["--lr_warmup_steps=9", "--lr_scheduler=cosine", "--max_train_steps=9"],
        "lr_warmup_steps is 9, but must be less than max_train_steps 9",
    ),
    "concept twice": (SD, ["--concept", "bag", "bag"], "'bag'"),
    "concept twice in another case": (SD, ["--concept", "bag", "Bag"], "'Bag'"),
    "labels twice": ("ddpm_ext.unlearn", ["--concept", "bag", "bag"], "concept names 'bag' twice"),
    "class twice": ("classification_ext.unlearn", ["--forget_class", "bag", "bag"], "forget_class names 'bag' twice"),
    "a section that is a list": (
        SD,
        ["--config=list.yaml", "--barrier.reduced_dim=4"],
        "barrier is ['a'], but must be",
    ),
    "a flag that is no section": (SD, ["--barrier=[a]", "--barrier.reduced_dim=4"], "barrier is ['a'], but"),
    "a workflow's section": (FLOW, ["--unlearn=[a]", "--unlearn.rank=4"], "unlearn is ['a'], but must be settings"),
    "what no method reads": ("classification_ext.unlearn", ["--method.epsilon=3"], "does not read method.epsilon"),
    "a recipe that is not read": ("classification_ext.unlearn", ["--recipe.shift=1"], "does not read recipe"),
    "momentum of adamw": (
        "classification_ext.unlearn",
        ["--optimizer=adamw", "--momentum=0.5"],
        "momentum is 0.5, but optimizer adamw has none",
    ),
    "what no objective reads": (SD, ["--objective.temperature=2"], "temperature"),
    "tested on what it was trained on": (
        "classification_ext.train",
        ["--test_split=train"],
        "test_split and train_split are both 'train'",
    ),
    "judged on what it was trained on": (
        "classification_ext.unlearn",
        ["--test_split=train"],
        "test_split and train_split are both 'train'",
    ),
    "no stages": (FLOW, ["--stages", "[]"], "stages is empty"),
    "a tracker that is not installed": (SD, ["--report_to=wandb"], "report_to is 'wandb', but wandb cannot log here"),
    "a workflow's tracker": (FLOW, ["--track.report_to=wandb"], "track.report_to is 'wandb', but wandb cannot log"),
    "a judge that does not know the concept": (
        SD,
        ["--concept=hat", "--objective.anchor=boot"],
        "the evaluation classifier cannot recognise hat",
    ),
    "a judge of a saved pipeline": (JUDGE, ["--concept=hat"], "cannot recognise hat"),
    "a workflow's judge": (
        FLOW,
        ["--evaluate.concept=hat"],
        "generate: the evaluation classifier cannot recognise hat",
    ),
    "a judge of labels": ("ddpm_ext.unlearn", ["--concept=hat"], "the judge does not know hat"),
    "unwritable cache": (SD, ["--cache_dir=file/cache"], "cache_dir is 'file/cache', but it cannot be made"),
    "features' cache": (
        JUDGE,
        ["--fidelity.cache_dir=file/x"],
        "fidelity.cache_dir is 'file/x', but it cannot be",
    ),
    "output that cannot be made": (SD, ["--output_dir=file/out"], "output_dir is 'file/out', but it cannot be made"),
    "a workflow's output": (FLOW, ["--output_dir=file/out"], "output_dir is 'file/out', but it cannot be made"),
    "schedule": (SD, ["--lr_scheduler=cosin"], "lr_scheduler is 'cosin', but must be one of constant, constant_with"),
    "decay": (SD, ["--adam_weight_decay=-1"], "adam_weight_decay is -1.0, but must be at least 0"),
    "rank": (SD, ["--rank=100000"], "rank is 100000, but must be in [0, 4096]"),
    "validation labels": (
        "ddpm_ext.unlearn",
        ["--validation_prompt", "bag", "hat"],
        "validation_prompt names 'hat', but the pipeline's labels are t-shirt",
    ),
    "misspelled model": (
        SD,
        ["--pretrained_model_name_or_path=assets/fashion_ds"],
        "pretrained_model_name_or_path is 'assets/fashion_ds', but there is no such file or folder; 'assets' holds",
    ),
    "misspelled base": (
        JUDGE,
        ["--base_model=assets/fashion_ds"],
        "base_model is 'assets/fashion_ds', but there is",
    ),
    "misspelled data": (
        "classification_ext.train",
        ["--train_data_dir=assets/fashion_minst"],
        "train_data_dir is 'assets/fashion_minst', but there is no such",
    ),
    "misspelled data of a workflow": (
        FLOW,
        ["--unlearn.train_data_dir=assets/fashion_image"],
        "unlearn: train_data_dir 'assets/fashion_image' does not exist",
    ),
    "a network for a pipeline": (
        SD,
        ["--pretrained_model_name_or_path=assets/fashion_sd/unet"],
        "pretrained_model_name_or_path 'assets/fashion_sd/unet' is no pipeline, as it has no model_index.json: it",
    ),
    "a judge's folder for a control": (
        JUDGE,
        ["--control=assets/fashion_classifier"],
        "control 'assets/fashion_classifier' is no pipeline, as it has no model_index.json",
    ),
    "a control that is nowhere": (JUDGE, ["--control=nobody/nothing"], "'nobody/nothing' here, and no model of that"),
    "a CLIP that is nowhere": (JUDGE, ["--clip=nobody/clip"], "no file or folder 'nobody/clip' here, and no model of"),
    "misspelled CLIP": (JUDGE, ["--clip=./clip"], "clip is './clip', but there is no such file or folder"),
    "shadow models": (
        "classification_ext.evaluate",
        ["--evaluation.shadow_models", "runs/none"],
        "evaluation.shadow_models is 'runs/none', but there is no such folder",
    ),
    "share": ("ddpm_ext.train", ["--ema_decay=1"], "ema_decay is 1.0, but must be in [0, 1)"),
    "not a number": (SD, ["--learning_rate=.nan"], "learning_rate is nan, but must be > 0"),
    "infinite": (SD, ["--barrier.lambda_interval=.inf"], "barrier.lambda_interval is inf, but must be at least 0"),
    "seed": (SD, ["--seed=-1"], "seed is -1, but must be in"),
    "an attack's budget": (JUDGE, ["--inversion.num_steps=0"], "inversion.num_steps is 0, but must be at least 1"),
    "network": ("ddpm_ext.train", ["--unet.dropout=2"], "unet.dropout is 2.0, but must be in [0, 1)"),
    "workers' patience": (
        SWEEP,
        ["--sweep=fashion_class", "--output_dir=o", "--grace_seconds=0"],
        "grace_seconds is 0",
    ),
    "a list of settings": (FLOW, ["--launch.num_processes=0"], "launch.num_processes is 0, but must be at least 1"),
}


@pytest.mark.parametrize("name", CASES)
def test_one_line_before_any_weights_are_read(name, hollow, monkeypatch, capsys):
    script, words, message = CASES[name]
    config = ["--config", CONFIGS[script]] if script in CONFIGS else []
    said = refusal(script, [*config, *GIVEN.get(script, []), *words], monkeypatch, capsys)
    assert message in said
    assert not (hollow / "runs").exists()


@pytest.fixture
def unreachable(monkeypatch):
    """Nothing listens where the hub is."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{port}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    _ask.cache_clear()


NAMED = {  # a setting that names something of the hub, in each script that reads one
    SD: "pretrained_model_name_or_path",
    JUDGE: "base_model",
    "classification_ext.train": "model_name_or_path",
    "classification_ext.unlearn": "pretrained_model_name_or_path",
}


@pytest.mark.parametrize("script", NAMED)
def test_a_misspelled_name_of_the_hub_is_said_at_once(script, hollow, unreachable, monkeypatch, capsys):
    words = ["--config", CONFIGS[script], *GIVEN.get(script, [])[:1], "--output_dir=new"]
    words += [f"--{NAMED[script]}=CompViz/stable-diffusion-v1-4"]
    start = time.monotonic()
    said = refusal(script, words, monkeypatch, capsys)
    assert "there is no file or folder 'CompViz/stable-diffusion-v1-4' here, and the hub cannot be asked" in said
    assert time.monotonic() - start < 20


def test_what_the_hub_says_of_a_name(tmp_path, monkeypatch):
    class Hub(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(404 if "none" in self.path else 500)
            self.send_header("X-Error-Code", "RepoNotFound" if "none" in self.path else "Fault")
            self.end_headers()

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    _ask.cache_clear()
    for kind, what in {"model": "model", "dataset": "data set"}.items():
        with pytest.raises(ValueError, match=f"no {what} of that name on the hub: look at its spelling"):
            require_on_hub("owner/none", kind)
        for odd in ("owner/a..b", "owner/name.git", "a" * 120):
            with pytest.raises(ValueError, match=f"no {what} of the hub can be called that"):
                require_on_hub(odd, kind)
        require_on_hub("owner/ill", kind)  # a fault of the hub's is left to whoever loads
        (tmp_path / f"{kind}s--owner--none-but-cached" / "snapshots" / "1").mkdir(parents=True)
        require_on_hub("owner/none-but-cached", kind)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="no model of that name among the downloads"):
        require_on_hub("owner/other")
    server.shutdown()


def sections(config_class, prefix=""):
    """(prefix, class) of a settings dataclass and of those in it."""
    yield prefix, config_class
    for name, hint in hints_of(config_class).items():
        section = section_of(hint)
        if section is not None:
            yield from sections(section, f"{prefix}{name}.")


@pytest.mark.parametrize("script", SETTINGS)
def test_each_number_has_its_range_and_each_flag_its_comment(script):
    config_class = settings_class(script)
    for prefix, part in sections(config_class):
        rules, hints = rules_of(part), hints_of(part)
        for field in fields(part):
            kinds = str(hints[field.name]) if "Literal" not in str(hints[field.name]) else ""
            is_number = hints[field.name] in (int, float) or any(kind in kinds for kind in ("int", "float"))
            if is_number and section_of(hints[field.name]) is None:
                assert isinstance(rules.get(field.name), Range), f"{prefix}{field.name} has no range"
    flags = [flag for group in groups_of(config_class) for flag in group.flags]
    assert not [flag.name for flag in flags if not flag.comment]


PATHS = ("_dir", "_dirs", "_or_path", "_weights", "base_model", "cache")
NO_PATHS = ("trained_weights", "meta_weights", "overwrite_output_dir")


@pytest.mark.parametrize("script", SETTINGS)
def test_each_path_is_looked_at(script):
    for prefix, part in sections(settings_class(script)):
        for field in fields(part):
            if field.name.endswith(PATHS) and field.name not in (
                "trained_weights",
                "meta_weights",
                "overwrite_output_dir",
            ):
                assert isinstance(rules_of(part).get(field.name), PathRule), f"{prefix}{field.name}"


def test_the_schedules_are_those_of_the_library():
    assert set(LR_SCHEDULERS) == {kind.value for kind in SchedulerType} | {"one_cycle"}


def test_what_looks_like_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "assets").mkdir()
    local = ["./model", "../model", "~/model", "/data/model", "a/b/c", "assets/model", "model.safetensors", "a b"]
    assert all(looks_local(name) for name in local)
    assert not any(looks_local(name) for name in ["gpt2", "CompVis/stable-diffusion-v1-4", "uoft-cs/cifar10"])


@functools.cache
def page_of(script, flag):
    done = subprocess.run([sys.executable, "-m", script, flag], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return done.stdout


HELPED = [SD, JUDGE, FLOW, SWEEP, "classification_ext.unlearn", "ddpm_ext.train"]


@pytest.mark.parametrize("script", HELPED)
def test_help_needs_nothing_and_fits(script):
    lines = page_of(script, "--help").splitlines()
    assert len(lines) <= LINES and max(map(len, lines)) <= WIDTH and lines[0].startswith("usage: ")
    config_class = settings_class(script)
    own = [field.name for field in fields(config_class) if section_of(hints_of(config_class)[field.name]) is None]
    assert all(any(line.startswith(f"  --{name}") for line in lines) for name in own)


def test_help_all_describes_every_flag():
    text = page_of(SD, "--help-all")
    flags = [flag for group in groups_of(settings_class(SD)) for flag in group.flags]
    assert len(flags) > 100 and all(f"--{flag.name}" in text for flag in flags)
    assert max(map(len, text.splitlines())) <= WIDTH
    (seed,) = [flag for flag in flags if flag.name == "generation.seed"]
    assert seed.default == "0"  # the script's own default, not the dataclass's


def test_a_section_has_the_defaults_of_the_script():
    flags = [flag for group in groups_of(settings_class("ddpm_ext.unlearn")) for flag in group.flags]
    (targets,) = [flag for flag in flags if flag.name == "barrier.targets"]
    assert "class_embedding" in targets.default


def test_the_first_line_says_what_is_going_to_happen():
    words = ["--config", str(ROOT / CONFIGS[SD]), "--evaluation.classifier=null"]
    config = parse_config(settings_class(SD), words)
    assert config.announcement.startswith("unlearning sneaker in assets/fashion_sd: rl trains the weights of ")
    assert "assets/fashion_images; BARRIER: " in config.announcement and Path(config.output_dir).name


ANNOUNCED = {
    "classification_ext.train": ([], "training resnet8-tiny on assets/fashion_mnist"),
    "classification_ext.unlearn": (
        ["--forget_class=null", "--forget_fraction=0.1"],
        "unlearning a share of 0.1 of the ",
    ),
    "classification_ext.evaluate": ([], "judging "),
    "ddpm_ext.train": (["--exclude_labels", "bag"], "training a class-conditional DDPM from scratch on "),
    "barrier_diffusers.scripts.train_classifier": (
        [],
        "training a classifier from scratch to tell class, colour, style",
    ),
    "barrier_diffusers.scripts.train_text_to_image": (
        ["--exclude_concepts", "[bag]"],
        "training a small Stable Diffusion from scratch on runs/fashion_mnist, without bag",
    ),
}


@pytest.mark.parametrize("script", ANNOUNCED)
def test_every_run_says_first_what_it_does(script, monkeypatch):
    monkeypatch.chdir(ROOT)
    words, said = ANNOUNCED[script]
    config = ["--config", CONFIGS[script]] if script in CONFIGS else []
    assert parse_config(settings_class(script), [*config, *words]).announcement.startswith(said)


def test_no_run_is_silent():
    trains = [script for script in SETTINGS if issubclass(settings_class(script), RunConfig)]
    assert len(trains) >= 7 and all(hasattr(settings_class(script), "announcement") for script in trains)


@pytest.mark.parametrize("rank, refused", [(8, False), (9, True)])
def test_an_adapter_is_no_wider_than_its_maps(rank, refused):
    pipeline = build("sd")  # its narrowest maps have 8 features
    config = BarrierConfig(targets=["attn2.to_k"])
    if refused:
        with pytest.raises(ValueError, match=r"rank is 9, but the adapter of .*attn2.to_k can have 8 at most"):
            add_adapter(pipeline.unet, config, rank)
    else:
        add_adapter(pipeline.unet, config, rank)


def test_a_rank_above_the_width_is_refused_before_any_data_is_read(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    data = tmp_path / "data"
    data.mkdir()
    (data / "broken.png").write_text("")
    words = ["--config", CONFIGS[SD], "--rank=2000", f"--train_data_dir={data}", f"--output_dir={tmp_path / 'run'}"]
    assert "rank is 2000, but the adapter of " in refusal(SD, words, monkeypatch, capsys)


def test_a_pipeline_that_a_stage_makes_anew_need_not_be_whole_yet(tmp_path):
    (tmp_path / "runs/unlearned/unet").mkdir(parents=True)  # as a killed stage left it
    half = str(tmp_path / "runs/unlearned")
    with pytest.raises(ValueError, match="control '.*unlearned' is no pipeline"):
        require_pipeline(half, "control")
    (tmp_path / "runs/unlearned/pytorch_lora_weights.safetensors").write_text("")
    with pytest.raises(ValueError, match="it holds an adapter: name its base model here$"):
        require_pipeline(half)
    with will_be_made([tmp_path / "runs"]):
        require_pipeline(half, "control")
