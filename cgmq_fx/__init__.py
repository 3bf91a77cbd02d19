"""Constraint guided quantization: a trained PyTorch model, under hard bounds on what it costs."""

from cgmq_fx.artifact import load
from cgmq_fx.callbacks import Callback, Progress
from cgmq_fx.cost_models import (
    BOPs,
    Bound,
    Budget,
    Constraint,
    ConstraintState,
    CostModel,
    MACs,
    NodeBits,
    NodeFacts,
    WeightMemory,
    register_cost_model,
)
from cgmq_fx.cost_models.errors import (
    ArtifactError,
    BoundError,
    BudgetError,
    CaptureError,
    CgmqError,
    CostModelError,
    DataError,
    InfeasibleBudgetError,
    OptionError,
    PassError,
    TrainingError,
    UnknownCostError,
    UnsupportedModelError,
)
from cgmq_fx.directions import Direction
from cgmq_fx.driver import quantize
from cgmq_fx.passes.scheme import Scheme
from cgmq_fx.prepare import Prepared, prepare
from cgmq_fx.result import Result

__all__ = [
    "ArtifactError",
    "BOPs",
    "Bound",
    "BoundError",
    "Budget",
    "BudgetError",
    "Callback",
    "CaptureError",
    "CgmqError",
    "Constraint",
    "ConstraintState",
    "CostModel",
    "CostModelError",
    "DataError",
    "Direction",
    "InfeasibleBudgetError",
    "MACs",
    "NodeBits",
    "NodeFacts",
    "OptionError",
    "PassError",
    "Prepared",
    "Progress",
    "Result",
    "Scheme",
    "TrainingError",
    "UnknownCostError",
    "UnsupportedModelError",
    "WeightMemory",
    "load",
    "prepare",
    "quantize",
    "register_cost_model",
]
