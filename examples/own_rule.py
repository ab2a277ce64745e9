"""The bias and the retention gate of own_axes.py, in a model that trains on text and then writes some.

python examples/own_rule.py
"""

import argparse
import inspect

import torch
from own_axes import Bounded, Cauchy

import miras
from miras.hf import MirasConfig, MirasForCausalLM


def main(steps: int) -> None:
    gd = miras.algorithm.GradientDescent(rate="input")
    rule = miras.Rule(miras.memory.MLP(expansion=2), Cauchy(), Bounded(), gd, chunk=16)
    print(rule.formula_of_update, "| engine:", miras.plan(rule).name)
    model = MirasForCausalLM(MirasConfig(mixer=rule, hidden_size=64, num_hidden_layers=2, num_attention_heads=2))
    text = torch.tensor(list(inspect.getsource(argparse).encode()))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(steps):
        start = torch.randint(len(text) - 128, (8, 1))
        batch = text[start + torch.arange(128)]
        loss = model(batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0 or step == steps - 1:
            print(f"step {step:3d}  loss {loss.item():.2f}")
    prompt = torch.tensor([list(b"def add_argument(")])
    written = model.eval().generate(prompt, max_new_tokens=60, do_sample=True, pad_token_id=256)
    print(bytes(i for i in written[0].tolist() if i < 256).decode(errors="replace"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    main(parser.parse_args().steps)
