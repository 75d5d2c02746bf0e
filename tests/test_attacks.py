"""Attacks: what they learn, that they leave the pipeline as it was, and that they repeat exactly."""

import copy

import numpy as np
import pytest
import torch
from forgotten_images import SAMPLING, forgotten
from peft import LoraConfig
from pipelines import build

from barrier_diffusers.evaluation.attacks import ATTACKS, Forgotten, register_attack
from barrier_diffusers.evaluation.attacks.base import LearningBudget, encode, frozen, learn
from barrier_diffusers.evaluation.attacks.benign import BenignConfig
from barrier_diffusers.evaluation.attacks.completion import CompletionConfig
from barrier_diffusers.evaluation.attacks.inversion import InversionConfig
from barrier_diffusers.evaluation.attacks.latent_inversion import LatentInversionConfig
from barrier_diffusers.evaluation.attacks.misspelled import MisspelledConfig, misspell
from barrier_diffusers.evaluation.attacks.paraphrased import ParaphrasedConfig
from barrier_diffusers.evaluation.attacks.prompt_search import PromptSearchConfig
from barrier_diffusers.evaluation.attacks.relearning import RelearningConfig
from barrier_diffusers.evaluation.settings import EvaluateConfig
from barrier_diffusers.models.architectures import components
from barrier_diffusers.models.denoiser import PipelineDenoiser
from barrier_diffusers.models.generation import generate
from barrier_diffusers.models.learned_tokens import TOKEN, learned_tokens
from barrier_diffusers.utils.run_records import module_hash

BUDGETS = {
    "inversion": InversionConfig(num_steps=2, batch_size=3, learning_rate=0.1),
    "prompt_search": PromptSearchConfig(
        num_steps=2, batch_size=3, num_tokens=2, num_candidates=4, num_ranked=30, num_checks=4
    ),
    "relearning": RelearningConfig(num_steps=2, batch_size=3, num_images=4, learning_rate=0.1, rank=2),
    "benign": BenignConfig(num_steps=2, batch_size=3, num_images=5, learning_rate=0.1, rank=2),
    "misspelled": MisspelledConfig(),
    "completion": CompletionConfig(),
    "latent_inversion": LatentInversionConfig(),
    "paraphrased": ParaphrasedConfig(words=["shoe", "boot"]),
}


def state(pipeline):
    """All that an attack could leave changed: weights, objects, flags, modes, vocabulary."""
    parts = components(pipeline)
    return {
        "weights": {name: module_hash(part) for name, part in parts.items()},
        "modules": {name: [(key, id(module)) for key, module in part.named_modules()] for name, part in parts.items()},
        "parameters": [(id(value), value.requires_grad) for part in parts.values() for value in part.parameters()],
        "gradients": [value.grad for part in parts.values() for value in part.parameters()],
        "modes": [module.training for part in parts.values() for module in part.modules()],
        "tokenizer": (id(pipeline.tokenizer), dict(pipeline.tokenizer.get_vocab())),
        "config": {key: value for key, value in pipeline.config.items() if not key.startswith("_")},
        "adapters": getattr(pipeline.unet, "peft_config", None) if "unet" in parts else None,
        "random": torch.get_rng_state().tolist(),
    }


@pytest.fixture
def pipeline():
    return build("sd")


