"""Miras: sequence layers as associative memories that learn while they read (arXiv 2504.13173).

sequence layer = memory architecture x attentional bias x retention gate x memory learning algorithm
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from miras import algorithm as algorithm
    from miras import bias as bias
    from miras import memory as memory
    from miras import retention as retention
    from miras import variants as variants
    from miras.attention import Attention as Attention
    from miras.engines import explain as explain
    from miras.engines import plan as plan
    from miras.engines import run as run
    from miras.inputs import Inputs as Inputs
    from miras.layer import LayerState as LayerState
    from miras.layer import MirasLayer as MirasLayer
    from miras.mixer import Mixer as Mixer
    from miras.rule import Rule as Rule
    from miras.rule import State as State
    from miras.storage import load_state as load_state
    from miras.storage import save_state as save_state

__version__ = "0.1.0"

_MODULES = ("algorithm", "bias", "memory", "retention", "variants", "hf")
_NAMES = {
    "Attention": "attention",
    "Inputs": "inputs",
    "LayerState": "layer",
    "MirasLayer": "layer",
    "Mixer": "mixer",
    "Rule": "rule",
    "State": "rule",
    "explain": "engines",
    "load_state": "storage",
    "plan": "engines",
    "run": "engines",
    "save_state": "storage",
}


def __getattr__(name: str) -> Any:
    # Imported when first used: `miras --help` need not wait for torch, and the command line can set what torch's thread
    # library reads while it is loaded.
    if name in _MODULES:
        return import_module(f"miras.{name}")
    if name in _NAMES:
        return getattr(import_module(f"miras.{_NAMES[name]}"), name)
    raise AttributeError(f"module 'miras' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES, *_NAMES])
