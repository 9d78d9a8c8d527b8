import math
from itertools import chain

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from bridges.config import FitConfig
from bridges.data.prepare import FitData, heldout_rows, prepare, sampled_rows, share
from bridges.data.rows import Rows
from bridges.models.loading import as_residual
from bridges.models.sparse.model import SparseConfig, SparseTransformer

VOCAB = 61
SHAPE = {"vocab_size": VOCAB, "n_layer": 1, "d_model": 16, "n_head": 2, "d_head": 4, "d_mlp": 24}


@pytest.fixture(scope="module")
def dense(tiny):
    return as_residual(tiny("gpt2"))


@pytest.fixture(scope="module")
def sparse():
    return as_residual(SparseTransformer(SparseConfig(**SHAPE, block_size=32)).eval())


@pytest.fixture
def ready(dense, sparse):
    def ready(data, eval_data=None, tokenizer=None, sources=None, world_size=1, **settings):
        models = sources or (dense.model, sparse.model)
        config = FitConfig(**settings)
        return prepare(dense, sparse, data, eval_data, tokenizer, models, config, world_size)

    return ready


def data(n=40, width=6, top=VOCAB):
    """Rows that say in their first two tokens which they are."""
    ids = torch.randint(top, (n, width), generator=torch.Generator().manual_seed(0))
    ids[:, 0], ids[:, 1] = torch.arange(n) // 50, torch.arange(n) % 50
    return ids


def which(batches):
    return [int(row[0]) * 50 + int(row[1]) for ids, _ in batches for row in ids]


@pytest.mark.parametrize(("n", "heldout"), [(100, 5), (40, 2), (2, 1), (7, 1)])
def test_the_last_twentieth_is_held_out(n, heldout, ready):
    prepared = ready(data(n))
    assert torch.equal(prepared.train.input_ids, data(n)[: n - heldout])
    assert torch.equal(prepared.heldout.input_ids, data(n)[n - heldout :])


def test_eval_data_leaves_all_rows_to_training(ready):
    prepared = ready(data(), eval_data=data(6, 9), seq_len=5)
    assert torch.equal(prepared.train.input_ids, data()[:, :5])
    assert torch.equal(prepared.heldout.input_ids, data(6, 9)[:, :5])
    assert ready(data(), eval_data=data(6, 9)).heldout.seq_len == 9  # cut only where seq_len says so
    with pytest.raises(ValueError, match=r"eval_data=\(0, 9\)"):
        ready(data(), eval_data=data(6, 9)[:0])


def test_no_more_is_read_of_an_endless_source_than_the_run_needs(ready):
    def endless(read):
        while True:
            read.append(1)
            yield data(4)

    one, two = [], []
    settings = {"steps": 10, "batch_size": 3, "closed_form_tokens": 1, "gradient_accumulation_steps": 2}
    prepared = ready(endless(one), **settings)
    assert len(prepared.train) >= 60 and len(one) <= 18  # 10 x 3 x 2 rows and a tenth of them more
    assert len(ready(endless(two), world_size=2, **settings).train) >= 120 and len(two) > len(one)
    tokens = ready(endless([]), steps=0, closed_form_tokens=600).train
    assert 600 <= tokens.input_ids.numel() <= 690


def test_sampled_rows_come_from_the_dense_model_by_seed(ready, dense):
    prepared = ready(None, sampled_rows=40, seq_len=5, seed=3)
    assert prepared.train.input_ids.shape == (40, 5) and prepared.heldout.input_ids.shape == (32, 5)
    assert (prepared.train.input_ids[:, 0] == dense.model.config.bos_token_id).all()
    again, other = (ready(None, sampled_rows=40, seq_len=5, seed=seed) for seed in (3, 4))
    assert prepared.fingerprint() == again.fingerprint() != other.fingerprint()
    rows = {tuple(row) for row in prepared.train.input_ids.tolist()}
    assert not rows & {tuple(row) for row in prepared.heldout.input_ids.tolist()}


def test_sampled_rows_are_as_long_as_both_contexts_allow(ready):
    assert ready(None, sampled_rows=2).train.seq_len == 32
    assert len(ready(None, sampled_rows=40, seq_len=5, eval_tokens=5).heldout) == 1


