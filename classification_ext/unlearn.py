"""Make an image classifier forget a class or random images while BARRIER protects the rest.

    accelerate launch -m classification_ext.unlearn --config classification_ext/configs/fashion_class.yaml

Any field of `UnlearnConfig` is a dotted flag (`--method.name ga`). output_dir becomes the unlearned classifier, with
metrics.json, manifest.json, the barrier and the loss curves beside it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from barrier_diffusers import Barrier
from barrier_diffusers.data.labelled_images import LabelledImages
from barrier_diffusers.evaluation.pictures import loss_curves
from barrier_diffusers.evaluation.report import REPORT_NAME, write_report
from barrier_diffusers.training.loop import endless
from barrier_diffusers.training.saliency import SaliencyMask, summed_gradients
from barrier_diffusers.training.steps import freeze_normalisation
from barrier_diffusers.utils.command_line import run_script
from barrier_diffusers.utils.files import write_json
from barrier_diffusers.utils.run_records import MANIFEST_NAME, METRICS_NAME, manifest, module_hash
from classification_ext.data import Batch, Splits, in_order, load_split, make_splits, pixels_of, shuffled
from classification_ext.loop import Loop, open_seeded_run
from classification_ext.methods import Edit, Method, Step, get_method
from classification_ext.methods.boundary_expand import ShadowLabel
from classification_ext.metrics import evaluate, print_table
from classification_ext.models import AnyClassifier, load_classifier, restart
from classification_ext.settings import UnlearnConfig
from classification_ext.supervised import fit


def run_batch(model: nn.Module, batch: Batch) -> Tensor:
    """What the barrier records: the classifier on a batch's images, as they are."""
    return model(pixels_of(batch))


@dataclass
class Job:
    """A run: what it starts from, and what changes it."""

    config: UnlearnConfig
    method: Method
    accelerator: Accelerator
    output: Path
    model: AnyClassifier
    splits: Splits
    barrier: Barrier | None  # None: every weight trains
    base_hash: str

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Those that may change, by name."""
        chosen = set(self.barrier.trainable_parameters()) if self.barrier else set(self.model.parameters())
        return {name: value for name, value in self.model.named_parameters() if value in chosen}

    def every_row(self, images: LabelledImages) -> list[Batch]:
        """This process's share of the images, in order, on the device."""
        share = slice(self.accelerator.process_index, None, self.accelerator.num_processes)
        return in_order(images[share], self.config.train_batch_size, self.accelerator.device)


def open_job(config: UnlearnConfig) -> Job:
    """Load the classifier and its data; nothing has been trained yet."""
    method = get_method(config.method.name)
    method.check(config)
    accelerator, output = open_seeded_run(config)
    with accelerator.main_process_first():
        model = load_classifier(config.pretrained_model_name_or_path)
        read = partial(load_split, config, resolution=model.resolution, num_channels=model.num_channels)
        splits = make_splits(
            read(config.train_split, names=model.names), read(config.test_split, names=model.names), config
        )
    model.to(accelerator.device).requires_grad_(True).eval()
    barrier = Barrier(model, config.barrier) if config.trained_weights == "targets" else None
    return Job(config, method, accelerator, output, model, splits, barrier, module_hash(model))


def set_up_protection(job: Job, checkpoint: Path | None) -> None:
    """Record the forget images' inputs (and the retain images', where options ask for them), or load the barrier."""
    assert job.barrier is not None
    if checkpoint:
        job.barrier.remove()
        job.barrier = Barrier.from_pretrained(checkpoint / "barrier", job.model)
        return
    options = job.config.barrier
    forget = job.every_row(job.splits.forget) if options.has_penalty else None
    retain = job.every_row(job.splits.retain) if options.needs_retain_data else None
    with job.accelerator.autocast():
        job.barrier.setup_protection(forget, run_batch, retain)


def attach_mask(job: Job, loop: Loop) -> None:
    """SalUn's mask from the gradient of the ordinary loss on all forget images (saliency.py)."""
    parameters = list(job.parameters.values())
    mask = SaliencyMask(parameters)
    if loop.checkpoint is None:  # else it is in the checkpoint
        steps = (job_step(job, job.model, batch) for batch in job.every_row(job.splits.forget))
        with job.accelerator.autocast():
            totals = summed_gradients(parameters, steps)
        scores = [job.accelerator.reduce(total, "sum").abs() for total in totals]
        mask.choose([list(zip(parameters, scores, strict=True))], job.config.saliency_mask or 1.0)
    mask.attach(loop.plain_optimizer)
    loop.checkpoints.states["saliency_mask"] = mask


def job_step(job: Job, model: Any, batch: Batch, labels: Tensor | None = None, progress: float = 0.0) -> Step:
    """A batch in the form the methods take."""
    names = (job.model.names, list(job.parameters.values()))
    labels = batch["labels"] if labels is None else labels
    return Step(model, pixels_of(batch), labels, len(names[0]), names[1], progress, job.config.method)


def relabelled(job: Job) -> LabelledImages:
    """The images that the method's loss sees, with the labels it wants for them."""
    images = job.splits.retain if job.method.over == "retain" else job.splits.forget
    if job.method.shadow_label:
        return replace(images, labels=torch.full_like(images.labels, len(job.model.names)))
    if job.method.relabel is None:
        return images
    batches = in_order(images, job.config.train_batch_size, job.accelerator.device)
    parts = [job.method.relabel(job.model, pixels_of(b), b["labels"], job.config.method) for b in batches]
    return replace(images, labels=torch.cat(parts).cpu())


