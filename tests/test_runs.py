"""How runs start: the schedule of the learning rate, for one process and for several."""

from types import SimpleNamespace

import pytest
import torch

from barrier_diffusers.training.trainer import schedule_of


def rates(name, warmup, num_steps, num_processes):
    """The learning rate of every step of a run, which calls a prepared schedule once for each process."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    config = SimpleNamespace(lr_scheduler=name, lr_warmup_steps=warmup)
    schedule, found = schedule_of(config, optimizer, num_steps, num_processes), []
    for _ in range(num_steps):
        found.append(optimizer.param_groups[0]["lr"])
        for _ in range(num_processes):
            optimizer.step()
            schedule.step()
    return found


@pytest.mark.parametrize("processes", [1, 3])
@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("constant_with_warmup", [0.0, 0.5, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.0, 0.5, 1.0, 0.75, 0.5, 0.25]),
        ("cosine", [0.0, 0.5, 1.0, 0.853553, 0.5, 0.146447]),
    ],
)
def test_schedules(name, wanted, processes):
    assert rates(name, 2, 6, processes) == pytest.approx(wanted, abs=1e-6)


def test_an_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match="zigzag"):
        rates("zigzag", 0, 1, 1)
