"""Make an image classifier forget a class or random images while BARRIER protects the rest.

    accelerate launch -m classification_ext.unlearn --config classification_ext/configs/fashion_class.yaml

Any field of `UnlearnConfig` is a dotted flag (`--method.name ga`). output_dir becomes the unlearned classifier, with
metrics.json, manifest.json, the barrier and the loss curves beside it.
"""

from __future__ import annotations

import barrier_diffusers.utils.signals  # noqa: F401  # isort: skip  # first: from here on a signal ends in one line

import itertools
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
from barrier_diffusers.evaluation.tables import erase_more, warn_if_not_erased
from barrier_diffusers.training.robust import relearned_loss
from barrier_diffusers.training.saliency import SaliencyMask, summed_gradients
from barrier_diffusers.training.steps import freeze_normalisation
from barrier_diffusers.training.trainer import Trainer
from barrier_diffusers.utils.command_line import run_script
from barrier_diffusers.utils.files import save_whole, write_json
from barrier_diffusers.utils.output_folder import in_output_folder
from barrier_diffusers.utils.run_records import MANIFEST_NAME, METRICS_NAME, fingerprint, manifest, module_hash
from classification_ext.data import Batch, Splits, in_order, load_split, make_splits, pixels_of, shuffled
from classification_ext.methods import METHODS, Edit, Method, Step
from classification_ext.methods.boundary_expand import ShadowLabel
from classification_ext.metrics import evaluate, print_table
from classification_ext.models import AnyClassifier, load_classifier, restart
from classification_ext.robust import ClassifierRelearner
from classification_ext.settings import UnlearnConfig
from classification_ext.supervised import fit, make_optimizer, open_seeded_run


def run_batch(model: nn.Module, batch: Batch) -> Tensor:
    """What the barrier records: the classifier on a batch's images, as they are."""
    return model(pixels_of(batch))


@dataclass
class Run:
    """What a run starts from, and what changes it."""

    config: UnlearnConfig
    method: Method
    trainer: Trainer
    model: AnyClassifier
    splits: Splits
    barrier: Barrier | None  # None: every weight trains
    base_hash: str

    @property
    def accelerator(self) -> Accelerator:
        """Of all its processes."""
        return self.trainer.accelerator

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Those that may change, by name."""
        chosen = set(self.barrier.trainable_parameters()) if self.barrier else set(self.model.parameters())
        return {name: value for name, value in self.model.named_parameters() if value in chosen}

    def every_row(self, images: LabelledImages) -> list[Batch]:
        """This process's share of the images, in order, on the device."""
        share = slice(self.accelerator.process_index, None, self.accelerator.num_processes)
        return in_order(images[share], self.config.train_batch_size, self.accelerator.device)

    def step(self, model: Any, batch: Batch, labels: Tensor | None = None, progress: float = 0.0) -> Step:
        """A batch in the form the methods take."""
        return Step(
            model,
            pixels_of(batch),
            labels=batch["labels"] if labels is None else labels,
            num_labels=len(self.model.names),
            parameters=list(self.parameters.values()),
            progress=progress,
            options=self.config.method,
        )


def load_run(config: UnlearnConfig) -> Run:
    """Load the classifier and its data; nothing has been trained yet."""
    method = METHODS.find(config.method.name)
    method.check(config)
    trainer = open_seeded_run(config)
    accelerator = trainer.accelerator
    with accelerator.main_process_first():
        model = load_classifier(config.pretrained_model_name_or_path)
        read = partial(load_split, config, resolution=model.resolution, num_channels=model.num_channels)
        splits = make_splits(
            read(config.train_split, names=model.names), read(config.test_split, names=model.names), config
        )
    model.to(accelerator.device).requires_grad_(True).eval()
    barrier = Barrier(model, config.barrier) if config.trained_weights == "targets" else None
    trainer.checkpoints.inputs = {"base model": module_hash(model), "data": fingerprint(splits.digests())}
    return Run(config, method, trainer, model=model, splits=splits, barrier=barrier, base_hash=module_hash(model))


def protect(run: Run) -> None:
    """Record the forget images' inputs (and the retain images', where options ask for them), or load the barrier."""
    assert run.barrier is not None
    if run.trainer.checkpoint:
        run.barrier.remove()
        run.barrier = Barrier.from_pretrained(run.trainer.checkpoint / "barrier", run.model)
        return
    options = run.config.barrier
    forget = run.every_row(run.splits.forget) if options.has_penalty else None
    retain = run.every_row(run.splits.retain) if options.needs_retain_data else None
    with run.accelerator.autocast():
        run.barrier.setup_protection(forget, run_batch, retain_loader=retain)


