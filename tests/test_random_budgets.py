"""A reduced run of `benchmarks.random_budgets`, and its judgement of right and wrong."""

import random
from pathlib import Path

import pytest
from torch import nn

import cgmq_fx
from benchmarks.random_budgets import Outcome, problems_of_net, raisable
from tests.random_nets import TinyCNN, prepared
from cgmq_fx import Scheme, parse_budget
