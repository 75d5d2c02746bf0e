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
    ordinary_tokens,
    readers,
    search,
    start_tokens,
    templates,
)
from barrier_diffusers.models.learned_tokens import embeddings_of

SMALL = {"num_steps": 2, "batch_size": 3, "num_tokens": 2, "num_candidates": 4, "num_ranked": 30, "num_checks": 4}


@pytest.fixture(scope="module")
def pipeline():
    return build("sd")


def make_problem(pipeline, place="before", forward_batch=128, which=0):
    entry = forgotten()
    frames = templates(entry.images["text"], entry.concept, place)
    moments = encode(pipeline, entry.images, 32)
    return Search(pipeline, entry.images["text"], frames, readers(pipeline, frames)[which], moments, forward_batch)


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
    assert speller.room == tokenizer.model_max_length - 2 - 3
    found = typeable(speller, tokenizer)
    assert 100 < len(found) < len(tokenizer)
    for words, tokens in list(found.items())[::20]:
        assert tokenizer(f"a blue {words}").input_ids[3:-1] == list(tokens)


ENCODERS = {
    "sd": [0],
    "sdxl": [0, 1],
    "sd3": [0, 2],
    "flux": [1],
    "pixart_sigma": [0],
    "sana": [0],
    "flux2_klein": [0],
}
READERS = [pytest.param(name, which, id=f"{name}-{which}") for name, numbers in ENCODERS.items() for which in numbers]


@pytest.mark.parametrize("place", ["before", "instead"])
@pytest.mark.parametrize(("name", "which"), READERS)
def test_slopes_are_the_derivative_of_the_loss(name, which, place):
    """Of the words' embeddings in any text encoder, wherever its tokenizer and the pipeline's own words put them."""
    pipeline = build(name)
    problem = make_problem(pipeline, place, which=which)
    reader = problem.reader

    def hooks():
        return [len(layer._forward_hooks) for _, _, layer in embeddings_of(reader.encoder)]

    before = hooks()
    tokens = tuple(reader.speller.tokenizer("red bag", add_special_tokens=False).input_ids)
    batch = problem.draw(6, torch.Generator().manual_seed(0))
    weight = reader.weight_VD
    with frozen(pipeline):
        slopes = problem.slopes("red bag", tokens, *batch)
        assert slopes.shape == (len(tokens), len(weight)) and slopes.abs().max() > 0
        now = slopes[torch.arange(len(tokens)), list(tokens)]
        torch.testing.assert_close(now, torch.zeros(len(tokens)), atol=1e-6, rtol=0)
        place_, token = divmod(int(slopes.abs().argmax()), slopes.shape[1])
        change = torch.zeros(len(tokens), weight.shape[1])
        change[place_] = 0.02 * (weight[token] - weight[tokens[place_]])
        ends = []
        for sign in (1, -1):
            with nudged(reader.encoder, tokens, sign * change):
                ends.append(problem.losses(["red bag"], *batch).double().item())
    assert (ends[0] - ends[1]) / 0.04 == pytest.approx(slopes[place_, token].item(), rel=0.05)
    assert hooks() == before


def test_a_text_without_the_words_is_read_as_ever(pipeline):
    encoder, tokenizer = pipeline.text_encoder, pipeline.tokenizer
    texts = ["a red bag and a red bag", "a bag", "red"]
    ids = tokenizer(texts, padding="max_length", return_tensors="pt").input_ids
    tokens = tuple(tokenizer("red bag", add_special_tokens=False).input_ids)
    layer, nudge = encoder.get_input_embeddings(), torch.ones(2, encoder.get_input_embeddings().weight.shape[1])
    before = layer(ids)
    with nudged(encoder, tokens, nudge):
        moved = layer(ids) - before
    assert moved[0].nonzero()[:, 0].unique().tolist() == [2, 3] and not moved[1:].any()


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
    allowed = ordinary_tokens(problem.reader)
    budget = PromptSearchConfig(**{**SMALL, "num_steps": 12, "num_candidates": 20, "batch_size": 12})
    with frozen(pipeline):
        results = [search(problem, budget, number) for number in range(2)]
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


@pytest.mark.parametrize(
    ("name", "encoders"), [("sdxl", ["text_encoder", "text_encoder_2"]), ("sana", ["text_encoder"])]
)
def test_searches_take_the_tokens_of_every_encoder_in_turn(name, encoders):
    pipeline, budget = build(name), PromptSearchConfig(**{**SMALL, "num_searches": 3, "num_tokens": 1})
    budget.check(pipeline, forgotten())
    searches = ATTACKS.find("prompt_search").run(pipeline, forgotten(), budget).found["searches"]
    assert [found["tokens_of"] for found in searches] == [encoders[number % len(encoders)] for number in range(3)]
    for number, found in enumerate(searches):
        speller = readers(pipeline, [GAP])[number % len(encoders)].speller
        assert len(speller.tokenizer(found["words"], add_special_tokens=False).input_ids) == 1
    if len(encoders) > 1:  # as the losses are of all encoders together, they can be compared
        assert len({found["plain_loss"] for found in searches}) == 1


def test_settings_that_are_refused():
    with pytest.raises(ValueError, match="prompt_search.num_candidates is 0"):
        PromptSearchConfig(num_candidates=0)
