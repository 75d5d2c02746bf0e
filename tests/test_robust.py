"""Robust training against its definitions (docs/method.md section 8), each computed in the plainest way."""

import io
import itertools
import json
import shutil
from dataclasses import replace

import pipelines
import pytest
import torch
import torch.nn.functional as F
from ddpm_models import Place, make_pipeline
from diffusers import DDIMScheduler, StableDiffusionPipeline
from peft import LoraConfig
from robust_models import Toy
from safetensors.torch import load_file
from short_runs import run_tiny
from torch.utils.data import ConcatDataset, default_collate

from barrier_diffusers import Barrier, BarrierConfig
from barrier_diffusers.data.drawn_latents import DrawnLatentsConfig, with_drawn_latents
from barrier_diffusers.data.encoded_concepts import EncodedConcepts
from barrier_diffusers.data.encoding import EncodedImages, encode_prompts
from barrier_diffusers.models.autoencoders import sample_latents
from barrier_diffusers.models.learned_tokens import learned_tokens
from barrier_diffusers.objectives import ObjectiveConfig, get_objective
from barrier_diffusers.training.relearner import Adam, AddedAdapter, Relearner, adapted_maps
from barrier_diffusers.training.robust import RobustTerms, mix_in_fresh, worst_condition
from barrier_diffusers.training.robust_config import RobustConfig
from barrier_diffusers.training.seeds import one_of, seeded
from barrier_diffusers.training.settled import ErasureGauge
from barrier_diffusers.training.steps import StepMaker
from barrier_diffusers.training.token_adversary import LearningPlan, PromptVocabulary, TokenAdversary
from barrier_diffusers.utils.command_line import config_from, parse_config
from barrier_diffusers.workflow.settings import UnlearnConfig, chosen_objective
from ddpm_ext.diffusion import LABELS, LabelDenoiser, LabelRows
from ddpm_ext.new_rows import LabelVocabulary
from ddpm_ext.settings import UnlearnConfig as LabelUnlearnConfig

META = {"robust.meta_steps": "[1,3]", "robust.meta_learning_rates": "[1e-3,1e-2]", "robust.meta_num_images": 3}
TOKENS = {"robust.token_rounds": 2, "robust.token_interval": 1, "robust.token_num_steps": 2}
TOKENS |= {"robust.token_starts": "[name,random]", "robust.token_batch_size": 2, "robust.meta_token_share": 0.5}
DRAWN = {"retain_latents": "both", "drawn_latents.num": 4, "drawn_latents.num_inference_steps": 2}
ROBUST = {**META, "objective.retain_target": "base", "objective.anchor_target": "base", "trained_weights": "all"}


def test_adam_is_torchs():
    torch.manual_seed(0)
    ours = [torch.randn(3, 2), torch.randn(4)]
    theirs = [value.clone().requires_grad_() for value in ours]
    optimizer, adam = torch.optim.Adam(theirs, lr=0.03), Adam(ours, 0.03)
    for _ in range(4):
        gradients = [torch.randn_like(value) for value in ours]
        for parameter, gradient in zip(theirs, gradients, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
        adam.step(gradients)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other.detach(), rtol=1e-6, atol=1e-7)


def plainly_drawn(toy, config, number):
    """A copy of the network, torch's own Adam for all its weights, the images, and what else is drawn at birth."""
    generator, network = seeded(7, "relearner", number), toy.copy()
    num_steps = one_of(config.meta_steps, generator)
    one_of(["trained"], generator)
    optimizer = torch.optim.Adam(network.parameters(), lr=one_of(config.meta_learning_rates, generator))
    rows = torch.randperm(len(toy.rows), generator=generator)[: config.meta_num_images]
    return network, optimizer, default_collate([toy.rows[int(row)] for row in rows]), num_steps, generator


def plainly_relearned(toy, config, number):
    """A copy of the network after the number-th relearning of all weights."""
    network, optimizer, batch, num_steps, generator = plainly_drawn(toy, config, number)
    plainly_trained(toy, network, optimizer, batch, num_steps=num_steps, generator=generator)
    return network


