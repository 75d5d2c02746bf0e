"""Folders as finished runs leave them, written by hand."""

import base64
import json

PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


def share(value, low, high, count=10):
    return {"value": value, "num_images": count, "interval_95": [low, high]}


def write_run(folder, concept="<b>sneaker</b>", **more):
    folder.mkdir()
    metrics = {
        "unlearning_accuracy": 90.0,
        "retain_accuracy_drop": 2.0,
        "details": {
            "unlearning_accuracy": share(90.0, 59.6, 98.2),
            "retain_accuracy_before": share(97.0, 90.0, 99.0),
            "retain_accuracy_after": share(95.0, 88.0, 98.0),
            "per_class_before": {concept: share(100.0, 72.2, 100.0), "bag": share(97.0, 90.0, 99.0)},
            "per_class_after": {concept: share(10.0, 1.8, 40.4), "bag": share(95.0, 88.0, 98.0)},
        },
        **more,
    }
    (folder / "metrics.json").write_text(json.dumps(metrics))
    (folder / "manifest.json").write_text(json.dumps({"settings": {"concept": concept, "seed": 7}}))
    (folder / "before_after.png").write_bytes(PNG)
    return folder


def relative(certified, largest):
    known = (
        {"coverage": 0.75, "coverage_interval_95": [0.19, 0.99], "tightness": certified / largest} if certified else {}
    )
    unknown = {"coverage": None, "coverage_interval_95": None, "tightness": None}
    counts = {"num_test": 4, "num_above": 1, "num_distinct": 7}
    return {"certified": certified, "largest_test": largest, **counts, **(known or unknown)}


def write_certificate(folder):
    entry = {"name": "attn2.to_k", "sound": 4.5, "largest_output_drift": 0.5, "sound_holds": False, "moment": 2.0}
    paper = {"quantile": 0.98, "confidence": 0.95, "maps": [{**entry, "relative": relative(0.25, 0.125)}]}
    paper |= {"network": relative(None, 0.0625), "every_map": None, "drift_norms": {"attn2.to_k": 0.03125}}
    paper["held_out"] = {"num_images": 9, "where": "split 'test' of <somewhere>"}
    paper["held_out"] |= {"calibration": {"num_images": 5}, "test": {"num_images": 4}}
    paper |= {"split": {"calibration": 0.6, "seed": 11}, "contradicted": ["attn2.to_k"]}
    (folder / "certificate.json").write_text(json.dumps(paper))
