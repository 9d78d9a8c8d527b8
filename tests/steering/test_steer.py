"""steer() on Hugging Face models against the formula written out site by site, float64."""

import sys
import threading

import pytest
import torch
from pairs import CONTEXT, MASK, VOCAB, gpt2, join, neox, scrambled, sparse_model, tokens, with_units
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from bridges.models.huggingface.decompose import model_inputs
from bridges.steering.companion import Pass
from bridges.steering.delta import stream_to_read
from bridges.steering.edits import Edit, counterfactual
from bridges.steering.positions import Windows
from bridges.steering.steer import steer

SITE, CHANNEL = "1.attn", 0
LEFT = torch.tensor([[1] * 7, [0, 0, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1, 1], [1] * 7])


def llama():
    torch.manual_seed(4)
    shape = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    limits = {"vocab_size": VOCAB, "max_position_embeddings": CONTEXT, "bos_token_id": 0, "eos_token_id": None}
    return scrambled(LlamaForCausalLM(LlamaConfig(**shape, **limits)))


def plain_gpt2():
    model = gpt2()
    model.generation_config.eos_token_id = None
    return model


DENSE = {"gpt2": plain_gpt2, "llama": llama}
SPARSE = {"rms": lambda: sparse_model(), "layernorm": lambda: sparse_model(rms_norm=False)}


def slow_but(cases, *fast):
    """The cases as parameters, those that are not named marked slow: the grids below are wide."""
    marks = {name: () if name in fast else (pytest.mark.slow,) for name in cases}
    return [pytest.param(case, id=name, marks=marks[name]) for name, case in cases.items()]


@pytest.fixture
def pair():
    return with_units(join(plain_gpt2(), sparse_model()))


def steered(pair, edits, **options):
    options.setdefault("sparse", pair.sparse.model)
    return steer(pair.dense.model, pair.bridge_set, edits, **options)


def logits(pair, ids, mask=None):
    with torch.no_grad():
        return pair.dense.model(**model_inputs(pair.dense.model, ids, mask)).logits


def written_out(pair, edits, ids, mask, strength, at, source, gains=None):
    """Logits of the dense model with the edits, one site after another, from method section 4 alone."""
    with torch.no_grad():
        chain, trace = pair.dense, pair.dense.trace(ids, mask)
        sparse_reads = pair.sparse.reads(ids, mask)
        stream, context = trace.residuals[0], trace.context
        for j in range(len(chain.sites)):
            addend_stream = torch.zeros_like(stream)
            addend_read = torch.zeros_like(stream)
            for i, bridge in enumerate(pair.bridge_set):
                if pair.site("dense", i) != j:
                    continue
                gain_s = pair.sparse.norm(pair.site("sparse", i)).gain
                z = bridge.encode(trace.residuals[j])
                for c in {e.channel for e in edits if e.site == pair.bridge_set.sites[i]}:
                    if source == "sparse":
                        v = sparse_reads[pair.site("sparse", i)][..., c]
                    else:
                        v = gain_s[c] * z[..., c] / bridge.rms_sparse
                    new = v.clone()
                    for e in edits:
                        if (e.site, e.channel) == (pair.bridge_set.sites[i], c):
                            new = {"set": new * 0 + e.value, "add": new + e.value, "scale": new * e.value}[e.mode]
                    dz = strength * (new - v) * bridge.rms_sparse / gain_s[c]
                    delta = dz[..., None] * bridge.decoder_weight[:, c]
                    if at == "residual":
                        addend_stream += delta
                    else:
                        addend_read += stream_to_read(chain.norm(j), bridge.rms_dense, delta)
            stream = stream + addend_stream
            with chain.hook_reads({j: lambda read, addend=addend_read: read + addend}):
                last = j == len(chain.sites) - 1
                stream = chain.head(stream, context) if last else chain.sublayer(j, stream, context)
        return stream


EDITS = {
    "set": [Edit(SITE, CHANNEL, 0.7)],
    "add": [Edit(SITE, CHANNEL, 0.7, "add")],
    "scale": [Edit(SITE, CHANNEL, -1.5, "scale")],
    "in order": [Edit(SITE, CHANNEL, 0.7), Edit(SITE, CHANNEL, 3.0, "scale"), Edit(SITE, CHANNEL, 0.1, "add")],
    "several": [
        Edit("0.mlp", 2, 0.3, "add"),
        Edit(SITE, CHANNEL, 0.7),
        Edit(SITE, 1, -2.0, "scale"),
        Edit("final", 4, 0.5),
        Edit("1.mlp", 3, 0.4, "scale"),
    ],
}


