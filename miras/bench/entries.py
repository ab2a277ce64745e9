"""What is measured: our layers and models, and peers beside them. A peer's package is imported when it is built."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miras.bench.flops import layer_bytes, layer_flops, model_flops
from miras.bench.sizes import Sizes
from miras.errors import MirasError
from miras.layer import MirasLayer
from miras.mixer import Mixer
from miras.model import Miras
from miras.rule import Rule
from miras.train.config import load_config, names_file
from miras.variants import variant

PEER_CHUNK = 64
"""Where a peer needs a chunk and none is given; its own default."""


class Missing(MirasError):
    """A peer that cannot be built here, with what to install."""


@dataclass(frozen=True)
class Peer:
    """Somebody else's layer, [B, T, D] -> [B, T, D] with projections of its own.

    Attributes:
        about: what it is, in a line.
        package: what pip calls it.
        chunked: whether `Sizes.chunk` is its chunk too.
        build: sizes -> module; raises ImportError where the package is missing or of another version.
    """

    about: str
    package: str
    chunked: bool
    build: Callable[[Sizes], nn.Module]


class _Softmax(nn.Module):
    """Linear maps around causal `scaled_dot_product_attention`, and nothing else."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).transpose(1, 3).unbind(2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


def _sdpa(sizes: Sizes) -> nn.Module:
    return _Softmax(sizes.dim, sizes.heads)


def _titans(sizes: Sizes) -> nn.Module:
    from titans_pytorch import NeuralMemory

    # As its README uses it; the memory is its default, a 2-layer MLP of expansion 4 with residual and norm.
    chunk = sizes.chunk or PEER_CHUNK
    return NeuralMemory(dim=sizes.dim, dim_head=sizes.head_dim, heads=sizes.heads, chunk_size=chunk)


def _transformers(sizes: Sizes) -> nn.Module:
    from transformers.models.qwen3_next import modeling_qwen3_next
    from transformers.models.qwen3_next.configuration_qwen3_next import Qwen3NextConfig
    from transformers.utils import logging

    # Where fla is installed transformers takes its kernels, without asking whether there is a GPU.
    rule = modeling_qwen3_next.torch_chunk_gated_delta_rule
    modeling_qwen3_next.torch_chunk_gated_delta_rule = inspect.unwrap(rule)

    logging.set_verbosity_error()  # it says at length that there are no kernels
    config = Qwen3NextConfig(
        hidden_size=sizes.dim,
        num_hidden_layers=1,
        layer_types=["linear_attention"],
        linear_num_key_heads=sizes.heads,
        linear_num_value_heads=sizes.heads,
        linear_key_head_dim=sizes.head_dim,
        linear_value_head_dim=sizes.head_dim,
    )
    return modeling_qwen3_next.Qwen3NextGatedDeltaNet(config, 0)


PEERS = {
    "titans-pytorch": Peer("NeuralMemory, gradients as its README has them", "titans-pytorch", True, _titans),
    "transformers": Peer("Qwen3-Next's gated delta rule in PyTorch", "transformers", False, _transformers),
    "sdpa": Peer("scaled_dot_product_attention between linear maps", "torch", False, _sdpa),
}


def mixer_of(name: str, chunk: int | None = None) -> Mixer:
    """That of a variant, or of a file with a rule as `miras train` takes it, which has its own chunk.

    Raises:
        UsageError: no such variant or file, or a file with several rules.
    """
    return load_config(name, {}).mixer_of_all if names_file(name) else variant(name, chunk)


def has_chunk(name: str) -> bool:
    """Whether the chunk that is asked for matters to an entry."""
    if name in PEERS:
        return PEERS[name].chunked
    return mixer_of(name, 2) != mixer_of(name, 3)


