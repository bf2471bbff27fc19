"""The same layers in PyTorch, over gloo, each in two ways, for `launch.bench --peer torch`; only this needs PyTorch.

`dtensor`: PyTorch's own tensor parallelism, `parallelize_module` with ColwiseParallel and RowwiseParallel. `functions`:
Megatron's f and g written by hand as autograd functions round torch.distributed.all_reduce, PyTorch at its leanest.
"""

from __future__ import annotations

import os
import shutil
import tempfile

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from layers.attention import Attention
from layers.mlp import MLP
from parallel.control import Control
from parallel.mesh import Mesh


class _SumInBackward(torch.autograd.Function):
    """Megatron's f: the identity forward, an all-reduce backward."""

    @staticmethod
    def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: object, dx: torch.Tensor) -> torch.Tensor:
        dx = dx.contiguous()
        dist.all_reduce(dx)
        return dx


class _SumInForward(torch.autograd.Function):
    """Megatron's g: an all-reduce forward, the identity backward."""

    @staticmethod
    def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: object, dy: torch.Tensor) -> torch.Tensor:
        return dy


def _linear(W: np.ndarray, b: np.ndarray | None) -> nn.Linear:
    """From a weight stored (in, out)."""
    layer = nn.Linear(*W.shape, bias=b is not None, dtype=torch.from_numpy(W).dtype)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(W).T)
        if b is not None:
            layer.bias.copy_(torch.from_numpy(b))
    return layer


def _summed(down: nn.Linear, h: torch.Tensor) -> torch.Tensor:
    """A row-parallel layer, its bias added after its sum."""
    y = _SumInForward.apply(nn.functional.linear(h, down.weight))
    return y if down.bias is None else y + down.bias


class _MLP(nn.Module):
    """linear, gelu, linear."""

    plan = {"up": ColwiseParallel, "down": RowwiseParallel}  # noqa: RUF012

    def __init__(self, weights: dict[str, np.ndarray]) -> None:
        super().__init__()
        self.up, self.down = (_linear(weights[f"W{n}"], weights.get(f"b{n}")) for n in "12")
        self.act = nn.GELU(approximate="tanh")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.act(self.up(x)))


class _MLPByFunctions(_MLP):
    """This rank's shards, with the sums written out."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _summed(self.down, self.act(self.up(_SumInBackward.apply(x))))


def _attended(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """q (T, h, E), k and v (T, k, E) -> (T, h E), by PyTorch's fused attention."""
    q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
    o = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
    return o[0].transpose(0, 1).reshape(q.shape[2], -1)


class _Attention(nn.Module):
    """Queries, keys and values from a product each, as parallelize_module cuts them; fused attention; the output's product."""

    plan = {"q": ColwiseParallel, "k": ColwiseParallel, "v": ColwiseParallel, "o": RowwiseParallel}  # noqa: RUF012

    def __init__(self, weights: dict[str, np.ndarray]) -> None:
        super().__init__()
        self.d_head = weights["Wq"].shape[2]
        for n in "qkv":
            W, b = weights[f"W{n}"], weights.get(f"b{n}")
            setattr(self, n, _linear(W.reshape(len(W), -1), None if b is None else b.reshape(-1)))
        self.o = _linear(weights["Wo"].reshape(-1, weights["Wo"].shape[2]), weights.get("bo"))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.o(_attended(*(layer(x).unflatten(1, (-1, self.d_head)) for layer in (self.q, self.k, self.v))))


class _AttentionByFunctions(nn.Module):
    """This rank's shards, queries, keys and values from one product, with the sums written out."""

    def __init__(self, weights: dict[str, np.ndarray]) -> None:
        super().__init__()
        self.sizes = [weights[f"W{n}"].shape[1] for n in "qkv"]
        W = np.concatenate([weights[f"W{n}"] for n in "qkv"], axis=1)
        b = np.concatenate([weights[f"b{n}"] for n in "qkv"]).reshape(-1) if "bq" in weights else None
        self.qkv = _linear(W.reshape(len(W), -1), b)
        self.o = _linear(weights["Wo"].reshape(-1, weights["Wo"].shape[2]), weights.get("bo"))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        qkv = self.qkv(_SumInBackward.apply(x)).unflatten(1, (sum(self.sizes), -1))
        return _summed(self.o, _attended(*qkv.split(self.sizes, dim=1)))


_TWINS = {MLP: (_MLP, _MLPByFunctions), Attention: (_Attention, _AttentionByFunctions)}


def _arrived(t: torch.Tensor) -> torch.Tensor:
    """Tensor parallelism returns sums that may still be on their way: a step is over when they have come."""
    return t.wait() if hasattr(t, "wait") else t


class Peer:
    """The weights of `layer` in PyTorch, on the ranks of the same axis. A context: inside it, gloo runs."""

    def __init__(self, mesh: Mesh, layer: MLP | Attention, control: Control, threads: int) -> None:
        self._layer, self._mesh, self._tp, self._control = layer, mesh, mesh.tp, control
        torch.set_num_threads(threads)

    def __enter__(self) -> Peer:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        tp, parameters = self._tp, self._layer.parameters
        self._folder = self._control.from_first(tempfile.mkdtemp() if tp.rank == 0 else None)
        dist.init_process_group("gloo", init_method=f"file://{self._folder}/store", rank=tp.rank, world_size=tp.size)
        whole, by_functions = _TWINS[type(self._layer)]
        plan = {name: style() for name, style in whole.plan.items()}
        gathered = whole({p.name: p.whole(self._mesh, p.data) for p in parameters})
        self.layers = {
            "dtensor": parallelize_module(gathered, init_device_mesh("cpu", (tp.size,)), plan),
            "functions": by_functions({p.name: np.ascontiguousarray(p.data) for p in parameters}),
        }
        return self

    def __exit__(self, *_: object) -> None:
        dist.destroy_process_group()
        self._control.wait(patient=True)
        if self._tp.rank == 0:
            shutil.rmtree(self._folder)

    def step(self, name: str, x: np.ndarray, dy: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Forward and backward of one of the two layers; returns y and dx."""
        layer = self.layers[name]
        layer.zero_grad()
        x_TD = torch.from_numpy(x).requires_grad_()
        y_TD = layer(x_TD)
        y_TD.backward(torch.from_numpy(dy))
        return _arrived(y_TD.detach()), _arrived(x_TD.grad)

    def require_same(self, x: np.ndarray, dy: np.ndarray, *more: object) -> None:
        """Raise ValueError unless both layers' y and dx are ours, to a thousandth of their size."""
        y, saved = self._layer.forward(x, *more)
        dx = self._layer.backward(dy, saved)
        for kind in self.layers:
            for name, ours, theirs in zip(("y", "dx"), (y, dx), self.step(kind, x, dy), strict=True):
                off = float(np.abs(ours - theirs.numpy()).max() / np.abs(ours).max())
                if not off < 1e-3:
                    raise ValueError(f"PyTorch's {name} ({kind}) differs from ours by {off:.1e} of its size")
