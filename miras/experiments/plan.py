"""What an experiment is: models, what is done with all of them alike, and what the paper says about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from miras.evaluate.scratch import ScratchConfig
from miras.evaluate.tasks import MQAR, Haystack, LanguageTask, NoisyRecall, Regression, SyntheticTask
from miras.evaluate.tasks.base import RATES
from miras.evaluate.tasks.haystack import levels
from miras.mixer import Mixer
from miras.registry import to_config
from miras.train.config import TrainConfig
from miras.variants import variant


@dataclass(frozen=True)
class Scale:
    """How large, how long and how often.

    Attributes:
        about: in words.
        training: fields of `TrainConfig` that all language models share.
        contexts: training lengths of the experiment on context.
        lengths: of needle tests, in tokens.
        far: how far the loss is followed, in tokens.
        haystack: the task of needles that are learned, how it is learned, and learning rates.
        recall: the same for multi-query recall.
        noisy: the same for recall from corrupted pairs, trained on clean ones.
        readings: the same for regression from corrupted readings, trained on clean ones.
        rates: of language models. Learning rates are tried with the first seed, from the lowest on as long as each is
            better than the last.
        seeds: how many.
    """

    about: str
    training: Mapping[str, Any]
    contexts: tuple[int, ...]
    lengths: tuple[int, ...]
    far: int
    haystack: tuple[Haystack, ScratchConfig, tuple[float, ...]]
    recall: tuple[MQAR, ScratchConfig, tuple[float, ...]]
    noisy: tuple[NoisyRecall, ScratchConfig, tuple[float, ...]]
    readings: tuple[Regression, ScratchConfig, tuple[float, ...]]
    rates: tuple[float, ...]
    seeds: int = 3

    @property
    def rate(self) -> float:
        """The one learning rate of an experiment that tries none: in the middle, the lower of two."""
        return sorted(self.rates)[(len(self.rates) - 1) // 2]


LINEAR = ("retnet", "mamba2", "deltanet", "gated_deltanet")
"""The matrix memories that the paper compares its models with."""

PASSKEY = ("passkey",)
"""The needle that a small model learns to find in minutes."""

CLEAN = (("value", 0.0),)
CORRUPTED = tuple((noise, rate) for noise in ("heavy", "inside", "value") for rate in RATES)


SCALES: Mapping[str, Scale] = {
    "laptop": Scale(
        "1 M parameters, half a million tokens, two cores, minutes a run",
        {"size": "tiny", "steps": 250, "context": 512, "eval_windows": 256},
        (128, 512, 2048),
        (512, 1024, 2048),
        16_384,
        (
            Haystack(train=levels(PASSKEY, 512), test=levels(PASSKEY, 512, 1024, 2048, 4096, 8192)),
            ScratchConfig(steps=4000),
            (2.5e-3, 5e-3),
        ),
        (
            MQAR(512, train=((32, 4), (64, 8)), test=((32, 4), (64, 8), (64, 16), (128, 32), (256, 8), (512, 8))),
            ScratchConfig(dim=128, heads=4, steps=1200, batch=2048),
            (2e-3, 5e-3),
        ),
        (
            NoisyRecall(32, pairs=4, repeats=3, train=CLEAN, test=CORRUPTED, examples=1024),
            ScratchConfig(heads=4, steps=1200, batch=2048),
            (5e-3,),
        ),
        (Regression(), ScratchConfig(layers=1, steps=600), (3e-3,)),
        (1e-3, 2e-3, 4e-3, 8e-3),
    ),
    "gpu": Scale(
        "50 M parameters, 650 million tokens, one GPU, an hour or two a run",
        {
            **{"size": "120m", "dim": 512, "layers": 10, "heads": 8, "context": 2048, "batch": 65_536},
            **{"accumulation": 2, "steps": 10_000, "tokenizer": "bpe:16000", "warmup": 300},
        },
        (512, 2048, 8192),
        (1024, 2048, 4096, 8192),
        65_536,
        (Haystack(), ScratchConfig(dim=128, steps=20_000, batch=32_768), (1e-3, 3e-3)),
        (MQAR(), ScratchConfig(dim=256, heads=8, steps=20_000, batch=32_768), (1e-3, 3e-3)),
        (
            NoisyRecall(train=CLEAN, test=CORRUPTED),
            ScratchConfig(dim=128, steps=20_000, batch=32_768),
            (1e-3, 3e-3),
        ),
        (Regression(32, 16, 512), ScratchConfig(dim=128, steps=20_000, batch=32_768), (1e-3, 3e-3)),
        (5e-4, 1e-3, 2e-3),
    ),
    "paper": Scale(
        "340 M parameters, 15 billion tokens of FineWeb-Edu, a machine with eight GPUs",
        {"size": "340m", "data": "HuggingFaceFW/fineweb-edu"},
        (2048, 4096, 8192, 16_384, 32_768),
        (1024, 2048, 4096, 8192, 16_384),
        131_072,
        (Haystack(), ScratchConfig(dim=256, steps=100_000, batch=65_536), (1e-3, 3e-3)),
        (MQAR(), ScratchConfig(dim=256, heads=8, steps=100_000, batch=65_536), (1e-3, 3e-3)),
        (
            NoisyRecall(train=CLEAN, test=CORRUPTED),
            ScratchConfig(dim=256, steps=100_000, batch=65_536),
            (1e-3, 3e-3),
        ),
        (Regression(32, 16, 512), ScratchConfig(dim=256, steps=100_000, batch=65_536), (1e-3, 3e-3)),
        (7.5e-4, 1.5e-3, 3e-3),
        seeds=1,
    ),
}


@dataclass(frozen=True)
class Model:
    """A model of an experiment.

    Attributes:
        mixers: repeated over the layers.
        fields: of `TrainConfig` (or, on a synthetic task, of `ScratchConfig`) in which it differs from the others.
    """

    mixers: tuple[Mixer, ...]
    fields: Mapping[str, Any] = field(default_factory=dict)

    def config(self, name: str, **shared: Any) -> TrainConfig:
        """The model as a training run, without what only a synthetic task knows."""
        return TrainConfig(**{**shared, "model": name, "mixer": [to_config(m) for m in self.mixers], **self.fields})


def model(*mixers: str | Mixer, **fields: Any) -> Model:
    """A model of variants, by name, and rules."""
    return Model(tuple(variant(m) if isinstance(m, str) else m for m in mixers), fields)


def models(*names: str) -> dict[str, Model]:
    """The variants of these names."""
    return {name: model(name) for name in names}


Sweeps = Mapping[str, Mapping[str, Mapping[float, str]]]
"""{what number models differ in: {curve: {number: model}}}."""


@dataclass(frozen=True)
class TextExperiment:
    """Language models of equal size, trained alike, each at the best of some learning rates, then asked tasks.

    Attributes:
        title: what it is about.
        claim: what the paper says.
        models: by name.
        training: fields of `TrainConfig` that they share.
        rates: learning rates to choose from; see `Scale`.
        seeds: how many.
        baseline: the model that the others are compared with.
        tasks: asked of every trained model.
        sweeps: see `Sweeps`; the loss is drawn against each number.
    """

    title: str
    claim: str
    models: Mapping[str, Model]
    training: Mapping[str, Any]
    rates: tuple[float, ...]
    seeds: int
    baseline: str
    tasks: Mapping[str, LanguageTask] = field(default_factory=dict)
    sweeps: Sweeps = field(default_factory=dict)


@dataclass(frozen=True)
class TaskExperiment:
    """Models of equal size that learn a synthetic task from nothing, each at the best of some learning rates.

    Attributes:
        title: what it is about.
        claim: what the paper, or the source of the task, says.
        models: by name.
        task: name of the task.
        asked: the task.
        training: how it is learned.
        rates: learning rates to choose from; see `Scale`.
        seeds: how many.
    """

    title: str
    claim: str
    models: Mapping[str, Model]
    task: str
    asked: SyntheticTask
    training: ScratchConfig
    rates: tuple[float, ...]
    seeds: int


Experiment = TextExperiment | TaskExperiment
