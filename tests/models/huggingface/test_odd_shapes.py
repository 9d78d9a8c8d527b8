"""Layers that are an MLP alone, sites that nothing reads, vocabularies of two sizes."""

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from bridges.models.loading import as_residual
from bridges.models.tokens import check_tokens


@pytest.fixture
def nemotron_h():
    """A layer each of state space, attention and MLP, of which each reads its own norm's output."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "head_dim": 8, "vocab_size": 61, "hybrid_override_pattern": "M*-"}
    shape |= {"mamba_num_heads": 4, "mamba_head_dim": 8, "ssm_state_size": 4, "n_groups": 1}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("nemotron_h", **shape)).eval()
    for layer in model.model.layers:
        nn.init.normal_(layer.norm.weight)
    return model


def test_a_layer_that_is_one_module_is_read_by_it(nemotron_h, tokens):
    chain, layers = as_residual(nemotron_h), nemotron_h.model.layers
    assert chain.sites == ["0.block", "1.block", "2.block", "final"]
    with torch.no_grad():
        residuals, _ = chain.residuals(tokens)
        for i, read in enumerate(chain.reads(tokens)[:3]):
            assert chain.read_modules(i) == [layers[i].mixer]
            torch.testing.assert_close(read, layers[i].norm(residuals[i]))
            torch.testing.assert_close(chain.norm(i).gain, layers[i].norm.weight.detach())


def test_a_site_that_nothing_reads_names_those_that_are_read(tiny):
    chain = as_residual(tiny("llama"))
    sublayers = chain.decomposition.sublayers
    sublayers[1] = sublayers[1]._replace(readers=[])
    with pytest.raises(ValueError, match=r"site='0.mlp' of llama has no .*; those that have one are 0.attn, 1.attn, 1"):
        chain.reads(torch.tensor([[3, 4]]), sites=["0.mlp"])


@pytest.mark.parametrize(("n_embedded", "n_logits"), [(64, 61), (61, 64), (64, 64)])
def test_tokens_are_those_that_have_an_embedding_and_a_logit(n_embedded, n_logits, tiny, tokens):
    model = tiny("llama")
    model.set_input_embeddings(nn.Embedding(n_embedded, 32))
    model.set_output_embeddings(nn.Linear(32, n_logits, bias=False))
    chain = as_residual(model)
    assert chain.vocab_size == min(n_embedded, n_logits)
    with torch.no_grad():
        assert torch.equal(chain.residuals(tokens)[1], model(tokens, use_cache=False).logits)
    ids = torch.tensor([[3, chain.vocab_size - 1]])
    check_tokens("input_ids", ids, None, chain)
    with pytest.raises(ValueError, match=f"valid ids are 0 to {chain.vocab_size - 1}"):
        check_tokens("input_ids", ids + 1, None, chain)
