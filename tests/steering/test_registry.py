"""How the calls of a model reach those who follow them, and how the model gets its own methods back."""

import copy
import inspect
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from bridges.steering.registry import CallTracker, register


class Recording(CallTracker):
    """Keeps the prompts of the `generate` at hand, and the forward calls with those they were made in."""

    def __init__(self):
        self.prompts, self.calls = (), []

    def forward(self, forward, *args, **kwargs):
        self.calls.append((args, [prompt.input_ids for prompt in self.prompts]))
        return forward(*args, **kwargs)

    def check_generate(self, input_ids, arguments):
        pass

    def generating_batch(self):
        self.calls.append("batch")

    @contextmanager
    def generating(self, prompts):
        outer, self.prompts = self.prompts, prompts
        try:
            yield
        finally:
            self.prompts = outer


class Generating(nn.Module):
    def forward(self, input_ids):
        return input_ids + 1

    def generate(self, inputs=None, inner=None, **kwargs):
        prompt = kwargs.get("input_ids") if inputs is None else inputs
        if inner is not None:
            self.generate(inner)
        return self(prompt)


PROMPT = torch.ones(2, 3).long()


@pytest.mark.parametrize(("args", "name"), [((PROMPT,), None), ((), "inputs"), ((), "input_ids")])
def test_every_tracker_is_given_the_prompt_of_generate_however_it_is_passed(args, name):
    model, trackers = Generating(), [Recording(), Recording()]
    with register(model, trackers[0]), register(model, trackers[1]):
        model.generate(*args, max_new_tokens=4, **({name: PROMPT} if name else {}))
        model(PROMPT)
    for tracker in trackers:
        (_, inside), (_, outside) = tracker.calls
        assert len(inside) == 1 and inside[0] is PROMPT and outside == []


def test_a_generate_inside_a_generate_has_its_own_prompt():
    model, tracker, inner = Generating(), Recording(), torch.ones(1, 5).long()
    with register(model, tracker):
        model.generate(PROMPT, inner=inner)
    assert [known[0].shape for _, known in tracker.calls] == [inner.shape, PROMPT.shape]


def test_guidance_brings_a_prompt_of_its_own():
    model, tracker, negative = Generating(), Recording(), torch.zeros(2, 2).long()
    with register(model, tracker):
        model.generate(PROMPT, guidance_scale=1.5, negative_prompt_ids=negative)
        model.generate(PROMPT, guidance_scale=1.5)
    assert [[ids.shape[1] for ids in known] for _, known in tracker.calls] == [[3, 2], [3, 1]]


def test_every_way_into_continuous_batching_is_told():
    class Batching(Generating):
        def init_continuous_batching(self):
            return "manager"

        def generate_batch(self):
            return self.init_continuous_batching()

    model, tracker = Batching(), Recording()
    with register(model, tracker):
        assert model.init_continuous_batching() == "manager" and tracker.calls == ["batch"]
        assert model.generate_batch() == "manager" and tracker.calls == ["batch"] * 3
    assert model.generate_batch() == "manager" and len(tracker.calls) == 3


def test_trackers_may_leave_in_any_order_and_a_users_own_methods_come_back():
    model, one, two = Generating(), Recording(), Recording()
    own = model.generate = lambda ids: ids + 1
    first, second = register(model, one), register(model, two)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert model.generate is not own and torch.equal(model.generate(PROMPT), PROMPT + 1)
    model(PROMPT)
    second.__exit__(None, None, None)
    assert model.generate is own and "forward" not in vars(model)
    assert len(one.calls) == 0 and len(two.calls) == 1


def test_a_users_own_generate_may_come_and_go_inside():
    model = Generating()
    with register(model, Recording()):
        model.generate = None
        del model.generate
    assert not {"generate", "forward"} & set(vars(model))


def test_the_methods_keep_their_signatures():
    model = Generating()
    expected = [inspect.signature(method) for method in (model.forward, model.generate)]
    with register(model, Recording()):
        assert [inspect.signature(method) for method in (model.forward, model.generate)] == expected


def test_a_deep_copy_has_its_own_methods():
    model, tracker = Generating(), Recording()
    with register(model, tracker):
        copied = copy.deepcopy(model)
        copied(PROMPT)
        assert copied.forward.__self__ is copied
    assert tracker.calls == []
