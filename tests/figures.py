"""Made-up figures of a report and of a steering run, as the plots and the page take them."""

from bridges.bridge_report import BridgeReport, SiteFigures

STEERING = {
    "task": "single_double_quote",
    "site": "1.attn",
    "channel": 7,
    "strengths": [0.0, 1.0, 2.0],
    "p_target": [0.01, 0.3, 0.9],
    "p_target_random_direction": [0.01, 0.01, 0.02],
    "p_target_mean_difference": [0.01, 0.5, 0.8],
    "p_target_all_channels": [0.01, 0.9, 0.99],
    "p_target_sparse_model": [0.02, 0.8, 0.95],
    "p_target_mean_difference_equal_norm": [0.01, 0.2, 0.3],
    "p_target_probe": [0.01, 0.15, 0.25],
    "prompts": 64,
}
STEERING["bands"] = {
    name: {"low": [p / 1.5 for p in curve], "high": [p * 1.2 for p in curve]}
    for name, curve in STEERING.items()
    if name.startswith("p_target")
}


def report(scale=1.0, n=3):
    sites = (SiteFigures(f"{i}.attn", *[scale * (0.1 + 0.1 * j + 0.05 * i) for j in range(10)]) for i in range(n))
    return BridgeReport(tuple(sites), 2.5, 2.75, 0.4, 1000)
