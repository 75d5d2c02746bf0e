"""Save what was unlearned as a folder that others can load, with a model card, and upload it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData, create_repo, upload_folder

from barrier_diffusers.models.architectures import components, get_architecture
from barrier_diffusers.utils.files import save_whole, written_whole
from barrier_diffusers.utils.run_records import METRICS_NAME
from barrier_diffusers.utils.shown_text import for_markdown, markdown_link, python_string

NOT_UPLOADED = ("checkpoints/**", "cache/**", "logs/**", ".*")


CARD = """# {title}

This is {base} after unlearning **{forgotten}** with [BARRIER](https://arxiv.org/abs/2605.15737)
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

pipeline = DiffusionPipeline.from_pretrained({folder}{absent})"""


LOAD_ADAPTER = """from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained({base}{absent})
pipeline.load_lora_weights({folder})"""


@contextmanager
def widened(pipeline: Any) -> Iterator[None]:
    """Beside a float32 denoiser every network in float32: a folder of mixed precision loads, but does not run."""
    network = getattr(pipeline, get_architecture(type(pipeline).__name__).denoiser)
    parameters = [value for part in components(pipeline).values() for value in part.parameters()]
    narrow = [(value, value.dtype) for value in parameters if value.dtype in (torch.float16, torch.bfloat16)]
    narrow = narrow if network.dtype == torch.float32 else []
    try:
        for parameter, _ in narrow:
            parameter.data = parameter.data.float()
        yield
    finally:
        for parameter, dtype in narrow:
            parameter.data = parameter.data.to(dtype)


def load_in_float32(folder: Path) -> None:
    """Let a saved pipeline load in one precision where the loader is told none, whatever precision its files have.

    diffusers then loads its networks in float32, but transformers a text encoder in the precision that its config.json
    names: one of half precision would not run beside the denoiser. `dtype=` of `from_pretrained` decides as before.
    """
    for path in folder.glob("*/config.json"):
        content = json.loads(path.read_text(encoding="utf-8"))
        narrow = [key for key in ("dtype", "torch_dtype") if content.get(key) not in (None, "float32")]
        if narrow:
            path.write_text(json.dumps(content | dict.fromkeys(narrow, "float32"), indent=2) + "\n", encoding="utf-8")


def save_pipeline(pipeline: Any, output: Path) -> None:
    """Write the pipeline into `output`, in one precision; a killed write leaves no half-written model_index.json."""

    def save(folder: Path) -> None:
        pipeline.save_pretrained(folder, safe_serialization=True)
        load_in_float32(folder)

    with widened(pipeline):
        save_whole(save, output, last="model_index.json")


def save_adapter(pipeline: Any, output: Path) -> None:
    """Write the denoiser's LoRA as pytorch_lora_weights.safetensors, the file `load_lora_weights` looks for."""
    row = get_architecture(type(pipeline).__name__)
    layers = {f"{row.denoiser}_lora_layers": row.adapter_layers(getattr(pipeline, row.denoiser))}
    save_whole(
        lambda folder: pipeline.save_lora_weights(folder, safe_serialization=True, **layers),
        output,
        last="pytorch_lora_weights.safetensors",
    )


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


@dataclass(frozen=True)
class ModelCardFacts:
    """What a run's model card says of it."""

    where: str  # what a user loads: folder or hub repository
    base: str  # the pipeline that was unlearned: folder or hub repository
    forgotten: list[str]
    objective: str
    protection: str  # in a few words
    adapter: bool  # whether the folder holds a LoRA instead of a pipeline
    metrics: dict[str, Any]  # content of metrics.json
    absent: Sequence[str] = ()  # parts of the pipeline that load as None


def hub_results(metrics: Mapping[str, Any]) -> list[EvalResult]:
    """The summary percentages in the form of the hub's model-index."""
    asked: dict[str, Any] = {
        "task_type": "text-to-image",
        "task_name": "unlearning",
        "dataset_type": "generated-images",
        "dataset_name": f"{metrics.get('num_images', 0)} images generated from the evaluation prompts",
    }
    return [
        EvalResult(**asked, metric_type=name, metric_name=f"{name.replace('_', ' ')}, percent", metric_value=value)
        for name, value in metrics.items()
        if isinstance(value, float) and "accuracy" in name
    ]


def save_model_card(output: Path, facts: ModelCardFacts) -> None:
    """Write README.md with the metadata the hub reads and the numbers of this run."""
    base, metrics = facts.base, facts.metrics
    licence = licence_of(base)
    data = ModelCardData(
        model_name=Path(facts.where).name,
        eval_results=hub_results(metrics) or None,
        license=licence,
        base_model=base if not Path(base).exists() else None,
        library_name="diffusers",
        tags=["text-to-image", "machine-unlearning", "barrier", *(["lora"] if facts.adapter else [])],
    )
    loading = (LOAD_ADAPTER if facts.adapter else LOAD_PIPELINE).format(
        folder=python_string(facts.where),
        base=python_string(base),
        absent="".join(f", {part}=None" for part in facts.absent),
    )
    body = CARD.format(
        title=for_markdown(f"{Path(base).name} without {', '.join(facts.forgotten)}"),
        base=markdown_link(base, base),
        forgotten=for_markdown(", ".join(facts.forgotten)),
        objective=facts.objective.replace("`", ""),
        protection=for_markdown(facts.protection),
        loading=loading,
        results=results_table(metrics),
        count=metrics.get("num_images", 0),
        metrics=METRICS_NAME,
        licence=f": {for_markdown(licence)}" if licence else "; it was not found with the weights",
    )
    picture = "\n![before and after](before_after.png)\n" if (output / "before_after.png").is_file() else ""
    with written_whole(output / "README.md") as temporary:
        ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}{picture}").save(temporary)
