"""The same MLP in PyTorch, over gloo, in two ways, for `launch.bench --peer torch`; only this needs PyTorch.

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

from layers.mlp import MLP
from parallel.control import Control
from parallel.mesh import Axis


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


class _Layer(nn.Module):
    """linear, gelu, linear, from weights stored (in, out)."""

    def __init__(self, W1: np.ndarray, b1: np.ndarray | None, W2: np.ndarray, b2: np.ndarray | None) -> None:
        super().__init__()
        self.up, self.act, self.down = _linear(W1, b1), nn.GELU(approximate="tanh"), _linear(W2, b2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.act(self.up(x)))


class _ByFunctions(_Layer):
    """This rank's shards, with the sums written out; the bias of the second layer is added after its sum."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.act(self.up(_SumInBackward.apply(x)))
        y = _SumInForward.apply(nn.functional.linear(h, self.down.weight))
        return y if self.down.bias is None else y + self.down.bias


def _linear(W: np.ndarray, b: np.ndarray | None) -> nn.Linear:
    layer = nn.Linear(*W.shape, bias=b is not None, dtype=torch.from_numpy(W).dtype)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(W).T)
        if b is not None:
            layer.bias.copy_(torch.from_numpy(b))
    return layer


def _arrived(t: torch.Tensor) -> torch.Tensor:
    """Tensor parallelism returns sums that may still be on their way: a step is over when they have come."""
    return t.wait() if hasattr(t, "wait") else t


class TorchMLP:
    """The weights of `mlp` (gelu) in PyTorch, on the ranks of the same axis. A context: inside it, gloo runs."""

    def __init__(self, tp: Axis, mlp: MLP, control: Control, threads: int) -> None:
        self._mlp, self._tp, self._control = mlp, tp, control
        self.layers: dict[str, nn.Module] = {}
        torch.set_num_threads(threads)

    def __enter__(self) -> TorchMLP:
        # Ranks of one host: gloo over loopback, as it does by default where the host's name resolves to it.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        tp, parameters = self._tp, self._mlp.parameters
        self._folder = self._control.from_first(tempfile.mkdtemp() if tp.rank == 0 else None)
        dist.init_process_group("gloo", init_method=f"file://{self._folder}/store", rank=tp.rank, world_size=tp.size)
        arrays = lambda which: [which.get(n) for n in ("W1", "b1", "W2", "b2")]  # noqa: E731
        whole = _Layer(*arrays({p.name: p.whole(tp, p.data) for p in parameters}))
        plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
        self.layers = {
            "dtensor": parallelize_module(whole, init_device_mesh("cpu", (tp.size,)), plan),
            "functions": _ByFunctions(*arrays({p.name: p.data for p in parameters})),
        }
        return self

    def __exit__(self, *_: object) -> None:
        dist.destroy_process_group()
        self._control.wait()
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

    def require_same(self, x: np.ndarray, dy: np.ndarray) -> None:
        """Raise ValueError unless both layers' y and dx are ours, to a thousandth of their size."""
        y, saved = self._mlp.forward(x)
        dx = self._mlp.backward(dy, saved)
        for kind in self.layers:
            for name, ours, theirs in zip(("y", "dx"), (y, dx), self.step(kind, x, dy), strict=True):
                off = float(np.abs(ours - theirs.numpy()).max() / np.abs(ours).max())
                if not off < 1e-3:
                    raise ValueError(f"PyTorch's {name} ({kind}) differs from ours by {off:.1e} of its size")
