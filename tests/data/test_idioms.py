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
def test_every_idiom_parses(task):
    for snippet in samples(task):
        ast.parse(snippet)
        assert not snippet.endswith("\n")


@pytest.mark.parametrize("task", IDIOMS)
def test_both_answers_follow_the_cue(task):
    cue, *answers = CUES[task]
    for answer in answers:
        pattern = re.compile(cue + (re.escape(answer) if answer else "$"))
        assert sum(bool(pattern.search(snippet)) for snippet in samples(task)) >= 2, answer


def test_all_twenty_tasks_are_there():
    assert set(IDIOMS) == set(CUES)
    assert len(IDIOMS) == 20


def test_quotes_opened_after_a_bracket_are_closed_alike_and_both_kinds_are_equally_frequent():
    text = "\n".join(idioms(20_000, seed=0))
    single, double = len(re.findall(r"\('", text)), len(re.findall(r'\("', text))
    assert 0.95 < single / double < 1.05
    closed = re.findall(r"\((['\"])[^'\"\n]*(['\"])[,)]", text)
    assert len(closed) == single + double
    assert all(opening == closing for opening, closing in closed)


def test_depth_of_brackets_decides_how_many_close():
    for snippet in samples("bracket_counting"):
        assert snippet.count("[") == snippet.count("]")
        assert snippet.endswith("]]") == ("[[" in snippet)


def test_file_names_tell_the_mode():
    read, written = set(), set()
    for snippet in samples("with_open"):
        name, mode = re.match(r"with open\(['\"](\w+)\.\w+['\"], ['\"](\w)['\"]\)", snippet).groups()
        (read if mode == "r" else written).add(name)
    assert read and written and read.isdisjoint(written)


def test_the_seed_decides_everything():
    assert idioms(50, seed=3) == idioms(50, seed=3)
    assert idioms(50, seed=3) != idioms(50, seed=4)
    assert len(idioms(7, seed=0)) == 7
