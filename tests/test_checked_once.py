"""The test run's checks of types and shapes: each kind of mismatch is an error, in the package too."""

import jaxtyping
import pytest
import torch
from checked_once import checked_once
from jaxtyping import Float
from torch import Tensor

from bridges.ops.kl import kl_divergence

X = torch.ones(2, 3)


@checked_once(typechecker="any")
def product(a: "Float[Tensor, 'n d']", b: "Float[Tensor, 'd m']", *, drop: bool = False) -> "Float[Tensor, 'n m']":
    return (a @ b)[drop:]


@checked_once(typechecker="any")
def identity(x: "KnownToTypeCheckersAlone") -> "int | str":
    return x


def test_axes_agree_within_a_call_and_are_free_between_calls():
    assert product(X, X.T).shape == (2, 2) and product(X.T, X).shape == (3, 3)


@pytest.mark.parametrize(
    ("arguments", "drop"),
    [((X, X), False), ((X, X[0]), False), ((X.long(), X.T), False), ((X, X.T), 1), ((X, X.T), True)],
)
def test_an_argument_or_a_result_of_another_type_or_shape_is_an_error(arguments, drop):
    with pytest.raises(TypeError, match="violates type hint"):
        product(*arguments, drop=drop)


def test_a_name_that_only_type_checkers_know_is_any_type():
    assert identity(3) == 3 and identity("a") == "a"
    with pytest.raises(TypeError, match="violates type hint"):
        identity(2.5)


def test_the_functions_of_the_package_are_checked_unless_checks_are_off(unchecked):
    with pytest.raises(RuntimeError, match="size"):  # torch's own, as users meet it
        kl_divergence(X, X.T)
    jaxtyping.config.update("jaxtyping_disable", False)
    with pytest.raises(TypeError, match="kl_divergence"):
        kl_divergence(X, X.T)
