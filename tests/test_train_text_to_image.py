"""train_scripts/train_text_to_image.py: killed at random moments and resumed, it gives the same pipeline."""

import importlib.util
import json
import os
import sys

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from kills import killed_and_resumed
from safetensors.torch import load_file
from train_text_to_image import TrainConfig, main

from barrier_diffusers.data.generated_images import write_image_folder
from barrier_diffusers.utils.command_line import parse_config, run_script

if importlib.util.find_spec("open_clip") is None:  # not imported: it needs torchvision
    pytest.skip("open-clip-torch, which carries CLIP's vocabulary, is not installed", allow_module_level=True)
TINY = {
    "resolution": 16,
    "report_to": "none",
    "save_dtype": "float32",
    "checkpointing_steps": 1,
    "resume_from_checkpoint": "latest",
    "vae.block_out_channels": "[8, 16]",
    "vae.max_train_steps": 4,
    "vae.train_batch_size": 8,
    "unet.block_out_channels": "[8, 16]",
    "unet.attention_head_dim": 2,
    "unet.norm_num_groups": 4,
    "unet.max_train_steps": 5,
    "unet.train_batch_size": 8,
    "text.hidden_size": 16,
    "text.num_hidden_layers": 1,
    "text.num_attention_heads": 2,
}
WEIGHTS = ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "train"
    images = np.random.default_rng(0).integers(256, size=(20, 16, 16, 3), dtype=np.uint8)
    colours = ["red", "blue", "green", "black"]
    write_image_folder(folder, images, {"text": [f"a photo of a {colours[i % 4]} bag" for i in range(20)]})
    return folder.parent


def words(data, folder, **changes):
    places = {"train_data_dir": data, "output_dir": folder / "sd", "work_dir": folder / "work"}
    return [f"--{name}={value}" for name, value in {**TINY, **places, **changes}.items()]


def child(arguments):
    """A run in a process of its own, which prints nowhere."""
    torch.set_num_threads(1)
    sys.argv = ["train_text_to_image.py", *arguments]
    sys.stdout = sys.stderr = open(os.devnull, "w")
    run_script(main, TrainConfig)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("count", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_moments_and_resumed_it_gives_the_same_bits(count, data, tmp_path):
    whole, done, killed = killed_and_resumed(child, lambda folder: (words(data, folder),), tmp_path, count)
    for folder in done:
        for name in WEIGHTS:
            first, second = (load_file(run / f"sd/{name}.safetensors") for run in (whole, folder))
            assert first.keys() == second.keys()
            assert all(torch.equal(first[key], second[key]) for key in first), (name, killed)
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "whole" / "sd")
    assert pipeline.unet.config.cross_attention_dim == 16
    assert json.loads((tmp_path / "whole/sd/training_config.json").read_text())["unet"]["max_train_steps"] == 5


def test_a_resumed_run_with_other_settings_is_refused(data, tmp_path, monkeypatch, capsys):
    main(parse_config(TrainConfig, words(data, tmp_path)))
    monkeypatch.setattr(sys, "argv", ["train_text_to_image.py", *words(data, tmp_path, **{"unet.learning_rate": 0.5})])
    with pytest.raises(SystemExit) as caught:
        run_script(main, TrainConfig)
    assert caught.value.code == 1
    assert "unet.learning_rate was 0.0015 and is 0.5" in capsys.readouterr().err
