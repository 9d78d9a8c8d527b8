"""The checks of types and shapes in the test run, quicker than jaxtyping's own decorator.

That one binds every call's arguments by name, checks them before the call and again with the result, and prepares two
checks of every function on import: a fifth of the time of tests on small models. Here beartype checks each argument and
the result once, around the call, and a function's check is made at its first call.
"""

from functools import partial, wraps
from inspect import get_annotations
from types import FunctionType
from typing import Any, get_type_hints

import jaxtyping
from beartype import BeartypeConf, beartype

_jaxtyped = getattr(jaxtyping.jaxtyped, "replaced", jaxtyping.jaxtyped)  # its own, also where this is imported again
# As with jaxtyping's own decorator, what is refused raises a TypeError.
_with_checks = beartype(conf=BeartypeConf(violation_type=TypeError))
_axes_of_one_call = _jaxtyped("context")


def install():
    """Have jaxtyping's import hook, which decorates every function of the package, use this decorator."""
    checked_once.replaced = _jaxtyped
    jaxtyping.jaxtyped = checked_once


def checked_once(fn=None, *, typechecker=None):
    """A function that raises where an argument or its result is not of the type or shape of its annotation."""
    if fn is None:  # the hook writes a decorator with arguments
        return partial(checked_once, typechecker=typechecker)
    if typechecker is None or not isinstance(fn, FunctionType):  # a class or a property, which are seldom called
        return _jaxtyped(fn, typechecker=typechecker)
    checked = None

    @wraps(fn)
    def run(*args, **kwargs):
        nonlocal checked
        if jaxtyping.config.jaxtyping_disable:
            return fn(*args, **kwargs)
        if checked is None:
            checked = _with_checks(_with_types(fn))
        with _axes_of_one_call:
            return checked(*args, **kwargs)

    return run


def _with_types(fn):
    """A copy of a function whose annotations, which are text, are the types that they name."""
    copy = FunctionType(fn.__code__, fn.__globals__, fn.__name__, fn.__defaults__, fn.__closure__)
    copy.__kwdefaults__, copy.__qualname__, copy.__module__ = fn.__kwdefaults__, fn.__qualname__, fn.__module__
    copy.__annotations__ = {name: _type_of(hint, fn) for name, hint in get_annotations(fn).items()}
    return copy


def _type_of(hint, fn):
    """The type of an annotation; any, where its module imports a name for type checkers alone."""

    def holder(value: hint):
        del value

    try:
        return get_type_hints(holder, fn.__globals__, include_extras=True)["value"]
    except NameError:
        return Any