def build(name: str, sizes: Sizes) -> nn.Module:
    """A layer or a model, the same one each time.

    Raises:
        Missing: a peer that is not installed, or at model level, where there are none.
        UsageError: sizes that the rule refuses.
    """
    torch.manual_seed(0)
    if name in PEERS:
        return _peer(name, sizes).to(sizes.device)
    gates: Any = sizes.gates
    with torch.device(sizes.device):  # large models take long to draw on a CPU
        if sizes.level == "layer":
            layer = MirasLayer(sizes.dim, sizes.heads, mixer_of(name, sizes.chunk), gates=gates)
            if sizes.compile:
                layer.compile(dynamic=False)
            return layer
        mixers = [mixer_of(name, sizes.chunk)] * sizes.layers
        model = Miras(sizes.vocab, sizes.dim, sizes.heads, _hidden(sizes), mixers, gates=gates)
    if sizes.compile:
        model.backbone.compile_layers()
    return model


def _peer(name: str, sizes: Sizes) -> nn.Module:
    peer = PEERS[name]
    if sizes.level == "model":
        raise Missing(f"{name}: a layer, not a model")
    try:
        return peer.build(sizes)
    except ImportError as error:
        raise Missing(f"not installed: pip install {peer.package} ({error})") from error


def autocast(sizes: Sizes) -> torch.autocast:
    """A context in which products are taken in the dtype of a case."""
    return torch.autocast(sizes.device, torch.bfloat16, enabled=sizes.dtype == "bfloat16")


def step(module: nn.Module, sizes: Sizes) -> Callable[[], None]:
    """One call as it is timed: forward, and backward to all parameters and the input, on the same random input."""
    generator = torch.Generator().manual_seed(0)
    if sizes.level == "layer":
        x = torch.randn(sizes.batch, sizes.time, sizes.dim, generator=generator)
    else:
        x = torch.randint(sizes.vocab, (sizes.batch, sizes.time), generator=generator)
    x = x.to(sizes.device).requires_grad_(sizes.level == "layer" and sizes.backward)

    def call() -> None:
        module.zero_grad(set_to_none=True)
        x.grad = None
        with torch.set_grad_enabled(sizes.backward), autocast(sizes):
            y = module(x)
            y = y if isinstance(y, Tensor) else y[0]
            if sizes.level == "model":
                loss = F.cross_entropy(y[:, :-1].flatten(0, 1).float(), x[:, 1:].flatten())
            else:
                loss = y.float().square().mean()
        if sizes.backward:
            loss.backward()

    return call


def useful_flops(name: str, sizes: Sizes) -> float | None:
    """FLOPs of one call by formula (see `miras.bench.flops`), or None where there is none."""
    if name in PEERS and name != "sdpa":
        return None
    mixer = mixer_of("transformer" if name == "sdpa" else name, sizes.chunk)
    if sizes.level == "layer":
        parts = layer_flops(mixer, sizes)
        each = None if parts is None else sum(parts.values())
    else:
        each = model_flops([mixer] * sizes.layers, sizes, _hidden(sizes), sizes.vocab)
    return None if each is None else each * sizes.tokens


def product_bytes(name: str, sizes: Sizes) -> float | None:
    """Bytes that the products of one call of a layer move by formula, or None where there is none."""
    if name in PEERS or sizes.level != "layer":
        return None
    parts = layer_bytes(mixer_of(name, sizes.chunk), sizes)
    return None if parts is None else sum(parts.values()) * sizes.tokens


def chunk_of(name: str, sizes: Sizes) -> int | None:
    """Tokens per chunk of an entry; None where it has none."""
    if not (has_chunk(name) or names_file(name)):
        return None
    if name in PEERS:
        return sizes.chunk or PEER_CHUNK
    mixer = mixer_of(name, sizes.chunk)
    return mixer.chunk if isinstance(mixer, Rule) else None


def _hidden(sizes: Sizes) -> int:
    from miras.hf import MirasConfig

    return MirasConfig(hidden_size=sizes.dim).intermediate_size