@pytest.mark.parametrize("name", sorted(BUDGETS))
def test_an_attack_changes_its_images_and_nothing_else(pipeline, name):
    pipeline.unet.conv_in.requires_grad_(False)
    pipeline.unet.mid_block.train()
    before, entry = state(pipeline), forgotten()
    plain = generate(pipeline, entry.prompts, SAMPLING)
    attempt = ATTACKS.find(name).run(pipeline, entry, BUDGETS[name])
    assert state(pipeline) == before
    assert attempt.images_NHWC.shape == plain.shape and not np.array_equal(attempt.images_NHWC, plain)
    learned_from = {"inversion": 6, "prompt_search": 6, "relearning": 4, "benign": 5}
    learned_from |= {"completion": 3, "latent_inversion": 3}
    assert attempt.num_training_images == learned_from.get(name, 0)
    np.testing.assert_array_equal(generate(pipeline, entry.prompts, SAMPLING), plain)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("inversion", "inversion: non-finite loss at step 1: lower its learning_rate"),
        ("relearning", "relearning on sneaker: non-finite loss at step 1: lower its learning_rate"),
        ("benign", "relearning on other things: non-finite loss at step 1: lower its learning_rate"),
        ("prompt_search", "prompt_search: non-finite loss"),
    ],
)
def test_after_an_exception_the_pipeline_is_as_it_was(pipeline, name, message):
    with torch.no_grad():
        pipeline.unet.conv_in.weight[0, 0, 0, 0] = float("nan")
    before, entry = state(pipeline), forgotten()
    with pytest.raises(FloatingPointError, match=message):
        ATTACKS.find(name).run(pipeline, entry, BUDGETS[name])
    assert state(pipeline) == before


@pytest.mark.parametrize("name", sorted(BUDGETS))
def test_an_attack_repeats_exactly_and_follows_its_seed(pipeline, name):
    entry, budget = forgotten(), copy.deepcopy(BUDGETS[name])
    torch.manual_seed(1)
    first = ATTACKS.find(name).run(pipeline, entry, budget)
    torch.manual_seed(2)
    second = ATTACKS.find(name).run(pipeline, entry, budget)
    np.testing.assert_array_equal(first.images_NHWC, second.images_NHWC)
    assert first.prompts == second.prompts
    budget.seed = 7
    other = ATTACKS.find(name).run(pipeline, entry, budget)
    assert np.array_equal(other.images_NHWC, first.images_NHWC) == (
        name in ("paraphrased", "completion", "latent_inversion")  # they draw nothing
    )


def test_the_gradient_of_inversion_reaches_only_the_new_embedding(pipeline):
    images, denoiser = forgotten().images, PipelineDenoiser(pipeline)
    caption = f"a photo of a red {TOKEN}"
    with frozen(pipeline), learned_tokens(pipeline, "sneaker") as new:
        (vectors,) = new.parameters
        start = vectors.detach().clone()
        moments = encode(pipeline, images, 32)
        drawn = denoiser.noised(moments, torch.Generator().manual_seed(0))
        condition = denoiser.architecture.encode(pipeline, [caption] * len(images))
        predicted = denoiser.predict(denoiser.network, drawn.noisy, drawn.timesteps, condition)
        torch.nn.functional.mse_loss(predicted, drawn.target).backward()
        assert vectors.grad.abs().max() > 0
        others = [value for part in components(pipeline).values() for value in part.parameters()]
        assert [value for value in others if value.grad is not None] == [vectors]
        vectors.grad = None

        def condition_of(rows):
            return denoiser.architecture.encode(pipeline, [caption] * len(rows))

        learn(denoiser, moments, condition_of, [vectors], LearningBudget(num_steps=1, batch_size=2), "test")
        assert not torch.equal(vectors, start)


def test_the_new_token_starts_as_the_concepts_words_and_is_read_where_it_stands(pipeline):
    words = pipeline.text_encoder.get_input_embeddings().weight
    ids = pipeline.tokenizer("running shoe", add_special_tokens=False).input_ids
    with learned_tokens(pipeline, "running shoe") as new:
        (layer,) = new.layers
        torch.testing.assert_close(layer.vectors[0], words[ids].mean(0))
        read = pipeline.tokenizer(f"a red {new.words}").input_ids
        assert [read[-2]] == layer.token_ids and TOKEN not in pipeline.tokenizer.decode(read[:-2])
        embedded = layer(torch.tensor([read]))
        torch.testing.assert_close(embedded[0, -2], layer.vectors[0])
        torch.testing.assert_close(embedded[0, :-2], words[read[:-2]])
        assert pipeline.text_encoder.get_input_embeddings() is layer


