"""Membership inference: the attack's numbers, its losses, and that it finds what a generator learned by heart."""

import numpy as np
import pytest
import torch
from forgotten_images import pictures
from pipelines import build
from short_evaluations import evaluate, twin_of_base
from short_runs import ROOT
from sklearn.metrics import roc_auc_score

from barrier_diffusers.data.concepts import ConceptConfig
from barrier_diffusers.evaluation.erasure import ImageEvaluationConfig
from barrier_diffusers.evaluation.membership import (
    MembershipConfig,
    attack,
    denoising_losses,
    found_at,
    member_below,
    membership_images,
    resample,
    with_interval,
)
from barrier_diffusers.models.denoiser import PipelineDenoiser

QUICK = MembershipConfig(num_timesteps=4, num_noises=1, num_resamples=200)
IMAGES = str(ROOT / "assets/fashion_images")


def pixels_of(rows):
    return torch.stack([torch.from_numpy(np.array(row["image"])).permute(2, 0, 1) / 127.5 - 1 for row in rows])


def test_the_area_is_the_areas_usual_value():
    random = np.random.default_rng(0)
    members, others = random.normal(0, 1, 40).round(1), random.normal(0.5, 1, 60).round(1)  # with ties
    truth = roc_auc_score([1] * 40 + [0] * 60, -np.concatenate([members, others]))
    losses = {"after": (torch.from_numpy(members), torch.from_numpy(others))}
    found = attack(losses, MembershipConfig(num_resamples=500))["after"]["auc"]
    assert found["value"] == pytest.approx(truth, abs=1e-4)
    low, high = found["interval_95"]
    assert low < truth < high and 0.15 < high - low < 0.3
    apart = {"after": (torch.from_numpy(others - 9), torch.from_numpy(others))}
    found = attack(apart, MembershipConfig(num_resamples=50))
    assert found["after"]["auc"] == {"value": 1.0, "interval_95": [1.0, 1.0]} and "change" not in found


def test_the_change_is_a_paired_difference():
    random = np.random.default_rng(3)
    members, others = random.normal(0, 1, 80), random.normal(0.8, 1, 80)
    before = (torch.from_numpy(members), torch.from_numpy(others))
    nearly = (before[0] + 0.01 * torch.from_numpy(random.normal(0, 1, 80)), before[1])
    options = MembershipConfig(num_resamples=500)
    same = attack({"before": before, "after": before}, options)["change"]["auc"]
    assert same == {"value": 0.0, "interval_95": [0.0, 0.0]}
    found = attack({"before": before, "after": nearly}, options)
    low, high = found["change"]["auc"]["interval_95"]
    assert high - low < 0.02 < 0.1 < np.diff(found["after"]["auc"]["interval_95"])  # narrower than two apart would be
    hidden = attack({"before": before, "after": (before[1], before[1])}, options)["change"]["auc"]
    assert hidden["value"] < -0.1 and hidden["interval_95"][1] < 0  # what told them apart is gone


def test_the_interval_covers_the_true_area():
    random, truth = np.random.default_rng(1), 0.7602  # P(x < y) for N(0, 1) and N(1, 1)
    covered = 0
    for seed in range(200):
        below = member_below(random.normal(0, 1, 50), random.normal(1, 1, 50))
        low, high = with_interval(0, resample(below, MembershipConfig(num_resamples=300, seed=seed)))["interval_95"]
        covered += low <= truth <= high
    assert covered >= 180


def test_members_found_at_a_low_false_positive_rate():
    held_out = np.arange(1.0, 21.0)
    members = np.array([0.5, 1.5, 2.5, 9.0])
    found = found_at(members, held_out, 0.05)  # one false positive allowed: the threshold is 2
    assert found["value"] == 50.0 and found["false_positives"] == 1 and found["num_held_out"] == 20
    assert found_at(members, held_out, 0.01)["value"] == 25.0  # none allowed: the threshold is 1
    assert found_at(members, held_out, 0.01)["false_positives"] == 0
    assert found_at(np.ones(5), np.ones(20), 0.05)["value"] == 0.0  # ties give nothing away


@pytest.mark.parametrize("name", ["sd", "sd_velocity", "sdxl", "sd3", "flux"])
def test_losses_are_of_each_image_alone(name):
    pipeline, images = build(name), pictures([f"a {word}" for word in ("bag", "boot", "bag", "coat", "shoe")], 0)
    state = torch.get_rng_state()
    losses = denoising_losses(pipeline, images, 32, QUICK)
    assert torch.equal(torch.get_rng_state(), state)
    assert losses.shape == (5,) and len(set(losses.tolist())) == 5
    in_pairs = MembershipConfig(num_timesteps=4, num_noises=1, batch_size=2)
    order = [3, 1, 0, 4, 2]
    again = denoising_losses(pipeline, images.select(order), 32, in_pairs)
    torch.testing.assert_close(again, losses[order], rtol=1e-4, atol=1e-6)


