import pytest
import torch
from pairs import MASK, at, counted_places, gpt2, gradients, join, neox, real_places, relative, sparse_model, tokens

from bridges.config import FitConfig
from bridges.data.prepare import FitData
from bridges.data.rows import Rows
from bridges.fitting.closed_form import solve_bridges
from bridges.fitting.gradients import Objective, Weights, step_gradients
from bridges.fitting.interchange import Carried, gather_carried, twin_rows
from bridges.ops.kl import kl_divergence_eager

PAIRS = {
    "equal depth": lambda: join(gpt2(), sparse_model()),
    "block": lambda: join(neox(), sparse_model()),
    "deeper dense, positions beside": lambda: join(gpt2(layers=3), sparse_model(d_pos_emb=4)),
}
DRAWS = torch.rand(4, 2, generator=torch.Generator().manual_seed(4))


def naive_carried(pair, ids, mask, draws):
    """Row by row and channel by channel: gradients by running each site's tail, sums by loops."""
    sums = []
    with torch.no_grad():
        twins = twin_rows(pair.dense.residuals(ids, mask)[1], ids, mask, draws).input_ids
    for i, bridge in enumerate(pair.bridge_set):
        d_dense, d_sparse = bridge.decoder_weight.shape
        squares, products, total = torch.zeros(d_sparse), torch.zeros(d_dense, d_sparse), 0.0
        squares, products = squares.double(), products.double()
        for row, twin, real in zip(ids, twins, mask, strict=True):
            row, twin, real = row[None], twin[None], real[None]
            replaced = (row != twin)[0].nonzero().flatten().tolist()
            if not replaced:
                continue
            places = [(0, t) for _, t in real_places(row, real) if t >= replaced[0]]
            changes, towards = [], []
            for side in ("dense", "sparse"):
                model, site = pair.model(side), pair.site(side, i)
                with torch.no_grad():
                    shown, changed = (model.residuals(x, real) for x in (row, twin))
                stream = shown[0][site].clone().requires_grad_()
                logits = model.run_from(site, stream, row, real)
                closeness = -kl_divergence_eager(at(changed[1], places), at(logits, places))
                towards.append(torch.autograd.grad(closeness, stream)[0])
                changes.append(changed[0][site] - shown[0][site])
            effects = []
            for c in range(d_sparse):
                column = bridge.decoder_weight.detach()[:, c]
                in_dense = sum(towards[0][p] @ column * changes[1][p][c] for p in places)
                in_sparse = sum(towards[1][p][c] * changes[1][p][c] for p in places)
                effects.append(in_dense * in_sparse if in_dense > 0 and in_sparse > 0 else torch.tensor(0.0))
            best = max(range(d_sparse), key=lambda c: effects[c].item())
            if effects[best] > 0:
                for p in places:
                    squares[best] += changes[1][p][best] ** 2
                    products[:, best] += changes[0][p] * changes[1][p][best]
                    total += changes[0][p].square().sum()
        sums.append(Carried(squares / total, products / total))
    return sums


