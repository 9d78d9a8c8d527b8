import torch

from bridges.channels.reference_text import sample_text


def test_a_search_and_its_report_never_sample_the_same_text(pair):
    reported = sample_text(pair, 3, for_search=False)
    assert not any(torch.equal(sample_text(pair, seed), reported) for seed in range(6))
