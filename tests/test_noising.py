"""Noised inputs and targets of every family against an independent float64 computation."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from pipelines import build

from barrier_diffusers.models.autoencoders import latent_normalisation, sample_latents
from barrier_diffusers.models.denoiser import PipelineDenoiser
from barrier_diffusers.models.noising import DiffusionNoising, FlowNoising


def seeded():
    return torch.Generator().manual_seed(3)


def draws(shape, count):
    """What the noising functions draw, in their order, as float64."""
    generator = seeded()
    return [torch.randn(size, generator=generator).double().numpy() for size in (shape, *count)]


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_diffusion(prediction_type):
    latents = torch.randn(5, 4, 6, 6)
    scheduler = DDIMScheduler(prediction_type=prediction_type, beta_schedule="scaled_linear", beta_end=0.012)
    got = DiffusionNoising(scheduler, 1)(latents, seeded())
    (noise,) = draws(latents.shape, [])
    betas = np.linspace(0.0001**0.5, 0.012**0.5, 1000) ** 2
    kept = np.cumprod(1 - betas)[got.timesteps.numpy()].reshape(-1, 1, 1, 1)
    clean = latents.double().numpy()
    velocity = np.sqrt(kept) * noise - np.sqrt(1 - kept) * clean
    np.testing.assert_allclose(got.noisy, np.sqrt(kept) * clean + np.sqrt(1 - kept) * noise, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(got.target, noise if prediction_type == "epsilon" else velocity, rtol=1e-4, atol=1e-5)


def test_timesteps_of_diffusion_are_uniform():
    timesteps = DiffusionNoising(DDIMScheduler(), 1)(torch.zeros(20000, 1, 1, 1), seeded()).timesteps
    assert timesteps.min() == 0 and timesteps.max() == 999
    assert timesteps.float().mean().item() == pytest.approx(499.5, abs=6)


def test_another_prediction_type_is_refused():
    with pytest.raises(ValueError, match="prediction_type is 'sample'"):
        DiffusionNoising(DDIMScheduler(prediction_type="sample"), 1)


FLOWS = {
    "no shift": ({"shift": 1.0}, lambda sigma, tokens: sigma),
    "constant shift": ({"shift": 3.0}, lambda sigma, tokens: 3 * sigma / (1 + 2 * sigma)),
    "by the number of tokens": (
        {"use_dynamic_shifting": True, "shift": 3.0},
        lambda sigma, tokens: 1 / (1 + np.exp(-(0.5 + (tokens - 256) * 0.65 / 3840)) * (1 / sigma - 1)),
    ),
}


@pytest.mark.parametrize("name", FLOWS)
def test_flow_matching(name):
    settings, shifted = FLOWS[name]
    latents = torch.randn(7, 4, 32, 64)
    got = FlowNoising(FlowMatchEulerDiscreteScheduler(**settings), 2)(latents, seeded())
    noise, normal = draws(latents.shape, [(7,)])
    place = np.floor(1000 / (1 + np.exp(-normal)))
    sigma = shifted(1 - place / 1000, 16 * 32)
    np.testing.assert_allclose(got.timesteps, 1000 * sigma, rtol=1e-4)
    sigma = sigma.reshape(-1, 1, 1, 1)
    clean = latents.double().numpy()
    np.testing.assert_allclose(got.noisy, (1 - sigma) * clean + sigma * noise, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(got.target, noise - clean, rtol=1e-4, atol=1e-5)


def test_a_flow_step_with_the_exact_target_leads_back_to_the_image():
    """The sampler's own step, from x_t with the target as prediction to sigma = 0, gives the clean latents."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    latents = torch.randn(1, 4, 8, 8)
    got = FlowNoising(scheduler, 2)(latents, seeded())
    scheduler.set_timesteps(sigmas=[got.timesteps.item() / 1000 / (3 - 2 * got.timesteps.item() / 1000)])
    assert scheduler.timesteps.item() == pytest.approx(got.timesteps.item(), rel=1e-5)
    back = scheduler.step(got.target, scheduler.timesteps[0], got.noisy).prev_sample
    torch.testing.assert_close(back, latents, rtol=1e-4, atol=1e-4)


def test_the_pipelines_scheduler_is_left_alone():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(4)
    before = scheduler.sigmas.clone()
    FlowNoising(scheduler, 2)(torch.zeros(1, 4, 8, 8))
    assert torch.equal(scheduler.sigmas, before)


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "flux"])
def test_latents_are_the_ones_the_pipeline_decodes(name):
    """Undone as each pipeline does before it decodes: / scaling_factor + shift_factor."""
    pipeline = build(name)
    channels = pipeline.vae.config.latent_channels
    mean = torch.randn(3, channels, 4, 4)
    moments = torch.cat([mean, torch.full_like(mean, -30.0)], 1)
    shift, scale = latent_normalisation(pipeline.vae)
    latents = sample_latents(moments, scale, shift=shift)
    config = pipeline.vae.config
    decoded = latents / config.scaling_factor + (config.shift_factor or 0)
    torch.testing.assert_close(decoded, mean, rtol=1e-4, atol=1e-4)
    assert (shift.item() != 0) == (name in ("sd3", "flux"))


def test_latents_normalised_per_channel():
    """latents_mean and latents_std, undone as StableDiffusionXLPipeline does: * std / scaling_factor + mean."""
    vae = build("sdxl").vae
    vae.register_to_config(latents_mean=[0.5, -1.0, 2.0, 0.0], latents_std=[2.0, 1.0, 4.0, 0.5])
    mean = torch.randn(2, 4, 3, 3)
    shift, scale = latent_normalisation(vae)
    latents = sample_latents(torch.cat([mean, torch.full_like(mean, -30.0)], 1), scale, shift=shift)
    means, stds = (torch.tensor(vae.config[key]).view(1, 4, 1, 1) for key in ("latents_mean", "latents_std"))
    torch.testing.assert_close(latents * stds / vae.config.scaling_factor + means, mean, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["sd_velocity", "flux"])
def test_one_generator_gives_one_draw(name):
    denoiser = PipelineDenoiser(build(name))
    moments = torch.zeros(4, 4 if name == "flux" else 8, 8, 8)
    first, second = (denoiser.noised(moments, seeded()) for _ in range(2))
    for key in ("noisy", "timesteps", "target"):
        assert torch.equal(getattr(first, key), getattr(second, key))
