"""Linear bridges between a dense language model and a weight-sparse, readable one: fit, measure, steer."""

from bridges.bridge import Bridge, BridgeSet
from bridges.channels import find_channels
from bridges.circuits.tasks import TASKS, task_pairs
from bridges.config import FitConfig
from bridges.edits import Edit, counterfactual, load_edits, save_edits
from bridges.effects import constant_edits
from bridges.evaluate import evaluate
from bridges.export import directions, export_direction
from bridges.fit import fit
from bridges.models.huggingface import as_residual
from bridges.models.pair import load_pair
from bridges.models.residual import ResidualModel
from bridges.models.sparse import SparseTransformer
from bridges.models.sparse_config import SparseConfig
from bridges.ops.abs_topk import abs_topk
from bridges.prompts import Channels
from bridges.quality import BridgeReport
from bridges.steer import steer
from bridges.sweep import Sweep, sweep
from bridges.training.hybrid import HybridLosses, hybrid_losses

__all__ = [
    "TASKS",
    "Bridge",
    "BridgeReport",
    "BridgeSet",
    "Channels",
    "Edit",
    "FitConfig",
    "HybridLosses",
    "ResidualModel",
    "SparseConfig",
    "SparseTransformer",
    "Sweep",
    "abs_topk",
    "as_residual",
    "constant_edits",
    "counterfactual",
    "directions",
    "evaluate",
    "export_direction",
    "find_channels",
    "fit",
    "hybrid_losses",
    "load_edits",
    "load_pair",
    "save_edits",
    "steer",
    "sweep",
    "task_pairs",
]
