import re

import yaml

from bridges.card import model_card
from bridges.quality import BridgeReport, SiteFigures

CONFIG = {
    "pairs": [["0.attn", "0.attn"], ["3.block", "1.attn"]],
    "d_dense": 48,
    "d_sparse": 96,
    "k": 24,
    "dense": {"name": "someone/dense", "fingerprint": "x"},
    "sparse": {"name": "thin", "fingerprint": "y"},
}
REPORT = BridgeReport((SiteFigures("1.attn", *[0.125 * i for i in range(10)]),), 2.5, 2.75, 0.375, 99)


def test_the_card_says_what_it_joins_and_how_well():
    card = model_card(CONFIG, REPORT)
    head = yaml.safe_load(re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)[1])
    assert head["library_name"] == "sparse-bridges" and "interpretability" in head["tags"]
    assert "# Bridges between someone/dense and thin" in card
    assert "(width 48)" in card and "(width 96)" in card and "k = 24" in card
    assert REPORT.markdown() in card
    assert "| 0.attn | 0.attn |\n| 3.block | 1.attn |\n" in card
    assert 'BridgeSet.from_pretrained("' in card


def test_without_figures_or_names_it_says_so():
    card = model_card({key: value for key, value in CONFIG.items() if key not in ("dense", "sparse")}, None)
    assert "Not evaluated." in card and "# Bridges between unknown and unknown" in card


def test_the_same_input_gives_the_same_text():
    assert model_card(CONFIG, REPORT) == model_card(dict(CONFIG), REPORT)
