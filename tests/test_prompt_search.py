"""Adversarial prompt search: its gradient, its tokens, that it finds what there is to find."""

import pytest
import torch
from forgotten_images import forgotten
from pipelines import build

from barrier_diffusers.evaluation.attacks import ATTACKS
from barrier_diffusers.evaluation.attacks.base import encode, frozen
from barrier_diffusers.evaluation.attacks.prompt_search import (
    GAP,
    PromptSearchConfig,
    Search,
    Speller,
    exchanges,
    fill,
    nudged,
    search,
    start_tokens,
    templates,
)

SMALL = {"num_steps": 2, "batch_size": 3, "num_tokens": 2, "num_candidates": 4, "num_ranked": 30, "num_checks": 4}


@pytest.fixture(scope="module")
def pipeline():
    return build("sd")


def make_problem(pipeline, place="before", forward_batch=128):
    entry = forgotten()
    frames = templates(entry.images["text"], entry.concept, place)
    speller = Speller(pipeline.tokenizer, frames)
    moments = encode(pipeline, entry.images, 32)
    return Search(pipeline, entry.images["text"], frames, speller, moments, forward_batch)


def typeable(speller, tokenizer):
    tokens = [token for token in range(len(tokenizer)) if token not in tokenizer.all_special_ids]
    return {words: (token,) for token in tokens if (words := speller.spell((token,))) is not None}


def test_templates():
    captions = ["a photo of a red sneaker", "a Sneaker"]
    assert [fill(frame, "x y") for frame in templates(captions, "sneaker", "before")] == [
        "x y a photo of a red sneaker",
        "x y a Sneaker",
    ]
    assert [fill(frame, "x y") for frame in templates(captions, "sneaker", "instead")] == [
        "a photo of a red x y",
        "a x y",
    ]


def test_a_speller_gives_only_words_that_are_read_as_the_same_tokens(pipeline):
    tokenizer = pipeline.tokenizer
    frames = [f"{GAP} a red bag", f"a blue {GAP}"]
    speller = Speller(tokenizer, frames)
    read = tokenizer("sneaker photo", add_special_tokens=False).input_ids
    assert speller.spell(read) == "sneaker photo"
    half, whole = (tokenizer.convert_tokens_to_ids(token) for token in ("sne", "sneaker</w>"))
    assert speller.spell((half, whole)) == "snesneaker"
    assert speller.spell((whole, half)) is None  # nothing follows that its end could be part of
    assert speller.spell((tokenizer.eos_token_id,)) is None
    assert speller.slot(frames[0]) == 1 and speller.slot(frames[1]) == 3
    assert speller.room == tokenizer.model_max_length - 2 - 3
    found = typeable(speller, tokenizer)
    assert 100 < len(found) < len(tokenizer)
    for words, tokens in list(found.items())[::20]:
        assert tokenizer(f"a blue {words}").input_ids[3:-1] == list(tokens)


@pytest.mark.parametrize("place", ["before", "instead"])
def test_slopes_are_the_derivative_of_the_loss(pipeline, place):
    problem = make_problem(pipeline, place)
    tokens = tuple(pipeline.tokenizer("red bag", add_special_tokens=False).input_ids)
    batch = problem.draw(6, torch.Generator().manual_seed(0))
    weight = problem.layer.weight.detach()
    with frozen(pipeline):
        slopes = problem.slopes("red bag", tokens, *batch)
        assert slopes.shape == (2, len(weight))
        torch.testing.assert_close(slopes[torch.arange(2), list(tokens)], torch.zeros(2), atol=1e-6, rtol=0)
        asked = [problem.distinct[frame] for frame in problem.frame_ids_N[batch[0]].unique().tolist()]
        slots = torch.tensor([problem.speller.slot(frame) for frame in asked])
        place_, token = divmod(int(slopes.abs().argmax()), slopes.shape[1])
        change = torch.zeros(2, weight.shape[1])
        change[place_] = 0.05 * (weight[token] - weight[tokens[place_]])
        ends = []
        for sign in (1, -1):
            with nudged(problem.layer, slots, sign * change):
                ends.append(problem.losses(["red bag"], *batch).double().item())
    assert (ends[0] - ends[1]) / 0.1 == pytest.approx(slopes[place_, token].item(), rel=0.05)
    assert not problem.layer._forward_hooks


