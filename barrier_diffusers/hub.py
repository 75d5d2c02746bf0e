"""Load pipelines, give them adapters, and save what was unlearned as a folder others can load, with a model card."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.training_utils import cast_training_params
from huggingface_hub import HfApi, ModelCard, ModelCardData, create_repo, upload_folder
from peft import LoraConfig

from barrier_diffusers.architectures import components, get_architecture
from barrier_diffusers.config import BarrierConfig
from barrier_diffusers.files import remove, removed_on_failure, written_whole
from barrier_diffusers.targets import resolve_targets
from barrier_diffusers.training import METRICS_NAME, move_into

SINGLE_FILES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
NOT_UPLOADED = ("checkpoints/**", "cache/**", "logs/**", ".*")
CARD = """# {title}

This is [{base}]({base}) after unlearning **{forgotten}** with [BARRIER](https://arxiv.org/abs/2605.15737)
(objective `{objective}`, {protection}).

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
- The licence of the base model applies to these weights too{licence}.
"""
LOAD_PIPELINE = """from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("{folder}"{absent})"""
LOAD_ADAPTER = """from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("{base}"{absent})
pipeline.load_lora_weights("{folder}")"""


def load_pipeline(
    name: str,
    revision: str | None = None,
    variant: str | None = None,
    dtype: torch.dtype = torch.float32,
    denoiser_dtype: torch.dtype = torch.float32,
    pipeline_config: str | None = None,
    original_config: str | None = None,
) -> Any:
    """A pipeline of a known class from a folder, a hub id or a single .safetensors file; never from a pickle.

    Args:
        name: its model_index.json says which class it is. Of a single file `pipeline_config` says that; without it the
            file is taken for a Stable Diffusion, which diffusers fetches the configuration of from the hub.
        dtype, denoiser_dtype: of all networks but the one that is trained, and of that one.
        pipeline_config, original_config: of a single file, diffusers' `config` (folder or hub id of a pipeline whose
            component configurations fit) and `original_config` (the YAML file it was trained with).

    Raises:
        ValueError: a path that does not exist, a file that is no .safetensors, a pipeline class without a row in
            architectures.py, or configurations that do not belong to a single file.
        OSError: a hub id or a file that cannot be had.
    """
    path = Path(name).expanduser()
    if path.suffix in SINGLE_FILES:
        pipeline = load_single_file(path, denoiser_dtype, pipeline_config, original_config)
        for part, network in components(pipeline).items():
            if part != get_architecture(type(pipeline).__name__).denoiser:
                network.to(dtype=dtype)
        return pipeline
    if pipeline_config is not None or original_config is not None:
        raise ValueError(f"pipeline_config and original_config belong to a .safetensors file, but {name!r} is none")
    if name.startswith((".", "/", "~")) and not path.is_dir():
        raise ValueError(f"pipeline folder {name!r} does not exist")
    found = DiffusionPipeline.load_config(str(path) if path.is_dir() else name, revision=revision)
    row = get_architecture(found["_class_name"])
    absent = {part: None for part in row.optional if (found.get(part) or [None])[0] is None}
    try:
        return row.pipeline_class.from_pretrained(
            str(path) if path.is_dir() else name,
            revision=revision,
            variant=variant,
            dtype={"default": dtype, row.denoiser: denoiser_dtype},
            use_safetensors=True,
            **absent,
        )
    except OSError as error:
        if "safetensors" not in str(error):
            raise
        raise OSError(
            f"{error} Pickled weights (.bin) are never read, as they can run any code: where you trust them, load and "
            "save the pipeline with safe_serialization=True"
        ) from error


def load_merged(name: str, lora_weights: str | None = None, dtype: torch.dtype = torch.float32) -> Any:
    """A pipeline with the adapter of a folder, if one is named, merged into its weights.

    Raises:
        ValueError, OSError: see `load_pipeline`.
    """
    pipeline = load_pipeline(name, dtype=dtype, denoiser_dtype=dtype)
    if lora_weights:
        pipeline.load_lora_weights(lora_weights)
        pipeline.fuse_lora()
        pipeline.unload_lora_weights()
    return pipeline


def load_single_file(path: Path, dtype: torch.dtype, pipeline_config: str | None, original_config: str | None) -> Any:
    """A pipeline from one checkpoint file in the layout of its first release; see `load_pipeline`."""
    if path.suffix != ".safetensors":
        raise ValueError(f"{str(path)!r} may hold a pickle, which can run any code: convert it to .safetensors")
    if not path.is_file():
        raise ValueError(f"checkpoint file {str(path)!r} does not exist")
    name = "StableDiffusionPipeline"
    if pipeline_config is not None:
        name = DiffusionPipeline.load_config(pipeline_config)["_class_name"]
    kind = get_architecture(name).pipeline_class
    try:
        return kind.from_single_file(str(path), config=pipeline_config, original_config=original_config, dtype=dtype)
    except OSError as error:
        raise OSError(
            f"no configuration for {str(path)!r} could be had ({error}): set pipeline_config to a folder with the "
            "configurations of a pipeline of its kind"
        ) from error


def enable_xformers(denoiser: Any, device: torch.device) -> None:
    """Switch the denoiser to xformers' attention; a ValueError anywhere but on a CUDA GPU."""
    if device.type != "cuda":
        raise ValueError("enable_xformers_memory_efficient_attention needs a CUDA GPU: xformers has no CPU kernels")
    denoiser.enable_xformers_memory_efficient_attention()


