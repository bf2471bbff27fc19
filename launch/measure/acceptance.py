"""What speculation's formulas need: alpha by total variation, measured costs, operations; and whether two runs differ by a
tie."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from time import perf_counter

import numpy as np
from mpi4py import MPI

from inference.generate import Generator
from inference.sampling import Sampler, Sampling
from inference.speculation.drafts import ModelDraft, Ngram
from inference.speculation.generator import Speculative
from layers.transformer import Transformer
from layers.work import operations
from models.config import Config
from reference.compare import tolerance

# Turns in which costs are measured, after one that warms up.
TURNS = 7


def overlap(sampler: Sampler, log_p_nv: Sequence[np.ndarray], log_q_nv: Sequence[np.ndarray]) -> np.ndarray:
    """sum_x min(p(x), q(x)) of each pair, 1 minus their total variation: theorem 3.5's beta, whose mean is alpha."""
    mine_n = [np.minimum(np.exp(p), np.exp(q)).sum() for p, q in zip(log_p_nv, log_q_nv, strict=True)]
    return sampler.tp.all_reduce(np.array(mine_n, np.float64))


def alpha_by_overlap(it: Speculative, context: list[int], new: int, sampling: Sampling) -> float | None:
    """The mean of beta over the places of the context's last `new` tokens, which the target wrote. A draft that does not always
    propose counts only where it does. None if it never does."""
    first = len(context) - new
    places = range(first, len(context))
    log_p = logs(it, context, places, sampling)
    if isinstance(it.draft, Ngram):
        proposed = {n: it.draft.propose(context[:n], 1, sampling, 0).tokens for n in places}
        it.draft.close()
        log_p = [p for p, n in zip(log_p, places, strict=True) if proposed[n]]
        log_q = [it.sampler.certain(tokens[0]) for tokens in proposed.values() if tokens]
    elif isinstance(it.draft, ModelDraft):
        log_q = logs(it.draft.generator, context, places, sampling)
    else:
        log_q = logs(it, context, places, sampling, it.draft.layers)
    return float(overlap(it.sampler, log_p, log_q).mean()) if log_q else None


def logs(
    it: Generator, context: list[int], places: Sequence[int], sampling: Sampling, layers: int | None = None
) -> list[np.ndarray]:
    """log p at this rank's ids, after temperature, of the token at each of these places."""
    it.cache.open(0)
    logits_nv = it.forward([(0, context[: places[-1]])], rows=[n - 1 for n in places], layers=layers)
    it.cache.free(0)
    return [it.sampler.filtered(row_v, sampling) for row_v in logits_nv]


def costs(
    drafters: dict[str, Speculative], context: list[int], sampling: Sampling, gammas: list[int], comm: MPI.Intracomm
) -> tuple[list[float], dict[str, float]]:
    """t(n) / t(1) of the target on n = 1, ..., g + 1 rows after this context, and each draft's c: a drafted token's time over
    t(1). Medians of turns, each the slowest rank's."""
    target, many = next(iter(drafters.values())), max(gammas)
    rows: list[list[float]] = []
    tokens: dict[str, list[float]] = {name: [] for name in drafters}

    def timed(run: Callable[[], object]) -> float:
        comm.Barrier()
        begun = perf_counter()
        run()
        return comm.allreduce(perf_counter() - begun, MPI.MAX)

    for it in drafters.values():
        it.cache.open(0)
        it.forward([(0, context)])
    for _ in range(TURNS + 1):
        rows.append([])
        for n in range(1, many + 2):
            ids = (context * n)[:n]
            rows[-1].append(timed(lambda ids=ids: target.forward([(0, ids)], rows=range(len(ids)))))
            target.cache.truncate(0, len(context))
        for name, it in drafters.items():
            # In the first turn, which does not count, a draft's own model reads the context.
            propose = partial(it.draft.propose, [*context, context[0]], many, sampling, 0)
            tokens[name].append(timed(propose) / many)
            it.draft.accepted(context, 0)
    for it in drafters.values():
        it.draft.close()
        it.cache.free(0)
    verify = [median(turn[n] / turn[0] for turn in rows[1:]) for n in range(many + 1)]
    c = {name: median(t / turn[0] for t, turn in zip(s[1:], rows[1:], strict=True)) for name, s in tokens.items()}
    return verify, c


def step_operations(model: Transformer, layers: int | None = None) -> float:
    """Operations of this rank for one token, through all layers or the first ones, and the head."""
    left_out, token = [] if layers is None else model.blocks[layers:], model.batch([1])
    return operations(model.work(token)) - sum(operations(block.work(token)) for block in left_out)


def draft_operations(it: Speculative) -> float:
    """A drafted token's operations over the target's: c^ of theorem 3.11."""
    if isinstance(it.draft, Ngram):
        return 0.0
    own = it.draft.generator.model if isinstance(it.draft, ModelDraft) else it.model
    return step_operations(own, getattr(it.draft, "layers", None)) / step_operations(it.model)


def tie(it: Generator, prompt: list[int], plain: list[int], got: list[int], config: Config) -> dict | None:
    """None for equal tokens; else the first difference: its place, how far the target's logits of both tokens are from its best
    one, and how much of that rounding explains.

    Rounding: a logit is made by the sums of the head and of four products a layer. They are independent, so that they count as
    one sum of all their lengths, whose terms are as large as the largest logit. Both computations round. float64 decides: no
    difference is explained there.
    """
    if got == plain:
        return None
    at = next((n for n, (a, b) in enumerate(zip(plain, got, strict=False)) if a != b), min(len(plain), len(got)))
    if at == min(len(plain), len(got)):
        return {"at": at, "gap": None, "tolerance": 0.0, "explained": False}
    it.cache.open(0)
    z_v = it.forward([(0, prompt + plain[:at])])[0]
    it.cache.free(0)
    pair = [float(it.sampler.of_token(z_v, token)) for token in (plain[at], got[at])]
    best = float(it.sampler.of_token(z_v, int(it.sampler.best(z_v[None])[0])))
    terms = config.d_model + config.layers * (3 * config.d_model + config.d_ff)
    allowed = tolerance(z_v.dtype, [(terms, 2 * abs(best))]) if z_v.dtype == np.float32 else 0.0
    # Two poor tokens that are alike are no tie: both must be within rounding of the best.
    gap = best - min(pair)
    return {"at": at, "gap": gap, "tolerance": allowed, "explained": 0 < allowed >= gap}


def explained(difference: dict) -> str:
    """What `tie` returned, for people."""
    gap = "one ends before the other"
    if difference["gap"] is not None:
        gap = f"{difference['gap']:.1e} from the best, rounding is {difference['tolerance']:.1e}"
    kind = "a tie within rounding (--dtype float64 decides)" if difference["explained"] else "WRONG"
    return f"token {difference['at']} differs, {gap}: {kind}"
