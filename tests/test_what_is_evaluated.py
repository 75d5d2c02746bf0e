"""What is trained on and judged is what was meant: each case makes its input on the fly and gets the right value, or
the message that says what is wrong."""

import inspect
import json
import re

import diffusers
import numpy as np
import pytest
import torch
from datasets import Dataset
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from PIL import Image
from pipelines import build
from safetensors.torch import load_file, save_file
from short_evaluations import twin_of_base
from short_runs import BASE, ROOT
from transformers import CLIPConfig, CLIPImageProcessor
from written_runs import share, write_run

from barrier_diffusers.data.concepts import ConceptConfig, ConceptData
from barrier_diffusers.data.prompt_files import PromptRow, write_prompts
from barrier_diffusers.evaluation import tables
from barrier_diffusers.evaluation.accuracy import difference_interval
from barrier_diffusers.evaluation.attacks import Forgotten
from barrier_diffusers.evaluation.attacks.paraphrased import ParaphrasedConfig
from barrier_diffusers.evaluation.image_folder import generate_folder, read_folder
from barrier_diffusers.evaluation.judged_model import JudgedModel
from barrier_diffusers.evaluation.pictures import image_rows, label_bars
from barrier_diffusers.evaluation.report import read_run, render
from barrier_diffusers.evaluation.settings import EvaluateConfig
from barrier_diffusers.models.denoiser import PipelineDenoiser
from barrier_diffusers.models.generation import SamplingConfig, generate
from barrier_diffusers.models.loading import add_adapter, load_merged, load_pipeline
from barrier_diffusers.models.noising import FLOW_MATCHING, VARIANCE_PRESERVING, DiffusionNoising, FlowNoising
from barrier_diffusers.models.publishing import save_adapter, save_pipeline
from barrier_diffusers.objectives import Objective, ObjectiveConfig
from barrier_diffusers.objectives.uce import aligned_tokens
from barrier_diffusers.protection.barrier import Barrier
from barrier_diffusers.protection.config import BarrierConfig
from barrier_diffusers.training.unlearn import apply_edit
from barrier_diffusers.utils.shown_text import plain_console
from barrier_diffusers.workflow.settings import UnlearnConfig

SAMPLING = SamplingConfig(num_inference_steps=2, resolution=32)
PROMPTS = ["a photo of a red boot", "a photo of a blue bag"]
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


# Filters of pixels


def strict_checker():
    """A safety checker that takes every image for unsafe."""
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = CLIPConfig(
        text_config=small, vision_config={**small, "image_size": 32, "patch_size": 16}, projection_dim=8
    )
    checker = StableDiffusionSafetyChecker(config)
    with torch.no_grad():
        checker.concept_embeds_weights.fill_(-5.0)
    return checker


def with_checker(folder):
    pipeline = build("sd")
    sizes = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    parts = {
        **pipeline.components,
        "safety_checker": strict_checker(),
        "feature_extractor": CLIPImageProcessor(**sizes),
    }
    StableDiffusionPipeline(**parts).save_pretrained(folder)
    return load_pipeline(str(folder))


def test_a_safety_checker_hides_nothing(tmp_path):
    pipeline = with_checker(tmp_path)
    options = {"num_inference_steps": 2, "height": 32, "width": 32, "output_type": "np"}
    assert not pipeline(PROMPTS, **options).images.any()  # as a user sees them
    checker, config = pipeline.safety_checker, dict(pipeline.config)
    made = generate(pipeline, PROMPTS, SAMPLING)
    assert pipeline.safety_checker is checker and dict(pipeline.config) == config
    pipeline.safety_checker = None
    np.testing.assert_array_equal(made, generate(pipeline, PROMPTS, SAMPLING))
    assert made.any()


