import pytest
import torch

from bridges.fitting.ridge import RIDGES, STD_FLOOR, Moments, gather, standard_deviations


def rows(n, d, seed, dtype=torch.float64, offset=0.0, condition=1.0):
    """Gaussian rows about `offset` whose covariance has the condition number `condition` in a random basis."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64)).Q
    scales = torch.logspace(0, -0.5 * torch.tensor(condition).log10().item(), d, dtype=torch.float64)
    return ((x * scales) @ basis + offset).to(dtype)


def regress(x, y):
    """weight and bias of least squares with an intercept, by QR in float64."""
    design = torch.cat([x.double(), torch.ones(len(x), 1, dtype=torch.float64)], 1)
    solution = torch.linalg.lstsq(design, y.double(), driver="gelsd").solution
    return solution[:-1].T, solution[-1]


def moments_of(*chunks, shift=None):
    x, y = chunks[0]
    shift = (x.double().mean(0), y.double().mean(0)) if shift is None else shift
    moments = Moments(*shift)
    for x, y in chunks:
        moments.update(x, y)
    return moments


@pytest.mark.parametrize("reverse", [False, True])
def test_without_a_ridge_it_is_least_squares(reverse):
    x, y = rows(200, 6, 0, offset=2.0, condition=100.0), rows(200, 4, 1)
    y = y + x[:, :4]
    found = moments_of((x[:150], y[:150]), (x[150:], y[150:])).solve(0.0, reverse)
    weight, bias = regress(y, x) if reverse else regress(x, y)
    torch.testing.assert_close(found.weight, weight, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found.bias, bias, rtol=1e-10, atol=1e-12)


def test_merged_halves_are_the_whole():
    x, y = rows(300, 5, 2, offset=4.0), rows(300, 7, 3, offset=-3.0)
    shift = (x[:100].mean(0), y[:100].mean(0))
    whole = moments_of((x, y), shift=shift)
    merged = moments_of((x[:80], y[:80]), shift=shift) + moments_of((x[80:], y[80:]), shift=shift)
    for one, two in zip(merged.tensors(), whole.tensors(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12 * two.abs().max().item())


def test_moments_about_different_shifts_add_up_about_the_first():
    x, y = rows(300, 5, 2, offset=4.0), rows(300, 7, 3, offset=-3.0)
    first, second = (x[:100].mean(0), y[:100].mean(0)), (x[100:].median(0).values, y[100:].median(0).values + 2)
    whole = moments_of((x, y), shift=first)
    merged = moments_of((x[:80], y[:80]), shift=first) + moments_of((x[80:], y[80:]), shift=second)
    assert torch.equal(merged.shift_x, first[0]) and torch.equal(merged.shift_y, first[1])
    for one, two in zip(merged.tensors(), whole.tensors(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12 * two.abs().max().item())


@pytest.mark.parametrize("reverse", [False, True])
def test_the_nmse_of_a_solution_is_that_of_its_predictions_on_other_rows(reverse):
    x, y = rows(200, 5, 2, offset=4.0), rows(200, 7, 3, offset=-3.0)
    solution = moments_of((x[:90], y[:90])).solve(0.1, reverse)
    inputs, targets = (y[90:], x[90:]) if reverse else (x[90:], y[90:])
    predicted = inputs @ solution.weight.T + solution.bias
    expected = (predicted - targets).square().sum() / (targets - targets.mean(0)).square().sum()
    assert moments_of((x[90:], y[90:])).nmse(solution, reverse) == pytest.approx(expected.item(), rel=1e-10)


@pytest.mark.parametrize("offset", [0.0, 10.0, 300.0])
def test_float32_rows_far_from_zero_and_badly_conditioned_match_float64(offset):
    x = rows(4000, 16, 4, torch.float32, offset, condition=1e4)
    target = rows(16, 8, 5)
    y = (x.double() @ target + 0.01 * rows(4000, 8, 6) + offset).float()
    found = moments_of(*zip(x.split(512), y.split(512), strict=True)).solve(0.0)
    weight, bias = regress(x, y)
    exact = (x.double() @ weight.T + bias - y.double()).square().sum()
    here = (x.double() @ found.weight.T + found.bias - y.double()).square().sum()
    assert (here / exact - 1).abs() < 1e-6
    assert ((found.weight - weight).norm() / weight.norm()) < 1e-4
    # The residual's mean is zero at the least-squares solution: the intercept is right to rounding.
    assert (x.double() @ found.weight.T + found.bias - y.double()).mean(0).abs().max() < 1e-6


def test_the_ridge_by_hand():
    """x = -1, 0, 1, y = 5 + 2x: standardised, the slope is divided by 1 + 0.5, so it is 2 / 1.5 = 4/3."""
    x = torch.tensor([[-1.0], [0.0], [1.0]], dtype=torch.float64) + 7
    found = moments_of((x, 5 + 2 * (x - 7))).solve(0.5)
    torch.testing.assert_close(found.weight, torch.tensor([[4 / 3]], dtype=torch.float64))
    # The intercept is free: the line still goes through the means, 5 at 7.
    torch.testing.assert_close(found.bias, torch.tensor([5 - 7 * 4 / 3], dtype=torch.float64))


def augmented_ridge(x, y, ridge):
    """Ridge regression of y on the standardised x, as least squares with extra rows; in plain weights."""
    mean, std = x.mean(0), x.std(0, unbiased=False)
    root = (ridge * len(x)) ** 0.5 * torch.eye(x.shape[1], dtype=torch.float64)
    augmented = torch.cat([(x - mean) / std, root]), torch.cat([y - y.mean(0), root.new_zeros(len(root), y.shape[1])])
    weight = torch.linalg.lstsq(*augmented).solution.T / std
    return weight, y.mean(0) - weight @ mean


def test_the_ridge_penalises_standardised_inputs_and_leaves_the_intercept_free():
    x, y = rows(100, 5, 7, offset=6.0, condition=50.0), rows(100, 3, 8, offset=-2.0)
    x = x * torch.tensor([1.0, 5.0, 1.0, 0.2, 1.0], dtype=torch.float64)
    found = moments_of((x, y)).solve(0.3)
    weight, bias = augmented_ridge(x, y, 0.3)
    torch.testing.assert_close(found.weight, weight, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.bias, bias, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
def test_a_channels_scale_does_not_change_what_is_predicted(scale):
    x, y = rows(100, 5, 7, offset=6.0), rows(100, 3, 8)
    scaled = x * torch.tensor([scale, 1.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    one, two = (moments_of((inputs, y)).solve(0.1) for inputs in (x, scaled))
    torch.testing.assert_close(x @ one.weight.T + one.bias, scaled @ two.weight.T + two.bias, rtol=1e-9, atol=1e-9)


def test_a_channel_that_hardly_varies_is_not_blown_up():
    x = rows(100, 3, 7) * torch.tensor([1.0, 1.0, 1e-9], dtype=torch.float64)
    std = standard_deviations(x.T.cov(correction=0))
    torch.testing.assert_close(std[:2], x.std(0, unbiased=False)[:2])
    assert std[2] == pytest.approx(STD_FLOOR * x.var(0, unbiased=False).mean().sqrt().item())
    assert standard_deviations(torch.zeros(2, 2)).tolist() == [1, 1]


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("noise", "n"), [(0.0, 300), (3.0, 25), (0.3, 60)])
def test_the_chosen_ridge_is_the_largest_of_about_the_least_error_on_held_out_rows(reverse, noise, n):
    x, y = rows(n, 12, 40, offset=3.0, condition=1e3), rows(n, 9, 41, offset=-1.0)
    y = x[:, :9] * 2 + noise * y
    other_x, other_y = rows(80, 12, 42, offset=3.2, condition=1e3), rows(80, 9, 43, offset=-1.0)
    other_y = other_x[:, :9] * 2 + noise * other_y
    train, heldout = moments_of((x, y)), moments_of((other_x, other_y))
    pairs = [(y, x), (other_y, other_x)] if reverse else [(x, y), (other_x, other_y)]

    def heldout_error(ridge):
        weight, bias = augmented_ridge(*pairs[0], ridge)
        return (pairs[1][0] @ weight.T + bias - pairs[1][1]).square().sum().item()

    errors = {ridge: heldout_error(ridge) for ridge in RIDGES}
    chosen = train.choose_ridge(heldout, reverse)
    variance = (pairs[1][1] - pairs[0][1].mean(0)).square().sum().item()
    assert chosen == max(r for r in RIDGES if errors[r] <= 1.01 * min(errors.values()) + 1e-9 * variance)
    if noise == 3.0 and not reverse:
        assert chosen > 1e-3  # of so few noisy rows, hardly a penalty at all would be far worse
        assert errors[1e-9] > 1.2 * errors[chosen]


def test_a_rare_token_that_the_rows_do_not_have_is_not_predicted_by_a_hundred_times_its_size():
    """Two channels go together at 40 rows, but for a little; then comes a token that has one of them alone."""
    x, noise = rows(4000, 6, 50), rows(4000, 4, 51)
    rare = torch.zeros(4000, 2, dtype=torch.float64)
    rare[::100] = 3 + 1e-3 * rows(40, 2, 52)
    x = torch.cat([x, rare], 1)
    y = x[:, :4] + 0.1 * x[:, 6:7] + 0.3 * noise
    train, heldout = moments_of((x[:2000], y[:2000])), moments_of((x[2000:], y[2000:]))
    alone = torch.zeros(8, dtype=torch.float64)
    alone[6] = 3.0

    def size(ridge):
        solution = train.solve(ridge)
        return (solution.weight @ alone + solution.bias).norm().item()

    assert size(1e-9) > 30 > 3 > size(train.choose_ridge(heldout))


def test_a_ridge_can_be_chosen_where_inputs_repeat():
    x, y = rows(60, 4, 9), rows(60, 2, 10)
    x = torch.cat([x, x[:, :2], torch.full((60, 1), 3.0, dtype=torch.float64)], 1)
    moments = moments_of((x, y))
    solution = moments.solve(moments.choose_ridge(moments))
    assert solution.weight.isfinite().all() and not solution.weight[:, 6].any()


def test_channels_that_repeat_or_never_change_give_the_smallest_of_the_solutions():
    x, y = rows(60, 4, 9), rows(60, 2, 10)
    x = torch.cat([x, x[:, :1], torch.full((60, 1), 3.0, dtype=torch.float64)], 1)
    found = moments_of((x, y)).solve(0.0)
    centred = x - x.mean(0)
    smallest = torch.linalg.pinv(centred, rcond=1e-9) @ (y - y.mean(0))
    torch.testing.assert_close(found.weight, smallest.T, rtol=1e-8, atol=1e-9)
    assert found.weight[:, 5].abs().max() < 1e-9


def test_fewer_rows_than_channels_are_fitted_through():
    x, y = rows(5, 9, 11, offset=1.0), rows(5, 2, 12)
    found = moments_of((x, y)).solve(0.0)
    torch.testing.assert_close(x @ found.weight.T + found.bias, y, rtol=1e-8, atol=1e-9)


def test_an_input_that_never_changes_predicts_the_mean():
    x, y = torch.full((6, 3), 2.0, dtype=torch.float64), rows(6, 2, 13)
    found = moments_of((x, y)).solve(1e-4)
    assert not found.weight.any()
    torch.testing.assert_close(found.bias, y.mean(0))


def test_streams_of_different_dtypes_are_multiplied_in_the_wider():
    x, y = rows(80, 3, 30, torch.bfloat16, offset=5.0), rows(80, 2, 31, torch.float64)
    found = moments_of((x, y)).solve(0.0)
    torch.testing.assert_close(found.weight, regress(x, y)[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("n", [0, 1])
def test_too_few_tokens_are_refused(n):
    with pytest.raises(ValueError, match=f"at least 2 tokens, got {n}"):
        moments_of((rows(n, 2, 0), rows(n, 2, 1)), shift=(torch.zeros(2), torch.zeros(2))).solve(0.1)


def test_gathering_in_chunks_is_gathering_at_once_site_by_site():
    sites = [(rows(90, 3, 20, offset=5.0), rows(90, 4, 21)), (rows(90, 3, 22), rows(90, 4, 23, offset=2.0))]
    chunks = [[(x[i : i + 30], y[i : i + 30]) for x, y in sites] for i in (0, 30, 60)]
    for (x, y), found in zip(sites, gather(chunks), strict=True):
        once = moments_of((x, y), shift=(x[:30].mean(0), y[:30].mean(0)))
        for one, two in zip(found.tensors(), once.tensors(), strict=True):
            torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-11)


def test_the_first_chunk_may_have_no_rows():
    x, y = rows(40, 3, 24, offset=5.0), rows(40, 2, 25)
    found = gather([[(x[:0], y[:0])], [(x, y)]])[0].solve(0.0)
    torch.testing.assert_close(found.weight, regress(x, y)[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("mine", [40, 0], ids=["rows of its own", "no rows"])
def test_two_processes_share_the_mean_of_their_first_chunks_as_shift_and_end_with_the_sum(mine):
    x, y = rows(80, 3, 26, offset=9.0), rows(80, 2, 27)
    here, there = (x[:mine], y[:mine]), (x[mine:], y[mine:])
    shift = x.mean(0), y.mean(0)
    answers = [
        torch.cat([torch.tensor([len(there[0])]).double(), there[0].sum(0), there[1].sum(0)]),
        torch.cat([t.flatten() for t in moments_of(there, shift=shift).tensors()]),
    ]
    found = gather([[here]], lambda tensor: tensor + answers.pop(0))[0]
    assert not answers
    torch.testing.assert_close(found.shift_x, shift[0], rtol=1e-14, atol=0)
    torch.testing.assert_close(found.solve(0.0).weight, regress(x, y)[0], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found.solve(0.0).bias, regress(x, y)[1], rtol=1e-10, atol=1e-12)


def test_moments_keep_their_precision_in_a_run_of_mixed_precision():
    x, y = rows(200, 3, 0).float(), rows(200, 2, 1).float()
    plain, mixed = (Moments(torch.zeros(3), torch.zeros(2)) for _ in range(2))
    plain.update(x, y)
    with torch.autocast("cpu", torch.bfloat16):
        mixed.update(x, y)
    assert all(torch.equal(one, other) for one, other in zip(plain.tensors(), mixed.tensors(), strict=True))


def test_directions_in_which_inputs_do_not_vary_get_no_weight_from_rounding():
    """Forty tokens span 40 of 64 channels; a new token goes beyond them, and its prediction must stay of their size."""
    embeddings, values = rows(41, 64, 60), rows(41, 3, 61)
    tokens = torch.randint(40, (4000,), generator=torch.Generator().manual_seed(0))
    solution = moments_of((embeddings[tokens].float(), values[tokens].float())).solve(1e-9)
    new = solution.weight @ embeddings[40] + solution.bias
    assert new.norm() < 2 * values.norm(dim=1).max()
    known = embeddings[:40] @ solution.weight.T + solution.bias
    assert (known - values[:40]).norm() / values[:40].norm() < 1e-3


def test_of_inputs_that_repeat_those_of_more_freedom_get_more_of_the_weight():
    """Two copies of a channel share its weight by the squares of their freedoms; the prediction is the same."""
    x = rows(200, 1, seed=3)
    y = 2 * x + 0.1 * rows(200, 1, seed=4)
    moments = moments_of((torch.cat([x, x], dim=1), y))
    for freedom in (None, torch.tensor([1.0, 1.0]), torch.tensor([3.0, 1.0])):
        weight = moments.solve(1e-6, freedom=freedom).weight[0]
        share = 0.5 if freedom is None else (freedom[0] ** 2 / freedom.square().sum()).item()
        assert weight.sum().item() == pytest.approx(2, abs=0.05)
        assert (weight[0] / weight.sum()).item() == pytest.approx(share, abs=1e-4)


def test_with_freedoms_it_is_ridge_regression_on_scaled_inputs():
    x, y = rows(60, 4, seed=5), rows(60, 3, seed=6)
    freedom, moments = torch.tensor([0.5, 1.0, 2.0, 4.0], dtype=torch.float64), moments_of((x, y))
    std, centred = x.std(0, correction=0), x - x.mean(0)
    inputs = centred / std * freedom
    expected = torch.linalg.solve(inputs.T @ inputs / 60 + 0.3 * torch.eye(4).double(), inputs.T @ (y - y.mean(0)) / 60)
    found = moments.solve(0.3, freedom=freedom).weight
    torch.testing.assert_close(found, (expected * (freedom / std)[:, None]).T, rtol=1e-9, atol=1e-12)