def test_several_tokens_are_read_in_order_and_may_start_at_random(pipeline):
    words = pipeline.text_encoder.get_input_embeddings().weight
    with learned_tokens(pipeline, None, count=3, seed=1) as new:
        (layer,) = new.layers
        assert len({tuple(vector.tolist()) for vector in layer.vectors}) == 3
        assert all((words == vector).all(1).any() for vector in layer.vectors)
        read = pipeline.tokenizer(f"a red {new.words} on grass").input_ids
        assert read[3:6] == layer.token_ids
        torch.testing.assert_close(layer(torch.tensor([read]))[0, 3:6], layer.vectors.detach())
        start = layer.vectors.detach().clone()
    with learned_tokens(pipeline, None, count=3, seed=2) as new:
        assert not torch.equal(new.parameters[0], start)


@pytest.mark.parametrize("architecture", ["sdxl", "sd3", "flux"])
def test_every_text_encoder_learns_the_token(architecture):
    pipeline = build(architecture)
    before, denoiser, entry = state(pipeline), PipelineDenoiser(pipeline), forgotten()
    with frozen(pipeline), learned_tokens(pipeline, "sneaker", count=2) as new:
        moments, texts = encode(pipeline, entry.images, 32), [f"a {new.words}"] * len(entry.images)
        drawn = denoiser.noised(moments, torch.Generator().manual_seed(0))
        condition = denoiser.architecture.encode(pipeline, texts)
        denoiser.predict(denoiser.network, drawn.noisy, drawn.timesteps, condition).sum().backward()
        assert len(new.parameters) == {"sdxl": 2, "sd3": 3, "flux": 2}[architecture]
        assert all(vectors.grad.abs().max() > 0 for vectors in new.parameters)
    assert state(pipeline) == before
    InversionConfig().check(pipeline, entry)
    attempt = ATTACKS.find("inversion").run(pipeline, entry, BUDGETS["inversion"])
    assert attempt.images_NHWC.shape == (3, 32, 32, 3) and state(pipeline) == before


def test_inversion_lowers_the_denoising_loss(pipeline):
    """On one image at fixed noise the learned embedding explains the image better than the concept's name did."""
    images, denoiser = forgotten().images.select([0]), PipelineDenoiser(pipeline)
    with frozen(pipeline), learned_tokens(pipeline, "sneaker") as new:
        moments = encode(pipeline, images, 32).expand(8, -1, -1, -1)

        def condition_of(rows):
            return denoiser.architecture.encode(pipeline, [f"a {TOKEN}"] * len(rows))

        def loss():
            with torch.no_grad():
                drawn = denoiser.noised(moments, torch.Generator().manual_seed(3))
                predicted = denoiser.predict(denoiser.network, drawn.noisy, drawn.timesteps, condition_of(moments))
                return torch.nn.functional.mse_loss(predicted, drawn.target).item()

        before = loss()
        learn(denoiser, moments, condition_of, new.parameters, LearningBudget(num_steps=60, batch_size=8), "test")
        assert loss() < before


@pytest.mark.parametrize("architecture", ["sdxl", "sd3", "flux"])
def test_relearning_serves_every_architecture(architecture):
    pipeline, entry = build(architecture), forgotten()
    before = state(pipeline)
    budget = RelearningConfig(num_steps=1, batch_size=2, num_images=2, rank=2, targets=["to_q", "to_v"])
    budget.check(pipeline, entry)
    attempt = ATTACKS.find("relearning").run(pipeline, entry, budget)
    assert attempt.images_NHWC.shape == (3, 32, 32, 3) and state(pipeline) == before


def test_misspelled_prompts():
    prompts = [f"a photo of a {colour} running shoe" for colour in ("red", "blue", "green", "black")] * 10
    for num_edits in (1, 2):
        edited = misspell(prompts, "running shoe", num_edits, seed=0)
        assert edited == misspell(prompts, "running shoe", num_edits, seed=0)
        assert edited != misspell(prompts, "running shoe", num_edits, seed=1)
        assert len(set(edited)) > 20
        for plain, wrong in zip(prompts, edited, strict=True):
            head = plain.removesuffix("running shoe")
            assert wrong.startswith(head) and wrong != plain and "running shoe" not in wrong
    assert edited[0] == misspell(prompts[:1], "running shoe", 2, seed=0)[0]  # independent of the rest of the list
    assert misspell(["an A"], "a", 1, 0) != ["an A"]


