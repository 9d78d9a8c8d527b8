"""Streams and reads seen and changed inside a model's own forward passes."""

from contextlib import ExitStack

import pytest
import torch

from bridges.models.huggingface import adapter
from bridges.models.huggingface.recording import model_inputs
from bridges.models.loading import as_residual
from bridges.models.sparse.model import SparseConfig, SparseTransformer


@pytest.mark.parametrize(("family", "readers"), [("gpt_neox", 2), ("phi", 2), ("bloom", 1), ("gpt2", 1), ("opt", 1)])
def test_a_block_is_read_by_every_module_that_sees_its_stream(family, readers, tiny, tokens):
    model = tiny(family)
    with torch.no_grad():  # so large that the norm's epsilon does not count, padding's zeros included
        embeddings = model.get_input_embeddings().weight
        embeddings.copy_(10 * torch.randn(embeddings.shape, generator=torch.Generator().manual_seed(0)))
    chain = as_residual(model)
    modules = chain.read_modules(0)
    assert len(modules) == readers
    for reader, module in enumerate(modules):  # what the module is given is the norm of the site's stream
        norm, seen = chain.norm(0, reader), []
        with torch.no_grad(), chain.hook_modules({module: seen.append}):
            streams, _ = chain.residuals(tokens)
        h = streams[0].double()
        h = h - h.mean(-1, keepdim=True) if norm.centred else h
        expected = h / h.square().mean(-1, keepdim=True).sqrt() * norm.gain.double()
        off = seen[-1].double() - expected
        off -= off.mean((0, 1))  # the norm's bias
        assert off.abs().max() < 1e-3 * expected.abs().max()


STREAMED = ["gpt2", "llama", "gemma2", "mixtral", "gpt_neox", "bloom", "opt", "sparse"]


def any_model(family, tiny):
    if family != "sparse":
        return tiny(family)
    torch.manual_seed(0)
    shape = dict(n_layer=2, d_model=32, d_head=8, n_head=2, vocab_size=64, block_size=32, d_pos_emb=4)
    return SparseTransformer(SparseConfig(**shape)).eval()


@pytest.mark.parametrize("family", STREAMED)
def test_streams_show_and_change_in_the_models_own_forward(family, tiny, tokens, padding):
    model = any_model(family, tiny)
    tokens = tokens % model.config.vocab_size
    chain = as_residual(model)
    real = padding.bool()
    inputs = model_inputs(model, tokens, padding)
    with torch.no_grad():
        plain = model(**inputs).logits
        streams, _ = chain.residuals(tokens, padding)
        seen = {}
        with chain.hook_residuals({i: lambda h, i=i: seen.update({i: h}) for i in range(len(chain.sites))}):
            assert torch.equal(model(**inputs).logits, plain)
        for i, stream in enumerate(streams):
            assert torch.equal(seen[i][real], stream[real])
            addend = 0.1 * torch.randn(stream.shape, generator=torch.Generator().manual_seed(i))
            with chain.hook_residuals({i: lambda h, addend=addend: h + addend}):
                edited = model(**inputs).logits
            expected = chain.run_from(i, stream + addend, tokens, padding)
            assert torch.equal(edited[real], expected[real]) and not torch.equal(edited, plain)
            with (
                chain.hook_residuals({i: lambda h: None}),
                chain.hook_residuals({i: lambda h, addend=addend: h + addend}),
            ):
                assert torch.equal(model(**inputs).logits[real], expected[real])  # visitors of one site compose
        assert torch.equal(model(**inputs).logits, plain)
        assert not any("forward" in vars(module) for module in model.modules()) and not adapter._SPLIT_LAYERS


@pytest.mark.parametrize("family", STREAMED)
def test_streams_change_alike_with_and_without_a_cache(family, tiny, tokens):
    model = any_model(family, tiny)
    tokens = tokens % model.config.vocab_size
    chain = as_residual(model)
    with torch.no_grad(), ExitStack() as stack:
        for i in range(len(chain.sites)):
            stack.enter_context(chain.hook_residuals({i: lambda h: h + 0.1}))
        whole = model(tokens, use_cache=False).logits
        first = model(tokens[:, :5], use_cache=True)
        second = model(tokens[:, 5:], past_key_values=first.past_key_values, use_cache=True).logits
        assert torch.allclose(torch.cat([first.logits, second], 1), whole, atol=1e-4 * whole.abs().max())
