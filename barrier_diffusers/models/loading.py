"""Load pipelines of a known class, with adapters and attention backends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.training_utils import cast_training_params
from diffusers.utils.logging import disable_progress_bar as disable_diffusers_bars
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from transformers.utils.logging import disable_progress_bar as disable_transformers_bars

from barrier_diffusers.models.architectures import components, get_architecture
from barrier_diffusers.protection.config import BarrierConfig
from barrier_diffusers.protection.targets import resolve_targets
from barrier_diffusers.utils.files import reading_tensors
from barrier_diffusers.utils.hub import is_being_made, require_on_hub
from barrier_diffusers.utils.run_records import module_hash

ADAPTER_NAME = "pytorch_lora_weights.safetensors"  # the file that `load_lora_weights` looks for
SINGLE_FILES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")


def quiet_bars() -> None:
    """No bars of libraries for files that are read or written here; downloads from the hub keep theirs."""
    disable_diffusers_bars()
    disable_transformers_bars()


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
    quiet_bars()
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
    require_pipeline(name, revision=revision)
    found = DiffusionPipeline.load_config(str(path) if path.is_dir() else name, revision=revision)
    row = get_architecture(found["_class_name"])
    absent = {part: None for part in row.optional if (found.get(part) or [None])[0] is None}
    try:
        with reading_tensors(path):
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


def require_pipeline(name: str, setting: str = "", revision: str | None = None) -> None:
    """Refuse what can be no pipeline, without reading any weights.

    Args:
        setting: that names it, for messages.

    Raises:
        ValueError: a folder without a model_index.json, or a name that neither this machine nor the hub knows.
    """
    path = Path(name).expanduser()
    if path.suffix in SINGLE_FILES or is_being_made(path):
        return
    if not path.is_dir():
        require_on_hub(name, revision=revision)
        return
    if (path / DiffusionPipeline.config_name).is_file():
        return
    advice = "name the folder of a whole pipeline"
    if (path / ADAPTER_NAME).is_file():
        advice = "it holds an adapter: name its base model here"
        merged = path / "merged"
        if (merged / DiffusionPipeline.config_name).is_file():
            advice += f", or {str(merged)!r}, which has the adapter in its weights"
    elif (path / "config.json").is_file():
        advice = "it holds one network: " + advice
    what = f"{setting} {name!r}".strip()
    raise ValueError(f"{what} is no pipeline, as it has no {DiffusionPipeline.config_name}: {advice}")


def load_merged(
    name: str,
    lora_weights: str | None = None,
    pipeline_config: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Any:
    """A pipeline with the adapter of a folder, if one is named, merged into its weights.

    Args:
        pipeline_config: of a single file; see `load_pipeline`.

    Raises:
        ValueError, OSError: see `load_pipeline` and `load_adapter`.
    """
    pipeline = load_pipeline(name, dtype=dtype, denoiser_dtype=dtype, pipeline_config=pipeline_config)
    if lora_weights:
        load_adapter(pipeline, lora_weights)
        pipeline.fuse_lora()
        pipeline.unload_lora_weights()
    return pipeline


def load_adapter(pipeline: Any, folder: str) -> None:
    """Put the LoRA adapter of a folder on a pipeline, all of it.

    Raises:
        ValueError: no such file, an adapter of another model (one of its layers finds no module, or one of another
            shape), or one that changes nothing.
    """
    path = Path(folder).expanduser() / ADAPTER_NAME
    if not path.is_file():
        raise ValueError(f"lora_weights {folder!r} is not a folder with {ADAPTER_NAME}")
    with reading_tensors(path), safe_open(path, "pt") as file:
        wanted = sum(name.endswith((".lora_A.weight", ".lora.down.weight")) for name in file.keys())  # noqa: SIM118
    try:
        pipeline.load_lora_weights(str(path.parent), weight_name=ADAPTER_NAME)
    except (RuntimeError, ValueError) as error:
        said = str(error).splitlines()[0][:300]
        raise ValueError(f"adapter {str(path)!r} does not fit this {type(pipeline).__name__}: {said}") from error
    layers: list[Any] = [
        layer
        for part in components(pipeline).values()
        for layer in part.modules()
        if isinstance(layer, LoraLayer) and layer.lora_A
    ]
    if len(layers) < max(1, wanted):
        raise ValueError(
            f"adapter {str(path)!r} does not fit this {type(pipeline).__name__}: {len(layers)} of its {wanted} layers "
            "find a module there; name the pipeline that it was trained on"
        )
    if not any(layer.get_delta_weight(name).any() for layer in layers for name in layer.lora_A):
        raise ValueError(f"adapter {str(path)!r} changes nothing: the product of its matrices is zero everywhere")


def load_single_file(path: Path, dtype: torch.dtype, pipeline_config: str | None, original_config: str | None) -> Any:
    """A pipeline from one checkpoint file in the layout of its first release; see `load_pipeline`."""
    if path.suffix != ".safetensors":
        raise ValueError(f"{str(path)!r} may hold a pickle, which can run any code: convert it to .safetensors")
    if not path.is_file():
        raise ValueError(f"checkpoint file {str(path)!r} does not exist")
    name = "StableDiffusionPipeline"
    if pipeline_config is not None:
        require_on_hub(pipeline_config)
        name = DiffusionPipeline.load_config(pipeline_config)["_class_name"]
    kind = get_architecture(name).pipeline_class
    try:
        return kind.from_single_file(str(path), config=pipeline_config, original_config=original_config, dtype=dtype)
    except OSError as error:
        raise OSError(
            f"no configuration for {str(path)!r} could be had ({error}): set pipeline_config to a folder with the "
            "configurations of a pipeline of its kind"
        ) from error


def enable_xformers(network: Any, device: torch.device) -> None:
    """Switch the denoiser to xformers' attention; a ValueError anywhere but on a CUDA GPU."""
    if device.type != "cuda":
        raise ValueError("enable_xformers_memory_efficient_attention needs a CUDA GPU: xformers has no CPU kernels")
    network.enable_xformers_memory_efficient_attention()


