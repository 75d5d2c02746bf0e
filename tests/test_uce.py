"""The closed-form edit: it minimises what it says, and on the embedded model it moves what it should."""

import pytest
import torch
from diffusers import StableDiffusionPipeline
from tiny_encoders import FASHION

from barrier_diffusers import Barrier, BarrierConfig
from barrier_diffusers.data.encoding import encode_prompts
from barrier_diffusers.objectives import ObjectiveConfig, PromptEdit, get_objective
from barrier_diffusers.objectives.uce import aligned_tokens, edit_keys_and_values, free_directions, ridge_edit


def test_the_edit_is_the_minimum():
    torch.manual_seed(0)
    weight, forget, anchor, preserve = (torch.randn(*size).double() for size in ((5, 8), (6, 8), (6, 8), (9, 8)))
    edited = ridge_edit(weight, forget, anchor, preserve, 0.7, 0.2).requires_grad_()
    loss = (forget @ edited.T - anchor @ weight.T).square().sum() + 0.2 * (edited - weight).square().sum()
    loss = loss + 0.7 * (preserve @ (edited - weight).T).square().sum()
    (gradient,) = torch.autograd.grad(loss, edited)
    assert gradient.abs().max() < 1e-9


def test_nothing_changes_where_anchor_and_prompt_agree():
    weight, tokens = torch.randn(5, 8).double(), torch.randn(6, 8).double()
    torch.testing.assert_close(ridge_edit(weight, tokens, tokens, tokens[:0], 1.0, 0.1), weight)


def test_within_free_directions_the_edit_is_the_minimum():
    torch.manual_seed(0)
    weight, forget, anchor, preserve = (torch.randn(*size).double() for size in ((5, 8), (6, 8), (6, 8), (9, 8)))
    free = torch.linalg.qr(torch.randn(8, 3).double()).Q
    edited = ridge_edit(weight, forget, anchor, preserve, 0.7, 0.2, free)
    change = (edited - weight) @ free
    torch.testing.assert_close(change @ free.T, edited - weight)
    inside = change.clone().requires_grad_()
    moved = weight + inside @ free.T
    loss = (forget @ moved.T - anchor @ weight.T).square().sum() + 0.2 * (moved - weight).square().sum()
    loss = loss + 0.7 * (preserve @ (moved - weight).T).square().sum()
    (gradient,) = torch.autograd.grad(loss, inside)
    assert gradient.abs().max() < 1e-9
    everything = torch.eye(8, dtype=torch.float64)
    plain = ridge_edit(weight, forget, anchor, preserve, 0.7, 0.2)
    torch.testing.assert_close(ridge_edit(weight, forget, anchor, preserve, 0.7, 0.2, everything), plain)


def test_in_the_null_space_what_is_retained_is_answered_as_before():
    torch.manual_seed(0)
    weight, forget, anchor = (torch.randn(*size).double() for size in ((5, 8), (6, 8), (6, 8)))
    preserve = torch.randn(9, 4).double() @ torch.randn(4, 8).double()  # of rank 4
    free = free_directions(preserve, 0.0)
    assert free.shape == (8, 4)
    edited = ridge_edit(weight, forget, anchor, preserve, 0.0, 1e-6, free)
    torch.testing.assert_close(preserve @ edited.T, preserve @ weight.T)
    assert (edited - weight).norm() > 0.1
    # a share of the squared length frees the directions that hold it, the weakest first
    scaled = torch.diag(torch.tensor([10.0, 1.0, 0.1])).double()
    assert [free_directions(scaled, share).shape[1] for share in (1e-3, 0.02)] == [1, 2]
    with pytest.raises(ValueError, match="raise objective.null_space"):
        free_directions(torch.eye(3).double(), 0.1)


@pytest.mark.parametrize(
    ("forget", "anchor", "expected"),
    [
        ([0, 5, 6, 7, 9], [0, 5, 8, 9], [0, 1, 2, 2, 3, 4, 5]),
        ([0, 5, 9], [0, 8, 7, 9], [0, 2, 3, 4, 5, 6, 6]),
        ([0, 5, 9], [0, 5, 9], [0, 1, 2, 3, 4, 5, 6]),
    ],
)
def test_alignment(forget, anchor, expected):
    assert aligned_tokens(forget, anchor, 7) == expected


EDITS = {"red sneaker": "red boot", "blue bag": "blue coat"}


@pytest.fixture(scope="module")
def pipeline():
    return StableDiffusionPipeline.from_pretrained(FASHION, dtype=torch.float32)


def test_on_the_embedded_model(pipeline):
    barrier = Barrier(pipeline.unet, BarrierConfig(targets=["attn2.to_k", "attn2.to_v"], reduced_dim=4))
    pairs = [
        ("a photo of a red sneaker", "a photo of a red boot"),
        ("a photo of a blue bag", "a photo of a blue coat"),
    ]
    kept = ["a photo of a red dress", "a photo of a red boot"]

    def embed(prompts):
        return encode_prompts(pipeline, prompts)["encoder_hidden_states"]

    forget, anchor, preserve = (embed(texts) for texts in ([p for p, _ in pairs], [a for _, a in pairs], kept))
    before = [entry.layer.weight.detach().clone() for entry in barrier.maps]
    tokenize = pipeline.tokenizer
    edit_keys_and_values(
        PromptEdit(barrier.maps, pairs, kept, lambda p: tokenize(p).input_ids, embed, ObjectiveConfig("uce"))
    )
    for entry, old in zip(barrier.maps, before, strict=True):
        new = entry.layer.weight.detach()
        distance = ((forget @ new.T - anchor @ old.T).norm() / (forget @ old.T - anchor @ old.T).norm()).item()
        drift = ((preserve @ (new - old).T).norm() / (preserve @ old.T).norm()).item()
        assert distance < 0.3 and drift < 0.05
    barrier.remove()


def test_other_maps_are_refused(pipeline):
    for target in ("attn2.to_q", "attn1.to_k"):
        barrier = Barrier(pipeline.unet, BarrierConfig(targets=[target], reduced_dim=4))
        with pytest.raises(ValueError, match="keys and values of cross-attention only"):
            get_objective("uce").check_maps(barrier.maps)
        barrier.remove()
