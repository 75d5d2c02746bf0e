"""A training run of no size: a model, its optimizer, its checkpoints."""

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from short_runs import flags
from torch import nn

from barrier_diffusers.training.checkpoints import Checkpoints
from barrier_diffusers.training.trainer import History
from barrier_diffusers.utils.command_line import parse_config
from barrier_diffusers.workflow.settings import UnlearnConfig


class Small:
    """A model of 40 kB, its optimizer and its checkpoints."""

    def __init__(self, output, limit=None):
        AcceleratorState._reset_state(reset_partial_state=True)
        torch.manual_seed(0)
        self.accelerator = Accelerator(cpu=True)
        model = nn.Linear(100, 100)
        optimizer = torch.optim.AdamW(model.parameters())
        schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
        self.model, self.optimizer, _ = self.accelerator.prepare(model, optimizer, schedule)
        config = parse_config(UnlearnConfig, flags(output))
        self.history = History()
        self.checkpoints = Checkpoints(self.accelerator, output, config, limit)
        self.checkpoints.states["history"] = self.history

    def train(self, *steps):
        for step in steps:
            self.model(torch.randn(2, 100)).square().mean().backward()
            self.optimizer.step()
            self.history.append(objective=float(step))
            self.checkpoints.save(step, self.model.parameters(), None)
        return self
