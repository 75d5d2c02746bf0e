"""Retain inputs that are given: the same as recording these tensors, shared by object, and checked before use."""

import pytest
import torch
import torch.distributed as dist
from conftest import image_batches, make_small_unet, run_net, run_unet, unet_batches
from forks import in_ranks
from projected import TEXT, add_lora, config_of, drift_inside, text_batches, train

from barrier_diffusers import Barrier

MIDDLE_AND_UP = ["mid_block.attentions.0.transformer_blocks.0", "up_blocks.1.attentions.0.transformer_blocks.0"]


def never(model, batch):
    raise AssertionError("the model was run")


def texts(batches=None):
    return [text for _, _, text in (text_batches() if batches is None else batches)]


def given(unet, inputs, loader=None, forward_fn=never, **options):
    barrier = Barrier(unet, config_of(**options))
    barrier.setup_protection(None, forward_fn, loader, retain_inputs=inputs)
    return barrier


def recorded(unet, batches=None, **options):
    barrier = Barrier(unet, config_of(**options))
    barrier.setup_protection(None, run_unet, batches or text_batches())
    return barrier


def assert_same(fits, others):
    assert list(fits) == list(others)
    for name, fit in fits.items():
        tensors, expected = fit.to_tensors(), others[name].to_tensors()
        assert all(torch.equal(value, expected[key]) for key, value in tensors.items()), name
    groups = [[list(map(id, each.values())).index(id(fit)) for fit in each.values()] for each in (fits, others)]
    assert groups[0] == groups[1]  # the same maps share


@pytest.mark.parametrize("use_lora", [False, True], ids=["full", "lora"])
def test_given_embeddings_equal_recorded_ones_without_a_run(unet, use_lora):
    if use_lora:
        add_lora(unet)
    inputs = texts()
    barrier = given(unet, {"attn2.to_k": inputs, "attn2.to_v": inputs}, projection_energy=0.9)
    assert_same(barrier.projections, recorded(make_small_unet(), projection_energy=0.9).projections)
    train(barrier, run_unet, unet_batches())
    assert max(drift_inside(barrier, entry)[0].abs().max() for entry in barrier.maps) < 1e-6


def test_one_tensor_or_a_generator_will_do(unet):
    expected = recorded(unet).projections
    whole = torch.cat(texts())
    for inputs in (whole, whole.flatten(0, 1), (text for text in texts())):
        fits = given(unet, {"Linear": inputs}, targets=TEXT).projections
        assert {fit.count for fit in fits.values()} == {60} and len({id(fit) for fit in fits.values()}) == 1
        for name, fit in fits.items():
            span, other = (each.basis @ each.basis.T for each in (fit, expected[name]))
            torch.testing.assert_close(span, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["plain", "grouped", "strided"])
def test_images_of_a_convolution_equal_recorded_ones(net, name):
    seen, retain = [], image_batches(seed=5)
    layer = net.get_submodule(name)
    expected = Barrier(net, config_of([name], projection_energy=0.8))
    handle = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    expected.setup_protection(None, run_net, retain)
    handle.remove()
    barrier = Barrier(net, config_of([name], projection_energy=0.8))
    barrier.setup_protection(None, never, retain_inputs={name: seen})
    assert_same(barrier.projections, expected.projections)


def test_other_objects_are_other_statistics(unet):
    inputs = texts()
    barrier = given(unet, {"attn2.to_k": inputs, "attn2.to_v": list(inputs)})
    keys, values = ({id(barrier.projections[n]) for n in barrier.projections if n.endswith(end)} for end in TEXT)
    assert len(keys) == len(values) == 1 and keys != values


def test_maps_that_are_not_given_are_recorded(unet):
    targets = ["attn2.to_q", *TEXT]
    expected = recorded(make_small_unet(), targets=targets, projection_energy=0.9)
    inputs = texts()
    options = {"targets": targets, "projection_energy": 0.9, "loader": text_batches(), "forward_fn": run_unet}
    barrier = given(unet, {"attn2.to_k": inputs, "attn2.to_v": inputs}, **options)
    assert_same(barrier.projections, expected.projections)


@pytest.mark.parametrize(
    "options", [{"constraint": "both"}, {"constraint": "penalty", "use_actual_bounds": True}], ids=["both", "penalty"]
)
def test_given_inputs_serve_the_regions_too(unet, options):
    energy = 0.999 if options["constraint"] == "penalty" else 0.9
    config = config_of(projection_energy=energy, residual_source="retain", **options)
    fitted = []
    for model, inputs in ((unet, texts()), (make_small_unet(), None)):
        barrier = Barrier(model, config)
        source = (
            {"retain_loader": text_batches()} if inputs is None else {"retain_inputs": dict.fromkeys(TEXT, inputs)}
        )
        barrier.setup_protection(unet_batches(), run_unet, **source)
        fitted.append(barrier)
    assert_same(fitted[0].regions, fitted[1].regions)
    assert_same(fitted[0].projections, fitted[1].projections)


