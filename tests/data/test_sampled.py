import pytest
import torch

from bridges.data.sampled import SharedTokens, sample_rows, sampled_text
from bridges.models.loading import as_residual

VOCAB = 5


@pytest.fixture(scope="module")
def model(tiny):
    """A model whose next token depends strongly on the last, and whose file has preferences of its own."""
    model = tiny("gpt2", vocab_size=VOCAB, n_layer=1, bos_token_id=0, eos_token_id=3, pad_token_id=2)
    with torch.no_grad():
        model.transformer.wte.weight.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
    given = model.generation_config
    given.eos_token_id, given.repetition_penalty, given.temperature, given.top_k, given.top_p = 3, 5.0, 0.3, 2, 0.5
    given.suppress_tokens, given.max_length = [1], 4
    return model


@pytest.fixture(scope="module")
def from_bos(model):
    return sample_rows(model, 3000, 3, 0, VOCAB, seed=1)


def test_one_seed_gives_one_sample_and_leaves_the_global_random_state(model):
    state, given = torch.get_rng_state(), model.generation_config
    one = sample_rows(model, 70, 9, 0, VOCAB, seed=4)  # more than are made at a time
    assert torch.equal(torch.get_rng_state(), state) and model.generation_config is given
    torch.manual_seed(99)
    assert torch.equal(sample_rows(model, 70, 9, 0, VOCAB, seed=4), one)
    assert not torch.equal(sample_rows(model, 70, 9, 0, VOCAB, seed=5), one)
    assert one.shape == (70, 9) and one.dtype == torch.int64 and not torch.equal(one[:6], one[64:])
    assert len({tuple(row) for row in one.tolist()}) > 60


def test_sampling_leaves_the_generators_of_all_cuda_devices(model, cuda_generators):
    """The model is on the CPU, but `torch.manual_seed` seeds every device."""
    before = dict(cuda_generators)
    sample_rows(model, 2, 4, 0, VOCAB, seed=4)
    assert all(torch.equal(cuda_generators[device], state) for device, state in before.items())


def test_rows_start_with_bos(from_bos):
    assert from_bos.shape == (3000, 3) and (from_bos[:, 0] == 0).all()


def five_sigma(count, n, p):
    return abs(count - n * p) <= 5 * (n * p * (1 - p)) ** 0.5


def test_without_bos_the_first_token_is_uniform(model):
    first = sample_rows(model, 1000, 2, None, VOCAB, seed=2)[:, 0]
    for token in range(VOCAB):
        assert five_sigma((first == token).sum().item(), 1000, 1 / VOCAB)


def test_tokens_follow_the_models_own_distribution(model, from_bos):
    """Temperature 1 over the whole vocabulary, EOS included, whatever the model's generation config prefers."""
    start = torch.tensor([[0]])
    with torch.no_grad():
        p = model(start).logits[0, -1].softmax(-1)
    for token in range(VOCAB):
        chosen = from_bos[from_bos[:, 1] == token]
        assert five_sigma(len(chosen), 3000, p[token].item())
        with torch.no_grad():
            after = model(torch.tensor([[0, token]])).logits[0, -1].softmax(-1)
        for following in range(VOCAB):
            count = (chosen[:, 2] == following).sum().item()
            assert five_sigma(count, len(chosen), after[following].item())
    assert (p - 1 / VOCAB).abs().max() > 0.1  # else a uniform sampler would pass
    assert (from_bos[:, 1] == 3).sum() > 50 and (from_bos[:, 1] == 1).sum() > 50  # neither EOS nor 1 is suppressed


def test_a_row_goes_on_after_eos(model):
    rows = sample_rows(model, 200, 12, 0, VOCAB, seed=3)
    ended = rows[(rows[:, 1] == 3)]
    assert len(ended) > 5 and len(ended[:, 2:].unique()) == VOCAB


def test_the_configuration_comes_back_after_an_exception(model):
    given = model.generation_config
    with pytest.raises((RuntimeError, IndexError)):
        sample_rows(model, 2, 4, VOCAB + 7, VOCAB, seed=0)
    assert model.generation_config is given


def test_of_shared_tokens_alone_the_distribution_is_the_models_own_over_these(model):
    """Columns that the other model lacks, and tokens of one tokenizer alone, are never drawn."""
    rows = sample_rows(model, 3000, 2, 0, SharedTokens(4, frozenset({1})), seed=1)
    with torch.no_grad():
        p = model(torch.tensor([[0]])).logits[0, -1][[0, 2, 3]].softmax(0)
    for token, share in zip((0, 2, 3), p.tolist(), strict=True):
        assert five_sigma((rows[:, 1] == token).sum().item(), 3000, share)
    assert set(rows.unique().tolist()) <= {0, 2, 3}
    first = sample_rows(model, 900, 2, None, SharedTokens(4, frozenset({1})), seed=1)[:, 0]
    assert all(five_sigma((first == token).sum().item(), 900, 1 / 3) for token in (0, 2, 3))


def test_a_bos_that_one_model_lacks_starts_no_row(model):
    chain = as_residual(model)
    assert (sampled_text(chain, 20, 3, 0)[:, 0] == 0).all()
    without = sampled_text(chain, 20, 3, 0, SharedTokens(5, frozenset({0})))
    assert 0 not in without.unique().tolist() and len(without[:, 0].unique()) > 1
