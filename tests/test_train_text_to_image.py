"""train_scripts/train_text_to_image.py: killed at random moments and resumed, it gives the same pipeline."""

import importlib.util
import json
import os
import shutil
import sys

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from kills import killed_and_resumed
from PIL import Image as PILImage
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


def test_a_control_takes_the_vae_as_it_is_reads_every_word_and_never_sees_the_concept(data, tmp_path):
    main(parse_config(TrainConfig, words(data, tmp_path / "all")))
    shared = {"exclude_concepts": "[Red]", "pretrained_vae": tmp_path / "all/sd/vae"}
    main(parse_config(TrainConfig, words(data, tmp_path / "control", **shared)))
    other = shutil.copytree(data, tmp_path / "other_reds")
    for path in sorted((other / "train").glob("*.png"))[::4]:  # every fourth is red
        PILImage.new("RGB", (16, 16), "white").save(path)
    main(parse_config(TrainConfig, words(other, tmp_path / "again", **shared)))

    def weights(run, name):
        return load_file(tmp_path / run / f"sd/{name}.safetensors")

    unet, text = WEIGHTS[0], WEIGHTS[2]
    for name in (unet, text):
        first, second = weights("control", name), weights("again", name)
        assert all(torch.equal(first[key], second[key]) for key in first), name
    assert not all(torch.equal(weights("all", unet)[key], value) for key, value in weights("control", unet).items())
    base, control = (StableDiffusionPipeline.from_pretrained(tmp_path / run / "sd") for run in ("all", "control"))
    assert all(torch.equal(control.vae.state_dict()[key], value) for key, value in base.vae.state_dict().items())
    assert control.vae.config.scaling_factor == base.vae.config.scaling_factor
    assert control.tokenizer.get_vocab() == base.tokenizer.get_vocab()


@pytest.mark.parametrize(
    ("changes", "code", "message"),
    [
        ({"exclude_concepts": "[pink]"}, 1, "names 'pink', but no caption does"),
        ({"exclude_concepts": "[bag]"}, 1, "leaves no row to train on"),
        ({"exclude_concepts": "[red, red]"}, 2, "exclude_concepts names 'red' twice"),
        ({"exclude_concepts": "['']"}, 2, "exclude_concepts has an empty name"),
        ({"pretrained_vae": "nowhere"}, 1, "pretrained_vae is 'nowhere', but there is no such folder"),
        ({"pretrained_vae": "assets/fashion_sd/vae"}, 1, "but the settings in `vae` say"),
        ({"pretrained_vae": "assets/fashion_sd"}, 1, "holds no AutoencoderKL: name 'assets/fashion_sd/vae'"),
        ({"pretrained_vae": "assets/fashion_sd/unet"}, 1, "pretrained_vae 'assets/fashion_sd/unet' holds no Auto"),
        ({"unet.block_out_channels": "[8, 18]"}, 2, "unet.block_out_channels is 18, but must be a multiple of 4"),
        ({"vae.block_out_channels": "[4, 8]"}, 2, "vae.block_out_channels is 4, but must be a multiple of 8"),
        ({"text.hidden_size": 17}, 2, "text.hidden_size is 17, but must be a multiple of 2"),
        ({"resolution": 18}, 2, "resolution is 18, but must be a multiple of 4"),
        ({"text.max_length": 5}, 1, "are the same as far as they are read: raise it to 8"),
    ],
)
def test_a_control_that_cannot_be_trained_is_refused(changes, code, message, data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train_text_to_image.py", *words(data, tmp_path, **changes)])
    with pytest.raises(SystemExit) as caught:
        run_script(main, TrainConfig)
    assert caught.value.code == code
    assert message in capsys.readouterr().err
    assert not (tmp_path / "sd" / "model_index.json").exists()


def test_a_run_resumed_with_other_excluded_pictures_is_refused(data, tmp_path):
    main(parse_config(TrainConfig, words(data, tmp_path)))
    config = parse_config(TrainConfig, words(data, tmp_path, exclude_concepts="[red]"))
    with pytest.raises(ValueError, match="exclude_concepts was"):
        main(config)


def test_an_autoencoder_of_other_data_or_settings_is_not_taken(data, tmp_path, capsys):
    main(parse_config(TrainConfig, words(data, tmp_path)))

    def again(source=data, **changes):
        changes |= {"unet.max_train_steps": 1, "resume_from_checkpoint": "null", "output_dir": tmp_path / "again"}
        main(parse_config(TrainConfig, words(source, tmp_path, **changes)))

    again()
    other = shutil.copytree(data, tmp_path / "other")
    PILImage.new("RGB", (16, 16), "white").save(other / "train" / "00003.png")
    with pytest.raises(ValueError, match=r"the autoencoder in '.*work/vae' was trained with another data: name"):
        again(other)
    with pytest.raises(ValueError, match="was trained with another kl_weight and another seed"):
        again(**{"seed": 3, "vae.kl_weight": 0.1})
    (tmp_path / "work/vae/made_from.json").unlink()  # as an earlier version left it
    capsys.readouterr()
    again(other)
    assert "does not say what it was trained on" in capsys.readouterr().out
