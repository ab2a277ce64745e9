"""The command line, a file per group of commands. Everything heavy is imported by the command that needs it, so that
--help is quick.
"""

from miras.cli import bench as bench
from miras.cli import evaluate as evaluate
from miras.cli import experiment as experiment
from miras.cli import inspect as inspect
from miras.cli import lab as lab
from miras.cli import models as models
from miras.cli import report as report
from miras.cli import train as train
from miras.cli import variants as variants
from miras.cli.app import main as main
