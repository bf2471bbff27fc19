"""The same MLP in PyTorch, on torch.distributed with gloo, for `launch.bench --peer torch`; only this needs PyTorch."""

from __future__ import annotations

import os
import tempfile

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812  the field's name for it

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


class TorchMLP:
    """The weights of `mlp` (gelu) in PyTorch's own layout, (out, in), on the ranks of the same axis."""

    def __init__(self, tp: Axis, mlp: MLP, control: Control, threads: int) -> None:
        self._mlp, self._tp, self._control = mlp, tp, control
        torch.set_num_threads(threads)
        parameter = lambda a: torch.nn.Parameter(torch.from_numpy(np.ascontiguousarray(a).copy()))  # noqa: E731
        up, down = mlp.up, mlp.down
        self.W1, self.W2 = parameter(up.W_Io.data.T), parameter(down.W_iO.data.T)
        self.b1, self.b2 = (None if b is None else parameter(b.data) for b in (up.b_o, down.b_O))

    def __enter__(self) -> TorchMLP:
        # Ranks of one host: gloo over loopback, as it does by default where the host's name resolves to it.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        self._folder = self._control.from_first(tempfile.mkdtemp() if self._tp.rank == 0 else None)
        store = f"file://{self._folder}/store"
        dist.init_process_group("gloo", init_method=store, rank=self._tp.rank, world_size=self._tp.size)
        return self

    def __exit__(self, *_: object) -> None:
        dist.destroy_process_group()
        self._control.wait()
        if self._tp.rank == 0:
            for name in os.listdir(self._folder):
                os.unlink(os.path.join(self._folder, name))
            os.rmdir(self._folder)

    def step(self, x: np.ndarray, dy: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Forward and backward; returns y and dx."""
        for p in (self.W1, self.b1, self.W2, self.b2):
            if p is not None:
                p.grad = None
        x_TD = torch.from_numpy(x).requires_grad_()
        h_Tf = F.gelu(F.linear(_SumInBackward.apply(x_TD), self.W1, self.b1), approximate="tanh")
        y_TD = _SumInForward.apply(F.linear(h_Tf, self.W2))
        if self.b2 is not None:
            y_TD = y_TD + self.b2
        y_TD.backward(torch.from_numpy(dy))
        return y_TD.detach(), x_TD.grad

    def require_same(self, x: np.ndarray, dy: np.ndarray) -> None:
        """Raise ValueError unless y and dx are ours, to a thousandth of their size."""
        y, saved = self._mlp.forward(x)
        dx = self._mlp.backward(dy, saved)
        for name, ours, theirs in zip(("y", "dx"), (y, dx), self.step(x, dy), strict=True):
            off = float(np.abs(ours - theirs.numpy()).max() / np.abs(ours).max())
            if not off < 1e-3:
                raise ValueError(f"PyTorch's {name} differs from ours by {off:.1e} of its size: not the same layer")
