"""Python code of the pages runs as it stands there, on the embedded models and with fewer steps."""

import re
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from short_runs import BASE, ROOT

from barrier_diffusers.models.rows import stable_diffusion_3

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted(ROOT.glob("*_ext/README.md"))]
FEWER = {  # what is written there -> what runs here
    '"max_train_steps": 100': '"max_train_steps": 2, "num_generated_images": 8',
    '"objective": {"alpha": 1.0}': '"objective": {"alpha": 1.0}, "generation": {"num_inference_steps": 2}',
}
RUNS = {  # folder that a command of the page above makes -> what stands in for it here
    "runs/ddpm_fashion": "assets/fashion_ddpm",
    "runs/classifier": "assets/fashion_resnet",
}
FRAGMENTS = {"Architecture(": vars(stable_diffusion_3)}  # code that begins so is a part of a file -> that file's names


def snippets():
    """(page and number of the block in it, code)."""
    for page in PAGES:
        for number, code in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.S)):
            yield pytest.param(page, code, id=f"{page.relative_to(ROOT)}-{number}")


@pytest.fixture(scope="module")
def in_full_precision(tmp_path_factory):
    """The embedded pipeline as `make unlearn` would save it: all parts in float32."""
    folder = tmp_path_factory.mktemp("fashion_class")
    StableDiffusionPipeline.from_pretrained(BASE, dtype=torch.float32).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("page", "code"), snippets())
def test_a_snippet_runs(page, code, in_full_precision, tmp_path, monkeypatch):
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    (tmp_path / "runs").mkdir()
    for folder, source in RUNS.items():
        (tmp_path / folder).symlink_to(ROOT / source)
    (tmp_path / "runs/fashion_class").symlink_to(in_full_precision)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    for written, fewer in FEWER.items():
        code = code.replace(written, fewer)
    names = {"__name__": "snippet"}
    for beginning, known in FRAGMENTS.items():
        names |= known if code.startswith(beginning) else {}
    exec(compile(code, str(page), "exec"), names)
    check = CHECKS.get(next((mark for mark in CHECKS if mark in code), None))
    if check:
        check(names)


def trained(names):
    """A loop of one's own: the protection is at work and the objective is what it says."""
    step = names["make_step"](next(iter(names["DataLoader"](names["forget"], 32))))
    assert len(names["forget"]) == 144 and step.noisy.shape[1:] == (4, 8, 8)
    assert names["barrier"].compute_protection_loss().item() > 0
    assert names["objective"].loss(step).item() == pytest.approx(0, abs=0.5)


def certified(names):
    """The protection alone: the certificate of the snippet says something, and nothing is left behind."""
    assert names["certificate"].holds and names["certificate"].network.certified is not None
    assert names["loss"].item() > 0 and all(parameter.requires_grad for parameter in names["unet"].parameters())


def unlearned(names):
    """The front page: the pipeline that was handed in, unlearned in place."""
    assert names["result"].pipeline is names["pipeline"] and len(names["result"].history["objective"]) == 2
    assert names["result"].barrier.compute_protection_loss().item() > 0 and Path("boot.png").is_file()


CHECKS = {
    "result = unlearn(": unlearned,
    "encode_images(": trained,
    "certificate = barrier.certify": certified,
}  # what the code holds -> its check


def test_the_loop_with_the_packages_objectives_is_short():
    (code,) = [code for page, code in (each.values for each in snippets()) if "encode_images(" in code]
    body = code.split("\n\n")[-1]
    assert len([line for line in body.splitlines() if not line.startswith(" ")]) <= 12
