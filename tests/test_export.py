"""Files for other programs: a checkpoint in the layout of its first release, an adapter in kohya's names.

diffusers converts from these layouts but not to them: that it recognises a file and reads every weight back to where
it was says that the names are right.
"""

import json
import sys

import numpy as np
import pipelines
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import infer_diffusers_model_type
from export import ExportConfig, main
from forgotten_images import forgotten
from safetensors.torch import load_file
from short_runs import BASE, ROOT, flags, run_tiny
from tiny_encoders import clip
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from barrier_diffusers.evaluation.attacks import ATTACKS
from barrier_diffusers.evaluation.attacks.inversion import InversionConfig
from barrier_diffusers.models.architectures import components, get_architecture
from barrier_diffusers.models.exporting import export_attackers, export_kohya, export_single_file
from barrier_diffusers.models.generation import generate
from barrier_diffusers.models.loading import add_adapter, load_pipeline
from barrier_diffusers.models.publishing import save_adapter
from barrier_diffusers.protection.config import BarrierConfig
from barrier_diffusers.utils.command_line import parse_config, run_script
from barrier_diffusers.workflow.settings import UnlearnConfig


@pytest.fixture(autouse=True)
def in_repository(monkeypatch):
    monkeypatch.chdir(ROOT)
    AcceleratorState._reset_state(reset_partial_state=True)


def released_unet(width, **changes):
    """The levels, layers and blocks of the real UNets, few channels."""
    settings = {"block_out_channels": (8, 16, 32, 32), "layers_per_block": 2, "attention_head_dim": 2}
    torch.manual_seed(0)
    return UNet2DConditionModel(cross_attention_dim=width, norm_num_groups=4, sample_size=8, **{**settings, **changes})


def released_vae():
    """The same of the VAE."""
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    sizes = {"block_out_channels": (8, 16, 32, 32), "layers_per_block": 2, "latent_channels": 4, "norm_num_groups": 4}
    return AutoencoderKL(**sizes, **kinds)


def deep_clip(kind, width, layers, **changes):
    config = CLIPTextConfig.from_dict(clip(kind, width).config.to_dict() | {"num_hidden_layers": layers, **changes})
    return kind(config).eval()


def version_1():
    pipeline = pipelines.sd()
    pipeline.register_modules(unet=released_unet(8), vae=released_vae())
    return pipeline


def version_2():
    """OpenCLIP, by its activation; linear projections around attention; 1,024 features, by which programs know it."""
    pipeline = version_1()
    encoder = deep_clip(CLIPTextModel, 1024, 1, hidden_act="gelu", intermediate_size=8)
    unet = released_unet(1024, use_linear_projection=True, attention_head_dim=(2, 4, 4, 4))
    pipeline.register_modules(unet=unet, text_encoder=encoder)
    return pipeline