def test_images_of_a_pipeline_with_a_filter_are_not_taken_for_older_ones(tmp_path):
    """Earlier versions left black images in the folder: its record did not know of the filter."""
    rows = [PromptRow(str(index), prompt, index) for index, prompt in enumerate(PROMPTS)]
    pipeline = with_checker(tmp_path / "pipeline")
    generate_folder(pipeline, rows, SAMPLING, tmp_path / "images", {"unet": "a"})
    manifest = json.loads((tmp_path / "images/manifest.json").read_text())
    assert manifest.pop("off") == ["safety_checker"]
    (tmp_path / "images/manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="was made from other off"):
        generate_folder(pipeline, rows, SAMPLING, tmp_path / "images", {"unet": "a"})


def test_a_watermark_writes_on_nothing():
    class Watermark:
        def apply_watermark(self, images):
            return torch.zeros_like(images)

    pipeline = build("sdxl")
    plain = generate(pipeline, PROMPTS, SAMPLING)
    pipeline.watermark = Watermark()
    np.testing.assert_array_equal(generate(pipeline, PROMPTS, SAMPLING), plain)
    assert isinstance(pipeline.watermark, Watermark)


@pytest.mark.parametrize("architecture", ["sd", "sdxl", "sd3", "flux"])
def test_nothing_but_black_images_is_an_error(architecture):
    pipeline = build(architecture)
    with torch.no_grad():
        pipeline.vae.decoder.conv_out.weight.zero_()
        pipeline.vae.decoder.conv_out.bias.fill_(-2.0)
    with pytest.raises(
        FloatingPointError, match="2 images and every pixel is black, for prompts from 'a photo of a red"
    ):
        generate(pipeline, PROMPTS, SAMPLING)


def folder_of(folder, images):
    folder.mkdir(parents=True)
    write_prompts(folder / "prompts.csv", [PromptRow(str(index), PROMPTS[index], 0) for index in range(len(images))])
    for index, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{index}_0.png")
    return str(folder)


def grey(value):
    return np.full((32, 32, 3), value, np.uint8)


def test_a_black_image_that_was_made_earlier_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"holds 1 images that are all black, 1_0.png for one"):
        read_folder(folder_of(tmp_path / "images", [grey(9), grey(0)]))


# Adapters


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """Weights of an adapter that changes what it is put on."""
    pipeline, folder = load_pipeline(str(BASE)), tmp_path_factory.mktemp("adapter")
    add_adapter(pipeline.unet, BarrierConfig(targets=["attn2.to_q"]), 4)
    for name, value in pipeline.unet.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value)
    save_adapter(pipeline, folder)
    return load_file(folder / "pytorch_lora_weights.safetensors")


def doubled(weights):
    return {name: torch.cat([value, value], 1) for name, value in weights.items()}


def some_renamed(weights):
    names = list(weights)
    return {(name.replace("attn2", "attn9") if name in names[:2] else name): weights[name] for name in names}


