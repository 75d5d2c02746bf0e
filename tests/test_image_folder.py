"""Folders of generated images: the same files whether or not the run was interrupted, and no mixing of runs."""

import json

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from short_runs import BASE

from barrier_diffusers.data.prompt_files import PromptRow
from barrier_diffusers.evaluation import image_folder
from barrier_diffusers.evaluation.image_folder import batches_of, generate_folder, read_folder
from barrier_diffusers.models.generation import SamplingConfig, generate

SAMPLING = SamplingConfig(num_inference_steps=2, batch_size=4, seed=7)
WORDS = ("red sneaker", "blue dress", "black bag", "green coat", "red boot")
ROWS = [PromptRow(str(10 + index), f"a photo of a {words}", 7 + index) for index, words in enumerate(WORDS)]


@pytest.fixture(scope="module")
def pipeline():
    return StableDiffusionPipeline.from_pretrained(BASE, dtype=torch.float32)


@pytest.fixture
def calls(monkeypatch):
    """Sizes of the batches that are sampled."""
    sizes, sample = [], image_folder.sample

    def counting(pipeline, prompts, **rest):
        sizes.append(len(prompts))
        return sample(pipeline, prompts, **rest)

    monkeypatch.setattr(image_folder, "sample", counting)
    return sizes


def make(pipeline, folder, rows=ROWS, sampling=SAMPLING, **options):
    return generate_folder(pipeline, rows, sampling, folder, options.pop("hashes", {"unet": "a"}), **options)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_images_are_those_of_generate(pipeline, tmp_path, calls):
    files = make(pipeline, tmp_path / "images")
    assert files.names == [f"{10 + index}_0.png" for index in range(5)] and calls == [4, 1]
    np.testing.assert_array_equal(files.array(), generate(pipeline, [row.prompt for row in ROWS], SAMPLING))
    assert {"manifest.json", "prompts.csv"} == set(contents(tmp_path / "images")) - set(files.names)
    assert read_folder(str(tmp_path / "images"))[0] == ROWS


def test_a_batch_that_lacks_an_image_is_sampled_whole_and_complete_ones_are_kept(pipeline, tmp_path, calls):
    folder = tmp_path / "images"
    make(pipeline, folder)
    whole = contents(folder)
    make(pipeline, folder)
    assert calls == [4, 1]  # nothing to do
    (folder / "11_0.png").unlink()
    (folder / "14_0.png").unlink()
    (folder / ".14_0.png.123").write_bytes(b"half of an image, of a killed run")
    before = (folder / "10_0.png").stat().st_mtime_ns
    make(pipeline, folder)
    assert calls == [4, 1, 4, 1] and contents(folder) == whole
    assert (folder / "10_0.png").stat().st_mtime_ns == before


def test_several_images_of_a_prompt_have_their_own_seeds(pipeline, tmp_path):
    rows = [ROWS[0], PromptRow("x", ROWS[0].prompt, ROWS[0].seed + 1)]
    files = make(pipeline, tmp_path / "images", rows, images_per_prompt=2)
    assert files.names == ["10_0.png", "10_1.png", "x_0.png", "x_1.png"]
    images = files.array().astype(int)
    assert abs(images[0] - images[1]).max() > 10 and abs(images[1] - images[2]).max() <= 1  # prompt and seed are equal


def test_guidance_of_a_row_counts_and_shares_no_batch(pipeline, tmp_path):
    rows = [PromptRow(str(i), ROWS[0].prompt, 3, guidance) for i, guidance in enumerate((None, 1.0, 3.0, 9.0, 1.0))]
    batches = batches_of(rows, 1, SAMPLING)  # the sampler's own guidance is 3
    assert [[job.name[0] for job in batch] for batch in batches] == [["0", "2"], ["1", "4"], ["3"]]
    images = make(pipeline, tmp_path / "images", rows).array().astype(int)
    assert abs(images[0] - images[2]).max() <= 1 and abs(images[1] - images[4]).max() <= 1
    assert abs(images[0] - images[1]).max() > 10 and abs(images[0] - images[3]).max() > 10


CHANGES = {
    "hashes": {"hashes": {"unet": "b"}},
    "sampling": {"sampling": SamplingConfig(num_inference_steps=3, batch_size=4, seed=7)},
    "prompts": {"rows": [PromptRow("10", "another prompt", 7), *ROWS[1:]]},
    "prompts, num_images": {"rows": ROWS[:4]},
    "num_images": {"images_per_prompt": 2},
}


@pytest.mark.parametrize("changed", CHANGES)
def test_images_made_from_something_else_are_refused_or_replaced(changed, pipeline, tmp_path, calls):
    folder = tmp_path / "images"
    make(pipeline, folder)
    before = contents(folder)
    with pytest.raises(ValueError, match=f"was made from other {changed}: name another"):
        make(pipeline, folder, **CHANGES[changed])
    assert contents(folder) == before and calls == [4, 1]
    files = make(pipeline, folder, overwrite=True, **CHANGES[changed])
    assert len(calls) > 2 and set(contents(folder)) == {*files.names, "manifest.json", "prompts.csv"}
    facts = json.loads((folder / "manifest.json").read_text())
    assert facts["num_images"] == len(files) and facts["scheduler"]["class"] == "DDIMScheduler"


def test_a_folder_with_other_files_is_left_alone(pipeline, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="holds other files"):
            make(pipeline, tmp_path, overwrite=overwrite)
    assert contents(tmp_path) == {"notes.txt": b"mine"}


def test_folders_of_images_made_earlier(pipeline, tmp_path):
    folder = tmp_path / "images"
    files = make(pipeline, folder)
    rows, read = read_folder(str(folder))
    assert rows == ROWS and read.names == files.names and read.digest() == files.digest()
    with pytest.raises(ValueError, match="lacks 5 of 10 images, 10_1.png for one"):
        read_folder(str(folder), images_per_prompt=2)
    Image.fromarray(files.array()[0]).save(folder / "99_0.png")
    with pytest.raises(ValueError, match="holds 1 images that no prompt names, 99_0.png for one"):
        read_folder(str(folder))
    (folder / "prompts.csv").rename(tmp_path / "mine.csv")
    with pytest.raises(ValueError, match=r"has no prompts.csv: name the CSV file"):
        read_folder(str(folder))
    (folder / "99_0.png").unlink()
    assert read_folder(str(folder), str(tmp_path / "mine.csv"))[0] == ROWS
    with pytest.raises(ValueError, match="does not exist"):
        read_folder(str(tmp_path / "none"))