def choose_attention_backend(network: Any, backend: str, device: torch.device) -> None:
    """Switch the denoiser to one of diffusers' attention backends ("native", "flash", "sage", "xformers", ...).

    Raises:
        ValueError: no such backend, one that does not run here or gives no gradient, one whose kernel would be
            downloaded and run, or a denoiser without that switch (the UNets: torch's SDPA, or xformers by its own
            flag).
    """
    if backend.endswith("_hub"):
        raise ValueError(f"attention_backend {backend!r} downloads code and runs it: install the package and name it")
    processors = [getattr(module, "processor", None) for module in network.modules()]
    if not any(hasattr(processor, "_attention_backend") for processor in processors):
        raise ValueError(
            f"attention_backend: the attention of {type(network).__name__} has no such switch; it uses torch's "
            "scaled_dot_product_attention, or xformers with --enable_xformers_memory_efficient_attention true"
        )
    if device.type == "cpu" and backend not in ("native", "_native_math"):
        raise ValueError(f"attention_backend {backend!r} needs an accelerator: on a CPU only 'native' works")
    try:
        network.set_attention_backend(backend)
    except RuntimeError as error:  # a package that is missing
        raise ValueError(f"attention_backend: {error}") from error
    try:
        _try_attention(device, next(network.parameters()).dtype)
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


def add_adapter(network: Any, config: BarrierConfig, rank: int, at_most: bool = False) -> None:
    """A LoRA adapter on exactly the maps that the config's targets and blocks name, its factors in float32.

    Args:
        at_most: a map that is narrower than `rank` gets an adapter of its own width instead of an error.

    Raises:
        ValueError: a rank above the width of one of the maps, from which on an adapter is no smaller than the weight.
    """
    assert config.targets is not None
    maps = resolve_targets(network, config.targets, config.blocks)
    widths = {one.name: min(one.outputs_first(one.layer.weight).shape) for one in maps}
    narrow = {name: width for name, width in widths.items() if width < rank}
    if narrow and not at_most:
        narrowest = min(narrow, key=narrow.__getitem__)
        raise ValueError(
            f"rank is {rank}, but the adapter of {narrowest} can have {narrow[narrowest]} at most, the lesser of its "
            "numbers of inputs and outputs: set rank to that or less, or name wider maps in barrier.targets"
        )
    lora = LoraConfig(
        r=rank,
        lora_alpha=rank,
        init_lora_weights="gaussian",
        target_modules=list(widths),
        rank_pattern=narrow,
        alpha_pattern=narrow,
    )
    network.add_adapter(lora)
    cast_training_params(network, dtype=torch.float32)


def module_hashes(pipeline: Any, prefix: str = "") -> dict[str, str]:
    """`module_hash` of each of the pipeline's networks whose name starts with `prefix`."""
    return {name: module_hash(part) for name, part in components(pipeline, prefix).items()}
