"""certificate.json: sound on sampled inputs, coverage by simulation, on images that nothing was fitted to."""

import json

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import make_small_unet, run_unet, unet_batches
from forks import in_ranks
from peft import LoraConfig
from short_runs import ROOT, run

from barrier_diffusers import Barrier, BarrierConfig
from barrier_diffusers.data.concepts import ConceptConfig
from barrier_diffusers.data.encoding import EncodedImages, NoisedBatches, encode_moments, encode_prompts
from barrier_diffusers.data.erased_concepts import ErasedConcepts
from barrier_diffusers.evaluation.certification import (
    CertificateConfig,
    certify_pipeline,
    certify_saved,
    has_barrier,
    held_out_images,
    quantile_for,
)
from barrier_diffusers.evaluation.erasure import ImageEvaluationConfig, make_evaluation_prompts
from barrier_diffusers.models.denoiser import PipelineDenoiser
from barrier_diffusers.models.loading import load_pipeline
from barrier_diffusers.protection.certificate import MapObserver, sound_bound
from barrier_diffusers.protection.order_statistics import (
    Split,
    attainable_quantile,
    distribution_free,
    order_statistic,
)
from barrier_diffusers.utils.run_records import module_hash

IMAGES = str(ROOT / "assets/fashion_images")
SNEAKER = ConceptConfig(concept="sneaker", train_data_dir=IMAGES)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One short run with a certificate on 70 held-out images, one without, and their metrics."""
    folder, cwd = tmp_path_factory.mktemp("runs"), pytest.MonkeyPatch()
    cwd.chdir(ROOT)
    few = {"certificate.num_images": 70, "certificate.quantile": 0.9, "learning_rate": 1e-3}
    with_it = run(folder / "with", folder / "cache", **few)
    without = run(folder / "without", folder / "cache", **{"certificate.enabled": "false", "learning_rate": 1e-3})
    cwd.undo()
    return folder, with_it, without


def test_a_run_writes_its_certificate(runs):
    folder, _, _ = runs
    record = json.loads((folder / "with" / "certificate.json").read_text())
    assert record["holds"] is True and all(entry["sound_holds"] for entry in record["maps"])
    assert record["quantile"] == 0.9 and record["confidence"] == 0.95 and record["delta"] == pytest.approx(0.05)
    names = [entry["name"] for entry in record["maps"]]
    assert len(names) == len(set(names)) > 3 and set(record["drift_norms"]) == set(names)
    for entry in record["maps"]:
        assert 0 < entry["largest_output_drift"] <= entry["sound"] * (1 + 1e-4)
        assert entry["relative"]["num_images"] == 70
        assert 0 < entry["relative"]["certified"] <= record["every_map"]["certified"]
        assert record["drift_norms"][entry["name"]] > 0
    for bound in (record["every_map"], record["network"]):
        assert 0 < bound["certified"] <= bound["largest_calibration"] and bound["num_calibration"] == 42
        assert bound["num_test"] == 28 and bound["coverage"] == 1 - bound["num_above"] / 28 > 0.7
        low, high = bound["coverage_interval_95"]
        assert low < bound["coverage"] <= high and 0.3 < bound["tightness"] < 3
    held_out = record["held_out"]
    assert held_out["num_images"] == 70 and "split 'test'" in held_out["where"]
    assert record["split"] == {"calibration": 0.6, "seed": 0} and record["contradicted"] == []
    parts = [held_out[name] for name in ("calibration", "test")]
    assert [part["num_images"] for part in parts] == [42, 28]
    assert len({held_out["sha256"], *(part["sha256"] for part in parts)}) == 3
    assert 0 < held_out["num_captions_in_both"] <= min(part["num_captions"] for part in parts)
    assert len(held_out["sha256"]) == 64 and {"unet", "vae", "text_encoder"} <= set(record["hashes"])


def test_the_certificate_changes_nothing_else(runs):
    """Same weights, same images, same random state as without it."""
    folder, (metrics, manifest), (other_metrics, other_manifest) = runs
    assert not (folder / "without" / "certificate.json").exists()
    assert manifest["hashes"] == other_manifest["hashes"] and manifest["history"] == other_manifest["history"]
    for facts in (metrics, other_metrics):
        facts.pop("seconds_training"), facts.pop("seconds_setup")
    assert metrics == other_metrics


def test_a_saved_run_is_certified_with_the_same_result(runs, tmp_path):
    folder, _, _ = runs
    settings = CertificateConfig(num_images=70, quantile=0.9)
    held_out = held_out_images(settings, ImageEvaluationConfig(), SNEAKER)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    pipeline, place = load_pipeline(str(folder / "with")), str(folder / "with")
    flags = [parameter.requires_grad for parameter in pipeline.unet.parameters()]
    certify_saved(tmp_path, pipeline, place, None, held_out, settings, 32)
    assert [parameter.requires_grad for parameter in pipeline.unet.parameters()] == flags
    assert torch.equal(torch.get_rng_state(), state)
    again = json.loads((tmp_path / "certificate.json").read_text())
    first = json.loads((folder / "with" / "certificate.json").read_text())
    for record in (again, first):  # named as the configuration names the folder
        record["held_out"].pop("where")
    assert again == first
    assert has_barrier(str(folder / "with"), None) and not has_barrier(str(ROOT / "assets/fashion_sd"), None)


def test_coverage_on_held_out_images(runs):
    """Draws from the drifts of one trained map on 200 held-out images: the bound of n of them exceeds the quantile of
    all of them at least as often as it says."""
    folder, _, _ = runs
    pipeline, settings = load_pipeline(str(folder / "with")), CertificateConfig(num_images=200, seed=3)
    rows = held_out_images(settings, ImageEvaluationConfig(), SNEAKER).images
    barrier = Barrier.from_pretrained(folder / "with", pipeline.unet)
    distinct = sorted(set(rows["text"]))
    ids = torch.tensor([distinct.index(text) for text in rows["text"]])
    images = EncodedImages(
        encode_moments(pipeline.vae, rows, "image", 32), ids, None, encode_prompts(pipeline, distinct)
    )
    denoiser, entry = PipelineDenoiser(pipeline), barrier.maps[0]
    delta, base, drifts = barrier.drift(entry).dense().detach(), barrier._snapshots[entry.name][0], []

    def watch(_, inputs, __):
        change, before = inputs[0] @ delta.T, inputs[0] @ base.T
        drifts.append((change.norm(dim=-1) / before.norm(dim=-1)).amax(1))

    handle = entry.layer.register_forward_hook(watch)
    with torch.no_grad():
        for batch in NoisedBatches(images, denoiser, 50, 0):
            denoiser.predict_batch(pipeline.unet, batch)
    handle.remove()
    population = torch.cat(drifts).double()
    assert len(population) == 200 and len(population.unique()) > 150
    quantile, confidence, draws = 0.9, 0.95, 4000
    truth = torch.quantile(population, quantile, interpolation="higher")
    samples = population[torch.randint(200, (draws, 100), generator=torch.Generator().manual_seed(0))]
    found = [distribution_free(sample, quantile, confidence, Split(0.6)) for sample in samples]
    slack = 3 * np.sqrt(confidence * (1 - confidence) / draws)
    assert np.mean([entry.certified >= truth for entry in found]) >= confidence - slack
    assert np.mean([entry.coverage for entry in found]) >= quantile  # of images that had no part in the choice


KINDS = {
    "penalty, full weights": (False, {"use_actual_bounds": True}),
    "penalty, LoRA": (True, {"use_actual_bounds": True}),
    "projection, full weights": (False, {"constraint": "projection", "projection_energy": 0.9}),
    "projection, LoRA": (True, {"constraint": "projection", "projection_energy": 0.9}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_no_admissible_input_breaks_the_sound_bound(kind):
    """Random and extreme z of the envelope plus any residual of norm rho, on a real model after random drift."""
    adapter, changes = KINDS[kind]
    unet, generator = make_small_unet(), torch.Generator().manual_seed(0)
    if adapter:
        unet.add_adapter(LoraConfig(r=3, target_modules=["attn2.to_q", "attn2.to_v"]))
    if "projection" not in kind:
        changes = {**changes, "reduced_dim": 3}
    barrier = Barrier(unet, BarrierConfig(targets=["attn2.to_q", "attn2.to_v"], **changes))
    barrier.setup_protection(unet_batches(), run_unet, unet_batches(seed=1))
    with torch.no_grad():
        for parameter in barrier.trainable_parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    barrier.project()
    for entry in barrier.maps:
        projection = barrier.projections.get(entry.name)
        region = barrier.regions[entry.name] if projection is None else projection.as_region()
        low, high = region.outer_lower, region.outer_upper
        where = torch.rand(3000, len(low), generator=generator)
        where[1500:] = where[1500:].round()  # corners
        residual = torch.randn(3000, len(region.mean), generator=generator)
        residual -= residual @ region.basis @ region.basis.T
        length = residual.norm(dim=1, keepdim=True)
        if length.min() > 1e-4:  # else the basis spans everything
            residual *= 2.5 / length
        x = region.mean + (low + where * (high - low)) @ region.basis.T + residual
        drift = barrier.drift(entry)
        reached = (x @ drift.dense().detach().T).abs().amax(0)
        bound = sound_bound(drift, region, 2.5).detach()
        assert (reached <= bound * (1 + 1e-4) + 1e-5).all() and reached.max() > 0.2 * bound.max()


def test_too_few_images_lower_the_quantile_and_say_so(capsys):
    settings = CertificateConfig(num_images=20)
    held_out = held_out_images(settings, ImageEvaluationConfig(), SNEAKER)
    assert len(held_out.images) == 20
    said = "12 of 20 held-out images choose its bound, and allow quantile 77.90% at confidence 95%; 99.00% takes 299"
    assert said in capsys.readouterr().out
    for count in (1, 7, 20, 497, 499, 540):
        quantile, chosen = quantile_for(settings, count), settings.split.num_calibration(count)
        assert order_statistic(chosen, quantile, 0.95) is not None
        assert quantile <= 0.99 and (quantile == 0.99 or quantile > attainable_quantile(chosen, 0.95) - 2e-4)


def test_what_is_held_out(capsys):
    settings, evaluation = CertificateConfig(), ImageEvaluationConfig()
    texts = held_out_images(settings, evaluation, SNEAKER).images["text"]
    assert len(texts) == 540 and not any("sneaker" in text for text in texts)
    erased = [ErasedConcepts(["bag"], ["a photo of a red bag"])]
    assert len(held_out_images(settings, evaluation, SNEAKER, erased).images) == 480
    assert held_out_images(CertificateConfig(enabled=False), evaluation, SNEAKER) is None
    assert held_out_images(settings, ImageEvaluationConfig(split="train"), SNEAKER) is None
    assert "is what was trained on" in capsys.readouterr().out
    prompts = ConceptConfig(concept="sneaker", forget_prompts=["a sneaker"], retain_prompts=["a bag", "a boot"])
    asked = make_evaluation_prompts(ImageEvaluationConfig(images_per_label=4), prompts)
    before = np.random.default_rng(0).integers(0, 255, (len(asked.prompts), 8, 8, 3), dtype=np.uint8)
    made = held_out_images(settings, evaluation, prompts, (), asked, before)
    assert (
        sorted(made.images["text"]) == ["a bag", "a bag", "a boot", "a boot"] and "before it was changed" in made.where
    )
    assert held_out_images(settings, evaluation, prompts) is None  # no images of before
    kept = [index for index, text in enumerate(asked.prompts) if text != "a sneaker"]
    np.testing.assert_array_equal(np.asarray(made.images[0]["image"]), before[kept[0]])


@pytest.mark.parametrize(
    "changes", [{"quantile": 1.0}, {"confidence": 0.0}, {"num_images": 0}, {"batch_size": 0}, {"calibration": 1.0}]
)
def test_settings_out_of_range(changes):
    with pytest.raises(ValueError, match=f"certificate.{next(iter(changes))} is"):
        CertificateConfig(**changes)


def test_weights_are_those_of_the_folder(runs):
    folder, _, _ = runs
    record = json.loads((folder / "with" / "certificate.json").read_text())
    assert record["hashes"]["unet"] == module_hash(load_pipeline(str(folder / "with")).unet)


def _certify_together(rank, folder, count):
    torch.set_num_threads(1)
    if count > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=count)
    pipeline, seen = load_pipeline(str(folder.parent / "with")), []
    barrier = Barrier.from_pretrained(folder.parent / "with", pipeline.unet)
    settings = CertificateConfig(num_images=10, quantile=0.5, batch_size=4)
    held_out = held_out_images(settings, ImageEvaluationConfig(), SNEAKER)
    pipeline.unet.register_forward_hook(lambda module, given, made: seen.append(len(made.sample)))
    record = certify_pipeline(barrier, pipeline, held_out, settings, resolution=32)
    batches = [4, 4, 2][rank::count]
    assert seen == batches + [size for size in batches for _ in range(2)]  # maps, then the network now and before
    (folder / f"{count}-{rank}.json").write_text(json.dumps(record))
    if count > 1:
        dist.destroy_process_group()


@pytest.mark.parametrize("count", [2, 4])
def test_processes_share_the_batches_and_give_the_certificate_of_one(count, runs):
    folder, _, _ = runs
    for number in (1, count):
        place = folder / f"by-{count}-{number}"
        place.mkdir()
        in_ranks(_certify_together, place, number, count=number)
    one = (folder / f"by-{count}-1" / "1-0.json").read_text()
    for rank in range(count):  # of four processes the last has no batch
        assert (folder / f"by-{count}-{count}" / f"{count}-{rank}.json").read_text() == one


def _certify_broken(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    unet = make_small_unet()
    barrier = Barrier(unet, BarrierConfig(targets=["attn2.to_k"], reduced_dim=2))
    barrier.setup_protection(unet_batches(), run_unet)
    batches = unet_batches(4, seed=1)
    batches[1] = (batches[1][0] * float("nan"), *batches[1][1:])
    batches[1] = (*batches[1][:2], batches[1][2] * float("nan"))
    with pytest.raises((RuntimeError, ValueError)) as caught:
        barrier.certify(batches, run_unet, 0.5, shared=True)
    (folder / f"{rank}.txt").write_text(str(caught.value))
    dist.destroy_process_group()


def test_what_fails_in_one_process_ends_the_others(tmp_path):
    in_ranks(_certify_broken, tmp_path)
    assert "failed in another process" in (tmp_path / "0.txt").read_text()
    assert "non-finite" in (tmp_path / "1.txt").read_text()


def test_counts_of_rows_do_not_round(unet):
    """Large images have more rows than float32 counts."""
    barrier = Barrier(unet, BarrierConfig(targets=["attn2.to_k"], reduced_dim=2))
    barrier.setup_protection(unet_batches(), run_unet)
    entry, region = barrier.maps[0], barrier.groups[0].region
    observer = MapObserver("m", barrier.drift(entry), region, entry.layer.weight, None, base_is_current=False)
    far = 1e6 * torch.ones(1, 3, region.mean.numel())
    observer.outside += 2**24
    observer.update(far)
    assert int(observer.outside) == 2**24 + 3
