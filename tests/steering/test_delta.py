"""The intervention against method section 4 written out in loops, float64."""

import pytest
import torch
from pairs import MASK, gpt2, join, neox, relative, sparse_model, tokens, with_units

from bridges.objective.pair import trace_pair
from bridges.steering.delta import (
    changed_reads,
    dense_addend,
    edited_logits,
    mask_channels,
    run_streams,
    sparse_delta,
    stream_to_read,
    stream_to_read_transpose,
)

SITE = 2


@pytest.fixture(params=[{"rms_norm": True}, {"rms_norm": False}], ids=["rms", "layernorm"])
def pair(request):
    return with_units(join(gpt2(), sparse_model(**request.param)))


def prompts():
    ids = tokens()
    other = ids.clone()
    other[:, 3] = (other[:, 3] + 1) % 17
    return ids, other


def naive_addend(pair, site, channel, dn, at, gains):
    """Token by token, channel by channel: no shared code but the models."""
    bridge = pair.bridge_set[site]
    gain_sparse, gain_dense = gains
    out = torch.zeros(*dn.shape[:2], bridge.decoder_weight.shape[0], dtype=torch.float64)
    for b in range(dn.shape[0]):
        for t in range(dn.shape[1]):
            dz = dn[b, t, channel] * bridge.rms_sparse / gain_sparse[channel]
            delta = torch.stack([row[channel] * dz for row in bridge.decoder_weight])
            if at == "read":
                delta = delta - delta.mean()  # GPT-2 has LayerNorms
                delta = torch.stack([g * x / bridge.rms_dense for g, x in zip(gain_dense, delta, strict=True)])
            out[b, t] = delta
    return out


@pytest.mark.parametrize("at", ["read", "residual"])
def test_one_channel_is_the_written_out_formula(pair, at):
    ids, other = prompts()
    with torch.no_grad():
        dn = changed_reads(pair.sparse, ids, other)[SITE]
        channel = int(dn.abs().amax((0, 1)).argmax())
        addend = dense_addend(pair, SITE, mask_channels(sparse_delta(pair, SITE, dn), [channel]), at)
        sparse, dense = pair.sparse.model, pair.dense.model
        gains = sparse.transformer.h[1].ln_1.weight, dense.transformer.h[1].ln_1.weight  # site 2 is 1.attn
        naive = naive_addend(pair, SITE, channel, dn, at, gains)
    assert naive.abs().max() > 1e-3
    assert relative(addend, naive) < 1e-10


def test_changed_reads_are_differences_of_the_first_matrix_inputs(pair):
    ids, other = prompts()
    seen = []
    handle = pair.sparse.model.transformer.h[1].attn.c_attn.register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    with torch.no_grad():
        pair.sparse.model(ids, attention_mask=MASK)
        pair.sparse.model(other, attention_mask=MASK)
        handle.remove()
        change = changed_reads(pair.sparse, ids, other, MASK)[SITE]
    assert torch.equal(change[MASK.bool()], (seen[1] - seen[0])[MASK.bool()])
    assert not change[~MASK.bool()].any()


