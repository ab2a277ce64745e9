"""What a training run is: one flat record, the same in Python, in a file and on the command line.

What is given on the command line wins over a file, the file over the size preset.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from miras.errors import UsageError, near
from miras.mixer import Mixer, mixer_from_config
from miras.train import processes
from miras.variants import pattern


class _Loader(yaml.SafeLoader):
    """With the numbers of YAML 1.2: to 1.1, which PyYAML reads, 3e-4 is a word."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)

AUTO: Any = None
"""A field left to the size preset or to the other fields."""


@dataclass(frozen=True)
class Size:
    """A shape of model and how it is trained: arXiv 2504.13173, appendix C; 1.3b: arXiv 2505.23735."""

    dim: int
    layers: int
    heads: int
    learning_rate: float
    context: int
    batch: int
    accumulation: int
    steps: int
    warmup: int
    tokenizer: str
    bf16: bool


SIZES = {
    "tiny": Size(128, 4, 4, 2e-3, 256, 2048, 1, 300, 30, "bytes", False),
    "120m": Size(768, 12, 16, 3e-3, 4096, 524_288, 16, 28_610, 954, "bpe:32000", True),
    "340m": Size(1024, 24, 16, 1.5e-3, 4096, 524_288, 16, 28_610, 954, "bpe:32000", True),
    "760m": Size(1536, 24, 16, 1.25e-3, 4096, 524_288, 32, 57_220, 1_907, "bpe:32000", True),
    "1.3b": Size(2048, 18, 8, 7e-4, 4096, 524_288, 64, 190_735, 1_907, "bpe:32000", True),
}


