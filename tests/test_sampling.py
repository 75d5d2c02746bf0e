"""A model's own half-done samples: as diffusers' samplers make them, for every architecture."""

import pytest
import torch
from pipelines import build

from barrier_diffusers.data.encoding import encode_prompts
from barrier_diffusers.models.denoiser import PipelineDenoiser
from barrier_diffusers.models.partial_sampler import PartialSampler, SampledBatches, Share
from barrier_diffusers.training.steps import StepMaker

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
    batch = {"condition": condition, "unconditional": empty, "index": torch.arange(2)}
    batches = [(batch, Share.of(2, 0, 1))]
    stored = SampledBatches(batches, sampler, torch.device("cpu"))
    (recorded,), (again,) = stored, stored
    assert len(stored) == 1 and torch.equal(recorded["noisy"], again["noisy"])
    assert denoiser.predict_batch(denoiser.network, recorded).shape == recorded["noisy"].shape


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_with_one_random_state_record_together_what_one_does(processes):
    _, _, sampler, (condition, empty) = prepared("sd")
    batch = {"condition": condition, "unconditional": empty, "index": torch.arange(2)}

    def recorded(index, count):
        torch.manual_seed(0)
        batches = [(batch, Share.of(2, index, count)) for _ in range(3)]
        return list(SampledBatches(batches, sampler, torch.device("cpu")))

    (whole, parts) = recorded(0, 1), [recorded(index, processes) for index in range(processes)]
    assert sum(len(part) for part in parts) == 3 * 2 and len(whole) == 3  # two rows: a third process has none
    together = [torch.cat([part[number]["noisy"] for part in parts if part]) for number in range(3)]
    for one, several in zip(whole, together, strict=True):
        torch.testing.assert_close(several, one["noisy"], rtol=1e-4, atol=1e-5)


def test_shares_are_all_rows_in_order():
    for total in range(7):
        shares = [Share.of(total, index, 3) for index in range(3)]
        assert [row for share in shares for row in range(total)[share.own]] == list(range(total))
        assert [share.is_empty for share in shares] == [len(range(total)[share.own]) == 0 for share in shares]


def test_steps_of_shares_are_together_the_step_of_one_process():
    pipeline, denoiser, _, (condition, _) = prepared("sd")
    moments = torch.randn(2, 8, 8, 8, generator=torch.Generator().manual_seed(1))
    batch = {"condition": condition, "moments": moments, "index": torch.arange(2)}

    def step(index, count):
        torch.manual_seed(0)
        return StepMaker(pipeline.unet, denoiser).of_share(batch, Share.of(2, index, count))

    whole, parts = step(0, 1), [step(index, 2) for index in range(2)]
    for name in ("noisy", "timesteps", "target"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))
    torch.manual_seed(0)
    assert torch.equal(StepMaker(pipeline.unet, denoiser)(batch).noisy, whole.noisy)
