"""The lab: stream key-value pairs through memories, no outer training, and see what each bias and gate does."""

from miras.lab.compare import compare as compare
from miras.lab.entry import Entry as Entry
from miras.lab.entry import deep as deep
from miras.lab.entry import entry as entry
from miras.lab.entry import matrix as matrix
from miras.lab.scenarios import SCENARIOS as SCENARIOS
from miras.lab.stream import Asked as Asked
from miras.lab.stream import Scenario as Scenario
from miras.lab.stream import Stream as Stream
from miras.lab.watch import Course as Course
from miras.lab.watch import probe as probe
from miras.lab.watch import watch as watch
