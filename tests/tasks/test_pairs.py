"""The twenty tasks against patterns a person wrote down, with the bundled tokenizer and one of another kind."""

import copy
import pickle
import re
from importlib.resources import files

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from bridges.data.idioms import idioms
from bridges.tasks import pairs as tasks
from bridges.tasks.pairs import TASKS, TaskPairs, probability, solved, task_pairs
from bridges.tasks.templates import EXAMPLES, Example


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(str(files("bridges") / "assets" / "tokenizer"))


class Characters:
    """One token per character: no two characters are joined, and most answers are several tokens."""

    bos_token_id = None

    def encode(self, text, add_special_tokens):
        return [ord(c) for c in text]

    def decode(self, ids):
        return "".join(chr(int(i)) for i in ids)

    def __len__(self):
        return 128


# What a person expects: (first prompt, its answer), (second prompt, its answer), as patterns of the whole text.
NAME = r"[a-z_]+"
LINE = r"(?:[^\n]+\n)?"
EXPECTED = {
    "single_double_quote": (r".*\('[\w ]+", "')", r'.*\("[\w ]+', '")'),
    "final_kwarg": (rf"def {NAME}\(({NAME}=None, )+{NAME}", "=", rf"def {NAME}\(({NAME}, )+{NAME}", "):"),
    "set_or_string": (
        rf"(?P<v>{NAME}) = set\(\)\n.*\nfor .*:\n    (?P=v)",
        ".",
        rf'(?P<v>{NAME}) = ""\n.*\nfor .*:\n    (?P=v)',
        " +=",
    ),
    "set_or_string_fixedvarname": (
        r"current = set\(\)\n.*\nfor .*:\n    current",
        ".",
        r'current = ""\n.*\nfor .*:\n    current',
        " +=",
    ),
    "class_init": (r"class (.|\n)*__init__(.|\n)*self\.(?P<v>\w+) =", None, r"class (.|\n)*self\.(?P<v>\w+) =", None),
    "with_as": (r".+\nwith open\(.*\)", " as", r".+\n(f|file|handle) = open\(.*\)", "\n"),
    "bracket_brace": (rf"{NAME} = {{({NAME}: {NAME}, )+{NAME}", ":", rf"{NAME} = \[({NAME}, )+{NAME}", ","),
    "with_open": (r".+\nwith open\((['\"]).*\1, \1", "r", r".+\nwith open\((['\"]).*\1, \1", "w"),
    "bracket_counting": (rf"{NAME} = \[\d+, \d+, \d+", "]", rf"{NAME} = \[\[\d+, \d+, \d+", "]]"),
    "for_while": (rf"{LINE}for {NAME}", " in", rf"{LINE}while {NAME}", ":"),
    "else_elif": (rf"if {NAME}:\n.*\nelse", ":", rf"if {NAME}:\n.*\nelif", None),
    "fstring_brace": (rf"{NAME} = f(['\"])[\w ]+", " {", rf"{NAME} = (['\"])[\w ]+", None),
    "if_ternary": (rf"{NAME} = \d+\nif .*", ":", rf"{NAME} = \d+ if .*", " else"),
    "var_swap": (rf"(?P<v>{NAME}), (?P<w>{NAME}) = (?P=w),", None, rf"(?P<v>{NAME}), (?P<w>{NAME}) = (?P=w),", None),
    "indent_for": (r"def .*:\n    for .*:", "\n        ", rf"def .*:\n    {NAME} = .*\)", "\n    "),
    "lambda_func": (rf"{NAME} = .*lambda {NAME}", ":", rf"{LINE}def {NAME}", "("),
    "if_equals": (rf".*\nif {NAME}", " ==", rf".*\n{NAME}", " ="),
    "enumerate_range": (rf"{LINE}for [ijkn], {NAME} in", " enumerate", rf"{LINE}for [ijkn] in", " range"),
    "var_if": (rf".*\nif {NAME} == (True|False|None)", ":", rf".*\n{NAME} = (True|False|None)", "\n"),
    "while_return_true": (r"def .*:\n    while True", ":", r"def .*:\n    return True", "\n"),
}


