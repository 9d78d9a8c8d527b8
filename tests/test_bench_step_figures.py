"""What the benchmarks of a step count and print: operations by hand, shares, batches that do not fit."""

from contextlib import contextmanager
from functools import partial

import bench_growth
import bench_step
import measure_step
import pytest
import torch
from flop import Flop, count_flop, large_product
from measure_step import Case, Figures, affordable_rows, cells, measure
from step_pair import WITH_A_MOVE

from bridges.ops.causal_attention import causal_attention, causal_attention_eager
from bridges.ops.sparse_linear import NonzeroPattern, sparse_linear

SHAPE = {"layers": 1, "d_dense": 32, "d_sparse": 48, "vocab": 32, "density": 1 / 16}


@pytest.mark.parametrize("wants", [(), ("x",), ("values",), ("x", "values")])
def test_a_product_with_nonzeros_counts_two_for_each_nonzero_and_token(wants):
    """Forward once, and once for each gradient."""
    mask = torch.zeros(6, 5, dtype=torch.bool)
    mask.view(-1)[:4] = True
    x = torch.randn(7, 5, requires_grad="x" in wants)
    values = torch.randn(4, requires_grad="values" in wants)

    def run():
        y = sparse_linear(x, values, NonzeroPattern.from_mask(mask)).sum()
        if wants:
            y.backward()

    assert count_flop(run) == Flop(0, 2 * 4 * 7 * (1 + len(wants)))
    assert count_flop(lambda: None) == Flop(0, 0)


def test_fused_attention_counts_what_attention_by_its_definition_does():
    """Its backward pass computes the scores anew, a fifth product beside four."""
    q, k, v = (torch.randn(2, 3, 8, 4, requires_grad=True) for _ in range(3))
    one = 2 * 2 * 3 * 8 * 8 * 4
    by_definition = count_flop(lambda: causal_attention_eager(q, k, v).sum().backward())
    fused = count_flop(lambda: causal_attention(q, k, v).sum().backward())
    assert by_definition == Flop(6 * one, 0) and fused == Flop(7 * one, 0)


def test_the_written_out_step_counts_its_products_and_ours_fewer_on_a_frozen_model():
    found = measure(Case("frozen", SHAPE, batch=2, seq=16), rounds=1)
    ours, written = found.flop["ours"], found.flop["written out"]
    assert written.nonzeros == 0 and 0 < ours.nonzeros < ours.dense < written.dense
    assert found.ceiling > 0 and found.peak == {} and found.rows == {"written out": 2, "ours": 2}
    run, operations = large_product(size=5)
    assert run().shape == (5, 5) and operations == 250


