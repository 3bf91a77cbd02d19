"""Every public name of the library: `cgmq_fx` takes them from here when the first is used.

No module may be called like a public name: `cgmq_fx.explain` has to be the function.
"""

from cgmq_fx.artifact import load
from cgmq_fx.callbacks import Callback
from cgmq_fx.checkpoint import Checkpoint
from cgmq_fx.cost_models import (
    ActivationMemory,
    Arena,
    BOPs,
    Bound,
    Budget,
    Constraint,
    ConstraintState,
    CostModel,
    Energy,
    GraphBits,
    GraphFacts,
    Latency,
    MACs,
    NodeBits,
    NodeFacts,
    Target,
    WeightMemory,
    load_target,
    register_cost_model,
)
from cgmq_fx.cost_models.errors import (
    ArtifactError,
    BoundError,
    BudgetError,
    CaptureError,
    CgmqError,
    CheckpointError,
    CostModelError,
    DataError,
    ExportError,
    InfeasibleBudgetError,
    OptionError,
    PassError,
    StoppedError,
    TargetError,
    TrainingError,
    UnknownCostError,
    UnknownTargetError,
    UnsupportedModelError,
)
from cgmq_fx.costing import Costs, cost
from cgmq_fx.directions import Direction
from cgmq_fx.driver import quantize
from cgmq_fx.explanation import Explanation, explain
from cgmq_fx.exporters import Exported, Exporter, export, register_exporter
from cgmq_fx.exporters.certificate import Certificate, verify
from cgmq_fx.loggers import CSVLogger, TensorBoardLogger
from cgmq_fx.passes.integer import Simulation
from cgmq_fx.passes.scheme import Scheme
from cgmq_fx.prepared import Prepared, prepare
from cgmq_fx.presets import PRESETS, Preset
from cgmq_fx.progress import Progress
from cgmq_fx.result import Result
from cgmq_fx.simulation import simulate
from cgmq_fx.sweep_result import Sweep, SweepPoint
from cgmq_fx.sweeping import sweep

__all__ = [
    "PRESETS",
    "ActivationMemory",
    "Arena",
    "ArtifactError",
    "BOPs",
    "Bound",
    "BoundError",
    "Budget",
    "BudgetError",
    "CSVLogger",
    "Callback",
    "CaptureError",
    "Certificate",
    "CgmqError",
    "Checkpoint",
    "CheckpointError",
    "Constraint",
    "ConstraintState",
    "CostModel",
    "CostModelError",
    "Costs",
    "DataError",
    "Direction",
    "Energy",
    "Explanation",
    "ExportError",
    "Exported",
    "Exporter",
    "GraphBits",
    "GraphFacts",
    "InfeasibleBudgetError",
    "Latency",
    "MACs",
    "NodeBits",
    "NodeFacts",
    "OptionError",
    "PassError",
    "Prepared",
    "Preset",
    "Progress",
    "Result",
    "Scheme",
    "Simulation",
    "StoppedError",
    "Sweep",
    "SweepPoint",
    "Target",
    "TargetError",
    "TensorBoardLogger",
    "TrainingError",
    "UnknownCostError",
    "UnknownTargetError",
    "UnsupportedModelError",
    "WeightMemory",
    "cost",
    "explain",
    "export",
    "load",
    "load_target",
    "prepare",
    "quantize",
    "register_cost_model",
    "register_exporter",
    "simulate",
    "sweep",
    "verify",
]
