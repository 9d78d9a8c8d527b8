import copy

import accelerate
import pytest
import torch
from accelerate.hooks import remove_hook_from_submodules
from torch import nn

from bridges.io.fingerprint import checked_fingerprint, fingerprint, same_model


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_copy_in_another_dtype_is_the_same_model(dtype, tiny):
    model = tiny("gpt2")
    other = copy.deepcopy(model).to(dtype)
    assert same_model(fingerprint(model), fingerprint(other)) and same_model(fingerprint(other), fingerprint(model))


def test_a_half_precision_model_raised_again_is_the_same_model(tiny):
    for dtype in (torch.bfloat16, torch.float16):
        half = tiny("gpt2").to(dtype)
        assert fingerprint(half) == fingerprint(copy.deepcopy(half).float())


def test_a_fingerprint_is_repeatable_and_names_both_roundings(tiny):
    mark = fingerprint(tiny("gpt2"))
    assert mark == fingerprint(tiny("gpt2").train())
    labels = [part.split(":") for part in mark.split()]
    assert [label for label, _ in labels] == ["bf16", "fp16"] and all(len(digest) == 32 for _, digest in labels)


def test_a_model_of_other_values_has_another_fingerprint(tiny):
    mark = fingerprint(tiny("gpt2"))
    assert not same_model(mark, fingerprint(tiny("gpt2", seed=1)))
    one_weight = tiny("gpt2")
    one_weight.transformer.h[1].mlp.c_fc.weight.data[3, 4] += 0.5
    assert not same_model(mark, fingerprint(one_weight))
    last = tiny("gpt2")
    last.transformer.ln_f.bias.data[-1] += 0.5
    assert not same_model(mark, fingerprint(last))


def test_names_and_shapes_count_and_the_sign_of_zero_does_not():
    def linear(value, shape=(2, 3)):
        model = nn.Linear(3, 2, bias=False)
        model.weight.data = torch.full(shape, value)
        return model

    assert fingerprint(linear(0.0)) == fingerprint(linear(-0.0))
    assert not same_model(fingerprint(linear(1.0)), fingerprint(linear(1.0, (3, 2))))
    named = nn.Module()
    named.other = linear(1.0).weight
    assert not same_model(fingerprint(linear(1.0)), fingerprint(named))


def test_a_parameter_without_values_is_named():
    with pytest.raises(ValueError, match=r"parameter '0.weight' holds no values.*; load the model's weights"):
        fingerprint(nn.Sequential(nn.Linear(2, 2, bias=False, device="meta")))


def test_a_check_hashes_a_model_once_until_a_parameter_changes(tiny, monkeypatch):
    calls = []
    monkeypatch.setattr("bridges.io.fingerprint.fingerprint", lambda model: calls.append(model) or fingerprint(model))
    model = tiny("gpt2")
    assert checked_fingerprint(model) == checked_fingerprint(model) == fingerprint(model) and len(calls) == 1
    weight = model.transformer.h[1].mlp.c_fc.weight
    changes = [
        lambda: torch.optim.SGD([weight], lr=1.0).step(),
        lambda: weight.mul_(2),
        lambda: model.load_state_dict(tiny("gpt2", seed=1).state_dict()),
        lambda: setattr(weight, "data", torch.zeros_like(weight)),
        lambda: model.to(torch.bfloat16),
    ]
    weight.grad = torch.ones_like(weight)
    for change in changes:
        with torch.no_grad():
            change()
        assert checked_fingerprint(model) == fingerprint(model)
    assert len(calls) == 1 + len(changes)
    assert checked_fingerprint(tiny("gpt2", seed=2)) != checked_fingerprint(model)


def test_a_model_made_in_inference_mode_can_be_checked(tiny):
    with torch.inference_mode():
        model = nn.Linear(3, 2)
    assert checked_fingerprint(model) == fingerprint(model)


def test_a_check_hashes_an_offloaded_model_once_until_it_is_offloaded_anew(tiny, tokens, monkeypatch):
    calls = []
    monkeypatch.setattr("bridges.io.fingerprint.fingerprint", lambda model: calls.append(model) or fingerprint(model))
    model = accelerate.cpu_offload(tiny("llama"), execution_device="cpu")
    mark = checked_fingerprint(model)
    model(tokens)
    assert checked_fingerprint(model) == mark and len(calls) == 1
    remove_hook_from_submodules(model)
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    accelerate.cpu_offload(model, execution_device="cpu")
    assert checked_fingerprint(model) == fingerprint(model) != mark and len(calls) == 2


def test_a_module_with_parameters_of_its_own_may_have_several_hooks():
    """accelerate gives the whole model a second hook where it holds parameters itself."""
    model = nn.Linear(3, 2)
    mark = fingerprint(model)
    accelerate.cpu_offload(model, execution_device="cpu")
    assert len(model._hf_hook.hooks) == 2 and model.weight.is_meta and fingerprint(model) == mark