def test_a_step_whose_support_moves_has_its_share_of_the_step_with_a_move(monkeypatch):
    ones = torch.ones(10, 10)
    found = {"written out": 100.0, "ours": 50.0, WITH_A_MOVE: 300.0}
    products = {"written out": 3, "ours": 1, WITH_A_MOVE: 11}

    @contextmanager
    def fake_steps(*args, **settings):
        yield {name: lambda rows, name=name: (name, *(ones @ ones for _ in range(products[name]))) for name in found}

    def fake_milliseconds(run, device):
        return found.get(run()[0], 1.0) if isinstance(run, partial) else 1.0

    monkeypatch.setattr(measure_step, "steps", fake_steps)
    monkeypatch.setattr(measure_step, "milliseconds", fake_milliseconds)
    case = Case("moving support", SHAPE, batch=2, seq=16)
    figures = measure(case, rounds=1)
    assert figures.ms == {"written out": 100, "ours": 50 + 250 / 25}
    assert figures.flop == {"written out": Flop(6000, 0), "ours": Flop(2000 + 20_000 // 25, 0)}
    often = case._replace(settings={"move_every": 10})
    assert measure(often, rounds=1).ms["ours"] == 50 + 250 / 10
    assert "one step in 10 ends in a move" in measure_step.caption([often], "cpu")
    assert "move" not in measure_step.caption([Case("frozen", SHAPE)], "cpu")


def figures(peak=None):
    return Figures(
        rows={"written out": 2, "ours": 8},
        ms={"written out": 100.0, "ours": 50.0},
        flop={"written out": Flop(6 * 10**9, 0), "ours": Flop(2 * 10**9, 10**9)},
        ceiling=10**8,
        peak=peak or {},
        seq=10,
    )


def test_ratio_is_of_tokens_and_shares_are_of_the_time_at_the_ceiling():
    found = figures()
    assert found.tokens_per_second("written out") == 200 and found.ratio == 8
    line = cells(found)
    assert line["ratio"] == "8.00" and line["ceiling, GFLOP/s"] == "100"
    shares = [line[name] for name in ("products at the ceiling / step: written out", "ours, dense alone", "ours")]
    assert shares == ["60%", "40%", "60%"]
    with_memory = cells(figures({"written out": 3000.0, "ours": 10.0}))
    assert with_memory["rows: written out, ours"] == "2, 8" and with_memory["peak memory, MiB"] == "3,000, 10"


def test_a_batch_that_does_not_fit_is_halved_until_it_does():
    tried = []

    def step(rows, fits=5):
        tried.append(rows)
        if rows > fits:
            raise torch.OutOfMemoryError

    assert affordable_rows(step, 32) == 4 and tried == [32, 16, 8, 4]
    assert affordable_rows(lambda rows: step(rows, fits=0), 2) == 0
    line = cells(Figures({"written out": 0, "ours": 8}, {"ours": 50.0}, {"ours": Flop(1, 0)}, 10**8, {}))
    assert line["written out, ms"] == line["ratio"] == "nan" and line["ours, ms"] == "50"


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_the_path_for_gpus_runs_on_a_cpu_where_its_memory_is_made_up(precision, monkeypatch, capsys):
    """Its clock and its memory are the GPU's; everything else is what runs there."""
    for name, value in {"synchronize": None, "reset_peak_memory_stats": None, "empty_cache": None}.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 2**20)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 5 * 2**20)
    monkeypatch.setattr(measure_step, "on_gpu", lambda device: True)
    case = Case("fixed support", SHAPE | {"d_head": 16}, 4, 16, {"mixed_precision": precision})
    found = measure(case, rounds=1)
    assert found.peak == {"written out": 4.0, "ours": 4.0} and found.rows == {"written out": 4, "ours": 4}
    bench_step.table_of_times([case], 1, "cpu")
    lines = capsys.readouterr().out.splitlines()
    assert "tokens/s" in lines[0] and len(lines) == 5 and "| 4, 4 |" in lines[2]
    assert ("bfloat16, as" if precision == "bf16" else 'float32 at the precision "highest", as') in lines[4]


def test_the_case_of_gpt2_is_of_its_size():
    """Its parameters, counted without building it in memory."""
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = bench_step.GPT2_SHAPE
    with torch.device("meta"):
        heads = shape["d_dense"] // shape["d_head"]
        settings = {"n_embd": shape["d_dense"], "n_layer": shape["layers"], "n_head": heads}
        model = GPT2LMHeadModel(GPT2Config(**settings, vocab_size=shape["vocab"]))
    assert heads == 12 and sum(p.numel() for p in model.parameters()) == 124_439_808
    assert {(case.batch, case.seq, case.settings["mixed_precision"]) for case in bench_step.GPT2} == {(32, 256, "bf16")}


def test_growth_is_over_the_first_row_of_each_table(monkeypatch, capsys):
    monkeypatch.setattr(bench_growth, "BASE", SHAPE)
    monkeypatch.setattr(bench_growth, "BATCH", 1)
    monkeypatch.setattr(bench_growth, "SEQ", 8)
    bench_growth.main(["--rounds", "1", "--varied", "vocab", "density", "--values", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in lines if "x)" in line] == ["| 1,024", "| 1/16"]
    slower = figures()._replace(ms={"written out": 300.0, "ours": 50.0})
    assert bench_growth.row("density", 1 / 1000, slower, figures()) == (
        "| 1/1000 | 300 (3.0x) | 50 (1.0x) | 24.00 | 60% |"
    )
