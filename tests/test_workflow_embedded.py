"""The pipelines and the sweep of the embedded models, shortened: minutes, so `make test-slow` runs them."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import yaml
from short_runs import ROOT

from barrier_diffusers.workflow.workflow import check_metric, parse_workflow

pytestmark = pytest.mark.slow
SD = {
    "unlearn.max_train_steps": 3,
    "unlearn.checkpointing_steps": 1,
    "unlearn.report_to": "none",
    "unlearn.evaluation.images_per_label": 1,
    "unlearn.evaluation.sampling.num_inference_steps": 2,
    "evaluate.evaluation.images_per_label": 2,
    "evaluate.evaluation.sampling.num_inference_steps": 2,
    "evaluate.attacks": "[misspelled]",
}
SHORT = {
    "fashion_class": {**SD, "unlearn.max_retain_images": 64, "unlearn.barrier.reduced_dim": 4},
    "fashion_style": {**SD, "unlearn.max_retain_images": 64, "unlearn.objective.num_inference_steps": 2},
    "fashion_concept": {**SD, "unlearn.num_generated_images": 8, "unlearn.barrier.reduced_dim": 4},
    "fashion_classifier": {
        "retrain.max_train_steps": 3,
        "unlearn.max_train_steps": 3,
        "retrain.evaluation.num_mia_samples": 50,
        "unlearn.evaluation.num_mia_samples": 50,
        "evaluate.evaluation.num_mia_samples": 50,
    },
    "fashion_ddpm": {
        "unlearn.max_train_steps": 2,
        "unlearn.evaluation.images_per_label": 1,
        "unlearn.evaluation.sampling.num_inference_steps": 2,
        "generate.images_per_label": 1,
        "generate.sampling.num_inference_steps": 2,
        "evaluate.evaluation.images_per_label": 2,
        "evaluate.evaluation.sampling.num_inference_steps": 2,
    },
}
SHORT["fashion_classifier_random"] = SHORT["fashion_classifier"]
# what of a pipeline runs again for one changed setting of its evaluation
AGAIN = {"sd": {"evaluate.evaluation.sampling.seed": 5}, "classifier": {"evaluate.seed": 5}, "ddpm": {}}


def environment():
    return {**os.environ, "PYTHONPATH": str(ROOT), "TRANSFORMERS_VERBOSITY": "error"}


def run(name, output, **changes):
    settings = {"track.report_to": "none", "output_dir": output, **SHORT[name], **changes}
    words = [f"--{key}={value}" for key, value in settings.items()]
    command = [
        sys.executable,
        "train_scripts/run_pipeline.py",
        "--config",
        f"train_scripts/configs/pipeline_{name}.yaml",
    ]
    done = subprocess.run([*command, *words], cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    ran = [line.split(":")[0] for line in done.stdout.splitlines() if "done in" in line]
    return ran, json.loads((output / "results.json").read_text())


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", SHORT)
def test_a_pipeline_from_end_to_end(name, tmp_path):
    if "ddpm" in name and not (ROOT / "ddpm_ext/unlearn.py").is_file():
        pytest.skip("no DDPM scripts")
    content = yaml.safe_load((ROOT / f"train_scripts/configs/pipeline_{name}.yaml").read_text())
    stages = content.get("stages") or ["unlearn", "generate", "evaluate"]
    ran, results = run(name, tmp_path / "run")
    assert ran == stages and "score" in results
    workflow = parse_workflow(["--config", str(ROOT / f"train_scripts/configs/pipeline_{name}.yaml")], ROOT)
    for metric in results["metrics"]:
        check_metric(workflow, metric, "metric")
    again, same = run(name, tmp_path / "run")
    assert again == [] and same == results
    if changes := AGAIN[content["kind"]]:
        expected = [stage for stage in stages if stage in ("generate", "evaluate")]
        assert run(name, tmp_path / "run", **changes)[0] == expected


@pytest.mark.timeout(1200)
def test_four_trials_two_workers_one_killed(tmp_path):
    """The acceptance of the sweep: four results and plots, although a worker dies."""
    content = yaml.safe_load((ROOT / "train_scripts/sweeps/fashion_class.yaml").read_text())
    settings = {"track.report_to": "none", "unlearn.cache_dir": tmp_path / "cache", **SHORT["fashion_class"]}
    settings |= {"output_dir": tmp_path / "trials/{hash}", "evaluate.attacks": "[]"}
    fixed = content["command"][: content["command"].index("--output_dir")]
    content["command"] = [*fixed, *(f"--{key}={value}" for key, value in settings.items()), "${args}"]
    content["parameters"]["unlearn.learning_rate"] = {"values": [1.0e-3, 3.0e-3]}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(content))
    axes = "[evaluate.classes.unlearning_accuracy,evaluate.classes.retain_accuracy_drop]"
    options = {
        "sweep": tmp_path / "sweep.yaml",
        "output_dir": tmp_path / "sweep",
        "grace_seconds": 6,
        "trade_off": axes,
    }
    command = [sys.executable, "train_scripts/sweep.py", *(f"--{key}={value}" for key, value in options.items())]
    workers = [subprocess.Popen(command, cwd=ROOT, env=environment()) for _ in range(2)]
    while len(list((tmp_path / "trials").glob("*/logs/unlearn.log"))) < 2:
        time.sleep(0.5)
    time.sleep(8)
    workers[0].send_signal(signal.SIGKILL)
    assert workers[1].wait() == 0
    rows = (tmp_path / "sweep/results.csv").read_text().splitlines()[1:]
    assert len(rows) == 4 and all(",," not in row.split("/")[0][:-2] for row in rows)
    assert len(list((tmp_path / "trials").glob("*/results.json"))) == 4
    assert (tmp_path / "sweep/trade_off.png").stat().st_size > 5_000


PLAIN = {"unlearn.mixed_precision": "no", "unlearn.report_to": "none", "unlearn.barrier.reduced_dim": 4}
SD_SWEEP = {
    **PLAIN,
    "unlearn.pretrained_model_name_or_path": "assets/fashion_sd",
    "unlearn.concept": "sneaker",
    "unlearn.resolution": 32,
    "unlearn.train_batch_size": 2,
    "unlearn.max_train_steps": 2,
    "unlearn.evaluation.images_per_label": 1,
    "unlearn.evaluation.sampling.num_inference_steps": 2,
}
CLASSIFIER_SWEEP = {
    **PLAIN,
    "unlearn.pretrained_model_name_or_path": "assets/fashion_resnet",
    "unlearn.train_data_dir": "assets/fashion_mnist",
    "unlearn.image_column": "image",
    "unlearn.max_train_steps": 2,
    "unlearn.evaluation.num_mia_samples": 50,
}
STAND_INS = {  # sweep of the paper's code -> the embedded model and data in place of the real ones
    "cifar10_classifier": {**CLASSIFIER_SWEEP, "unlearn.forget_class": "sneaker"},
    "cifar10_classifier_random": CLASSIFIER_SWEEP,
    "cifar10_ddpm": {
        **PLAIN,
        "unlearn.pretrained_model_name_or_path": "assets/fashion_ddpm",
        "unlearn.data.dataset_name": "null",
        "unlearn.data.train_data_dir": "assets/fashion_mnist",
        "unlearn.data.image_column": "image",
        "unlearn.concept": "sneaker",
        "unlearn.train_batch_size": 2,
        "unlearn.max_forget_images": 8,
        "unlearn.max_retain_images": 8,
        "unlearn.evaluation.judge": "null",
        "unlearn.evaluation.images_per_label": 1,
        "unlearn.evaluation.sampling.num_inference_steps": 2,
    },
    "sd_class": {
        **SD_SWEEP,
        "unlearn.train_data_dir": "assets/fashion_images",
        "unlearn.objective.anchor": "boot",
        "unlearn.max_forget_images": 8,
        "unlearn.max_retain_images": 8,
    },
    "sd_nudity": {
        **SD_SWEEP,
        "unlearn.forget_prompts": "[a photo of a red sneaker]",
        "unlearn.retain_prompts": "[a photo of a red boot]",
        "unlearn.objective.anchor_prompt": "a photo of a red boot",
        "unlearn.num_generated_images": 4,
        "unlearn.generation.num_inference_steps": 2,
    },
}


@pytest.mark.parametrize("name", STAND_INS)
def test_a_trial_of_each_of_the_papers_sweeps(name, tmp_path):
    """The first value of every parameter, two steps, on an embedded model: the stage that the sweep varies."""
    content = yaml.safe_load((ROOT / f"train_scripts/sweeps/{name}.yaml").read_text())
    first = {
        key: options.get("value", options.get("values", [None])[0]) for key, options in content["parameters"].items()
    }
    if "unlearn.max_train_steps" in first:
        first["unlearn.max_train_steps"] = 2
    content["parameters"] = {key: {"value": value} for key, value in first.items()}
    content["metric"]["name"] = "unlearn.num_steps"
    settings = {**STAND_INS[name], "stages": "[unlearn]", "output_dir": tmp_path / "trials/{hash}"}
    fixed = content["command"][: content["command"].index("--output_dir")]
    content["command"] = [*fixed, *(f"--{key}={value}" for key, value in settings.items()), "${args}"]
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(content))
    command = [
        sys.executable,
        "train_scripts/sweep.py",
        f"--sweep={tmp_path}/sweep.yaml",
        f"--output_dir={tmp_path}/out",
    ]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    logs = "".join(path.read_text()[-2000:] for path in (tmp_path / "trials").glob("*/logs/*.log"))
    assert done.returncode == 0, done.stdout + done.stderr + logs
    (manifest,) = (tmp_path / "trials").glob("*/unlearn/manifest.json")
    ran = json.loads(manifest.read_text())["settings"]
    for key, value in first.items():
        section = ran
        for part in key.split(".")[1:]:
            section = section[part]
        assert section == value, key
    assert "trial 0: unlearn.num_steps 2" in done.stdout
