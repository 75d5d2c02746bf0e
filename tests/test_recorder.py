"""Recording is exact and leaves no trace."""

import inspect

import pytest
import torch
from conftest import image_batches, make_unet, run_net, run_unet, unet_batches
from peft import LoraConfig

from barrier_diffusers.protection.recorder import (
    BarrierAttnProcessor,
    InputRecorder,
    record_inputs,
    wrapped_processors,
)
from barrier_diffusers.protection.targets import input_rows, resolve_targets

QKV = ["to_q", "to_k", "to_v"]


def record(model, targets, batches, forward):
    """(leader_of, rows per leader)."""
    rows = {}
    maps = resolve_targets(model, targets)
    leaders = record_inputs(model, maps, batches, forward, lambda name, r: rows.setdefault(name, []).append(r.clone()))
    return leaders, rows


def expected_rows(model, targets, batches, forward):
    """The same through plain hooks, every map on its own."""
    rows, handles = {}, []
    for entry in resolve_targets(model, targets):

        def hook(module, args, entry=entry):
            rows.setdefault(entry.name, []).append(input_rows(args[0], entry.layer).clone())

        handles.append(entry.module.register_forward_pre_hook(hook))
    modes = {module: module.training for module in model.modules()}
    model.eval()
    with torch.no_grad():
        for batch in batches:
            forward(model, batch)
    for module, mode in modes.items():
        module.training = mode
    for handle in handles:
        handle.remove()
    return rows


def assert_same(leaders, rows, expected):
    assert set(leaders) == set(expected)
    for name, leader in leaders.items():
        assert all(torch.equal(a, b) for a, b in zip(rows[leader], expected[name], strict=True)), name


def test_recording_equals_plain_hooks(unet):
    batches = unet_batches()
    targets = [*QKV, "to_out.0", "ff.net.2"]
    assert_same(*record(unet, targets, batches, run_unet), expected_rows(unet, targets, batches, run_unet))


def test_unconditional_unet_with_group_norm_in_its_attention(class_unet):
    batches = [(torch.randn(2, 3, 8, 8), torch.tensor([1, 5]), torch.tensor([0, 3]))]

    def forward(model, batch):
        return model(batch[0], batch[1], class_labels=batch[2]).sample

    leaders, rows = record(class_unet, QKV, batches, forward)
    assert_same(leaders, rows, expected_rows(class_unet, QKV, batches, forward))
    assert len(set(leaders.values())) == len(leaders) // 3
    assert all(chunk.shape[0] == 2 and chunk.shape[-1] == 16 for chunks in rows.values() for chunk in chunks)


def test_convolutions(net):
    batches, targets = image_batches(), ["Conv2d", "fc"]
    assert_same(*record(net, targets, batches, run_net), expected_rows(net, targets, batches, run_net))


def test_stable_diffusion_has_33_distinct_inputs():
    unet = make_unet(sample_size=8)
    leaders, _ = record(unet, QKV, unet_batches(num=2, size=1), run_unet)
    assert len(leaders) == 96 and len(set(leaders.values())) == 33
    text = {leaders[name] for name in leaders if name.endswith(("attn2.to_k", "attn2.to_v"))}
    assert len(text) == 1
    for name, leader in leaders.items():
        if ".attn1." in name:
            assert leader.rpartition(".")[0] == name.rpartition(".")[0]


def test_signature_and_attributes_go_through(unet):
    maps = resolve_targets(unet, QKV)
    recorder = InputRecorder(lambda name, rows: None)
    with wrapped_processors(unet, maps, recorder):
        attention = unet.mid_block.attentions[0].transformer_blocks[0].attn2
        wrapper = attention.processor
        assert isinstance(wrapper, BarrierAttnProcessor) and not isinstance(wrapper, torch.nn.Module)
        inner = wrapper.processor
        assert inspect.signature(wrapper.__call__) == inspect.signature(inner.__call__)
        wrapper._attention_backend = "native"
        assert inner._attention_backend == "native" == wrapper._attention_backend
        unet.set_attention_backend("native")
        assert attention.processor is wrapper
    assert attention.processor is inner
    with pytest.raises(AttributeError):
        wrapper.no_such_attribute  # noqa: B018


def test_keyword_arguments_reach_the_wrapped_processor(unet):
    received = []

    class Processor:
        def __init__(self, inner):
            self.inner = inner

        def __call__(
            self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None, flavour=None
        ):
            received.append(flavour)
            return self.inner(attn, hidden_states, encoder_hidden_states, attention_mask, temb)

    unet.set_attn_processor({name: Processor(inner) for name, inner in unet.attn_processors.items()})
    maps = resolve_targets(unet, QKV)
    with wrapped_processors(unet, maps, InputRecorder(lambda name, rows: None)), torch.no_grad():
        unet(*unet_batches(num=1)[0], cross_attention_kwargs={"flavour": "sour"})
    assert set(received) == {"sour"}


