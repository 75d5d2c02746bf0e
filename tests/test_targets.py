"""Which maps are found, and the rows a convolution multiplies."""

import pytest
import torch
from conftest import make_unet
from oracle import conv_rows
from peft import LoraConfig, get_peft_model
from torch import nn

from barrier_diffusers.protection.targets import linear_maps, patches, resolve_targets


def names(model, *targets):
    return [entry.name for entry in resolve_targets(model, targets)]


def test_stable_diffusion_layout_has_96_qkv_maps():
    unet = make_unet()
    assert len(names(unet, "to_q", "to_k", "to_v")) == 96
    found = names(unet, "attn2.to_q", "attn2.to_k", "attn2.to_v")
    assert len(found) == 48 and all(".attn2." in name for name in found)
    assert found == [name for name, _ in unet.named_modules() if name in set(found)]  # module order


def test_whole_dotted_suffixes_match_and_substrings_do_not():
    model = nn.ModuleDict(
        {"fc": nn.Linear(2, 2), "fc2": nn.Linear(2, 2), "head": nn.ModuleDict({"fc": nn.Linear(2, 2)})}
    )
    assert names(model, "fc") == ["fc", "head.fc"]
    assert names(model, "head.fc") == ["head.fc"]
    deep = nn.ModuleDict(
        {"single_blocks": nn.ModuleList([nn.Linear(2, 2)]), "blocks": nn.ModuleList([nn.Linear(2, 2)])}
    )
    assert names(deep, "blocks.0") == ["blocks.0"]


def test_types(net):
    assert names(net, "Linear") == ["fc"]
    assert names(net, "Conv2d1x1") == ["point"]
    assert names(net, "Conv2d") == ["plain", "strided", "grouped", "point"]


def test_to_out_0_is_a_map_and_to_out_a_container(unet):
    assert all(name.endswith("attn2.to_out.0") for name in names(unet, "attn2.to_out.0"))
    with pytest.raises(ValueError, match=r"'attn2.to_out' is a container.*attn2.to_out.0"):
        names(unet, "attn2.to_out")


def test_no_such_target_names_what_there_is(unet):
    message = r"no module ends with 'attn3.to_q'; the UNet2DConditionModel has attn[12].to_q, attn[12].to_q"
    with pytest.raises(ValueError, match=message):
        names(unet, "attn3.to_q")


def test_fused_projections_are_refused(unet):
    unet.fuse_qkv_projections()
    with pytest.raises(ValueError, match="never runs because the attention's projections are fused"):
        names(unet, "attn2.to_q", "attn2.to_k", "attn2.to_v")
    unet.unfuse_qkv_projections()
    assert names(unet, "attn2.to_q")


def test_tied_and_quantised_weights_are_refused():
    tied = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    tied["b"].weight = tied["a"].weight
    with pytest.raises(ValueError, match="b and a share one weight"):
        names(tied, "a", "b")
    quantised = nn.ModuleDict({"a": nn.Linear(2, 2)})
    quantised["a"].weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="a has a quantised weight"):
        names(quantised, "a")


def test_adapter_layers_keep_the_maps_name(unet):
    before = names(unet, "attn2.to_q")
    entries = resolve_targets(unet, ["attn2.to_q"])
    unet.add_adapter(LoraConfig(r=2, lora_alpha=6, target_modules=["attn2.to_q"]))
    assert names(unet, "attn2.to_q") == before
    assert not [entry.name for entry in linear_maps(unet) if "lora" in entry.name or "base_layer" in entry.name]
    factors = entries[0].lora()  # an entry resolved earlier sees the adapter
    assert entries[0].has_adapter and factors.scaling == 3.0 and factors.lora_A_RD.shape[0] == 2


def test_peft_model_names_have_no_wrapper_prefix(net):
    wrapped = get_peft_model(net, LoraConfig(r=2, target_modules=["fc", "plain"]))
    assert names(wrapped, "fc", "plain") == ["plain", "fc"]
    entry = resolve_targets(wrapped, ["plain"])[0]
    assert entry.lora().lora_A_RD.shape == (2, entry.num_features)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_dora": True}, "LoRA variant"),
        ({"lora_bias": True}, "LoRA variant"),
    ],
)
def test_other_lora_kinds_are_refused(net, config, message):
    wrapped = get_peft_model(net, LoraConfig(r=2, target_modules=["fc"], **config))
    with pytest.raises(ValueError, match=message):
        resolve_targets(wrapped, ["fc"])[0].lora()


def test_lora_on_a_grouped_convolution_is_refused(net):
    wrapped = get_peft_model(net, LoraConfig(r=4, target_modules=["grouped"]))
    with pytest.raises(ValueError, match="grouped is a grouped convolution"):
        resolve_targets(wrapped, ["grouped"])[0].lora()


CONVOLUTIONS = [
    {"kernel_size": 3},
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": (3, 2), "padding": (2, 1), "stride": (2, 1)},
    {"kernel_size": 3, "stride": 2, "dilation": 2, "padding": 2},
    {"kernel_size": 3, "padding": "same", "dilation": (2, 1)},
    {"kernel_size": 2, "padding": "same"},
    {"kernel_size": 3, "groups": 2, "padding": 1},
    {"kernel_size": 3, "groups": 4, "stride": 2},
    {"kernel_size": 1},
]


@pytest.mark.parametrize("settings", CONVOLUTIONS, ids=str)
def test_patches_equal_the_oracle_and_reproduce_the_convolution(settings):
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 8, bias=False, **settings).double()
    x = torch.randn(2, 4, 9, 8, dtype=torch.float64)
    rows = patches(x, conv)
    torch.testing.assert_close(rows.flatten(0, 1), conv_rows(x, conv))
    assert_reproduces(rows, x, conv)


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_other_padding_modes(mode):
    conv = nn.Conv2d(4, 8, 3, padding=1, padding_mode=mode, bias=False).double()
    x = torch.randn(2, 4, 6, 7, dtype=torch.float64)
    assert_reproduces(patches(x, conv), x, conv)


def assert_reproduces(rows, x, conv):
    """W @ rows is what the layer computes, group by group."""
    expected = conv(x)
    batch, channels, height, width = expected.shape
    groups = conv.groups
    weight = conv.weight.flatten(1).view(groups, channels // groups, -1)
    grouped = rows.view(batch, height * width, groups, -1)
    got = torch.einsum("blgd,god->bgol", grouped, weight).reshape(batch, channels, height, width)
    torch.testing.assert_close(got, expected)
