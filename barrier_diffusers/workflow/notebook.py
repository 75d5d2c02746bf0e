"""Unlearning in one call, for notebooks: the steps of train_scripts/unlearn_sd.py on a pipeline that is loaded."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from barrier_diffusers.data.encoding import to_pixels
from barrier_diffusers.data.erased_concepts import read_erased
from barrier_diffusers.data.generated_images import write_image_folder
from barrier_diffusers.models.architectures import components, get_architecture
from barrier_diffusers.models.denoiser import PipelineDenoiser
from barrier_diffusers.models.shared_generation import with_helpers
from barrier_diffusers.protection.barrier import Barrier
from barrier_diffusers.utils.checks import as_list
from barrier_diffusers.utils.command_line import config_from
from barrier_diffusers.utils.words import mentions
from barrier_diffusers.workflow.settings import UnlearnConfig
from barrier_diffusers.workflow.unlearning import (
    Before,
    LoadedModel,
    Run,
    RunData,
    certify,
    edit,
    encode_data,
    judge,
    look_before,
    make_ready,
    open_unlearning,
    protect,
    save_records,
    save_weights,
    train,
)


@dataclass
class UnlearnResult:
    """What `unlearn` leaves."""

    pipeline: Any  # the one handed in, unlearned in place
    metrics: dict[str, Any]  # steps and seconds; with a classifier also what metrics.json has
    history: dict[str, list[float]]  # parts of the loss in every step
    barrier: Barrier  # fitted: certify, save_pretrained, compute_protection_loss


@contextmanager
def left_as_it_was(pipeline: Any, network: Any, full_precision: bool) -> Iterator[None]:
    """Whatever a run does in the block, devices, precision and what may train are the user's afterwards.

    Args:
        full_precision: the network, which trains, is float32 in the block.
    """
    parts: list[Any] = list(components(pipeline).values())
    places = [(part, part.device) for part in parts]
    flags = [(parameter, parameter.requires_grad) for part in parts for parameter in part.parameters()]
    dtype = network.dtype
    try:
        if full_precision:
            network.to(dtype=torch.float32)
        yield
    finally:
        if full_precision:
            network.to(dtype=dtype)
        for part, device in places:
            part.eval().to(device=device)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _conclude(run: Run, model: LoadedModel, data: RunData, before: Before, results: dict[str, Any]) -> dict[str, Any]:
    """Judge in the main process; the metrics."""
    metrics = judge(run, model, data, before, results)
    save_records(run, model, data, metrics, results)
    return metrics


# Measured with two concepts on assets/fashion_sd (docs/quickstart.md), where the script's defaults, which are the
# paper's for large models, erase nothing. Objectives without a floor (ga, kl) and closed-form edits keep the script's.
CALL = {"max_train_steps": 100, "learning_rate": 1e-3}
CALL_OBJECTIVE = {"alpha": 1.0}
CALL_BARRIER = {"use_actual_bounds": True, "lambda_interval": 0.1}
CALL_OBJECTIVES = ("rl", "concept", "esd")
SPEAKS_OF_BOUNDS = ("interval", "constraint", "remove_top_directions", "use_actual_bounds")  # the user's own choice
RETAINED = ("retain_prompts", "retain_data_dir", "train_data_dir", "dataset_name")


def with_call_defaults(values: dict[str, Any]) -> dict[str, Any]:
    """The settings of a call, with what it leaves out: see `unlearn`. What is given is never changed."""
    objective, barrier = dict(values.get("objective", {})), dict(values.get("barrier", {}))
    if objective.get("name", "rl") not in CALL_OBJECTIVES:
        return values
    found = dict(values)
    if not any(found.get(name) for name in RETAINED) and objective.get("alpha") != 0:
        anchors = [*as_list(objective.get("anchor")), *as_list(objective.get("anchor_prompt"))]
        kept = [text for text in anchors if not any(mentions(text, word) for word in as_list(values.get("concept")))]
        found["retain_prompts"] = list(dict.fromkeys(kept))
    for name, value in CALL.items():
        if not (name == "max_train_steps" and "num_train_epochs" in found):
            found.setdefault(name, value)
    if any(found.get(name) for name in RETAINED):
        found["objective"] = {**CALL_OBJECTIVE, **objective}
        if not set(SPEAKS_OF_BOUNDS) & set(barrier) and barrier.get("lambda_interval") != 0:
            found["barrier"] = {**CALL_BARRIER, **barrier}
    return found


def unlearn(
    pipeline: Any,
    concept: str | list[str],
    *,
    anchor: str | list[str] | None = None,
    retain_prompts: Sequence[str] = (),
    images: Sequence[Any] | None = None,
    output_dir: str | Path | None = None,
    **settings: Any,
) -> UnlearnResult:
    """Make a loaded pipeline forget a concept while BARRIER protects the rest.

        result = unlearn(pipeline, concept="sneaker", anchor="boot", retain_prompts=["a boot", "a bag"])

    Args:
        pipeline: of a class in docs/concepts.md; changed in place.
        concept: words that name what is to be forgotten. Without images, the pipeline itself illustrates the prompt
            of that name, or `forget_prompts=[...]`.
        anchor: words that take the concept's place (`objective.anchor`), for objectives that steer to something.
        retain_prompts: of what is to stay, illustrated by the pipeline. The more, the more is kept: by default the
            anchor alone, and nothing where `objective.alpha` is 0.
        images: PIL images of the concept, used in place of illustrations.
        output_dir: gets what the script leaves there, pictures and metrics included; None: nothing is kept.
        settings: any other field of `UnlearnConfig`; sections as dictionaries, e.g. `max_train_steps=100,
            objective={"name": "esd"}, barrier={"lambda_interval": 1.0}`.

    With the objectives rl, concept and esd the call's own defaults are max_train_steps 100, learning_rate 1e-3,
    objective.alpha 1, barrier.lambda_interval 0.1 and barrier.use_actual_bounds, which erase and keep on the embedded
    model (docs/quickstart.md); a large pipeline takes a lower learning rate. All else, and all with other objectives,
    is as in the script. An evaluation (`evaluation={"classifier": FOLDER}`) says whether it worked, and what to change
    if not.

    Raises:
        ValueError: settings that contradict one another or do not fit the pipeline.
        FloatingPointError: a loss or the weights became non-finite.
    """
    row = get_architecture(type(pipeline).__name__)
    network = getattr(pipeline, row.denoiser)
    name = pipeline.config.get("_name_or_path")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        values: dict[str, Any] = {
            "pretrained_model_name_or_path": name or type(pipeline).__name__,
            "concept": concept,
            "resolution": settings.get("resolution") or PipelineDenoiser(pipeline).default_resolution,
            "retain_prompts": list(retain_prompts),
            "report_to": "none",
            **settings,
            "output_dir": str(output_dir or folder / "run"),
        }
        if anchor is not None:
            values["objective"] = {**values.get("objective", {}), "anchor": anchor}
        if images is not None:
            pixels = (to_pixels(images, values["resolution"]) + 1) * 127.5
            write_image_folder(folder / "images", pixels.round().byte().permute(0, 2, 3, 1).numpy(), {})
            values["forget_data_dir"] = str(folder / "images")
        config = config_from(UnlearnConfig, with_call_defaults(values))
        run = open_unlearning(config)
        stack.enter_context(left_as_it_was(pipeline, network, full_precision=config.rank == 0))
        model = make_ready(run, pipeline, read_erased(name, config.revision) if name else [])
        data = encode_data(run, model)
        wanted = output_dir is not None or config.evaluation.classifier is not None
        before = look_before(run, model, data) if wanted else None
        if run.objective.edit is not None:
            results = edit(run, model, data)
        else:
            results = train(run, model, data, protect(run, model, data))
        metrics = {key: value for key, value in results.items() if key != "history"}
        if before is not None:
            with_helpers(pipeline, partial(save_weights, run, model, data))
            certify(run, model, before)
            conclude = partial(_conclude, run, model, data, before, results)
            metrics = with_helpers(pipeline, conclude) or metrics
        run.trainer.end_run()
    return UnlearnResult(pipeline, metrics, results["history"], model.barrier)
