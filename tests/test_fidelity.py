"""FID and KID: torchmetrics' numbers against the formulas, what a result says of itself, and the cache."""

import builtins

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from scipy.linalg import sqrtm
from short_runs import ROOT

from barrier_diffusers.data.images import ByteImages, ImageColumn, ImageFiles
from barrier_diffusers.evaluation.accuracy import Answers
from barrier_diffusers.evaluation.classifier import AttributeClassifier
from barrier_diffusers.evaluation.extractors import EXTRACTORS, Extractor, get_extractor
from barrier_diffusers.evaluation.fidelity import FidelityConfig, fidelity, frechet_distance, kernel_distance

CLASSIFIER = f"classifier={ROOT / 'assets/fashion_classifier'}"
TEST_IMAGES = ROOT / "assets/fashion_images/test"


def make_images(num=40, side=32, seed=0, low=0, high=255):
    return np.random.default_rng(seed).integers(low, high, (num, side, side, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def extractor():
    return get_extractor(CLASSIFIER)


def test_fid_is_the_formula():
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(200, 6, generator=generator)
    second = torch.randn(150, 6, generator=generator) * 1.5 + 0.3
    means = [part.double().numpy().mean(0) for part in (first, second)]
    covariances = [np.cov(part.double().numpy().T) for part in (first, second)]
    root = sqrtm(covariances[0] @ covariances[1]).real
    expected = ((means[0] - means[1]) ** 2).sum() + np.trace(covariances[0] + covariances[1] - 2 * root)
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-8)
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-8)


def test_kid_is_the_formula_and_unbiased():
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(30, 4, generator=generator), torch.randn(30, 4, generator=generator) + 1

    def kernel(a, b):
        return (a.double() @ b.double().T / 4 + 1) ** 3

    off = ~torch.eye(30, dtype=torch.bool)
    expected = kernel(first, first)[off].mean() + kernel(second, second)[off].mean() - 2 * kernel(first, second).mean()
    result = kernel_distance(first, second, subsets=3, subset_size=30, seed=0)
    assert result["mean"] == pytest.approx(float(expected), abs=1e-7) and result["std"] == pytest.approx(0, abs=1e-7)
    # of one distribution: means over independent samples scatter around 0 on both sides
    means = [
        kernel_distance(*torch.randn(2, 60, 4, generator=generator), subsets=10, subset_size=30, seed=0)["mean"]
        for _ in range(40)
    ]
    assert min(means) < 0 < max(means) and abs(np.mean(means)) < 3 * np.std(means) / np.sqrt(len(means))


def test_a_set_against_itself_and_against_another(extractor):
    images = make_images()
    same = fidelity(images, images, extractor)
    assert same["fid_classifier"] == pytest.approx(0, abs=1e-4) and same["kid_classifier"]["mean"] <= 0
    other = fidelity(images, make_images(30, seed=1, high=128), extractor)
    assert other["fid_classifier"] > 0.1 and other["kid_classifier"]["mean"] > 0
    details = other["details"]
    assert (details["num_reference_images"], details["num_images"], details["num_features"]) == (40, 30, 192)
    assert details["extractor"] == "classifier" and len(details["weights_hash"]) == 64
    assert "32 x 32" in details["preprocessing"] and details["kid_subset_size"] == 30
    assert "rank is at most 29" in details["warnings"][0] and "all 30 images" in details["warnings"][1]


def test_real_photos_are_nearer_to_real_photos_than_noise_is(extractor):
    names = ImageFiles(TEST_IMAGES).names
    halves = [ImageFiles(TEST_IMAGES, names[start::2]) for start in (0, 1)]
    options = FidelityConfig(kid_subset_size=100, kid_subsets=20)
    near = fidelity(halves[0], halves[1], extractor, options)
    far = fidelity(halves[0], make_images(300), extractor, options)
    assert near["fid_classifier"] < 0.2 * far["fid_classifier"]
    assert near["kid_classifier"]["mean"] < 0.2 * far["kid_classifier"]["mean"]
    assert near["details"]["warnings"] == [] and near["kid_classifier"]["std"] > 0


def test_layouts_sources_and_repetition_do_not_matter(extractor, tmp_path):
    images, reference = make_images(12), make_images(20, seed=1)
    expected = fidelity(reference, images, extractor)
    for index, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"{index:02d}.png")
    column = ImageColumn(Dataset.from_dict({"image": [Image.fromarray(image) for image in images]}))
    channels_first = torch.from_numpy(images).permute(0, 3, 1, 2)
    for source in (channels_first, tmp_path, ByteImages(images), column):
        torch.manual_seed(hash(type(source)) % 1000)  # a state that must not matter, and must not be moved
        state = torch.get_rng_state()
        assert fidelity(reference, source, extractor) == expected
        assert torch.equal(torch.get_rng_state(), state)