@pytest.mark.parametrize("source", ["sparse", "encoder"])
@pytest.mark.parametrize("at", ["read", "residual"])
@pytest.mark.parametrize("edits", slow_but(EDITS, "in order", "several"))
@pytest.mark.parametrize("dense", DENSE)
@pytest.mark.parametrize("sparse", SPARSE)
def test_a_forward_pass_is_the_written_out_formula(dense, sparse, edits, at, source):
    pair, ids = with_units(join(DENSE[dense](), SPARSE[sparse]())), tokens()
    expected = written_out(pair, edits, ids, LEFT, 0.8, at, source)
    with steered(pair, edits, strength=0.8, at=at, source=source):
        found = logits(pair, ids, LEFT)
    real = LEFT.bool()
    assert (found - expected)[real].abs().max() <= 1e-10 * expected[real].abs().max()
    assert (found - logits(pair, ids, LEFT))[real].abs().max() > 1e-4


@pytest.mark.parametrize("at", ["read", "residual"])
def test_a_counterfactual_gives_the_channel_its_other_reading(pair, at):
    ids = tokens()
    other = ids.clone()
    other[:, 3] = (other[:, 3] + 1) % VOCAB
    edit = counterfactual(pair.sparse.model, SITE, CHANNEL, ids, other)
    with torch.no_grad():
        reads = [pair.sparse.reads(x)[pair.sparse.index(SITE)][..., CHANNEL] for x in (ids, other)]
    assert torch.equal(edit.value, reads[1] - reads[0]) and edit.value[:, 3:].any()
    bridge, place = pair.bridge_set[SITE], pair.dense.index(SITE)
    with torch.no_grad():
        dz = edit.value * bridge.rms_sparse / bridge.gain_sparse[CHANNEL]
        delta = dz[..., None] * bridge.decoder_weight[:, CHANNEL]
        trace = pair.dense.trace(ids)
        if at == "residual":
            expected = pair.dense.tail(place, trace.residuals[place] + delta, trace.context)
        else:
            delta = stream_to_read(pair.dense.norm(place), bridge.rms_dense, delta)
            with pair.dense.hook_reads({place: lambda read: read + delta}):
                expected = pair.dense.tail(place, trace.residuals[place], trace.context)
    with steered(pair, edit, at=at, sparse=None):
        found = logits(pair, ids)
    assert (found - expected).abs().max() <= 1e-10 * expected.abs().max()
    assert torch.equal(found[:, :3], logits(pair, ids)[:, :3])  # before the cue, not a bit


def test_padding_is_zero_in_a_counterfactual(pair):
    ids = tokens()
    edit = counterfactual(pair.sparse.model, SITE, CHANNEL, ids, ids.flip(0), MASK)
    assert not edit.value[MASK == 0].any() and edit.value[MASK == 1].any()
    with pytest.raises(ValueError, match=r"input_ids \(4, 7\) and counterfactual_ids \(4, 6\)"):
        counterfactual(pair.sparse.model, SITE, CHANNEL, ids, ids[:, 1:])
    with pytest.raises(ValueError, match="channel=12 must lie between 0 and 11"):
        counterfactual(pair.sparse.model, SITE, 12, ids, ids)


@pytest.mark.parametrize("at", ["read", "residual"])
def test_a_block_takes_a_read_edit_in_every_module_that_reads_it(at):
    pair, ids = with_units(join(neox(), sparse_model())), tokens()
    bridge, channel = pair.bridge_set[0], 3
    layer = pair.dense.model.gpt_neox.layers[0]
    with torch.no_grad():
        delta = bridge.decoder_weight[:, channel] * bridge.rms_sparse / bridge.gain_sparse[channel] * 0.6
        centred = (delta - delta.mean()) / bridge.rms_dense
        modules = {layer.attention: layer.input_layernorm, layer.mlp: layer.post_attention_layernorm}

        def shift(addend):
            return lambda module, args, kwargs: ((args[0] + addend, *args[1:]), kwargs)

        if at == "read":
            hooks = [(module, shift(centred * norm.weight)) for module, norm in modules.items()]
        else:
            hooks = [(layer, shift(delta))]
        handles = [module.register_forward_pre_hook(hook, with_kwargs=True) for module, hook in hooks]
        expected = logits(pair, ids)
        for handle in handles:
            handle.remove()
    with steered(pair, Edit(pair.bridge_set.sites[0], channel, 0.6, "add"), at=at):
        found = logits(pair, ids)
    assert (found - expected).abs().max() <= 1e-10 * expected.abs().max()
    assert (found - logits(pair, ids)).abs().max() > 1e-3


# What changes nothing.


@pytest.mark.parametrize("at", ["read", "residual"])
@pytest.mark.parametrize("edits", [[], *EDITS.values()], ids=["none", *EDITS])
def test_strength_zero_and_no_edits_change_no_bit(edits, at):
    pair = with_units(join(gpt2(dtype=torch.float32), sparse_model(dtype=torch.float32)))
    plain, strength = logits(pair, tokens()), 0.0 if edits else 1.0
    with steered(pair, edits, strength=strength, at=at):
        assert torch.equal(logits(pair, tokens()), plain)
        assert not any(m._forward_pre_hooks or m._forward_hooks for m in pair.dense.model.modules())