def plainly_trained(toy, network, optimizer, batch, *, num_steps, generator):
    for _ in range(num_steps):
        drawn = toy.denoiser.noised(batch["moments"], generator)
        loss = F.mse_loss(network(drawn.noisy, drawn.timesteps, **batch["condition"]).sample, drawn.target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def relearner(toy, config):
    return Relearner(config, toy.denoiser, toy.network, parameters=toy.parameters, images=toy.rows, seed=7)


def one_name_learned(toy):
    """An adversary that has learned one name, in one step."""
    config = RobustConfig(token_rounds=1, token_interval=1, token_num_steps=1)
    adversary = TokenAdversary(config, toy.vocabulary(), seed=0)
    adversary.catch_up(1)
    return adversary


def terms_of(toy, config, them=None):
    return RobustTerms(config, get_objective("rl"), predict=toy.predict, parameters=toy.parameters, relearner=them)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_the_gradient_after_relearning_is_added_to_the_one_before(number):
    toy = Toy(anchor_target="base")
    config = RobustConfig(meta_steps=[1, 2, 4], meta_learning_rates=[1e-3, 1e-2], meta_num_images=3, meta_weight=0.5)
    before = [value.detach().clone() for value in toy.parameters]
    terms = RobustTerms(
        config, get_objective("rl"), predict=toy.predict, parameters=toy.parameters, relearner=relearner(toy, config)
    )
    made = toy.step()
    parts = terms(made, step=0, number=number)
    assert all(torch.equal(now, then) for now, then in zip(toy.parameters, before, strict=True))
    sum(parts.values()).backward()

    with torch.no_grad():
        target = toy.network(
            made.noisy, made.timesteps, **made.anchor
        ).sample  # the frozen network is the same one yet
    moved, plain = plainly_relearned(toy, config, number), toy.copy()
    losses = [F.mse_loss(one(made.noisy, made.timesteps, **made.condition).sample, target) for one in (plain, moved)]
    torch.testing.assert_close(parts["objective"], losses[0])
    torch.testing.assert_close(parts["meta"], 0.5 * losses[1], rtol=1e-4, atol=0)
    gradients = [torch.autograd.grad(loss, one.parameters()) for loss, one in zip(losses, (plain, moved), strict=True)]
    largest = max(value.abs().max() for value in gradients[1])
    for parameter, first, second in zip(toy.parameters, *gradients, strict=True):
        torch.testing.assert_close(parameter.grad, first + 0.5 * second, rtol=1e-3, atol=1e-4 * float(largest))


def test_a_relearner_goes_on_from_where_it_was_while_the_weights_move_beneath_it():
    toy = Toy()
    config = RobustConfig(meta_steps=[1, 2, 4], meta_lives=[3], meta_learning_rates=[1e-3, 1e-2], meta_num_images=3)
    them = relearner(toy, config)
    plain, optimizer, batch, first, generator = plainly_drawn(toy, config, 0)
    num_steps = [first]
    torch.manual_seed(0)
    for number in range(3):
        if number:
            generator = seeded(7, "relearner", number)
            num_steps.append(one_of(config.meta_steps, generator))
        plainly_trained(toy, plain, optimizer, batch, num_steps=num_steps[-1], generator=generator)
        before = [value.detach().clone() for value in toy.parameters]
        with them.relearned(number):
            for ours, expected in zip(toy.parameters, plain.parameters(), strict=True):
                torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
        assert all(torch.equal(now, then) for now, then in zip(toy.parameters, before, strict=True))
        with torch.no_grad():  # a training step, which the relearner's copy makes as well
            for ours, theirs in zip(toy.parameters, plain.parameters(), strict=True):
                step = 0.01 * torch.randn_like(ours)
                ours += step
                theirs += step
    assert len(set(num_steps)) > 1 and them.state_dict() == {}
    plain = plainly_relearned(toy, config, 3)  # a new one
    with them.relearned(3):
        for ours, expected in zip(toy.parameters, plain.parameters(), strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("weights", ["trained", "adapter"])
def test_a_relearner_that_lives_on_is_taken_back_from_a_checkpoint(weights):
    toy = Toy()
    config = RobustConfig(
        meta_steps=[2], meta_lives=[4], meta_weights=weights, meta_num_images=3, token_rounds=2, meta_token_share=0.5
    )
    adversary = TokenAdversary(config, toy.vocabulary(), seed=7)
    adversary._add(adversary.vocabulary.learn("name", LearningPlan(0, 1, 2, 1e-2)))

    def attacker():
        them = relearner(toy, config)
        them.adversary = adversary
        return them

    whole, half = attacker(), attacker()
    for number in range(2):
        with whole.relearned(number):
            there = [toy.step().prediction().detach()]
    adversary._add(adversary.vocabulary.learn("random", LearningPlan(0, 1, 2, 1e-2)))  # names for those born later
    half.load_state_dict(torch.load(io.BytesIO(saved(whole)), weights_only=True))
    for number in range(2, 6):  # the last two are met by an attacker of its own
        seen = []
        for them in (whole, half):
            with them.relearned(number):
                seen.append(toy.step().prediction().detach())
        assert torch.equal(*seen)
        there.append(seen[0])
    assert all((one - other).abs().max() > 1e-4 for one, other in itertools.pairwise(there))


def saved(state):
    file = io.BytesIO()
    torch.save(state.state_dict(), file)
    return file.getvalue()


@pytest.mark.parametrize("weights", ["trained", "adapter"])
def test_a_relearner_that_breaks_the_network_is_left_out(weights):
    toy, rates = Toy(anchor_target="base"), {"meta_learning_rates": [1e30], "meta_adapter_learning_rates": [1e30]}
    if weights == "trained":
        del rates["meta_adapter_learning_rates"]
    else:
        del rates["meta_learning_rates"]
    config = RobustConfig(meta_steps=[3], meta_lives=[5], meta_num_images=3, meta_weights=weights, **rates)
    them = relearner(toy, config)
    terms = terms_of(toy, config, them)
    with pytest.warns(UserWarning, match="broke the network"):
        parts = terms(toy.step(), step=0, number=0)
    assert parts["meta"].item() == 0
    assert them.state_dict() == {}  # a new one is met next
    sum(parts.values()).backward()
    expected = [parameter.grad.clone() for parameter in toy.parameters]
    for parameter in toy.parameters:
        parameter.grad = None
    terms_of(toy, RobustConfig())(toy.step(), step=0, number=0)["objective"].backward()
    for wanted, parameter in zip(expected, toy.parameters, strict=True):
        torch.testing.assert_close(parameter.grad, wanted)


def test_a_sharpness_that_breaks_the_network_is_seen():
    toy = Toy(anchor_target="base")
    config = RobustConfig(sharpness=1e30)
    parts = terms_of(toy, config, relearner(toy, config))(toy.step(), step=0, number=0)
    assert not parts["objective"].isfinite()  # so that the run ends, as it does for any loss


def test_no_relearner_in_the_steps_between():
    toy = Toy(anchor_target="base")
    config = RobustConfig(meta_steps=[1], meta_every=2)
    terms = RobustTerms(
        config, get_objective("rl"), predict=toy.predict, parameters=toy.parameters, relearner=relearner(toy, config)
    )
    assert [list(terms(toy.step(), step, step)) for step in range(3)] == [
        ["objective", "meta"],
        ["objective"],
        ["objective", "meta"],
    ]


@pytest.mark.parametrize("targets", [["to_q", "to_out.0"], ["Conv2d", "Linear"]])
def test_an_added_adapter_is_pefts(targets):
    toy = Toy()
    added = AddedAdapter(adapted_maps(toy.network, targets), 2, torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    with torch.no_grad():
        for factor in added.up:
            factor.normal_(std=0.1)
    other = toy.copy()
    names = [linear_map.name for linear_map in added.maps]
    other.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=names))
    for name, down, up in zip(names, added.down, added.up, strict=True):
        layer = other.get_submodule(name)
        layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data = down.detach(), up.detach()
    made = toy.step()
    plain = made.prediction()
    with added.on():
        adapted = made.prediction()
        with added.off():
            torch.testing.assert_close(made.prediction(), plain, rtol=0, atol=0)
    torch.testing.assert_close(adapted, other(made.noisy, made.timesteps, **made.condition).sample)
    torch.testing.assert_close(made.prediction(), plain, rtol=0, atol=0)
    assert (adapted - plain).abs().max() > 1e-3


def test_an_adapters_relearning_moves_no_weight_and_the_frozen_network_goes_without_it():
    toy = Toy(anchor_target="base")
    config = RobustConfig(meta_steps=[3], meta_weights="adapter", meta_adapter_learning_rates=[0.05])
    them = relearner(toy, config)
    made = toy.step()
    target = made.reference_prediction(made.anchor)
    merged = toy.copy()
    with them.relearned(0):
        there = made.prediction()
        loss = F.mse_loss(there, target)
        for linear_map, down, up in zip(them.maps, them._adapter.down, them._adapter.up, strict=True):
            merged.get_submodule(linear_map.name).weight.data += up @ down
        expected = torch.autograd.grad(loss, toy.parameters)
    assert not any(module._forward_hooks for module in toy.network.modules())
    torch.testing.assert_close(there, merged(made.noisy, made.timesteps, **made.condition).sample)
    parts = terms_of(toy, config, them)(made, step=0, number=0)
    torch.testing.assert_close(parts["meta"], loss)
    assert parts["meta"] != parts["objective"]
    found = torch.autograd.grad(parts["meta"], toy.parameters)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_distilled_retention_and_the_frozen_anchor():
    toy = Toy(anchor_target="base")
    base = toy.copy()
    with torch.no_grad():
        for parameter in toy.parameters:
            parameter.add_(0.01 * torch.randn_like(parameter))
    made = toy.step()
    own, anchor = (
        base(made.noisy, made.timesteps, **condition).sample.detach() for condition in (made.condition, made.anchor)
    )
    now = toy.network(made.noisy, made.timesteps, **made.condition).sample
    torch.testing.assert_close(made.distilled_loss(), F.mse_loss(now, own))
    objective = get_objective("rl")
    torch.testing.assert_close(objective.loss_of(made), F.mse_loss(now, anchor))
    drifting = replace(made, options=ObjectiveConfig())
    torch.testing.assert_close(
        objective.loss_of(drifting), F.mse_loss(now, toy.network(made.noisy, made.timesteps, **made.anchor).sample)
    )


def test_the_target_lies_beyond_the_anchor_away_from_what_the_base_answers_to_the_concepts_own_name():
    toy = Toy(anchor_target="base", anchor_eta=0.5)
    base = toy.copy()
    with torch.no_grad():
        for parameter in toy.parameters:
            parameter.add_(0.01 * torch.randn_like(parameter))
    adversary = one_name_learned(toy)
    batch = toy.batch()

    def asked_by(*names):  # a step, and what the base answers to the anchor and to the concept's own name there
        named = adversary.named(batch, torch.tensor(names))
        made = StepMaker(toy.network, toy.denoiser, toy.options, toy.reference)(named)
        answers = [base(made.noisy, made.timesteps, **batch[key]).sample.detach() for key in ("anchor", "condition")]
        return made, *answers

    made, anchor, concept = asked_by(0, 0, 0, 0)
    assert made.named is batch["condition"] and made.condition is not batch["condition"]
    target = anchor + 0.5 * (anchor - concept)
    now = toy.network(made.noisy, made.timesteps, **made.condition).sample
    objective = get_objective("rl")
    torch.testing.assert_close(objective.loss_of(made), F.mse_loss(now, target))
    toy.options.anchor_eta_names = "own"  # one learned name of four, which is steered to the anchor's answer alone
    mixed, anchor, concept = asked_by(-1, -1, 0, -1)
    expected = anchor + 0.5 * (anchor - concept)
    expected[2] = anchor[2]
    answer = toy.network(mixed.noisy, mixed.timesteps, **mixed.condition).sample
    torch.testing.assert_close(objective.loss_of(mixed), F.mse_loss(answer, expected))
    toy.options.anchor_eta_names = "all"
    seen = []
    watched = replace(made, predict=lambda *given: seen.append(given[2]) or toy.predict(*given))
    terms_of(toy, RobustConfig(context_radius=0.3))(watched, step=0, number=0)  # moved contexts aim there as well
    where = toy.network(made.noisy, made.timesteps, **seen[-1]).sample
    assert (where - now).abs().max() > 1e-5
    found = terms_of(toy, RobustConfig(context_radius=0.3))(made, step=0, number=0)["objective"]
    torch.testing.assert_close(found, F.mse_loss(where, target))
    made, told = toy.step(), []  # nor is the frozen network ever asked by a moved name
    watched = replace(made, reference=lambda *given: told.append(given[2]) or made.reference(*given))
    terms_of(toy, RobustConfig(context_radius=0.3))(watched, step=0, number=0)
    assert len(told) == 2 and told[0] is made.anchor and told[1] is made.condition


PLAN = LearningPlan(seed=3, num_steps=40, batch_size=8, learning_rate=0.05)


def loss_of_names(toy, condition):
    """The denoising loss of all rows by these conditions (12, ...), at fixed noise."""
    made = toy.step(range(12))
    return replace(made, condition=condition).ordinary_loss().item()


@pytest.mark.parametrize("start", ["name", "random", "a bag"])
def test_a_learned_token_lowers_the_loss_and_leaves_everything_as_it_was(start):
    toy, names = Toy(), []
    before = [value.clone() for value in [*toy.parameters, *toy.pipeline.text_encoder.parameters()]]
    vocabulary = toy.vocabulary()
    for num_steps in (0, 40):
        vectors = vocabulary.learn(start, replace(PLAN, num_steps=num_steps))
        table = vocabulary.conditions(vectors)
        names.append({key: value[vocabulary.row_ids] for key, value in table.items()})
    assert loss_of_names(toy, names[1]) < 0.999 * loss_of_names(toy, names[0])
    now = [*toy.parameters, *toy.pipeline.text_encoder.parameters()]
    assert all(torch.equal(one, other) for one, other in zip(now, before, strict=True))
    assert all(value.requires_grad for value in toy.parameters) and toy.network.training


def test_a_token_of_its_own_for_each_of_several_concepts():
    toy = Toy()
    captions = ["a photo of a boot", "a red sneaker"] * 6
    vocabulary = PromptVocabulary(
        toy.pipeline, toy.rows.moments, captions=captions, concepts=["boot", "sneaker"] * 6, count=2
    )
    vectors = vocabulary.learn("name", replace(PLAN, num_steps=2))
    assert {name: [tuple(one.shape) for one in value] for name, value in vectors.items()} == {
        "boot": [(2, 8)],
        "sneaker": [(2, 8)],
    }
    table = vocabulary.conditions(vectors)["encoder_hidden_states"]
    for concept, caption, row in (("boot", "a photo of a {}", 0), ("sneaker", "a red {}", 1)):
        with torch.no_grad(), learned_tokens(toy.pipeline, "bag", 2) as new:
            new.parameters[0].copy_(vectors[concept][0])
            alone = encode_prompts(toy.pipeline, [caption.format(new.words)])["encoder_hidden_states"][0]
        torch.testing.assert_close(table[vocabulary.row_ids[row]], alone)
    with pytest.raises(ValueError, match="no token can stand in its place"):
        PromptVocabulary(toy.pipeline, toy.rows.moments, captions=["a shoe"] * 12, concepts=["boot"] * 12)


def test_forget_prompts_have_the_name_or_a_learned_token():
    toy = Toy()
    config = RobustConfig(token_rounds=2, token_interval=5, token_num_steps=2, token_share=0.5)
    adversary = TokenAdversary(config, toy.vocabulary(), seed=0)
    assert adversary.exchange(toy.batch(), 0)["condition"] is not None and not adversary.tables
    learned = []
    for step in range(14):
        adversary.catch_up(step)
        learned.append(len(adversary.tables))
    assert learned == [0] * 5 + [1] * 5 + [2] * 4
    own = {row: toy.rows[row]["condition"]["encoder_hidden_states"] for row in range(12)}
    tokens = [table["encoder_hidden_states"] for table in adversary.tables]
    seen = torch.zeros(3)
    for number in range(40):
        rows = [(number + place) % 12 for place in range(4)]
        asked = adversary.exchange(toy.batch(rows), number)["condition"]["encoder_hidden_states"]
        for row, value in zip(rows, asked, strict=True):
            known = [own[row], *(table[adversary.vocabulary.row_ids[row]] for table in tokens)]
            matches = [torch.equal(value, one) for one in known]
            assert sum(matches) == 1
            seen[matches.index(True)] += 1
    assert 60 < seen[0] < 100 and (seen[1:] > 20).all()

    again = TokenAdversary(config, toy.vocabulary(), seed=0)
    again.load_state_dict(adversary.state_dict())
    halves = [TokenAdversary(config, toy.vocabulary(), seed=0, share=(process, 2)) for process in range(2)]
    whole = adversary.exchange(toy.batch(range(6)), 7)["condition"]["encoder_hidden_states"]
    parts = []
    for half, rows in zip(halves, (range(3), range(3, 6)), strict=True):
        half.load_state_dict(adversary.state_dict())
        parts.append(half.exchange(toy.batch(rows), 7)["condition"]["encoder_hidden_states"])
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(again.exchange(toy.batch(range(6)), 7)["condition"]["encoder_hidden_states"], whole)


def test_sharpness_takes_the_gradient_a_step_towards_the_forget_images():
    toy = Toy(anchor_target="base")
    config = RobustConfig(sharpness=0.3, meta_num_images=3)
    made, plain, generator = toy.step(), toy.copy(), seeded(7, "sharpness", 4)
    before = [value.detach().clone() for value in toy.parameters]
    terms = RobustTerms(
        config, get_objective("rl"), predict=toy.predict, parameters=toy.parameters, relearner=relearner(toy, config)
    )
    terms(made, step=0, number=4)["objective"].backward()
    assert all(torch.equal(now, then) for now, then in zip(toy.parameters, before, strict=True))

    rows = torch.randperm(len(toy.rows), generator=generator)[:3]
    batch = toy.batch(rows.tolist())
    drawn = toy.denoiser.noised(batch["moments"], generator)
    loss = F.mse_loss(plain(drawn.noisy, drawn.timesteps, **batch["condition"]).sample, drawn.target)
    way = torch.autograd.grad(loss, plain.parameters())
    length = torch.cat([value.flatten() for value in way]).norm()
    with torch.no_grad():
        for parameter, value in zip(plain.parameters(), way, strict=True):
            parameter.sub_(0.3 * value / length)
    target = toy.network(made.noisy, made.timesteps, **made.anchor).sample.detach()
    expected = torch.autograd.grad(
        F.mse_loss(plain(made.noisy, made.timesteps, **made.condition).sample, target), plain.parameters()
    )
    for parameter, gradient in zip(toy.parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-6)


def test_a_context_is_moved_against_the_objective_and_no_further_than_its_radius():
    toy = Toy(anchor_target="base")
    with torch.no_grad():
        for parameter in toy.parameters:
            parameter.add_(0.02 * torch.randn_like(parameter))
    made, objective = toy.step(), get_objective("rl")
    moved = worst_condition(objective, made, 0.2)["encoder_hidden_states"]
    own = made.condition["encoder_hidden_states"]
    lengths = (moved - own).norm(dim=-1) / own.norm(dim=-1)
    assert lengths.max() <= 0.2 + 1e-6 and lengths.max() > 0.15
    worse = objective.loss_of(replace(made, condition={"encoder_hidden_states": moved}))
    assert worse > objective.loss_of(made)
    terms = terms_of(toy, RobustConfig(context_radius=0.2))
    torch.testing.assert_close(terms(made, 0, 0)["objective"], worse)
    with pytest.raises(ValueError, match="the model reads none"):
        worst_condition(objective, replace(made, condition={"class_labels": torch.zeros(4).long()}), 0.2)


def test_the_erasing_gradient_does_not_point_against_the_retain_loss():
    toy = Toy(anchor_target="base")
    with torch.no_grad():
        for parameter in toy.parameters:
            parameter.add_(0.02 * torch.randn_like(parameter))
    made = toy.step()
    config = RobustConfig(project_conflicts=True)
    terms = terms_of(toy, config)

    def gradient(loss):
        return torch.cat([value.flatten() for value in torch.autograd.grad(loss, toy.parameters, retain_graph=True)])

    for sign in (1, -1):  # the same loss kept or fought against
        erasing, keeping = terms(made, 0, 0)["objective"], sign * made.distilled_loss()
        forget, retain = gradient(erasing), gradient(keeping)
        product = forget @ retain
        expected = forget - product / (retain @ retain) * retain if product < 0 else forget
        parts = terms.reconciled({"objective": erasing, "retain": keeping})
        torch.testing.assert_close(parts["objective"], erasing)
        torch.testing.assert_close(parts["retain"], keeping)
        found = gradient(sum(parts.values()))
        torch.testing.assert_close(found, expected + retain, rtol=1e-4, atol=1e-6)
        assert (product < 0) == (sign == (-1 if gradient(made.distilled_loss()) @ forget > 0 else 1))


def test_a_share_of_the_weights_is_fresh():
    toy = Toy()
    before = toy.copy()
    state = torch.get_rng_state()
    mix_in_fresh(toy.network, toy.parameters[2:], 0.25, seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)
    fresh = type(toy.network).from_config(toy.network.config)
    for number, (now, then, new) in enumerate(
        zip(toy.parameters, before.parameters(), fresh.parameters(), strict=True)
    ):
        torch.testing.assert_close(now, 0.75 * then + 0.25 * new if number >= 2 else then)


def test_a_run_that_did_not_erase_says_so(capsys):
    toy = Toy(anchor_target="base")
    maker = StepMaker(toy.network, toy.denoiser, toy.options, toy.reference)
    gauge = ErasureGauge(get_objective("rl"), maker, toy.rows, device=torch.device("cpu"), seed=0)
    gauge.measure_before()
    state = torch.get_rng_state()
    result = gauge.result(None)
    assert result == {"loss_before": gauge.before, "loss_after": gauge.before, "token_losses": [], "unsettled": 1}
    assert "warning: not erased: of 1 names" in capsys.readouterr().err
    assert torch.equal(torch.get_rng_state(), state)
    adversary = one_name_learned(toy)
    with torch.no_grad():  # a network that reads no prompt answers every one like the anchor
        for layer in (one for one in toy.network.modules() if isinstance(one, torch.nn.Linear)):
            if layer.in_features == toy.network.config.cross_attention_dim:
                layer.weight.zero_()
    toy.options.anchor_target = "network"
    result = gauge.result(adversary)
    assert result["unsettled"] == 0 and len(result["token_losses"]) == 1 and max(result["token_losses"]) < 1e-6
    assert "warning" not in capsys.readouterr().err


def test_latents_that_the_base_draws_stand_for_retain_images(tmp_path):
    toy = Toy()
    toy.network.eval()
    ids = torch.tensor([2, 0])
    retain = EncodedImages(None, ids, None, toy.rows.embeddings)
    config = DrawnLatentsConfig(num=6, num_inference_steps=3, guidance_scales=[1.0, 2.0])
    settings = {"pipeline": toy.pipeline, "resolution": 32, "cache": tmp_path, "base_hash": "a"}
    drawn = with_drawn_latents(retain, config, **settings)
    assert drawn.caption_ids.tolist() == [0, 2, 0, 2, 0, 2] and drawn.moments.shape == (6, 8, 8, 8)
    noise = torch.randn(6, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    scheduler = DDIMScheduler.from_config(toy.pipeline.scheduler.config, clip_sample=False)
    empty = encode_prompts(toy.pipeline, [""])["encoder_hidden_states"]
    for row, scale in ((0, 1.0), (3, 2.0)):
        scheduler.set_timesteps(3)
        x, prompt = noise[row : row + 1], retain.condition(drawn.caption_ids[row : row + 1])["encoder_hidden_states"]
        for timestep in scheduler.timesteps:
            with torch.no_grad():
                guided, bare = (toy.network(x, timestep, text).sample for text in (prompt, empty))
            x = scheduler.step(bare + scale * (guided - bare), timestep, x).prev_sample
        latents = sample_latents(drawn.moments[row : row + 1], toy.denoiser.scale, shift=toy.denoiser.shift)
        torch.testing.assert_close(latents, x, rtol=1e-3, atol=1e-4)
    with torch.no_grad():
        toy.parameters[0].zero_()
    again = with_drawn_latents(retain, config, **settings)
    assert torch.equal(again.moments, drawn.moments)  # out of the cache
    both = with_drawn_latents(replace(retain, moments=toy.rows.moments[:2]), config, **settings)
    assert len(both) == 8
    for row, expected in enumerate([*toy.rows.moments[:2], *drawn.moments]):
        assert torch.equal(both[row]["moments"], expected)
        own = both[row]["condition"]["encoder_hidden_states"]
        assert torch.equal(own, toy.rows.embeddings["encoder_hidden_states"][[2, 0, 0, 2, 0, 2, 0, 2][row]])


def batches(toy):
    made = [toy.step(range(6)), toy.step(range(6, 12))]
    return [(one.noisy, one.timesteps, one.condition) for one in made]


def forward(network, batch):
    return network(batch[0], batch[1], **batch[2]).sample


def test_all_weights_train_while_the_targets_are_protected(tmp_path):
    toy = Toy()
    before = toy.copy()
    config = BarrierConfig(targets=["attn2.to_k"], reduced_dim=2)
    barrier = Barrier(toy.network, config, trained_weights="all")
    assert set(barrier.trainable_parameters()) == set(toy.parameters)
    barrier.setup_protection(batches(toy), forward)
    assert all(parameter.requires_grad for parameter in toy.parameters)
    with torch.no_grad():
        for parameter in toy.parameters:
            parameter.add_(0.05)
    batch = batches(toy)[0]
    trained = forward(toy.network, batch)
    barrier.save_pretrained(tmp_path)
    for one in (barrier, Barrier.from_pretrained(tmp_path, toy.network, "all")):
        with one.snapshot_weights():
            torch.testing.assert_close(forward(toy.network, batch), forward(before, batch), rtol=0, atol=0)
        torch.testing.assert_close(forward(toy.network, batch), trained, rtol=0, atol=0)
    barrier.remove()
    targets_alone = Barrier(pipelines.build("sd").unet, config)
    targets_alone.setup_protection(batches(toy), forward)
    targets_alone.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="it was made while the targets trained"):
        Barrier.from_pretrained(tmp_path / "other", toy.network, "all")


def test_a_projection_holds_the_biases_of_its_maps():
    toy = Toy()
    barrier = Barrier(toy.network, BarrierConfig(targets=["Linear"], constraint="projection"), trained_weights="all")
    held = {id(one.bias) for one in barrier.maps if one.bias is not None}
    assert {id(one) for one in barrier.trainable_parameters()} == {id(one) for one in toy.parameters} - held


def test_training_goes_on_until_it_has_erased(tmp_path, capsys):
    pipelines.build("sd").save_pretrained(tmp_path / "base")
    more = {"robust.extra_steps": 5, "robust.token_interval": 2, "checkpointing_steps": 1}
    unanchored = {**more, "objective.name": "ga", "objective.anchor": "null"}
    erased = run_tiny(tmp_path / "base", tmp_path / "ga", **unanchored)
    assert erased["num_steps"] == 2 and erased["erased"]["unsettled"] == 0
    assert "not erased" not in capsys.readouterr().err
    slow = {**more, "learning_rate": 1e-7}
    never = run_tiny(tmp_path / "base", tmp_path / "rl", **slow)
    assert never["num_steps"] == 7 and never["erased"]["unsettled"] == 1
    assert "warning: not erased" in capsys.readouterr().err
    whole = load_file(tmp_path / "rl/unet/diffusion_pytorch_model.safetensors")
    again = run_tiny(tmp_path / "base", tmp_path / "rl", **slow, resume_from_checkpoint="step-5")
    assert again["num_steps"] == 7 and again["history"] == never["history"]
    for name, value in load_file(tmp_path / "rl/unet/diffusion_pytorch_model.safetensors").items():
        assert torch.equal(value, whole[name])
    # a run that was done early is not gone on with
    resumed = run_tiny(tmp_path / "base", tmp_path / "ga", **unanchored, resume_from_checkpoint="latest")
    assert resumed["num_steps"] == 2 and resumed["history"] == erased["history"]


CONTRADICTIONS = {
    "a last step that is not the last": (
        {"lr_scheduler": "cosine", "robust": {"extra_steps": 10}},
        "lr_scheduler cosine ends there",
    ),
    "fresh weights and a bound": (
        {"objective": {"retain_target": "base", "alpha": 1.0}, "robust": {"fresh_share": 0.5}},
        "where the protection would hold them",
    ),
    "fresh weights that nobody teaches": ({"robust": {"fresh_share": 0.5}}, "that the base has to teach"),
    "no loss to conflict with": ({"robust": {"project_conflicts": True}}, "robust.project_conflicts needs a retain"),
    "a fresh adapter": (
        {
            "objective": {"retain_target": "base", "alpha": 1.0},
            "robust": {"fresh_share": 0.5},
            "barrier": {"lambda_interval": 0},
            "rank": 2,
        },
        "robust.fresh_share is for the weights themselves",
    ),
    "tokens that are not learned": ({"robust": {"meta_token_share": 0.5}}, "needs robust.meta_steps and robust.token"),
    "latents that nobody reads": ({"retain_latents": "drawn"}, "retain_latents is drawn, but nothing reads"),
    "captions that nobody reads": ({"caption_dropout": 0.1}, "caption_dropout is 0.1, but nothing reads"),
    "a distillation of nothing": ({"objective": {"retain_target": "base"}}, "objective.alpha is 0"),
    "all weights and an adapter": ({"trained_weights": "all", "rank": 2}, "set rank to 0"),
    "a mask": (
        {"saliency_mask": 0.5, "robust": {"meta_steps": [1]}},
        "would hold what robust.meta_steps moves as well",
    ),
    "a compiled network": (
        {"compile": True, "robust": {"meta_steps": [1], "meta_weights": "adapter"}},
        "set robust.meta_weights to trained",
    ),
    "a part's setting without the part": (
        {"robust": {"token_count": 2}},
        "robust.token_count is set, but nothing reads it: it is for robust.token_rounds, which is off",
    ),
    "a setting that another part reads": (
        {"robust": {"meta_num_images": 3, "sharpness": 0.1, "meta_every": 2}},
        "robust.meta_every is set, but nothing reads it",
    ),
    "how often nothing happens": ({"robust": {"meta_every": 5}}, "for robust.meta_steps, which is off"),
    "an adapter that nobody has": (
        {"robust": {"meta_steps": [1], "meta_adapter_rank": 4}},
        "robust.meta_adapter_rank is set, but nothing reads it: robust.meta_weights is 'trained'",
    ),
    "rates of the other kind": (
        {"robust": {"meta_steps": [1], "meta_weights": "adapter", "meta_learning_rates": [0.1]}},
        "robust.meta_learning_rates is set, but nothing reads it",
    ),
    "tokens after the end": (
        {"robust": {"token_rounds": 2}, "max_train_steps": 100},
        "the last of robust.token_rounds is after step 120, but the run has 100",
    ),
    "no rate": ({"robust": {"meta_learning_rates": []}}, "robust.meta_learning_rates is empty"),
    "no step": ({"robust": {"meta_steps": [0]}}, "robust.meta_steps is 0, but must be at least 1"),
    "no training": (
        {
            "objective": {"name": "uce", "anchor_prompt": "a sneaker"},
            "barrier": {"lambda_interval": 0},
            "robust": {"meta_steps": [1]},
        },
        "leave robust.meta_steps at its default",
    ),
    "beyond the anchor's answer of a network that forgets": (
        {"objective": {"anchor_eta": 1.0}},
        "set objective.anchor_target to base",
    ),
    "beyond for nobody": (
        {"objective": {"anchor_target": "base", "anchor_eta_names": "own"}, "robust": {"token_rounds": 1}},
        "but objective.anchor_eta is 0: set it",
    ),
    "names that nobody learns": (
        {"objective": {"anchor_target": "base", "anchor_eta": 1.0, "anchor_eta_names": "own"}},
        "but no names are learned: set robust.token_rounds",
    ),
    "beyond what another objective aims at": (
        {"objective": {"name": "ga", "anchor_eta": 1.0}},
        "objective 'ga' does not read objective.anchor_eta",
    ),
    "a setting of another objective": (
        {"objective": {"name": "ga", "anchor_target": "base"}},
        "does not read objective.anchor_target",
    ),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_contradictions_are_refused_in_one_message(name, tmp_path):
    changes, message = CONTRADICTIONS[name]
    values = {"pretrained_model_name_or_path": "assets/fashion_sd", "concept": "boot", "retain_prompts": ["a sneaker"]}
    with pytest.raises(ValueError) as caught:
        chosen_objective(config_from(UnlearnConfig, {**values, "output_dir": str(tmp_path / "run"), **changes}))
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    pipelines.build("sd").save_pretrained(folder)
    return folder


def test_a_resumed_run_ends_with_the_same_bits(source, tmp_path):
    settings = {**ROBUST, "barrier.targets": "[Linear]", "max_train_steps": 4, "checkpointing_steps": 2}
    settings |= {"cache_dir": tmp_path / "cache", "gradient_accumulation_steps": 2, **TOKENS, **DRAWN}
    settings |= {"robust.context_radius": 0.1, "robust.token_interval": 1, "robust.sharpness": 0.01}
    settings |= {"caption_dropout": 0.3, "objective.anchor_eta": 0.5}
    settings |= {"robust.meta_lives": "[3]", "robust.meta_weights": "either"}  # step 2 is in the second one's life
    whole = run_tiny(source, tmp_path / "whole", **settings)
    assert set(whole["history"]) == {"objective", "retain", "protection", "meta"} and min(whole["history"]["meta"]) > 0
    shutil.copytree(tmp_path / "whole" / "checkpoints", tmp_path / "half" / "checkpoints")
    half = run_tiny(source, tmp_path / "half", resume_from_checkpoint="step-2", **settings)
    assert half["hashes"] == whole["hashes"] and half["history"] == whole["history"]


def test_what_guidance_subtracts_is_kept_where_captions_are_dropped(tmp_path):
    base, source = pipelines.build("sd"), tmp_path / "base"
    with torch.no_grad():  # a network that heeds its prompt
        for name, parameter in base.unet.named_parameters():
            if "attn2.to_v" in name or "attn2.to_out" in name:
                parameter.mul_(10)
    base.save_pretrained(source)
    settings = {"trained_weights": "all", "objective.alpha": 10.0, "objective.retain_target": "base"}
    settings |= {"max_train_steps": 40, "learning_rate": 1e-3, "cache_dir": tmp_path / "cache", **DRAWN}
    generator = torch.Generator().manual_seed(0)
    noisy, timesteps = torch.randn(8, 4, 4, 4, generator=generator), torch.arange(800, 960, 20)
    empty = encode_prompts(base, [""])["encoder_hidden_states"].expand(8, -1, -1)

    @torch.no_grad()
    def answer(folder):
        network = StableDiffusionPipeline.from_pretrained(folder).unet
        return network(noisy, timesteps, encoder_hidden_states=empty).sample

    moved = {}
    for share in (0.0, 0.5):
        run_tiny(source, tmp_path / "run", caption_dropout=share, **settings, overwrite_output_dir=True)
        moved[share] = float((answer(tmp_path / "run") - answer(source)).square().mean())
    assert moved[0.5] < 0.5 * moved[0.0]


def test_the_same_retain_rows_are_asked_with_the_empty_prompt():
    toy = Toy()
    captions = torch.arange(400) % 3
    embeddings = {key: torch.cat([value, 7 + value[:1]]) for key, value in toy.rows.embeddings.items()}

    def dropped(share, seed=5):
        rows = EncodedImages(None, captions, None, embeddings)
        drawn = replace(rows, caption_ids=captions.flip(0))
        them = EncodedConcepts(toy.rows, ConcatDataset([rows, drawn]), empty_id=3)
        them.drop_captions(share, seed)
        assert them.forget is toy.rows
        return them.retain

    first, again, other = dropped(0.2), dropped(0.2), dropped(0.2, seed=6)
    ids = [torch.cat([part.caption_ids for part in one.datasets]) for one in (first, again, other)]
    assert torch.equal(ids[0], ids[1]) and not torch.equal(ids[0], ids[2])
    empty = ids[0] == 3
    assert 120 < int(empty.sum()) < 200  # of 800
    assert torch.equal(ids[0][~empty], torch.cat([captions, captions.flip(0)])[~empty])
    row = int(empty.nonzero()[0])
    assert torch.equal(first[row]["condition"]["encoder_hidden_states"], embeddings["encoder_hidden_states"][3])


@pytest.mark.parametrize("name", ["ga", "kl", "esd", "concept"])
@pytest.mark.parametrize("rank", [0, 2])
def test_every_objective_with_weights_and_with_an_adapter(name, rank, source, tmp_path):
    settings = {**META, "objective.name": name, "rank": rank, "objective.anchor": "null", "objective.alpha": 1.0}
    settings |= {"objective.retain_target": "base", "robust.meta_weights": "either", "cache_dir": tmp_path / "cache"}
    settings |= {**TOKENS, **DRAWN, "retain_latents": "drawn"}
    if name == "concept":
        settings |= {"objective.anchor": "sneaker", "objective.anchor_target": "base"}
    if name == "esd":
        settings |= {"objective.num_inference_steps": 2}
    made = run_tiny(source, tmp_path / "run", max_train_steps=3, **settings)
    history = made["history"]
    assert len(made["erased"]["token_losses"]) == 2
    assert (tmp_path / "run" / "merged" / "model_index.json").is_file() == (rank > 0)  # an adapter can be taken off
    assert all(abs(value) > 0 for value in history["meta"]) and history["retain"][0] < history["retain"][-1]


def test_the_label_model_trains_so_too(tmp_path):
    place = Place(tmp_path)
    settings = {**ROBUST, "objective.alpha": 1.0, "barrier.targets": "[to_q]", "learning_rate": 1e-2}
    settings |= {**TOKENS, "robust.token_starts": "[coat,random]", "checkpointing_steps": 2}
    metrics, whole = place.unlearn(tmp_path / "run", **settings)
    assert metrics["num_trainable"] == metrics["num_parameters"] and len(metrics["erased"]["token_losses"]) == 2
    assert min(json.loads((tmp_path / "run" / "manifest.json").read_text())["history"]["meta"]) > 0
    shutil.copytree(tmp_path / "run" / "checkpoints", tmp_path / "half" / "checkpoints")
    _, half = place.unlearn(tmp_path / "half", **settings, resume_from_checkpoint="step-2")
    for (name, one), other in zip(whole.named_parameters(), half.parameters(), strict=True):
        assert torch.equal(one, other), name
    for changes, message in (
        ({"robust.context_radius": 0.1}, "labels have none"),
        ({"robust.token_count": 2}, "a label is one row"),
        ({"robust.token_starts": "[shoe]"}, "robust.token_starts names 'shoe'"),
    ):
        with pytest.raises(ValueError, match=message):
            words = place.unlearn_words(tmp_path / "refused", **{**settings, **changes})
            parse_config(LabelUnlearnConfig, words).check_inputs()


def test_a_new_row_of_the_label_table_is_learned_and_no_weight_moves():
    pipeline = make_pipeline()
    denoiser, table = LabelDenoiser(pipeline), pipeline.unet.class_embedding
    generator = torch.Generator().manual_seed(0)
    rows = LabelRows(
        torch.tensor([1, 2] * 4), torch.randint(0, 256, (8, 1, 8, 8), dtype=torch.uint8, generator=generator)
    )
    before = [value.clone() for value in pipeline.unet.parameters()]
    drawn = denoiser.noised(rows.images, torch.Generator().manual_seed(1))

    def answer(condition):
        return denoiser.predict(pipeline.unet, drawn.noisy, drawn.timesteps, condition).detach()

    plain = answer({LABELS: rows.labels})
    vocabulary = LabelVocabulary(pipeline, rows)
    vectors = vocabulary.learn("name", replace(PLAN, num_steps=1))
    assert all(torch.equal(one, other) for one, other in zip(pipeline.unet.parameters(), before, strict=True))
    for label, name in ((1, "boot"), (2, "coat")):  # the first step of Adam is the sign of the gradient
        generator = torch.Generator().manual_seed(PLAN.seed)
        images = rows.images[rows.labels == label]
        made = denoiser.noised(images[torch.randint(4, (8,), generator=generator)], generator)
        prediction = denoiser.predict(pipeline.unet, made.noisy, made.timesteps, {LABELS: torch.full((8,), label)})
        (gradient,) = torch.autograd.grad(F.mse_loss(prediction, made.target), table.weight)
        expected = table.weight[label].detach() - PLAN.learning_rate * gradient[label].sign()
        torch.testing.assert_close(vectors[name][0], expected, rtol=1e-3, atol=1e-4)
    numbers = vocabulary.conditions(vectors)[LABELS]
    by_number = answer({LABELS: numbers[vocabulary.row_ids]})
    torch.testing.assert_close(answer({LABELS: rows.labels}), plain, rtol=0, atol=0)
    with torch.no_grad():
        table.weight[1], table.weight[2] = vectors["boot"][0], vectors["coat"][0]
    torch.testing.assert_close(by_number, answer({LABELS: rows.labels}))
    assert (by_number - plain).abs().max() > 1e-3 and pipeline.unet.class_embedding is table
    vocabulary.remove()
    assert not table._forward_hooks and not table._forward_pre_hooks
