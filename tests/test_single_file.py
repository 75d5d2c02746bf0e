"""A Stable Diffusion checkpoint in one file, in the layout of its first release, is read."""

import sys
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from tiny_encoders import FASHION

from barrier_diffusers.models.exporting import export_single_file
from barrier_diffusers.models.loading import load_pipeline
from barrier_diffusers.utils.command_line import parse_config
from barrier_diffusers.workflow.settings import UnlearnConfig

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "train_scripts"))

from unlearn_sd import main


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    pipeline = StableDiffusionPipeline.from_pretrained(FASHION, dtype=torch.float32)
    path = tmp_path_factory.mktemp("single") / "fashion.safetensors"
    return pipeline, export_single_file(pipeline, path)


def test_every_weight_arrives(checkpoint):
    pipeline, path = checkpoint
    loaded = load_pipeline(str(path), pipeline_config=str(FASHION), dtype=torch.bfloat16)
    assert loaded.unet.dtype == torch.float32 and loaded.vae.dtype == loaded.text_encoder.dtype == torch.bfloat16
    loaded = load_pipeline(str(path), pipeline_config=str(FASHION))
    for part in ("unet", "vae", "text_encoder"):
        wanted, got = getattr(pipeline, part).state_dict(), getattr(loaded, part).state_dict()
        assert set(got) == set(wanted)
        assert all(torch.equal(got[name], value) for name, value in wanted.items()), part


def test_without_configuration_and_network_the_error_says_what_to_do(checkpoint):
    with pytest.raises(OSError, match="set pipeline_config to a folder"):  # conftest.py switches the hub off
        load_pipeline(str(checkpoint[1]))


def test_the_script_takes_it_and_saves_a_pipeline_folder(checkpoint, tmp_path):
    _, path = checkpoint
    settings = {
        "pretrained_model_name_or_path": path,
        "pipeline_config": FASHION,
        "output_dir": tmp_path / "run",
        "concept": "boot",
        "forget_prompts": '["a photo of a red boot"]',
        "num_generated_images": 2,
        "generation.num_inference_steps": 2,
        "evaluation.sampling.num_inference_steps": 2,
        "evaluation.images_per_label": 1,
        "resolution": 32,
        "train_batch_size": 2,
        "max_train_steps": 2,
        "report_to": "none",
        "objective.anchor": "sneaker",
        "barrier.reduced_dim": 4,
    }
    main(parse_config(UnlearnConfig, [word for key, value in settings.items() for word in (f"--{key}", str(value))]))
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "run")
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline("a photo of a red boot", num_inference_steps=2).images[0].size == (32, 32)