def test_a_batch_holds_one_size(tmp_path):
    for index, side in enumerate((8, 8, 8, 6, 8)):
        Image.fromarray(make_images(1, side, seed=index)[0]).save(tmp_path / f"{index}.png")
    (tmp_path / "notes.txt").write_text("no image")
    files = ImageFiles(tmp_path)
    assert [tuple(batch.shape) for batch in files.batches(2)] == [
        (2, 3, 8, 8),
        (1, 3, 8, 8),
        (1, 3, 6, 6),
        (1, 3, 8, 8),
    ]
    before = files.digest()
    Image.fromarray(make_images(1, 8, seed=9)[0]).save(tmp_path / "0.png")
    assert files.digest() != before
    grey = ByteImages(make_images(2)[..., :1])
    assert next(grey.batches(2)).shape == (2, 3, 32, 32)


def test_reference_features_are_cached_under_images_and_extractor(extractor, tmp_path):
    calls = []

    def counting(images):
        calls.append(len(images))
        return extractor._embed(images)

    mine = Extractor("mine", extractor.network, 192, "as the classifier's", counting)
    reference, images = make_images(6), make_images(5, seed=1)
    first = fidelity(reference, images, mine, cache=tmp_path)
    assert calls == [6, 5] and first["fid_mine"] == fidelity(reference, images, extractor)["fid_classifier"]
    assert fidelity(reference, images, mine, cache=tmp_path) == first and calls == [6, 5, 5]
    changed = reference.copy()
    changed[0, 0, 0, 0] ^= 1
    fidelity(changed, images, mine, cache=tmp_path)
    other = Extractor("mine", extractor.network, 192, "another preprocessing", counting)
    fidelity(reference, images, other, cache=tmp_path)
    assert calls == [6, 5, 5, 6, 5, 6, 5] and len(list(tmp_path.glob("features-mine-*.safetensors"))) == 3


def test_classifier_features_are_what_its_heads_read(extractor):
    images = make_images(8, side=40)
    classifier = AttributeClassifier.from_pretrained(str(ROOT / "assets/fashion_classifier")).eval()
    head = classifier.heads["class"]
    logits = head(extractor(torch.from_numpy(images).permute(0, 3, 1, 2)))
    labels = [classifier.attributes["class"][index] for index in logits.argmax(1)]
    assert labels == Answers.of(classifier, images).labels["class"]


def test_efficientnet_sees_what_the_images_show():
    skimage = pytest.importorskip("skimage")
    extractor = get_extractor("efficientnet_lite0")
    photos = {skimage.data.coffee: {967, 968}, skimage.data.chelsea: {281, 282, 285}}  # espresso, cup; cats
    for photo, classes in photos.items():
        features = extractor(torch.from_numpy(photo()).permute(2, 0, 1)[None])
        assert features.shape == (1, 1280) and extractor.facts()["num_features"] == 1280
        assert int(extractor.network._fc(features).argmax()) in classes


BAD = {
    "unknown": ("resnet", "unknown extractor 'resnet'; known are classifier, clip"),
    "no folder": ("classifier", "needs the folder of a saved AttributeClassifier: give it as classifier=PATH"),
    "missing": ("classifier=/no/such", "'/no/such' does not exist"),
    "another folder": ("classifier=.", "is not a folder with a saved AttributeClassifier"),
    "no weights": ("inception2048", "needs torch-fidelity's Inception weights"),
    "no package": (f"inception64={ROOT / 'README.md'}", "pip install torch-fidelity"),
    "no clip": ("clip", "needs the folder of a CLIP model"),
    "not a clip": (f"clip={ROOT / 'assets/fashion_images'}", "no CLIP model"),
}


@pytest.mark.parametrize("name", BAD)
def test_extractors_that_cannot_be_had(name):
    spec, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        get_extractor(spec)


def test_efficientnet_names_its_extra(monkeypatch):
    true_import = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("efficientnet"):
            raise ImportError(name)
        return true_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match=r"pip install 'barrier-diffusers\[efficientnet\]'"):
        get_extractor("efficientnet_lite0")


def test_wrong_images_and_settings(extractor, tmp_path):
    images = make_images(4)
    with pytest.raises(ValueError, match="at least two images in each set, but num_images is 1"):
        fidelity(images, images[:1], extractor)
    with pytest.raises(ValueError, match="must be bytes"):
        fidelity(images, images / 255, extractor)
    with pytest.raises(ValueError, match="expected are"):
        fidelity(images, images[0], extractor)
    with pytest.raises(ValueError, match="holds no image"):
        fidelity(images, tmp_path, extractor)
    with pytest.raises(ValueError, match="does not exist"):
        fidelity(images, tmp_path / "none", extractor)
    with pytest.raises(ValueError, match="lacks 1 of 1 images, 0.png for one"):
        ImageFiles(tmp_path, ["0.png"])
    (tmp_path / "0.png").write_bytes(b"broken")
    with pytest.raises(ValueError, match="0.png' cannot be read"):
        list(ImageFiles(tmp_path))
    with pytest.raises(FloatingPointError, match="extractor mine gave non-finite features"):
        broken = Extractor("mine", extractor.network, 3, "none", lambda pixels: pixels[:, :, 0, 0].float() * np.inf)
        fidelity(images, images, broken)
    for changes in ({"extractors": ["resnet"]}, {"extractors": ["clip=a", "clip=b"]}, {"kid_subset_size": 1}):
        with pytest.raises(ValueError):
            FidelityConfig(**changes)
    assert {"classifier", "clip", "efficientnet_lite0", "inception2048", "inception64"} <= set(EXTRACTORS)
