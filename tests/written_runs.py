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
