"""The same training step in PyTorch, over gloo, for `launch.bench train --peer torch`; only this needs PyTorch.

`dp`: torch.nn.parallel.DistributedDataParallel. `zero`: fully_shard of each block and of the rest (FSDP). `tp`: PyTorch's own
tensor parallelism, `parallelize_module` with ColwiseParallel and RowwiseParallel.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from itertools import accumulate

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.profiler import ProfilerActivity, profile

from launch.bench.sizes import Sizes
from parallel.control import Control

CLIP, LR, STD = 1.0, 1e-3, 0.02


class _Block(nn.Module):
    """Pre-norm attention and MLP. Queries, keys and values are one product, in the order (H, 3, E): cut along H by tp."""

    plan = {"qkv": ColwiseParallel, "o": RowwiseParallel, "up": ColwiseParallel, "down": RowwiseParallel}  # noqa: RUF012

    def __init__(self, d_model: int, d_ff: int, heads: int) -> None:
        super().__init__()
        self.d_head = d_model // heads
        self.norm1, self.norm2 = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.qkv, self.o = nn.Linear(d_model, 3 * d_model), nn.Linear(d_model, d_model)
        self.up, self.down = nn.Linear(d_model, d_ff), nn.Linear(d_ff, d_model)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (-1, 3, self.d_head)).transpose(1, 2).unbind(3)
        o = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(o.transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x)), approximate="tanh"))


class _Model(nn.Module):
    """ids (B, S) -> logits (B, S, V)."""

    def __init__(self, vocab: int, d_model: int, d_ff: int, layers: int, heads: int, sequence_length: int) -> None:
        super().__init__()
        self.table, self.positions = nn.Embedding(vocab, d_model), nn.Embedding(sequence_length, d_model)
        self.blocks = nn.Sequential(*(_Block(d_model, d_ff, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(d_model), nn.Linear(d_model, vocab, bias=False)
        for name, p in self.named_parameters():
            if p.ndim == 2:
                nn.init.normal_(p, std=STD)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.table(ids) + self.positions.weight[: ids.shape[1]]
        return self.head(self.norm(self.blocks(x)))


class TrainPeer:
    """A decoder-only model on all ranks, by data ("dp"), with what it keeps split ("zero"; `gathers`: weights too, and again
    in backward), or by tensor parallelism ("tp"), and its fused AdamW.

    A context: inside it, gloo runs. Several may be open at once, within one another: they share the first one's gloo.
    """

    def __init__(self, kind: str, control: Control, threads: int, vocab: int, sizes: Sizes, gathers: bool = False) -> None:
        self._gathers, self._kind, self._rank, self._size, self._control = gathers, kind, control.rank, control.size, control
        self._sizes = (vocab, sizes.d_model, sizes.d_ff, sizes.layers, sizes.heads, sizes.sequence_length)
        torch.set_num_threads(threads)

    def __enter__(self) -> TrainPeer:
        self._first = not dist.is_initialized()
        if self._first:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
            self._folder = self._control.from_first(tempfile.mkdtemp() if self._rank == 0 else None)
            store = f"file://{self._folder}/store"
            dist.init_process_group("gloo", init_method=store, rank=self._rank, world_size=self._size)
        torch.manual_seed(0)
        model = _Model(*self._sizes)
        if self._kind == "dp":
            self.model = DistributedDataParallel(model, gradient_as_bucket_view=True)
        elif self._kind == "zero":
            mesh = init_device_mesh("cpu", (self._size,))
            for part in (*model.blocks, model):
                fully_shard(part, mesh=mesh, reshard_after_forward=self._gathers)
            self.model = model
        else:
            mesh = init_device_mesh("cpu", (self._size,))
            for block in model.blocks:
                parallelize_module(block, mesh, {name: style() for name, style in block.plan.items()})
            self.model = model
        parameters = list(model.parameters())
        # One fused step takes either kind of tensor, not both.
        self._cut = [p for p in parameters if isinstance(p, DTensor)]
        self._whole = [p for p in parameters if not isinstance(p, DTensor)]
        groups = [
            {"params": [p for p in some if (p.ndim > 1) == decays], "weight_decay": 0.1 if decays else 0.0}
            for some in (self._cut, self._whole)
            for decays in (True, False)
        ]
        groups = [g for g in groups if g["params"]]
        self.optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), fused=True)
        return self

    def __exit__(self, *_: object) -> None:
        if self._first:
            dist.destroy_process_group()
            self._control.wait(patient=True)
            if self._rank == 0:
                shutil.rmtree(self._folder)

    def _clip(self) -> None:
        norms = [get_total_norm([p.grad for p in some]) for some in (self._cut, self._whole) if some]
        norm = get_total_norm([n.full_tensor() if isinstance(n, DTensor) else n for n in norms])
        for some in (self._cut, self._whole):
            clip_grads_with_norm_(some, CLIP, norm)

    def step(self, ids: np.ndarray, targets: np.ndarray) -> float:
        """ids, targets (B, S) of the whole batch -> its mean loss, in nats. Data parallelism deals out its sequences."""
        tokens = ids.size
        deals = self._kind != "tp"
        if deals:
            ids, targets = (np.array_split(a, self._size)[self._rank] for a in (ids, targets))
        logits = self.model(torch.from_numpy(ids))
        total = nn.functional.cross_entropy(logits.flatten(0, 1), torch.from_numpy(targets).flatten(), reduction="sum")
        # Both divide the sum of gradients by the ranks.
        loss = total / tokens * (self._size if deals else 1)
        loss.backward()
        self._clip()
        self.optimizer.step()
        self.optimizer.zero_grad()
        mean = total.detach() / tokens
        if deals:
            dist.all_reduce(mean)
        return mean.item()

    def stays(self) -> dict[str, int]:
        """Bytes of weights and the optimizer's state on this rank, and of gradients where they stay from step to step."""
        local = lambda x: x.to_local() if isinstance(x, DTensor) else x  # noqa: E731
        weights = sum(local(p).nbytes for p in self.model.parameters())
        state = sum(local(x).nbytes for of in self.optimizer.state.values() for x in of.values() if x.ndim)
        return {"stays": (2 if self._kind == "dp" else 1) * weights + state}

    def peak_bytes(self, step: Callable[[], object]) -> int:
        """The most that a step holds at once beside what is there before it, by PyTorch's own count."""
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
            step()
        events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
        return max(accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())), default=0)
