"""Linear bridges between a dense language model and a weight-sparse, readable one: fit, measure, steer.

Models             load_pair, load_bridges, as_residual, ResidualModel, SparseTransformer, SparseConfig
Fit and measure    fit, FitConfig, evaluate, BridgeReport, hybrid_losses, HybridLosses
Bridges            BridgeSet, Bridge, abs_topk
Steer              steer, Edit, counterfactual, constant_edits, save_edits, load_edits, directions, export_direction
Find channels      find_channels, Channels, sweep, Sweep
Tasks              TASKS, task_pairs
Circuits           prune, PruneConfig, Circuit, controls, feature, node_activations,
                   circuit_to_dense
Look               report
Sparse training    pretrain, PretrainConfig

A model may be given to any function as an object, a `ResidualModel`, a folder or a hub id. Docstrings point to the
paper (arXiv 2511.13653) and to `docs/method.md`.
"""

from importlib.metadata import version

from bridges.bridge import Bridge, BridgeSet
from bridges.bridge_report import BridgeReport
from bridges.channels.constant_edits import constant_edits
from bridges.channels.feature import feature
from bridges.channels.find import find_channels
from bridges.channels.from_circuit import circuit_to_dense
from bridges.channels.prompts import Channels
from bridges.channels.sweep import Sweep, sweep
from bridges.circuits.circuit import Circuit
from bridges.circuits.controls import controls
from bridges.circuits.features import node_activations
from bridges.circuits.pruning import prune
from bridges.circuits.settings import PruneConfig
from bridges.config import FitConfig
from bridges.demo import load_bridges
from bridges.evaluate import evaluate
from bridges.fit import fit
from bridges.models.bundled import load_pair
from bridges.models.loading import as_residual
from bridges.models.residual import ResidualModel
from bridges.models.sparse.config import SparseConfig
from bridges.models.sparse.model import SparseTransformer
from bridges.objective.hybrid import HybridLosses, hybrid_losses
from bridges.ops.abs_topk import abs_topk
from bridges.pretrain import pretrain
from bridges.sparsity.settings import PretrainConfig
from bridges.steering.counterfactual import counterfactual
from bridges.steering.edits import Edit, load_edits, save_edits
from bridges.steering.export import directions, export_direction
from bridges.steering.steer import steer
from bridges.tasks.pairs import TASKS, task_pairs
from bridges.views.report import report

__version__ = version("sparse-bridges")

__all__ = [
    "TASKS",
    "Bridge",
    "BridgeReport",
    "BridgeSet",
    "Channels",
    "Circuit",
    "Edit",
    "FitConfig",
    "HybridLosses",
    "PretrainConfig",
    "PruneConfig",
    "ResidualModel",
    "SparseConfig",
    "SparseTransformer",
    "Sweep",
    "__version__",
    "abs_topk",
    "as_residual",
    "circuit_to_dense",
    "constant_edits",
    "controls",
    "counterfactual",
    "directions",
    "evaluate",
    "export_direction",
    "feature",
    "find_channels",
    "fit",
    "hybrid_losses",
    "load_bridges",
    "load_edits",
    "load_pair",
    "node_activations",
    "pretrain",
    "prune",
    "report",
    "save_edits",
    "steer",
    "sweep",
    "task_pairs",
]
