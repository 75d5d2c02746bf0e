"""Which blocks a number or a dotted name chooses."""

import pytest
import torch
from conftest import make_unet
from peft import LoraConfig, get_peft_model
from pipelines import build

from barrier_diffusers import Barrier, BarrierConfig
from barrier_diffusers.protection.targets import is_inside, numbered_blocks, resolve_targets
from barrier_diffusers.utils.command_line import parse_config
from barrier_diffusers.workflow.settings import UnlearnConfig


def names(model, targets, blocks):
    return [entry.name for entry in resolve_targets(model, targets, blocks)]


def test_stable_diffusion_has_sixteen_blocks_numbered_as_they_run():
    unet = make_unet()
    numbered = numbered_blocks(unet)
    ran = []
    for name, module in unet.named_modules():
        if name in numbered:
            module.register_forward_pre_hook(lambda *_, name=name: ran.append(name))
    unet(torch.randn(1, 4, 16, 16), torch.tensor([1]), torch.randn(1, 5, 12))
    assert len(numbered) == 16 and ran == numbered
    assert numbered[6] == "mid_block.attentions.0.transformer_blocks.0"
    assert names(unet, ["attn2.to_k"], [4, "6"]) == [
        "down_blocks.2.attentions.0.transformer_blocks.0.attn2.to_k",
        "mid_block.attentions.0.transformer_blocks.0.attn2.to_k",
    ]


@pytest.mark.parametrize("name", ["sdxl", "sd3", "flux"])
def test_numbers_follow_the_forward_pass(name):
    pipeline = build(name)
    network = pipeline.unet if name == "sdxl" else pipeline.transformer
    numbered, ran = numbered_blocks(network), []
    for path, module in network.named_modules():
        if path in numbered:
            module.register_forward_pre_hook(lambda *_, path=path: ran.append(path))
    pipeline.set_progress_bar_config(disable=True)
    pipeline("a boot", height=32, width=32, num_inference_steps=1, output_type="latent")
    assert ran[: len(numbered)] == numbered
    if name == "flux":
        assert numbered[:4] == [*(f"transformer_blocks.{i}" for i in range(3)), "single_transformer_blocks.0"]


def test_whole_dotted_parts():
    transformer = build("flux").transformer
    double = ["transformer_blocks.1.attn.to_q"]
    assert names(transformer, ["attn.to_q"], ["transformer_blocks.1"]) == double == names(transformer, ["to_q"], [1])
    single = ["single_transformer_blocks.1.attn.to_q"]
    assert names(transformer, ["to_q"], ["single_transformer_blocks.1"]) == single == names(transformer, ["to_q"], [4])
    assert not is_inside("single_transformer_blocks.12.attn.to_q", "transformer_blocks.12")
    assert not is_inside("transformer_blocks.12.attn.to_q", "transformer_blocks.1")
    assert len(names(transformer, ["to_q"], ["transformer_blocks"])) == 3
    unet = make_unet()
    assert len(names(unet, ["attn2.to_q"], ["down_blocks.1", "mid_block"])) == 3


def test_feed_forward_and_output_maps():
    transformer = build("sd3").transformer
    targets = ["attn.to_out.0", "ff.net.0.proj", "ff.net.2"]
    assert names(transformer, targets, [1]) == [f"transformer_blocks.1.{target}" for target in targets]


def test_a_ddpm_counts_its_attentions(class_unet):
    numbered = numbered_blocks(class_unet)
    assert numbered[0].startswith("down_blocks.1") and numbered[1].startswith("mid_block")
    assert names(class_unet, ["to_q"], [1]) == [f"{numbered[1]}.to_q"]


def test_names_are_the_same_inside_a_peft_model(unet):
    wanted = names(unet, ["attn2.to_q"], [1])
    wrapped = get_peft_model(unet, LoraConfig(r=2, target_modules=["attn2.to_q"]))
    assert names(wrapped, ["attn2.to_q"], [1]) == wanted == names(wrapped, ["attn2.to_q"], ["mid_block"])


ERRORS = {
    "number": (["to_q"], [5], r"no block 5; the FluxTransformer2DModel has 0 = transformer_blocks.0, .*4 = single_"),
    "name": (["to_q"], ["down_blocks.1"], "no block 'down_blocks.1'"),
    "part of a name": (["to_q"], ["blocks.1"], "no block 'blocks.1'"),
    "negative": (["to_q"], [-1], "no block -1"),
    "no target inside": (["add_q_proj"], [4], "holds none of the targets add_q_proj; it has norm.linear, proj_mlp"),
    "one target nowhere": (["to_q", "add_q_proj"], [4], "target 'add_q_proj' lies in none of the blocks"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_list_what_there_is(name):
    targets, blocks, message = ERRORS[name]
    with pytest.raises(ValueError, match=message):
        resolve_targets(build("flux").transformer, targets, blocks)


def test_the_error_for_a_unet_lists_its_stages():
    with pytest.raises(ValueError, match=r"has 0 = down_blocks.0.*; and by name down_blocks.*mid_block"):
        resolve_targets(make_unet(), ["attn2.to_q"], [16])


def test_settings(tmp_path):
    (tmp_path / "data").mkdir()
    words = ["--pretrained_model_name_or_path", "x", "--output_dir", "y", "--concept", "z"]
    words += ["--train_data_dir", str(tmp_path / "data"), "--barrier.blocks"]
    assert parse_config(UnlearnConfig, [*words, "[4, 6, 8, 10]"]).barrier.blocks == [4, 6, 8, 10]
    assert (
        parse_config(UnlearnConfig, [*words, "['4', transformer_blocks.12]"]).barrier.blocks[1]
        == "transformer_blocks.12"
    )
    config = BarrierConfig(targets=["to_q"], blocks=[1, "mid_block"])
    config.save_pretrained(tmp_path)
    assert BarrierConfig.from_pretrained(tmp_path) == config
    for blocks in ([], "mid_block", [""]):
        with pytest.raises(ValueError, match="must be a non-empty list of numbers or module names"):
            BarrierConfig(blocks=blocks)
    with pytest.raises(ValueError, match="the config names no targets"):
        Barrier(make_unet(), BarrierConfig())