def shown(tokenizer, pairs, i):
    real = pairs.attention_mask[i].bool()
    skip = int(tokenizer.bos_token_id is not None)
    return [tokenizer.decode(ids[i][real][skip:]) for ids in (pairs.input_ids, pairs.counterfactual_ids)]


def texts(tokenizer, tokens):
    return {tokenizer.decode([int(token)]) for token in tokens if token >= 0}


@pytest.mark.parametrize("task", TASKS)
def test_three_examples_read_as_a_person_would(task, tokenizer):
    pairs = task_pairs(task, tokenizer, 6, seed=3)
    first, first_answer, second, second_answer = EXPECTED[task]
    for i in range(3):
        prompts, answers = shown(tokenizer, pairs, i), (pairs.answers[i], pairs.targets[i])
        if i % 2:
            prompts, answers = prompts[::-1], answers[::-1]
        for prompt, tokens, pattern, answer in zip(
            prompts, answers, (first, second), (first_answer, second_answer), strict=True
        ):
            found = re.fullmatch(pattern, prompt)
            assert found, (pattern, prompt)
            following = texts(tokenizer, tokens)
            if task in ("class_init", "var_swap"):  # the name that was there before, or its first token
                (begun,) = following
                assert f" {found['v']}".startswith(begun)
            elif answer is None:  # any word
                assert all(re.match(r" ?[A-Za-z_]", text) for text in following) and len(following) > 20
            elif answer == "\n":
                assert "\n" in following and all(text.startswith("\n") for text in following)
            else:
                assert following == {answer}


@pytest.mark.parametrize("task", TASKS)
def test_pairs_have_one_length_and_disjoint_answers_and_are_different(task, tokenizer):
    pairs = task_pairs(task, tokenizer, 20)
    assert pairs.input_ids.shape == pairs.counterfactual_ids.shape == pairs.attention_mask.shape
    assert ((pairs.input_ids != 0).sum(1) == (pairs.counterfactual_ids != 0).sum(1)).all()
    assert (pairs.input_ids[pairs.attention_mask == 0] == 0).all() and (pairs.attention_mask[:, -1] == 1).all()
    first_real = pairs.attention_mask.argmax(1)
    assert (pairs.input_ids.gather(1, first_real[:, None]) == tokenizer.bos_token_id).all()
    assert pairs.direction.tolist() == [0, 1] * 10
    for answers, targets in zip(pairs.answers.tolist(), pairs.targets.tolist(), strict=True):
        assert not {a for a in answers if a >= 0} & {t for t in targets if t >= 0}
    rows = {
        (tuple(a), tuple(b)) for a, b in zip(pairs.input_ids.tolist(), pairs.counterfactual_ids.tolist(), strict=True)
    }
    assert len(rows) == 20


