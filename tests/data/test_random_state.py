from types import SimpleNamespace

import pytest
import torch

from bridges.data.random_state import draws_from, preserve_random_state, random_state


def test_the_cpu_generator_comes_back_after_an_exception_too():
    before = torch.get_rng_state()
    try:
        with preserve_random_state():
            torch.manual_seed(5)
            assert not torch.equal(torch.get_rng_state(), before)
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert torch.equal(torch.get_rng_state(), before)


def test_the_generators_of_all_cuda_devices_come_back(cuda_generators):
    before = dict(cuda_generators)
    with preserve_random_state():
        torch.manual_seed(5)
        assert all(not torch.equal(cuda_generators[device], state) for device, state in before.items())
    assert len(before) == 2
    assert all(torch.equal(cuda_generators[device], state) for device, state in before.items())


def test_in_a_fork_of_a_process_that_used_cuda_only_the_cpu_generator_is_touched(cuda_generators, monkeypatch):
    def fail(*_):
        raise RuntimeError("Cannot re-initialize CUDA in forked subprocess")

    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: True)
    for name in ("get_rng_state", "set_rng_state", "manual_seed_all"):
        monkeypatch.setattr(torch.cuda, name, fail)
    before = torch.get_rng_state()
    with preserve_random_state():
        torch.manual_seed(5)
    assert torch.equal(torch.get_rng_state(), before)


def test_draws_are_repeated_on_the_cpu_and_the_generator_goes_on():
    device = torch.device("cpu")
    state = random_state(device)
    first, second = torch.rand(3), torch.rand(3)
    with draws_from(state, device):
        assert torch.equal(torch.rand(3), first)
        assert torch.equal(torch.rand(3), second)
    third = torch.rand(3)
    with draws_from(state, device):
        assert torch.equal(torch.rand(9)[6:], third)


@pytest.mark.parametrize("kind", ["cuda", "xpu"])
def test_draws_are_repeated_on_any_accelerator(kind, monkeypatch):
    """A made-up device module with one state per device: that of the device comes in and goes again."""
    states = {torch.device(kind, 0): "0", torch.device(kind, 1): "1"}
    module = SimpleNamespace(
        get_rng_state=states.__getitem__, set_rng_state=lambda state, device: states.update({device: state})
    )
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    monkeypatch.setattr(torch, kind, module)
    device = torch.device(kind, 1)
    state = random_state(device)
    states[device] = "later"
    with draws_from(state, device):
        assert list(states.values()) == ["0", "1"]
    assert list(states.values()) == ["0", "later"]
