"""Axis 4, memory learning algorithm."""

from miras.algorithm.base import Algorithm as Algorithm
from miras.algorithm.base import LinearAlgorithm as LinearAlgorithm
from miras.algorithm.descent import GradientDescent as GradientDescent
from miras.algorithm.descent import Momentum as Momentum
