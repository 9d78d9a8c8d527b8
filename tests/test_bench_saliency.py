"""The benchmark of saliency on a few rows: what pretraining ranks weights by is better than their size."""

import bench_saliency


def test_weights_of_least_saliency_cost_less_than_the_smallest(capsys):
    found = bench_saliency.main(["--rows", "16", "--heldout", "4"])
    assert found[0.0]["saliency"] == found[0.0]["magnitude"] > 0
    for share in (0.2, 0.3):
        assert found[share]["saliency"] < 0.5 * found[share]["magnitude"]
    assert capsys.readouterr().out.count("|\n") == 2 + len(found)
