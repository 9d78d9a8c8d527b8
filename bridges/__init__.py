"""Linear bridges between a dense language model and a weight-sparse, readable one: fit, measure, steer."""

from bridges.bridge import Bridge, BridgeSet
from bridges.config import FitConfig
from bridges.evaluate import evaluate
from bridges.fit import fit
from bridges.models.huggingface import as_residual
from bridges.models.pair import load_pair
from bridges.models.residual import ResidualModel
from bridges.models.sparse import SparseTransformer
from bridges.models.sparse_config import SparseConfig
from bridges.ops.abs_topk import abs_topk
from bridges.quality import BridgeReport
from bridges.training.hybrid import HybridLosses, hybrid_losses

__all__ = [
    "Bridge",
    "BridgeReport",
    "BridgeSet",
    "FitConfig",
    "HybridLosses",
    "ResidualModel",
    "SparseConfig",
    "SparseTransformer",
    "abs_topk",
    "as_residual",
    "evaluate",
    "fit",
    "hybrid_losses",
    "load_pair",
]
