"""train_scripts/restore.py: an unlearning run is undone, to the bit."""

import sys

import pytest
import torch
from restore import RestoreConfig, main
from safetensors.torch import load_file, save_file
from short_runs import BASE, ROOT, run

from barrier_diffusers.models.loading import load_pipeline
from barrier_diffusers.utils.command_line import run_script


@pytest.fixture(autouse=True)
def in_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.mark.parametrize("trained", ["targets", "all"])
def test_a_run_is_undone_to_the_bit(trained, tmp_path, cache):
    run(tmp_path / "run", cache, trained_weights=trained)
    weights = load_file(tmp_path / "run/unet/diffusion_pytorch_model.safetensors")
    base = load_pipeline(str(BASE))
    changed = [name for name, value in base.unet.state_dict().items() if not torch.equal(value, weights[name])]
    assert changed
    main(RestoreConfig(str(tmp_path / "run"), str(tmp_path / "restored")))
    restored = load_pipeline(str(tmp_path / "restored"))
    for part in ("unet", "vae", "text_encoder"):
        before, after = getattr(base, part).state_dict(), getattr(restored, part).state_dict()
        assert before.keys() == after.keys() and all(torch.equal(after[name], value) for name, value in before.items())
    assert restored.tokenizer.get_vocab() == base.tokenizer.get_vocab()


def refusal(folder, output, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["restore.py", "--unlearned_model", str(folder), "--output_dir", str(output)])
    with pytest.raises(SystemExit) as caught:
        run_script(main, RestoreConfig)
    assert caught.value.code == 1 and not output.exists()
    return capsys.readouterr().err


def test_what_cannot_be_undone_is_refused(tmp_path, cache, monkeypatch, capsys):
    output = tmp_path / "out"
    run(tmp_path / "plain", cache, **{"barrier.lambda_interval": 0, "max_train_steps": 1})
    assert "ran without protection and kept no snapshot" in refusal(tmp_path / "plain", output, monkeypatch, capsys)
    run(tmp_path / "lora", cache, rank=2, max_train_steps=1)
    assert "holds an adapter beside an untouched base" in refusal(tmp_path / "lora", output, monkeypatch, capsys)
    assert "is no finished run of unlearn_sd.py" in refusal(BASE, output, monkeypatch, capsys)
    run(tmp_path / "run", cache, max_train_steps=1)
    path = tmp_path / "run/unet/diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    save_file({name: value + (name == "conv_in.bias") for name, value in weights.items()}, path, {"format": "pt"})
    assert "something beside the protected maps has changed" in refusal(tmp_path / "run", output, monkeypatch, capsys)
