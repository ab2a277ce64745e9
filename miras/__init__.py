"""Miras: sequence layers as associative memories that learn while they read (arXiv 2504.13173).

sequence layer = memory architecture x attentional bias x retention gate x memory learning algorithm
"""

from miras import algorithm as algorithm
from miras import bias as bias
from miras import memory as memory
from miras import retention as retention
from miras import variants as variants
from miras.attention import Attention as Attention
from miras.engines import explain as explain
from miras.engines import plan as plan
from miras.engines import run as run
from miras.layer import MirasLayer as MirasLayer
from miras.mixer import Mixer as Mixer
from miras.rule import Rule as Rule
from miras.rule import State as State

__version__ = "0.1.0"