def choose_attention_backend(denoiser: Any, backend: str, device: torch.device) -> None:
    """Switch the denoiser to one of diffusers' attention backends ("native", "flash", "sage", "xformers", ...).

    Raises:
        ValueError: no such backend, one that does not run here or gives no gradient, one whose kernel would be
            downloaded and run, or a denoiser without that switch (the UNets: torch's SDPA, or xformers by its own
            flag).
    """
    if backend.endswith("_hub"):
        raise ValueError(f"attention_backend {backend!r} downloads code and runs it: install the package and name it")
    processors = [getattr(module, "processor", None) for module in denoiser.modules()]
    if not any(hasattr(processor, "_attention_backend") for processor in processors):
        raise ValueError(
            f"attention_backend: the attention of {type(denoiser).__name__} has no such switch; it uses torch's "
            "scaled_dot_product_attention, or xformers with --enable_xformers_memory_efficient_attention true"
        )
    if device.type == "cpu" and backend not in ("native", "_native_math"):
        raise ValueError(f"attention_backend {backend!r} needs an accelerator: on a CPU only 'native' works")
    try:
        denoiser.set_attention_backend(backend)
    except RuntimeError as error:  # a package that is missing
        raise ValueError(f"attention_backend: {error}") from error
    try:
        _try_attention(device, next(denoiser.parameters()).dtype)
    except Exception as error:  # every kernel fails in its own way, some with an assertion
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"attention_backend {backend!r} cannot train here: {reason}") from error


def _try_attention(device: torch.device, dtype: torch.dtype) -> None:
    """One small attention (1 x 64 positions, 2 heads of 64) with diffusers' backend, forward and backward."""
    tensors = [torch.ones(1, 64, 2, 64, device=device, dtype=dtype, requires_grad=True) for _ in range(3)]
    with torch.enable_grad():
        attended = dispatch_attention_fn(*tensors)
        if not attended.requires_grad:
            raise RuntimeError("it gives no gradient, it is made for inference")
        attended.sum().backward()


def add_adapter(denoiser: Any, config: BarrierConfig, rank: int) -> None:
    """A LoRA adapter on exactly the maps that the config's targets and blocks name, its factors in float32."""
    assert config.targets is not None
    names = [entry.name for entry in resolve_targets(denoiser, config.targets, config.blocks)]
    denoiser.add_adapter(LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=names))
    cast_training_params(denoiser, dtype=torch.float32)


@contextmanager
def widened(pipeline: Any) -> Iterator[None]:
    """Beside a float32 denoiser every network in float32: a folder of mixed precision loads, but does not run."""
    denoiser = getattr(pipeline, get_architecture(type(pipeline).__name__).denoiser)
    parameters = [value for part in components(pipeline).values() for value in part.parameters()]
    narrow = [(value, value.dtype) for value in parameters if value.dtype in (torch.float16, torch.bfloat16)]
    narrow = narrow if denoiser.dtype == torch.float32 else []
    try:
        for parameter, _ in narrow:
            parameter.data = parameter.data.float()
        yield
    finally:
        for parameter, dtype in narrow:
            parameter.data = parameter.data.to(dtype)


