"""Candidates from a heap, beams as small objects; the last child of a beam takes over its table, so that nothing is dropped twice."""

import heapq
from collections import Counter
from dataclasses import dataclass, field

import numpy as np


@dataclass
class Beam:
    score: float = 0.0
    tokens: list = field(default_factory=list)
    table: list = field(default_factory=list)


def write(pool, table, position, row_E):
    which = position // pool.block
    if which >= len(table):
        table += [pool.take()]
    if pool.users[table[which]] != 1:
        mine = pool.take()
        filled = position % pool.block
        pool.rows[mine, :filled] = pool.rows[table[which], :filled]
        pool.drop(table[which])
        table[which] = mine
    pool.rows[table[which], position - which * pool.block] = row_E


def read(pool, table, length):
    return np.concatenate([pool.rows[id] for id in table])[:length] if table else np.zeros((0, pool.rows.shape[-1]))


def fork(pool, table):
    return [pool.share(id) or id for id in table]


def select(score_B, logp_BV, width, end):
    V = len(logp_BV[0])
    heap = [(-(score_B[b] + logp_BV[b][v]), b * V + v) for b in range(len(score_B)) for v in range(V)]
    heapq.heapify(heap)
    picked = ([], [])
    for _ in range(len(heap)):
        if len(picked[0]) >= width:
            break
        negative, at = heapq.heappop(heap)
        picked[at % V == end].append((at // V, at % V, -negative))
    return picked


def search(model, pool, prompt, width, end, most, alpha):
    first = Beam()
    for position, token in enumerate(prompt):
        write(pool, first.table, position, model.row(token, position))
    beams, hypotheses = [first], []
    for held in range(len(prompt), len(prompt) + most):
        logp = [model.logp(read(pool, b.table, held)) for b in beams]
        picked, ended = select([b.score for b in beams], np.stack(logp), width, end)
        for parent, token, score in ended:
            text = [*beams[parent].tokens, token]
            hypotheses.append((text, score / len(text) ** alpha))
        left = Counter(parent for parent, _, _ in picked)
        children = []
        for parent, token, score in picked:
            left[parent] -= 1
            table = beams[parent].table if left[parent] == 0 else fork(pool, beams[parent].table)
            children.append(Beam(score, [*beams[parent].tokens, token], table))
        for n, b in enumerate(beams):
            if n not in left:
                for id in b.table:
                    pool.drop(id)
        beams = children
        for b in beams:
            write(pool, b.table, held, model.row(b.tokens[-1], held))
        if len(hypotheses) >= width:
            break
    for b in beams:
        for id in b.table:
            pool.drop(id)
    if len(hypotheses) < width:
        hypotheses += [(b.tokens, b.score / most**alpha) for b in beams]
    order = sorted(range(len(hypotheses)), key=lambda n: (-hypotheses[n][1], n))
    return [hypotheses[n] for n in order[:width]]
