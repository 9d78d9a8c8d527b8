"""The language model inside whatever wraps it."""

import peft
import pytest
import torch
from torch import nn

from bridges.models.loading import as_residual
from bridges.models.wrapped import inner_model


class Delegating(nn.Module):
    """A user's wrapper, with a part of its own beside the model."""

    def __init__(self, model):
        super().__init__()
        self.value_head = nn.Sequential(nn.Linear(32, 1))
        self.inside = nn.ModuleDict({"policy": model})

    def forward(self, *args, **kwargs):
        return self.inside["policy"](*args, **kwargs)


def lora(model):
    return peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"]))


WRAPPERS = {
    "user's": Delegating,
    "DataParallel": nn.DataParallel,
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "PEFT": lora,
    "several": lambda model: Delegating(nn.DataParallel(torch.compile(lora(model), backend="eager"))),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_a_wrapped_model_is_the_one_inside(wrap, tiny, tokens):
    model, plain = tiny("llama"), as_residual(tiny("llama"))
    assert inner_model(model) is model
    wrapped = wrap(model)
    assert inner_model(wrapped) is model
    chain = as_residual(wrapped)
    assert chain.model is model and chain.sites == plain.sites
    with torch.no_grad():  # new LoRA weights change nothing
        assert torch.equal(chain.residuals(tokens)[1], plain.residuals(tokens)[1])


def test_what_is_no_language_model_is_itself(tiny):
    for model in (nn.Linear(2, 2), tiny("llama").model):
        assert inner_model(model) is model


def test_a_model_with_another_one_inside_is_itself(tiny):
    """A draft model, or a depth decoder."""
    model = tiny("llama")
    model.draft = tiny("gpt2")
    assert inner_model(model) is model


def test_a_wrapper_of_two_models_is_refused(tiny):
    two = nn.ModuleList([tiny("gpt2"), tiny("llama")])
    with pytest.raises(ValueError, match=r"model=ModuleList holds 2 language models \(GPT2LMHeadModel, LlamaForCausal"):
        as_residual(two)
