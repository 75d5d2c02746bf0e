"""The protection loss of maps made of given weights, through the very code that trains."""

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from barrier_diffusers.protection.stacks import StackedLoss
from barrier_diffusers.protection.targets import resolve_targets


def linear_layers(weights, biases):
    """A model with one Linear per weight (O, D); its layers are called 0, 1, ..."""
    layers = []
    for weight, bias in zip(weights, biases, strict=True):
        layer = nn.Linear(weight.shape[1], len(weight), bias=bias is not None, dtype=weight.dtype)
        layer.weight.data = weight.detach().clone()
        if bias is not None:
            layer.bias.data = bias.detach().clone()
        layers.append(layer)
    return nn.ModuleList(layers)


def stacked_loss(model, config, regions, adapter=False):
    """The loss of all Linear layers; `regions` is one region that all of them read, or one for each."""
    maps = resolve_targets(model, ["Linear"])
    pairs = [([one], region) for one, region in zip(maps, regions, strict=True)] if isinstance(regions, list) else None
    return StackedLoss(pairs or [(maps, regions)], config, adapter)


def full_loss(config, regions, weights, origins=None, biases=None, bias_origins=None):
    """(loss, parameters) of maps that train their weights; without origins these are 0."""
    biases = biases or [None] * len(weights)
    origins = origins or [torch.zeros_like(weight) for weight in weights]
    bias_origins = bias_origins or [None if bias is None else torch.zeros_like(bias) for bias in biases]
    model = linear_layers(weights, biases)
    loss = stacked_loss(model, config, regions)
    snapshots = {str(i): pair for i, pair in enumerate(zip(origins, bias_origins, strict=True))}
    return loss.of_weights(snapshots), list(model.parameters())


def lora_layers(factors, scaling):
    """A model whose Linear layers carry adapters with the factors (A, B) of each."""
    model = linear_layers([up @ down for down, up in factors], [None] * len(factors))
    rank = len(factors[0][0])
    names = [str(i) for i in range(len(factors))]
    ranks = {name: len(down) for name, (down, _) in zip(names, factors, strict=True)}
    alphas = {name: scaling * ranks[name] for name in names}
    options = {"r": rank, "target_modules": names, "rank_pattern": ranks, "alpha_pattern": alphas}
    inject_adapter_in_model(LoraConfig(lora_alpha=scaling * rank, **options), model)
    for layer, (down, up) in zip(model, factors, strict=True):
        layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data = down.clone(), up.clone()
    return model


def lora_loss(config, regions, factors, scaling):
    """(loss, [A, B] of each map) of maps whose adapters train."""
    model = lora_layers(factors, scaling)
    loss = stacked_loss(model, config, regions, adapter=True).of_adapters()
    return loss, [[layer.lora_A["default"].weight, layer.lora_B["default"].weight] for layer in model]