@pytest.fixture(scope="module")
def plain_bpe():
    """A byte-level BPE like GPT-2's, trained on the same idioms: no BOS, names and words in several tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1500, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["\n".join(idioms(6000, seed=0))], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize("task", TASKS)
def test_pairs_can_be_made_with_a_tokenizer_of_another_kind(task, plain_bpe):
    pairs = task_pairs(task, plain_bpe, 6)
    for i in range(6):
        ours, other = shown(plain_bpe, pairs, i)
        assert ours != other and not texts(plain_bpe, pairs.answers[i]) & texts(plain_bpe, pairs.targets[i])
        first = EXPECTED[task][0] if i % 2 == 0 else EXPECTED[task][2]
        assert re.fullmatch(rf"(?:[^\n]+\n)?(?:{first})[\s\]]*", ours), (first, ours)


def test_tokens_that_both_answers_begin_with_are_moved_to_the_prompts(monkeypatch):
    monkeypatch.setitem(EXAMPLES, "for_while", lambda rng: Example("ab", "xyz", "cd", "xyw"))
    pairs = task_pairs("for_while", Characters(), 1)
    assert shown(Characters(), pairs, 0) == ["abxy", "cdxy"]
    assert texts(Characters(), pairs.answers[0]) == {"z"} and texts(Characters(), pairs.targets[0]) == {"w"}
    monkeypatch.setitem(EXAMPLES, "for_while", lambda rng: Example("ab", "x", "cd", "xy"))
    with pytest.raises(ValueError, match="because 'x' and 'xy' share their first token"):
        task_pairs("for_while", Characters(), 1)


@pytest.mark.parametrize("task", TASKS)
def test_no_prompt_occurs_in_two_pairs(task, tokenizer):
    pairs = task_pairs(task, tokenizer, 264)
    sides = (pairs.input_ids.tolist(), pairs.counterfactual_ids.tolist())
    chosen_on, reported = (
        {tuple(row) for side in sides for row in side[part]} for part in (slice(64), slice(64, None))
    )
    assert not chosen_on & reported and len(chosen_on | reported) == 2 * 264


def test_equal_seeds_give_equal_pairs_and_rows_are_slices(tokenizer):
    one, same, other = (task_pairs("for_while", tokenizer, 8, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.input_ids, same.input_ids)
    assert other.input_ids.shape != one.input_ids.shape or not torch.equal(other.input_ids, one.input_ids)
    cut = one.rows(2, 6)
    assert cut.task == "for_while" and torch.equal(cut.targets, one.targets[2:6]) and len(cut.input_ids) == 4


def test_probability_is_the_sum_over_a_set_of_tokens():
    logits = torch.randn(2, 5, generator=torch.Generator().manual_seed(0))
    tokens = torch.tensor([[1, 3], [0, -1]])
    p = logits.softmax(-1)
    expected = torch.stack([p[0, 1] + p[0, 3], p[1, 0]])
    assert torch.allclose(probability(logits, tokens), expected)
    assert probability(logits.half(), tokens).dtype == torch.float32


def some_pairs(**changes):
    ids = torch.tensor([[0, 5, 6], [4, 5, 7], [4, 8, 9]])
    given = {"task": "mine", "input_ids": ids, "counterfactual_ids": ids + 1, "attention_mask": (ids > 0).long()}
    given |= {"answers": torch.tensor([[3, -1], [4, 6], [3, -1]]), "targets": torch.tensor([[4], [3], [4]])}
    return TaskPairs(**(given | {"direction": torch.tensor([0, 1, 0])} | changes))


def test_pairs_of_ones_own_can_be_cut_moved_changed_and_pickled():
    pairs = some_pairs()
    assert len(pairs) == 3 and repr(pairs) == "TaskPairs('mine', 3 pairs of 3 tokens)"
    for same in (pairs, pairs.to("cpu"), pickle.loads(pickle.dumps(pairs)), copy.deepcopy(pairs)):
        assert same.answers.tolist() == [[3, -1], [4, 6], [3, -1]] and same.targets.tolist() == [[4], [3], [4]]
        assert torch.equal(same.input_ids, pairs.input_ids) and same.task == "mine"
    for cut in (pairs.rows(1), pairs.rows(-2), pairs.take(torch.tensor([1, 2]))):
        assert cut.answers.tolist() == [[4, 6], [3, -1]] and cut.direction.tolist() == [1, 0]
    assert pairs.rows(0, 2).input_ids.tolist() == [[0, 5, 6], [4, 5, 7]]
    trimmed = pairs.take(torch.tensor([2, 1]), first_token=1)
    assert trimmed.input_ids.tolist() == [[8, 9], [5, 7]] and trimmed.counterfactual_ids.tolist() == [[9, 10], [6, 8]]
    changed = pairs.replaced(answers=torch.tensor([[1], [2], [2]]), task="other")
    assert changed.answers.tolist() == [[1], [2], [2]] and changed.task == "other"
    assert torch.equal(changed.targets, pairs.targets)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"counterfactual_ids": torch.ones(3, 4).long()},
            r"counterfactual_ids \(3, 4\) must have the shape of input_ids",
        ),
        (
            {"attention_mask": torch.ones(2, 3).long()},
            r"attention_mask \(2, 3\) must have the shape of input_ids, \(3, 3",
        ),
        ({"targets": torch.ones(2, 1).long()}, "targets has 2 rows; it must have one for each of the 3 prompts"),
        ({"direction": torch.ones(4).long()}, "direction has 4 rows"),
    ],
)
def test_parts_of_unequal_length_are_refused(changes, message, unchecked):
    with pytest.raises(ValueError, match=message):
        some_pairs(**changes)


@pytest.mark.parametrize(
    ("row", "mask"), [(1, [1, 1, 0]), (0, [0, 0, 0]), (2, [1, 0, 1])], ids=["right", "nothing but padding", "a gap"]
)
def test_padding_elsewhere_than_on_the_left_is_refused(row, mask, unchecked):
    """The answer is read at the last token."""
    masks = torch.tensor([[0, 1, 1], [1, 1, 1], [0, 0, 1]])
    some_pairs(attention_mask=masks)
    masks[row] = torch.tensor(mask)
    with pytest.raises(ValueError, match=rf"attention_mask={re.escape(str(mask))} in row {row} must have its zeros on"):
        some_pairs(attention_mask=masks)


class AnyWord(Characters):
    """A vocabulary of 40,000 words and the ASCII characters."""

    def decode(self, ids):
        return super().decode(ids) if int(ids[0]) < 128 else " word"

    def __len__(self):
        return 40_128


def test_an_answer_that_is_most_of_the_vocabulary_is_held_once():
    """Not once per pair: 264 rows of 40,000 tokens would be 85 MB."""
    pairs = task_pairs("else_elif", AnyWord(), 264)
    assert pairs.answer_sets.distinct.shape[0] == pairs.target_sets.distinct.shape[0] == 2
    assert pairs.answers.shape == pairs.targets.shape == (264, 40_000)
    assert pairs.answers[0].tolist() == [ord(":")] + [-1] * 39_999 and torch.equal(pairs.targets[0], pairs.answers[1])
    assert len(pickle.dumps(pairs)) < 3_000_000


def test_solved_is_true_where_the_answer_is_more_probable_than_the_target(tokenizer):
    pairs = task_pairs("for_while", tokenizer, 4)
    logits = torch.zeros(4, len(tokenizer))
    logits[0].scatter_(0, pairs.answers[0], 2.0)
    logits[1].scatter_(0, pairs.targets[1], 2.0)
    assert solved(logits, pairs).tolist()[:2] == [True, False]


class Joining(Characters):
    """Joins a closing quote with the letter before it."""

    def encode(self, text, add_special_tokens):
        ids = super().encode(text, add_special_tokens)
        return [*ids[:-3], 127, *ids[-1:]] if text.endswith(("')", '")')) else ids


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("for_while", Characters(), 0), "n=0 must be a whole number of pairs, at least 1"),
        (("for_while", Characters(), 2.5), "n=2.5 must be a whole number"),
        (("for_while", None, 2), "tokenizer=None cannot encode text"),
        (("swap", Characters(), 2), "task='swap' is unknown; tasks are single_double_quote, "),
        (
            ("single_double_quote", Joining(), 2),
            r"only 0 of n=2 pairs .* because the tokenizer joins .* with the prompt's end",
        ),
        (("class_init", Characters(), 2, 0, 20), "because (the prompts are over max_tokens=20|its two prompts differ)"),
    ],
)
def test_an_impossible_request_is_refused_and_the_broken_rule_named(arguments, message, unchecked):
    with pytest.raises(ValueError, match=message):
        task_pairs(*arguments)


def test_more_pairs_than_exist_are_refused(tokenizer, monkeypatch):
    monkeypatch.setitem(EXAMPLES, "for_while", lambda rng: Example("for a", " in", "while a", ":"))
    monkeypatch.setattr(tasks, "with_fillers", lambda example, rng: example)
    with pytest.raises(ValueError, match=r"only 1 of n=3 pairs .* because one of their prompts occurs in another pair"):
        task_pairs("for_while", tokenizer, 3)
