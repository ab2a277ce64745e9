"""Models that learn a synthetic task from nothing, in seconds to minutes on a CPU."""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import set_seed

from miras.errors import Diverged, UsageError
from miras.evaluate.tasks import Examples, Readings, Regression, SyntheticTask, TokenTask
from miras.evaluate.tasks.base import IGNORE, Report, Row
from miras.hf import MirasConfig, MirasForCausalLM
from miras.layer import MirasLayer, layers_of
from miras.train.config import TrainConfig, load_config
from miras.train.optimizer import make_optimizer
from miras.train.run import model_config


class Regressor(nn.Module):
    """Vectors in, vectors out: layers between two linear maps, each added to the stream.

    There is no norm before a layer and no convolution in it: a token has all that belongs together, and what is extreme
    in size reaches the memory as it is.

    Args:
        config: the stack; its vocabulary and SwiGLU are not looked at.
        inputs: size of what is given at each token.
        outputs: size of what is asked.
    """

    def __init__(self, config: MirasConfig, inputs: int, outputs: int) -> None:
        super().__init__()
        self.config, dim, heads = config, config.hidden_size, config.num_attention_heads
        how: Any = {"gates": config.gates, "rope": config.rope, "context": config.context_length}
        self.into = nn.Linear(inputs, dim, bias=False)
        self.layers = nn.ModuleList(MirasLayer(dim, heads, mixer, conv=0, **how) for mixer in config.mixers())
        self.out = nn.Linear(dim, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, inputs] -> [B, T, outputs]."""
        x = self.into(x.to(self.into.weight))
        for layer in self.layers:
            x = x + layer(x)[0]
        return self.out(x)


Student = MirasForCausalLM | Regressor


@dataclass(frozen=True)
class ScratchConfig:
    """A model that learns a synthetic task, and how.

    Args:
        model: a variant, a pattern of variants, or a .yaml / .json file, of which mixer, hidden, gates and rope count.
        dim: size of the stream.
        layers: number of layers.
        heads: heads of each layer.
        chunk: tokens per chunk; 0: the variant's own.
        steps: optimizer steps, each with fresh data. Recall sets in suddenly, and later the more tokens there are to
            tell apart: where the loss stands still, take more.
        batch: tokens of a step, about.
        learning_rate: the highest; it rises over a tenth of the steps and falls to a tenth of it along a cosine.
        weight_decay: of the weights of linear maps.
        seed: of initialisation and data.

    Raises:
        UsageError: a number out of range, an unknown variant, or a rule that is none.
    """

    model: str = "yaad"
    dim: int = 64
    layers: int = 2
    heads: int = 2
    chunk: int = 0
    steps: int = 1000
    batch: int = 4096
    learning_rate: float = 5e-3
    weight_decay: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 10:
            raise UsageError(f"steps={self.steps}: expected 10 at least.")
        _ = self.base  # what is wrong with anything else shows now

    @property
    def base(self) -> TrainConfig:
        """The same model as `miras train` knows it, which checks it and reads files."""
        shape = {name: getattr(self, name) for name in ("dim", "layers", "heads", "learning_rate", "weight_decay")}
        return load_config(self.model, {**shape, **({"chunk": self.chunk} if self.chunk else {})})

    def build(self, task: SyntheticTask) -> Student:
        """A fresh model for a task, on the GPU if there is one."""
        longest = max(map(task.length, task.train))
        base = replace(self.base, context=longest, batch=longest)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        if isinstance(task, Regression):
            return Regressor(model_config(base), *task.sizes).to(device)
        assert isinstance(task, TokenTask)
        return MirasForCausalLM(model_config(base, vocab_size=task.tokens)).to(device)  # type: ignore[arg-type]


def learn(task: SyntheticTask, config: ScratchConfig, report: Report) -> tuple[Student, list[Row]]:
    """Train a model on a task and score it.

    Args:
        task: what to learn.
        config: the model and its training.
        report: is told the loss of every step.

    Returns:
        The model, and a line per test level with its score.

    Raises:
        Diverged: the loss is no longer finite.
    """
    set_seed(config.seed)
    model = config.build(task).train()
    data = task.build(config.seed, config.batch)
    # Its warm-up begins at a learning rate of 0, where a step of one would do nothing.
    warmup = math.ceil(config.steps / 10)
    optimizer, schedule = make_optimizer(model, config.learning_rate, config.weight_decay, warmup, config.steps)
    for step in range(config.steps):
        loss = _loss(model, next(data.train))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if not math.isfinite(value := loss.item()):
            raise Diverged(
                f"{config.model} was lost at step {step + 1}: the loss is {value}. Try --set learning_rate="
                f"{config.learning_rate / 3:.0e}."
            )
        report(step + 1, config.steps, f"loss {value:.3f}")
    set_seed(config.seed)  # of the directions of noise, which are then the same for every model
    scores = {level: _score(model.eval(), task, examples, config.batch) for level, examples in data.test.items()}
    (measure,) = task.measures
    return model, [{**task.named(level), measure: score} for level, score in scores.items()]


def _answers(model: MirasForCausalLM, examples: Examples) -> tuple[Tensor, Tensor]:
    """Logits [asked, V] and targets [asked]: an output layer of thousands of tokens is run only where one is asked."""
    inputs, targets = examples.inputs.to(model.device), examples.targets.to(model.device)
    x = model.get_input_embeddings()(inputs)
    noise = None if examples.noise is None else examples.noise.to(x)
    with ExitStack() as hooks:
        if noise is not None and examples.inside:
            for layer in layers_of(model):
                hooks.enter_context(_noisy_values(layer, noise))
        elif noise is not None:
            x = _noisy(x, noise)
        hidden = model.model(inputs_embeds=x, use_cache=False).last_hidden_state
    asked = targets != IGNORE
    return model.lm_head(hidden[asked]), targets[asked]


def _noisy(x: Tensor, noise: Tensor) -> Tensor:
    """x [N, T, D] with noise of a random direction, its size [N, T] in units of x's root mean square."""
    size = x.detach().square().mean().sqrt() * noise
    return x + size[..., None] * torch.randn_like(x)


