"""Axis 1, memory architecture."""

from miras.memory.base import Memory as Memory
from miras.memory.deep import Deep as Deep
from miras.memory.linear import Linear as Linear
from miras.memory.linear import Vector as Vector
from miras.memory.mlp import MLP as MLP
from miras.memory.polynomial import Polynomial as Polynomial
from miras.memory.swiglu import SwiGLU as SwiGLU
