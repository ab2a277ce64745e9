"""Axis 3, retention gate."""

from miras.retention.base import EuclideanRetention as EuclideanRetention
from miras.retention.base import MirrorRetention as MirrorRetention
from miras.retention.base import Retention as Retention
from miras.retention.base import SimplexRetention as SimplexRetention
from miras.retention.base import SlopedRetention as SlopedRetention
from miras.retention.bregman import Bregman as Bregman
from miras.retention.divergence import FDivergence as FDivergence
from miras.retention.divergence import LocalFDivergence as LocalFDivergence
from miras.retention.elastic import ElasticNet as ElasticNet
from miras.retention.elastic import LocalElasticNet as LocalElasticNet
from miras.retention.euclidean import L2 as L2
from miras.retention.euclidean import NoRetention as NoRetention
from miras.retention.kl import KL as KL
from miras.retention.lq import Lq as Lq
from miras.retention.sphere import Sphere as Sphere
from miras.retention.two_sided import TwoSided as TwoSided