@pytest.mark.parametrize("at", ["read", "residual"])
def test_the_addend_enters_where_a_hook_would_put_it(pair, at):
    ids, _ = prompts()
    addend = torch.randn(4, 7, pair.dense.d_model, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    block = pair.dense.model.transformer.h[1]
    module = block.attn if at == "read" else block

    def add(_module, args, kwargs):
        if args:
            return ((args[0] + addend, *args[1:]), kwargs)
        return args, {**kwargs, "hidden_states": kwargs["hidden_states"] + addend}

    with torch.no_grad():
        logits = edited_logits(pair.dense, trace_pair(pair, ids).dense, SITE, addend, at)
        handle = module.register_forward_pre_hook(add, with_kwargs=True)
        expected = pair.dense.model(ids).logits
        handle.remove()
        plain = pair.dense.model(ids).logits
    assert relative(logits, expected) < 1e-12
    assert relative(logits, plain) > 1e-3


@pytest.mark.parametrize("at", ["read", "residual"])
def test_a_zero_addend_changes_no_bit_and_an_edit_nothing_before_it(pair, at):
    ids, _ = prompts()
    addend = torch.zeros(4, 7, pair.dense.d_model, dtype=torch.float64)
    with torch.no_grad():
        trace = trace_pair(pair, ids).dense
        assert torch.equal(edited_logits(pair.dense, trace, SITE, addend, at), trace.logits)
        addend[:, 4] = 1 + torch.arange(pair.dense.d_model)  # not constant: LayerNorm must not swallow it
        edited = edited_logits(pair.dense, trace, SITE, addend, at)
    assert torch.equal(edited[:, :4], trace.logits[:, :4])
    assert not torch.equal(edited[:, 4:], trace.logits[:, 4:])


@pytest.mark.parametrize("site", [0, 2, 4])
@pytest.mark.parametrize("at", ["read", "residual"])
def test_logits_of_some_tokens_are_rows_of_the_whole_edited_pass(pair, site, at):
    """At `final` too, whose read holds the kept tokens alone in some models and all in others."""
    ids, _ = prompts()
    for model in (pair.dense, pair.sparse):
        addend = torch.randn(4, 7, model.d_model, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            trace = model.trace(ids, MASK)
            streams = run_streams(model, ids, MASK, [site, 4])
            whole = edited_logits(model, trace, site, addend, at)
            for kept in ([6], [2, 3, 6]):
                some = edited_logits(model, streams, site, addend, at, torch.tensor(kept))
                assert torch.allclose(some, whole[:, kept], rtol=1e-10, atol=1e-12)
        assert relative(whole, trace.logits) > 1e-3


def test_streams_at_some_sites_are_those_of_the_whole_pass(pair):
    ids, _ = prompts()
    with torch.no_grad():
        streams = run_streams(pair.dense, ids, MASK, {3, 1})
        trace = pair.dense.trace(ids, MASK)
    assert list(streams.residuals) == [1, 3]
    assert all(torch.equal(stream, trace.residuals[site]) for site, stream in streams.residuals.items())


def test_the_adjoint_is_the_transpose(pair):
    generator = torch.Generator().manual_seed(1)
    one, two = torch.randn(2, 3, pair.dense.d_model, dtype=torch.float64, generator=generator)
    norm, rms = pair.dense.norm(SITE), pair.bridge_set[SITE].rms_dense
    forward = (stream_to_read(norm, rms, one) * two).sum()
    assert torch.allclose(forward, (one * stream_to_read_transpose(norm, rms, two)).sum(), rtol=1e-12)


def test_channels_with_zero_gain_move_nothing(pair):
    with torch.no_grad():
        pair.bridge_set[SITE].gain_sparse[5] = 0
    dz = sparse_delta(pair, SITE, torch.ones(1, 1, pair.sparse.d_model, dtype=torch.float64))
    assert dz[0, 0, 5] == 0
    assert dz.isfinite().all()


def test_prompts_of_unequal_shape_are_refused():
    pair = join(neox(), sparse_model())
    with pytest.raises(ValueError, match=r"\(4, 7\).*\(4, 6\).*one shape"):
        changed_reads(pair.sparse, tokens(), tokens(width=6))


def test_a_change_of_a_stream_in_half_precision_is_given_in_float32(pair):
    bridge, dn = pair.bridge_set[SITE], torch.linspace(-1, 1, 24).view(2, 12).bfloat16()
    with torch.no_grad():
        bridge.gain_sparse[5] = 1.25  # a test above has set it to 0
    dz = sparse_delta(pair, SITE, dn)
    assert dz.dtype == torch.float32
    torch.testing.assert_close(dz.double(), dn.double() * bridge.rms_sparse / bridge.gain_sparse, rtol=1e-6, atol=0)