def test_eval_data_is_held_out_where_the_training_rows_are_sampled(ready):
    prepared = ready(None, eval_data=data(6, 5), sampled_rows=4, seq_len=5)
    assert len(prepared.train) == 4 and torch.equal(prepared.heldout.input_ids, data(6, 5))


@pytest.mark.parametrize(
    ("eval_data", "message"),
    [
        (torch.full((2, 5), 70), "eval_data holds token 70"),
        (torch.zeros(2, 1).long(), r"eval_data has rows of 1 real token\(s\)"),
    ],
)
def test_eval_data_is_checked_where_the_training_rows_are_sampled(ready, eval_data, message):
    with pytest.raises(ValueError, match=message):
        ready(None, eval_data=eval_data, sampled_rows=4, seq_len=5)


def test_data_that_does_not_fit_the_models_is_refused_with_both_values(ready):
    with pytest.raises(ValueError, match=r"seq_len=33 is over the models' context of 32 tokens; pass 32 or less"):
        ready(data(), seq_len=33)
    with pytest.raises(ValueError, match=r"data has rows of 40 tokens, over the models' context of 32"):
        ready(data(4, 40))
    with pytest.raises(ValueError, match=r"data holds token 70; valid ids are 0 to 60"):
        ready(torch.full((4, 5), 70))
    with pytest.raises(ValueError, match=r"data holds token -1; valid ids are 0 to 60"):
        ready(torch.full((4, 5), -1))
    with pytest.raises(ValueError, match=r"eval_data holds token 61; valid ids are 0 to 60"):
        ready(data(), eval_data=torch.full((4, 5), 61))
    with pytest.raises(ValueError, match=r"data has 1 row; fit needs two or more"):
        ready(data(1))


