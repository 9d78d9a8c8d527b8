"""SparseTransformer against a forward pass written out in plain loops, and what transformers expects of a model."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from bridges.models.loading import as_residual
from bridges.models.sparse.blocks import sinusoids
from bridges.models.sparse.model import SparseConfig, SparseTransformer

VOCAB = 23
SHAPE = {"vocab_size": VOCAB, "block_size": 12, "n_layer": 2, "d_model": 16, "n_head": 2, "d_head": 4, "d_mlp": 24}
PLACES = "attn_in,attn_q,attn_k,attn_v,attn_out,mlp_in,mlp_neuron,mlp_out"


def build(seed=0, dtype=torch.float64, **options):
    torch.manual_seed(seed)
    model = SparseTransformer(SparseConfig(**{**SHAPE, **options}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not (name.endswith("wpe.weight") and model.config.sinusoidal_cat_pos_emb):
                parameter.normal_(1.0 if ".ln_" in name and name.endswith("weight") else 0.0, 0.4)
    return model.to(dtype).eval()


def tokens(batch, seq, seed=1):
    return torch.randint(0, VOCAB, (batch, seq), generator=torch.Generator().manual_seed(seed))


class Oracle:
    """The order of operations of method.md section 8 for one row of real tokens, one number at a time where it can."""

    def __init__(self, model):
        self.c = model.config
        self.w = {name: value.detach() for name, value in model.state_dict().items()}

    def keep(self, x, location):
        if self.c.afrac is None or location not in self.c.afrac_loctypes.split(","):
            return x
        out = torch.zeros_like(x)
        for row, kept in zip(x, out, strict=True):
            order = sorted(range(len(row)), key=lambda i, row=row: (-abs(row[i].item()), i))
            for i in order[: int(self.c.afrac * len(row))]:
                kept[i] = row[i]
        return out

    def norm(self, x, name):
        if self.c.rms_norm:
            return x / (x.pow(2).mean(-1, keepdim=True) + 2.0**-52).sqrt() * self.w[f"{name}.weight"]
        centred = x - x.mean(-1, keepdim=True)
        out = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * self.w[f"{name}.weight"]
        return out + self.w[f"{name}.bias"] if self.c.ln_bias else out

    def linear(self, x, name):
        out = x @ self.w[f"{name}.weight"].T
        return out + self.w[f"{name}.bias"] if self.c.bias else out

    def read(self, h, layer, half, location):
        x = self.norm(h, f"{layer}.ln_{half}")
        if self.c.d_pos_emb is not None:
            positions = self.w["transformer.wpe.weight"][: len(h)]
            x = torch.cat([x, self.norm(positions, f"{layer}.ln_p{half}")], -1)
        return self.keep(x, location)

    def attention(self, h, layer):
        q, k, v = self.linear(self.read(h, layer, 1, "attn_in"), f"{layer}.attn.c_attn").split(
            self.c.n_head * self.c.d_head, dim=-1
        )
        q, k, v = self.keep(q, "attn_q"), self.keep(k, "attn_k"), self.keep(v, "attn_v")
        mixed = torch.zeros_like(q)
        for head in range(self.c.n_head):
            part = slice(head * self.c.d_head, (head + 1) * self.c.d_head)
            for t in range(len(h)):
                weights = [math.exp((q[t, part] @ k[s, part]).item() / math.sqrt(self.c.d_head)) for s in range(t + 1)]
                total = sum(weights)
                if self.c.sink:
                    total += math.exp(self.w[f"{layer}.attn.attn_imp.sink_logit"][head].item())
                for s, weight in enumerate(weights):
                    mixed[t, part] += weight / total * v[s, part]
        return self.keep(self.linear(mixed, f"{layer}.attn.c_proj"), "attn_out")

    def mlp(self, h, layer):
        x = self.linear(self.read(h, layer, 2, "mlp_in"), f"{layer}.mlp.c_fc")
        x = x.clamp(min=0) if self.c.activation_type == "relu" else x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))
        return self.keep(self.linear(self.keep(x, "mlp_neuron"), f"{layer}.mlp.c_proj"), "mlp_out")

    def after(self, h, location):
        return self.keep(h.clamp(min=0) if self.c.residual_activation_type == "relu" else h, location)

    def __call__(self, row):
        h = self.w["transformer.wte.weight"][row]
        if self.c.d_pos_emb is None:
            h = h + self.w["transformer.wpe.weight"][: len(row)]
        residuals = [h]
        for number in range(self.c.n_layer):
            layer = f"transformer.h.{number}"
            h = self.after(h + self.attention(h, layer), "resid_post_attn")
            residuals.append(h)
            h = self.after(h + self.mlp(h, layer), "resid_post_mlp")
            residuals.append(h)
        logits = self.norm(h, "transformer.ln_f") @ self.w["lm_head.weight"].T + self.w["final_logits_bias"]
        return residuals, logits + self.w["bigram_table"][row] if self.c.enable_bigram_table else logits


OPTIONS = {
    "defaults": {},
    "bigram, no sink": {"enable_bigram_table": True, "sink": False},
    "relu on the stream": {"residual_activation_type": "relu", "activation_type": "relu"},
    "AbsTopK on the stream": {"afrac": 0.5, "afrac_loctypes": f"{PLACES},resid_post_attn,resid_post_mlp"},
    "AbsTopK on the rectified stream": {
        "residual_activation_type": "relu",
        "afrac_loctypes": "resid_post_mlp,attn_q",
    },
    "concatenated positions, with sink": {"d_pos_emb": 6},
    "sines": {"d_pos_emb": 5, "sinusoidal_cat_pos_emb": True, "sink": False},
    "no biases": {"bias": False},
    "LayerNorm": {"rms_norm": False, "tied_unembed": True, "afrac_loctypes": "attn_in,mlp_neuron"},
    "LayerNorm without bias, concatenated positions": {
        "rms_norm": False,
        "ln_bias": False,
        "bias": False,
        "d_pos_emb": 4,
    },
    "no AbsTopK": {"afrac": None},
    "keys and values alone": {"afrac": 0.5, "afrac_loctypes": ["attn_k", "attn_v", "attn_out"]},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_equals_the_plain_forward(name):
    model = build(**OPTIONS[name])
    ids = tokens(2, 7)
    with torch.no_grad():
        residuals, logits = as_residual(model).residuals(ids)
        assert torch.equal(logits, model(ids).logits)
    for row in range(2):
        expected, expected_logits = Oracle(model)(ids[row])
        for ours, theirs in zip(residuals, expected, strict=True):
            torch.testing.assert_close(ours[row], theirs, rtol=0, atol=1e-10)
        torch.testing.assert_close(logits[row], expected_logits, rtol=0, atol=1e-10)


@pytest.mark.parametrize("options", [{}, {"d_pos_emb": 6, "sink": False}], ids=["added", "concatenated"])
def test_padding_on_either_side_changes_nothing(options):
    model = build(**options)
    oracle = Oracle(model)
    lengths, seq = [3, 7, 5], 8
    ids, mask = torch.zeros(6, seq, dtype=torch.long), torch.zeros(6, seq, dtype=torch.long)
    rows = [tokens(1, length, seed=length)[0] for length in lengths]
    for i, row in enumerate(rows):
        ids[i, seq - len(row) :], mask[i, seq - len(row) :] = row, 1
        ids[i + 3, : len(row)], mask[i + 3, : len(row)] = row, 1
    logits = model(ids, attention_mask=mask).logits
    assert logits.isfinite().all()
    for i, row in enumerate(rows):
        expected = oracle(row)[1]
        torch.testing.assert_close(logits[i, seq - len(row) :], expected, rtol=0, atol=1e-10)
        torch.testing.assert_close(logits[i + 3, : len(row)], expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("sink", [True, False])
def test_padding_without_a_key_to_attend_to_stays_finite_with_its_gradient(sink):
    model = build(sink=sink, dtype=torch.float32)
    mask = torch.tensor([[0, 0, 1, 1], [0, 0, 0, 0]])
    logits = model(tokens(2, 4), attention_mask=mask).logits
    logits.sum().backward()
    assert logits.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize(
    "options, dtype, tolerance",
    [({}, torch.float32, 1e-5), ({"d_pos_emb": 6, "sink": False}, torch.float64, 1e-10)],
    ids=["added", "concatenated"],
)
def test_generate_with_the_cache_equals_generate_without(options, dtype, tolerance):
    model = build(dtype=dtype, enable_bigram_table=True, **options)
    ids = tokens(2, 5)
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    kept = {"do_sample": False, "max_new_tokens": 4, "return_dict_in_generate": True, "output_logits": True}
    runs = [model.generate(ids, attention_mask=mask, pad_token_id=0, use_cache=use, **kept) for use in (True, False)]
    assert torch.equal(runs[0].sequences, runs[1].sequences)
    torch.testing.assert_close(torch.stack(runs[0].logits), torch.stack(runs[1].logits), rtol=0, atol=tolerance)
    alone = model.generate(ids[1:, 2:], do_sample=False, max_new_tokens=4, pad_token_id=0)
    assert torch.equal(alone[0], runs[0].sequences[1, 2:])


def test_a_row_run_in_pieces_with_a_cache_gives_the_same_logits():
    model, ids = build(), tokens(2, 8)
    whole = model(ids).logits
    first = model(ids[:, :3], use_cache=True)
    rest = model(ids[:, 3:], past_key_values=first.past_key_values, use_cache=True)
    torch.testing.assert_close(torch.cat([first.logits, rest.logits], 1), whole, rtol=0, atol=1e-10)
    assert rest.past_key_values.get_seq_length() == 8
    assert model(ids).past_key_values is None


def test_position_ids_that_are_given_are_used():
    model, ids = build(), tokens(1, 4)
    shifted = model(ids, position_ids=torch.arange(2, 6)[None]).logits
    padded = torch.cat([tokens(1, 2), ids], 1)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1]])
    same = model(padded, attention_mask=mask, position_ids=torch.arange(6)[None]).logits[:, 2:]
    torch.testing.assert_close(shifted, same, rtol=0, atol=1e-10)
    assert not torch.allclose(shifted, model(ids).logits)


def test_loss_hidden_states_and_logits_to_keep_are_those_of_transformers():
    model, ids = build(), tokens(2, 6)
    output = model(ids, labels=ids.masked_fill(ids == 0, -100), output_hidden_states=True)
    expected = [-output.logits[b, t].log_softmax(-1)[ids[b, t + 1]] for b in range(2) for t in range(5)]
    counted = [loss for loss, token in zip(expected, ids[:, 1:].flatten(), strict=True) if token]
    torch.testing.assert_close(output.loss, torch.stack(counted).mean())
    residuals = as_residual(model).residuals(ids)[0]
    assert [torch.equal(a, b) for a, b in zip(output.hidden_states, residuals[::2], strict=True)] == [True, True, False]
    assert torch.equal(output.hidden_states[-1], model.transformer.ln_f(residuals[-1]))
    assert torch.equal(model(ids, logits_to_keep=2).logits, output.logits[:, -2:])
    assert torch.equal(model(ids, logits_to_keep=torch.tensor([1, 3])).logits, output.logits[:, [1, 3]])
    assert isinstance(model(ids, return_dict=False), tuple)


def test_half_precision_runs_and_its_loss_is_in_float32():
    model = build(dtype=torch.bfloat16)
    output = model(tokens(1, 4), labels=tokens(1, 4))
    assert output.logits.dtype == torch.bfloat16 and output.loss.dtype == torch.float32


def test_auto_model_reads_and_writes_the_same(tmp_path):
    model = build(dtype=torch.float32, d_pos_emb=6)
    model.save_pretrained(tmp_path / "a")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert type(again) is SparseTransformer and not again.training
    assert torch.equal(again(tokens(1, 5)).logits, model(tokens(1, 5)).logits)
    again.save_pretrained(tmp_path / "b")
    for file in sorted((tmp_path / "a").iterdir()):
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name


def test_fixed_parameters_require_no_gradient(tmp_path):
    def frozen(model):
        return {name for name, parameter in model.named_parameters() if not parameter.requires_grad}

    def again(model):
        model.save_pretrained(tmp_path)
        return SparseTransformer.from_pretrained(tmp_path)

    without = SparseTransformer(SparseConfig(**SHAPE))
    assert frozen(without) == frozen(again(without)) == {"transformer.wpe.weight"}
    assert not without.transformer.wpe.weight.any()
    assert frozen(again(build())) == set()  # a checkpoint that adds positions it has learned
    assert frozen(build(d_pos_emb=6)) == set()
    fixed = build(d_pos_emb=6, sinusoidal_cat_pos_emb=True, enable_bigram_table=True)
    assert frozen(fixed) == frozen(again(fixed)) == {"transformer.wpe.weight", "bigram_table"}
    assert frozen(build(enable_bigram_table=True, learnable_bigram_table=True)) == {"transformer.wpe.weight"}


def test_initial_values():
    torch.manual_seed(0)
    wide = {**SHAPE, "d_model": 128, "d_mlp": 512, "n_head": 8, "d_head": 16, "vocab_size": 300}
    model = SparseTransformer(SparseConfig(**wide, enable_bigram_table=True, d_pos_emb=6, sinusoidal_cat_pos_emb=True))
    values = dict(model.named_parameters())
    for name, std in {"attn.c_attn": 0.02, "mlp.c_fc": 0.02, "attn.c_proj": 0.01, "mlp.c_proj": 0.01}.items():
        assert values[f"transformer.h.1.{name}.weight"].std().item() == pytest.approx(std, rel=0.05)
        assert not values[f"transformer.h.1.{name}.bias"].any()
    assert values["transformer.wte.weight"].std().item() == pytest.approx(0.02, rel=0.05)
    assert all((values[f"transformer.h.0.{n}.weight"] == 1).all() for n in ("ln_1", "ln_2", "ln_p1", "ln_p2"))
    assert not values["bigram_table"].any() and not values["transformer.h.0.attn.attn_imp.sink_logit"].any()
    assert torch.equal(values["transformer.wpe.weight"], sinusoids(12, 6))


def test_dropout_acts_in_training_only():
    model, ids = build(dropout=0.5), tokens(2, 6)
    plain = build()(ids).logits
    assert torch.equal(model(ids).logits, plain)
    model.train()
    assert not torch.equal(model(ids).logits, model(ids).logits)
    for options, random in (({}, False), ({"dropout_cat_pos_emb": True}, True)):
        concatenated = build(d_pos_emb=6, dropout=0.5, **options).train()
        positions = torch.arange(6)[None]
        assert torch.equal(concatenated.positions(positions), concatenated.positions(positions)) is not random


def test_rows_too_long_and_masks_too_short_are_refused():
    model = build()
    with pytest.raises(ValueError, match="rows of 13 tokens; block_size=12"):
        model(tokens(1, 13))
    with pytest.raises(ValueError, match=r"attention_mask has shape \(1, 4\); it must cover the tokens, \(1, 5\)"):
        model(tokens(1, 5), attention_mask=torch.ones(1, 4, dtype=torch.long))


def test_gradients_reach_only_what_abs_topk_kept():
    model, ids = build(afrac_loctypes="mlp_neuron"), tokens(1, 5)
    seen = []
    model.blocks[-1].mlp.c_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(ids).logits.square().sum().backward()
    used = seen[0][0].ne(0).any(0)
    assert used.any() and not used.all()
    grad = model.blocks[-1].mlp.c_fc.weight.grad
    assert torch.equal(grad.ne(0).any(1), used)
