"""Everything a search needs in one object: choices, evidence, evaluator, costs, limits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import combinations
from typing import Any, Final, Literal, cast, get_args

import numpy as np
from numpy.typing import NDArray

from dmpq import features
from dmpq.errors import InputError, unknown
from dmpq.evaluation import Evaluations, Evaluator, SurrogateEvaluator
from dmpq.formats import Menu
from dmpq.hw_models import Cost, HardwareModel, Workload
from dmpq.knapsack import Mckp, solve_mckp_multi
from dmpq.objective import Baselines, Constraints, Weights, reward_terms, shown
from dmpq.profile import Profile
from dmpq.spec import ModelSpec
