"""The twenty tasks of paper table 1 as text: pairs of prompts that differ in one cue, with what should follow each.

A cue is the token or tokens in which the prompts of a pair differ, and which decide the answer. Each function is named
after its task and draws one pair from a random generator. The two prompts of a pair may differ in length:
`bridges.tasks.pairs` draws until they have equally many tokens. Lines without a cue (`_filler`) vary the length.
"""

import random
import re
from collections.abc import Callable
from typing import NamedTuple

from bridges.data.idioms import file_name, phrase
from bridges.data.words import CLASSES, COLLECTIONS, EXTENSIONS, NAMES, READ_NAMES, VERBS, WORDS, WRITE_NAMES

Answer = str | re.Pattern[str]
"""Text whose first token is the answer, or a pattern: every token whose text it matches is an answer."""

NEW_LINE = re.compile(r"\n")
WORD = re.compile(r" ?[A-Za-z_]")
NEXT_WORD = re.compile(r" [A-Za-z_]")


class Example(NamedTuple):
    """A pair of prompts that differ in one cue."""

    first: str
    first_answer: Answer
    second: str
    second_answer: Answer


Template = Callable[[random.Random], Example]
EXAMPLES: dict[str, Template] = {}
"""The templates by the names of their tasks."""


def _task(template: Template) -> Template:
    """Register a template in `EXAMPLES` under its own name."""
    EXAMPLES[template.__name__] = template
    return template


@_task
def single_double_quote(rng: random.Random) -> Example:
    """A string is closed by the quote that opened it."""
    verb, name = rng.choice(VERBS), rng.choice(NAMES)
    opening, text = rng.choice(("print", verb, f"{name} = {verb}", f"return {verb}")), phrase(rng)
    return Example(f"{opening}('{text}", "')", f'{opening}("{text}', '")')


@_task
def final_kwarg(rng: random.Random) -> Example:
    """The last argument has a default if the earlier ones do; otherwise the list ends."""
    verb, *names = rng.choice(VERBS), *rng.sample(NAMES, 7)
    last, with_default = names.pop(), rng.randint(1, 2)
    first = "".join(f"{name}=None, " for name in names[:with_default])
    second = "".join(f"{name}, " for name in names[: rng.randint(1, 6)])
    return Example(f"def {verb}({first}{last}", "=None", f"def {verb}({second}{last}", "):")


@_task
def set_or_string(rng: random.Random) -> Example:
    """A variable that starts as a set grows by `.add`, one that starts as a string by `+=`."""
    return _grown_variable(rng, rng.choice(NAMES))


@_task
def set_or_string_fixedvarname(rng: random.Random) -> Example:
    """The same, and the variable is always `current`."""
    return _grown_variable(rng, "current")


def _grown_variable(rng: random.Random, name: str) -> Example:
    loop = f"for {rng.choice(NAMES)} in {rng.choice(COLLECTIONS)}:\n    {name}"
    first, second = (f"{name} = {start}\n{_number_line(rng)}{loop}" for start in ("set()", '""'))
    return Example(first, ".add", second, " +=")


@_task
def class_init(rng: random.Random) -> Example:
    """In an `__init__`, a field is set from the argument of its own name."""
    fields = rng.sample(NAMES, rng.randint(4, 7))
    done = rng.randint(1, len(fields) - 2)
    lines = "".join(f"        self.{field} = {field}\n" for field in fields[:done])
    head = f"class {rng.choice(CLASSES)}:\n    def __init__(self, {', '.join(fields)}):\n{lines}        self."
    one, other = rng.sample(fields[done:], 2)
    return Example(f"{head}{one} =", f" {one}", f"{head}{other} =", f" {other}")


@_task
def with_as(rng: random.Random) -> Example:
    """`with open(...)` goes on with `as`; an assignment ends there."""
    quote, handle, filler = rng.choice("'\""), rng.choice(("f", "file", "handle")), _filler(rng)
    one, other = (f"open({quote}{file_name(rng, READ_NAMES)}{quote})" for _ in range(2))
    return Example(f"{filler}with {one}", " as", f"{filler}{handle} = {other}", NEW_LINE)


@_task
def bracket_brace(rng: random.Random) -> Example:
    """A dict's key is followed by `:`, a list's element by `,`."""
    name, elements = rng.choice(NAMES), rng.sample(NAMES, 2 * rng.randint(1, 3) + 1)
    pairs = "".join(f"{key}: {value}, " for key, value in zip(elements[:-1:2], elements[1::2], strict=True))
    items = "".join(f"{element}, " for element in elements[:-1])
    return Example(f"{name} = {{{pairs}{elements[-1]}", ":", f"{name} = [{items}{elements[-1]}", ",")


@_task
def with_open(rng: random.Random) -> Example:
    """A file named as a source is opened to read, one named as a result to write."""
    quote, ending, filler = rng.choice("'\""), rng.choice(EXTENSIONS), _filler(rng)
    first, second = (
        f"{filler}with open({quote}{rng.choice(names)}.{ending}{quote}, {quote}" for names in (READ_NAMES, WRITE_NAMES)
    )
    return Example(first, f"r{quote}", second, f"w{quote}")


