"""A memory on a noisy stream, no training of an outer model: who keeps the mapping when some values are corrupted?

Key-value pairs of a fixed linear map arrive one after the other; some values are replaced by heavy-tailed noise.
Memories that differ only in their bias read them, and each is asked for the values of keys it has not seen. The stream
stops halfway, its state goes to a file and comes back.

    python examples/stream.py --corrupted 0.2
"""

import argparse
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F

import miras

BIASES = {
    "l_2": miras.bias.L2(),
    "Huber": miras.bias.Huber(form="norm"),
    "l_1": miras.bias.L1(),
    "l_3, clipped": miras.bias.Lp(p=3.0),
}


def main(tokens: int, size: int, corrupted: float) -> None:
    torch.manual_seed(0)
    truth = torch.randn(size, size) / size**0.5
    k = F.normalize(torch.randn(1, tokens, 1, size), dim=-1)
    v = k @ truth.T
    bad = torch.rand(1, tokens, 1, 1) < corrupted
    noise = torch.distributions.StudentT(1.5).sample(v.shape)
    seen = torch.where(bad, noise, v)
    new = F.normalize(torch.randn(1, 256, 1, size), dim=-1)
    print(f"{tokens} pairs, {corrupted:.0%} of the values corrupted; error on new keys, 1 is knowing nothing")
    for name, bias in BIASES.items():
        rule = miras.Rule(miras.memory.Linear(), bias, miras.retention.NoRetention(), miras.algorithm.GradientDescent())
        gates = {g.name: torch.full((1, tokens, 1, 1), {"eta": 0.1, "delta": 0.3}[g.name]) for g in rule.gates}
        state, half = None, tokens // 2
        for here in (slice(0, half), slice(half, tokens)):
            part = {n: g[:, here] for n, g in gates.items()}
            _, state = miras.run(rule, k[:, here], k[:, here], seen[:, here], part, state)
            with tempfile.TemporaryDirectory() as folder:  # the stream may go on on another machine
                miras.save_state(Path(folder) / "state", rule, state)
                state = miras.load_state(Path(folder) / "state", rule)
        read = new @ state.dual["w"].mT
        error = (read - new @ truth.T).norm() / (new @ truth.T).norm()
        print(f"  {name:<14} {error.item():.2f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--size", type=int, default=16)
    parser.add_argument("--corrupted", type=float, default=0.2)
    args = parser.parse_args()
    main(args.tokens, args.size, args.corrupted)
