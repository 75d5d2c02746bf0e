"""Every architecture: training calls the denoiser as its pipeline does."""

import inspect
import re
import warnings

import numpy as np
import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FluxPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPAGPipeline,
)
from PIL import Image
from pipelines import BUILDERS, build
from short_runs import ROOT

from barrier_diffusers import Barrier, BarrierConfig, register_architecture, unlearn
from barrier_diffusers.data.encoding import encode_prompts, posteriors
from barrier_diffusers.models.architectures import get_architecture, sampling_arguments
from barrier_diffusers.models.autoencoders import arranged
from barrier_diffusers.models.denoiser import PipelineDenoiser
from barrier_diffusers.models.learned_tokens import learned_tokens
from barrier_diffusers.models.rows.base import pack, unpack
from barrier_diffusers.models.rows.flux import image_ids
from barrier_diffusers.objectives import ObjectiveConfig, load_objective
from barrier_diffusers.protection.targets import numbered_blocks
from barrier_diffusers.training.steps import StepMaker
from barrier_diffusers.training.unlearn import text_inputs

PROMPTS = ["a photo of a red boot", "a sneaker"]


class Stop(Exception):
    """Enough was seen of a pipeline at work."""


def as_latents(pipeline, value, height, width):
    """What the pipeline hands its denoiser or scheduler, as latents (B, c, h, w), by the pipeline's own functions."""
    if isinstance(value, list):
        return torch.stack(value).squeeze(2)
    if value.ndim == 4:
        return value
    if hasattr(pipeline, "_unpack_latents_with_ids"):
        side = 2 * pipeline.vae_scale_factor
        ids = pipeline._prepare_latent_ids(torch.zeros(len(value), 1, height // side, width // side))
        return pipeline._unpack_latents_with_ids(value, ids)
    unpacked = pipeline._unpack_latents(value, height, width, pipeline.vae_scale_factor)
    return unpacked.squeeze(2) if unpacked.ndim == 5 else unpacked


def flat(values, prefix=""):
    """Nested dictionaries and lists as one level; nothing that is None or empty."""
    if isinstance(values, (dict, list, tuple)):
        pairs = values.items() if isinstance(values, dict) else enumerate(values)
        return {key: leaf for name, value in pairs for key, leaf in flat(value, f"{prefix}.{name}").items()}
    return {} if values is None else {prefix: values}


def captured_call(network, run):
    """Arguments by name of the denoiser's first call in `run`."""
    calls = []

    def hook(module, args, kwargs):
        bound = inspect.signature(type(network).forward).bind(network, *args, **kwargs).arguments
        calls.append({key: value for key, value in bound.items() if key not in ("self", "return_dict")})

    handle = network.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        run()
    except Stop:
        pass
    finally:
        handle.remove()
    return calls[0]


def sides(name):
    """Height and width in pixels at which a tiny pipeline is run."""
    return (32, 32) if name == "hidream" else (32, 64)  # which makes 4096 tokens of what is not square


def settings_of(name, pipeline, guidance=1.0):
    """Arguments of the pipeline for PROMPTS; guidance 1 (Z-Image: 0) is none, so there is no unconditional half."""
    guidance = 0.0 if name == "z_image" else guidance
    pipeline.set_progress_bar_config(disable=True)
    if name == "hidream":
        pipeline.default_sample_size = 8  # it scales every size to this one
    height, width = sides(name)
    asked = sampling_arguments(pipeline, PROMPTS, guidance)
    return asked | {"generator": torch.Generator().manual_seed(0), "height": height, "width": width}


def first_step(name, pipeline, guidance):
    """(denoiser's arguments, prediction, timestep) of the first of a pipeline's 50 sampling steps."""
    seen = []

    def step(prediction, timestep, sample, **_):
        seen.extend([prediction, timestep])
        raise Stop

    pipeline.scheduler.step = step
    denoiser = getattr(pipeline, get_architecture(type(pipeline).__name__).denoiser)
    settings = settings_of(name, pipeline, guidance)
    arguments = captured_call(denoiser, lambda: pipeline(**settings, num_inference_steps=50, output_type="latent"))
    del pipeline.scheduler.step
    return arguments, *seen


@pytest.mark.parametrize("name", BUILDERS)
def test_training_calls_the_denoiser_as_the_pipeline_does(name):
    pipeline = build(name)
    denoiser = PipelineDenoiser(pipeline, guidance_scale=2.5)
    guidance = denoiser.context.guidance or 1.0
    wanted, output, timestep = first_step(name, pipeline, guidance)
    noisy = as_latents(pipeline, next(iter(wanted.values())), *sides(name))
    assert noisy.shape[1:] == (
        denoiser.latent_channels,
        *(side // denoiser.context.vae_scale_factor for side in sides(name)),
    )
    predictions = []

    @torch.no_grad()
    def run_training():
        condition = encode_prompts(pipeline, PROMPTS)
        predictions.append(denoiser.predict(denoiser.network, noisy, timestep.expand(len(noisy)), condition))

    got, wanted = flat(captured_call(denoiser.network, run_training)), flat(wanted)
    assert set(got) == set(wanted)
    for key, value in wanted.items():
        if not isinstance(value, torch.Tensor):
            assert got[key] == value, key
            continue
        value = value.expand(len(noisy)) if key == ".timestep" else value
        assert got[key].shape == value.shape, key
        torch.testing.assert_close(got[key], value, rtol=1e-5, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}")
    output = as_latents(pipeline, output, *sides(name))
    torch.testing.assert_close(predictions[0], output, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", BUILDERS)
def test_latents_are_the_ones_the_pipeline_decodes(name):
    """The VAE's own latents, normalised as for training, are those that the sampler arrives at."""
    pipeline, decoded = build(name), []
    denoiser, settings = PipelineDenoiser(pipeline), settings_of(name, pipeline)
    step = pipeline.scheduler.step
    sampled = []

    def last_step(*args, **kwargs):
        result = step(*args, **kwargs)
        sampled.append(result[0])
        return result

    def decode(latents, *_, **__):
        decoded.append(latents)
        raise Stop

    pipeline.scheduler.step, pipeline.vae.decode = last_step, decode
    with pytest.raises(Stop):
        pipeline(**settings, num_inference_steps=2, output_type="np")
    latents = (arranged(pipeline.vae, decoded[0]) - denoiser.shift) * denoiser.scale
    torch.testing.assert_close(latents, as_latents(pipeline, sampled[-1], *sides(name)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", BUILDERS)
def test_images_are_encoded_into_what_the_denoiser_sees(name):
    """Mean and log-variance of each image, whatever the VAE: with frames, patches, or without a posterior."""
    pipeline = build(name)
    denoiser = PipelineDenoiser(pipeline)
    pixels = torch.rand(2, 3, 32, 64) * 2 - 1
    mean, log_variance = posteriors(pipeline.vae, [pixels[:1], pixels[1:]]).chunk(2, dim=1)
    side = denoiser.context.vae_scale_factor
    assert mean.shape == log_variance.shape == (2, denoiser.latent_channels, 32 // side, 64 // side)
    if name == "sana":
        own = pipeline.vae.encode(pixels).latent
    else:
        frames = pixels.unsqueeze(2) if name == "qwen_image" else pixels
        own = pipeline.vae.encode(frames).latent_dist.mode()
    own = own.squeeze(2) if name == "qwen_image" else own
    own = pipeline._patchify_latents(own) if name.startswith("flux2") else own
    torch.testing.assert_close(mean, own.detach(), rtol=1e-4, atol=1e-5)
    assert (log_variance == -30).all() == (name == "sana")


# the positions in [0, 1] at which a pipeline takes N steps, before the scheduler shifts them
STEPS = {
    "sd3": lambda scheduler, steps: np.linspace(1, scheduler.sigma_min, steps),
    "sana": lambda scheduler, steps: (1 - np.linspace(1, 1 / 1000, steps + 1))[:0:-1],
    "hidream": lambda scheduler, steps: np.linspace(1, 1 / 1000, steps + 1)[:-1],
    "cogview4": lambda scheduler, steps: np.linspace(1000, 1, steps).astype(int) / 1000,
}
STEPS |= {"sd3_plain": STEPS["sd3"], "auraflow": STEPS["sd3"]}
FLOWS = [
    name
    for name in BUILDERS
    if not name.startswith(("sd_", "sdxl", "pixart", "hunyuan_dit", "kolors")) and name != "sd"
]


@pytest.mark.parametrize("name", FLOWS)
def test_noise_is_that_of_the_pipelines_own_steps(name):
    """At each of the 50 sigmas that the pipeline samples at, noise and time are the same in training."""
    pipeline = build(name)
    denoiser = PipelineDenoiser(pipeline)
    first_step(name, pipeline, 1.0)
    scheduler = pipeline.scheduler
    steps = STEPS.get(name, lambda _, count: np.linspace(1, 1 / count, count))(scheduler, 50)
    height, width = (side // denoiser.context.vae_scale_factor for side in sides(name))
    positions = torch.arange(1000)
    latents, noise = torch.full((1000, denoiser.latent_channels, height, width), 2.0), torch.full((1,), 5.0)
    drawn = denoiser.noising.at(latents, noise.expand_as(latents), positions)
    sigmas = (drawn.noisy[:, 0, 0, 0] - 2) / 3
    at = {key: np.interp(steps, 1 - positions.flip(0) / 1000, value.flip(0)) for key, value in
          {"sigma": sigmas, "time": drawn.timesteps}.items()}  # fmt: skip
    terminal = 0.03 if scheduler.config.get("shift_terminal") else 0  # stretched by its last step, which is not ours
    np.testing.assert_allclose(at["sigma"], scheduler.sigmas[:-1], rtol=2e-3, atol=terminal + 1e-4)
    whole = 1 if name in ("sana", "hidream") else 0  # these schedulers cut times to whole numbers
    np.testing.assert_allclose(at["time"], scheduler.timesteps, rtol=2e-3, atol=1000 * terminal + whole + 0.1)
    assert (drawn.target == 3).all()


def test_a_row_of_the_users_own(tmp_path):
    """The file of docs/add_an_architecture.md, named as the script takes it."""
    text = (ROOT / "docs/add_an_architecture.md").read_text(encoding="utf-8")
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", text, re.S) if "register_architecture(" in block]
    (tmp_path / "pag.py").write_text(code, encoding="utf-8")
    pipeline = StableDiffusionPAGPipeline(**build("sd").components, requires_safety_checker=False)
    with pytest.raises(ValueError, match="a StableDiffusionPAGPipeline cannot be unlearned"):
        PipelineDenoiser(pipeline)
    load_objective(ObjectiveConfig(module=str(tmp_path / "pag.py")))
    assert get_architecture("StableDiffusionPAGPipeline").pipeline_class is StableDiffusionPAGPipeline
    plain = build("sd")
    noisy, timesteps = torch.randn(2, 4, 8, 8), torch.tensor([900, 100])
    own, wanted = (
        denoiser.predict(denoiser.network, noisy, timesteps, encode_prompts(model, PROMPTS))
        for model, denoiser in ((pipeline, PipelineDenoiser(pipeline)), (plain, PipelineDenoiser(plain)))
    )
    torch.testing.assert_close(own, wanted)
    with pytest.raises(ValueError, match="pipeline class 'StableDiffusionPAGPipeline' is registered already"):
        register_architecture(get_architecture("StableDiffusionPAGPipeline"))


def test_packing_is_the_pipelines_own():
    latents = torch.randn(3, 2, 8, 12)
    packed = pack(latents)
    assert torch.equal(packed, FluxPipeline._pack_latents(latents, 3, 2, 8, 12))
    assert torch.equal(unpack(packed, 8, 12), latents)
    assert torch.equal(FluxPipeline._unpack_latents(packed, 8, 12, 1), latents)
    ids = FluxPipeline._prepare_latent_image_ids(3, 4, 6, "cpu", torch.float32)
    assert torch.equal(image_ids(8, 12, packed), ids)


def test_classes_without_a_row_are_named():
    with pytest.raises(
        ValueError, match="a StableDiffusionImg2ImgPipeline cannot be unlearned; known pipelines are Aura"
    ):
        PipelineDenoiser(StableDiffusionImg2ImgPipeline(**build("sd").components, requires_safety_checker=False))
    with pytest.raises(ValueError, match="must be a multiple of 8 for this FluxPipeline"):
        PipelineDenoiser(build("flux")).checked_resolution(36)
    PipelineDenoiser(build("flux")).checked_resolution(40)


def test_steps_share_one_draw_between_conditions():
    """What an objective sees: any condition goes through `predict`, on one noised input."""
    pipeline = build("flux")
    denoiser = PipelineDenoiser(pipeline)
    conditions = encode_prompts(pipeline, PROMPTS)
    own, anchor = ({key: value[rows] for key, value in conditions.items()} for rows in ([0, 0, 0], [1, 1, 1]))
    batch = {"moments": torch.randn(3, 4, 8, 8), "condition": own, "anchor": anchor}
    step = StepMaker(denoiser.network, denoiser)(batch)
    assert step.prediction().shape == step.target.shape == step.noisy.shape == (3, 2, 8, 8)
    assert not torch.equal(step.prediction(), step.predict(step.noisy, step.timesteps, step.anchor))


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "sd3_plain", "flux"])
def test_long_prompts_are_cut_as_the_pipeline_cuts_them(name):
    pipeline = build(name)
    t5 = {"sd3": 256, "flux": 512}.get(name)
    long = "boot " * (t5 or 30)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        got = encode_prompts(pipeline, [PROMPTS[0], long, "a sneaker " * 20], batch_size=1)
    (message,) = [str(entry.message) for entry in caught if "too long" in str(entry.message)]
    assert "of 3 prompts" in message and "tokenizer keeps 24 tokens and cuts 2" in message
    number = {"sd3": 3, "flux": 2}.get(name)
    assert (f"tokenizer_{number} keeps {t5} tokens and cuts 1" in message) == (t5 is not None)
    again = get_architecture(type(pipeline).__name__).encode(pipeline, [long])
    for key, value in again.items():
        torch.testing.assert_close(got[key][1:2], value, rtol=1e-4, atol=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encode_prompts(pipeline, PROMPTS)


MAPS = {
    "sd": (["attn2.to_q", "attn2.to_k", "attn2.to_v"], 4 + 1),  # queries of 4 blocks, the text once
    "sd3": (["attn.to_q", "attn.to_k", "attn.to_v", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"], 3 + 3),
    "sd3 second attention": (["attn2.to_q", "attn2.to_k", "attn2.to_v"], 1),
    "flux": (["to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj"], 3 + 3 + 2),
    "flux feed-forward": (
        ["ff.net.0.proj", "ff.net.2", "to_out.0", "single_transformer_blocks.1.proj_mlp"],
        3 * 3 + 1,
    ),
}


@pytest.mark.parametrize("name", MAPS)
def test_maps_are_found_and_share_their_inputs(name):
    targets, num_inputs = MAPS[name]
    pipeline = build(name.partition(" ")[0])
    denoiser = PipelineDenoiser(pipeline)
    condition = encode_prompts(pipeline, PROMPTS)
    channels = pipeline.vae.config.latent_channels
    batch = {
        "noisy": torch.randn(2, channels, 8, 8),
        "timesteps": torch.tensor([900.0, 100.0]),
        "condition": condition,
    }
    barrier = Barrier(denoiser.network, BarrierConfig(targets=targets, reduced_dim=2))
    rows = {}
    for entry in barrier.maps:
        entry.module.register_forward_pre_hook(lambda module, args, n=entry.name: rows.update({n: args[0].clone()}))
    barrier.setup_protection([batch], denoiser.predict_batch)
    regions = barrier.regions
    assert list(regions) == [entry.name for entry in barrier.maps]
    assert len({id(region) for region in regions.values()}) == num_inputs
    for entry, other in zip(barrier.maps, barrier.maps[1:], strict=False):
        shared = regions[entry.name] is regions[other.name]
        assert shared == (
            rows[entry.name].shape == rows[other.name].shape and torch.equal(rows[entry.name], rows[other.name])
        )
    for group in barrier.groups:
        flat_rows = rows[group.maps[0].name].double().flatten(0, -2)
        assert group.region.count == len(flat_rows)
        torch.testing.assert_close(group.region.mean.double(), flat_rows.mean(0), rtol=1e-4, atol=1e-5)
    assert barrier.compute_protection_loss().item() == 0


@pytest.mark.parametrize("name", BUILDERS)
def test_the_default_maps_read_what_their_row_says(name):
    """The prompt alone, as `retain_statistics prompts` takes it, or tokens of the image, or neither."""
    pipeline = build(name)
    denoiser = PipelineDenoiser(pipeline)
    row, network, condition = denoiser.architecture, denoiser.network, encode_prompts(pipeline, PROMPTS)
    read = {}
    for target, reads in row.targets.items():
        for linear_map in Barrier(network, BarrierConfig(targets=[target], reduced_dim=2)).maps:
            linear_map.module.register_forward_pre_hook(
                lambda _, args, key=(linear_map.name, reads): read.update({key: args[0]})
            )
    noisy = torch.randn(2, denoiser.latent_channels, 12, 12)
    with torch.no_grad():
        denoiser.predict(network, noisy, torch.tensor([900.0, 100.0]), condition)
        alone = text_inputs(pipeline, PROMPTS) if "prompt" in row.targets.values() else torch.zeros(0)
    tokens = 144 // denoiser.tokens_side**2
    assert read
    for (_, reads), rows in read.items():
        assert (reads == "prompt") == (rows.shape == alone.shape and torch.allclose(rows, alone, atol=1e-5))
        assert reads != "image" or rows.shape[1] in (tokens, tokens // 4)  # a UNet has two sides
        assert reads != "text stream" or rows.shape[1] != tokens


@pytest.mark.parametrize("name", ["qwen_image", "z_image", "cogview4"])
def test_prompts_of_different_lengths_in_one_batch(name):
    """Each row is predicted as if its prompt were asked alone."""
    pipeline, prompts = build(name), ["a boot", "a photo of a red boot, " * 4]
    denoiser = PipelineDenoiser(pipeline)
    noisy, timesteps = torch.randn(2, denoiser.latent_channels, 8, 8), torch.tensor([900.0, 100.0])
    with torch.no_grad():
        condition = encode_prompts(pipeline, prompts, batch_size=1)
        together = denoiser.predict(denoiser.network, noisy, timesteps, condition)
        for row in range(2):
            own = slice(row, row + 1)
            alone = encode_prompts(pipeline, prompts[own])
            assert alone["encoder_hidden_states"].shape[1] <= condition["encoder_hidden_states"].shape[1]
            wanted = denoiser.predict(denoiser.network, noisy[own], timesteps[own], alone)
            torch.testing.assert_close(together[own], wanted, rtol=1e-4, atol=1e-5)
    assert len({int(length) for length in condition["encoder_attention_mask"].sum(1)}) == 2


@pytest.mark.parametrize("name", ["sana", "lumina2"])
def test_the_empty_prompt_is_the_missing_negative_one(name):
    """These pipelines put an instruction before prompts, but not before the one that they guide away from."""
    pipeline = build(name)
    got = encode_prompts(pipeline, ["", "a boot"])
    with torch.no_grad():
        found = pipeline.encode_prompt(["a boot"], do_classifier_free_guidance=True)
    torch.testing.assert_close(got["encoder_hidden_states"][:1], found[2])
    torch.testing.assert_close(got["encoder_attention_mask"][:1], found[3].float())


@pytest.mark.parametrize("name", BUILDERS)
def test_a_learned_token_reaches_the_prediction(name):
    """Through every text encoder that the row names, as inversion and robust training need it."""
    pipeline = build(name)
    denoiser = PipelineDenoiser(pipeline)
    noisy, timesteps = torch.randn(1, *denoiser.latent_shape(32)), torch.tensor([900.0])
    with learned_tokens(pipeline, "boot") as new:
        condition = denoiser.architecture.encode(pipeline, [f"a photo of a {new.words}"])
        prediction = denoiser.predict(denoiser.network, noisy, timesteps, condition)
        gradients = torch.autograd.grad(prediction.square().sum(), new.parameters)
    assert len(gradients) == len(
        [key for key in denoiser.architecture.tokenizers if getattr(pipeline, key) is not None]
    )
    assert all(gradient.abs().sum() > 0 for gradient in gradients)


BLOCKS = {"hidream": 2, "z_image": 2, "lumina2": 2, "hunyuan_dit": 4, "auraflow": 3, "sana": 2, "flux": 5}


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_are_counted(name):
    pipeline = build(name)
    assert len(numbered_blocks(pipeline.transformer)) == BLOCKS[name]
    targets = list(get_architecture(type(pipeline).__name__).targets)
    assert len(Barrier(pipeline.transformer, BarrierConfig(targets=targets, blocks=[0], reduced_dim=2)).maps) == 3


def test_what_a_class_cannot_do_is_refused():
    pipeline = build("hunyuan_image")
    pipeline.transformer.register_to_config(use_meanflow=True)
    with pytest.raises(ValueError, match="this HunyuanImagePipeline is the distilled one"):
        PipelineDenoiser(pipeline)
    settings = {"images": [Image.new("RGB", (32, 32))], "resolution": 32, "retain_prompts": ["a bag"]}
    settings |= {"objective": {"name": "uce"}}
    settings |= {"barrier": {"targets": ["attn2.to_k", "attn2.to_v"], "lambda_interval": 0, "reduced_dim": 2}}
    with pytest.raises(ValueError, match="objective 'uce' pairs the tokens of two prompts"):
        unlearn(build("sana"), "boot", anchor="sneaker", **settings)
    pipeline = build("sana")
    pipeline.register_modules(scheduler=DPMSolverMultistepScheduler())
    with pytest.raises(ValueError, match="Scheduler with use_flow_sigmas False, prediction_type eps"):
        PipelineDenoiser(pipeline)