@pytest.mark.parametrize("at", ["read", "residual"])
@pytest.mark.parametrize("site", ["0.attn", "0.mlp", "1.attn", "1.mlp", "final"])
def test_positions_before_an_edited_one_keep_every_bit(site, at):
    pair = with_units(join(gpt2(dtype=torch.float32), sparse_model(dtype=torch.float32)))
    plain = logits(pair, tokens())
    with steered(pair, Edit(site, 1, 2.0, positions=4), at=at):
        found = logits(pair, tokens())
    assert torch.equal(found[:, :4], plain[:, :4]) and not torch.equal(found[:, 4], plain[:, 4])
    assert torch.equal(found[:, 5:], plain[:, 5:]) == (site in ("1.mlp", "final"))


@pytest.mark.parametrize("at", ["read", "residual"])
def test_the_model_is_left_clean_by_an_exception(pair, at):
    plain = logits(pair, tokens())
    own = {module: set(vars(module)) for module in pair.dense.model.modules()}
    with pytest.raises(KeyError, match="mine"), steered(pair, EDITS["several"], at=at, source="encoder"):
        logits(pair, tokens())
        raise KeyError("mine")
    assert {module: set(vars(module)) for module in pair.dense.model.modules()} == own
    for model in (pair.dense.model, pair.sparse.model):
        assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert torch.equal(logits(pair, tokens()), plain)


def test_training_mode_and_gradients_stay_as_they_were(pair):
    pair.dense.model.train()
    pair.sparse.model.train()
    with steered(pair, EDITS["several"]):
        logits(pair, tokens())
    assert pair.dense.model.training and pair.sparse.model.training
    assert all(p.requires_grad for p in pair.dense.model.parameters())


# Positions.


def test_positions_count_real_tokens_from_either_end(pair):
    ids = tokens()
    rows = {0: [0, 2, 1, 0], -1: [6, 6, 6, 6], 2: [2, 4, 3, 2], -4: [3, 3, 3, 3]}
    plain = logits(pair, ids, LEFT)
    for position, places in rows.items():
        with steered(pair, Edit("final", 1, 2.0, "add", position), at="residual"):
            changed = (logits(pair, ids, LEFT) != plain).any(-1) & LEFT.bool()
        assert changed.int().argmax(1).tolist() == places and (changed.sum(1) == 1).all()
    right = LEFT.flip(1)
    with steered(pair, Edit("final", 1, 2.0, "add", [-1, 0, 99, -99]), at="residual"):
        changed = (logits(pair, ids, right) != logits_outside(pair, ids, right)).any(-1) & right.bool()
    assert changed.nonzero().tolist() == [[0, 0], [0, 6], [1, 0], [1, 4], [2, 0], [2, 5], [3, 0], [3, 6]]


def logits_outside(pair, ids, mask):
    inputs = model_inputs(pair.dense.model, ids, mask)
    with torch.no_grad():
        return with_units(join(plain_gpt2(), sparse_model())).dense.model(**inputs).logits


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("position", [-2, 3])
def test_an_edit_at_a_prompt_position_acts_on_the_prompt_alone(pair, position, use_cache):
    """The first new token of an edit at the last layer's stream is the last one that differs."""
    ids = tokens()
    options = dict(max_new_tokens=4, do_sample=False, use_cache=use_cache, pad_token_id=0, output_logits=True)
    options |= {"return_dict_in_generate": True}
    with steered(pair, Edit("final", 1, 5.0, "add", position), at="residual"):
        found = pair.dense.model.generate(ids, **options)
    plain = pair.dense.model.generate(ids, **options)
    assert torch.equal(found.sequences, plain.sequences)
    assert all(torch.equal(a, b) for a, b in zip(found.logits, plain.logits, strict=True))
    with steered(pair, Edit("final", 1, 5.0, "add", -1), at="residual"):
        found = pair.dense.model.generate(ids, **options)
    assert not torch.equal(found.logits[0], plain.logits[0])


# Generation.

GENERATIONS = {
    "greedy": dict(do_sample=False),
    "sampled": dict(do_sample=True, temperature=1.5),
    "beams": dict(do_sample=False, num_beams=3),
    "several sequences": dict(do_sample=True, num_return_sequences=2),
    "beams, sampled": dict(do_sample=True, num_beams=2),
}
READING = {
    "set, sparse": (EDITS["set"], {"source": "sparse"}),
    "scale, encoder": (EDITS["scale"], {"source": "encoder"}),
    "several, sparse": (EDITS["several"], {"source": "sparse", "at": "residual"}),
    "several, encoder": (EDITS["several"], {"source": "encoder"}),
    "constant": (EDITS["add"], {"sparse": None}),
    "positions": ([Edit(SITE, 2, 1.0, "add", (0, -1)), Edit("0.mlp", 1, 2.0, positions=8)], {}),
}


