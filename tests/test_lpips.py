"""LPIPS against torchmetrics' own network, given the same backbone."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torchmetrics.functional.image import lpips as reference

from barrier_diffusers.evaluation.lpips import BACKBONES, Lpips, LpipsConfig, lpips_distances, lpips_facts


def make_images(num=3, side=64, seed=0):
    return np.random.default_rng(seed).integers(0, 255, (num, side, side, 3), dtype=np.uint8)


def random_backbone(net, path, suffix):
    torch.manual_seed(0)
    backbone = BACKBONES[net][0]()
    state = {f"features.{name}": value for name, value in backbone.state_dict().items()}
    state["classifier.1.weight"] = torch.zeros(2, 2)
    file = path / f"{net}{suffix}"
    save_file(state, file) if suffix == ".safetensors" else torch.save(state, file)
    return backbone, str(file)


@pytest.mark.parametrize(("net", "suffix"), [("alex", ".pth"), ("vgg", ".safetensors")])
def test_distances_are_torchmetrics(net, suffix, tmp_path, monkeypatch):
    backbone, file = random_backbone(net, tmp_path, suffix)
    network = Lpips(LpipsConfig(weights=file, net=net))
    monkeypatch.setattr(reference, "_get_tv_model_features", lambda *_: backbone)  # torchvision is not needed then
    theirs = reference._LPIPS(net=net)
    first, second = make_images(), make_images(seed=1)
    pixels = [torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1 for images in (first, second)]
    expected = theirs(*pixels).flatten().tolist()
    state = torch.get_rng_state()
    assert lpips_distances(first, second, network, batch_size=2) == pytest.approx(expected, rel=1e-4)
    assert min(expected) > 0 and torch.equal(torch.get_rng_state(), state)
    assert lpips_distances(first, first, network) == [0, 0, 0]
    assert lpips_facts(LpipsConfig(weights=file, net=net), network)["net"] == net


@pytest.mark.parametrize(("net", "count"), [("alex", 2_469_696), ("vgg", 14_714_688)])
def test_backbones_have_torchvisions_parameters(net, count):
    assert sum(value.numel() for value in BACKBONES[net][0]().parameters()) == count


def test_what_is_refused(tmp_path):
    with pytest.raises(ValueError, match="LPIPS needs lpips.weights"):
        Lpips(LpipsConfig())
    for changes in ({"net": "squeeze"}, {"weights": str(tmp_path / "none.pth")}, {"batch_size": 0}):
        with pytest.raises(ValueError, match="lpips"):
            LpipsConfig(**changes)
    _, file = random_backbone("alex", tmp_path, ".pth")
    with pytest.raises(ValueError, match="holds no weights of this backbone"):
        Lpips(LpipsConfig(weights=file, net="vgg"))
    (tmp_path / "broken.pth").write_bytes(b"broken")
    (tmp_path / "broken.safetensors").write_bytes(b"broken")
    for name in ("broken.pth", "broken.safetensors"):
        with pytest.raises(ValueError, match="lpips.weights"):
            Lpips(LpipsConfig(weights=str(tmp_path / name)))
    network = Lpips(LpipsConfig(weights=file))
    with pytest.raises(ValueError, match="there are 3 and 2 images"):
        lpips_distances(make_images(), make_images(2), network)
    with pytest.raises(ValueError, match="images of one size"):
        lpips_distances(make_images(), make_images(side=65), network)