def test_paraphrases_replace_the_words_or_the_prompt(pipeline):
    entry, run = forgotten(), ATTACKS.find("paraphrased").run
    attempt = run(pipeline, entry, ParaphrasedConfig(words=["shoe", "trainer"]))
    assert attempt.prompts == ["a photo of a red shoe", "a photo of a blue trainer", "a photo of a green shoe"]
    attempt = run(pipeline, entry, ParaphrasedConfig(prompts=["what runners wear"]))
    assert attempt.prompts == ["what runners wear"] * 3
    np.testing.assert_array_equal(
        attempt.images_NHWC, generate(pipeline, ["what runners wear"] * 3, SAMPLING)
    )  # the seeds of the plain prompts


def test_registry():
    assert set(ATTACKS) == set(BUDGETS)
    for name, attack in ATTACKS.items():
        assert EvaluateConfig.__dataclass_fields__[name].type is attack.budget
    with pytest.raises(ValueError, match="unknown attack 'guess'; known are benign, completion"):
        ATTACKS.find("guess")
    with pytest.raises(ValueError, match="registered already"):
        register_attack("inversion", InversionConfig)(lambda *_: None)


@pytest.mark.parametrize(
    ("budget", "concept", "message"),
    [
        (InversionConfig(num_images=9), "sneaker", "wants 9 held-out images of sneaker, but there are 6"),
        (InversionConfig(), "boot", "does not name the concept 'boot'"),
        (RelearningConfig(num_images=9), "sneaker", "wants 9 held-out images of sneaker"),
        (BenignConfig(), "sneaker", "wants 100 held-out images of other things, but there are 6"),
        (RelearningConfig(num_images=2, targets=["attn3.to_q"]), "sneaker", "no module ends with 'attn3.to_q'"),
        (MisspelledConfig(), "boot", "does not name the concept 'boot'"),
        (MisspelledConfig(), "501", "has no letter to misspell"),
        (ParaphrasedConfig(), "sneaker", "needs paraphrased.words or paraphrased.prompts"),
        (ParaphrasedConfig(words=["a"], prompts=["b"]), "sneaker", "needs paraphrased.words or"),
        (ParaphrasedConfig(words=[" "]), "sneaker", "without empty ones"),
        (ParaphrasedConfig(words=["shoe"]), "boot", "does not name the concept 'boot'"),
    ],
)
def test_checks_before_any_work(pipeline, budget, concept, message):
    entry = forgotten()
    entry = Forgotten(concept, entry.prompts, entry.images, entry.others, SAMPLING, 32)
    with pytest.raises(ValueError, match=message):
        budget.check(pipeline, entry)


def test_relearning_refuses_a_pipeline_with_an_adapter(pipeline):
    pipeline.unet.add_adapter(LoraConfig(target_modules=["to_q"]))
    with pytest.raises(ValueError, match="fuse and unload it"):
        RelearningConfig(num_images=2).check(pipeline, forgotten())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: InversionConfig(num_steps=0), "num_steps is 0, but must be at least 1"),
        (lambda: InversionConfig(learning_rate=0.0), "learning_rate is 0.0, but must be > 0"),
        (lambda: InversionConfig(initial_words=" "), "initial_words is empty"),
        (lambda: RelearningConfig(rank=0), "rank is 0, but must be in \\[1, 4096\\]"),
        (lambda: MisspelledConfig(num_edits=0), "num_edits is 0"),
    ],
)
def test_settings_out_of_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_inversion_refuses_a_token_that_exists(pipeline):
    pipeline.tokenizer.add_tokens(TOKEN)
    with pytest.raises(ValueError, match="has a token <forgotten> already"), learned_tokens(pipeline, "sneaker"):
        pass