def save_pipeline(pipeline: Any, output: Path) -> None:
    """Write the pipeline into `output`, in one precision; a killed write leaves no half-written model_index.json."""
    temporary = output / ".pipeline"
    with removed_on_failure(temporary, output), widened(pipeline):
        remove(temporary)
        pipeline.save_pretrained(temporary, safe_serialization=True)
        move_into(temporary, output, last="model_index.json")


def save_adapter(pipeline: Any, output: Path) -> None:
    """Write the denoiser's LoRA as pytorch_lora_weights.safetensors, the file `load_lora_weights` looks for."""
    row = get_architecture(type(pipeline).__name__)
    layers = {f"{row.denoiser}_lora_layers": row.adapter_layers(getattr(pipeline, row.denoiser))}
    temporary = output / ".adapter"
    with removed_on_failure(temporary, output):
        remove(temporary)
        pipeline.save_lora_weights(temporary, safe_serialization=True, **layers)
        move_into(temporary, output, last="pytorch_lora_weights.safetensors")


def claim_repo(repo_id: str, private: bool) -> str:
    """Create the hub's model repository unless it exists; its full name.

    Raises:
        ValueError: no valid token, no right to write there, or no connection.
    """
    try:
        return create_repo(repo_id, private=private, exist_ok=True).repo_id
    except Exception as error:  # of the hub's library or of whatever it speaks HTTP with
        raise ValueError(
            f"cannot write to hub repository {repo_id!r}: {error}; log in with `hf auth login`"
        ) from error


def push_folder(output: Path, full_name: str) -> str:
    """Upload a finished run in one commit to the repository of `claim_repo`; its address."""
    message = "Upload with barrier_diffusers"
    upload_folder(repo_id=full_name, folder_path=output, ignore_patterns=list(NOT_UPLOADED), commit_message=message)
    return HfApi().endpoint + "/" + full_name


def results_table(metrics: dict[str, Any]) -> str:
    """The summary percentages of metrics.json as a Markdown table."""
    rows = [(key, value) for key, value in metrics.items() if isinstance(value, float)]
    if not rows:
        return "No classifier was given, so nothing was measured; see the before / after picture."
    lines = ["| metric | % |", "|---|---|", *(f"| {key.replace('_', ' ')} | {value:.1f} |" for key, value in rows)]
    return "\n".join(lines)


def licence_of(base: str) -> str | None:
    """The licence that the model card of a pipeline folder or hub repository names; None without card or licence."""
    card = Path(base).expanduser() / "README.md"
    try:
        return ModelCard.load(card if card.parent.exists() else base).data.license
    except (OSError, ValueError):  # no card, not reachable, or not readable
        return None


def save_model_card(
    output: Path,
    where: str,
    base: str,
    forgotten: list[str],
    objective: str,
    protection: str,
    adapter: bool,
    metrics: dict[str, Any],
    absent: Sequence[str] = (),
) -> None:
    """Write README.md with the metadata the hub reads and the numbers of this run.

    `where` is what a user loads, a folder or hub repository; `absent` parts load as None.
    """
    licence = licence_of(base)
    data = ModelCardData(
        license=licence,
        base_model=base if not Path(base).exists() else None,
        library_name="diffusers",
        tags=["text-to-image", "machine-unlearning", "barrier", *(["lora"] if adapter else [])],
    )
    loading = (LOAD_ADAPTER if adapter else LOAD_PIPELINE).format(
        folder=where, base=base, absent="".join(f", {part}=None" for part in absent)
    )
    body = CARD.format(
        title=f"{Path(base).name} without {', '.join(forgotten)}",
        base=base,
        forgotten=", ".join(forgotten),
        objective=objective,
        protection=protection,
        loading=loading,
        results=results_table(metrics),
        count=metrics.get("num_images", 0),
        metrics=METRICS_NAME,
        licence=f": {licence}" if licence else "; it was not found with the weights",
    )
    picture = "\n![before and after](before_after.png)\n" if (output / "before_after.png").is_file() else ""
    with written_whole(output / "README.md") as temporary:
        ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}{picture}").save(temporary)
