"""Training with weights that torch's `fully_shard` shares out over two processes (gloo, CPU), and in one process."""

import copy
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing
from conftest import ConvNet, image_batches, make_class_unet, make_small_unet, run_net, run_unet, unet_batches
from diffusers.models.attention import BasicTransformerBlock
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel

from barrier_diffusers.protection.barrier import Barrier
from barrier_diffusers.protection.config import BarrierConfig
from barrier_diffusers.protection.sharding import whole

STEPS, SAVED_AT = 5, 3
WHOLE = StateDictOptions(full_state_dict=True)


class Narrow(nn.Module):
    """Fewer outputs than processes in its last map: one of them holds none of its rows."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 5), nn.Linear(5, 1)

    def forward(self, x):
        return self.last(torch.tanh(self.first(x)))


def class_unet():
    return make_class_unet(num_class_embeds=7)


def run_class_unet(model, batch):
    return model(batch[0], batch[1], class_labels=batch[2]).sample


def class_batches():
    made = torch.Generator().manual_seed(0)
    return [
        (torch.randn(4, 3, 8, 8, generator=made), torch.randint(1000, (4,), generator=made), torch.tensor(labels))
        for labels in (
            [0, 0, 1, 1],
            [0, 2, 1, 3],
            [0, 2, 4, 5],
        )  # unequal numbers: equal ones have no leading direction
    ]


def lora_unet():
    unet = make_small_unet()
    torch.manual_seed(1)
    targets = ["attn2.to_q", "attn2.to_k", "attn2.to_v"]
    inject_adapter_in_model(LoraConfig(r=3, lora_alpha=6, target_modules=targets), unet)
    return unet


QKV = ["attn2.to_q", "attn2.to_k", "attn2.to_v"]
CASES = {  # model, forward function, batches, config
    "full weights": (make_small_unet, run_unet, unet_batches, {"targets": QKV}),
    "LoRA": (lora_unet, run_unet, unet_batches, {"targets": QKV}),
    "LoRA, projection": (
        lora_unet,
        run_unet,
        unet_batches,
        {"targets": QKV, "constraint": "both", "projection_energy": 0.6},
    ),
    "convolutions and biases": (
        ConvNet,
        run_net,
        image_batches,
        {"targets": ["Conv2d", "fc"], "include_bias_drift": True, "region": "slabs"},
    ),
    "a table, projection": (
        class_unet,
        run_class_unet,
        class_batches,
        {"targets": ["to_q", "class_embedding"], "constraint": "both", "projection_energy": 0.6},
    ),
    "a process without rows": (
        Narrow,
        run_net,
        lambda: [torch.randn(8, 6, generator=torch.Generator().manual_seed(i)) for i in range(3)],
        {"targets": ["Linear"]},
    ),
}
RUNS = [*((name, False) for name in CASES), ("full weights", True), ("LoRA", True)]  # whether it is set up sharded


def part_of(batch, rank, size):
    """A process's samples of a batch."""
    if isinstance(batch, tuple):
        return tuple(part_of(one, rank, size) for one in batch)
    return batch.chunk(size)[rank]


def shard(model):
    """As users do: blocks first, the model last, which keeps whole what is left over until its backward pass."""
    for module in model.modules():
        if type(module).__name__ == "BasicTransformerBlock" or isinstance(module, nn.Conv2d):
            fully_shard(module)
    return fully_shard(model)


def state_of(model):
    """Name -> the whole of each parameter."""
    return {name: whole(value) for name, value in model.named_parameters()}


