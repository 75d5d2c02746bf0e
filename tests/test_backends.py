"""Attention backends, and ways to share out weights that are refused."""

import numpy as np
import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from pipelines import build
from short_runs import BASE

from barrier_diffusers import Barrier, BarrierConfig
from barrier_diffusers.models.loading import choose_attention_backend
from barrier_diffusers.training.trainer import open_run
from barrier_diffusers.workflow.settings import UnlearnConfig

CPU = torch.device("cpu")


def flux_inputs(transformer):
    generator = torch.Generator().manual_seed(0)
    size = transformer.config
    batch = {
        "hidden_states": torch.randn(2, 16, size.in_channels, generator=generator),
        "encoder_hidden_states": torch.randn(2, 5, size.joint_attention_dim, generator=generator),
        "pooled_projections": torch.randn(2, size.pooled_projection_dim, generator=generator),
        "timestep": torch.tensor([0.1, 0.7]),
        "img_ids": torch.zeros(16, 3),
        "txt_ids": torch.zeros(5, 3),
    }
    return batch | ({"guidance": torch.tensor([3.5, 3.5])} if size.guidance_embeds else {})


def outputs_and_regions(transformer, batch):
    barrier = Barrier(transformer, BarrierConfig(targets=["to_q"], reduced_dim=2))
    barrier.setup_protection([batch], lambda model, batch: model(**batch))
    regions = {name: region.mean.clone() for name, region in barrier.regions.items()}
    barrier.remove()
    with torch.no_grad():
        return transformer(**batch).sample, regions


@pytest.mark.parametrize("backend", ["native", "_native_math"])
def test_a_backend_changes_neither_outputs_nor_regions(backend):
    transformer = build("flux").transformer.eval()
    batch = flux_inputs(transformer)
    plain, plain_regions = outputs_and_regions(transformer, batch)
    choose_attention_backend(transformer, backend, CPU)
    processors = [module.processor for module in transformer.modules() if hasattr(module, "processor")]
    assert processors and all(processor._attention_backend == backend for processor in processors)
    other, regions = outputs_and_regions(transformer, batch)
    transformer.set_attention_backend("native")  # diffusers keeps the last one for every model
    np.testing.assert_allclose(other.numpy(), plain.numpy(), atol=1e-5)
    assert regions and set(regions) == set(plain_regions)
    for name, mean_D in regions.items():
        np.testing.assert_allclose(mean_D.numpy(), plain_regions[name].numpy(), atol=1e-5)


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        ("flash_hub", "downloads code and runs it"),
        ("flash", "needs an accelerator"),
        ("swift", "needs an accelerator"),
    ],
)
def test_backends_that_cannot_work_are_refused(backend, message):
    with pytest.raises(ValueError, match=message):
        choose_attention_backend(build("flux").transformer, backend, CPU)


def test_a_kernel_without_gradient_is_refused(monkeypatch):
    """As SageAttention's is: training would go on, and the attentions would learn nothing."""
    backend = AttentionBackendName("_native_math")
    kernel = _AttentionBackendRegistry._backends[backend]

    def for_inference(query, key, value, **others):
        return kernel(query.detach(), key.detach(), value.detach())

    monkeypatch.setitem(_AttentionBackendRegistry._backends, backend, for_inference)
    monkeypatch.setattr(_AttentionBackendRegistry, "_active_backend", _AttentionBackendRegistry._active_backend)
    with pytest.raises(ValueError, match="'_native_math' cannot train here: it gives no gradient"):
        choose_attention_backend(build("flux").transformer, "_native_math", CPU)


def test_on_another_device_diffusers_says_what_is_missing():
    with pytest.raises(ValueError, match="must be one of the following"):
        choose_attention_backend(build("flux").transformer, "swift", torch.device("cuda"))


FSDP = {"ACCELERATE_USE_FSDP": "true"}
FSDP_2 = {**FSDP, "FSDP_VERSION": "2"}


@pytest.mark.parametrize(
    ("variables", "settings", "message"),
    [
        (
            {"ACCELERATE_USE_DEEPSPEED": "true"},
            {},
            "DeepSpeed is not supported: its ZeRO stage 3",
        ),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, {}, "Megatron-LM is not supported: it knows no diffusion network"),
        (FSDP, {}, "FSDP is not supported in its version 1: .* Use FSDP 2"),
        ({**FSDP_2, "FSDP_OFFLOAD_PARAMS": "true"}, {}, "fsdp_offload_params is not supported"),
        ({**FSDP_2, "FSDP_ACTIVATION_CHECKPOINTING": "true"}, {}, "pass --gradient_checkpointing true instead"),
        (FSDP_2, {"saliency_mask": 0.5}, "saliency_mask is not supported with FSDP"),
        (FSDP_2, {"validation_prompt": ["a boot"]}, "validation_prompt is not supported with FSDP"),
    ],
)
def test_sharing_out_the_weights_in_a_way_that_cannot_work_is_refused(
    variables, settings, message, monkeypatch, tmp_path
):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    config = UnlearnConfig(
        pretrained_model_name_or_path=str(BASE),
        output_dir=str(tmp_path / "run"),
        concept="boot",
        forget_prompts=["a boot"],
        retain_prompts=["a bag"],
        num_generated_images=1,
        **settings,
    )
    with pytest.raises(ValueError, match=message):
        open_run(config)
    assert not (tmp_path / "run").exists()
