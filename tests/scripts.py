"""The scripts, as modules, with their settings."""

import importlib

SETTINGS = {  # script -> its settings, or what reads them, where they are not called after it
    "unlearn_sd": "UnlearnConfig",
    "evaluate_sd": "EvaluateConfig",
    "generate_sd": "EvaluateConfig",
    "run_pipeline": "parse",
    "prepare_fashion_mnist": "PrepareConfig",
    "train_text_to_image": "TrainConfig",
    "train_classifier": "ClassifierConfig",
    "score_text_to_image": "ScoreConfig",
}


def the_script(name):
    """(main, settings) of a script: its name in train_scripts, or the dotted one of an extension's."""
    module = importlib.import_module(name)
    settings = SETTINGS.get(name) or f"{name.split('.')[-1].capitalize()}Config"
    return module.main, getattr(module, settings)
