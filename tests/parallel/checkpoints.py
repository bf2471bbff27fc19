"""What the tests of checkpoints share: arrays cut in every way, a checkpoint of them, and what it must hold."""

import json

import numpy as np
import pytest

from parallel.checkpoint import MANIFEST, Checkpoint, CheckpointError, pieces, save
from parallel.shard import Layout, covering, even, replicated


class Alone:
    """Control for one process, without MPI."""

    rank, size = 0, 1
    everyone = staticmethod(lambda mine: [mine])
    wait = staticmethod(lambda: None)


def on_rank_0(comm, work, *args):
    """work(*args) on rank 0, while no other rank is before or behind."""
    comm.Barrier()
    if comm.rank == 0:
        work(*args)
    comm.Barrier()


def layouts(ranks):
    """Even and uneven cuts along several dims, key/value heads held by several ranks, arrays held whole, and an empty one."""
    return {
        "table": Layout((13, 5), {"tp": (0, even(13, ranks))}),
        "layers.0.W1": Layout((3, 11), {"tp": (1, even(11, ranks))}),
        "layers.0.Wk": Layout((2, 3, 4), {"tp": (1, covering(even(9, ranks), 3))}),
        "layers.0.b": Layout((7,)),
        "ids": Layout((6,), {"tp": (0, even(6, ranks))}),
        "mask": Layout((5,), {"tp": (0, replicated(5, ranks))}),
        "colours": Layout((4, 1, 9), {"tp": (2, even(9, ranks))}),
        "empty": Layout((0, 4)),
    }


def whole(seed):
    dtypes = ["f4", "f8", "f4", "f8", "i8", "?", "u1", "f2"]
    rng = np.random.default_rng(seed)
    return {
        name: rng.integers(0, 2 if dtype == "?" else 99, layout.shape).astype(dtype)
        for (name, layout), dtype in zip(layouts(1).items(), dtypes, strict=True)
    }


def parts(seed, ranks, rank):
    held, place = layouts(ranks), {"tp": rank}
    return [p for name, x in whole(seed).items() for p in pieces(name, held[name], place, held[name].take(x, place))]


def write(folder, step, control, seed=None, **options):
    mine = parts(step if seed is None else seed, control.size, control.rank)
    return save(folder, step, mine, {"seed": step}, control, **options)


def require_whole(checkpoint, seed, ranks, rank):
    for name, layout in layouts(ranks).items():
        should = layout.take(whole(seed)[name], {"tp": rank})
        got = checkpoint.read(name, layout, {"tp": rank}, should.dtype)
        assert (got.dtype, got.shape, got.tobytes()) == (should.dtype, should.shape, should.tobytes()), name
        assert checkpoint.shape(name) == layout.shape
    assert sorted(checkpoint.names) == sorted(layouts(ranks))


def refused(path, control):
    """The text, which must be the same on every rank, with which a checkpoint is refused."""
    with pytest.raises(CheckpointError) as error:
        Checkpoint(path, control)
    (text,) = set(control.everyone(str(error.value)))
    return text


def manifest_of(path):
    return json.loads((path / MANIFEST).read_text())


def there(folder):
    return sorted(p.name for p in folder.iterdir())


def flip(file, at, bit=0):
    content = bytearray(file.read_bytes())
    content[at] ^= 1 << bit
    file.write_bytes(content)