def saved(model, folder, words, added=()):
    """A model and a word tokenizer in one folder."""
    vocabulary = {word: i for i, word in enumerate(["<eos>", *words])}
    words = Tokenizer(WordLevel(vocabulary, unk_token="<eos>"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>")
    tokenizer.add_tokens(list(added))
    tokenizer.save_pretrained(folder)
    model.config._name_or_path = str(folder)
    return model


def test_two_tokenizers_must_agree(ready, dense, tiny, tmp_path):
    here = saved(tiny("gpt2"), tmp_path / "a", ["x", "y", "z"])
    same = saved(tiny("llama"), tmp_path / "b", ["x", "y", "z"])
    fewer = saved(tiny("llama"), tmp_path / "c", ["x", "y"])
    turned = saved(tiny("llama"), tmp_path / "d", ["y", "x", "z"])
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("x y z z " * 8)
    prepared = ready(tmp_path / "text", seq_len=5, sources=(here, same))
    assert prepared.train.input_ids[0].tolist() == [0, 1, 2, 3, 3]
    assert ready(tmp_path / "text", seq_len=5, sources=(dense.model, str(tmp_path / "b"))).train.seq_len == 5
    with pytest.raises(ValueError, match="different tokenizers, 4 and 3 tokens"):
        ready(data(), sources=(here, fewer))
    with pytest.raises(ValueError, match="different tokenizers, 4 and 4 tokens that do not agree"):
        ready(tmp_path / "text", seq_len=5, sources=(str(tmp_path / "a"), turned))
    with pytest.raises(ValueError, match="is text: pass tokenizer="):
        ready(tmp_path / "text", seq_len=5)


def test_the_tokenizer_of_a_residual_model_is_that_of_its_model(ready, sparse, tiny, tmp_path):
    dense = as_residual(saved(tiny("gpt2"), tmp_path / "a", ["x", "y", "z"]))
    (tmp_path / "text.txt").write_text("x y z z " * 8)
    prepared = ready(tmp_path / "text.txt", seq_len=5, sources=(dense, sparse))
    assert prepared.train.input_ids[0].tolist() == [0, 1, 2, 3, 3]


def test_a_padding_token_of_one_side_is_taken_under_padding_alone(tiny, tmp_path):
    """The dense side's tokenizer and embedding have one token more, which its data are padded with."""
    models = saved(tiny("gpt2", vocab_size=62), tmp_path / "a", [f"w{i}" for i in range(60)], ["<pad>"]), tiny("llama")
    saved(models[1], tmp_path / "b", [f"w{i}" for i in range(60)])
    chains = [as_residual(model) for model in models]
    ids = data(20, 6)
    ids[:, -2:] = 61
    mask = (ids != 61).long()

    def ready(data, **settings):
        return prepare(*chains, data, None, None, models, FitConfig(**settings))

    prepared = ready({"input_ids": ids, "attention_mask": mask})
    assert torch.equal(prepared.train.attention_mask, mask[:19])
    assert torch.equal(prepared.train.input_ids, (ids * mask)[:19])
    assert torch.equal(
        heldout_rows(*chains, {"input_ids": ids, "attention_mask": mask}, None, models, 6).input_ids, ids * mask
    )
    with pytest.raises(ValueError, match=r"data holds token 61; valid ids are 0 to 60 \(the models have 61 and 62 tok"):
        ready(ids)
    sampled = ready(None, sampled_rows=400, seq_len=5)
    assert sampled.train.input_ids.max() < 61 and sampled.heldout.input_ids.max() < 61


def test_a_token_of_one_tokenizer_alone_is_refused_though_both_models_have_its_row(tiny, tmp_path):
    models = (
        saved(tiny("gpt2"), tmp_path / "a", ["x", "y"], ["<im_end>"]),
        saved(tiny("llama"), tmp_path / "b", ["x", "y"]),
    )
    chains = [as_residual(model) for model in models]
    rows = torch.randint(3, (8, 5), generator=torch.Generator().manual_seed(0))
    assert torch.equal(prepare(*chains, rows, None, None, models, FitConfig()).train.input_ids, rows[:7])
    sampled = prepare(*chains, None, None, None, models, FitConfig(sampled_rows=300, seq_len=6))
    assert 3 not in sampled.train.input_ids.unique().tolist()
    rows[3, 2] = 3
    with pytest.raises(
        ValueError, match=r"data holds token 3 \('<im_end>'\), which only one of the two tokenizers has"
    ):
        prepare(*chains, rows, None, None, models, FitConfig())
    (tmp_path / "text.txt").write_text("x y <im_end> " * 8)
    with pytest.raises(ValueError, match=r"data holds token 3 \('<im_end>'\)"):
        heldout_rows(*chains, tmp_path / "text.txt", None, models, 5)


@pytest.mark.parametrize("micro", [1, 2])
def test_two_processes_with_half_the_batch_take_the_same_rows(micro):
    prepared = FitData(Rows(data(21), seed=3), Rows(data(2)))
    one = FitConfig(batch_size=8, gradient_accumulation_steps=micro)
    two = FitConfig(batch_size=4, gradient_accumulation_steps=micro)
    taken = []
    for step in range(1, 9):
        alone = which(prepared.step_batches(one, step, 0, 1))
        shared = [which(prepared.step_batches(two, step, rank, 2)) for rank in range(2)]
        assert alone == shared[0] + shared[1] and len(alone) == 8 * micro
        taken += alone
    assert sorted(taken[:20]) == list(range(20))  # the last row of 21 is set aside
    assert taken == which([prepared.fitted.take(0, len(taken))])


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("n_rows", [1, 2, 11, 12])
def test_shared_rows_are_each_on_one_process_in_batches_of_at_most_the_size(n_rows, world_size):
    parts = [share(n_rows, 4, rank, world_size) for rank in range(world_size)]
    assert sorted(row for part in parts for rows in part for row in rows) == list(range(n_rows))
    assert max(len(rows) for part in parts for rows in part) <= 4
    assert parts[0] and max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_first_shuffled_rows_are_shared_out_once_each(world_size):
    prepared = FitData(Rows(data(21)), Rows(data(2)))
    parts = [prepared.train_batches(65, 4, rank, world_size) for rank in range(world_size)]  # 6 tokens a row: 11 rows
    assert sorted(chain.from_iterable(map(which, parts))) == sorted(which([prepared.fitted.take(0, 11)]))
    whole = [prepared.train_batches(10_000, 4, rank, world_size) for rank in range(world_size)]
    assert sorted(chain.from_iterable(map(which, whole))) == list(range(20))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_heldout_rows_are_shared_out_once_each(world_size):
    prepared = FitData(Rows(data(21)), Rows(data(9)))
    config = FitConfig(batch_size=3, eval_tokens=40)  # 7 rows
    n_rows = prepared.heldout_rows(config)
    parts = [prepared.heldout_batches(n_rows, 3, rank, world_size) for rank in range(world_size)]
    assert sorted(chain.from_iterable(map(which, parts))) == list(range(7))


@pytest.mark.parametrize(("n", "aside"), [(1, [0]), (2, [1]), (19, [18]), (60, [57, 58, 59])])
def test_a_twentieth_of_the_training_rows_is_set_aside_and_never_fitted(n, aside):
    prepared = FitData(Rows(data(n)), Rows(data(2)))
    assert which(prepared.selection_batches(10_000, 2, 0, 1)) == aside
    shared = [row for rank in range(2) for row in which(prepared.selection_batches(10_000, 2, rank, 2))]
    assert sorted(shared) == aside
    if n > 1:
        fitted = which(prepared.train_batches(10_000, 4, 0, 1))
        assert sorted(fitted + aside) == list(range(n))
        assert not set(which(prepared.step_batches(FitConfig(batch_size=8), 2, 0, 1))) & set(aside)


def mostly_padding(n, width=6):
    """Rows of which every second one has two real tokens, the others as many as they are wide."""
    mask = torch.ones(n, width).long()
    mask[::2, 2:] = 0
    return Rows(data(n, width), mask, seed=1)


def test_padding_is_no_part_of_a_budget_of_tokens():
    prepared = FitData(mostly_padding(42), mostly_padding(20))
    fitted = prepared.train_batches(40, 4, 0, 1)
    real = [int(row.sum()) for _, mask in fitted for row in mask]
    assert sum(real) >= 40 > sum(real[:-1]) and len(real) > 7
    assert which(prepared.selection_batches(8, 4, 0, 1)) == [40, 41]
    assert which(prepared.selection_batches(2, 4, 0, 1)) == [40]
    assert prepared.heldout_rows(FitConfig(eval_tokens=16)) == 4
    assert prepared.start_rows(40, 8) == len(real) + 2


def test_an_endless_source_of_padded_rows_is_read_until_it_has_given_the_tokens(ready):
    def endless():
        while True:
            yield {"input_ids": data(4), "attention_mask": mostly_padding(4).attention_mask}

    train = ready(endless(), steps=0, closed_form_tokens=600).train
    assert 600 <= train.attention_mask.sum() <= 690


def test_nothing_is_judged_on_a_single_training_row_and_else_on_one_at_least():
    assert FitData(Rows(data(1)), Rows(data(2))).ridge_batches(100, 4, 0, 1) == []
    prepared = FitData(Rows(data(21)), Rows(data(2)))
    assert which(prepared.ridge_batches(0, 4, 0, 1)) == which(prepared.selection_batches(0, 4, 0, 1)) == [20]


def test_the_rows_of_the_steps_are_split_off_once():
    prepared = FitData(Rows(data(21)), Rows(data(2)))
    assert prepared.fitted is prepared.fitted and prepared.selection is prepared.selection


def test_as_many_rows_are_sampled_as_the_run_needs():
    tokens = {"closed_form_tokens": 1000}
    assert sampled_rows(FitConfig(steps=0, **tokens), 64, 10) == math.ceil(100 / 0.95)
    assert sampled_rows(FitConfig(steps=0), 100, 64) == math.ceil(75 / 0.95)  # 48 tokens a channel
    assert sampled_rows(FitConfig(steps=0), 100_000, 100) == math.ceil(2000 / 0.95)  # 200,000 tokens at most
    assert sampled_rows(FitConfig(steps=30, batch_size=8, **tokens), 64, 10) == math.ceil(240 / 0.95)
    assert sampled_rows(FitConfig(steps=3000, **tokens), 64, 10) == math.ceil(1024 / 0.95)
    assert sampled_rows(FitConfig(sampled_rows=7), 64, 10) == 7