@pytest.mark.parametrize("build", PAIRS.values(), ids=PAIRS)
def test_channels_and_what_they_carry_are_the_written_out_ones(build):
    pair, ids = build(), tokens()
    found = gather_carried(pair, [(ids, MASK, DRAWS)], range(len(pair.bridge_set)))
    assert max(one.squares.count_nonzero() for one in found) >= 2, "rows that choose channels of their own"
    for one, expected in zip(found, naive_carried(pair, ids, MASK, DRAWS), strict=True):
        torch.testing.assert_close(one.squares, expected.squares, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(one.products, expected.products, rtol=1e-9, atol=1e-12)


def test_the_loss_is_what_the_chosen_channels_leave_out():
    """On changes drawn at random, each with its channel, against the sum over them."""
    generator = torch.Generator().manual_seed(0)
    dh, dz, weight = (torch.randn(*shape, generator=generator).double() for shape in ((50, 3), (50,), (3, 6)))
    channel = torch.randint(6, (50,), generator=generator)
    total, products = dh.square().sum(), torch.zeros(6, 3).double().index_add(0, channel, dh * dz[:, None])
    carried = Carried(torch.zeros(6).double().index_add(0, channel, dz**2) / total, products.T / total)
    left = sum((dh[n] - weight[:, channel[n]] * dz[n]).square().sum() for n in range(50)) / total
    assert carried.loss(weight).item() == pytest.approx(left.item(), rel=1e-12)
    best = carried._replace(squares=carried.squares.clamp(min=1e-12))
    assert 0 < carried.loss(best.products / best.squares) < 1 == carried.loss(torch.zeros(3, 6).double())


def test_batches_and_processes_add_up():
    pair, ids = PAIRS["equal depth"](), tokens()
    whole = gather_carried(pair, [(ids, MASK, DRAWS)], [1, 3])
    parts = gather_carried(pair, [(ids[n : n + 1], MASK[n : n + 1], DRAWS[n : n + 1]) for n in range(4)], [1, 3])
    elsewhere, together = [], []

    def noted(sums):
        elsewhere.append(sums.clone())
        return sums

    gather_carried(pair, [(ids[2:], MASK[2:], DRAWS[2:])], [1, 3], noted)
    with_other = iter(elsewhere)
    together = gather_carried(pair, [(ids[:2], MASK[:2], DRAWS[:2])], [1, 3], lambda sums: sums + next(with_other))
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
        gather_carried(pair, [(tokens(), MASK, DRAWS)], range(5))


def test_padding_may_hold_anything():
    """Logits at padding that are not numbers: no token is drawn by them, a token behind a gap included."""
    ids, mask = tokens(2, 6), torch.tensor([[0, 0, 1, 1, 1, 1], [1, 0, 1, 1, 0, 0]])
    logits = torch.randn(2, 6, 17, generator=torch.Generator().manual_seed(0))
    logits[mask == 0] = float("nan")
    seen = set()
    for seed in range(30):
        twin = twin_rows(logits, ids, mask, torch.rand(2, 2, generator=torch.Generator().manual_seed(seed)))
        seen |= set(map(tuple, (twin.input_ids != ids).nonzero().tolist()))
        assert twin.input_ids.max() < 17
    assert seen == {(0, 3), (0, 4), (0, 5), (1, 3)}


def test_nothing_is_asked_where_no_row_can_have_a_twin():
    """Rows of one real token: the first, which no token before it predicts."""
    pair, mask = PAIRS["equal depth"](), torch.tensor([[0, 0, 1], [1, 0, 0]])
    for one in gather_carried(pair, [(tokens(2, 3), mask, DRAWS[:2])], range(5)):
        assert not one.squares.any() and not one.products.any()


def test_a_twin_differs_at_one_real_token_that_another_one_precedes():
    ids, logits = tokens(), torch.randn(4, 7, 17, generator=torch.Generator().manual_seed(0))
    seen = set()
    for seed in range(60):
        twin = twin_rows(logits, ids, MASK, torch.rand(4, 2, generator=torch.Generator().manual_seed(seed)))
        places = (twin.input_ids != ids).nonzero().tolist()
        assert [row for row, _ in places] == [0, 1, 2]  # the last row has a single token
        assert not twin.after[3].any()
        for row, place in places:
            assert twin.after[row].tolist() == [bool(MASK[row, t]) and t >= place for t in range(7)]
            seen.add((row, place))
    assert seen == {tuple(place) for place in counted_places(ids, MASK)}


def test_a_twins_token_is_drawn_by_the_models_probability_without_the_one_that_stands_there():
    n = 20_000
    logits = torch.randn(1, 2, 5, generator=torch.Generator().manual_seed(1))
    ids = torch.tensor([[0, 3]]).repeat(n, 1)
    draws = torch.rand(n, 2, generator=torch.Generator().manual_seed(2))
    twin = twin_rows(logits.expand(n, -1, -1), ids, None, draws)
    p = logits[0, 0].double().softmax(-1)
    p[3] = 0
    frequencies = torch.bincount(twin.input_ids[:, 1], minlength=5) / n
    torch.testing.assert_close(frequencies.double(), p / p.sum(), rtol=0, atol=0.015)
    assert frequencies[3] == 0 and (twin.input_ids[:, 0] == 0).all()


def test_a_twin_is_found_where_the_model_is_sure():
    logits = torch.full((1, 2, 5), -1e4)
    logits[..., 3] = 1e4
    twin = twin_rows(logits, torch.tensor([[0, 3]]), None, torch.tensor([[0.9, 0.999]]))
    assert twin.input_ids.tolist() == [[0, 4]]


def test_the_closed_form_minimises_reconstruction_and_interchange_together():
    """The gradient of NMSE + weight * interchange + ridge, written out, is zero at the decoder found."""
    pair, ids, mask = PAIRS["equal depth"](), tokens(48, 10, seed=11), None
    draws, ridge, weight = torch.rand(48, 2, generator=torch.Generator().manual_seed(3)), 1e-3, 0.4
    batches, pairs = [(ids, mask)], [(ids, mask, draws)]
    solve_bridges(pair, lambda: batches, ridge, 1e9)
    plain = [bridge.decoder_weight.detach().clone() for bridge in pair.bridge_set]
    encoders = [bridge.encoder_weight.detach().clone() for bridge in pair.bridge_set]
    asked = gather_carried(pair, pairs, range(5))
    found = solve_bridges(pair, lambda: batches, ridge, 1e9, pairs=lambda: pairs, carried_weight=weight)
    grouped = join(gpt2(), sparse_model())
    again = solve_bridges(grouped, lambda: batches, ridge, 1.0, pairs=lambda: pairs, carried_weight=weight)
    with torch.no_grad():
        dense, sparse = (model.residuals(ids)[0] for model in (pair.dense, pair.sparse))
    for i, bridge in enumerate(pair.bridge_set):
        assert torch.equal(found[i].products, asked[i].products) and torch.equal(found[i].squares, again[i].squares)
        assert relative(grouped.bridge_set[i].decoder_weight.detach(), bridge.decoder_weight.detach()) < 1e-12
        h, z = (streams[i][:, 1:].flatten(0, 1) for streams in (dense, sparse))
        penalty = ridge * z.var(0, unbiased=False).mean() / (h - h.mean(0)).square().sum(1).mean()

        def objective(bridge=bridge, one=found[i], h=h, z=z, penalty=penalty):
            nmse = (bridge.decode(z) - h).square().sum() / (h - h.mean(0)).square().sum()
            return nmse + weight * one.loss(bridge.decoder_weight) + penalty * bridge.decoder_weight.square().sum()

        slopes = torch.autograd.grad(objective(), [bridge.decoder_weight, bridge.decoder_bias])
        assert max(slope.abs().max() for slope in slopes) < 1e-10
        assert found[i].loss(bridge.decoder_weight) < found[i].loss(plain[i])
        assert torch.equal(bridge.encoder_weight.detach(), encoders[i])


@pytest.mark.parametrize("batches", [1, 2])
def test_a_step_adds_its_gradient_once(batches):
    pair, ids, weights = PAIRS["equal depth"](), tokens(), Weights(interchange=0.7)
    carried = gather_carried(pair, [(ids, MASK, DRAWS)], range(5))
    parts = [(ids, MASK)] if batches == 1 else [(ids[:1], MASK[:1]), (ids[1:], MASK[1:])]
    plain = step_gradients(pair, parts, [1], Objective(weights._replace(interchange=0.0)))
    without = gradients(pair.bridge_set.parameters())
    losses = step_gradients(pair, parts, [1], Objective(weights, carried=carried, loss_scale=8.0))
    found = gradients(pair.bridge_set.parameters())
    terms = [one.loss(bridge.decoder_weight) for one, bridge in zip(carried, pair.bridge_set, strict=True)]
    (0.7 * sum(terms) / 5).backward()
    for with_term, base, own in zip(found, without, gradients(pair.bridge_set.parameters()), strict=True):
        torch.testing.assert_close(with_term, base + own, rtol=1e-9, atol=1e-12)
    assert losses.loss - plain.loss == pytest.approx(0.7 * sum(term.item() for term in terms) / 5, rel=1e-9)
    assert losses.row()["train/interchange/1.attn"] == pytest.approx(terms[2].item(), rel=1e-12)
    assert not any("interchange" in name for name in plain.row())


def test_every_row_has_its_draws_however_they_are_shared():
    data = FitData(Rows(tokens(23, 6), seed=3), Rows(tokens(2, 6)))
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
