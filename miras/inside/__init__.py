"""Looking inside a trained model: what each memory does with each token of a text."""

from miras.inside.command import inspect as inspect
from miras.inside.recall import recall as recall
from miras.inside.record import Trace as Trace
from miras.inside.record import trace as trace
