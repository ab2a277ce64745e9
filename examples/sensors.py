"""An instrument that shows wrong numbers now and then: a layer that learned from clean readings reads one at a time.

Each instrument shows y = W x of a state x that is known, by a W of its own. A network around one `MirasLayer` learns,
from clean readings of many instruments, to foretell what a new one will show. Then it follows instruments that it has
not seen, reading by reading, with a state of constant size that on the way goes to a file and comes back, and some
readings are far off. Huber's loss bounds what one of them does to the memory; least squares do not.

    python examples/sensors.py --corrupted 0.2
"""

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

import miras

STATES, READINGS = 4, 2
# A memory meets readings as large as they are: the preset's values are normed in each head.
YAAD = replace(miras.variants.yaad(), inputs=miras.Inputs())
RULES = {"Huber": YAAD, "l_2": replace(YAAD, bias=miras.bias.L2())}


class Forecaster(nn.Module):
    """The last state, what was read of it, and the new state -> what will be read."""

    def __init__(self, rule: miras.Rule, dim: int = 32) -> None:
        super().__init__()
        self.into = nn.Linear(2 * STATES + READINGS, dim)
        self.layer = miras.MirasLayer(dim, heads=2, rule=rule, conv=0)
        self.out = nn.Linear(dim, READINGS)

    def forward(self, x: Tensor, state: miras.LayerState | None = None) -> tuple[Tensor, miras.LayerState]:
        y, after = self.layer(self.into(x), state)
        return self.out(y), after


def instruments(count: int, tokens: int, corrupted: float) -> tuple[Tensor, Tensor]:
    """What the network is given, and what is right, each [count, tokens, .]."""
    x, w = torch.randn(count, tokens, STATES), torch.randn(count, READINGS, STATES) / STATES**0.5
    y = x @ w.mT
    bad = torch.rand(count, tokens, 1) < corrupted
    seen = torch.where(bad, y + torch.distributions.StudentT(1.5).sample(y.shape), y)
    last = torch.cat([x, seen], -1).roll(1, 1)
    last[:, 0] = 0
    return torch.cat([last, x], -1), y


@torch.no_grad()
def follow(model: Forecaster, given: Tensor) -> Tensor:
    """What is foretold for each reading, one at a time."""
    state, found = None, []
    for t in range(given.shape[1]):
        y, state = model(given[:, t : t + 1], state)
        found.append(y)
        if t == given.shape[1] // 2:
            with tempfile.TemporaryDirectory() as folder:  # the stream may go on on another machine
                miras.save_state(Path(folder) / "state", model.layer, state)
                state = miras.load_state(Path(folder) / "state", model.layer)
    return torch.cat(found, 1)


def main(steps: int, tokens: int, corrupted: float) -> None:
    print(f"error on the second half of {tokens} readings, 1 is knowing nothing; {corrupted:.0%} of them corrupted")
    for name, rule in RULES.items():
        torch.manual_seed(0)
        model = Forecaster(rule)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, steps)
        for _ in range(steps):
            given, right = instruments(32, 64, corrupted=0)
            loss = (model(given)[0] - right).square().mean()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        errors = []
        for rate in (0, corrupted):
            torch.manual_seed(1)
            given, right = instruments(16, tokens, rate)
            late = slice(tokens // 2, tokens)
            wrong = (follow(model, given) - right)[:, late]
            errors.append(wrong.square().sum() / right[:, late].square().sum())
        print(f"  {name:<6} clean {errors[0]:.3f}   corrupted {errors[1]:.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--corrupted", type=float, default=0.2)
    args = parser.parse_args()
    main(args.steps, args.tokens, args.corrupted)
