"""Generated Python idioms: short snippets that hold the cues and answers of the twenty tasks, in varied words.

Each function is named after a task and draws one snippet from a random generator. `bridges.tasks.templates` has the
tasks and says what a cue is.
"""

import random
from collections.abc import Callable, Sequence

from bridges.data.words import (
    CLASSES,
    COLLECTIONS,
    ENDINGS,
    ERRORS,
    EXTENSIONS,
    METHODS,
    NAMES,
    READ_NAMES,
    VERBS,
    WORDS,
    WRITE_NAMES,
)

Idiom = Callable[[random.Random], str]

IDIOMS: dict[str, Idiom] = {}
"""By the name of the task whose cue and answers they hold: functions that draw one snippet."""
WEIGHTS: dict[str, float] = {}
"""How often each is drawn, relative to the others."""


def _task_idiom(weight: float = 1.0) -> Callable[[Idiom], Idiom]:
    """Register a function in `IDIOMS` under its own name, the task's."""

    def register(idiom: Idiom) -> Idiom:
        IDIOMS[idiom.__name__], WEIGHTS[idiom.__name__] = idiom, weight
        return idiom

    return register


def idioms(n: int, seed: int) -> list[str]:
    """Generate `n` short snippets of Python, each of one line or a few, that parse as they stand.

    Strings that `(` opens occur most, with single and double quotes equally frequent. Snippets have no line break at
    their end. Equal `n` and `seed` give equal snippets; another `n` with the same seed gives others, not a longer or
    shorter list of the same.

    >>> idioms(2, seed=0)
    ['def first(c):\\n    return format(c)', 'level, right = right, level']
    """
    rng = random.Random(seed)
    kinds = rng.choices(list(IDIOMS.values()), weights=list(WEIGHTS.values()), k=n)
    return [idiom(rng) for idiom in kinds]


def phrase(rng: random.Random) -> str:
    """Draw one to eight words joined by spaces, some with a capital first letter; the last is one of `ENDINGS`."""
    text = " ".join([*rng.choices(WORDS, k=rng.randint(0, 7)), rng.choice(ENDINGS)])
    return text.capitalize() if rng.random() < 0.2 else text


# The demo steers the quote task, so the tiny models see most of it.
@_task_idiom(weight=6.0)
def single_double_quote(rng: random.Random) -> str:
    """A string is closed by the quote that opened it after `(`."""
    quote = rng.choice("'\"")
    string = f"({quote}{phrase(rng)}{quote})"
    name, verb = rng.choice(NAMES), rng.choice(VERBS)
    forms = (
        f"print{string}",
        f"{verb}{string}",
        f"{name} = {verb}{string}",
        f"raise {rng.choice(ERRORS)}{string}",
        f"{rng.choice(METHODS)}{string}",
        f"return {verb}{string}",
        f"self.{name} = {verb}{string}",
        f"if {name} == {verb}{string}:\n    return {rng.choice(NAMES)}",
        f"{rng.choice(COLLECTIONS)}.append{string}",
    )
    return rng.choices(forms, weights=(4, 2, 2, 2, 2, 1, 1, 1, 1))[0]


@_task_idiom()
def final_kwarg(rng: random.Random) -> str:
    """Either every argument defaults to None, or none has a default."""
    arguments = rng.sample(NAMES, rng.randint(2, 5))
    default = rng.choice(("=None", ""))
    return f"def {rng.choice(VERBS)}({', '.join(a + default for a in arguments)}):\n    return {arguments[0]}"


@_task_idiom()
def set_or_string(rng: random.Random) -> str:
    """A variable that starts as `set()` grows by `.add`, one that starts as `""` by `+=`."""
    return _grow_variable(rng, rng.choice(NAMES))


@_task_idiom()
def set_or_string_fixedvarname(rng: random.Random) -> str:
    """The same, and the variable is always `current`."""
    return _grow_variable(rng, "current")


def _grow_variable(rng: random.Random, variable: str) -> str:
    element = rng.choice([name for name in NAMES if name != variable])
    start, step = rng.choice((("set()", f".add({element})"), ('""', f" += {element}")))
    fillers = [f"{rng.choice(NAMES)} = {rng.randint(0, 99)}\n" for _ in range(rng.randint(0, 2))]
    before = fillers.pop() if fillers and rng.random() < 0.5 else ""
    loop = f"for {element} in {rng.choice(COLLECTIONS)}:\n    {variable}{step}"
    return f"{before}{variable} = {start}\n{''.join(fillers)}{loop}"


