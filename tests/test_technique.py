"""BARRIER in eval-unlearn: the real package's registry finds it by its entry point, its runner's call makes images."""

import tomllib

import numpy as np
import pytest
from PIL import Image
from pipelines import build
from short_runs import BASE, ROOT

from barrier_diffusers.data.erased_concepts import ERASED_NAME, ErasedConcepts, as_json
from barrier_diffusers.evaluation.technique import BarrierTechnique
from barrier_diffusers.models.generation import SamplingConfig, generate
from barrier_diffusers.models.loading import add_adapter, load_merged
from barrier_diffusers.models.publishing import save_adapter, save_pipeline
from barrier_diffusers.protection.config import BarrierConfig
from barrier_diffusers.utils.files import write_json
from barrier_diffusers.utils.run_records import module_hash

GROUP = "eval_unlearn.techniques"
ERASED = as_json([ErasedConcepts(["sneaker"], ["a photo of a red sneaker"])])
QUICK = {"num_inference_steps": 2, "guidance_scale": 3.0}


@pytest.fixture(scope="module")
def unlearned(tmp_path_factory):
    """A folder as unlearn_sd.py leaves it."""
    folder = tmp_path_factory.mktemp("unlearned")
    save_pipeline(build("sd"), folder)
    write_json(folder / ERASED_NAME, ERASED)
    return folder


def test_the_registry_of_eval_unlearn_finds_and_runs_it(unlearned, tmp_path, monkeypatch):
    pytest.importorskip("eval_unlearn")
    from eval_unlearn.registry import get_technique, local
    from eval_unlearn.registry.entrypoints import load_entrypoints

    monkeypatch.setattr(local, "_TECHNIQUES", {})
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"][GROUP]
    installed = tmp_path / "declared-0.dist-info"  # as pip writes it from pyproject.toml
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: declared\nVersion: 0\n")
    lines = "".join(f"{name} = {value}\n" for name, value in declared.items())
    (installed / "entry_points.txt").write_text(f"[{GROUP}]\n{lines}")
    monkeypatch.syspath_prepend(tmp_path)
    load_entrypoints()
    assert get_technique("barrier") is BarrierTechnique and len(local._TECHNIQUES) > 1
    technique = get_technique("barrier")(model_id=str(unlearned), **QUICK)
    images = technique.generate(prompts=["a red bag", "a boot"], seed=3)
    assert all(isinstance(image, Image.Image) and image.mode == "RGB" for image in images)
    expected = generate(build("sd"), ["a red bag", "a boot"], SamplingConfig(seed=3, **QUICK))
    np.testing.assert_array_equal(np.stack([np.asarray(image) for image in images]), expected)


def test_seeds_and_changes(unlearned):
    technique = BarrierTechnique(model_id=str(unlearned), batch_size=1, **QUICK)
    one, two = (np.asarray(image) for image in technique.generate(["a bag", "a bag"], seed=3))
    assert not np.array_equal(one, two)
    np.testing.assert_array_equal(np.asarray(technique.generate(["a bag"], seed=4)[0]), two)
    assert not np.array_equal(np.asarray(technique.generate(["a bag"], seed=4, guidance_scale=9.0)[0]), two)
    free = [np.asarray(technique.generate(["a bag"])[0]) for _ in range(2)]
    assert not np.array_equal(*free)
    with pytest.raises(ValueError, match="cannot change width of an image"):
        technique.generate(["a bag"], seed=0, width=64)


def test_an_adapter_is_merged(tmp_path):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    pipeline = build("sd")
    save_pipeline(pipeline, base)
    add_adapter(pipeline.unet, BarrierConfig(targets=["attn2.to_v"]), 2)
    for name, value in pipeline.unet.named_parameters():
        if "lora_B" in name:
            value.data.fill_(0.5)
    adapter.mkdir()
    save_adapter(pipeline, adapter)
    write_json(adapter / ERASED_NAME, ERASED)
    technique = BarrierTechnique(model_id=str(base), lora_weights=str(adapter))
    merged = module_hash(technique.pipeline.unet)
    assert merged == module_hash(load_merged(str(base), str(adapter)).unet) != module_hash(load_merged(str(base)).unet)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"model_id": str(BASE)}, "does not say that anything was erased"),
        ({"model_id": str(BASE), "steps": 3}, "does not know steps; its settings are model_id, lora_weights"),
        ({"use_fp16": False}, "needs model_id"),
    ],
)
def test_what_would_judge_something_else_is_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        BarrierTechnique(**settings)
