"""The documentation's tables: `python -m benchmarks.tables`."""

from benchmarks.tables.classifier import classifier
from benchmarks.tables.ddpm import ddpm
from benchmarks.tables.robustness import robust_classes, robustness
from benchmarks.tables.stable_diffusion import attacks, classes, concepts, objectives, projection

TABLES = {  # name -> function that makes the table
    "classes": classes,
    "objectives": objectives,
    "projection": projection,
    "concepts": concepts,
    "attacks": attacks,
    "robustness": robustness,
    "robust_classes": robust_classes,
    "classifier": classifier,
    "ddpm": ddpm,
}
