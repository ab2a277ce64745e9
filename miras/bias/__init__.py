"""Axis 2, attentional bias."""

from miras.bias.base import Bias as Bias
from miras.bias.custom import Custom as Custom
from miras.bias.erase import Erase as Erase
from miras.bias.huber import Huber as Huber
from miras.bias.lp import L1 as L1
from miras.bias.lp import Lp as Lp
from miras.bias.quadratic import L2 as L2
from miras.bias.quadratic import Dot as Dot
from miras.bias.robust import Robust as Robust
