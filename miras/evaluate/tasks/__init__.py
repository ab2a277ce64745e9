"""Tasks: what a model is asked, each a frozen dataclass. `TASKS` has them under the names of the command line."""

from __future__ import annotations

from miras.errors import UsageError, near
from miras.evaluate.tasks.base import Built as Built
from miras.evaluate.tasks.base import Examples as Examples
from miras.evaluate.tasks.base import LanguageTask as LanguageTask
from miras.evaluate.tasks.base import Readings as Readings
from miras.evaluate.tasks.base import SyntheticTask as SyntheticTask
from miras.evaluate.tasks.base import Task as Task
from miras.evaluate.tasks.base import TokenTask as TokenTask
from miras.evaluate.tasks.copying import SelectiveCopy as SelectiveCopy
from miras.evaluate.tasks.haystack import Haystack as Haystack
from miras.evaluate.tasks.needle import Needle as Needle
from miras.evaluate.tasks.perplexity import Perplexity as Perplexity
from miras.evaluate.tasks.perplexity import Positions as Positions
from miras.evaluate.tasks.recall import MQAR as MQAR
from miras.evaluate.tasks.recall import Memorisation as Memorisation
from miras.evaluate.tasks.recall import NoisyRecall as NoisyRecall
from miras.evaluate.tasks.regression import Regression as Regression
from miras.evaluate.tasks.tracking import Parity as Parity
from miras.evaluate.tasks.tracking import Permutations as Permutations

TASKS: dict[str, Task] = {
    "perplexity": Perplexity(),
    "positions": Positions(),
    "passkey": Needle("passkey"),
    "needle_number": Needle("number"),
    "needle_uuid": Needle("uuid"),
    "haystack": Haystack(),
    "mqar": MQAR(),
    "noisy_recall": NoisyRecall(),
    "regression": Regression(),
    "selective_copy": SelectiveCopy(),
    "memorisation": Memorisation(),
    "parity": Parity(),
    "s3": Permutations(3),
    "s5": Permutations(5),
}


def task(name: str) -> Task:
    """The task of a name in the table.

    Raises:
        UsageError: an unknown name, said with the near ones.
    """
    if name not in TASKS:
        raise UsageError(f"no task is called {name!r}." + near(name, TASKS))
    return TASKS[name]