def attach_mask(run: Run, optimizer: torch.optim.Optimizer) -> None:
    """SalUn's mask from the gradient of the ordinary loss on all forget images (saliency.py)."""
    parameters = list(run.parameters.values())
    mask = SaliencyMask(parameters)
    if run.trainer.checkpoint is None:  # else it is in the checkpoint
        steps = (run.step(run.model, batch) for batch in run.every_row(run.splits.forget))
        with run.accelerator.autocast():
            totals = summed_gradients(parameters, steps)
        scores = [run.accelerator.reduce(total, "sum").abs() for total in totals]
        mask.choose([list(zip(parameters, scores, strict=True))], run.config.saliency_mask or 1.0)
    mask.attach(optimizer)
    run.trainer.checkpoints.states["saliency_mask"] = mask


def relabelled(run: Run) -> LabelledImages:
    """The images that the method's loss sees, with the labels it wants for them."""
    images = run.splits.retain if run.method.over == "retain" else run.splits.forget
    if run.method.shadow_label:
        return replace(images, labels=torch.full_like(images.labels, len(run.model.names)))
    if run.method.relabel is None:
        return images
    batches = in_order(images, run.config.train_batch_size, run.accelerator.device)
    parts = [run.method.relabel(run.model, pixels_of(batch), batch["labels"], run.config.method) for batch in batches]
    return replace(images, labels=torch.cat(parts).cpu())


def train(run: Run) -> dict[str, Any]:
    """The method's loss + alpha * retain loss + protection, step by step."""
    config, trainer, model = run.config, run.trainer, run.model
    images, alpha, processes = relabelled(run), config.method.alpha, run.accelerator.num_processes
    loaders = [shuffled(images, config.train_batch_size, seed=config.seed, num_processes=processes)]
    if alpha > 0:
        retained, seed = run.splits.retain, config.seed + 1
        loaders.append(shuffled(retained, config.train_batch_size, seed=seed, num_processes=processes))
    shadow = ShadowLabel(model, len(model.names)).to(run.accelerator.device) if run.method.shadow_label else None
    start = time.perf_counter()
    if config.protected:
        protect(run)
    parameters = [*run.parameters.values(), *(shadow.parameters() if shadow is not None else ())]
    optimizer = make_optimizer(config, parameters)
    if config.saliency_mask is not None:
        attach_mask(run, optimizer)
    robust = config.robust
    relearner = ClassifierRelearner(robust, model, run.splits, seed=config.seed)
    if robust.has_lives:
        trainer.checkpoints.states["relearner"] = relearner
    set_up = round(time.perf_counter() - start, 2)
    forget_batches, *retain_batches = trainer.prepare(
        models=[model, shadow] if shadow is not None else [model],
        parameters=parameters,
        optimizer=optimizer,
        loaders=loaders,
    )
    network, barrier = trainer.models[0], run.barrier if config.protected else None
    micro_steps = config.gradient_accumulation_steps
    calls = itertools.count()
    freeze_normalisation(network)

    def logits(pixels: Tensor) -> Tensor:
        return trainer.models[1](network(pixels)) if shadow is not None else network(pixels)

    def terms(step: int) -> dict[str, Tensor]:
        assert run.method.loss is not None
        made = run.step(logits, next(forget_batches), progress=step / trainer.max_steps)
        number, parts = step * micro_steps + next(calls) % micro_steps, {}
        if robust.meta_steps and step % robust.meta_every == 0:
            # before the graph of the weights as they are, which cannot be moved while it is alive
            with relearner.relearned(number):
                moved = run.method.loss(replace(made, model=model))
                parts["meta"] = robust.meta_weight * relearned_loss(moved, parameters, relearner)
        parts["objective"] = run.method.loss(made)
        for batches in retain_batches:
            batch = next(batches)
            parts["retain"] = alpha * F.cross_entropy(network(pixels_of(batch)).float(), batch["labels"])
        if barrier is not None:
            parts["protection"] = barrier.compute_protection_loss()
        return parts

    names = ["objective", "meta"] if robust.meta_steps else []
    seconds = trainer.fit(terms, barrier=barrier, desc=f"unlearning, {run.method.name}", names=names)
    model.eval()
    if shadow is not None:
        shadow.remove()
    facts = {"num_steps": trainer.max_steps, "seconds_training": seconds, "seconds_set_up": set_up}
    return {**facts, "history": trainer.history.values}


