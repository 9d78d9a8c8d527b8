"""What the steerings of one model share: pausing, the prompt that generate is given, coming and going."""

import copy

import pytest
import torch
from torch import nn

from bridges.steering.edits import Edit
from bridges.steering.positions import Windows
from bridges.steering.registry import Installed, Steering, installed, listed, lock


class Some(Steering):
    def __init__(self):
        self.idle, self.windows = False, Windows([Edit("0.attn", 1, 1.0, positions=-1)])


class Generating(nn.Module):
    def generate(self, inputs=None, **kwargs):
        self.called = inputs, kwargs
        return [steering.windows._told[0] for steering in installed(self)]


def test_they_are_paused_together_and_each_is_as_it_was_after():
    model, one, two = nn.Linear(1, 1), Some(), Some()
    two.idle = True
    with listed(model, one), listed(model, two):
        with pytest.raises(RuntimeError), installed(model).paused():
            assert one.idle and two.idle
            raise RuntimeError
        assert not one.idle and two.idle
    assert not installed(model) and not hasattr(model, "_steering")


def test_generate_tells_every_one_its_prompt_however_it_is_given():
    model, prompt, one, two = Generating(), torch.ones(2, 3).long(), Some(), Some()
    with listed(model, one), listed(model, two):
        for args, kwargs in (((prompt,), {}), ((), {"inputs": prompt}), ((), {"input_ids": prompt})):
            found = model.generate(*args, max_new_tokens=4, **kwargs)
            assert all(known is prompt for known in found) and len(found) == 2
            assert model.called[1]["max_new_tokens"] == 4
        assert one.windows._told is two.windows._told is None
    assert model.generate(prompt) == [] and "generate" not in vars(model)


def test_the_last_to_leave_clears_up_and_a_users_own_generate_comes_back():
    model, one, two = Generating(), Some(), Some()
    own = model.generate = lambda ids: ids + 1
    first, second = listed(model, one), listed(model, two)
    first.__enter__()
    second.__enter__()
    assert list(installed(model)) == [one, two]
    first.__exit__(None, None, None)
    assert list(installed(model)) == [two] and model.generate is not own
    assert model.generate(torch.ones(1, 1).long()).item() == 2
    second.__exit__(None, None, None)
    assert model.generate is own and type(installed(model)) is Installed and not installed(model)


def test_a_generate_inside_a_generate_has_its_own_prompt_and_gives_back_the_outer_one():
    windows, outer, inner = Some().windows, torch.ones(1, 3).long(), torch.ones(1, 5).long()
    with windows.generating(outer, None):
        with windows.generating(inner, None):
            assert windows._told[0] is inner
        assert windows._told[0] is outer


def test_a_steered_model_is_not_copied_by_halves():
    model = Generating()
    with listed(model, Some()), pytest.raises(ValueError, match="leave steer\\(\\) before copying it"):
        copy.deepcopy(model)
    assert not installed(copy.deepcopy(model))


def test_a_users_own_generate_may_come_and_go_inside():
    model = Generating()
    with listed(model, Some()):
        model.generate = None
        del model.generate
    assert "generate" not in vars(model)


def test_a_model_has_one_lock_of_its_own():
    one, two = nn.Linear(1, 1), nn.Linear(1, 1)
    assert lock(one) is lock(one) is not lock(two)
