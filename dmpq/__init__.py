"""dmpq: dynamic mixed-precision quantization of Mixture-of-Experts models.

A bit-width for every expert, found by search and reinforcement learning, judged by validation
loss and by latency, memory and energy on the target hardware. Importing this package registers
its Gymnasium environments and loads neither torch nor transformers.
"""

from dmpq import envs as _envs
from dmpq.bitmap import BitMap
from dmpq.errors import InputError
from dmpq.evaluation import Evaluations, Evaluator, SurrogateEvaluator
from dmpq.formats import Format, Menu
from dmpq.hw_models import Workload, load_hardware
from dmpq.objective import Constraints, Weights
from dmpq.problem import Problem
from dmpq.profile import Profile, reference_profile
from dmpq.spec import ModelSpec, load_geometry

__version__ = "0.1.0"
__all__ = [
    "BitMap",
    "Constraints",
    "Evaluations",
    "Evaluator",
    "Format",
    "InputError",
    "Menu",
    "ModelSpec",
    "Problem",
    "Profile",
    "SurrogateEvaluator",
    "Weights",
    "Workload",
    "load_geometry",
    "load_hardware",
    "reference_profile",
]

_envs.register()