@dataclass(frozen=True)
class TrainConfig:
    """A training run. Fields that are left out are filled in by the size, so a made configuration is complete.

    Args:
        model: a variant ("yaad"), a pattern of variants repeated over the layers ("yaad,sliding_window"), or, where
            `mixer` is given, what to call it.
        mixer: a rule written out, as `Mixer.to_config` gives it, or a list of them, in place of the variant.
        size: the preset that the fields left out come from: "tiny", "120m", "340m", "760m" or "1.3b".
        data: see `miras.data.load_corpus`.
        tokenizer: see `miras.data.load_tokenizer`.
        out: the run folder; left out: runs/ and the model's name.
        cache: folder of the tokenised data, which runs may share; left out: `data` in the run folder.
        context: tokens of one sequence.
        batch: tokens per optimizer step, a multiple of context times accumulation.
        accumulation: parts that a step's sequences are taken in, one after the other, to save memory.
        steps: optimizer steps.
        learning_rate: the highest; it falls to a tenth of that along a cosine.
        warmup: steps over which the learning rate rises; left out: the preset's, at most a tenth of all.
        weight_decay: of the 2-D weights of linear maps, nothing else.
        clip: largest norm of the gradient.
        seed: of initialisation and order of data.
        bf16: mixed precision.
        compile: compile each layer, some minutes before the first step, for faster ones.
        eval_every: steps between validations; left out: a quarter of all, at most 1000.
        eval_windows: windows of the last validation, evenly spaced; those on the way look at a quarter as many.
        save_every: steps between checkpoints; left out: a quarter of all, at most 1000.
        keep: complete checkpoints to keep.
        dim: size of the stream.
        layers: number of layers.
        heads: heads of each layer.
        hidden: hidden size of each SwiGLU; None: 8/3 of dim.
        gates: "head" or "channel", see `MirasLayer`.
        conv: tokens that the short convolution before a memory sees; 0: none.
        rope: rotate q and k by their position before a memory.
        chunk: tokens per chunk of the variants that have chunks; None: their own.
        threads: threads of PyTorch; None: as it chooses.
        tensorboard: also write the metrics for TensorBoard.

    Raises:
        UsageError: a value of the wrong kind or out of range, an unknown size, variant or part of a rule.
    """

    model: str = "yaad"
    mixer: dict[str, Any] | list[Any] | None = None
    size: str = "tiny"
    data: str = "stdlib"
    tokenizer: str = AUTO
    out: str = AUTO
    cache: str = AUTO
    context: int = AUTO
    batch: int = AUTO
    accumulation: int = AUTO
    steps: int = AUTO
    learning_rate: float = AUTO
    warmup: int = AUTO
    weight_decay: float = 0.1
    clip: float = 1.0
    seed: int = 0
    bf16: bool = AUTO
    compile: bool = False
    eval_every: int = AUTO
    eval_windows: int = 1024
    save_every: int = AUTO
    keep: int = 2
    dim: int = AUTO
    layers: int = AUTO
    heads: int = AUTO
    hidden: int | None = None
    gates: str = "head"
    conv: int = 4
    rope: bool = False
    chunk: int | None = None
    threads: int | None = None
    tensorboard: bool = False

    def __post_init__(self) -> None:
        if self.size not in SIZES:
            raise UsageError(f"--size {self.size}: expected one of {', '.join(SIZES)}.")
        self._fill(dataclasses.asdict(SIZES[self.size]) | {"warmup": None})
        self._check_kinds()
        _check_ranges(self)
        every = min(1000, max(1, self.steps // 4))
        out = "runs/" + re.sub(r"[^\w.-]+", "-", self.model)
        self._fill({"warmup": min(SIZES[self.size].warmup, self.steps // 10), "eval_every": every, "save_every": every})
        self._fill({"out": out})
        self._fill({"cache": str(Path(self.out) / "data")})
        _ = self.mixers  # what is wrong with a name or a rule shows now

    def _fill(self, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)

    def _check_kinds(self) -> None:
        for name, kind in get_type_hints(TrainConfig).items():
            value = getattr(self, name)
            if kind is float and isinstance(value, int) and not isinstance(value, bool):
                object.__setattr__(self, name, value := float(value))
            right = kind if isinstance(kind, type) else tuple(getattr(k, "__origin__", k) for k in kind.__args__)
            if value is not None and (not isinstance(value, right) or (isinstance(value, bool) and kind is not bool)):
                expected = getattr(kind, "__name__", str(kind))
                raise UsageError(f"{flag(name)}: expected {_KINDS.get(expected, expected)}, got {value!r}.")

    @property
    def mixers(self) -> tuple[Mixer, ...]:
        """One mixer per layer."""
        if self.mixer is None:
            return pattern(self.model, self.layers, self.chunk)
        if self.chunk is not None:
            raise UsageError(
                f"--chunk {self.chunk}: a rule written out under mixer holds its own chunk; write it there."
            )
        given = [self.mixer] if isinstance(self.mixer, dict) else self.mixer
        if not given or not all(isinstance(part, dict) for part in given):
            raise UsageError(
                f"mixer: expected a rule as Mixer.to_config gives it, or a list of them, got {self.mixer!r}."
            )
        parts = [mixer_from_config(part) for part in given]
        return tuple(parts[i % len(parts)] for i in range(self.layers))

    @property
    def mixer_of_all(self) -> Mixer:
        """The mixer of every layer.

        Raises:
            UsageError: layers have different ones.
        """
        first, *others = dict.fromkeys(self.mixers)
        if others:
            raise UsageError(f"{self.model}: expected one rule for all layers, got {1 + len(others)}.")
        return first

    @property
    def sequences(self) -> int:
        """Sequences that each process takes at once."""
        return self.batch // self.context // self.accumulation // processes.count()

    def to_yaml(self) -> str:
        """The complete configuration as a file that `load_config` reads."""
        return yaml.safe_dump(dataclasses.asdict(self), sort_keys=False, allow_unicode=True)


_KINDS = {"int": "a whole number", "float": "a number", "str": "text", "bool": "true or false"}
_POSITIVE = (
    *("context", "batch", "accumulation", "steps", "learning_rate", "clip", "eval_every", "eval_windows", "save_every"),
    *("keep", "dim", "layers", "heads", "hidden", "chunk", "threads"),
)


def flag(field: str) -> str:
    """A field as one writes it on the command line."""
    return "MODEL" if field == "model" else "--" + field.replace("_", "-")


def names_file(model: str) -> bool:
    """Whether a model is given by a configuration file, and not by the name of a variant."""
    return model.endswith((".yaml", ".yml", ".json"))


def load_config(model: str | None, flags: Mapping[str, Any]) -> TrainConfig:
    """A configuration from what the command line says.

    Args:
        model: a variant, a pattern of variants or the path of a .yaml, .yml or .json file with fields of `TrainConfig`.
        flags: fields that were given besides, which win over the file.

    Raises:
        UsageError: no such file, not a mapping, or an unknown field, said with the near ones.
    """
    return TrainConfig(**{**given_by(model), **flags})


def given_by(model: str | None) -> dict[str, Any]:
    """The fields that a model's name, or the file in its place, gives."""
    if model is None:
        return {}
    return read_config(Path(model)) if names_file(model) else {"model": model}


def read_config(path: Path) -> dict[str, Any]:
    """The fields in a configuration file; a rule in it is called by the file's name unless `model` says another.

    Raises:
        UsageError: as `load_config`.
    """
    if not path.is_file():
        raise UsageError(f"{path}: there is no such configuration file.")
    try:
        fields = json.loads(path.read_text()) if path.suffix == ".json" else yaml.load(path.read_text(), _Loader)
    except (ValueError, yaml.YAMLError) as error:
        reason, kind = " ".join(str(error).split()), path.suffix[1:].upper()
        raise UsageError(f"{path}: expected {kind}, and it cannot be read as that ({reason}).") from error
    if not isinstance(fields, dict):
        raise UsageError(f"{path}: expected fields such as 'model: yaad', got {type(fields).__name__}.")
    names = [field.name for field in dataclasses.fields(TrainConfig)]
    for key in fields:
        if key not in names:
            raise UsageError(f"{path}: there is no field {key!r}." + near(str(key), names))
    if fields.get("mixer") is not None and "model" not in fields:
        fields["model"] = path.stem
    return fields


def _check_ranges(config: TrainConfig) -> None:
    for name in _POSITIVE:
        value = getattr(config, name)
        if value is not None and not value > 0:  # NaN is no number above 0 either
            raise UsageError(f"{flag(name)} {value}: expected more than 0.")
    for name in ("warmup", "weight_decay", "seed", "conv"):
        if (getattr(config, name) or 0) < 0:
            raise UsageError(f"{flag(name)} {getattr(config, name)}: expected 0 or more.")
    if config.warmup is not None and config.warmup >= config.steps:
        raise UsageError(f"--warmup {config.warmup}: expected fewer than the {config.steps} steps of the run.")
    if config.gates not in ("head", "channel"):
        raise UsageError(f"--gates {config.gates}: expected head or channel." + near(config.gates, ["head", "channel"]))
    if config.dim % config.heads:
        raise UsageError(f"--dim {config.dim}: expected a multiple of the {config.heads} heads.")
    part = config.context * config.accumulation * processes.count()
    if config.batch % part:
        shared = f" times {processes.count()} processes" if processes.count() > 1 else ""
        raise UsageError(
            f"--batch {config.batch}: expected a multiple of {part} tokens, --context {config.context} times "
            f"--accumulation {config.accumulation}{shared}. "
            f"Write for example --batch {max(1, config.batch // part) * part}."
        )
