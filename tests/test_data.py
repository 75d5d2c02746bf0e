"""Data: reading, splitting, caching, noised batches."""

from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, load_dataset
from PIL import Image

from barrier_diffusers.data.captions import anchor_captions, cycle, swap_concept
from barrier_diffusers.data.concepts import ConceptConfig
from barrier_diffusers.data.encoding import EncodedImages, NoisedBatches, cached_tensors, to_pixels
from barrier_diffusers.data.generated_images import write_image_folder
from barrier_diffusers.data.readers import load_image_text, split_concepts, take_evenly
from barrier_diffusers.models.autoencoders import sample_latents
from barrier_diffusers.models.denoiser import PipelineDenoiser
from barrier_diffusers.models.loading import load_pipeline

ROOT = Path(__file__).resolve().parent.parent
FASHION = ROOT / "assets" / "fashion_sd"


@pytest.fixture
def image_folder(tmp_path):
    rng = np.random.default_rng(0)
    labels = ["cat"] * 4 + ["dog"] * 6
    columns = {"text": [f"a photo of a {label}" for label in labels], "class": labels}
    write_image_folder(tmp_path / "data" / "train", rng.integers(0, 255, (10, 8, 8, 3), dtype=np.uint8), columns)
    return tmp_path / "data"


def test_image_folder_is_read_back_exactly(image_folder):
    dataset = load_image_text(str(image_folder), "train")
    images = np.random.default_rng(0).integers(0, 255, (10, 8, 8, 3), dtype=np.uint8)
    assert all(np.array_equal(np.asarray(row["image"]), image) for row, image in zip(dataset, images, strict=True))
    assert dataset[9]["text"] == "a photo of a dog"


def test_save_to_disk_folder_is_read(tmp_path):
    Dataset.from_dict({"image": [1], "text": ["x"]}).save_to_disk(tmp_path / "d")
    assert load_image_text(str(tmp_path / "d"), "train")["text"][0] == "x"


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"source": "/no/such/folder"}, "does not exist"),
        ({"split": "validation"}, "cannot read split 'validation'"),
        ({"caption_column": "caption"}, "has no column 'caption'; it has image, text, class"),
    ],
)
def test_unreadable_sources_are_named(image_folder, kwargs, message):
    arguments = {"source": str(image_folder), "split": "train", **kwargs}
    with pytest.raises(ValueError, match=message):
        load_image_text(**arguments)


def test_split_keeps_every_row_once(image_folder):
    dataset = load_image_text(str(image_folder), "train")
    forget, retain = split_concepts(dataset, "class", ["cat"])
    assert set(forget["class"]) == {"cat"} and set(retain["class"]) == {"dog"}
    assert len(forget) + len(retain) == len(dataset)


def test_unknown_concept_and_column_are_errors(image_folder):
    dataset = load_image_text(str(image_folder), "train")
    with pytest.raises(ValueError, match="zero forget images: no row has class = 'cow'; known are cat, dog"):
        split_concepts(dataset, "class", ["cow"])
    with pytest.raises(ValueError, match="no column 'kind'"):
        split_concepts(dataset, "kind", ["cat"])


def test_take_evenly_draws_without_replacement_and_reproducibly():
    first, second = take_evenly(range(100), 30, 1), take_evenly(range(100), 30, 1)
    assert first == second == sorted(set(first)) and len(first) == 30
    assert take_evenly(range(100), 30, 2) != first
    assert take_evenly(range(100), None, 0) == list(range(100))


def test_swap_concept_respects_word_borders():
    assert swap_concept("a photo of a red Sneaker", "sneaker", "boot") == "a photo of a red boot"
    with pytest.raises(ValueError, match="does not name the concept 'shirt'"):
        swap_concept("a shirtless t-shirt", "shirt", "coat")


def test_anchor_captions():
    captions, concepts = ["a cat", "a big cat"] * 20, [["cat"]] * 40
    assert anchor_captions(captions, concepts, None, "an animal", [], 0) == ["an animal"] * 40
    assert anchor_captions(captions, concepts, "dog", None, [], 0)[:2] == ["a dog", "a big dog"]
    drawn = anchor_captions(captions, concepts, None, None, ["dog", "cow"], 0)
    assert set(drawn) == {"a dog", "a cow", "a big dog", "a big cow"}
    assert drawn == anchor_captions(captions, concepts, None, None, ["dog", "cow"], 0)


def test_to_pixels_range_and_centre_crop():
    image = Image.new("RGB", (40, 20), (255, 0, 0))
    image.paste((0, 0, 255), (10, 0, 30, 20))  # the central square is blue
    pixels = to_pixels([image], 20)
    assert pixels.shape == (1, 3, 20, 20)
    assert pixels[0, 2, :, 1:-1].min() > 0.9 and pixels[0, 0, :, 1:-1].max() < -0.9


