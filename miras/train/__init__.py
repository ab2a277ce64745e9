"""Training: a configuration in, a run folder out. `miras train` is `train(TrainConfig(...))`."""

from miras.train.config import SIZES as SIZES
from miras.train.config import TrainConfig as TrainConfig
from miras.train.config import load_config as load_config
from miras.train.run import train as train
from miras.train.summary import Summary as Summary
