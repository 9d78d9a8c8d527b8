import torch

from bridges.data.random_state import preserve_random_state


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
