"""Measure every preset against its oracle and write what `miras list` shows:  python tests/oracles/measure.py

The error is the largest relative deviation of outputs, final memory and gradients of all inputs, in float64, over the
engines that run the preset.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from oracles.presets import measure
from oracles.table import ORACLES
from oracles.test_presets import engines

from miras.evaluate.describe import ORACLES as FILE
from miras.variants import VARIANTS


def main() -> None:
    rows = {}
    for name in VARIANTS:
        error = max(max(measure(name, engine).values()) for engine in engines(name))
        rows[name] = {"oracle": ORACLES[name].by, "error": float(f"{error:.1e}")}
        print(f"{name:16} {error:.1e}  {ORACLES[name].by}")
    FILE.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
