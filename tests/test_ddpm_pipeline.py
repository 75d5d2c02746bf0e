"""The class-conditional pipeline: saving, loading, sampling, guidance, patches."""

import json

import numpy as np
import pytest
import torch
from ddpm_models import LABELS, make_pipeline
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler

from barrier_diffusers.models.generation import SamplingConfig, generate
from ddpm_ext.loading import load_pipeline
from ddpm_ext.pipeline import ClassConditionalDDPMPipeline


def seeds(*numbers):
    return [torch.Generator().manual_seed(number) for number in numbers]


def sample(pipeline, labels, numbers, **options):
    options = {"num_inference_steps": 3, "output_type": "np", **options}
    return pipeline(labels, generator=seeds(*numbers), **options).images


@pytest.mark.parametrize(("patch_size", "channels"), [(1, 3), (2, 1)])
def test_a_saved_folder_samples_the_same_images(tmp_path, patch_size, channels):
    pipeline = make_pipeline(patch_size, channels)
    pipeline.save_pretrained(tmp_path)
    again = ClassConditionalDDPMPipeline.from_pretrained(tmp_path)
    assert again.labels == LABELS and again.null_label == 3
    assert (again.resolution, again.num_channels) == (8, channels)
    images = sample(pipeline, ["bag", "boot"], (0, 1))
    assert images.shape == (2, 8, 8, channels) and 0 <= images.min() <= images.max() <= 1
    assert np.array_equal(images, sample(again, ["bag", "boot"], (0, 1)))


def test_each_image_depends_on_its_own_seed_and_label_alone():
    pipeline = make_pipeline()
    together = sample(pipeline, ["bag", "boot", 2], (5, 6, 7))
    np.testing.assert_allclose(together[1:2], sample(pipeline, ["boot"], (6,)), atol=1e-5)
    np.testing.assert_allclose(together[2:], sample(pipeline, "coat", (7,)), atol=1e-5)
    assert not np.allclose(together[0], sample(pipeline, ["boot"], (5,)), atol=1e-3)


def test_guidance_is_the_extrapolation_from_no_label():
    pipeline = make_pipeline()
    pipeline.scheduler = EulerDiscreteScheduler(num_train_timesteps=10)  # one step, linear in the prediction
    seen = []
    original = pipeline.scheduler.step
    pipeline.scheduler.step = lambda prediction, *rest, **more: (
        seen.append(prediction),
        original(prediction, *rest, **more),
    )[1]
    for scale in (0.0, 1.0, 3.0):
        sample(pipeline, ["boot"], (0,), num_inference_steps=1, guidance_scale=scale)
    empty, labelled, guided = seen
    assert not torch.allclose(empty, labelled)
    torch.testing.assert_close(guided, empty + 3 * (labelled - empty))


def test_patches_are_a_reordering():
    pipeline = make_pipeline(2, 1)
    pixels = torch.randn(2, 1, 8, 8)
    patches = pipeline.to_patches(pixels)
    assert patches.shape == (2, 4, 4, 4)
    assert torch.equal(patches[:, :, 0, 0], pixels[:, 0, :2, :2].flatten(1))
    assert torch.equal(pipeline.to_pixels(patches), pixels)


@pytest.mark.parametrize("scheduler", [DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler])
def test_any_scheduler(scheduler):
    pipeline = make_pipeline()
    pipeline.scheduler = scheduler(num_train_timesteps=20)
    first, second = (sample(pipeline, ["bag", "bag"], (0, 1)) for _ in range(2))
    assert np.array_equal(first, second) and np.isfinite(first).all() and not np.allclose(first[0], first[1])


def test_output_types_and_the_packages_own_generation():
    pipeline = make_pipeline(2, 1)
    image = pipeline("bag", num_inference_steps=2, generator=seeds(0)).images[0]
    assert image.mode == "L" and image.size == (8, 8)
    (tensor,) = pipeline("bag", num_inference_steps=2, generator=seeds(0), output_type="pt", return_dict=False)
    assert tensor.shape == (1, 1, 8, 8)
    assert np.array_equal(np.asarray(image), (tensor[0, 0] * 255).round().numpy().astype(np.uint8))
    images = generate(pipeline, ["bag", "boot"], SamplingConfig(2, 1.0, batch_size=1, seed=0))
    assert images.dtype == np.uint8 and images.shape == (2, 8, 8, 1)


def test_mistakes_are_one_line(tmp_path):
    pipeline = make_pipeline()
    with pytest.raises(ValueError, match="no label 'shoe'; the pipeline has bag, boot, coat"):
        pipeline("shoe")
    with pytest.raises(ValueError, match="no label 3"):
        pipeline([0, 3])
    with pytest.raises(ValueError, match="2 generators for 1 labels"):
        pipeline(["bag"], generator=seeds(0, 1))
    with pytest.raises(ValueError, match="output_type is 'latent'"):
        pipeline("bag", output_type="latent")
    with pytest.raises(ValueError, match="2 labels for 4 class embeddings"):
        ClassConditionalDDPMPipeline(pipeline.unet, pipeline.scheduler, ["bag", "boot"])
    with pytest.raises(ValueError, match="named twice"):
        ClassConditionalDDPMPipeline(pipeline.unet, pipeline.scheduler, ["bag", "boot", "bag"])
    with pytest.raises(ValueError, match="no model_index"):
        load_pipeline(str(tmp_path))
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "DDPMPipeline"}))
    with pytest.raises(ValueError, match="holds a DDPMPipeline"):
        load_pipeline(str(tmp_path))
