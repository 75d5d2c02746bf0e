"""Learning rates of single targets: which parameters get them, and what is refused."""

import pytest
import torch
from ddpm_models import Place, make_pipeline

from barrier_diffusers import Barrier, BarrierConfig
from barrier_diffusers.training.unlearn import parameter_groups
from barrier_diffusers.utils.command_line import parse_config
from barrier_diffusers.workflow.settings import UnlearnConfig, chosen_objective
from ddpm_ext.loading import load_pipeline
from ddpm_ext.settings import UnlearnConfig as LabelConfig

TARGETS = ["to_q", "to_k", "class_embedding"]
SD = ["--pretrained_model_name_or_path", "a", "--output_dir", "b", "--dataset_name", "c", "--concept", "d"]


def barrier(**options):
    return Barrier(make_pipeline().unet, BarrierConfig(targets=TARGETS, reduced_dim=4, **options))


def test_every_parameter_is_in_one_group():
    found = barrier()
    groups = parameter_groups(found, 1e-3, {"class_embedding": 0.5, "mid_block.attentions.0.to_q": 0.1})
    by_rate = {group["lr"]: group["params"] for group in groups}
    unet = found.model
    assert [id(value) for value in by_rate[0.5]] == [id(unet.class_embedding.weight)]
    query = unet.mid_block.attentions[0].to_q
    assert [id(value) for value in by_rate[0.1]] == [id(query.weight), id(query.bias)]
    everything = [id(value) for group in groups for value in group["params"]]
    assert sorted(everything) == sorted(id(value) for value in found.trainable_parameters())
    assert len(set(everything)) == len(everything)


def test_without_any_there_is_one_group_in_the_usual_order():
    for options in ({}, {"constraint": "projection"}):
        found = barrier(**options)
        (group,) = parameter_groups(found, 1e-3, {})
        assert group["lr"] == 1e-3
        assert [id(value) for value in group["params"]] == [id(value) for value in found.trainable_parameters()]


@pytest.mark.parametrize(
    ("rates", "message"),
    [
        ({"to_v": 1.0}, "learning_rates names 'to_v', but no target of that name trains"),
        ({"to_q": 1.0, "mid_block.attentions.0.to_q": 2.0}, "gives mid_block.attentions.0.to_q two learning rates"),
    ],
)
def test_a_rate_belongs_to_one_target_that_trains(rates, message):
    with pytest.raises(ValueError, match=message):
        parameter_groups(barrier(), 1e-3, rates)


def test_rates_are_flags_and_checked_before_anything_is_read():
    assert parse_config(UnlearnConfig, [*SD, "--learning_rates", "{attn2.to_k: 1e-2}"]).learning_rates == {
        "attn2.to_k": 0.01
    }
    for words, message in (
        (["--learning_rates", "{to_k: 0}"], "learning_rates.to_k is 0.0, but must be > 0"),
        (["--learning_rate", "-1"], "learning_rate is -1.0, but must be > 0"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_config(UnlearnConfig, [*SD, *words])
    with pytest.raises(ValueError, match="leave learning_rates at its default"):
        chosen_objective(parse_config(UnlearnConfig, [*SD, "--objective.name", "uce", "--learning_rates", "{a: 1}"]))


def test_a_target_moves_as_far_as_its_rate_lets_it(tmp_path):
    place = Place(tmp_path / "place")
    # Adam's first step is as long as the learning rate, whatever the gradient
    settings = {"max_train_steps": 1, "barrier.lambda_interval": 0.0, "objective.name": "ga"}
    before = load_pipeline(str(place.base)).unet
    _, after = place.unlearn(tmp_path / "run", learning_rates="{class_embedding: 0.5}", **settings)
    step = (after.class_embedding.weight - before.class_embedding.weight)[1].detach().abs()
    assert step.max() == pytest.approx(0.5, rel=1e-3)
    for name, value in after.named_parameters():
        if name != "class_embedding.weight":
            assert (value - before.get_parameter(name)).abs().max() <= 1.01e-3
    with pytest.raises(ValueError, match="no target of that name trains"):
        place.unlearn(tmp_path / "refused", learning_rates="{fc: 0.5}")


def test_a_resumed_run_keeps_the_rates(tmp_path):
    place = Place(tmp_path / "place")
    settings = {"max_train_steps": 4, "checkpointing_steps": 2, "learning_rates": "{class_embedding: 0.5}"}
    settings |= {"barrier.constraint": "projection", "barrier.projection_energy": 0.9}
    _, whole = place.unlearn(tmp_path / "whole", **settings)
    (tmp_path / "half").mkdir()
    (tmp_path / "whole" / "checkpoints").rename(tmp_path / "half" / "checkpoints")
    _, half = place.unlearn(tmp_path / "half", **settings, resume_from_checkpoint="step-2")
    for (name, one), other in zip(whole.named_parameters(), half.named_parameters(), strict=True):
        assert torch.equal(one, other[1]), name
    with pytest.raises(ValueError, match="learning_rates"):
        other = {**settings, "learning_rates": "{class_embedding: 0.4}"}
        place.unlearn(tmp_path / "half", **other, resume_from_checkpoint="step-2", overwrite_output_dir="true")
    assert parse_config(LabelConfig, place.unlearn_words(tmp_path / "x")).learning_rates == {}