def xl():
    """Three levels, the finest without attention; ten and more layers in the second encoder."""
    pipeline = pipelines.sdxl()
    unet = released_unet(
        20,
        block_out_channels=(8, 16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=12 + 6 * 4,
    )
    second = deep_clip(CLIPTextModelWithProjection, 12, 10, hidden_act="gelu", projection_dim=12)
    pipeline.register_modules(unet=unet, text_encoder_2=second, vae=released_vae())
    return pipeline


def assert_same_weights(found, wanted):
    for name, part in components(wanted).items():
        got, expected = getattr(found, name).state_dict(), part.state_dict()
        assert got.keys() == expected.keys()
        assert all(torch.equal(got[key], value) for key, value in expected.items()), name


@pytest.mark.parametrize(
    ("build", "kind", "parts"),
    # parts of the published files: UNet, VAE, and of the text encoders one layer and what stands beside the layers
    [(version_1, "v1", (686, 248)), (version_2, "v2", (686, 248)), (xl, "xl_base", (1680, 248))],
)
def test_the_library_recognises_the_file_and_reads_every_weight_back(build, kind, parts, tmp_path):
    pipeline = build()
    path = export_single_file(pipeline, tmp_path / "out" / "whole.safetensors")
    weights = load_file(path)
    assert infer_diffusers_model_type(weights) == kind
    counts = [sum(name.startswith(prefix) for name in weights) for prefix in ("model.diff", "first_stage_model.")]
    assert tuple(counts) == parts
    pipeline.save_pretrained(tmp_path / "folder")
    loaded = type(pipeline).from_single_file(str(path), config=str(tmp_path / "folder"), local_files_only=True)
    assert_same_weights(loaded, pipeline)


def test_an_upsampler_stands_behind_its_level_s_attention(tmp_path):
    """The coarsest level of version 1 has none; diffusers reads the upsampler at either place, others do not."""
    names = load_file(export_single_file(version_1(), tmp_path / "whole.safetensors")).keys()
    upsamplers = {name.partition(".conv.")[0] for name in names if "output_blocks" in name and ".conv." in name}
    places = [".".join(name.split(".")[-2:]) for name in sorted(upsamplers)]
    assert places == ["2.1", "5.2", "8.2"]


def test_a_velocity_model_says_so(tmp_path):
    pipeline = pipelines.build("sdxl")
    plain = load_file(export_single_file(pipeline, tmp_path / "plain.safetensors"))
    pipeline.scheduler.register_to_config(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    marked = load_file(export_single_file(pipeline, tmp_path / "marked.safetensors"))
    assert marked.keys() - plain.keys() == {"v_pred", "ztsnr"}


def test_parts_without_a_place_are_refused(tmp_path):
    pipeline = pipelines.build("sd")
    pipeline.unet.add_module("extra", nn.Linear(2, 2))
    with pytest.raises(ValueError, match="no place for 'extra.weight'"):
        export_single_file(pipeline, tmp_path / "whole.safetensors")
    assert not (tmp_path / "whole.safetensors").exists()


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_an_adapter_in_kohya_s_names_on_every_map(name, tmp_path):
    pipeline = pipelines.build(name)
    pipeline.save_pretrained(tmp_path / "base")
    add_adapter(pipeline.unet, BarrierConfig(targets=["Linear", "Conv2d"]), rank=4, at_most=True)
    for parameter in pipeline.unet.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    save_adapter(pipeline, tmp_path)
    path = export_kohya(get_architecture(type(pipeline).__name__), tmp_path, tmp_path / "exported/adapter.safetensors")
    names = load_file(path).keys()
    assert all(name.startswith("lora_unet_") for name in names)
    assert {name.partition(".")[2] for name in names} == {"lora_down.weight", "lora_up.weight", "alpha"}
    other = load_pipeline(str(tmp_path / "base"))
    other.load_lora_weights(str(path.parent), weight_name=path.name)
    for one in (pipeline, other):
        one.fuse_lora()
        one.unload_lora_weights()
    assert_same_weights(other, pipeline)


def test_a_run_leaves_its_file_and_a_saved_one_gets_it(tmp_path):
    run_tiny(BASE, tmp_path / "run", export="[single_file]")
    path = tmp_path / "run/exported/run.safetensors"
    assert_same_weights(load_pipeline(str(path), pipeline_config=str(BASE)), load_pipeline(str(tmp_path / "run")))
    main(ExportConfig(str(tmp_path / "run"), str(tmp_path / "later")))
    assert (tmp_path / "later/exported/run.safetensors").read_bytes() == path.read_bytes()
    # the file is the run's own: it goes with it
    run_tiny(BASE, tmp_path / "run", overwrite_output_dir="true")
    assert not path.exists()


def test_an_adapter_and_its_merged_pipeline(tmp_path):
    run_tiny(BASE, tmp_path / "run", rank=2, merge_adapter="true", export="[single_file, kohya]")
    whole = load_pipeline(str(tmp_path / "run/exported/run.safetensors"), pipeline_config=str(BASE))
    assert_same_weights(whole, load_pipeline(str(tmp_path / "run/merged")))
    path = tmp_path / "run/exported/run_lora.safetensors"
    main(ExportConfig(str(tmp_path / "run"), str(tmp_path / "later")))
    assert (tmp_path / "later/exported/run_lora.safetensors").read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"export": "[kohya]"}, "export kohya is of an adapter: set rank above 0"),
        ({"export": "[single_file]", "rank": 2}, "rank > 0 leaves an adapter: set merge_adapter"),
        ({"export": "[single_file, single_file]"}, "export names a format twice"),
    ],
)
def test_what_does_not_fit_is_said_at_once(changes, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        parse_config(UnlearnConfig, flags(tmp_path / "run", **changes))


def test_a_class_that_other_programs_read_as_it_is(tmp_path, monkeypatch, capsys):
    flux, empty = tmp_path / "flux", tmp_path / "empty"
    flux.mkdir()
    empty.mkdir()
    (flux / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    for folder, said in ((flux, "not of a FluxPipeline"), (empty, "holds neither model_index.json")):
        words = ["export.py", "--unlearned_model", str(folder), "--output_dir", str(tmp_path / "out")]
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as caught:
            run_script(main, ExportConfig)
        assert caught.value.code == 1 and said in capsys.readouterr().err
    with pytest.raises(ValueError, match="export kohya: .* not of a FluxPipeline"):
        export_kohya(get_architecture("FluxPipeline"), tmp_path, tmp_path / "x.safetensors")


@pytest.mark.parametrize(("name", "count"), [("sd", 1), ("sd", 3), ("sdxl", 1), ("sdxl", 2)])
def test_learned_tokens_load_as_a_textual_inversion(name, count, tmp_path):
    pipeline, known = pipelines.build(name), forgotten()
    budget = InversionConfig(num_steps=2, batch_size=3, learning_rate=0.5, num_tokens=count)
    attempt = ATTACKS.find("inversion").run(pipeline, known, budget)
    (path,) = export_attackers(tmp_path, pipeline, {"sneaker": attempt.marks[-1].tokens})
    assert path == tmp_path / "exported" / "sneaker.safetensors"
    if name == "sd":
        pipeline.load_textual_inversion(str(path.parent), weight_name=path.name)
    else:
        vectors = load_file(path)
        for key, part in (("clip_l", ""), ("clip_g", "_2")):
            parts = {kind: getattr(pipeline, kind + part) for kind in ("tokenizer", "text_encoder")}
            pipeline.load_textual_inversion(vectors[key], token="<forgotten>", **parts)
    prompts = [prompt.replace("sneaker", "<forgotten>") for prompt in known.prompts]
    np.testing.assert_array_equal(generate(pipeline, prompts, known.sampling), attempt.images_NHWC)
    assert not np.array_equal(generate(pipeline, known.prompts, known.sampling), attempt.images_NHWC)


def test_other_pipelines_have_no_such_file(tmp_path):
    pipeline = pipelines.build("sana")
    assert export_attackers(tmp_path, pipeline, {"sneaker": {"text_encoder": torch.zeros(1, 8)}}) == []
    assert not list(tmp_path.iterdir())
