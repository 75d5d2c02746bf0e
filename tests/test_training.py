"""The scripts' shared parts: settings, output folder, data order, checkpoints, hashes."""

import json
import signal
import sys
from dataclasses import dataclass, field

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from torch import nn
from torch.utils.data import DataLoader

from barrier_diffusers import BarrierConfig
from barrier_diffusers.training.steps import freeze_normalisation
from barrier_diffusers.training.trainer import endless
from barrier_diffusers.utils.command_line import parse_config, run_script
from barrier_diffusers.utils.files import move_into, write_json
from barrier_diffusers.utils.run_records import manifest, module_hash


@dataclass
class Settings:
    """Settings of a pretend script."""

    output_dir: str
    learning_rate: float = 1.0
    barrier: BarrierConfig = field(default_factory=BarrierConfig)


def test_yaml_and_dotted_flags_meet(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("output_dir: a\nlearning_rate: 1e-5\nbarrier:\n  reduced_dim: 8\n  targets: [fc]\n")
    config = parse_config(Settings, ["--config", str(file), "--barrier.lambda_interval", "2e-1"])
    assert config == Settings("a", 1e-5, BarrierConfig(targets=["fc"], reduced_dim=8, lambda_interval=0.2))
    assert isinstance(config.learning_rate, float)


@pytest.mark.parametrize(
    ("words", "targets", "blocks"),
    [
        ("--barrier.targets fc head", ["fc", "head"], None),
        ("--barrier.targets fc --learning_rate 2", ["fc"], None),
        ("--barrier.targets [fc,head]", ["fc", "head"], None),
        ("--barrier.targets null", None, None),
        ("--barrier.blocks 0 mid --barrier.targets 1e-5", ["1e-5"], [0, "mid"]),  # words stay words
    ],
)
def test_lists_are_words_one_after_another(words, targets, blocks):
    config = parse_config(Settings, ["--output_dir", "a", *words.split()])
    assert (config.barrier.targets, config.barrier.blocks) == (targets, blocks)


@pytest.mark.parametrize(
    ("flags", "status", "message"),
    [
        (["--output_dir", "a", "--no_such_flag", "1"], 2, "no_such_flag"),
        (["--output_dir", "a", "b"], 2, "b"),  # no list
        (["--output_dir", "a", "--learning_rate", "fast"], 2, "learning_rate"),
        ([], 2, "output_dir"),
        (["--output_dir", "a", "--barrier.region", "sphere"], 2, "barrier.region"),
        (["--output_dir", "a", "--barrier.lower_percentile", "0.99"], 2, "lower_percentile < upper_percentile"),
        (["--output_dir", "fails"], 1, "that folder is no good"),
    ],
)
def test_errors_are_one_line_with_a_status(monkeypatch, capsys, flags, status, message):
    def main(config):
        raise ValueError("that folder\nis no good")

    monkeypatch.setattr(sys, "argv", ["script", *flags])
    with pytest.raises(SystemExit) as caught:
        run_script(main, Settings)
    error = capsys.readouterr().err
    assert caught.value.code == status
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error


def test_ctrl_c_before_training_is_one_line(monkeypatch, capsys):
    def main(config):
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(sys, "argv", ["script", "--output_dir", "a"])
    with pytest.raises(SystemExit) as caught:
        run_script(main, Settings)
    assert caught.value.code == 130 and capsys.readouterr().err.count("\n") == 1


def test_programming_errors_keep_their_traceback(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["script", "--output_dir", "a"])
    with pytest.raises(KeyError):
        run_script(lambda config: {}["missing"], Settings)


def test_json_and_moves_are_whole(tmp_path):
    write_json(tmp_path / "a.json", {"x": [1, 2]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": [1, 2]}
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"x": object()})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": [1, 2]}
    source, target = tmp_path / "new", tmp_path / "old"
    (source / "unet").mkdir(parents=True)
    (source / "unet" / "w").write_text("new")
    (source / "model_index.json").write_text("new")
    (target / "unet").mkdir(parents=True)
    (target / "unet" / "stale").write_text("old")
    move_into(source, target, last="model_index.json")
    assert not source.exists() and not (target / "unet" / "stale").exists()
    assert (target / "unet" / "w").read_text() == (target / "model_index.json").read_text() == "new"


def test_module_hash_sees_every_weight():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).half()
    before = module_hash(model)
    assert before == module_hash(model)
    with torch.no_grad():
        model[1].running_var[2] += 1
    assert module_hash(model) != before


def test_normalisation_stays_in_eval_mode():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(), nn.LayerNorm(3), nn.GroupNorm(1, 3)).eval()
    freeze_normalisation(model)
    assert [layer.training for layer in model] == [True, False, True, False, False]


def prepared_loader():
    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True))
    loader = DataLoader(torch.arange(10), batch_size=3, shuffle=True, generator=torch.Generator().manual_seed(0))
    return accelerator.prepare(loader)


def test_batches_reshuffle_and_continue_where_a_run_stopped():
    torch.manual_seed(0)
    stream = endless(prepared_loader())
    whole = [next(stream).tolist() for _ in range(12)]
    assert sorted(sum(whole[:4], [])) == sorted(sum(whole[4:8], [])) == list(range(10))
    assert whole[:4] != whole[4:8]
    torch.manual_seed(0)
    stream = endless(prepared_loader(), batches_done=6)
    assert [next(stream).tolist() for _ in range(6)] == whole[6:]


def test_manifest_is_complete():
    content = manifest(Settings("a"), {"unet": "abc"}, num_steps=3)
    assert content["settings"]["barrier"]["reduced_dim"] == 32 and content["hashes"] == {"unet": "abc"}
    assert content["versions"]["torch"] == torch.__version__ and content["num_steps"] == 3
    json.dumps(content)
