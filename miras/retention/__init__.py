"""Axis 3, retention gate."""

from miras.retention.base import EuclideanRetention as EuclideanRetention
from miras.retention.base import MirrorRetention as MirrorRetention
from miras.retention.base import Retention as Retention
from miras.retention.base import SlopedRetention as SlopedRetention
from miras.retention.euclidean import L2 as L2
from miras.retention.euclidean import NoRetention as NoRetention
from miras.retention.kl import KL as KL
from miras.retention.lq import Lq as Lq
