"""A model's own half-done samples: as diffusers' samplers make them, for every architecture."""

import pytest
import torch
from pipelines import build

from barrier_diffusers.data.encoding import encode_prompts
from barrier_diffusers.models.denoiser import PipelineDenoiser
from barrier_diffusers.models.partial_sampler import PartialSampler, SampledBatches

PROMPTS = ["a photo of a red boot", "a photo of a blue bag"]


def prepared(name, steps=4, scale=3.0):
    pipeline = build(name)
    denoiser = PipelineDenoiser(pipeline)
    conditions = [encode_prompts(pipeline, prompts) for prompts in (PROMPTS, ["", ""])]
    return pipeline, denoiser, PartialSampler(denoiser, denoiser.latent_shape(32), scale, steps), conditions


def stage(monkeypatch, value):
    monkeypatch.setattr("barrier_diffusers.models.partial_sampler.torch.randint", lambda *_: torch.tensor(value))


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "flux"])
def test_shapes_and_no_graph(name):
    _, _, sampler, conditions = prepared(name)
    seen = set()
    for seed in range(12):
        torch.manual_seed(seed)
        noisy, timesteps = sampler(*conditions, torch.arange(2))
        assert noisy.shape == (2, *sampler.latent_shape) and timesteps.shape == (2,) and not noisy.requires_grad
        assert noisy.isfinite().all() and timesteps[0] == timesteps[1]
        seen.add(timesteps[0].item())
    assert 2 <= len(seen) <= 4  # of four stages


@pytest.mark.parametrize("name", ["sd", "sd3", "flux"])
def test_last_stage_is_one_step_before_the_pipelines_result(name, monkeypatch):
    pipeline, denoiser, sampler, conditions = prepared(name)
    stage(monkeypatch, 3)
    torch.manual_seed(0)
    noisy, timesteps = sampler(*conditions, torch.arange(2))
    torch.manual_seed(0)
    noise = torch.randn(2, *sampler.latent_shape)
    stepper = denoiser.noising.sampler(4, sampler.latent_shape)
    seen = []

    def watch(_pipeline, index, _timestep, tensors):
        seen.append(tensors["latents"])
        return tensors

    pipeline.set_progress_bar_config(disable=True)
    packed = noise if name != "flux" else pipeline._pack_latents(noise, 2, *noise.shape[1:])
    guidance = {"guidance_scale": 3.5 if name == "flux" else 3.0}
    if name == "sd3":
        guidance["sigmas"] = [1, 0.75, 0.5, 0.25]
    if name == "sd":
        pipeline.scheduler = type(stepper).from_config(stepper.config)
    pipeline(
        PROMPTS, latents=packed, num_inference_steps=4, height=32, width=32, callback_on_step_end=watch, **guidance,
        output_type="latent",
    )  # fmt: skip
    expected = seen[2]
    if name == "flux":
        expected = pipeline._unpack_latents(expected, 32, 32, pipeline.vae_scale_factor)
    torch.testing.assert_close(noisy, expected, rtol=1e-3, atol=1e-3)
    assert timesteps[0].item() == pytest.approx(stepper.timesteps[3].item())


def test_first_stage_is_noise(monkeypatch):
    _, _, sampler, conditions = prepared("sd")
    stage(monkeypatch, 0)
    torch.manual_seed(0)
    noisy, timesteps = sampler(*conditions, torch.arange(2))
    torch.manual_seed(0)
    assert torch.equal(noisy, torch.randn(2, *sampler.latent_shape)) and timesteps[0] > 700


def test_batches_for_recording():
    _, denoiser, sampler, (condition, empty) = prepared("sd3")
    batches = [{"condition": condition, "unconditional": empty, "index": torch.arange(2)}]
    stored = SampledBatches(batches, sampler, torch.device("cpu"))
    (recorded,), (again,) = stored, stored
    assert len(stored) == 1 and torch.equal(recorded["noisy"], again["noisy"])
    assert denoiser.predict_batch(denoiser.network, recorded).shape == recorded["noisy"].shape
