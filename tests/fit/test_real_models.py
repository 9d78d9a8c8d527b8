"""What pairs of pretrained models bring: padded vocabularies, sites without a norm, steps that ruin the bridges."""

import math
import warnings

import pytest
import torch
from fits import DATA, files, run, same, shallow
from pairs import gpt2, sparse_model, tokens

import bridges
from bridges.models.loading import as_residual
from bridges.models.sparse.residual import SparseResidual


class NoNormAt(SparseResidual):
    """A model in which one site's norm is of no known kind."""

    refused = "0.mlp"

    def norm(self, index, reader=0):
        if self.sites[index] == self.refused:
            raise ValueError(f"site={self.refused!r}: the module before the sublayer is not a LayerNorm or an RMSNorm")
        return super().norm(index, reader)


def test_a_default_fit_leaves_out_sites_that_cannot_be_bridged_and_says_so():
    with pytest.warns(
        UserWarning, match=r"leaves out the sites 0\.mlp: .*not a LayerNorm.*; it bridges 0\.attn, final"
    ):
        found = run(sparse=NoNormAt(shallow(sparse_model)), steps=0)
    assert found.sites == ["0.attn", "final"]


@pytest.mark.parametrize("settings", [{"sites": ("0.mlp",)}, {"site_map": (("0.mlp", "0.mlp"), ("final", "final"))}])
def test_a_named_site_that_cannot_be_bridged_is_refused_with_those_that_can(settings):
    possible = "final" if "site_map" in settings else "none"
    with pytest.raises(ValueError, match=f"not a LayerNorm or an RMSNorm; sites of this pair .* bridged: {possible}"):
        run(sparse=NoNormAt(shallow(sparse_model)), **settings)


def padded(model, rows):
    """The model with so many more rows of embedding and unembedding, which no token uses."""
    for name, module in (("wte", model.transformer), ("lm_head", model)):
        old = getattr(module, name).weight.data
        surplus = torch.randn(rows, old.shape[1], generator=torch.Generator().manual_seed(9)).to(old) * 3
        getattr(module, name).weight = torch.nn.Parameter(torch.cat([old, surplus]))
    model.config.vocab_size += rows
    return model


def test_surplus_logits_of_a_padded_vocabulary_enter_no_figure():
    """The padded model's figures are those of the one without padding: its logits are cut before any softmax."""
    tokenizer = bridges.load_pair().tokenizer
    plain, other = (gpt2(layers=1, vocab=1024), sparse_model(layers=1, vocab_size=1024))
    ids = tokens(12, 8, seed=21)
    settings = {"data": ids, "tokenizer": tokenizer, "steps": 2}
    expected = run(dense=plain, sparse=other, **settings)
    wide = padded(gpt2(layers=1, vocab=1024), 40)
    assert as_residual(wide).vocab_size == 1064
    found = run(dense=wide, sparse=other, **settings)
    for one, two in zip(found.report.sites, expected.report.sites, strict=True):
        assert math.isclose(one.kl_sparse_to_dense, two.kl_sparse_to_dense, rel_tol=1e-9)
        assert math.isclose(one.kl_dense_to_sparse, two.kl_dense_to_sparse, rel_tol=1e-9)
    assert math.isclose(found.report.dense_ce, expected.report.dense_ce, rel_tol=1e-9)
    losses = bridges.hybrid_losses(wide, other, found, ids)
    again = bridges.hybrid_losses(plain, other, found, ids, check_models=False)
    torch.testing.assert_close(torch.stack(losses), torch.stack(again), rtol=1e-9, atol=1e-12)


def test_a_learning_rate_that_ruins_the_bridges_gives_the_closed_form():
    closed, ruined = run(steps=0), run(steps=4, lr=50.0)
    assert ruined.report.selection["step"] == 0
    for name, tensor in ruined.tensors().items():
        assert torch.equal(tensor, closed.tensors()[name])
    assert ruined.report.selection["objective"] == ruined.report.selection["objective_at_start"]
    assert "The state before the first step" in str(ruined.report)
    assert max(row["selection/objective"] for row in ruined.history) > ruined.report.selection["objective"]


def test_a_run_resumed_after_its_best_state_ends_with_that_state(tmp_path, monkeypatch):
    from bridges.fitting.trainer import Trainer

    settings = {"steps": 6, "lr": 50.0, "checkpoint_every": 1}
    run(**settings, output_dir=tmp_path / "whole")
    step = Trainer.train_step

    def killed(self, batches):
        if self.step == 4:
            raise SystemExit
        return step(self, batches)

    monkeypatch.setattr(Trainer, "train_step", killed)
    with pytest.raises(SystemExit):
        run(**settings, output_dir=tmp_path / "run")
    monkeypatch.undo()
    found = run(**settings, output_dir=tmp_path / "run", resume=True)
    assert files(tmp_path / "run") == files(tmp_path / "whole") and found.report.selection["step"] == 0


def test_a_model_bridged_to_itself_loses_nothing_at_default_settings():
    """Streams whose channels differ in scale by a thousand: one penalty for all of them would lose the small ones."""
    model = gpt2(layers=2, dtype=torch.float64)
    with torch.no_grad():
        model.transformer.wte.weight[:, 3] *= 1e3
        model.transformer.wpe.weight[:, 5] *= 1e2
    found = bridges.fit(model, model, tokens(300, 12, seed=3), k=8, steps=0, progress=False)
    for site in found.report.sites:
        assert site.nmse_encode < 1e-6 and site.nmse_decode < 1e-6
        assert site.kl_dense_to_sparse < 1e-6 and site.kl_sparse_to_dense < 1e-6


def test_a_fit_of_good_bridges_warns_of_nothing():
    model = gpt2()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bridges.fit(model, model, tokens(100, 12, seed=3), k=8, steps=0, progress=False)


def test_equal_runs_choose_the_same_state():
    assert same(run(DATA, steps=5), run(DATA, steps=5))
