"""Files for other programs, in OUTPUT_DIR/exported: a checkpoint in the layout of its first release, an adapter in
kohya's names, learned tokens."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from diffusers import DiffusionPipeline
from diffusers.utils import convert_state_dict_to_kohya
from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft
from torch import Tensor

from barrier_diffusers.models.architectures import ARCHITECTURES, Architecture, get_architecture
from barrier_diffusers.models.learned_tokens import TOKEN
from barrier_diffusers.models.publishing import widened
from barrier_diffusers.protection.region import save_tensors
from barrier_diffusers.utils.files import file_names
from barrier_diffusers.utils.hub import require_on_hub

EXPORTED = "exported"  # folder in an output folder
KOHYA_OF_SDXL = {  # maps that programs, diffusers among them, look for by the names of SDXL's first release alone
    "lora_unet_add_embedding_linear_1": "lora_unet_label_emb_0_0",
    "lora_unet_add_embedding_linear_2": "lora_unet_label_emb_0_2",
}
ExportFormat = Literal["single_file", "kohya"]


def require_layout(row: Architecture, what: str) -> None:
    """Refuse a pipeline class that has no layout of its own outside diffusers.

    Args:
        what: the setting that asks for it.

    Raises:
        ValueError: the row has none; says which rows have.
    """
    if row.original_layout is None:
        known = ", ".join(name for name, other in ARCHITECTURES.items() if other.original_layout is not None)
        raise ValueError(
            f"{what}: the layout of a first release is known of {known}, not of a {row.name}, which other "
            "programs read as diffusers saves it"
        )


def exported_path(output: Path, result: Path, kind: ExportFormat) -> Path:
    """The file in an output folder, called as the folder of the result is, by which other programs call it."""
    return output / EXPORTED / f"{result.resolve().name}{'_lora' if kind == 'kohya' else ''}.safetensors"


def written(weights: Mapping[str, Tensor], path: Path) -> Path:
    """The path, by now a .safetensors file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_tensors(path, weights, {"format": "pt"})
    return path


def export_single_file(pipeline: Any, path: Path) -> Path:
    """Write a whole pipeline as one checkpoint in the layout of its first release, its weights to the bit as
    `save_pipeline` writes them.

    Raises:
        ValueError: a pipeline class without such a layout, or a network with parts that have no place in it.
    """
    row = get_architecture(type(pipeline).__name__)
    require_layout(row, "export single_file")
    assert row.original_layout is not None
    with widened(pipeline):
        return written(row.original_layout(pipeline), path)


def export_kohya(row: Architecture, folder: Path, path: Path) -> Path:
    """Write the adapter in a folder, of a pipeline of this row, in kohya's names.

    Raises:
        ValueError: a pipeline class whose adapters other programs read in diffusers' names.
    """
    require_layout(row, "export kohya")
    found = row.pipeline_class.lora_state_dict(str(folder), return_alphas=True)
    if any(value is not None for value in (found[1] or {}).values()):
        raise ValueError(f"the adapter in {str(folder)!r} is scaled: kohya's file is written of an adapter saved here")
    weights = convert_state_dict_to_kohya(convert_unet_state_dict_to_peft(found[0]))
    parts = [(name.partition("."), value) for name, value in weights.items()]
    return written({f"{KOHYA_OF_SDXL.get(name, name)}.{rest}": value for (name, _, rest), value in parts}, path)


def export_tokens(row: Architecture, token: str, vectors: Mapping[str, Tensor], path: Path) -> Path | None:
    """Write learned tokens as a textual inversion; None where diffusers has no such file for the pipeline.

    One text encoder: one tensor called as the token. The pair of SDXL: `clip_l` and `clip_g`, as ComfyUI and A1111
    read it; diffusers takes each by itself, with its tokenizer and text encoder.

    Args:
        token: by which prompts ask for them.
        vectors: text encoder -> embeddings (T, D).
    """
    names = ["text_encoder", "text_encoder_2"]
    if row.original_layout is None or not hasattr(row.pipeline_class, "load_textual_inversion"):
        return None
    if list(vectors) == names[:1]:
        return written({token: vectors["text_encoder"]}, path)
    if list(vectors) == names:
        return written({"clip_l": vectors["text_encoder"], "clip_g": vectors["text_encoder_2"]}, path)
    return None


def export_attackers(output: Path, pipeline: Any, tokens: Mapping[str, Mapping[str, Tensor]]) -> list[Path]:
    """Write the tokens that attacks on a pipeline learned into an output folder; where they are, if such files exist.

    Args:
        tokens: name of the file -> text encoder -> embeddings (T, D).
    """
    row, names = get_architecture(type(pipeline).__name__), file_names(tokens)
    paths = [
        export_tokens(row, TOKEN, vectors, output / EXPORTED / f"{names[name]}.safetensors")
        for name, vectors in tokens.items()
    ]
    return [path for path in paths if path is not None]


def row_of(name: str, revision: str | None = None) -> Architecture:
    """The row of a pipeline folder or hub repository, which is not loaded.

    Raises:
        ValueError: there is no such pipeline, or none with a row.
    """
    require_on_hub(name, revision=revision)
    return get_architecture(DiffusionPipeline.load_config(name, revision=revision)["_class_name"])