def train(name, folder, rank=0, size=1, sharded_first=False):
    """What a case gives: losses, a gradient of the protection, weights after five steps, norms and a certificate."""
    make, forward, batches, options = CASES[name]
    torch.manual_seed(0)
    model = make().eval()  # without statistics of a batch, which is smaller in two processes
    batches = [part_of(batch, rank, size) for batch in batches()]
    config = BarrierConfig(reduced_dim=3, lambda_interval=0.5, **options)
    barrier = Barrier(model, config)
    if size > 1 and sharded_first:
        shard(model)
    barrier.setup_protection(batches, forward, retain_loader=batches if config.needs_retain_data else None)
    if size > 1 and not sharded_first:
        shard(model)
    found = {"losses": [], "resumed": []}

    def optimizer_of(barrier):
        return torch.optim.AdamW(
            barrier.trainable_parameters(), lr=0.01, eps=1e-4, weight_decay=0.0
        )  # without steps on rounding

    def step(index, barrier, optimizer):
        model = barrier.model
        optimizer.zero_grad()
        objective = forward(model, batches[index % len(batches)]).square().mean()
        protection = barrier.compute_protection_loss()  # between the passes, as in training
        (objective + protection).backward()
        optimizer.step()
        barrier.project()
        return protection.item()

    optimizer = optimizer_of(barrier)
    for index in range(STEPS):
        found["losses"].append(step(index, barrier, optimizer))
        if index + 1 == SAVED_AT:
            barrier.save_pretrained(folder)
            saved = (
                get_model_state_dict(model, options=WHOLE),
                get_optimizer_state_dict(model, optimizer, options=WHOLE),
            )
            saved = copy.deepcopy(saved)  # as on a disk: numbers of steps are no copies
    optimizer.zero_grad()
    barrier.compute_protection_loss().backward()
    found["gradient"] = [whole(one.grad) for one in barrier.trainable_parameters()]
    found["weights"] = state_of(model)
    found["norms"] = barrier.drift_norms()
    certificate = barrier.certify(CASES[name][2](), forward, quantile=0.5, confidence=0.5)
    found["bounds"] = {one.name: (one.sound, one.moment) for one in certificate.maps}
    found["holds"] = certificate.holds
    if size > 1:
        dist.barrier()
    # a fresh process would do this
    torch.manual_seed(0)
    again = make().eval()
    resumed = Barrier.from_pretrained(folder, again)
    if size > 1:
        shard(again)
    optimizer = optimizer_of(resumed)
    set_model_state_dict(again, saved[0], options=WHOLE)
    set_optimizer_state_dict(again, optimizer, saved[1], options=WHOLE)
    for index in range(SAVED_AT, STEPS):
        found["resumed"].append(step(index, resumed, optimizer))
    found["resumed weights"] = state_of(again)
    barrier.remove()
    found["frozen"] = [name for name, value in model.named_parameters() if not value.requires_grad]
    return found


INSIDE = [  # with the loss inside the forward pass; whether blocks are checkpointed
    ("full weights", "FSDP 1", True),
    ("LoRA", "FSDP 1", False),
    ("convolutions and biases", "FSDP 1", False),
    ("full weights", "DDP", True),
    ("LoRA", "DDP", False),
]


def wrapped(model, kind):
    """The model under an engine; those that make a block's weights whole only while it runs are FSDP's."""
    if kind == "DDP":
        return DistributedDataParallel(model)
    policy = ModuleWrapPolicy({BasicTransformerBlock})
    return FullyShardedDataParallel(
        model, auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device("cpu")
    )


def train_inside(name, kind=None, checkpointing=False, rank=0, size=1):
    """Losses and weights after five steps; without an engine, with the loss outside."""
    make, forward, batches, options = CASES[name]
    torch.manual_seed(0)
    model = make().eval()
    config = BarrierConfig(reduced_dim=3, lambda_interval=0.5, loss_inside=kind is not None, **options)
    barrier = Barrier(model, config)
    barrier.setup_protection([part_of(batch, rank, size) for batch in batches()], forward)
    if checkpointing:
        model.enable_gradient_checkpointing()
        model.train()
    optimizer = torch.optim.AdamW(barrier.trainable_parameters(), lr=0.01, eps=1e-4, weight_decay=0.0)
    engine = wrapped(model, kind) if kind else model
    found = {"losses": []}
    for index in range(STEPS):
        optimizer.zero_grad()
        batch = part_of(batches()[index % 3], rank, size)
        objective = forward(engine, batch).square().mean()
        protection = barrier.compute_protection_loss()
        (objective + protection).backward()
        optimizer.step()
        found["losses"].append(protection.item())
    if kind == "FSDP 1":
        try:
            barrier.compute_protection_loss()
        except RuntimeError as error:
            found["without a forward pass"] = str(error)
        with FullyShardedDataParallel.summon_full_params(engine, writeback=False):
            values = {name: value.detach().clone() for name, value in engine.named_parameters()}
        found["weights"] = {name.replace("_fsdp_wrapped_module.", ""): value for name, value in values.items()}
    else:
        found["weights"] = state_of(model)
    return found


def worker(rank, size, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=size)
    for name, sharded_first in RUNS:
        found = train(name, Path(folder) / f"{name} {sharded_first}", rank, size, sharded_first)
        torch.save(found, Path(folder) / f"{name} {sharded_first} {rank}.pt")
    for name, kind, checkpointing in INSIDE:
        found = train_inside(name, kind, checkpointing, rank, size)
        torch.save(found, Path(folder) / f"{name} {kind} {rank}.pt")
    dist.destroy_process_group()


def in_two_processes(folder):
    torch.multiprocessing.spawn(worker, (2, str(folder)), nprocs=2)


if __name__ == "__main__":
    in_two_processes(tempfile.mkdtemp())