def train(job: Job) -> dict[str, Any]:
    """The method's loss + alpha * retain loss + protection, step by step."""
    config, accelerator, model = job.config, job.accelerator, job.model
    images, alpha, processes = relabelled(job), config.method.alpha, accelerator.num_processes
    loaders = [shuffled(images, config.train_batch_size, config.seed, processes)]
    if alpha > 0:
        loaders.append(shuffled(job.splits.retain, config.train_batch_size, config.seed + 1, processes))
    loaders = [accelerator.prepare(loader) for loader in loaders]
    shadow = ShadowLabel(model, len(model.names)).to(accelerator.device) if job.method.shadow_label else None
    modules = [model, shadow] if shadow is not None else [model]
    parameters = [*job.parameters.values(), *(shadow.parameters() if shadow is not None else ())]
    loop = Loop(accelerator, config, modules, parameters, len(loaders[0]))
    start = time.perf_counter()
    if config.protected:
        set_up_protection(job, loop.checkpoint)
    if config.saliency_mask is not None:
        attach_mask(job, loop)
    set_up = round(time.perf_counter() - start, 2)
    done = loop.resume()
    network, barrier = loop.models[0], job.barrier if config.protected else None
    freeze_normalisation(network)
    forget_batches = endless(loaders[0], done)
    retain_batches = endless(loaders[1], done) if alpha > 0 else None

    def logits(pixels: Tensor) -> Tensor:
        return loop.models[1](network(pixels)) if shadow is not None else network(pixels)

    def terms(step: int) -> dict[str, Tensor]:
        assert job.method.loss is not None
        made = job_step(job, logits, next(forget_batches), progress=step / loop.max_steps)
        parts = {"objective": job.method.loss(made)}
        if retain_batches is not None:
            batch = next(retain_batches)
            parts["retain"] = alpha * F.cross_entropy(network(pixels_of(batch)).float(), batch["labels"])
        if barrier is not None:
            parts["protection"] = barrier.compute_protection_loss()
        return parts

    seconds = loop.run(terms, f"unlearning, {job.method.name}", barrier)
    accelerator.unwrap_model(network, keep_fp32_wrapper=False).eval()
    if shadow is not None:
        shadow.remove()
    facts = {"num_steps": loop.max_steps, "seconds_training": seconds, "seconds_set_up": set_up}
    return {**facts, "history": loop.history.values}


def retrain(job: Job) -> dict[str, Any]:
    """New weights, trained on the retained images alone."""
    config = job.config
    job.model = restart(job.model, config.seed)
    loop, seconds = fit(job.accelerator, config, config.recipe, job.model, job.splits.retain)
    return {"num_steps": loop.max_steps, "seconds_training": seconds, "history": loop.history.values}


def edit(job: Job) -> dict[str, Any]:
    """A closed-form change of the weights; every process makes the same one."""
    config, device = job.config, job.accelerator.device
    splits, sizes = job.splits, (config.train_batch_size, config.seed)
    start = time.perf_counter()
    assert job.method.edit is not None
    job.method.edit(Edit(job.model, job.parameters, splits.forget, splits.retain, device, *sizes, config.method))
    if not all(bool(parameter.isfinite().all()) for parameter in job.parameters.values()):
        raise FloatingPointError(f"method {job.method.name!r} left weights that are not finite: lower its strength")
    return {"num_steps": 0, "seconds_training": round(time.perf_counter() - start, 2), "history": {}}


def finish(job: Job, before: dict[str, Any] | None, results: dict[str, Any]) -> None:
    """Save the weights first, then judge them: metrics, loss curves, manifest."""
    config, output, model = job.config, job.output, job.model
    count = sum(parameter.numel() for parameter in job.parameters.values())
    facts = {key: value for key, value in results.items() if key != "history"}
    facts |= {"num_trained": count, "trained_percent": round(100 * count / _size(model), 4)}
    if config.protected and job.barrier is not None:
        facts["drift"] = {name: round(value, 5) for name, value in job.barrier.drift_norms().items()}
        job.barrier.save_pretrained(output)
    if job.barrier is not None:
        job.barrier.remove()
    model.save_pretrained(output)
    after = evaluate(model, job.splits, config.evaluation, config.seed, job.accelerator.device)
    write_json(output / METRICS_NAME, {**after, **facts, "before": before})
    if results["history"]:
        loss_curves(results["history"], output / "loss_curves.png")
    hashes = {"base": job.base_hash, "model": module_hash(model), **job.splits.digests()}
    write_json(output / MANIFEST_NAME, manifest(config, hashes, **results))
    what = ", ".join(config.classes) or f"{len(job.splits.forget)} random images"
    print_table(before, after, f"{job.method.name}: forgotten {what}")
    print(f"trained {facts['trained_percent']:.2f} % of the weights in {facts['seconds_training']:.1f} s")
    print(f"classifier: {output}\nreport:     {write_report([output], output / REPORT_NAME)}")


def _size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def main(config: UnlearnConfig) -> None:
    """Load -> before -> unlearn -> save -> after."""
    job = open_job(config)
    before = None
    if config.evaluation.before and job.accelerator.is_main_process:
        before = evaluate(job.model, job.splits, config.evaluation, config.seed, job.accelerator.device)
    job.accelerator.wait_for_everyone()
    if job.method.loss is not None:
        results = train(job)
    elif job.method.edit is not None:
        results = edit(job)
    else:
        results = retrain(job)
    if job.accelerator.is_main_process:
        finish(job, before, results)
    job.accelerator.wait_for_everyone()
    job.accelerator.end_training()


if __name__ == "__main__":
    run_script(main, UnlearnConfig)
