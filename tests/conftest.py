"""Tiny real models, built on the fly."""

import os
import signal
import sys

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from torch import nn

from barrier_diffusers.evaluation.attacks import ATTACKS
from barrier_diffusers.evaluation.extractors import EXTRACTORS
from barrier_diffusers.evaluation.protocols import PROTOCOLS
from barrier_diffusers.models.architectures import ARCHITECTURES
from barrier_diffusers.objectives import OBJECTIVES

torch.set_num_threads(1)
REGISTRIES = (OBJECTIVES, ARCHITECTURES, ATTACKS, PROTOCOLS, EXTRACTORS)


def make_unet(**changes):
    """A UNet with the block layout of Stable Diffusion 1.x, 16 transformer blocks, few channels."""
    torch.manual_seed(0)
    settings = {
        "sample_size": 16,
        "block_out_channels": (8, 16, 16, 16),
        "layers_per_block": 2,
        "cross_attention_dim": 12,
        "attention_head_dim": 2,
        "norm_num_groups": 4,
        **changes,
    }
    return UNet2DConditionModel(**settings)


def make_small_unet(**changes):
    """Two levels, both with attention."""
    return make_unet(
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        sample_size=8,
        **changes,
    )


def make_class_unet(num_class_embeds=10):
    """An unconditional UNet with attention and class embedding, as DDPMs use."""
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=4,
        num_class_embeds=num_class_embeds,
    )


def unet_batches(num=3, size=4, side=8, width=12, seed=0):
    """(noisy, timesteps, condition) batches."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(size, 4, side, side, generator=generator),
            torch.randint(1000, (size,), generator=generator),
            torch.randn(size, 5, width, generator=generator),
        )
        for _ in range(num)
    ]


def run_unet(unet, batch):
    """forward_fn of a conditional UNet."""
    return unet(*batch).sample


class ConvNet(nn.Module):
    """Convolutions of every kind and a head: what a bare classifier looks like."""

    def __init__(self):
        super().__init__()
        self.plain = nn.Conv2d(3, 8, 3, padding=1)
        self.strided = nn.Conv2d(8, 8, 3, stride=2, padding=(1, 0), dilation=(1, 2), bias=False)
        self.grouped = nn.Conv2d(8, 8, 3, padding="same", dilation=2, groups=4)
        self.point = nn.Conv2d(8, 6, 1)
        self.norm = nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, 5)

    def forward(self, x):
        x = torch.relu(self.strided(torch.relu(self.plain(x))))
        x = self.norm(self.point(torch.relu(self.grouped(x))))
        return self.fc(x.mean((2, 3)))


def run_net(model, batch):
    """forward_fn of a classifier."""
    return model(batch)


def image_batches(num=3, size=4, seed=0):
    """Batches of (B, 3, 9, 9)."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, 3, 9, 9, generator=generator) for _ in range(num)]


@pytest.fixture(autouse=True)
def interruptible():
    """A background job's SIGINT is ignored, and a signal that a process ignores stays ignored in what is tested."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True)
def fresh_accelerator_state():
    """accelerate keeps the precision and the group of a test before for the whole process."""
    state = sys.modules.get("accelerate.state")  # importing it takes long, and few tests need it
    if state is not None:
        state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(autouse=True)
def own_registrations():
    """What a test registers leaves the registries with it."""
    before = [(registry, dict(registry)) for registry in REGISTRIES]
    yield
    for registry, items in before:
        registry.clear()
        registry.update(items)


@pytest.fixture
def own_workflows():
    """The kinds of workflows are afterwards as they were."""
    from barrier_diffusers.workflow.definitions import WORKFLOWS  # it imports much that few tests need

    before = dict(WORKFLOWS)
    yield
    WORKFLOWS.update(before)


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory):
    """Folder of a tiny random CLIP."""
    from small_clip import save_clip

    path = tmp_path_factory.mktemp("clip")
    save_clip(path)
    return path


@pytest.fixture
def unet():
    return make_small_unet()


@pytest.fixture
def class_unet():
    return make_class_unet()


@pytest.fixture
def net():
    torch.manual_seed(0)
    return ConvNet()