@pytest.mark.parametrize("blocks", [None, MIDDLE_AND_UP])
def test_maps_that_share_may_run_in_any_order(unet, blocks):
    """Values are named before keys but run after them; a UNet lists its up blocks before the middle one."""
    inputs = texts()
    barrier = given(unet, {"attn2.to_v": inputs, "attn2.to_k": inputs}, blocks=blocks)
    train(barrier, run_unet, unet_batches())
    certificate = barrier.certify(text_batches(num=6, seed=9), run_unet, quantile=0.5)
    assert certificate.holds and len(certificate.maps) == len(barrier.maps) == (4 if blocks else 8)
    assert max(entry.relative.largest for entry in certificate.maps) < 1e-4


def test_autocast_does_not_reach_the_statistics(unet):
    expected, inputs = recorded(make_small_unet(), projection_energy=0.9), texts()
    with torch.autocast("cpu", torch.bfloat16):
        barrier = given(unet, {"Linear": inputs}, projection_energy=0.9)
    assert_same(barrier.projections, expected.projections)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"attn3.to_k": "texts"}, "names 'attn3.to_k', but no protected map is called so; they are down_blocks"),
        ({"attn2.to_k": "texts", "Linear": "texts"}, "gives .*attn2.to_k twice, by 'attn2.to_k' and by 'Linear'"),
        ({"attn2.to_k": "texts"}, "need a retain_loader, or retain_inputs for all maps"),
        ({"Linear": []}, r"retain_inputs\['Linear'\] is empty"),
        ({"Linear": torch.randn(2, 5, 11)}, r"shape \(2, 5, 11\), but .*attn2.to_k reads \(..., 12\)"),
        ({"Linear": torch.tensor(1.0)}, r"shape \(\), but .*attn2.to_k reads \(..., 12\)"),
        ({"Linear": torch.zeros(0, 5, 12)}, r"shape \(0, 5, 12\)"),
        ({"Linear": [[torch.randn(2, 5, 12)]]}, "has a list in it, but must be tensors"),
        ({"Linear": torch.full((2, 12), torch.nan)}, r"retain_inputs\['Linear'\] holds NaN or infinity"),
        ({"Linear": torch.randn(60, 12)}, "span all directions of every map"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(unet, inputs, message):
    inputs = {target: texts() if value == "texts" else value for target, value in inputs.items()}
    with pytest.raises(ValueError, match=message):
        given(unet, inputs)


def test_a_convolution_wants_images(net):
    barrier = Barrier(net, config_of(["plain"], projection_energy=0.8))
    for tensor in (torch.randn(3, 9, 9), torch.randn(2, 4, 9, 9)):
        with pytest.raises(ValueError, match=r"but plain reads \(B, 3, H, W\)"):
            barrier.setup_protection(None, never, retain_inputs={"plain": tensor})


def test_inputs_that_nothing_reads_are_refused(unet):
    barrier = Barrier(unet, config_of(constraint="penalty", projection_energy=0.999))
    with pytest.raises(ValueError, match="retain_inputs is given, but no option needs retain data"):
        barrier.setup_protection(unet_batches(), run_unet, retain_inputs={"Linear": texts()})


@pytest.mark.parametrize("both_given", [False, True])
def test_a_region_s_maps_are_given_together_or_not_at_all(unet, both_given):
    barrier = Barrier(unet, config_of(constraint="both"))
    inputs = {"attn2.to_k": texts()} | ({"attn2.to_v": texts()} if both_given else {})
    with pytest.raises(
        ValueError, match="attn2.to_v reads the same input as .*attn2.to_k, whose retain inputs are giv"
    ):
        barrier.setup_protection(unet_batches(), run_unet, text_batches(), retain_inputs=inputs)


def _worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    share = text_batches(num=4, rank=6)[rank::2]
    loader, inputs = recorded(make_small_unet(), share, projection_energy=0.9), texts(share)
    fits = [loader, given(make_small_unet(), {"Linear": inputs}, projection_energy=0.9)]
    result = {"tensors": [next(iter(fit.projections.values())).to_tensors() for fit in fits]}
    if rank == 1:
        inputs[0][0, 0] = float("nan")
    try:
        given(make_small_unet(), {"Linear": inputs}, projection_energy=0.9)
    except (ValueError, RuntimeError) as error:
        result["error"] = str(error)
    torch.save(result, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_fit_one_projection_and_fail_together(tmp_path):
    in_ranks(_worker, str(tmp_path))
    single = recorded(make_small_unet(), text_batches(num=4, rank=6), projection_energy=0.9)
    expected = next(iter(single.projections.values())).to_tensors()
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for tensors in (tensors for result in results for tensors in result["tensors"]):
        assert tensors["count"] == expected["count"] == 80 and tensors["radius"] == expected["radius"]
        span, other = (each["basis"] @ each["basis"].T for each in (tensors, expected))
        torch.testing.assert_close(span, other, rtol=0, atol=1e-5)
        torch.testing.assert_close(tensors["residual"], expected["residual"], rtol=1e-4, atol=1e-5)
    assert "recording failed in another process" in results[0]["error"]
    assert "holds NaN or infinity" in results[1]["error"]