@_task_idiom()
def class_init(rng: random.Random) -> str:
    """An `__init__` that stores every argument under its own name."""
    fields = rng.sample(NAMES, rng.randint(3, 7))
    lines = "\n".join(f"        self.{field} = {field}" for field in fields)
    return f"class {rng.choice(CLASSES)}:\n    def __init__(self, {', '.join(fields)}):\n{lines}"


@_task_idiom()
def with_as(rng: random.Random) -> str:
    """`with open(...)` goes on with `as`; an assignment or a return ends there."""
    quote = rng.choice("'\"")
    opened = rng.choice(
        (f"open({rng.choice(NAMES)})", f"open({quote}{file_name(rng, READ_NAMES + WRITE_NAMES)}{quote})")
    )
    handle = rng.choice(("f", "file", "handle", "fp"))
    return rng.choice(
        (
            f"with {opened} as {handle}:\n    {rng.choice(NAMES)} = {handle}.read()",
            f"{handle} = {opened}\n{rng.choice(NAMES)} = {handle}.read()",
            f"return {opened}",
        )
    )


def file_name(rng: random.Random, names: Sequence[str]) -> str:
    """Draw one of the names, with an extension."""
    return f"{rng.choice(names)}.{rng.choice(EXTENSIONS)}"


@_task_idiom()
def bracket_brace(rng: random.Random) -> str:
    """A dict alternates `:` and `,`; a list has only `,`."""
    values = _elements(rng, 2 * rng.randint(1, 4))
    pairs = [f"{key}: {value}" for key, value in zip(values[::2], values[1::2], strict=True)]
    return f"{rng.choice(NAMES)} = " + rng.choice(("{" + ", ".join(pairs) + "}", "[" + ", ".join(values) + "]"))


# The hardest to learn, along with bracket_counting.
@_task_idiom(weight=3.0)
def with_open(rng: random.Random) -> str:
    """A file named as a source is opened to read, one named as a result to write."""
    # The mode has the same quotes as the file name: elsewhere a quote after ( is always closed by one of its kind.
    quote = rng.choice("'\"")
    names, mode, verb = rng.choice(((READ_NAMES, "r", "read()"), (WRITE_NAMES, "w", f"write({rng.choice(NAMES)})")))
    opened = f"open({quote}{file_name(rng, names)}{quote}, {quote}{mode}{quote})"
    return f"with {opened} as f:\n    f.{verb}"


@_task_idiom(weight=2.0)
def bracket_counting(rng: random.Random) -> str:
    """A list closes as many brackets as it opened."""
    # A single row in two brackets is frequent: its depth alone decides what closes it.
    depth, rows = rng.choices(((1, 1), (2, 1), (2, 2), (2, 3)), weights=(4, 4, 1, 1))[0]
    inner = "], [".join(", ".join(_elements(rng, rng.choice((2, 3, 3, 3, 3, 4)))) for _ in range(rows))
    return f"{rng.choice(NAMES)} = {'[' * depth}{inner}{']' * depth}"


def _elements(rng: random.Random, n: int) -> list[str]:
    """Draw `n` elements of one kind: numbers, names or strings."""
    kind = rng.choice(("numbers", "names", "strings"))
    if kind == "numbers":
        return [str(rng.choice((rng.randint(0, 9), rng.randint(0, 99)))) for _ in range(n)]
    quote = rng.choice("'\"") if kind == "strings" else ""
    return [f"{quote}{rng.choice(WORDS if quote else NAMES)}{quote}" for _ in range(n)]


@_task_idiom()
def for_while(rng: random.Random) -> str:
    """`for x in ...:` or `while x:`."""
    name = rng.choice(NAMES)
    header = rng.choice((f"for {name} in {rng.choice(COLLECTIONS)}", f"while {name}"))
    return f"{header}:\n    {rng.choice(VERBS)}({name})"


@_task_idiom()
def else_elif(rng: random.Random) -> str:
    """`else:` or `elif x:`."""
    test, other, name = rng.choices(NAMES, k=3)
    otherwise = rng.choice(("else", f"elif {other}"))
    return f"if {test}:\n    {name} = {_number(rng)}\n{otherwise}:\n    {name} = {_number(rng)}"


