"""Several processes (gloo, CPU) sample the images of a run together: those of one process, to the bit."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from diffusers import StableDiffusionPipeline
from forks import in_ranks
from launching import launch
from PIL import Image
from pipelines import build
from short_runs import ROOT, flags

from barrier_diffusers.data.encoding import cached_tensors
from barrier_diffusers.data.generated_images import Illustrator
from barrier_diffusers.evaluation.erasure import generate_cached, make_evaluation_prompts
from barrier_diffusers.evaluation.pictures import before_after_grid
from barrier_diffusers.models.generation import SamplingConfig, generate
from barrier_diffusers.models.shared_generation import generate_together, with_helpers
from barrier_diffusers.utils.command_line import parse_config
from barrier_diffusers.workflow.settings import UnlearnConfig

PROMPTS = ["a bag", "a boot", "a coat", "a red bag", "a sneaker"]
SAMPLING = SamplingConfig(num_inference_steps=2, batch_size=2, resolution=32)
SHARES = {1: [3], 2: [2, 1], 4: [1, 1, 1, 0]}  # batches of each process
EDIT = {
    "objective.name": "uce",
    "objective.anchor": "boot",
    "objective.alpha": 0,
    "barrier.targets": "[attn2.to_k,attn2.to_v]",
    "barrier.lambda_interval": 0,
}


def counted(pipeline):
    """Number of batches that the pipeline decodes, as it grows."""
    batches = []
    pipeline.vae.post_quant_conv.register_forward_hook(lambda module, given, made: batches.append(len(made)))
    return batches


def _draw(rank, folder, count):
    torch.set_num_threads(1)
    if count > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=count)
    pipeline = build("sd")
    batches, shares = counted(pipeline), []

    def drawn(work):
        images = with_helpers(pipeline, work)
        shares.append(len(batches))
        batches.clear()
        assert (images is None) == (rank > 0)
        return images

    def illustrated():
        rows = Illustrator(pipeline, folder / "pictures", "hash", SAMPLING, "image", "text")(PROMPTS, 1)
        return np.stack([np.asarray(image) for image in rows["image"]])

    def before():
        return generate_cached(pipeline, PROMPTS, SAMPLING, folder / "cache", "hash")

    works = [lambda: generate_together(pipeline, PROMPTS, SAMPLING), illustrated, before, illustrated, before]
    images = [drawn(work) for work in works]
    if rank == 0:
        np.savez(folder / f"{count}.npz", *images)
    alone = generate_together(pipeline, PROMPTS[: 1 + rank], SAMPLING)  # again each for itself
    assert len(alone) == 1 + rank
    (folder / f"{count}-{rank}.txt").write_text(str(shares))
    if count > 1:
        dist.destroy_process_group()


@pytest.mark.parametrize("count", [2, 4])
def test_processes_share_the_batches_and_give_the_images_of_one(count, tmp_path):
    for number in (1, count):
        folder = tmp_path / str(number)
        folder.mkdir()
        in_ranks(_draw, folder, number, count=number)
        for rank, share in enumerate(SHARES[number]):  # what is cached is not sampled again
            assert (folder / f"{number}-{rank}.txt").read_text() == str([share, share, share, 0, 0])
    one, more = (np.load(tmp_path / str(number) / f"{number}.npz") for number in (1, count))
    for name in one.files:
        assert one[name].shape == (5, 32, 32, 3) and one[name].dtype == np.uint8
        np.testing.assert_array_equal(one[name], more[name])


def _fail(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    pipeline = build("sd")
    said = []

    def ends(work):
        with pytest.raises((ChildProcessError, FloatingPointError, KeyError)) as caught:
            with_helpers(pipeline, work)
        said.append(f"{type(caught.value).__name__}: {caught.value.args[0]}")

    weight = pipeline.vae.post_quant_conv.weight
    kept = weight.detach().clone()
    for broken in (1, 0):
        with torch.no_grad():
            weight.copy_(kept * (float("nan") if rank == broken else 1.0))
        ends(lambda: generate_together(pipeline, PROMPTS, SAMPLING))
    with torch.no_grad():
        weight.copy_(kept)
    ends(lambda: {}["no such column"])
    with_helpers(pipeline, lambda: generate_together(pipeline, PROMPTS, SAMPLING))  # nobody waits for another one
    (folder / f"{rank}.txt").write_text("\n".join(said))
    dist.destroy_process_group()


def test_an_error_in_one_process_ends_the_others_with_its_message(tmp_path):
    in_ranks(_fail, tmp_path)
    main, other = ((tmp_path / f"{rank}.txt").read_text().splitlines() for rank in range(2))
    nan = "the pipeline generated non-finite pixels for prompts from {} on"
    assert main == [
        f"ChildProcessError: generating images failed in process 1: {nan.format(repr('a coat'))}",
        f"FloatingPointError: {nan.format(repr('a bag'))}",
        "KeyError: no such column",
    ]
    assert other == [
        f"FloatingPointError: {nan.format(repr('a coat'))}",
        f"ChildProcessError: the main process failed: {nan.format(repr('a bag'))}",
        "ChildProcessError: the main process failed: KeyError: 'no such column'",
    ]


@pytest.mark.parametrize("objective", ["rl", "uce"])
def test_the_images_after_are_those_of_the_saved_pipeline(objective, tmp_path):
    """After training the processes' weights are the same; a closed-form edit changes those of the first alone."""
    settings = {**EDIT} if objective == "uce" else {"learning_rate": 1e-3}
    settings |= {
        "evaluation.classifier": "null",
        "evaluation.images_per_label": 1,
        "evaluation.sampling.batch_size": 3,
    }
    words = flags(tmp_path / "run", cache_dir=tmp_path / "cache", **settings)
    done = launch(["train_scripts/unlearn_sd.py"], words)
    assert done.returncode == 0, done.stderr[-3000:]
    config = parse_config(UnlearnConfig, words)
    asked = make_evaluation_prompts(config.evaluation, config)
    (cached,) = (tmp_path / "cache").glob("images-*.safetensors")
    before = cached_tensors(cached, dict)["images"].numpy()
    sampling = config.evaluation.sampling
    base, result = (
        StableDiffusionPipeline.from_pretrained(path) for path in (ROOT / "assets/fashion_sd", tmp_path / "run")
    )
    np.testing.assert_array_equal(before, generate(base, asked.prompts, sampling))
    after = generate(result, asked.prompts, sampling)
    assert not np.array_equal(after, before)
    before_after_grid(before, after, asked.labels, asked.forgotten, tmp_path / "one.png")
    pictures = [np.asarray(Image.open(path)) for path in (tmp_path / "one.png", tmp_path / "run/before_after.png")]
    np.testing.assert_array_equal(*pictures)
