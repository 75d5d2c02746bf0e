"""What is refused, and with which words: targets that are no maps, adapters that are no plain drift."""

import pytest
import torch
from peft import LoHaConfig, LoraConfig, get_peft_model
from torch import nn

from barrier_diffusers.protection.targets import input_geometry, linear_maps, resolve_targets

CROSS = ["attn2.to_q", "attn2.to_k", "attn2.to_v"]


def names(model, *targets):
    return [entry.name for entry in resolve_targets(model, targets)]


def lora(**options):
    return LoraConfig(**{"r": 3, "lora_alpha": 6, "target_modules": CROSS, "init_lora_weights": False} | options)


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("n2.to_q", ["no module ends with 'n2.to_q'"]),
        ("mid_block", ["'mid_block' is a container", "mid_block.attentions.0.proj_in"]),
        ("conv_norm_out", ["'conv_norm_out' is a GroupNorm", "Linear, Conv2d and Embedding"]),
    ],
)
def test_unusable_targets_are_explained(unet, target, words):
    with pytest.raises(ValueError) as caught:
        resolve_targets(unet, [*CROSS, target])
    assert all(word in str(caught.value) for word in words), caught.value


def test_a_container_named_like_a_part_of_its_path():
    inner = nn.ModuleDict({"mid": nn.ModuleDict({"fc": nn.Linear(2, 2)})})
    with pytest.raises(ValueError, match=r"name its layers, e.g. mid.fc$"):
        names(nn.ModuleDict({"mid_block": inner}), "mid")


def test_nearest_names_first_and_long_lists_cut(unet):
    with pytest.raises(ValueError) as caught:
        names(unet, "atn2.to_q")
    listed = str(caught.value).split(" has ")[1].split(", ")
    assert len(listed) == 13 and listed[0] == "attn2.to_q" and listed[-1] == "..."
    with pytest.raises(ValueError, match=r"has 0$"):
        names(nn.Sequential(nn.Linear(2, 2)), "fc")


def test_transposed_convolution_is_refused():
    with pytest.raises(ValueError, match="'0' is a ConvTranspose2d; only Linear, Conv2d and Embedding"):
        names(nn.Sequential(nn.ConvTranspose2d(2, 2, 3), nn.Linear(2, 2)), "0")


def test_float8_storage_is_refused():
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(ValueError, match="0 has a quantised weight"):
        names(model, "0")


def test_names_inside_a_peft_model_keep_a_model_of_their_own():
    model = nn.ModuleDict({"model": nn.ModuleDict({"fc": nn.Linear(4, 4), "fc2": nn.Linear(4, 4)})})
    wrapped = get_peft_model(model, lora(target_modules=["fc"]))
    assert names(wrapped, "fc", "fc2") == ["model.fc", "model.fc2"]
    assert [entry.has_adapter for entry in linear_maps(wrapped)] == [True, False]


def test_factors_are_the_delta_of_peft(unet, net):
    unet.add_adapter(lora())
    wrapped = get_peft_model(net, lora(target_modules=["plain"]))
    for entry in [*resolve_targets(unet, CROSS), *resolve_targets(wrapped, ["plain"])]:
        factors = entry.lora()
        delta = factors.scaling * factors.lora_B_OR @ factors.lora_A_RD
        torch.testing.assert_close(delta, entry.module.get_delta_weight("default").flatten(1))


def test_other_adapter_kinds_are_refused(unet):
    unet.add_adapter(LoHaConfig(r=2, target_modules=CROSS))
    with pytest.raises(ValueError, match="of the peft adapters only LoRA"):
        resolve_targets(unet, CROSS)[0].lora()


def test_several_active_adapters_and_merged_ones_are_refused(unet):
    unet.add_adapter(lora(), "one")
    unet.add_adapter(lora(), "two")
    entry = resolve_targets(unet, CROSS)[0]
    assert entry.lora().parameters[0] is entry.module.lora_A["two"].weight
    unet.set_adapter(["one", "two"])
    with pytest.raises(ValueError, match="2 active LoRA adapters"):
        entry.lora()
    unet.set_adapter("one")
    unet.fuse_lora()
    with pytest.raises(ValueError, match="merged"):
        entry.lora()


@pytest.mark.parametrize("options", [{"dilation": 2}, {"padding_mode": "circular"}], ids=str)
def test_lora_on_convolutions_that_peft_does_not_follow_is_refused(options):
    """peft gives lora_A neither dilation nor padding mode: s B A is not the drift of the layer's weight."""
    model = get_peft_model(nn.Sequential(nn.Conv2d(4, 4, 3, padding=2, **options)), lora(r=2, target_modules=["0"]))
    with pytest.raises(ValueError, match="dilation or a padding mode, which peft's LoRA drops"):
        resolve_targets(model, ["0"])[0].lora()


def test_geometry_tells_layers_apart_that_read_other_rows():
    one = input_geometry(nn.Conv2d(4, 6, 3, padding=1))
    assert one == input_geometry(nn.Conv2d(4, 2, 3, padding=1, bias=False))
    for options in ({"stride": 2}, {"padding": 0}, {"dilation": 2}, {"groups": 2}, {"padding_mode": "circular"}):
        assert one != input_geometry(nn.Conv2d(4, 6, 3, **({"padding": 1} | options)))
