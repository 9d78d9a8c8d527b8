"""The templates against Python's own parser: the answer is valid and, where syntax decides, the other one is not."""

import ast
import random
import re

import pytest

from bridges.data.idioms import IDIOMS
from bridges.tasks.pairs import TASKS
from bridges.tasks.templates import EXAMPLES, NEW_LINE, NEXT_WORD, WORD

# What completes a prompt and its answer to a whole program, for the first prompt and for the second.
RESTS = {
    "single_double_quote": ("", ""),
    "final_kwarg": ("): pass", " pass"),
    "set_or_string": ("(1)", " 'x'"),
    "set_or_string_fixedvarname": ("(1)", " 'x'"),
    "class_init": ("", ""),
    "with_as": (" f: pass", "x = 1"),
    "bracket_brace": (" 1}", " 1]"),
    "with_open": (") as f: pass", ") as f: pass"),
    "bracket_counting": ("", ""),
    "for_while": (" x: pass", " pass"),
    "else_elif": (" pass", ": pass"),
    "if_ternary": (" pass", " 1"),
    "var_swap": ("", ""),
    "indent_for": ("()", "()"),
    "lambda_func": (" 1", "x): pass"),
    "if_equals": (" 1: pass", " 1"),
    "enumerate_range": ("(x): pass", "(9): pass"),
    "var_if": (" pass", "x = 1"),
    "while_return_true": (" pass", "x = 1"),
}
SYNTACTIC = (
    "single_double_quote",
    "final_kwarg",
    "with_as",
    "bracket_brace",
    "bracket_counting",
    "for_while",
    "else_elif",
    "if_ternary",
    "indent_for",
    "lambda_func",
    "if_equals",
    "var_if",
    "while_return_true",
)
"""Tasks of which at least one prompt, given the other's answer, is no Python."""


def text(answer):
    return {NEW_LINE: "\n", WORD: " value", NEXT_WORD: " value"}[answer] if isinstance(answer, re.Pattern) else answer


def parses(program):
    try:
        ast.parse(program)
    except SyntaxError:
        return False
    return True


def drawn(task, n=25):
    rng = random.Random(task)
    return [EXAMPLES[task](rng) for _ in range(n)]


def whole(task, prompt, answer, rest):
    """One program, its brackets closed: a lambda may stand in a call or by itself."""
    program = prompt + text(answer) + rest
    return program + ")" * (program.count("(") - program.count(")")) if task == "lambda_func" else program


@pytest.mark.parametrize("task", RESTS)
def test_a_prompt_with_its_answer_is_valid_python(task):
    for one in drawn(task):
        for prompt, answer, rest in zip(one[::2], one[1::2], RESTS[task], strict=True):
            assert parses(whole(task, prompt, answer, rest)), (prompt, answer)


@pytest.mark.parametrize("task", SYNTACTIC)
def test_a_prompt_with_the_other_answer_is_not(task):
    for one in drawn(task):
        swapped = zip(one[::2], one[3::-2], RESTS[task][::-1], strict=True)
        assert not all(parses(whole(task, prompt, answer, rest)) for prompt, answer, rest in swapped), one


def test_a_brace_opens_a_field_in_an_f_string_alone():
    for one in drawn("fstring_brace"):
        quote = one.first.split("= f")[1][0]
        formatted = ast.parse(f"{one.first}{text(one.first_answer)}x}}{quote}").body[0]
        plain = ast.parse(f"{one.second}{text(one.second_answer)}{one.second.split('= ')[1][0]}").body[0]
        assert isinstance(formatted.value, ast.JoinedStr) and isinstance(plain.value, ast.Constant)


def test_every_task_has_a_template_and_an_idiom_and_is_tested_here():
    assert set(RESTS) | {"fstring_brace"} == set(TASKS) == set(IDIOMS)
    assert len(TASKS) == 20


@pytest.mark.parametrize("task", TASKS)
def test_the_generator_decides_the_text_and_draws_vary(task):
    assert drawn(task) == drawn(task)
    assert len(set(drawn(task, 40))) > 30
