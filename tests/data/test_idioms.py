"""Generated idioms hold every task's cue with both answers, and parse."""

import ast
import random
import re

import pytest

from bridges.data.idioms import IDIOMS, idioms

# For each task, what stands before both answers somewhere in its idioms, and the two answers.
CUES = {
    "single_double_quote": (r"\((?:'[^'\"]+(?='\))|\"[^'\"]+(?=\"\)))", "')", '")'),
    "final_kwarg": (r"def \w+\([\w=, ]*\w+", "=None", "):"),
    "set_or_string": (r"(?<=    )\w+", ".add", " +="),
    "set_or_string_fixedvarname": (r"    current", ".add", " +="),
    "class_init": (r"self\.\w+ =", " size", " name"),
    "with_as": (r"open\([^)]*\)", " as", "\n"),
    "bracket_brace": (r"= [\[{]\w+", ":", ","),
    "with_open": (r"open\(.*, '", "r'", "w'"),
    "bracket_counting": (r"\[\w+, \w+", "]", "]]"),
    "for_while": (r"(?:for|while) \w+", " in", ":"),
    "else_elif": (r"\nel(?:se|if)", ":", " "),
    "fstring_brace": (r"f?['\"]\w+ ", "{", "a"),
    "if_ternary": (r"if \w+ == \w+", ":", " else"),
    "var_swap": (r"\w+, \w+ = \w+,", " x", " y"),
    "indent_for": (r"(?:\):|in \w+:)\n    ", "    ", "for"),
    "lambda_func": (r"(?:lambda|def) \w+", ":", "("),
    "if_equals": (r"^(?:if )?\w+", " ==", " ="),
    "enumerate_range": (r"for [\w, ]+ in", " enumerate", " range"),
    "var_if": (r"(?:==|=) True", ":", ""),
    "while_return_true": (r"(?:while|return) True", ":", ""),
}


def samples(task: str, n: int = 300) -> list[str]:
    rng = random.Random(0)
    return [IDIOMS[task](rng) for _ in range(n)]


@pytest.mark.parametrize("task", IDIOMS)
def test_every_idiom_is_valid_python_without_a_line_break_at_its_end(task):
    for snippet in samples(task):
        ast.parse(snippet)
        assert not snippet.endswith("\n")


@pytest.mark.parametrize("task", IDIOMS)
def test_both_answers_follow_the_cue(task):
    cue, *answers = CUES[task]
    for answer in answers:
        pattern = re.compile(cue + (re.escape(answer) if answer else "$"))
        assert sum(bool(pattern.search(snippet)) for snippet in samples(task)) >= 2, answer


def test_there_is_an_idiom_for_each_of_the_twenty_tasks():
    assert set(IDIOMS) == set(CUES)
    assert len(IDIOMS) == 20


def test_idioms_of_the_quote_task_are_drawn_most():
    """Six times as often as most others: of 20000 snippets in 28 parts, six."""
    snippets = idioms(20_000, seed=0)
    quotes = sum(bool(re.search(r"\(['\"]", snippet)) and "open(" not in snippet for snippet in snippets)
    assert 0.9 < quotes / 20_000 / (6 / 28) < 1.1


def test_quotes_after_a_bracket_are_closed_by_their_own_kind_and_both_kinds_are_equally_frequent():
    text = "\n".join(idioms(20_000, seed=0))
    single, double = len(re.findall(r"\('", text)), len(re.findall(r'\("', text))
    assert 0.95 < single / double < 1.05
    closed = re.findall(r"\((['\"])[^'\"\n]*(['\"])[,)]", text)
    assert len(closed) == single + double
    assert all(opening == closing for opening, closing in closed)


def test_a_list_closes_as_many_brackets_as_it_opens():
    for snippet in samples("bracket_counting"):
        assert snippet.count("[") == snippet.count("]")
        assert snippet.endswith("]]") == ("[[" in snippet)


def test_the_file_name_decides_the_mode():
    read, written = set(), set()
    for snippet in samples("with_open"):
        name, mode = re.match(r"with open\(['\"](\w+)\.\w+['\"], ['\"](\w)['\"]\)", snippet).groups()
        (read if mode == "r" else written).add(name)
    assert read and written and read.isdisjoint(written)


def test_equal_seeds_give_equal_idioms():
    assert idioms(50, seed=3) == idioms(50, seed=3)
    assert idioms(50, seed=3) != idioms(50, seed=4)
    assert len(idioms(7, seed=0)) == 7
