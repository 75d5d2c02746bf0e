"""Every objective, with a mask and without, on full weights and an adapter: two processes (gloo, CPU) train what one
does on the same global batch. One pair of processes goes through all cases."""

import json
import os
import socket

import pytest
import torch
import torch.distributed as dist
from forks import in_ranks
from pipelines import build
from safetensors.torch import load_file, save_file
from short_runs import TINY

from barrier_diffusers.objectives import OBJECTIVES
from barrier_diffusers.utils.command_line import parse_config
from barrier_diffusers.workflow.settings import UnlearnConfig
from barrier_diffusers.workflow.unlearning import (
    encode_data,
    load_base,
    look_before,
    make_ready,
    open_unlearning,
    protect,
    train,
)

TRAINED = [name for name, objective in OBJECTIVES.items() if objective.loss is not None]
MASKS = {"no mask": {}, "mask": {"saliency_mask": 0.3}}
CASES = {f"{name}, {mask}": {"objective.name": name, **MASKS[mask]} for name in TRAINED for mask in MASKS}
CASES |= {f"{name}, adapter": {"objective.name": name, "rank": 2} for name in TRAINED}
CASES |= {"rl, adapter, mask": {"objective.name": "rl", "rank": 2, "saliency_mask": 0.3}}
SETTINGS = {**TINY, "num_generated_images": 8, "max_train_steps": 3, "learning_rate": 2e-4, "objective.alpha": 0.5}
SETTINGS |= {"barrier.lambda_interval": 10.0, "objective.num_inference_steps": 4}
ANCHORED = ("anchor", "named_anchor")


def settings_of(case):
    """All settings of a case; what its objective does not read is left out."""
    settings = {**SETTINGS, **CASES[case]}
    needs = OBJECTIVES[settings["objective.name"]].needs
    if not set(ANCHORED) & set(needs):
        del settings["objective.anchor"]
    if "samples_from_model" not in needs:
        del settings["objective.num_inference_steps"]
    return settings


def _train(rank, count, folder, port):
    torch.set_num_threads(1)
    if count > 1:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in place.items()}, MASTER_ADDR="127.0.0.1")
        os.environ["ACCELERATE_USE_CPU"] = "true"
    for case in CASES:
        output = folder / f"{count}" / case
        settings = settings_of(case)
        settings |= {"train_batch_size": 4 // count, "output_dir": output, "cache_dir": folder / f"{count}" / "cache"}
        words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
        config = parse_config(UnlearnConfig, [*words, "--pretrained_model_name_or_path", str(folder / "base")])
        run = open_unlearning(config)
        model = make_ready(run, load_base(config), [])
        data = encode_data(run, model)
        look_before(run, model, data)
        before = [parameter.detach().clone() for parameter in model.barrier.trainable_parameters()]
        results = train(run, model, data, protect(run, model, data))
        if rank == 0:
            moved = [now.detach() - old for now, old in zip(model.barrier.trainable_parameters(), before, strict=True)]
            save_file({str(index): value for index, value in enumerate(moved)}, output / "moved.safetensors")
            (output / "history.json").write_text(json.dumps(results["history"]))
        run.trainer.finish()
    if count > 1:
        assert run.accelerator.num_processes == count
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folder whose 1 and 2 have what one process and two have trained, by case."""
    folder = tmp_path_factory.mktemp("trained")
    build("sd").save_pretrained(folder / "base")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for count in (1, 2):
        in_ranks(_train, count, folder, port, count=count)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_what_one_does(case, trained):
    one, two = (json.loads((trained / f"{count}" / case / "history.json").read_text()) for count in (1, 2))
    assert len(one["objective"]) == 3 and max(one["protection"]) > 0 and max(one["retain"]) > 0
    for part, values in one.items():
        assert two[part] == pytest.approx(values, rel=1e-5, abs=1e-6), part
    ours, theirs = (load_file(trained / f"{count}" / case / "moved.safetensors") for count in (1, 2))
    assert max(value.abs().max() for value in ours.values()) > 2e-4
    for name, value in ours.items():
        torch.testing.assert_close(theirs[name], value, rtol=0, atol=1e-5)
        assert (theirs[name] - value).norm() <= 5e-3 * value.norm()
