import pytest
import torch
from torch import nn

from bridges.models import modes


def state(model):
    modes = [module.training for module in model.modules()]
    return modes, [p.requires_grad for p in model.parameters()]


@pytest.fixture
def model():
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.Dropout()))
    model[1].eval()
    model[0].bias.requires_grad_(False)
    return model


def test_frozen_restores_modes_and_requires_grad(model):
    before = state(model)
    with modes.frozen(model):
        assert state(model) == ([False] * 5, [False] * 4)
    with pytest.raises(KeyError), modes.frozen(model):
        raise KeyError
    assert state(model) == before == ([True, True, False, False, False], [True, False, True, True])


def test_train_mode_restores_modes_and_clears_gradients(model):
    before = state(model)
    with modes.train_mode(model):
        assert state(model)[0] == [True] * 5
        model(torch.ones(1, 2)).sum().backward()
        assert model[0].weight.grad is not None
    assert state(model) == before and all(p.grad is None for p in model.parameters())
    with pytest.raises(KeyError), modes.train_mode(model):
        raise KeyError
    assert state(model) == before


def test_eval_mode_restores_the_mode_of_every_module():
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout()))
    model[1].eval()
    before = [module.training for module in model.modules()]
    with pytest.raises(KeyError), modes.eval_mode(model):
        assert not any(module.training for module in model.modules())
        raise KeyError
    assert [module.training for module in model.modules()] == before


def test_frozen_restores_weights_that_were_made_in_inference_mode():
    with torch.inference_mode():
        model = nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    with modes.frozen(model):
        assert not model.weight.requires_grad
        model(torch.ones(1, 2))
    assert model.weight.requires_grad and not model.bias.requires_grad
