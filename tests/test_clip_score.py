"""CLIP score by torchmetrics on a tiny random CLIP, saved as a folder."""

import numpy as np
import pytest
import torch
from transformers import CLIPModel, CLIPProcessor, CLIPTokenizer

from barrier_diffusers.evaluation.clip_score import clip_score, load_clip
from barrier_diffusers.evaluation.extractors import get_extractor
from barrier_diffusers.evaluation.fidelity import fidelity

PROMPTS = ["a photo of a red sneaker", "a pencil sketch of a blue dress", "a bag", "a boot", "a coat"]


def make_images(num=5, side=24):
    return np.random.default_rng(0).integers(0, 255, (num, side, side, 3), dtype=np.uint8)


def cosines(clip_folder, images, prompts):
    """100 cos(image, prompt) by transformers alone, padding and cut as CLIP's own tokenizer does them."""
    model, processor = CLIPModel.from_pretrained(clip_folder).eval(), CLIPProcessor.from_pretrained(clip_folder)
    tokens = processor.tokenizer(prompts, padding=True, truncation=True, max_length=8, return_tensors="pt")
    pixels = processor.image_processor(images=list(images), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        output = model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, pixel_values=pixels)
    return 100 * (output.image_embeds * output.text_embeds).sum(1)


def test_score_is_the_mean_cosine_floored_at_0(clip_folder):
    images = make_images()
    scores = cosines(clip_folder, images, PROMPTS)
    order = scores.argsort(descending=True).tolist()
    best, worst = order[:3], order[-1:]
    assert scores[best].mean() > 0 > scores[worst].mean()
    state = torch.get_rng_state()
    result = clip_score(images[best], [PROMPTS[index] for index in best], str(clip_folder), batch_size=2)
    assert result["clip_score"] == pytest.approx(float(scores[best].mean()), abs=1e-3)
    assert torch.equal(torch.get_rng_state(), state)
    assert clip_score(images[worst], [PROMPTS[index] for index in worst], str(clip_folder))["clip_score"] == 0
    assert result["details"]["num_images"] == 3 and len(result["details"]["weights_hash"]) == 64


def test_cut_prompts_are_counted_and_keep_their_end(clip_folder):
    images, long = make_images(2), ["a pencil sketch of a very blue dress", "a bag"]
    by_hand = float(cosines(clip_folder, images, long).mean())
    assert by_hand > 0
    result = clip_score(images, long, str(clip_folder))
    assert result["clip_score"] == pytest.approx(by_hand, abs=1e-3)
    lengths = [len(ids) for ids in CLIPTokenizer.from_pretrained(clip_folder)(long).input_ids]
    assert lengths[0] > 8 > lengths[1] and result["details"]["num_cut_prompts"] == 1


def test_clip_as_feature_extractor(clip_folder):
    extractor = get_extractor(f"clip={clip_folder}")
    assert extractor.num_features == 8 and "crop_size" in extractor.preprocessing
    images = make_images(12)
    same = fidelity(images, images, extractor)
    assert same["fid_clip"] == pytest.approx(0, abs=1e-4)
    assert fidelity(images, 255 - images // 2, extractor)["fid_clip"] > 1e-4


def test_what_cannot_be_scored(clip_folder, tmp_path):
    with pytest.raises(ValueError, match="5 images, but 4 prompts"):
        clip_score(make_images(), PROMPTS[:4], str(clip_folder))
    with pytest.raises(ValueError, match="CLIP folder '/no/such' does not exist"):
        load_clip("/no/such")
    with pytest.raises(ValueError, match="no CLIP model"):
        load_clip(str(tmp_path))
    with pytest.raises(ValueError, match="there is no file or folder"):  # the tests are offline
        load_clip("openai/clip-vit-base-patch32")
