"""Judge an unlearned diffusion pipeline: what it still shows on plain prompts, what it still can do, and what attacks
bring back.

    python train_scripts/evaluate_sd.py --config train_scripts/configs/evaluate_fashion.yaml

Any field of `EvaluateConfig` is a dotted flag (`--inversion.num_steps 1000`). output_dir gets metrics.json, the same
for the same settings, weights, images and machine, whether or not the run was interrupted; seconds.json, which never
is; images/, attacks.png and report.html; and exported/, with the tokens that attacks learned.
"""

from __future__ import annotations

import barrier_diffusers.utils.signals  # noqa: F401  # isort: skip  # first: from here on a signal ends in one line

from pathlib import Path
from typing import Any

from barrier_diffusers.evaluation.attacked import CURVES_NAME, attack, check_attacks
from barrier_diffusers.evaluation.attacks.cells import PICTURE_COLUMNS
from barrier_diffusers.evaluation.certification import certify_saved, has_barrier, held_out_images
from barrier_diffusers.evaluation.evaluation_split import images_hash
from barrier_diffusers.evaluation.judged_model import IMAGES_NAME, PICTURE_NAME, SECONDS_NAME, JudgedModel
from barrier_diffusers.evaluation.pictures import attacks_picture
from barrier_diffusers.evaluation.protocols import make_protocols
from barrier_diffusers.evaluation.protocols.concepts import ConceptProtocol
from barrier_diffusers.evaluation.report import REPORT_NAME, write_report
from barrier_diffusers.evaluation.settings import EvaluateConfig
from barrier_diffusers.evaluation.weight_drift import print_drift, weight_drift
from barrier_diffusers.models.exporting import export_attackers
from barrier_diffusers.utils.command_line import run_script
from barrier_diffusers.utils.files import write_json
from barrier_diffusers.utils.output_folder import in_output_folder
from barrier_diffusers.utils.run_records import METRICS_NAME, manifest, module_hash

WITHOUT_EFFECT = ("output_dir", "overwrite_output_dir", "cache_dir")  # settings that change no number


@in_output_folder(kept=[IMAGES_NAME])
def main(config: EvaluateConfig) -> None:
    """Load -> check -> protocols on plain prompts -> attacks -> JSON, picture, page."""
    output = Path(config.output_dir)
    judged_model = JudgedModel(config, output)
    protocols = make_protocols(config, judged_model)
    concepts = next((protocol for protocol in protocols if isinstance(protocol, ConceptProtocol)), None)
    forgotten = concepts.attackers_view() if concepts is not None and config.chosen_attacks else []
    check_attacks(config, judged_model, forgotten)

    saved, lora_weights = config.pretrained_model_name_or_path, config.lora_weights
    if concepts is not None and saved is not None and has_barrier(saved, lora_weights):
        held_out = held_out_images(
            config.certificate, config.evaluation, concepts=concepts.concepts, erased=concepts.erased
        )
        certify_saved(
            output,
            judged_model.pipeline,
            folder=saved,
            lora_weights=lora_weights,
            held_out=held_out,
            certificate=config.certificate,
            resolution=judged_model.resolution,
        )

    metrics: dict[str, Any] = {}
    if judged_model.base is not None:
        metrics["weight_drift"] = weight_drift(judged_model.base, judged_model.pipeline)
        print_drift(metrics["weight_drift"])
    for protocol in protocols:
        metrics |= protocol.run()
    hashes, seconds = dict(judged_model.hashes), {}
    if concepts is not None and concepts.judge is not None and forgotten:
        attacked = attack(config, concepts, forgotten=forgotten, classes=metrics["classes"])
        metrics |= attacked.metrics
        seconds = attacked.seconds
        if attacked.has_curves:
            write_json(output / CURVES_NAME, attacked.curves)
        columns = min(PICTURE_COLUMNS, config.evaluation.images_per_label)
        export_attackers(output, judged_model.pipeline, attacked.tokens)
        attacks_picture(attacked.plain, attacked.pictures, path=output / PICTURE_NAME, columns=columns)
        hashes |= {f"images of {known.concept}": images_hash(known.images) for known in forgotten}
    if concepts is not None and concepts.judge is not None:
        hashes |= {"classifier": module_hash(concepts.judge.classifier)}
    record = manifest(config, hashes, **judged_model.facts, **metrics)
    record["settings"] = {name: value for name, value in record["settings"].items() if name not in WITHOUT_EFFECT}
    write_json(output / SECONDS_NAME, seconds)
    write_json(output / METRICS_NAME, record)
    print(f"numbers: {output / METRICS_NAME}\nreport:  {write_report([output], output / REPORT_NAME)}")


def command() -> None:
    """The console command barrier-evaluate."""
    run_script(main, EvaluateConfig)


if __name__ == "__main__":
    command()
