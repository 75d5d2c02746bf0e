"""Protection loss, forward and backward, against the baseline: full weights and LoRA, in one process.

    python benchmarks/loss.py --targets all --json FILE

The loss needs no pass through the UNet: the attentions alone are built, with their real shapes and random weights, and
each gets random inputs of full rank. The text embeddings that all cross-attentions read are those of `num_prompts`
prompts: one, as in class-wise forgetting, or many.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from cases import backward_of
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from measure import BenchmarkConfig, count_operators, interleaved, report
from models import NUM_TOKENS, TARGETS, add_lora, reduced_dim_of, settings_of
from naive import NaiveBarrier, fit, record
from torch import nn

from barrier_diffusers import Barrier, BarrierConfig
from barrier_diffusers.protection.region import ForgetRegion
from barrier_diffusers.protection.storage import BarrierState
from barrier_diffusers.utils.command_line import run_script

LARGEST_DIFFERENCE = 1e-3  # relative, between the two implementations' losses: float32 sums and streamed percentiles


@dataclass(kw_only=True)
class LossConfig(BenchmarkConfig):
    """Settings of the benchmark."""

    targets: Literal["all", "attn2"] = "all"
    num_prompts: int = 1  # whose embeddings the cross-attentions read
    ranks: list[int] | None = None  # of the LoRA adapters; None: 4, 16 and 64
    drift: float = 1e-3  # relative size of the drift from the snapshot


def attentions_of(name: str, device: torch.device) -> tuple[UNet2DConditionModel, dict[str, Attention]]:
    """The UNet with memory for its attentions alone, and these by name."""
    torch.manual_seed(0)
    with torch.device("meta"):
        unet = UNet2DConditionModel(**settings_of(name)).eval()
    found = {path: module for path, module in unet.named_modules() if isinstance(module, Attention)}
    for module in found.values():
        module.to_empty(device=device)
        for layer in module.modules():
            if isinstance(layer, nn.Linear):
                layer.reset_parameters()
    return unet, found


def make_inputs(attentions: dict[str, Attention], name: str, num_prompts: int, device: torch.device) -> dict[str, Any]:
    """The tensors that reach the attentions: one for each, with more rows than features, and the text for all."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        scale = torch.linspace(0.2, 2, shape[-1])
        return (torch.randn(*shape, generator=generator) * scale).to(device)

    inputs: dict[str, Any] = {}
    for path, module in attentions.items():
        features = module.to_q.in_features
        inputs[path] = draw(-(-int(1.2 * features) // 256), 256, features)
    return {"hidden": inputs, "text": draw(num_prompts, NUM_TOKENS, settings_of(name)["cross_attention_dim"])}


def run_attentions(attentions: dict[str, Attention]) -> Callable[[nn.Module, Any], None]:
    """forward_fn that runs every attention on its own input."""

    def run(model: nn.Module, inputs: dict[str, Any]) -> None:
        for path, module in attentions.items():
            hidden = inputs["hidden"][path]
            text = None
            if path.endswith("attn2"):  # the same tensor for all, as in the UNet; each attention sees all of it
                text, hidden = inputs["text"], hidden.flatten(0, 1)[None].expand(len(inputs["text"]), -1, -1)
                hidden = hidden if len(text) == 1 else hidden[:, : -(-hidden.shape[1] // len(text))]
            module(hidden, encoder_hidden_states=text)

    return run


@torch.no_grad()
def disturb(barrier: Barrier, size: float) -> None:
    """Move what trains by `size` of its own norm, or a LoRA adapter away from zero."""
    torch.manual_seed(1)
    for parameter in barrier.trainable_parameters():
        norm = parameter.norm() if parameter.any() else parameter.new_tensor(float(parameter.numel()) ** 0.5)
        noise = torch.randn_like(parameter)
        parameter.add_(noise, alpha=(size * norm / noise.norm()).item())


def main(config: LossConfig) -> None:
    """Build -> fit both -> for full weights and every rank: check that they agree, then time."""
    device = config.start()
    targets = TARGETS[config.targets]
    unet, attentions = attentions_of(config.model, device)
    inputs = make_inputs(attentions, config.model, config.num_prompts, device)
    forward_fn = run_attentions(attentions)
    options = BarrierConfig(targets=targets, reduced_dim=reduced_dim_of(config.model))
    rows: list[dict[str, Any]] = []
    facts: dict[str, Any] = {}
    naive_statistics = None
    fitted: list[tuple[list[str], ForgetRegion]] = []
    for rank in (0, *([4, 16, 64] if config.ranks is None else config.ranks)):
        if rank:
            add_lora(unet, [f"{path}.{target.split('.')[1]}" for path in attentions for target in targets
                            if path.endswith(target.split(".")[0])], rank)  # fmt: skip
        barrier = Barrier(unet, options)
        if not fitted:
            barrier.setup_protection([inputs], forward_fn)
            fitted = [([linear_map.name for linear_map in group.maps], group.region) for group in barrier.groups]
        else:  # the regions do not depend on what trains
            by_name = {linear_map.name: linear_map for linear_map in barrier.maps}
            regions = [([by_name[name] for name in names], region) for names, region in fitted]
            barrier._install(BarrierState("adapter", regions))
        names = [linear_map.name for linear_map in barrier.maps]
        naive = NaiveBarrier(unet, names, options.lambda_interval, options.reduced_dim)
        if naive_statistics is None:
            leaders = {id(region): name for name, region in barrier.regions.items()}
            raw = record(unet, leaders.values(), [inputs], forward_fn)
            shared = {name: fit(raw.pop(name), options.reduced_dim) for name in leaders.values()}
            copies = {name: shared[leaders[id(region)]] for name, region in barrier.regions.items()}
            naive_statistics = {
                name: type(known)(**{key: value.clone() for key, value in vars(known).items()})
                for name, known in copies.items()
            }
        naive.install(naive_statistics)
        disturb(barrier, config.drift)
        cases = {
            "barrier": backward_of(barrier.compute_protection_loss, barrier),
            "baseline": backward_of(naive.loss, barrier),
        }
        values = {name: run() for name, run in cases.items()}
        difference = abs(values["barrier"] / values["baseline"] - 1)
        if not difference < LARGEST_DIFFERENCE:
            raise ValueError(f"the implementations differ by {difference:.2g}: {values}")
        operators = {name: count_operators(run) for name, run in cases.items()}
        seconds = interleaved(cases, config.repeats, device)
        rows.append(
            {
                "trained": f"LoRA rank {rank}" if rank else "full weights",
                "maps": len(names),
                "distinct inputs": len(barrier.groups),
                "barrier (ms)": 1000 * seconds["barrier"],
                "baseline (ms)": 1000 * seconds["baseline"],
                "ratio": seconds["barrier"] / seconds["baseline"],
                "operators": operators["barrier"],
                "baseline's operators": operators["baseline"],
                "difference of the losses": difference,
            }
        )
        facts["region_bytes"] = sum(group.region.num_bytes for group in barrier.groups)
        barrier.remove()
        if rank:
            unet.unload_lora()
    facts["regions (MB)"] = facts["region_bytes"] / 1e6
    title = f"{config.model}, targets {config.targets}, {config.num_prompts} prompts"
    report(config, {title: rows, "memory": [{"regions in float32 (MB)": facts.pop("regions (MB)")}]}, **facts)


if __name__ == "__main__":
    run_script(main, LossConfig)
