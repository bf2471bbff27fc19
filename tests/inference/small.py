"""A small model of each kind of attention, on the ranks that are there and on one alone."""

from dataclasses import replace
from functools import cache

import numpy as np
from mpi4py import MPI

from inference.generate import Generator, make_cache
from layers.rope import Rope
from models.build import build
from models.config import Latent, gpt2_like, llama_like
from parallel.mesh import Mesh
from parallel.parameter import drawn

V = 31
LATENT = llama_like(V, 20, 2, 5, 5, 14, 128)
LATENT = replace(LATENT, latent=Latent(6, 5, 4, 3, 7), rope=Rope(4, pairing="interleaved"), d_head=9)
CONFIGS = {"gpt2": gpt2_like(V, 20, 2, 5, 12, 128), "llama": llama_like(V, 24, 2, 6, 3, 14, 128), "latent": LATENT}
# All layers within a window; and one that sees all without rotation, beside one within a window.
WINDOWED = {
    "window": replace(CONFIGS["llama"], windows=(9, 6)),
    "mixed": replace(CONFIGS["llama"], windows=(0, 7), unrotated=(0,)),
}
# Kinds of a model and of its cache, and whether that is striped.
CASES = [(kind, cache, False) for kind in CONFIGS for cache in ("contiguous", "paged")]
CASES += [("latent", "contiguous", True), ("latent", "paged", True)]


def model_of(kind, mesh, dtype="float64", layers=2, seed=1):
    config = (CONFIGS | WINDOWED)[kind]
    config = replace(config, layers=layers, windows=(config.windows * layers)[:layers])
    return build(config, mesh.tp, drawn(seed, dtype, 0.25))


@cache
def lone(kind, dtype="float64", layers=2):
    """A generator of the same model on this rank alone: it sends nothing, so that each rank may ask it for itself."""
    mesh = Mesh(MPI.COMM_SELF, tp=1)
    model = model_of(kind, mesh, dtype, layers)
    return Generator(model, mesh, make_cache(model, "contiguous"))


def full_logits(kind, ids, layers=2):
    """(T, V): the logits of a forward of all of these at once, without a cache."""
    model = lone(kind, layers=layers).model
    return model.forward(np.array(ids), model.batch([len(ids)]))[0]