def test_cached_tensors_compute_once(tmp_path):
    calls = []

    def compute():
        calls.append(1)
        return {"a": torch.arange(3)}

    path = tmp_path / "sub" / "a.safetensors"
    first, second = cached_tensors(path, compute), cached_tensors(path, compute)
    assert len(calls) == 1 and torch.equal(first["a"], second["a"])
    assert [entry.name for entry in path.parent.iterdir()] == ["a.safetensors"]


def test_cached_tensors_leave_nothing_when_computing_fails(tmp_path):
    with pytest.raises(RuntimeError):
        cached_tensors(tmp_path / "a.safetensors", lambda: (_ for _ in ()).throw(RuntimeError("no")))
    assert list(tmp_path.iterdir()) == []


def test_sample_latents_has_the_posterior_moments():
    moments = torch.cat([torch.full((20000, 1, 1, 1), 3.0), torch.full((20000, 1, 1, 1), float(np.log(4.0)))], 1)
    latents = sample_latents(moments, 0.5, torch.Generator().manual_seed(0))
    assert latents.mean().item() == pytest.approx(1.5, abs=0.03)
    assert latents.std().item() == pytest.approx(1.0, abs=0.03)


def encoded(n=7):
    moments = torch.cat([torch.randn(n, 2, 4, 4), torch.full((n, 2, 4, 4), -20.0)], 1)
    conditions = {"encoder_hidden_states": torch.randn(3, 5, 6), "pooled_projections": torch.randn(3, 4)}
    return EncodedImages(moments, torch.arange(n) % 3, torch.zeros(n, dtype=torch.long), conditions)


def test_noised_batches_repeat_and_processes_share_them():
    images, denoiser = encoded(), PipelineDenoiser(load_pipeline(str(FASHION)))
    whole = NoisedBatches(images, denoiser, batch_size=3, seed=4)
    first, second = list(whole), list(whole)
    assert len(first) == len(whole) == 3
    assert all(
        torch.equal(a[key], b[key]) for a, b in zip(first, second, strict=True) for key in ("noisy", "timesteps")
    )
    parts = [list(NoisedBatches(images, denoiser, 3, 4, "cpu", rank, 2)) for rank in range(2)]

    def values(batches, read):
        return sorted(torch.cat([read(batch) for batch in batches]).flatten().tolist())

    for read in (lambda b: b["noisy"], lambda b: b["condition"]["pooled_projections"]):
        assert values([batch for part in parts for batch in part], read) == values(first, read)
    assert [[len(batch["noisy"]) for batch in part] for part in parts] == [[2, 2, 1], [1, 1]]


def test_encoded_images_look_up_embeddings():
    images = encoded()
    row = images[4]
    for key, values in images.embeddings.items():
        assert torch.equal(row["condition"][key], values[1]) and torch.equal(row["anchor"][key], values[0])


def test_concept_config_contradictions(tmp_path):
    assert ConceptConfig(concept=["cat", "dog"]).forget_prompts == ["cat", "dog"]
    for wrong, message in (
        ({"concept": []}, "concept is empty"),
        ({"train_data_dir": str(tmp_path), "dataset_name": "a/b"}, "not both"),
        ({"train_data_dir": str(tmp_path), "forget_prompts": ["a cat"]}, "goes without forget_data_dir"),
        ({"forget_data_dir": "/no/such"}, "forget_data_dir '/no/such' does not exist"),
        ({"concept": ["cat", "dog"], "forget_prompts": ["a cow"]}, "'a cow' names none of the concepts cat, dog"),
    ):
        with pytest.raises(ValueError, match=message):
            ConceptConfig(**{"concept": "cat", **wrong})
    with pytest.raises(ValueError, match="does not exist"):
        ConceptConfig(concept="cat", train_data_dir="/no/such")
    with pytest.raises(ValueError, match="max_forget_images is 0"):
        ConceptConfig(concept="cat", train_data_dir=str(tmp_path), max_forget_images=0)
    assert ConceptConfig(concept="cat", forget_prompts=["a cat"]).concepts == ["cat"]


def test_cycle():
    assert cycle(["a", "b"], 5) == ["a", "b", "a", "b", "a"] and cycle([], 3) == []


def test_the_recipe_writes_the_embedded_image_folder_as_it_is(tmp_path, monkeypatch):
    """Else a user who makes the training data anew finds the assets changed."""
    monkeypatch.syspath_prepend(ROOT / "train_scripts")
    from prepare_fashion_mnist import export_images

    source = ROOT / "assets" / "fashion_images" / "test"
    rows = load_dataset("imagefolder", data_dir=str(source), split="train")
    assert export_images(rows, tmp_path / "test", len(rows)) == 600
    assert sorted(path.name for path in (tmp_path / "test").iterdir()) == sorted(
        path.name for path in source.iterdir()
    )
    assert (tmp_path / "test" / "metadata.csv").read_bytes() == (source / "metadata.csv").read_bytes()