def test_losses_do_not_depend_on_how_they_are_grouped(pipeline):
    words = ["red", "bag", None, "a photo"]
    losses = []
    for forward_batch in (1, 12, 128):
        problem = make_problem(pipeline, forward_batch=forward_batch)
        losses.append(problem.losses(words, *problem.draw(6, torch.Generator().manual_seed(1))))
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(losses[0], losses[2])
    assert len(set(losses[0].tolist())) == 4


def test_one_step_over_everything_is_brute_force(pipeline):
    """With one token, and every token a candidate, a step picks the best word of the vocabulary on its batch."""
    problem = make_problem(pipeline, "instead")
    words = typeable(problem.speller, pipeline.tokenizer)
    budget = PromptSearchConfig(num_tokens=1, num_candidates=1000, num_ranked=1000, num_checks=2)
    with frozen(pipeline):
        batch = problem.draw(4, torch.Generator().manual_seed(2))
        slopes = problem.slopes("red", words["red"], *batch)
        slopes[:, pipeline.tokenizer.all_special_ids] = torch.inf
        tried = exchanges(slopes, words["red"], problem.speller, budget, torch.Generator())
        losses = problem.losses(list(words), *batch)
    assert set(tried) | {"red"} == set(words)
    few = PromptSearchConfig(num_tokens=1, num_candidates=5, num_ranked=40)
    best = exchanges(slopes, words["red"], problem.speller, few, torch.Generator().manual_seed(0))
    ranks = slopes[0].argsort().argsort()
    assert len(best) == 5 and all(ranks[token] < 40 for (token,) in best.values())
    # what the gradient ranks first is better than chance
    order = [int(ranks[words[word][0]]) for word in words]
    assert torch.corrcoef(torch.stack([torch.tensor(order).double(), losses.double()]))[0, 1] > 0.3


def test_a_search_ends_below_where_it_started_and_shares_its_checks(pipeline):
    problem = make_problem(pipeline, "instead")
    special = set(pipeline.tokenizer.all_special_ids)
    allowed = torch.tensor([token for token in range(len(problem.layer.weight)) if token not in special])
    budget = PromptSearchConfig(**{**SMALL, "num_steps": 12, "num_candidates": 20, "batch_size": 12})
    with frozen(pipeline):
        results = [search(problem, allowed, budget, number) for number in range(2)]
        checks = problem.draw(budget.num_checks, torch.Generator().manual_seed(budget.seed))
        for number, found in enumerate(results):
            start = start_tokens(problem.speller, allowed, 2, torch.Generator().manual_seed(1 + number))
            first = problem.losses([problem.speller.spell(start), found["words"]], *checks).tolist()
            assert found["loss"] == pytest.approx(first[1], rel=1e-5) and found["loss"] < first[0]
    assert results[0]["plain_loss"] == results[1]["plain_loss"] and results[0]["words"] != results[1]["words"]


def test_the_prompts_asked_are_those_of_the_best_search(pipeline):
    entry, budget = forgotten(), PromptSearchConfig(**SMALL)
    attempt = ATTACKS.find("prompt_search").run(pipeline, entry, budget)
    best = min(attempt.found["searches"], key=lambda found: found["loss"])
    assert attempt.prompts == [f"{best['words']} {prompt}" for prompt in entry.prompts]
    tokens = pipeline.tokenizer(best["words"], add_special_tokens=False).input_ids
    assert len(tokens) == 2 and attempt.num_training_images == 6
    for prompt in attempt.prompts:
        assert pipeline.tokenizer(prompt).input_ids[1:3] == tokens


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_tokens": 17}, "leaves 16, not 17: lower prompt_search.num_tokens"),
        ({"num_images": 9}, "wants 9 held-out images of sneaker, but there are 6"),
    ],
)
def test_checks_before_any_work(pipeline, changes, message):
    with pytest.raises(ValueError, match=message):
        PromptSearchConfig(**changes).check(pipeline, forgotten())
    PromptSearchConfig(num_tokens=16).check(pipeline, forgotten())


def test_settings_and_pipelines_that_are_refused(pipeline):
    with pytest.raises(ValueError, match="prompt_search.num_candidates is 0"):
        PromptSearchConfig(num_candidates=0)
    with pytest.raises(ValueError, match="one embedding layer, but a StableDiffusionXLPipeline has 2 encoders"):
        PromptSearchConfig().check(build("sdxl"), forgotten())