def test_the_loss_by_hand():
    pipeline, images = build("sd"), pictures(["a bag"], 0)
    losses = denoising_losses(pipeline, images, 32, MembershipConfig(num_timesteps=2, num_noises=1, seed=5))
    with torch.no_grad():
        latents = pipeline.vae.encode(pixels_of(images)).latent_dist.mean * pipeline.vae.config.scaling_factor
        prompt = pipeline.encode_prompt(["a bag"], "cpu", 1, False)[0]
        noises = torch.randn(2, *latents.shape[1:], generator=torch.Generator().manual_seed(5))
        wanted = []
        for noise, step in zip(noises, (250, 750), strict=True):
            noisy = pipeline.scheduler.add_noise(latents, noise[None], torch.tensor([step]))
            wanted.append((pipeline.unet(noisy, step, prompt).sample - noise).square().mean().item())
    assert losses.item() == pytest.approx(np.mean(wanted), rel=1e-4)


def test_what_a_generator_learned_by_heart_is_found():
    pipeline, captions = build("sd"), ["a bag"] * 8
    pipeline.vae.register_to_config(scaling_factor=20.0)  # this VAE is not trained: its latents are small
    members, others = pictures(captions, 0), pictures(captions, 1)
    options = MembershipConfig(num_timesteps=5, num_noises=1, num_resamples=200)
    fresh = tuple(denoising_losses(pipeline, images, 32, options) for images in (members, others))
    denoiser = PipelineDenoiser(pipeline)
    with torch.no_grad():
        latents = pipeline.vae.encode(pixels_of(members)).latent_dist.mean * 20.0
        prompt = pipeline.encode_prompt(captions, "cpu", 1, False)[0]
    optimizer, generator = torch.optim.Adam(pipeline.unet.parameters(), 1e-2), torch.Generator().manual_seed(0)
    for _ in range(300):
        drawn = denoiser.noising(latents, generator)
        predicted = pipeline.unet(drawn.noisy, drawn.timesteps, prompt).sample
        torch.nn.functional.mse_loss(predicted, drawn.target).backward()
        optimizer.step()
        optimizer.zero_grad()
    learned = tuple(denoising_losses(pipeline, images, 32, options) for images in (members, others))
    found = attack({"before": fresh, "after": learned}, options)
    fresh, trained = found["before"], found["after"]
    assert found["change"]["auc"]["interval_95"][0] > 0
    print(fresh, trained)
    assert trained["auc"]["value"] > 0.9 and trained["auc"]["value"] > fresh["auc"]["value"]
    assert trained["auc"]["interval_95"][0] > 0.5 and trained["loss_members"] < trained["loss_held_out"]


def test_the_four_groups():
    concepts = ConceptConfig(concept="sneaker", train_data_dir=IMAGES)
    images = membership_images(MembershipConfig(num_images=50), ImageEvaluationConfig(), concepts, [])
    for role, sides in images.items():
        for rows in sides.values():
            assert len(rows) == 50 and all(("sneaker" in text) == (role == "forget") for text in rows["text"])
    both = [np.asarray(images["forget"][side][0]["image"]) for side in ("members", "held_out")]
    assert not np.array_equal(*both)
    with pytest.raises(ValueError, match="are both 'test': nothing is held out"):
        membership_images(MembershipConfig(split="test"), ImageEvaluationConfig(), concepts, [])


def test_evaluate_sd_attacks_the_base_and_the_unlearned_pipeline(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    changes = {"membership.enabled": "true", "membership.num_images": 6, "membership.num_timesteps": 2}
    changes |= {"membership.num_resamples": 20, "attacks": "[]", "fidelity.extractors": "[]"}
    found = evaluate(tmp_path / "run", base_model=twin_of_base(tmp_path / "twin"), **changes)["membership"]
    assert found["before"] == found["after"]  # the base differs in nothing that is asked here
    assert found["change"]["retain"]["auc"] == {"value": 0.0, "interval_95": [0.0, 0.0]}
    captions = found["details"]["num_captions"]["retain"]
    assert 0 <= captions["both"] <= min(captions["members"], captions["held_out"]) <= 6
    assert found["details"]["num_images"]["forget"] == {"members": 6, "held_out": 6}
    assert 0 <= found["after"]["retain"]["auc"]["value"] <= 1 and found["after"]["forget"]["loss_members"] > 0
    assert "membership inference" in capsys.readouterr().out and "membership.after.forget.auc.value" in (
        (tmp_path / "run" / "report.html").read_text()
    )


@pytest.mark.parametrize(("name", "value"), [("num_images", 0), ("false_positive_rate", 1.0), ("num_noises", 0)])
def test_settings_out_of_range(name, value):
    with pytest.raises(ValueError, match=f"membership.{name} is"):
        MembershipConfig(**{name: value})


def test_places_of_the_schedule():
    """What a drawn batch is, the chosen place gives as well."""
    for name in ("sd", "sd_velocity", "sd3", "flux"):
        noising = PipelineDenoiser(build(name)).noising
        latents = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        drawn = noising(latents, torch.Generator().manual_seed(1))
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1))
        every = torch.arange(noising.num_train_timesteps)
        table = noising.at(latents[:1].expand(len(every), -1, -1, -1), noise[:1], every).timesteps
        places = torch.stack([(table == step).nonzero()[0, 0] for step in drawn.timesteps])
        again = noising.at(latents, noise, places)
        torch.testing.assert_close(again.noisy, drawn.noisy)
        torch.testing.assert_close(again.target, drawn.target)