ADAPTERS = {
    "one that fits": (dict, None),
    "no key of any network": (lambda w: {name.replace("unet.", "net."): w[name] for name in w}, "0 of its 7 layers"),
    "no module of that name": (lambda w: {name.replace("attn2", "attn9"): w[name] for name in w}, "does not fit"),
    "one layer of another model": (some_renamed, "6 of its 7 layers find a module there"),
    "other shapes": (doubled, "does not fit this StableDiffusionPipeline"),
    "no adapter at all": (lambda w: {"a.weight": torch.zeros(2)}, "does not fit"),
    "zeros": (lambda w: {name: value * ("lora_A" in name) for name, value in w.items()}, "changes nothing"),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_that_is_not_applied_is_an_error(name, adapter, tmp_path):
    change, message = ADAPTERS[name]
    weights = {key: value.contiguous() for key, value in change(adapter).items()}
    save_file(weights, tmp_path / "pytorch_lora_weights.safetensors", metadata={"format": "pt"})
    if message is not None:
        with pytest.raises(ValueError, match=message):
            load_merged(str(BASE), str(tmp_path))
        return
    merged, base = load_merged(str(BASE), str(tmp_path)).unet.state_dict(), load_pipeline(str(BASE)).unet.state_dict()
    assert {key for key in base if not torch.equal(base[key], merged[key])} == {
        key for key in base if "attn2.to_q" in key
    }


# Schedulers


def whole_timesteps(scheduler):
    """Three of the scheduler's own timesteps, which solvers of higher order put between the training's, too."""
    whole = [time for time in scheduler.timesteps if float(time) == int(time)]
    assert len(whole) >= 20
    return [whole[len(whole) * part // 10] for part in (1, 5, 8)]


@pytest.mark.parametrize("name", VARIANCE_PRESERVING)
def test_noise_is_the_schedulers_own(name):
    scheduler = getattr(diffusers, name)(**BETAS)
    noising = DiffusionNoising(scheduler, 1)
    if "original_inference_steps" not in scheduler.config:  # these sample at few of the training's timesteps
        scheduler.set_timesteps(1000)
    clean, noise = torch.randn(2, 1, 4, 8, 8).unbind(0)
    for time in whole_timesteps(scheduler):
        drawn = noising.at(clean, noise, torch.tensor([int(time)]))
        scheduler._step_index = None
        shown = scheduler.scale_model_input(scheduler.add_noise(clean, noise, time.reshape(1)), time)
        torch.testing.assert_close(drawn.noisy, shown, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(drawn.target, noise)


@pytest.mark.parametrize("name", ["DDPMScheduler", "DDIMScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_a_step_with_the_exact_target_leads_towards_the_image(name, prediction_type):
    """From x_t as the sampler holds it, one step of its own with our target as the prediction says where x_0 is."""
    settings = {**BETAS, "prediction_type": prediction_type}
    settings |= {"clip_sample": False} if name.startswith("DD") else {"timestep_spacing": "trailing"}
    scheduler = getattr(diffusers, name)(**settings)
    noising = DiffusionNoising(scheduler, 1)
    scheduler.set_timesteps(1000)
    clean, noise = torch.randn(2, 1, 4, 8, 8).unbind(0)
    for time in whole_timesteps(scheduler):
        drawn = noising.at(clean, noise, torch.tensor([int(time)]))
        scheduler._step_index = None
        held = scheduler.add_noise(clean, noise, time.reshape(1))
        scheduler.scale_model_input(held, time)
        found = scheduler.step(drawn.target, time, held)
        if "pred_original_sample" in found and found.pred_original_sample is not None:
            torch.testing.assert_close(found.pred_original_sample, clean, rtol=2e-3, atol=2e-3)
        else:
            next_time = scheduler.timesteps[scheduler.step_index]
            wanted = scheduler.add_noise(clean, noise, next_time.reshape(1))
            torch.testing.assert_close(found.prev_sample, wanted, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("name", FLOW_MATCHING)
def test_flow_noise_is_the_schedulers_own(name):
    scheduler = getattr(diffusers, name)(shift=3.0)
    clean, noise = torch.randn(2, 5, 4, 8, 8).unbind(0)
    drawn = FlowNoising(scheduler, 2).at(clean, noise, torch.tensor([0, 200, 500, 800, 999]))
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 1000, 1000).tolist())
    torch.testing.assert_close(drawn.noisy, scheduler.scale_noise(clean, drawn.timesteps, noise), rtol=1e-4, atol=1e-4)


REFUSED = {
    "EDM Euler": (DiffusionNoising, "EDMEulerScheduler", {}, "scheduler EDMEulerScheduler noises in a way"),
    "EDM multistep": (
        DiffusionNoising,
        "EDMDPMSolverMultistepScheduler",
        {},
        "scheduler EDMDPMSolverMultistepScheduler",
    ),
    "UnCLIP": (DiffusionNoising, "UnCLIPScheduler", {}, "scheduler UnCLIPScheduler"),
    "IPNDM": (DiffusionNoising, "IPNDMScheduler", {}, "scheduler IPNDMScheduler"),
    "consistency": (DiffusionNoising, "CMStochasticIterativeScheduler", {}, "CMStochasticIterativeScheduler"),
    "score SDE": (DiffusionNoising, "ScoreSdeVeScheduler", {}, "scheduler ScoreSdeVeScheduler"),
    "flow matching in a diffusion": (
        DiffusionNoising,
        "FlowMatchEulerDiscreteScheduler",
        {},
        "save the pipeline with one",
    ),
    "flow sigmas": (
        DiffusionNoising,
        "DPMSolverMultistepScheduler",
        {"use_flow_sigmas": True},
        "with use_flow_sigmas",
    ),
    "continuous time": (DiffusionNoising, "EulerDiscreteScheduler", {"timestep_type": "continuous"}, "timestep_type"),
    "the image": (DiffusionNoising, "DDIMScheduler", {"prediction_type": "sample"}, "prediction_type is 'sample'"),
    "Heun in a flow": (FlowNoising, "FlowMatchHeunDiscreteScheduler", {}, "scheduler FlowMatchHeunDiscreteScheduler"),
    "diffusion in a flow": (FlowNoising, "DDIMScheduler", {}, "save the pipeline with one of FlowMatchEuler"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_another_noise_is_refused_by_name(name):
    noising, scheduler, settings, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        noising(getattr(diffusers, scheduler)(**settings), 1)


# Resolution


@pytest.mark.parametrize(
    ("name", "side"), [("sd", 8 * 4), ("sdxl", 8 * 4), ("sd3", 8 * 4), ("flux", 128 * 4)]
)  # positions x pixels of one: at the released sizes 64 x 8, 128 x 8, 128 x 8, 128 x 8
def test_the_models_own_resolution(name, side):
    pipeline = build(name)
    denoiser = PipelineDenoiser(pipeline)
    assert denoiser.checked_resolution(None) == denoiser.default_resolution == side
    assert generate(pipeline, PROMPTS[:1], SamplingConfig(num_inference_steps=1)).shape == (1, side, side, 3)


def test_resolution_is_the_models_wherever_it_is_not_set(tmp_path):
    for settings in (UnlearnConfig, EvaluateConfig, SamplingConfig):
        assert inspect.signature(settings).parameters["resolution"].default is None
    config = EvaluateConfig(output_dir=str(tmp_path), pretrained_model_name_or_path=str(BASE), **CONCEPTS)
    assert JudgedModel(config, tmp_path).resolution == 32


# Texts


def test_a_textual_inversion_of_several_vectors_is_aligned_as_it_is_read(tmp_path):
    """uce maps the positions of a forget prompt to those of its anchor: end to end, padding to padding."""
    pipeline, seen = build("sd"), []
    width = pipeline.text_encoder.config.hidden_size
    save_file({"emb_params": torch.randn(3, width)}, tmp_path / "learned.safetensors")
    pipeline.load_textual_inversion(str(tmp_path / "learned.safetensors"), token="<cat>")
    config = ConceptConfig(concept="<cat>", forget_prompts=["a red <cat> here"], retain_prompts=["a bag"])
    rows = [Dataset.from_dict({"text": texts}) for texts in (["a red <cat> here"], ["a bag"])]
    concepts = ConceptData(*rows, concepts=["<cat>"], labels=[], retain_captions=["a bag"], config=config)
    objective = Objective("see", edit=seen.append, needs=("anchor",))
    options = ObjectiveConfig(anchor="boot")
    barrier = Barrier(pipeline.unet, BarrierConfig(targets=["attn2.to_k"], reduced_dim=4))
    apply_edit(objective, options, barrier, pipeline=pipeline, concepts=concepts, seed=0)
    (task,) = seen
    ((prompt, anchor),) = task.pairs
    assert anchor == "a red boot here"
    forget, target = task.tokenize(prompt), task.tokenize(anchor)
    end = pipeline.tokenizer.eos_token_id
    assert len(forget) == len(target) + 2  # three vectors stand for one word
    length = pipeline.tokenizer.model_max_length
    positions = aligned_tokens(forget, target, length)
    assert positions[forget.index(end)] == target.index(end)
    hidden = task.embed([prompt])[0]
    read = pipeline.tokenizer(
        pipeline.maybe_convert_prompt(prompt, pipeline.tokenizer), padding="max_length"
    ).input_ids
    assert read[: len(forget)] == forget and len(hidden) == len(read) == length


# Precision


def test_the_lines_of_the_readme_run(monkeypatch):
    monkeypatch.chdir(ROOT)
    for kind in (StableDiffusionPipeline, DiffusionPipeline):
        pipeline = kind.from_pretrained("assets/fashion_sd")
        assert pipeline("a photo of a red sneaker", num_inference_steps=2).images[0].size == (32, 32)
        assert {part.dtype for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder)} == {torch.float32}
    weights = load_file("assets/fashion_sd/text_encoder/model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float16}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_is_saved_in_any_precision_runs_where_none_is_named(dtype, tmp_path):
    pipeline = build("sd").to(dtype)
    save_pipeline(pipeline, tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    assert loaded("a red boot", num_inference_steps=1).images[0].size == (32, 32)
    assert DiffusionPipeline.from_pretrained(tmp_path, dtype=torch.float16).text_encoder.dtype == torch.float16


# Base and judged, paraphrase and concept

CONCEPTS = {"concept": "sneaker", "forget_prompts": ["a sneaker"], "retain_prompts": ["a bag"]}
CONCEPTS |= {"evaluation": EvaluateConfig.__dataclass_fields__["evaluation"].default_factory()}
CONCEPTS["evaluation"].classifier = str(BASE.parent / "fashion_classifier")


def test_a_model_that_is_its_own_base(tmp_path):
    judged = {"output_dir": str(tmp_path / "run"), "pretrained_model_name_or_path": str(BASE), **CONCEPTS}
    save_pipeline(load_pipeline(str(BASE)), tmp_path / "copy")
    for base in (BASE, tmp_path / "copy"):
        with pytest.raises(ValueError, match="has the weights of what is judged, so before and after are the same"):
            JudgedModel(EvaluateConfig(base_model=str(base), **judged), tmp_path)
    JudgedModel(EvaluateConfig(base_model=str(twin_of_base(tmp_path / "twin")), **judged), tmp_path)


def test_images_that_are_their_own_base(tmp_path):
    rows = [PromptRow("0", PROMPTS[0], 0)]
    images = {
        name: folder_of(tmp_path / name, [grey(value)]) for name, value in {"one": 9, "two": 9, "three": 8}.items()
    }
    found = {}
    for name in ("two", "three"):
        config = EvaluateConfig(
            output_dir=str(tmp_path / "run"), images_dir=images["one"], base_images_dir=images[name], **CONCEPTS
        )
        model = JudgedModel(config, tmp_path)
        try:
            found[name] = len(model.images("class", rows, config.prompts).after)
        except ValueError as error:
            found[name] = str(error)
    assert "holds images_dir's own images" in found["two"] and found["three"] == 1


PARAPHRASES = {
    "the word": ({"words": ["sneaker"]}, False),
    "other case and spaces": ({"words": ["trainer", " Sneaker "]}, False),
    "hyphen and width": ({"words": ["ｓｎｅａｋｅｒ"]}, False),
    "a prompt with the word": ({"prompts": ["what runners wear", "a SNEAKER on a table"]}, False),
    "another word": ({"words": ["trainer"]}, True),
    "the plural, which is another token": ({"words": ["sneakers"]}, True),
    "a prompt without the word": ({"prompts": ["what runners wear"]}, True),
    "a longer word": ({"prompts": ["a sneakerhead"]}, True),
}


@pytest.mark.parametrize("name", PARAPHRASES)
def test_a_paraphrase_that_is_the_concept(name):
    settings, is_one = PARAPHRASES[name]
    empty = Dataset.from_dict({"image": [], "text": []})
    known = Forgotten("sneaker", ["a red sneaker"], empty, empty, SAMPLING, 32)
    if is_one:
        ParaphrasedConfig(**settings).check(build("sd"), known)
    else:
        with pytest.raises(ValueError, match="names the concept 'sneaker' itself"):
            ParaphrasedConfig(**settings).check(build("sd"), known)


# What is said of it


def test_the_page_says_what_unlearning_accuracy_is(tmp_path):
    page = " ".join(render([read_run(write_run(tmp_path / "run", concept="sneaker"))]).split())
    assert "that are <em>not</em> recognised as that" in page
    assert "9 of 10 images of sneaker are not recognised as such: unlearning accuracy 90.0 % (59.6 to 98.2)" in page


def test_the_page_opens_with_pictures_verdict_and_settings(tmp_path):
    page = render([read_run(write_run(tmp_path / "run", concept="sneaker"))])
    order = [
        page.index(mark) for mark in ("Images before and after", 'class="verdict"', "<h3>Settings", "<h3>Numbers")
    ]
    assert order == sorted(order) and page.index("Per label</h3>") > order[-1]


def test_one_run_is_no_scatter_plot(tmp_path):
    runs = [read_run(write_run(tmp_path / name)) for name in ("one", "two")]
    assert "up and to the left is better" not in render(runs[:1])
    assert "up and to the left is better" in render(runs)


def test_the_drop_is_uncertain_on_both_sides():
    before, after = share(97.0, 90.0, 99.0), share(95.0, 88.0, 98.0)
    low, high = difference_interval(before, after)
    assert low < 97 - 98 and high > 97 - 88  # wider than with an accuracy before that is taken as it is
    sure = {**before, "interval_95": [97.0, 97.0]}
    assert difference_interval(sure, after) == pytest.approx((-1.0, 9.0))


def test_a_classifiers_run_has_its_labels(tmp_path):
    details = {"unlearning_accuracy": share(90.0, 60.0, 98.0), "retain_accuracy": share(95.0, 88.0, 98.0)}
    after = {"details": {**details, "per_label": {"bag": share(10.0, 1.8, 40.4), "boot": share(95.0, 88.0, 98.0)}}}
    before = {"retain_accuracy": 97.0, "details": {"retain_accuracy": share(97.0, 90.0, 99.0)}}
    before["details"]["per_label"] = {"bag": share(99.0, 90.0, 100.0), "boot": share(97.0, 90.0, 99.0)}
    (tmp_path / "metrics.json").write_text(json.dumps({"retain_accuracy": 95.0, **after, "before": before}))
    (tmp_path / "manifest.json").write_text(json.dumps({"settings": {"forget_class": "bag"}}))
    run = read_run(tmp_path)
    assert list(run.shares("after")) == ["bag", "boot"] and run.shares("before")["bag"]["value"] == 99.0
    assert run.drop == 2.0 and run.drop_interval == pytest.approx((2 - 58**0.5, 2 + 53**0.5))
    page = render([run])
    assert re.search(r'class="forgotten"><td>bag</td><td>99.0 .*<td>10.0 ', page) and "<td>boot</td>" in page


LABELS = ["[/x]", "$", "$a_b$", "<script>alert(1)</script>", "[red]bag", "100 %", "\\"]


@pytest.mark.parametrize("label", LABELS)
def test_labels_are_text_wherever_they_are_shown(label, tmp_path, monkeypatch, capsys):
    page = render([read_run(write_run(tmp_path / "run", concept=label))])
    assert "<script>" not in page
    shares = {label: share(10.0, 1.8, 40.4), "bag": share(95.0, 88.0, 98.0)}
    assert label_bars(shares, shares, [label]).startswith(b"\x89PNG")
    image_rows(np.zeros((2, 4, 4, 3), np.uint8), [label, "bag"], tmp_path / "rows.png")
    monkeypatch.setattr(tables, "plain_console", lambda: plain_console(300))
    metrics = json.loads((tmp_path / "run/metrics.json").read_text()) | {"retain_accuracy_after": 95.0}
    tables.print_metrics(metrics, "class", [label])
    attack = {"attack": label, "concept": label, "pre_attack": shares[label], "post_attack": shares[label]}
    tables.print_attacks([attack], {label: 12.4})
    assert capsys.readouterr().out.count(label) >= 5


def test_seconds_stand_in_no_table_of_percentages(capsys):
    attack = {"attack": "benign", "concept": "bag", "pre_attack": share(1.0, 0, 2), "post_attack": share(2.0, 0, 4)}
    tables.print_attacks([attack], {"benign": 12.4})
    table, _, last = capsys.readouterr().out.rstrip().rpartition("\n")
    assert "seconds" not in table and last == "seconds: benign 12"
