"""Every architecture: training calls the denoiser as its pipeline does."""

import inspect
import re
import warnings

import pytest
import torch
from diffusers import FluxPipeline, StableDiffusionImg2ImgPipeline, StableDiffusionPAGPipeline
from pipelines import BUILDERS, build
from short_runs import ROOT

from barrier_diffusers import Barrier, BarrierConfig, register_architecture
from barrier_diffusers.data.encoding import encode_prompts
from barrier_diffusers.models.architectures import get_architecture, image_ids, pack, unpack
from barrier_diffusers.models.denoiser import PipelineDenoiser
from barrier_diffusers.objectives import ObjectiveConfig, load_objective
from barrier_diffusers.training.steps import StepMaker

PROMPTS = ["a photo of a red boot", "a sneaker"]


def captured_call(network, run):
    """Arguments by name of the denoiser's first call in `run`, nothing that is None or empty, and its output."""
    calls = []

    def hook(module, args, kwargs, output):
        bound = inspect.signature(type(network).forward).bind(network, *args, **kwargs).arguments
        used = {k: v for k, v in bound.items() if v is not None and not (isinstance(v, dict) and not v)}
        calls.append(({k: v for k, v in used.items() if k not in ("self", "return_dict")}, output[0]))

    handle = network.register_forward_hook(hook, with_kwargs=True)
    try:
        run()
    finally:
        handle.remove()
    return calls[0]


def flat(arguments):
    """Nested dicts as one level."""
    result = {}
    for key, value in arguments.items():
        result.update({f"{key}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {key: value})
    return result


@pytest.mark.parametrize("name", BUILDERS)
def test_training_calls_the_denoiser_as_the_pipeline_does(name):
    pipeline = build(name)
    pipeline.set_progress_bar_config(disable=True)
    denoiser = PipelineDenoiser(pipeline, guidance_scale=2.5)
    guidance = 2.5 if name == "flux" else 1.0  # 1: no classifier-free guidance, so no unconditional half
    settings = {
        "num_inference_steps": 2,
        "height": 32,
        "width": 48,
        "guidance_scale": guidance,
        "output_type": "latent",
    }

    def run_pipeline():
        pipeline(PROMPTS, generator=torch.Generator().manual_seed(0), **settings)

    wanted, output = captured_call(denoiser.network, run_pipeline)
    first = next(iter(wanted))
    noisy, timestep = wanted[first], wanted["timestep"]
    if isinstance(pipeline, FluxPipeline):
        noisy, timestep = FluxPipeline._unpack_latents(noisy, 32, 48, 4), timestep * 1000
    timesteps = timestep.expand(len(noisy))
    predictions = []

    @torch.no_grad()
    def run_training():
        condition = encode_prompts(pipeline, PROMPTS)
        predictions.append(denoiser.predict(denoiser.network, noisy, timesteps, condition))

    got, _ = captured_call(denoiser.network, run_training)
    got, wanted = flat(got), flat(wanted)
    assert set(got) == set(wanted)
    for key, value in wanted.items():
        value = value.expand(len(noisy)) if key == "timestep" else value
        assert got[key].shape == value.shape, key
        torch.testing.assert_close(got[key], value, rtol=1e-5, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}")
    if isinstance(pipeline, FluxPipeline):
        output = FluxPipeline._unpack_latents(output, 32, 48, 4)
    torch.testing.assert_close(predictions[0], output, rtol=1e-4, atol=1e-5)


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
        ValueError, match="a StableDiffusionImg2ImgPipeline cannot be unlearned; known pipelines are Flux"
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


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "flux"])
def test_the_default_maps_read_what_their_row_says(name):
    pipeline = build(name)
    denoiser = PipelineDenoiser(pipeline)
    condition = encode_prompts(pipeline, PROMPTS)
    text = condition["encoder_hidden_states"]
    noisy, read = torch.randn(2, pipeline.vae.config.latent_channels, 8, 8), {}
    for target, reads in denoiser.architecture.targets.items():
        for entry in Barrier(denoiser.network, BarrierConfig(targets=[target], reduced_dim=2)).maps:
            entry.module.register_forward_pre_hook(
                lambda _, args, key=(entry.name, reads): read.update({key: args[0]})
            )
    with torch.no_grad():
        denoiser.predict(denoiser.network, noisy, torch.tensor([900.0, 100.0]), condition)
    assert read
    for (_, reads), rows in read.items():
        if reads == "image":
            assert rows.shape[1] in (16, 64) and rows.shape[1] != text.shape[1]
        else:
            assert rows.shape[1] == text.shape[1]
            assert (reads == "prompt") == (rows.shape == text.shape and torch.equal(rows, text))