def _noisy_values(layer: MirasLayer, noise: Tensor) -> RemovableHandle:
    """Add noise to the values of a layer, which are the last of what its convolution makes (attention has none)."""
    width = layer.values * layer.heads * layer.head_dim

    def shake(module: nn.Module, given: Any, made: Any) -> Any:
        del module, given
        x, *rest = (made,) if layer.conv is None else made
        before, values = x.split([x.shape[-1] - width, width], -1)
        x = torch.cat([before, _noisy(values, noise)], -1)
        return x if layer.conv is None else (x, *rest)

    return (layer.qkv if layer.conv is None else layer.conv).register_forward_hook(shake)


def _loss(model: Student, examples: Any) -> Tensor:
    if isinstance(model, Regressor):
        predicted = model(examples.inputs)
        asked = ~examples.targets.isnan()
        return F.mse_loss(predicted[asked], examples.targets[asked].to(predicted))
    return F.cross_entropy(*_answers(model, examples))


@torch.no_grad()
def _score(model: Student, task: SyntheticTask, examples: Examples | Readings, batch: int) -> float:
    """The task's score, in batches of about `batch` tokens."""
    count, length = examples.inputs.shape[:2]
    rows = max(1, batch // length)
    parts = [_predicted(model, examples.part(start, start + rows)) for start in range(0, count, rows)]
    return task.score(torch.cat(parts), examples.targets)


def _predicted(model: Student, examples: Any) -> Tensor:
    """Shaped as the targets, on the CPU."""
    if isinstance(model, Regressor):
        return model(examples.inputs).cpu()
    predicted = examples.targets.clone()
    predicted[predicted != IGNORE] = _answers(model, examples)[0].argmax(-1).cpu()
    return predicted