def test_a_processor_that_is_a_module_stays_in_the_state_dict(unet):
    class Processor(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.scale = inner, torch.nn.Parameter(torch.ones(1))

        def forward(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
            return self.scale * self.inner(attn, hidden_states, encoder_hidden_states, attention_mask, temb)

    unet.set_attn_processor({name: Processor(inner) for name, inner in unet.attn_processors.items()})
    keys = []

    def forward(model, batch):
        keys.append(list(model.state_dict()))
        return run_unet(model, batch)

    batches = unet_batches()
    assert_same(*record(unet, QKV, batches, forward), expected_rows(unet, QKV, batches, run_unet))
    assert keys[0] == list(unet.state_dict()) and any(key.endswith("processor.scale") for key in keys[0])


def test_nothing_is_left_behind_not_even_after_an_exception(unet):
    batches = unet_batches()
    unet.train()
    unet.mid_block.eval()
    processors = dict(unet.attn_processors)
    state = {name: value.clone() for name, value in unet.state_dict().items()}
    modes = [module.training for module in unet.modules()]
    with torch.no_grad():
        before = run_unet(unet, batches[0])
    keys_inside = []

    def failing(model, batch):
        keys_inside.append(list(model.state_dict()))
        run_unet(model, batch)
        if len(keys_inside) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        record(unet, [*QKV, "ff.net.2"], batches, failing)
    assert keys_inside[0] == list(state) == list(unet.state_dict())
    assert all(torch.equal(value, state[name]) for name, value in unet.state_dict().items())
    assert all(unet.attn_processors[name] is processor for name, processor in processors.items())
    assert [module.training for module in unet.modules()] == modes
    assert not any(module._forward_pre_hooks for module in unet.modules())
    with torch.no_grad():
        assert torch.equal(run_unet(unet, batches[0]), before)


def test_an_exception_inside_the_processor_removes_the_hooks(unet):
    maps = resolve_targets(unet, QKV)

    def explode(name, rows):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        record_inputs(unet, maps, unet_batches(), run_unet, explode)
    assert not any(module._forward_pre_hooks for module in unet.modules())


def test_gradient_checkpointing_records_every_row_once(unet):
    plain = record(unet, QKV, unet_batches(), run_unet)
    unet.enable_gradient_checkpointing()
    unet.train()
    leaders, rows = record(unet, QKV, unet_batches(), run_unet)
    assert leaders == plain[0]
    assert all(torch.equal(torch.cat(rows[name]), torch.cat(plain[1][name])) for name in rows)


def test_maps_resolved_before_an_adapter_is_added_are_recorded(unet):
    maps = resolve_targets(unet, ["attn2.to_q"])
    unet.add_adapter(LoraConfig(r=2, target_modules=["attn2.to_q"]))
    rows = {}
    leaders = record_inputs(
        unet, maps, unet_batches(), run_unet, lambda n, r: rows.setdefault(n, []).append(r.clone())
    )
    assert_same(leaders, rows, expected_rows(unet, ["attn2.to_q"], unet_batches(), run_unet))


def test_activations_are_not_kept_alive(unet):
    alive = []

    def observe(name, rows):
        alive.append(torch.utils.weak.WeakTensorKeyDictionary())
        alive[-1][rows] = True

    record_inputs(unet, resolve_targets(unet, QKV), unet_batches(), run_unet, observe)
    assert sum(len(entry) for entry in alive) == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_activations_name_layer_and_batch(unet, value):
    batches = unet_batches()
    batches[1][2][0, 0, 0] = value
    with pytest.raises(ValueError, match=r"non-finite activations reached .*attn2.to_[qk].* in batch 1"):
        record(unet, ["attn2.to_q", "attn2.to_k"], batches, run_unet)


def test_unusable_loaders(unet):
    with pytest.raises(ValueError, match="can be read only once"):
        record(unet, QKV, iter(unet_batches()), run_unet)
    with pytest.raises(ValueError, match="zero forget batches"):
        record(unet, QKV, [], run_unet)


def test_a_map_that_never_runs_is_named(net):
    def only_convolutions(model, batch):
        return model.plain(batch)

    with pytest.raises(ValueError, match="no input reached fc"):
        record(net, ["plain", "fc"], image_batches(), only_convolutions)


def test_a_changing_way_through_the_model_is_an_error():
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2), "b": torch.nn.Linear(2, 2)})
    calls = []

    def forward(model, x):
        calls.append(1)
        model["a"](x)
        model["b"](x if len(calls) == 1 else x + 1)

    with pytest.raises(ValueError, match="b read the input of a in an earlier batch and that of b now"):
        record(model, ["a", "b"], [torch.ones(3, 2)] * 2, forward)