@_task
def bracket_counting(rng: random.Random) -> Example:
    """A list closes as many brackets as it opened."""
    name, row = rng.choice(NAMES), ", ".join(str(rng.randint(0, 99)) for _ in range(3))
    return Example(f"{name} = [{row}", "]\n", f"{name} = [[{row}", "]]\n")


@_task
def for_while(rng: random.Random) -> Example:
    """`for x` goes on with `in`, `while x` with a colon."""
    name, filler = rng.choice(NAMES), _filler(rng)
    return Example(f"{filler}for {name}", " in", f"{filler}while {name}", ":")


@_task
def else_elif(rng: random.Random) -> Example:
    """`else` ends in a colon, `elif` goes on with a condition."""
    test, name = rng.choices(NAMES, k=2)
    head = f"if {test}:\n    {name} = {rng.randint(0, 20)}\n"
    return Example(f"{head}else", ":", f"{head}elif", NEXT_WORD)


@_task
def fstring_brace(rng: random.Random) -> Example:
    """An f-string goes on with a field in braces, a plain string with words."""
    quote, name = rng.choice("'\""), rng.choice(NAMES)
    one, other = (" ".join(rng.choices(WORDS, k=3)) for _ in range(2))
    return Example(f"{name} = f{quote}{one}", " {", f"{name} = {quote}{other}", WORD)


@_task
def if_ternary(rng: random.Random) -> Example:
    """The condition of an `if` statement ends in a colon, that of a conditional expression in `else`."""
    name, test, other = rng.choices(NAMES, k=3)
    condition = f"if {test} {rng.choice(('==', '>', '<', 'is', 'in'))} {other}"
    one, two = (rng.randint(0, 20) for _ in range(2))
    return Example(f"{name} = {one}\n{condition}", ":", f"{name} = {two} {condition}", " else")


@_task
def var_swap(rng: random.Random) -> Example:
    """`x, y = y,` goes on with `x`."""
    one, other, second = rng.sample(NAMES, 3)
    return Example(f"{one}, {second} = {second},", f" {one}", f"{other}, {second} = {second},", f" {other}")


@_task
def indent_for(rng: random.Random) -> Example:
    """The line after a `for` header is deeper, the one after a plain statement is not."""
    item, other, argument = rng.choices(NAMES, k=3)
    head = f"def {rng.choice(VERBS)}({rng.choice(COLLECTIONS)}):\n    "
    loop = f"for {item} in {rng.choice(COLLECTIONS)}:"
    plain = f"{other} = {rng.choice(VERBS)}({argument})"
    after = rng.choice(VERBS)  # some tokenizers put the last space of an indentation into the word that follows
    return Example(head + loop, f"\n        {after}", head + plain, f"\n    {after}")


@_task
def lambda_func(rng: random.Random) -> Example:
    """The name after `lambda` is followed by a colon, the one after `def` by a bracket."""
    name, target = rng.choices(NAMES, k=2)
    call = rng.choice((f"{target} = lambda", f"{target} = {rng.choice(VERBS)}(lambda"))
    return Example(f"{call} {name}", ":", f"{_filler(rng)}def {name}", "(")


@_task
def if_equals(rng: random.Random) -> Example:
    """`if x` goes on with a comparison, `x` with an assignment."""
    name = rng.choice(NAMES)
    return Example(f"{_number_line(rng)}if {name}", " ==", f"{_number_line(rng)}{name}", " =")


@_task
def enumerate_range(rng: random.Random) -> Example:
    """Two loop variables go through `enumerate`, one counter through `range`."""
    counter, name = rng.choice("ijkn"), rng.choice(NAMES[3:])
    two, one = f"for {counter}, {name} in", f"for {counter} in"
    return Example(f"{_filler(rng)}{two}", " enumerate", f"{_filler(rng)}{one}", " range")


@_task
def var_if(rng: random.Random) -> Example:
    """A comparison with a constant in an `if` ends in a colon, an assignment of it in a new line."""
    name, constant = rng.choice(NAMES), rng.choice(("True", "False", "None"))
    lines = _number_line(rng), _number_line(rng)
    return Example(f"{lines[0]}if {name} == {constant}", ":", f"{lines[1]}{name} = {constant}", NEW_LINE)


@_task
def while_return_true(rng: random.Random) -> Example:
    """`while True` ends in a colon, `return True` in a new line."""
    head = f"def {rng.choice(VERBS)}({rng.choice(NAMES)}):\n    "
    return Example(f"{head}while True", ":", f"{head}return True", NEW_LINE)


def _number_line(rng: random.Random) -> str:
    return f"{rng.choice(NAMES)} = {rng.choice((rng.randint(0, 9), rng.randint(10, 99)))}\n"


def _filler(rng: random.Random) -> str:
    """Draw a line without a cue."""
    call = f"{rng.choice(NAMES)} = {rng.choice(VERBS)}({rng.choice(NAMES)})\n"
    return rng.choice((_number_line(rng), call))


def with_fillers(example: Example, rng: random.Random) -> Example:
    """Put a line without a cue before each prompt; the two lines may differ in length."""

    def line() -> str:
        name, other = rng.sample(NAMES, 2)
        return rng.choice((_filler(rng), f"{name} = {other}\n", f"{name} = not {other}\n"))

    return example._replace(first=line() + example.first, second=line() + example.second)
