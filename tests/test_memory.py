"""Defaults that fit: how many images are sampled and encoded at once, and a VAE that takes large ones one by one."""

import pipelines
import pytest
import torch
from PIL import Image

from barrier_diffusers import encode_images
from barrier_diffusers.data.encoding import posteriors
from barrier_diffusers.models.generation import SamplingConfig, fitting_batch, generate


@pytest.mark.parametrize(
    ("side", "sampled", "encoded"),
    [(32, 100, 64), (64, 100, 64), (256, 32, 32), (512, 8, 8), (1024, 2, 2), (4096, 1, 1)],
)
def test_defaults_by_image_size(side, sampled, encoded):
    assert SamplingConfig().sized(side).batch_size == sampled and fitting_batch(side, 64) == encoded
    assert SamplingConfig(batch_size=50).sized(side).batch_size == 50  # as the user says


@pytest.mark.parametrize(("resolution", "batches", "decoded"), [(32, [3], [3]), (256, [3], [1, 1, 1])])
def test_large_images_are_decoded_one_by_one(resolution, batches, decoded, monkeypatch):
    pipeline, seen, parts = pipelines.build("sd"), [], []
    decode, inner = pipeline.vae.decode, pipeline.vae._decode
    monkeypatch.setattr(pipeline.vae, "decode", lambda z, **words: seen.append(len(z)) or decode(z, **words))
    monkeypatch.setattr(pipeline.vae, "_decode", lambda z, **words: parts.append(len(z)) or inner(z, **words))
    images = generate(pipeline, ["a", "b", "c"], SamplingConfig(num_inference_steps=1, resolution=resolution))
    assert images.shape == (3, resolution, resolution, 3)
    assert seen == batches and parts == decoded and not pipeline.vae.use_slicing


def test_large_images_are_encoded_in_small_batches(monkeypatch):
    pipeline, seen = pipelines.build("sd"), []
    encode = pipeline.vae.encode
    monkeypatch.setattr(
        pipeline.vae, "encode", lambda pixels: seen.append(len(pixels)) or encode(pixels[..., :32, :32])
    )
    encode_images(pipeline, [Image.new("RGB", (1024, 1024))] * 3, ["a", "b", "c"])
    assert seen == [2, 1]


def test_one_order_of_memory_whatever_the_readers():
    vae = pipelines.vae()
    pixels = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    last = pixels.to(memory_format=torch.channels_last)
    assert torch.equal(posteriors(vae, [pixels]), posteriors(vae, [last]))
