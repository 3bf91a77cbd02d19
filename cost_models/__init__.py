"""Facts of a graph, cost models over them, and budgets of bounds on costs."""

if __name__ != "cgmq_fx.cost_models":
    raise ImportError("import this package as cgmq_fx.cost_models, not as a top-level name")

from cgmq_fx.cost_models.bits import (
    Assignment,
    BitArray,
    GraphBits,
    NodeBits,
    graph_bits,
    idle_gates,
    node_bits,
)
from cgmq_fx.cost_models.builtin import BOPs, MACs, WeightMemory
from cgmq_fx.cost_models.constraint import Bound, Budget, Constraint, ConstraintState
from cgmq_fx.cost_models.facts import (
    CONVENTION,
    FLOAT_BITS,
    GraphFacts,
    NodeFacts,
    Operand,
    QuantizerFacts,
    Role,
    Stored,
    TensorFacts,
)
from cgmq_fx.cost_models.ledger import Ledger, highest_bits, lowest_bits, uniform_bits
from cgmq_fx.cost_models.memory import ActivationMemory, Arena, ArenaPlan
from cgmq_fx.cost_models.model import CostModel, cost_model, register_cost_model
from cgmq_fx.cost_models.parse import BudgetLike, parse_bound, parse_budget
from cgmq_fx.cost_models.preflight import check_cost_models, check_feasible, relevance
from cgmq_fx.cost_models.tables import Energy, Latency
from cgmq_fx.cost_models.target import Target, load_target, target_names

__all__ = [
    "CONVENTION",
    "FLOAT_BITS",
    "ActivationMemory",
    "Arena",
    "ArenaPlan",
    "Assignment",
    "BOPs",
    "BitArray",
    "Bound",
    "Budget",
    "BudgetLike",
    "Constraint",
    "ConstraintState",
    "CostModel",
    "Energy",
    "GraphBits",
    "GraphFacts",
    "Latency",
    "Ledger",
    "MACs",
    "NodeBits",
    "NodeFacts",
    "Operand",
    "QuantizerFacts",
    "Role",
    "Stored",
    "Target",
    "TensorFacts",
    "WeightMemory",
    "check_cost_models",
    "check_feasible",
    "cost_model",
    "graph_bits",
    "highest_bits",
    "idle_gates",
    "load_target",
    "lowest_bits",
    "node_bits",
    "parse_bound",
    "parse_budget",
    "register_cost_model",
    "relevance",
    "target_names",
    "uniform_bits",
]
