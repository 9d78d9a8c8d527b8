from importlib import import_module

import pytest
import torch
from fits import DATA, raiser, run, same, shallow
from pairs import sparse_model

fit_module = import_module("bridges.fit")


def mixed_modes():
    """Two models, some of whose modules are in training mode and some of whose parameters require gradients."""
    dense, sparse = shallow(dtype=torch.float32), shallow(sparse_model, dtype=torch.float32)
    for model in (dense, sparse):
        model.train()
        next(model.children()).eval()
        for i, parameter in enumerate(model.parameters()):
            parameter.requires_grad_(i % 2 == 0)
    return dense, sparse


def state_of(model):
    modes = [module.training for module in model.modules()]
    return modes, [p.requires_grad for p in model.parameters()], [p.grad is None for p in model.parameters()]


@pytest.mark.parametrize("ending", ["finished", "refused", "not finite", "interrupted", "finished, sparse trains"])
def test_models_are_left_as_they_were(ending, monkeypatch):
    dense, sparse = mixed_modes()
    models, joint = (dense, sparse), ending == "finished, sparse trains"
    states, weights = [state_of(m) for m in models], [[p.detach().clone() for p in m.parameters()] for m in models]
    if ending == "interrupted":
        monkeypatch.setattr(fit_module, "measure", raiser(KeyboardInterrupt))
    errors = {"refused": ValueError, "not finite": FloatingPointError, "interrupted": KeyboardInterrupt}
    data = DATA + 40 if ending == "refused" else DATA
    try:
        run(data, dense=dense, sparse=sparse, lr=1e30 if ending == "not finite" else 1e-2, train_sparse=joint)
        assert ending not in errors
    except tuple(errors.values()) as error:
        assert type(error) is errors[ending]
    assert [state_of(m) for m in models] == states
    for model, before in zip(models, weights, strict=True):
        unchanged = all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
        assert unchanged == (not joint or model is dense)


def test_the_users_random_state_and_accelerator_are_left_as_they_were():
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()  # another test may have left it
    models = {"dense": shallow(), "sparse": shallow(sparse_model)}
    before = torch.get_rng_state()
    run(**models)
    assert torch.equal(torch.get_rng_state(), before)
    assert not AcceleratorState._shared_state
    assert Accelerator(mixed_precision="bf16", cpu=True).mixed_precision == "bf16"
    AcceleratorState._reset_state()


@pytest.mark.parametrize("switch", [torch.no_grad, torch.inference_mode])
def test_a_fit_where_gradients_are_switched_off_is_the_same(switch):
    dense, sparse, expected = shallow(), shallow(sparse_model), run()
    with switch():
        assert same(run(dense=dense, sparse=sparse), expected)


def test_the_generators_of_all_cuda_devices_are_left_as_they_were(cuda_generators):
    models = {"dense": shallow(), "sparse": shallow(sparse_model)}
    before = dict(cuda_generators)
    run(None, **models, steps=2, sampled_rows=4, seq_len=6)
    assert all(torch.equal(cuda_generators[device], state) for device, state in before.items())
