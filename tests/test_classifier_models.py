"""Architectures, saving and loading, and transformers' classifiers behind the same interface."""

import json

import pytest
import torch
from classifiers import NAMES, run_unlearn, write_data
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification, ViTImageProcessor

from barrier_diffusers import Barrier, BarrierConfig
from classification_ext.models import (
    ARCHITECTURES,
    Classifier,
    TransformersClassifier,
    build_classifier,
    load_classifier,
    restart,
)


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_runs_and_has_maps_to_protect(name):
    model = build_classifier(name, NAMES, 32, 3, seed=0).eval()
    with torch.no_grad():
        assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 4)
    point = [] if name == "vgg16-bn" else ["Conv2d1x1"]  # the one without 1x1 convolutions
    names = [entry.name for entry in Barrier(model, BarrierConfig(targets=["fc", *point], reduced_dim=1)).maps]
    assert names[-1] == "network.fc" and (len(names) > 1) == bool(point)
    if name != "vgg16-bn" and name != "resnet50":
        assert all("shortcut.0" in entry for entry in names[:-1])


def test_sizes_are_those_of_the_literature():
    """Parameters of ResNet-18 and -50 with the CIFAR stem and of VGG-16 with batch normalisation, ten labels."""
    sizes = {name: count(build_classifier(name, [*"abcdefghij"], 32, 3, 0)) for name in ("resnet18", "resnet50")}
    assert sizes == {"resnet18": 11_173_962, "resnet50": 23_520_842}
    assert count(build_classifier("vgg16-bn", [*"abcdefghij"], 32, 3, 0)) == 14_728_266
    assert count(build_classifier("resnet20s", [*"abcdefghij"], 32, 3, 0)) == 272_474


def test_new_weights_depend_on_the_seed_alone():
    before = torch.get_rng_state()
    first, same, other = (build_classifier("resnet8-tiny", NAMES, 8, 1, seed) for seed in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first.network.fc.weight, same.network.fc.weight)
    assert not torch.equal(first.network.fc.weight, other.network.fc.weight)
    anew = restart(first, 1)
    assert torch.equal(anew.network.fc.weight, other.network.fc.weight) and torch.equal(before, torch.get_rng_state())


def test_saved_in_half_precision_and_loaded_in_single(tmp_path):
    model = build_classifier("resnet8-tiny", NAMES, 8, 1, seed=0)
    model.half().save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors")["network.fc.weight"].dtype == torch.float16
    loaded = load_classifier(str(tmp_path))
    assert isinstance(loaded, Classifier) and loaded.names == NAMES and loaded.num_channels == 1
    assert loaded.network.fc.weight.dtype == torch.float32
    assert torch.equal(loaded.network.fc.weight, model.network.fc.weight.float())


def test_folders_that_hold_no_classifier(tmp_path):
    with pytest.raises(ValueError, match="holds no config.json: it is not the folder of a classifier"):
        load_classifier(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "resnet9", "names": NAMES}))
    with pytest.raises(ValueError, match=r"no image classifier could be loaded from .*unknown architecture 'resnet9'"):
        load_classifier(str(tmp_path))
    with pytest.raises(ValueError, match="'resnet9' is neither one of resnet8-tiny"):
        build_classifier("resnet9", NAMES, 8, 1, 0)


@pytest.fixture
def vit(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    labels = {"id2label": dict(enumerate(NAMES)), "label2id": {name: index for index, name in enumerate(NAMES)}}
    config = ViTConfig(**sizes, image_size=8, patch_size=4, num_channels=3, **labels)
    ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    size = {"height": 8, "width": 8}
    ViTImageProcessor(size=size, image_mean=[0.4] * 3, image_std=[0.2] * 3).save_pretrained(tmp_path / "vit")
    return tmp_path / "vit"


def test_vit_reads_images_as_its_processor_would_make_them(vit):
    model = load_classifier(str(vit))
    assert isinstance(model, TransformersClassifier) and model.names == NAMES and model.resolution == 8
    pixels = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    plain = AutoModelForImageClassification.from_pretrained(vit).eval()
    with torch.no_grad():
        wanted = plain(pixel_values=((pixels + 1) / 2 - 0.4) / 0.2).logits
        torch.testing.assert_close(model.eval()(pixels), wanted)
    fine_tuned = build_classifier(str(vit), ["a", "b"], 8, 3, seed=0)
    assert fine_tuned.names == ["a", "b"] and fine_tuned.network.classifier.out_features == 2


def test_vit_unlearns_and_is_saved_for_transformers(vit, tmp_path):
    data = write_data(tmp_path / "data", sizes=(6, 10))
    changes = {"barrier.targets": "[q_proj,v_proj,classifier]", "max_train_steps": 3, "method.alpha": 0.0}
    metrics, _ = run_unlearn(vit, data, tmp_path / "run", **changes)
    before, after = (AutoModelForImageClassification.from_pretrained(path) for path in (vit, tmp_path / "run"))
    assert after.config.id2label == dict(enumerate(NAMES))
    moved = [name for name, value in after.named_parameters() if not torch.equal(value, before.get_parameter(name))]
    assert moved and all(any(part in name for part in ("q_proj", "v_proj", "classifier")) for name in moved)
    assert 0 < metrics["trained_percent"] < 100 and len(metrics["drift"]) == 5
