"""Make a diffusion pipeline forget a concept while BARRIER protects the rest.

    accelerate launch train_scripts/unlearn_sd.py --config train_scripts/configs/fashion_class.yaml

Any field of `UnlearnConfig` is a dotted flag (`--barrier.lambda_interval 1`). output_dir becomes the unlearned
pipeline (or the LoRA adapter), with metrics.json, manifest.json, the pictures and a model card beside it.
"""

from __future__ import annotations

import barrier_diffusers.utils.signals  # noqa: F401  # isort: skip  # first: from here on a signal ends in one line

from functools import partial
from typing import Any

from barrier_diffusers.data.erased_concepts import read_erased
from barrier_diffusers.evaluation.report import REPORT_NAME, write_report
from barrier_diffusers.models.publishing import push_folder
from barrier_diffusers.models.shared_generation import with_helpers
from barrier_diffusers.utils.command_line import run_script
from barrier_diffusers.utils.output_folder import in_output_folder
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
    load_base,
    look_before,
    make_ready,
    open_unlearning,
    protect,
    save_records,
    save_weights,
    train,
)


def conclude(run: Run, model: LoadedModel, data: RunData, before: Before, results: dict[str, Any]) -> None:
    """Judge -> report, in the main process."""
    metrics = judge(run, model, data, before, results)
    save_records(run, model, data, metrics, results)
    print(f"{'adapter' if run.config.rank else 'pipeline'}: {run.output}")
    if run.config.merges_adapter and run.config.robust.parts:
        print(f"give away {run.output / 'merged'} alone: an adapter can be taken off, and the concept is back")
    for kind in run.config.export:
        print(f"exported: {run.exported(kind)}")
    print(f"picture:  {run.output / 'before_after.png'}")
    print(f"report:   {write_report([run.output], run.output / REPORT_NAME)}")
    if run.repo_id is not None:
        print(f"hub:      {push_folder(run.output, run.repo_id)}")


@in_output_folder(also_written=["README.md"])
def main(config: UnlearnConfig) -> None:
    """Load -> encode -> protect -> train -> save -> certify -> conclude."""
    run = open_unlearning(config)
    erased = read_erased(config.pretrained_model_name_or_path, config.revision)
    model = make_ready(run, load_base(config), erased)
    data = encode_data(run, model)
    before = look_before(run, model, data)
    if run.objective.edit is not None:
        results = edit(run, model, data)
    else:
        unlearner = protect(run, model, data)
        results = train(run, model, data, unlearner)
    with_helpers(model.pipeline, partial(save_weights, run, model, data))
    certify(run, model, before)
    with_helpers(model.pipeline, partial(conclude, run, model, data, before, results))
    run.trainer.end_run()


def command() -> None:
    """The console command barrier-unlearn."""
    run_script(main, UnlearnConfig)


if __name__ == "__main__":
    command()