def retrain(run: Run) -> dict[str, Any]:
    """New weights, trained on the retained images alone."""
    config, trainer = run.config, run.trainer
    run.model = restart(run.model, config.seed)
    seconds = fit(trainer, config, recipe=config.recipe, model=run.model, images=run.splits.retain)
    return {"num_steps": trainer.max_steps, "seconds_training": seconds, "history": trainer.history.values}


def edit(run: Run) -> dict[str, Any]:
    """A closed-form change of the weights; every process makes the same one."""
    config, start = run.config, time.perf_counter()
    assert run.method.edit is not None
    run.method.edit(
        Edit(
            run.model,
            run.parameters,
            forget=run.splits.forget,
            retain=run.splits.retain,
            device=run.accelerator.device,
            batch_size=config.train_batch_size,
            seed=config.seed,
            options=config.method,
        )
    )
    if not all(bool(parameter.isfinite().all()) for parameter in run.parameters.values()):
        raise FloatingPointError(f"method {run.method.name!r} left weights that are not finite: lower its strength")
    return {"num_steps": 0, "seconds_training": round(time.perf_counter() - start, 2), "history": {}}


def save_weights(run: Run, results: dict[str, Any]) -> dict[str, Any]:
    """Write the barrier and the classifier; the results without the history, and what trained how far."""
    config, model, barrier = run.config, run.model, run.barrier
    trained = sum(parameter.numel() for parameter in run.parameters.values())
    everything = sum(parameter.numel() for parameter in model.parameters())
    facts = {key: value for key, value in results.items() if key != "history"}
    facts |= {"num_trained": trained, "trained_percent": round(100 * trained / everything, 4)}
    if config.protected and barrier is not None:
        facts["drift"] = {name: round(value, 5) for name, value in barrier.drift_norms().items()}
        barrier.save_pretrained(config.output_dir)
    if barrier is not None:
        barrier.remove()
    save_whole(model.save_pretrained, Path(config.output_dir), last="config.json")
    return facts


def judge(run: Run) -> dict[str, Any]:
    """UA, RA, TA and MIA of the classifier as it is now."""
    return evaluate(run.model, run.splits, run.config.evaluation, run.config.seed, run.accelerator.device)


def save_records(run: Run, before: dict[str, Any] | None, facts: dict[str, Any], results: dict[str, Any]) -> None:
    """Judge the classifier; write metrics, loss curves and manifest, and print what came of it."""
    config, output = run.config, Path(run.config.output_dir)
    after = judge(run)
    if results["history"]:
        loss_curves(results["history"], output / "loss_curves.png")
    hashes = {"base": run.base_hash, "model": module_hash(run.model), **run.splits.digests()}
    write_json(output / MANIFEST_NAME, manifest(config, hashes, **results))
    write_json(output / METRICS_NAME, {**after, **facts, "before": before})
    what = ", ".join(config.classes) or f"{len(run.splits.forget)} random images"
    print_table(before, after, f"{run.method.name}: forgotten {what}")
    if config.classes:  # random images are like those that stay: a classifier recognises most of them anyway
        advice = erase_more(config, "take another method")
        warn_if_not_erased(after["unlearning_accuracy"], config.classes, advice)
    print(f"trained {facts['trained_percent']:.2f} % of the weights in {facts['seconds_training']:.1f} s")


@in_output_folder(also_written=["README.md"])
def main(config: UnlearnConfig) -> None:
    """Load -> encode -> protect -> train -> save -> judge."""
    run = load_run(config)
    before = None
    if config.evaluation.before and run.accelerator.is_main_process:
        before = judge(run)
    run.accelerator.wait_for_everyone()
    if run.method.loss is not None:
        results = train(run)
    elif run.method.edit is not None:
        results = edit(run)
    else:
        results = retrain(run)
    if run.accelerator.is_main_process:
        facts = save_weights(run, results)
        save_records(run, before, facts=facts, results=results)
        output = Path(config.output_dir)
        print(f"classifier: {output}\nreport:     {write_report([output], output / REPORT_NAME)}")
    run.trainer.end_run()


if __name__ == "__main__":
    run_script(main, UnlearnConfig)
