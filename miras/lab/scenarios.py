"""The scenarios of `miras lab`: what happens to a memory while it reads."""

from __future__ import annotations

from miras.lab.maps import Drift, Extreme, Outliers, Sensor
from miras.lab.pairs import Conflicts, Neighbours, Overload, Silence
from miras.lab.stream import Scenario

SCENARIOS: dict[str, type[Scenario]] = {
    cls.name: cls
    for cls in (Outliers, Extreme, Drift, Sensor, Conflicts, Overload, Silence, Neighbours)  # simplest first
}
