import pytest
import torch
from pairs import MASK, at, counted_places, gpt2, gradients, join, neox, real_places, relative, sparse_model, tokens

from bridges.config import FitConfig
from bridges.data.prepare import FitData
from bridges.data.rows import Rows
from bridges.fitting.closed_form import solve_bridges
from bridges.fitting.gradients import Objective, Weights, step_gradients
from bridges.fitting.interchange import (
    QuadraticTerm,
    gather_quadratic_terms,
    perturb_rows,
    terms_from_tensors,
    terms_to_tensors,
)
from bridges.ops.kl import kl_divergence_eager

PAIRS = {
    "equal depth": lambda: join(gpt2(), sparse_model()),
    "block": lambda: join(neox(), sparse_model()),
    "deeper dense, concatenated positions": lambda: join(gpt2(layers=3), sparse_model(d_pos_emb=4)),
}
DRAWS = torch.rand(4, 2, generator=torch.Generator().manual_seed(4))


def naive_terms(pair, ids, mask, draws):
    """Row by row and channel by channel: gradients by running each site's tail, sums by loops."""
    sums = []
    with torch.no_grad():
        perturbed = perturb_rows(pair.dense.residuals(ids, mask)[1], ids, mask, draws).input_ids
    for i, bridge in enumerate(pair.bridge_set):
        d_dense, d_sparse = bridge.decoder_weight.shape
        squares, products, total = torch.zeros(d_sparse), torch.zeros(d_dense, d_sparse), 0.0
        squares, products = squares.double(), products.double()
        for row, other, real in zip(ids, perturbed, mask, strict=True):
            row, other, real = row[None], other[None], real[None]
            replaced = (row != other)[0].nonzero().flatten().tolist()
            if not replaced:
                continue
            places = [(0, t) for _, t in real_places(row, real) if t >= replaced[0]]
            changes, to_output = [], []
            for side in ("dense", "sparse"):
                model, site = pair.model(side), pair.site(side, i)
                with torch.no_grad():
                    original, changed = (model.residuals(x, real) for x in (row, other))
                stream = original[0][site].clone().requires_grad_()
                logits = model.run_from(site, stream, row, real)
                minus_kl = -kl_divergence_eager(at(changed[1], places), at(logits, places))
                to_output.append(torch.autograd.grad(minus_kl, stream)[0])
                changes.append(changed[0][site] - original[0][site])
            effects = []
            for c in range(d_sparse):
                column = bridge.decoder_weight.detach()[:, c]
                in_dense = sum(to_output[0][p] @ column * changes[1][p][c] for p in places)
                in_sparse = sum(to_output[1][p][c] * changes[1][p][c] for p in places)
                effects.append(in_dense * in_sparse if in_dense > 0 and in_sparse > 0 else torch.tensor(0.0))
            best = max(range(d_sparse), key=lambda c: effects[c].item())
            if effects[best] > 0:
                for p in places:
                    squares[best] += changes[1][p][best] ** 2
                    products[:, best] += changes[0][p] * changes[1][p][best]
                    total += changes[0][p].square().sum()
        sums.append(QuadraticTerm(squares / total, products / total))
    return sums


