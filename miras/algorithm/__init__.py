"""Axis 4, memory learning algorithm."""

from miras.algorithm.base import Algorithm as Algorithm
from miras.algorithm.base import LinearAlgorithm as LinearAlgorithm
from miras.algorithm.descent import GradientDescent as GradientDescent
from miras.algorithm.descent import Momentum as Momentum
from miras.algorithm.implicit import Implicit as Implicit
from miras.algorithm.least_squares import LeastSquares as LeastSquares
from miras.algorithm.minibatch import MiniBatch as MiniBatch
from miras.algorithm.muon import Muon as Muon