@pytest.mark.parametrize("dense", slow_but(dict(zip(DENSE, DENSE, strict=True)), "gpt2"))
@pytest.mark.parametrize("how", slow_but(GENERATIONS, "greedy", "beams"))
@pytest.mark.parametrize("reading", slow_but(READING, "set, sparse", "several, encoder", "positions"))
def test_generation_with_and_without_a_cache_is_one(dense, how, reading):
    edits, options = reading
    pair, ids = with_units(join(DENSE[dense](), sparse_model())), tokens()
    found = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        with steered(pair, edits, **options):
            found.append(
                pair.dense.model.generate(
                    ids, attention_mask=LEFT, max_new_tokens=5, use_cache=use_cache, pad_token_id=0, **how
                )
            )
    assert torch.equal(*found)


def test_generation_is_the_steered_forward_token_by_token(pair):
    ids, edits = tokens(), EDITS["several"]
    with steered(pair, edits, strength=8.0):
        options = dict(attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False, pad_token_id=0)
        found = pair.dense.model.generate(ids, **options)
    for _ in range(5):
        with torch.no_grad():
            step = written_out(pair, edits, ids, None, 8.0, "read", "sparse")
        ids = torch.cat([ids, step[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(found, ids)
    assert not torch.equal(found, pair.dense.model.generate(tokens(), **options))


def test_a_counterfactual_acts_in_the_prompt_and_not_after_it(pair):
    """Under beams too, where generate repeats every prompt."""
    ids = tokens()
    edit = counterfactual(pair.sparse.model, SITE, CHANNEL, ids, ids.roll(1, 0))
    for how in ({"num_beams": 2}, {"num_beams": 1}):
        found = []
        for use_cache in (True, False):
            with steered(pair, edit, strength=3.0):
                found.append(
                    pair.dense.model.generate(
                        ids, max_new_tokens=4, do_sample=False, use_cache=use_cache, pad_token_id=0, **how
                    )
                )
        assert torch.equal(*found)
    longer = torch.cat([ids, ids[:, :2]], 1)
    padded = Edit(SITE, CHANNEL, torch.cat([edit.value, torch.zeros(4, 2, dtype=torch.float64)], 1), "add")
    with steered(pair, edit):
        short = logits(pair, longer)
    with steered(pair, padded):
        assert torch.equal(logits(pair, longer), short)


def test_a_counterfactual_on_padded_prompts_needs_no_cache(pair):
    ids = tokens()
    edit = counterfactual(pair.sparse.model, SITE, CHANNEL, ids, ids.roll(1, 0), LEFT)
    how = {"attention_mask": LEFT, "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    found = []
    for use_cache in (True, False):
        with steered(pair, edit, strength=3.0):
            found.append(pair.dense.model.generate(ids, use_cache=use_cache, **how))
    assert torch.equal(*found)


@pytest.mark.parametrize("source", ["sparse", "encoder"])
@pytest.mark.parametrize("at", ["read", "residual"])
@pytest.mark.parametrize("dense", [plain_gpt2, sparse_model])
def test_an_edit_at_the_head_where_only_the_last_logits_are_kept(dense, at, source):
    pair, ids = with_units(join(dense(), sparse_model(seed=7))), tokens()
    with steered(pair, Edit("final", CHANNEL, 3.0), at=at, source=source):
        whole = logits(pair, ids)
        for kept in (1, 2):
            with torch.no_grad():
                last = pair.dense.model(ids, logits_to_keep=kept).logits
            assert last.shape == (4, kept, VOCAB)
            torch.testing.assert_close(last, whole[:, -kept:], rtol=0, atol=1e-12)
        picked = torch.tensor([0, 2])
        if at == "read":
            with pytest.raises(ValueError, match="logits_to_keep: with an edit of what the head reads"):
                pair.dense.model(ids, logits_to_keep=picked)
        else:
            with torch.no_grad():
                some = pair.dense.model(ids, logits_to_keep=picked).logits
            torch.testing.assert_close(some, whole[:, picked], rtol=0, atol=1e-12)
    assert (whole - logits(pair, ids)).abs().max() > 1e-6


@pytest.mark.parametrize("source", ["sparse", "encoder"])
def test_a_cache_that_the_model_makes_is_followed(pair, source):
    ids, edits = tokens(), EDITS["several"]
    with torch.no_grad(), steered(pair, edits, source=source):
        whole = pair.dense.model(ids, use_cache=False).logits
        first = pair.dense.model(ids[:, :3], use_cache=True)
        rest = [pair.dense.model(ids[:, 3:5], past_key_values=first.past_key_values)]
        rest.append(pair.dense.model(ids[:, 5:], past_key_values=rest[0].past_key_values))
        given = DynamicCache(config=pair.dense.model.config)
        again = [pair.dense.model(part, past_key_values=given, use_cache=True).logits for part in ids.split(4, dim=1)]
    for parts in ([first.logits, *(r.logits for r in rest)], again):
        assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-10)


def test_a_cache_filled_outside_is_refused(pair):
    ids = tokens()
    with torch.no_grad():
        outside = pair.dense.model(ids[:, :4], use_cache=True).past_key_values
    with pytest.raises(ValueError, match="holds 4 tokens that were not read inside"), steered(pair, EDITS["set"]):
        pair.dense.model(ids[:, 4:], past_key_values=outside)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    pair = with_units(join(gpt2(dtype=dtype), sparse_model(dtype=torch.float32)))
    wide = with_units(join(gpt2(dtype=dtype).float(), sparse_model(dtype=torch.float32)))
    edits = EDITS["several"][:2]
    for at in ("read", "residual"):
        with steered(pair, edits, at=at):
            found = logits(pair, tokens())
            assert found.dtype == dtype
            out = pair.dense.model.generate(tokens(), max_new_tokens=3, do_sample=False, pad_token_id=0)
            assert out.shape == (4, 10)
        with steered(wide, edits, at=at):
            expected = logits(wide, tokens())
        assert (found.float() - expected).abs().max() < 0.05 * expected.abs().max()


# Composition.


@pytest.mark.parametrize("at", ["read", "residual"])
@pytest.mark.parametrize("source", ["sparse", "encoder"])
def test_contexts_nest(pair, at, source):
    edits = EDITS["several"]
    expected = written_out(pair, edits, tokens(), None, 1.0, at, source)
    with steered(pair, edits[:2], at=at, source=source):
        outer = logits(pair, tokens())
        with steered(pair, edits[2:], at=at, source=source):
            inner = logits(pair, tokens())
        assert torch.equal(logits(pair, tokens()), outer)
    assert (inner - expected).abs().max() <= 1e-10 * expected.abs().max()


def test_two_threads_with_two_models_do_not_meet():
    pairs = [with_units(join(plain_gpt2(), sparse_model())) for _ in range(2)]
    edits = [EDITS["set"], EDITS["several"]]
    found, barrier = [None, None], threading.Barrier(2)

    def run(i):
        with steered(pairs[i], edits[i]):
            barrier.wait()
            for _ in range(5):
                found[i] = logits(pairs[i], tokens())
            barrier.wait()

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(2):
        with steered(pairs[i], edits[i]):
            assert torch.equal(found[i], logits(pairs[i], tokens()))


def test_gradients_pass_through_a_steered_model(pair):
    embeddings = pair.dense.model.get_input_embeddings().weight
    with steered(pair, EDITS["set"]):
        loss = pair.dense.model(tokens(), labels=tokens()).loss
    loss.backward()
    assert embeddings.grad.abs().max() > 0
    assert all(p.grad is None for p in pair.sparse.model.parameters())


# Refusals.

REFUSED = {
    "site": (dict(edits=Edit("7.attn", 0, 1.0)), "site='7.attn' has no bridge; there are 0.attn"),
    "channel": (dict(edits=Edit(SITE, 12, 1.0)), "channel=12 is over the sparse stream's 12 channels"),
    "at": (dict(at="reads"), "at='reads' must be one of read, residual"),
    "source": (dict(source="dense"), "source='dense' must be one of sparse, encoder"),
    "strength": (dict(strength=float("nan")), "strength=nan must be a finite number"),
    "no sparse model": (dict(sparse=None), "mode='set' at site='1.attn' needs the channel's reading: pass sparse="),
}


@pytest.mark.parametrize(("given", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_is_refused(pair, given, message, unchecked):
    with pytest.raises(ValueError, match=message), steered(pair, **({"edits": Edit(SITE, CHANNEL, 1.0)} | given)):
        pass


def test_a_channel_of_gain_zero_and_unmeasured_units_are_refused(pair):
    pair.bridge_set[SITE].gain_sparse[CHANNEL] = 0
    with pytest.raises(ValueError, match=r"channel=0 at site='1\.attn' has gain 0"), steered(pair, EDITS["set"]):
        pass
    pair.bridge_set[SITE].rms_dense.fill_(float("nan"))
    with pytest.raises(ValueError, match="R and the gain were not measured"), steered(pair, Edit(SITE, 1, 1.0)):
        pass


def test_other_models_are_refused_unless_insisted(pair):
    pair.bridge_set.remember(pair.dense.model, pair.sparse.model)
    other = gpt2(seed=9)
    with (
        pytest.raises(ValueError, match="dense=GPT2LMHeadModel is not the model"),
        steer(other, pair.bridge_set, EDITS["add"]),
    ):
        pass
    with steer(other, pair.bridge_set, EDITS["add"], check_models=False):
        assert logits(pair._replace(dense=type(pair.dense)(other)), tokens()).isfinite().all()
    with (
        pytest.raises(ValueError, match="sparse=SparseTransformer is not"),
        steered(pair, EDITS["add"], sparse=sparse_model(seed=8)),
    ):
        pass


def test_values_and_inputs_that_do_not_fit_are_refused(pair):
    edit = Edit(SITE, CHANNEL, torch.ones(3, 7), "add")
    with pytest.raises(ValueError, match=r"value=\(3, 7\) is for 3 rows, the model was given 4"), steered(pair, edit):
        logits(pair, tokens())
    edit = Edit(SITE, CHANNEL, torch.ones(4, 9), "add")
    with pytest.raises(ValueError, match=r"value=\(4, 9\) is longer than the prompts"), steered(pair, edit):
        logits(pair, tokens())
    embedded = pair.dense.model.get_input_embeddings()(tokens())
    with pytest.raises(ValueError, match="steer needs input_ids"), steered(pair, EDITS["set"]):
        pair.dense.model(inputs_embeds=embedded)
    with steered(pair, EDITS["add"]):  # knows no positions and reads nothing
        assert pair.dense.model(inputs_embeds=embedded).logits.isfinite().all()
    with (
        pytest.raises(ValueError, match=r"attention_mask \(4, 5\) must cover 0 cached and 7 new"),
        steered(pair, EDITS["set"]),
    ):
        pair.dense.model(tokens(), attention_mask=torch.ones(4, 5))


# What a user may do inside that is not the plain way.


def test_an_empty_cache_of_the_users_own_is_followed(pair):
    """One without layers yet gets the dense model's own first."""
    ids, edits = tokens(), EDITS["several"]
    with steered(pair, edits), torch.no_grad():
        cache = DynamicCache()
        found = [pair.dense.model(ids[:, :5], past_key_values=cache).logits]
        found += [pair.dense.model(ids[:, 5:], past_key_values=cache).logits]
    with steered(pair, edits):
        assert torch.allclose(torch.cat(found, 1), logits(pair, ids), atol=1e-12)


def test_a_cache_in_a_tuple_is_followed(pair):
    ids, edits = tokens(), EDITS["several"]
    with steered(pair, edits), torch.no_grad():
        first, cache = pair.dense.model(ids[:, :5], return_dict=False, use_cache=True)[:2]
        second = pair.dense.model(ids[:, 5:], past_key_values=cache, return_dict=False)[0]
    with steered(pair, edits):
        assert torch.allclose(torch.cat([first, second], 1), logits(pair, ids), atol=1e-12)


def test_a_static_cache_is_refused_but_for_constant_edits(pair):
    ids = tokens()
    options = dict(max_new_tokens=3, do_sample=False, pad_token_id=0, cache_implementation="static")
    for edits in (EDITS["several"], Edit(SITE, 1, 1.0, "add", -1)):
        with steered(pair, edits), pytest.raises(ValueError, match="past_key_values: a static cache has one length"):
            pair.dense.model.generate(ids, **options)
    found = []
    for chosen in ("static", "dynamic"):
        with steered(pair, EDITS["add"], sparse=None):
            found.append(pair.dense.model.generate(ids, **{**options, "cache_implementation": chosen}))
    assert torch.equal(*found)


@pytest.mark.parametrize("at", ["read", "residual"])
def test_an_outer_encoder_reads_the_stream_that_no_inner_edit_touched(pair, at):
    outer, inner, ids = Edit("1.attn", 3, 3.0, "scale"), Edit("0.attn", 5, 4.0, "add"), tokens()
    options = dict(source="encoder", at=at, sparse=None)
    with steered(pair, [outer, inner], **options):
        expected = logits(pair, ids)
    with steered(pair, outer, **options), steered(pair, inner, **options):
        assert torch.allclose(logits(pair, ids), expected, atol=1e-12)
    with steered(pair, inner, **options), steered(pair, outer, **options):
        assert torch.allclose(logits(pair, ids), expected, atol=1e-12)
    with steered(pair, outer, **options):
        alone = logits(pair, ids)
        with steered(pair, inner, **options):
            pass
        assert torch.equal(logits(pair, ids), alone) and not torch.allclose(alone, expected)


def test_a_model_may_be_its_own_sparse_side():
    model, ids = plain_gpt2(), tokens()
    pair = with_units(join(model, model))
    other = with_units(join(plain_gpt2(), plain_gpt2()))
    edits = [Edit("0.mlp", 3, 2.0, "scale"), Edit("1.attn", 1, 0.5)]
    with steer(model, pair.bridge_set, edits, sparse=model):
        found = logits(pair, ids)
        generated = model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
    with steered(other, edits):
        assert torch.allclose(found, logits(other, ids), atol=1e-12)
        assert torch.equal(
            generated, other.dense.model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
        )


def test_a_longer_prompt_after_a_shorter_one_is_a_new_prompt(pair):
    ids, edit = tokens(), Edit(SITE, CHANNEL, 5.0, "add", -1)
    with steered(pair, edit):
        expected = logits(pair, ids)
    with steered(pair, edit):
        logits(pair, ids[:, :4])
        assert torch.equal(logits(pair, ids), expected)


def test_positions_from_the_end_of_a_prompt_that_began_outside_are_refused(pair):
    ids, cache = tokens(), DynamicCache(config=pair.dense.model.config)
    refused = pytest.raises(ValueError, match=r"positions=\(0, -1\) count from the prompt's end, but past_key_values")
    with torch.no_grad():
        pair.dense.model(ids[:, :5], past_key_values=cache)
        with steered(pair, Edit(SITE, CHANNEL, 5.0, "add", (0, -1))), refused:
            pair.dense.model(ids[:, 5:], past_key_values=cache)


@pytest.mark.parametrize("edit", ["from the end", "per token"])
@pytest.mark.parametrize("source", ["sparse", "encoder"])
@pytest.mark.parametrize(
    "how",
    [
        {"prefill_chunk_size": 3},
        pytest.param({"prefill_chunk_size": 1, "use_cache": True}, marks=pytest.mark.slow),
        {"prompt_lookup_num_tokens": 3},
        {"assistant": True},
        {"assistant": "itself"},
    ],
    ids=str,
)
def test_the_prompt_is_what_generate_is_given_in_whatever_pieces(pair, how, source, edit):
    """A first pass of a part of the prompt, or of the prompt and tokens that are guessed to follow."""
    ids = tokens(rows=1)[:, [0, 1, 2, 3, 0, 1, 2]]  # repeats, so that a lookup finds guesses in the first pass
    edits = {
        "from the end": [Edit("final", CHANNEL, 4.0, "set", (-1,)), Edit("0.mlp", 2, 4.0, "set", (-3, 1))],
        "per token": counterfactual(pair.sparse.model, "final", CHANNEL, ids, ids.flip(1)),
    }[edit]
    given = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    if "assistant" in how:
        how = {"assistant_model": pair.dense.model if how["assistant"] == "itself" else plain_gpt2()}
    with steered(pair, edits, source=source, strength=-20.0, at="residual"):
        plain = pair.dense.model.generate(ids, **given)
        assert torch.equal(pair.dense.model.generate(input_ids=ids, **given, **how), plain)
    assert not torch.equal(pair.dense.model.generate(ids, **given), plain)
    assert "generate" not in vars(pair.dense.model)


def test_a_prompt_in_pieces_may_be_padded():
    edit = Edit("final", CHANNEL, 4.0, "set", (-1, -3))
    whole, pieces = Windows([edit]), Windows([edit])
    for mask in (LEFT, MASK):
        ids, mask = tokens()[:3], mask[:3]
        with whole.generating(ids, mask), pieces.generating(ids, mask):
            at_once = whole.of(Pass(ids, mask, None, True, 0)).at((-1, -3))
            parts = [
                pieces.of(Pass(ids[:, a:b], mask[:, :b], None, True, a)).at((-1, -3))
                for a, b in ((0, 3), (3, 6), (6, 7))
            ]
        assert torch.equal(torch.cat(parts, 1), at_once) and at_once.any()


def test_another_prompt_inside_generate_is_one_of_its_own(pair):
    """As guidance does: the model without most of the prompt, on a cache beside."""
    ids, edit = tokens(rows=1), Edit("final", CHANNEL, 4.0, "set", (-1,))
    windows = Windows([edit])
    with windows.generating(ids, None):
        one, other = DynamicCache(), DynamicCache()
        assert windows.of(Pass(ids, None, one, True, 0)).at((-1,)).tolist() == [[False] * 6 + [True]]
        beside = windows.of(Pass(ids[:, -1:], None, other, True, 0))
        assert beside.at((-1,)).tolist() == [[True]] and beside.prompt_width == 1
        later = windows.of(Pass(ids[:, 1:2], None, other, True, 1))  # by chance the prompt's token at that place
        assert not later.at((-1, -7, -6)).any() and not later.columns(torch.ones(1, 7)).any()
    value = counterfactual(pair.sparse.model, SITE, CHANNEL, ids, ids.flip(1))
    with steered(pair, value), pytest.raises(ValueError, match=r"value=\(1, 7\) is longer than the prompts, \(1, 1\)"):
        pair.dense.model.generate(ids, guidance_scale=1.5, max_new_tokens=2, pad_token_id=0)


def test_a_second_turn_has_its_own_prompt_and_a_cache_from_outside_none(pair):
    ids, model, edit = tokens(rows=1), pair.dense.model, Edit("final", CHANNEL, 4.0, "set", (-1,))
    how = {"max_new_tokens": 1, "do_sample": False, "pad_token_id": 0, "output_logits": True}
    how |= {"return_dict_in_generate": True}
    cache = DynamicCache(config=model.config)
    with steered(pair, edit, at="residual"):
        expected = model.generate(ids, **how).logits[0]
        model.generate(ids[:, :4], past_key_values=cache, **how)
        torch.testing.assert_close(model.generate(ids, past_key_values=cache, **how).logits[0], expected)
    outside = DynamicCache(config=model.config)
    model.generate(ids[:, :4], past_key_values=outside, **how)
    with (
        steered(pair, edit),
        pytest.raises(ValueError, match="count from the prompt's end, but past_key_values holds 4"),
    ):
        model.generate(ids, past_key_values=outside, **how)


def test_a_call_after_generate_is_a_prompt_of_its_own(pair):
    ids, edit = tokens(), Edit(SITE, CHANNEL, 4.0, "set", (-1,))
    with torch.no_grad(), steered(pair, edit):
        expected = pair.dense.model(ids[:, :6], use_cache=False).logits
        pair.dense.model(ids[:, :5], use_cache=False)
        pair.dense.model.generate(ids[:, :3], max_new_tokens=1, pad_token_id=0)
        assert torch.equal(pair.dense.model(ids[:, :6], use_cache=False).logits, expected)


def test_two_caches_may_go_on_by_turns(pair):
    model, edit = pair.dense.model, Edit(SITE, CHANNEL, 4.0, "set", (-1,))
    prompts, more, found = [tokens()[:, :3], tokens()], tokens(width=4, seed=6), {}

    def run(turns):
        caches = [DynamicCache(config=model.config) for _ in prompts]
        with torch.no_grad(), steered(pair, edit):
            for i, ids in turns:
                found.setdefault(i, []).append(model(ids, past_key_values=caches[i]).logits)

    steps = [[(i, ids), *((i, more[:, t : t + 1]) for t in range(4))] for i, ids in enumerate(prompts)]
    run(steps[0] + steps[1])
    run([turn for both in zip(*steps, strict=True) for turn in both])
    for logits_found in found.values():
        for one, two in zip(logits_found[:5], logits_found[5:], strict=True):
            assert torch.equal(one, two)


@pytest.mark.parametrize("at", ["read", "residual"])
@pytest.mark.parametrize("site", ["0.mlp", "1.attn"])
def test_contexts_may_be_left_in_any_order(pair, site, at):
    ids, plain = tokens(), logits(pair, tokens())
    first, second = (steered(pair, Edit(site, c, 4.0), at=at) for c in (CHANNEL, 5))
    with steered(pair, Edit(site, 5, 4.0), at=at):
        expected = logits(pair, ids)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert torch.equal(logits(pair, ids), expected)
    second.__exit__(None, None, None)
    assert torch.equal(logits(pair, ids), plain)


def test_the_base_model_alone_is_refused_inside(pair):
    ids = tokens()
    with steered(pair, EDITS["several"]):
        for _ in range(2):
            with pytest.raises(ValueError, match="model=GPT2Model was called by itself inside steer"):
                pair.dense.model.transformer(ids)
            logits(pair, ids)
    pair.dense.model.transformer(ids)


def test_a_value_of_an_unpadded_prompt_is_refused_on_a_padded_one(pair):
    edit = Edit(SITE, CHANNEL, torch.ones(4, 5), "add")
    with steered(pair, edit), pytest.raises(ValueError, match=r"value=\(4, 5\) is shorter than the prompts, \(4, 7\)"):
        logits(pair, tokens(), LEFT)
    with steered(pair, edit):
        logits(pair, tokens())


@pytest.mark.parametrize("sparse", slow_but({"sparse": sparse_model, "gpt2": lambda: gpt2(width=12, seed=2)}, "gpt2"))
def test_threads_may_share_a_sparse_model(sparse):
    """Two dense models, different prompts, one sparse model that is taken apart, hooked and read in both."""
    sparse, before = sparse(), sys.getswitchinterval()
    pairs = [with_units(join(plain_gpt2(), sparse)) for _ in range(2)]
    prompts, expected, right = [tokens(seed=seed) for seed in (1, 2)], [], []
    for pair, ids in zip(pairs, prompts, strict=True):
        with steered(pair, EDITS["several"]):
            expected.append(logits(pair, ids))

    def loop(i):
        for _ in range(10):
            with steered(pairs[i], EDITS["several"]):
                right.extend(i for _ in range(4) if torch.equal(logits(pairs[i], prompts[i]), expected[i]))

    threads = [threading.Thread(target=loop, args=(i,)) for i in range(2)]
    try:
        sys.setswitchinterval(1e-6)
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert sorted(right) == [0] * 40 + [1] * 40


@pytest.mark.parametrize(
    ("edits", "options", "message"),
    [
        (["x"], {}, "edits holds 'x'; it must be an Edit or a list of them"),
        (None, {}, "edits holds None; it must be an Edit or a list of them"),
        (Edit(SITE, 1, 1.0, "add"), {"strength": "1"}, "strength='1' must be a finite number"),
    ],
)
def test_what_is_no_edit_or_number_is_named(pair, unchecked, edits, options, message):
    with pytest.raises(ValueError, match=message), steered(pair, edits, **options):
        pass