@pytest.mark.parametrize("build", PAIRS.values(), ids=PAIRS)
def test_channels_and_terms_are_the_written_out_ones(build):
    pair, ids = build(), tokens()
    found = gather_quadratic_terms(pair, [(ids, MASK, DRAWS)], range(len(pair.bridge_set)))
    assert max(one.squares.count_nonzero() for one in found) >= 2, "rows that choose channels of their own"
    for one, expected in zip(found, naive_terms(pair, ids, MASK, DRAWS), strict=True):
        torch.testing.assert_close(one.squares, expected.squares, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(one.products, expected.products, rtol=1e-9, atol=1e-12)


def test_the_loss_is_what_the_chosen_channels_leave_out():
    """On changes drawn at random, each with its channel, against the sum over them."""
    generator = torch.Generator().manual_seed(0)
    dh, dz, weight = (torch.randn(*shape, generator=generator).double() for shape in ((50, 3), (50,), (3, 6)))
    channel = torch.randint(6, (50,), generator=generator)
    total, products = dh.square().sum(), torch.zeros(6, 3).double().index_add(0, channel, dh * dz[:, None])
    term = QuadraticTerm(torch.zeros(6).double().index_add(0, channel, dz**2) / total, products.T / total)
    left = sum((dh[n] - weight[:, channel[n]] * dz[n]).square().sum() for n in range(50)) / total
    assert term.loss(weight).item() == pytest.approx(left.item(), rel=1e-12)
    best = term._replace(squares=term.squares.clamp(min=1e-12))
    assert 0 < term.loss(best.products / best.squares) < 1 == term.loss(torch.zeros(3, 6).double())


def test_batches_and_processes_add_up():
    pair, ids = PAIRS["equal depth"](), tokens()
    whole = gather_quadratic_terms(pair, [(ids, MASK, DRAWS)], [1, 3])
    parts = gather_quadratic_terms(
        pair, [(ids[n : n + 1], MASK[n : n + 1], DRAWS[n : n + 1]) for n in range(4)], [1, 3]
    )
    noted = []

    def note(sums):
        noted.append(sums.clone())
        return sums

    gather_quadratic_terms(pair, [(ids[2:], MASK[2:], DRAWS[2:])], [1, 3], note)
    from_other = iter(noted)
    together = gather_quadratic_terms(
        pair, [(ids[:2], MASK[:2], DRAWS[:2])], [1, 3], lambda sums: sums + next(from_other)
    )
    for one, *others in zip(whole, parts, together, strict=True):
        for other in others:
            torch.testing.assert_close(one.squares, other.squares, rtol=1e-10, atol=1e-14)
            torch.testing.assert_close(one.products, other.products, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("broken", ["dense", "sparse"])
def test_a_model_that_is_not_finite_is_refused_by_name(broken):
    pair = PAIRS["equal depth"]()
    with torch.no_grad():
        blocks = {"dense": pair.dense.model.transformer.h[1].mlp, "sparse": pair.sparse.model.transformer.h[1].mlp}
        blocks[broken].c_proj.weight[0, 0] = float("nan")
    message = {"dense": "the dense model's logits is not finite", "sparse": "at site .* is not finite"}[broken]
    with pytest.raises(FloatingPointError, match=f"interchange loss: .*{message}"):
        gather_quadratic_terms(pair, [(tokens(), MASK, DRAWS)], range(5))


def test_no_token_is_drawn_from_the_logits_of_padding():
    """Also not a token that follows a gap."""
    ids, mask = tokens(2, 6), torch.tensor([[0, 0, 1, 1, 1, 1], [1, 0, 1, 1, 0, 0]])
    logits = torch.randn(2, 6, 17, generator=torch.Generator().manual_seed(0))
    logits[mask == 0] = float("nan")
    seen = set()
    for seed in range(30):
        perturbed = perturb_rows(logits, ids, mask, torch.rand(2, 2, generator=torch.Generator().manual_seed(seed)))
        seen |= set(map(tuple, (perturbed.input_ids != ids).nonzero().tolist()))
        assert perturbed.input_ids.max() < 17
    assert seen == {(0, 3), (0, 4), (0, 5), (1, 3)}


def test_rows_in_which_no_token_can_be_replaced_give_terms_of_zero():
    """Their one real token is the first, which no token before it predicts."""
    pair, mask = PAIRS["equal depth"](), torch.tensor([[0, 0, 1], [1, 0, 0]])
    for one in gather_quadratic_terms(pair, [(tokens(2, 3), mask, DRAWS[:2])], range(5)):
        assert not one.squares.any() and not one.products.any()


def test_a_perturbed_row_differs_at_one_real_token_that_a_real_one_precedes():
    ids, logits = tokens(), torch.randn(4, 7, 17, generator=torch.Generator().manual_seed(0))
    seen = set()
    for seed in range(60):
        perturbed = perturb_rows(logits, ids, MASK, torch.rand(4, 2, generator=torch.Generator().manual_seed(seed)))
        places = (perturbed.input_ids != ids).nonzero().tolist()
        assert [row for row, _ in places] == [0, 1, 2]  # the last row has a single token
        assert not perturbed.after[3].any()
        for row, place in places:
            assert perturbed.after[row].tolist() == [bool(MASK[row, t]) and t >= place for t in range(7)]
            seen.add((row, place))
    assert seen == {tuple(place) for place in counted_places(ids, MASK)}


def test_the_new_token_is_drawn_by_the_models_probability_without_the_old_one():
    n = 20_000
    logits = torch.randn(1, 2, 5, generator=torch.Generator().manual_seed(1))
    ids = torch.tensor([[0, 3]]).repeat(n, 1)
    draws = torch.rand(n, 2, generator=torch.Generator().manual_seed(2))
    perturbed = perturb_rows(logits.expand(n, -1, -1), ids, None, draws)
    p = logits[0, 0].double().softmax(-1)
    p[3] = 0
    frequencies = torch.bincount(perturbed.input_ids[:, 1], minlength=5) / n
    torch.testing.assert_close(frequencies.double(), p / p.sum(), rtol=0, atol=0.015)
    assert frequencies[3] == 0 and (perturbed.input_ids[:, 0] == 0).all()


def test_a_token_is_replaced_where_the_model_is_sure_of_it():
    logits = torch.full((1, 2, 5), -1e4)
    logits[..., 3] = 1e4
    perturbed = perturb_rows(logits, torch.tensor([[0, 3]]), None, torch.tensor([[0.9, 0.999]]))
    assert perturbed.input_ids.tolist() == [[0, 4]]


def test_the_closed_form_minimises_reconstruction_and_interchange_together():
    """The gradient of NMSE + weight * interchange + ridge, written out, is zero at the decoder found."""
    pair, ids, mask = PAIRS["equal depth"](), tokens(48, 10, seed=11), None
    draws, ridge, weight = torch.rand(48, 2, generator=torch.Generator().manual_seed(3)), 1e-3, 0.4
    batches, pairs = [(ids, mask)], [(ids, mask, draws)]
    solve_bridges(pair, batches, ridge, 1e9)
    plain = [bridge.decoder_weight.detach().clone() for bridge in pair.bridge_set]
    encoders = [bridge.encoder_weight.detach().clone() for bridge in pair.bridge_set]
    terms = gather_quadratic_terms(pair, pairs, range(5))
    interchange = {"perturbations": pairs, "interchange_weight": weight}
    found = solve_bridges(pair, batches, ridge, 1e9, **interchange).interchange
    grouped = join(gpt2(), sparse_model())
    again = solve_bridges(grouped, batches, ridge, 1.0, **interchange).interchange
    with torch.no_grad():
        dense, sparse = (model.residuals(ids)[0] for model in (pair.dense, pair.sparse))
    for i, bridge in enumerate(pair.bridge_set):
        assert torch.equal(found[i].products, terms[i].products) and torch.equal(found[i].squares, again[i].squares)
        assert relative(grouped.bridge_set[i].decoder_weight.detach(), bridge.decoder_weight.detach()) < 1e-12
        h, z = (streams[i][:, 1:].flatten(0, 1) for streams in (dense, sparse))
        penalty = ridge * z.var(0, unbiased=False) / (h - h.mean(0)).square().sum(1).mean()

        def objective(bridge=bridge, one=found[i], h=h, z=z, penalty=penalty):
            nmse = (bridge.decode(z) - h).square().sum() / (h - h.mean(0)).square().sum()
            return nmse + weight * one.loss(bridge.decoder_weight) + (penalty * bridge.decoder_weight.square()).sum()

        slopes = torch.autograd.grad(objective(), [bridge.decoder_weight, bridge.decoder_bias])
        assert max(slope.abs().max() for slope in slopes) < 1e-10
        assert found[i].loss(bridge.decoder_weight) < found[i].loss(plain[i])
        assert torch.equal(bridge.encoder_weight.detach(), encoders[i])


@pytest.mark.parametrize("batches", [1, 2])
def test_a_step_adds_the_gradient_of_the_terms_once(batches):
    pair, ids, weights = PAIRS["equal depth"](), tokens(), Weights(interchange=0.7)
    terms = gather_quadratic_terms(pair, [(ids, MASK, DRAWS)], range(5))
    parts = [(ids, MASK)] if batches == 1 else [(ids[:1], MASK[:1]), (ids[1:], MASK[1:])]
    plain = step_gradients(pair, parts, [1], Objective(weights._replace(interchange=0.0)))
    without = gradients(pair.bridge_set.parameters())
    losses = step_gradients(pair, parts, [1], Objective(weights, interchange=terms, loss_scale=8.0))
    found = gradients(pair.bridge_set.parameters())
    values = [term.loss(bridge.decoder_weight) for term, bridge in zip(terms, pair.bridge_set, strict=True)]
    (0.7 * sum(values) / 5).backward()
    for with_term, base, own in zip(found, without, gradients(pair.bridge_set.parameters()), strict=True):
        torch.testing.assert_close(with_term, base + own, rtol=1e-9, atol=1e-12)
    assert losses.loss - plain.loss == pytest.approx(0.7 * sum(value.item() for value in values) / 5, rel=1e-9)
    assert losses.row()["train/interchange/1.attn"] == pytest.approx(values[2].item(), rel=1e-12)
    assert not any("interchange" in name for name in plain.row())


def test_terms_come_back_from_the_tensors_of_a_checkpoint():
    pair = PAIRS["block"]()
    sites = pair.bridge_set.sites
    terms = gather_quadratic_terms(pair, [(tokens(), MASK, DRAWS)], range(len(sites)))
    tensors = terms_to_tensors(sites, terms)
    assert tensors.keys() == {f"{site}.{name}" for site in sites for name in ("squares", "products")}
    for one, found in zip(terms, terms_from_tensors(sites, tensors, torch.device("cpu")), strict=True):
        assert torch.equal(one.squares, found.squares) and torch.equal(one.products, found.products)


def test_every_row_has_its_draws_however_they_are_shared():
    data = FitData(Rows(tokens(24, 6), seed=3), Rows(tokens(2, 6)))  # one row is set aside
    whole = data.pair_batches(FitConfig(interchange_pairs=19, batch_size=19), 0, 1)
    assert len(whole) == 1 and whole[0][0].shape == (19, 6) and whole[0][2].shape == (19, 2)
    config = FitConfig(interchange_pairs=19, batch_size=3)
    shared = [batch for index in (0, 1) for batch in data.pair_batches(config, index, 2)]

    def together(batches):
        return {
            (*row.tolist(), *draw.tolist()) for ids, _, draws in batches for row, draw in zip(ids, draws, strict=True)
        }

    assert together(shared) == together(whole)
    assert sum(len(ids) for ids, *_ in data.pair_batches(FitConfig(interchange_pairs=99), 0, 1)) == 23