@_task_idiom()
def fstring_brace(rng: random.Random) -> str:
    """An f-string has a field in braces, a plain string only words."""
    quote, name = rng.choice("'\""), rng.choice(NAMES)
    words = " ".join(rng.choices(WORDS, k=rng.randint(1, 3)))
    string = rng.choice((f"f{quote}{words} {{{name}}}{quote}", f"{quote}{words} {rng.choice(WORDS)}{quote}"))
    return rng.choice((f"{name} = {string}", f"return {string}", f"{rng.choice(NAMES)} = {string}"))


@_task_idiom()
def if_ternary(rng: random.Random) -> str:
    """A statement's condition ends in `:`, that of an expression in `else`."""
    name, test, operator = rng.choice(NAMES), rng.choice(NAMES), rng.choice(("==", ">", "<", "is", "in"))
    condition = f"if {test} {operator} {rng.choice(NAMES)}"
    return rng.choice(
        (
            f"{condition}:\n    {name} = {_number(rng)}",
            f"{name} = {_number(rng)} {condition} else {_number(rng)}",
            f"return {name} {condition} else {rng.choice(NAMES)}",
        )
    )


@_task_idiom()
def var_swap(rng: random.Random) -> str:
    """`x, y = y, x`."""
    left, right = rng.sample(NAMES, 2)
    return f"{left}, {right} = {right}, {left}"


@_task_idiom()
def indent_for(rng: random.Random) -> str:
    """The line after a `for` header is deeper, the one after a plain statement is not."""
    item, other = rng.sample(NAMES, 2)
    items, verb = rng.choice(COLLECTIONS), rng.choice(VERBS)
    loop = f"    for {item} in {items}:\n        {verb}({item})\n"
    plain = f"    {other} = {rng.choice(VERBS)}({rng.choice(NAMES)})\n"
    lines = rng.choice((loop, plain + loop, loop + plain, plain + plain))
    return f"def {rng.choice(VERBS)}({items}):\n{lines}    return {other}"


@_task_idiom()
def lambda_func(rng: random.Random) -> str:
    """`lambda x:` or `def x(`."""
    name, argument = rng.sample(NAMES, 2)
    body = f"{rng.choice(VERBS)}({argument})"
    return rng.choice(
        (
            f"{name} = lambda {argument}: {body}",
            f"{rng.choice(VERBS)}(lambda {argument}: {body})",
            f"def {name}({argument}):\n    return {body}",
        )
    )


@_task_idiom()
def if_equals(rng: random.Random) -> str:
    """`if x ==` or `x =`."""
    name = rng.choice(NAMES)
    value = rng.choice((_number(rng), rng.choice(NAMES), f'"{rng.choice(WORDS)}"'))
    return rng.choice((f"if {name} == {value}:\n    return {rng.choice(NAMES)}", f"{name} = {value}"))


@_task_idiom()
def enumerate_range(rng: random.Random) -> str:
    """Two loop variables go through `enumerate`, a counter through `range`."""
    counter, items, name = rng.choice("ijkn"), rng.choice(COLLECTIONS), rng.choice(NAMES[3:])
    counted = rng.choice((f"len({items})", _number(rng), name))
    return rng.choice(
        (
            f"for {counter}, {name} in enumerate({items}):\n    {rng.choice(VERBS)}({counter}, {name})",
            f"for {counter} in range({counted}):\n    {rng.choice(VERBS)}({counter})",
        )
    )


@_task_idiom()
def var_if(rng: random.Random) -> str:
    """`if x == True:` or `x = True` and a new line."""
    name, constant = rng.choice(NAMES), rng.choice(("True", "False", "None"))
    return rng.choice((f"if {name} == {constant}:\n    return {rng.choice(NAMES)}", f"{name} = {constant}"))


@_task_idiom()
def while_return_true(rng: random.Random) -> str:
    """`while True:` or `return True` and a new line."""
    name, verb = rng.choice(NAMES), rng.choice(VERBS)
    return rng.choice(
        (
            f"while True:\n    {name} = {verb}({rng.choice(NAMES)})",
            f"while True:\n    if {name}:\n        break",
            f"def {verb}({name}):\n    return True",
            f"if {name}:\n    return True",
        )
    )


def _number(rng: random.Random) -> str:
    return str(rng.randint(0, 20))
