"""What steer() refuses, before anything is changed or before the call runs."""

import pytest
import torch
from pairs import gpt2, sparse_model, tokens
from steered import CHANNEL, EDITS, SITE, logits, steered

from bridges.steering.edits import Edit
from bridges.steering.steer import steer

REFUSED = {
    "site": (dict(edits=Edit("7.attn", 0, 1.0)), "site='7.attn' has no bridge; there are 0.attn"),
    "channel": (dict(edits=Edit(SITE, 12, 1.0)), "channel=12 must lie between 0 and 11, the sparse stream's channels"),
    "at": (dict(at="reads"), "at='reads' must be one of read, residual"),
    "source": (dict(source="dense"), "source='dense' must be one of sparse, encoder"),
    "strength": (dict(strength=float("nan")), "strength=nan must be a finite number"),
    "no sparse model": (dict(sparse=None), "mode='set' at site='1.attn' needs the channel's reading: pass sparse="),
}


@pytest.mark.parametrize(("given", "message"), REFUSED.values(), ids=REFUSED)
def test_invalid_arguments_are_refused(pair, given, message, unchecked):
    with pytest.raises(ValueError, match=message), steered(pair, **({"edits": Edit(SITE, CHANNEL, 1.0)} | given)):
        pass


@pytest.mark.parametrize(
    ("edits", "options", "message"),
    [
        (["x"], {}, "edits holds 'x'; it must be an Edit or a list of Edits"),
        (None, {}, "edits holds None; it must be an Edit or a list of Edits"),
        (Edit(SITE, 1, 1.0, "add"), {"strength": "1"}, "strength='1' must be a finite number"),
    ],
)
def test_edits_and_strengths_of_other_types_are_refused(pair, unchecked, edits, options, message):
    with pytest.raises(ValueError, match=message), steered(pair, edits, **options):
        pass


def test_a_channel_of_gain_zero_and_unmeasured_units_are_refused(pair):
    pair.bridge_set[SITE].gain_sparse[CHANNEL] = 0
    with (
        pytest.raises(ValueError, match=r"channel=0 at site='1\.attn' cannot be edited: its norm gain is 0"),
        steered(pair, EDITS["set"]),
    ):
        pass
    pair.bridge_set[SITE].rms_dense.fill_(float("nan"))
    with (
        pytest.raises(ValueError, match="rms and gain of its bridge are not measured"),
        steered(pair, Edit(SITE, 1, 1.0)),
    ):
        pass


def test_other_models_are_refused_unless_check_models_is_false(pair):
    pair.bridge_set.record_models(pair.dense.model, pair.sparse.model)
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


PART_ALONE = "model=GPT2LMHeadModel: a part of it ran outside a call of the whole model"


def test_a_part_of_the_model_called_alone_is_refused(pair):
    ids = tokens()
    with steered(pair, EDITS["several"]):
        for _ in range(2):
            with pytest.raises(ValueError, match=PART_ALONE):
                pair.dense.model.transformer(ids)
            logits(pair, ids)
    pair.dense.model.transformer(ids)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("source", ["sparse", "encoder"])
def test_nothing_is_left_of_a_call_that_failed(pair, source, error):
    """Its tokens and readings would be wrong for whatever runs next."""
    ids, model = tokens(), pair.dense.model

    def fail(*_):
        raise error

    with steered(pair, EDITS["several"], source=source):
        expected = logits(pair, ids)
        handle = model.transformer.ln_f.register_forward_pre_hook(fail)
        with pytest.raises(error):
            logits(pair, ids[:, :5])
        handle.remove()
        with pytest.raises(ValueError, match=PART_ALONE):
            model.transformer(ids[:, :5])
        assert torch.equal(logits(pair, ids), expected)


@pytest.mark.parametrize(("edits", "strength"), [([], 1.0), (EDITS["add"], 0.0)], ids=["no edits", "strength 0"])
def test_what_changes_nothing_checks_the_models_all_the_same(pair, edits, strength):
    pair.bridge_set.record_models(pair.dense.model, pair.sparse.model)
    options = {"strength": strength, "sparse": sparse_model(seed=8)}
    with pytest.raises(ValueError, match="sparse=SparseTransformer is not"), steered(pair, edits, **options):
        pass
    with (
        pytest.raises(ValueError, match="dense=GPT2LMHeadModel is not the model"),
        steer(gpt2(seed=9), pair.bridge_set, edits, strength=strength),
    ):
        pass
    with steered(pair, edits, strength=strength), steered(pair, edits, check_models=False, **options):
        pass


def test_strength_zero_is_refused_where_another_strength_is(pair):
    with pytest.raises(ValueError, match="needs the channel's reading"), steered(pair, EDITS["set"], sparse=None):
        pass
    refused = pytest.raises(ValueError, match="needs the channel's reading")
    with refused, steered(pair, EDITS["set"], sparse=None, strength=0.0):
        pass
