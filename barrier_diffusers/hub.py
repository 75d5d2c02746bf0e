"""Load pipelines, give them adapters, and save what was unlearned as a folder others can load, with a model card."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from diffusers.training_utils import cast_training_params
from diffusers.utils import convert_state_dict_to_diffusers
from huggingface_hub import ModelCard, ModelCardData
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from barrier_diffusers.targets import resolve_targets
from barrier_diffusers.training import METRICS_NAME, move_into

CARD = """# {title}

This is [{base}]({base}) after unlearning **{forgotten}** with [BARRIER](https://arxiv.org/abs/2605.15737)
(objective `{objective}`, protection weight {weight}).

## Load it

```python
{loading}
```

## What it forgot and what it kept

{results}

Measured on {count} generated images; seeds, sampler settings and 95 % intervals are in `{metrics}`, every setting and
hash in `manifest.json`.

## Limits

- Forgetting is measured by a classifier on generated images. It is no proof that the concept cannot be brought back by
  fine-tuning, by a learned token embedding or by an adversarial prompt.
- The protection covers the maps in `barrier_config.json` and the data it was set up with.
- The licence of the base model applies to these weights too.
"""
LOAD_PIPELINE = """from diffusers import StableDiffusionPipeline

pipeline = StableDiffusionPipeline.from_pretrained("{folder}")"""
LOAD_ADAPTER = """from diffusers import StableDiffusionPipeline

pipeline = StableDiffusionPipeline.from_pretrained("{base}")
pipeline.load_lora_weights("{folder}")"""


def load_pipeline(name: str, revision: str | None = None, variant: str | None = None) -> StableDiffusionPipeline:
    """A Stable Diffusion pipeline from a folder or the hub, in float32 and from safetensors only.

    Raises:
        ValueError: a folder that does not exist.
        OSError: a hub id or a file that cannot be had.
    """
    if name.startswith((".", "/", "~")) and not Path(name).expanduser().is_dir():
        raise ValueError(f"pipeline folder {name!r} does not exist")
    return StableDiffusionPipeline.from_pretrained(
        name, revision=revision, variant=variant, dtype=torch.float32, use_safetensors=True
    )


def enable_xformers(unet: Any, device: torch.device) -> None:
    """Switch the UNet to xformers' attention; a ValueError anywhere but on a CUDA GPU."""
    if device.type != "cuda":
        raise ValueError("enable_xformers_memory_efficient_attention needs a CUDA GPU: xformers has no CPU kernels")
    unet.enable_xformers_memory_efficient_attention()


def add_adapter(unet: Any, targets: list[str], rank: int) -> None:
    """A LoRA adapter on exactly the maps that `targets` name, its factors in float32."""
    names = [entry.name for entry in resolve_targets(unet, targets)]
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=names))
    cast_training_params(unet, dtype=torch.float32)


def save_pipeline(pipeline: Any, output: Path) -> None:
    """Write the pipeline into `output`; a killed write leaves no half-written model_index.json behind."""
    temporary = output / f".pipeline-{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    pipeline.save_pretrained(temporary, safe_serialization=True)
    move_into(temporary, output, last="model_index.json")


def save_adapter(pipeline: Any, unet: Any, output: Path) -> None:
    """Write the UNet's LoRA as pytorch_lora_weights.safetensors, the file `load_lora_weights` looks for."""
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
    temporary = output / f".adapter-{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    pipeline.save_lora_weights(temporary, unet_lora_layers=layers, safe_serialization=True)
    move_into(temporary, output, last="pytorch_lora_weights.safetensors")


def results_table(metrics: dict[str, Any]) -> str:
    """The summary percentages of metrics.json as a Markdown table."""
    rows = [(key, value) for key, value in metrics.items() if isinstance(value, float)]
    if not rows:
        return "No classifier was given, so nothing was measured; see the before / after picture."
    lines = ["| metric | % |", "|---|---|", *(f"| {key.replace('_', ' ')} | {value:.1f} |" for key, value in rows)]
    return "\n".join(lines)


def save_model_card(
    output: Path,
    base: str,
    forgotten: list[str],
    objective: str,
    weight: float,
    adapter: bool,
    metrics: dict[str, Any],
) -> None:
    """Write README.md with the metadata the hub reads and the numbers of this run."""
    data = ModelCardData(
        base_model=base if not Path(base).exists() else None,
        library_name="diffusers",
        tags=["stable-diffusion", "text-to-image", "machine-unlearning", "barrier", *(["lora"] if adapter else [])],
    )
    loading = (LOAD_ADAPTER if adapter else LOAD_PIPELINE).format(folder=output, base=base)
    body = CARD.format(
        title=f"{Path(base).name} without {', '.join(forgotten)}",
        base=base,
        forgotten=", ".join(forgotten),
        objective=objective,
        weight=weight,
        loading=loading,
        results=results_table(metrics),
        count=metrics.get("num_images", 0),
        metrics=METRICS_NAME,
    )
    picture = "\n![before and after](before_after.png)\n" if (output / "before_after.png").is_file() else ""
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}{picture}").save(output / "README.md")
