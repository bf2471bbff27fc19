"""Beam search over a paged cache (PagedAttention, arXiv 2309.06180; scores divided by a power of the length, after 1609.08144).

The cache holds a row a token. `pool` is handed to you; a table, a plain list of its ids, has the row of position n in block
table[n // block], slot n % block:
    pool.block, pool.rows[id, slot], pool.users[id] (tables that hold a block)
    pool.take() -> id, which one table holds now; pool.share(id): one more holds it; pool.drop(id): one less
    model.row(token, position) -> (E), the row; model.logp(rows_TE) -> (V), log-probabilities of the token after these
A beam's score is the sum of its new tokens' log-probabilities. A step scores every beam with every token, and goes through these
candidates from the best down, equal ones by the lower beam, then by the lower token: `end` ends a hypothesis, any other token makes a
beam of the next step, until there are `width` of these. Only the prompt is there at first, as one beam. Beams that go on share the blocks
of the beam they come from; what nobody continues is dropped before any row is written. A row is computed once for each beam.
"""

import numpy as np


def write(pool, table, position, row_E):
    """Put a row at `position`, at most one past those there; a block comes with its first row. Changes the table in place.

    A block that several tables hold is never written: the writer takes one, copies it, and holds that in its place.
    """
    # --- yours ---
    place, slot = divmod(position, pool.block)
    if place == len(table):
        table.append(pool.take())
    elif pool.users[table[place]] > 1:
        old = table[place]
        table[place] = pool.take()
        pool.rows[table[place]] = pool.rows[old]
        pool.drop(old)
    pool.rows[table[place], slot] = row_E
    # --- end ---


def read(pool, table, length):
    """-> (length, E), the rows of the first `length` positions."""
    # --- yours ---
    n_T = np.arange(length)
    return pool.rows[np.array(table, int)[n_T // pool.block], n_T % pool.block]
    # --- end ---


def fork(pool, table):
    """-> a table of its own, which shares all of the table's blocks."""
    # --- yours ---
    for id in table:
        pool.share(id)
    return list(table)
    # --- end ---


def select(score_B, logp_BV, width, end):
    """-> live, ended: lists of (beam, token, score), each the best first. What would come after `width` live ones is in neither."""
    # --- yours ---
    score_BV = np.asarray(score_B)[:, None] + logp_BV
    live, ended = [], []
    for at in np.argsort(-score_BV, axis=None, kind="stable"):
        if len(live) == width:
            break
        beam, token = divmod(int(at), score_BV.shape[1])
        chosen = ended if token == end else live
        chosen.append((beam, token, float(score_BV[beam, token])))
    return live, ended
    # --- end ---


def search(model, pool, prompt, width, end, most, alpha):
    """-> the best `width` hypotheses, [(new tokens, with `end` if it ended, score / number of new tokens ** alpha)], the best first.

    It is over as soon as `width` hypotheses or more have ended: beams count for nothing then. If not, it is over when beams have `most` new
    tokens: these are hypotheses then, as they are. Equal scores: what ended first, then by beam. At the end no block is held.
    """
    # --- yours ---
    live, done = [(0.0, [], [])], []
    for n, token in enumerate(prompt):
        write(pool, live[0][2], n, model.row(token, n))
    for step in range(most):
        length = len(prompt) + step
        logp_BV = np.array([model.logp(read(pool, table, length)) for _, _, table in live])
        score_B = [score for score, _, _ in live]
        picked, ended = select(score_B, logp_BV, width, end)
        for beam, token, score in ended:
            done.append(([*live[beam][1], token], score / (step + 1) ** alpha))
        after = [(score, [*live[beam][1], token], fork(pool, live[beam][2])) for beam, token, score in picked]
        for _, _, table in live:
            for id in table:
                pool.drop(id)
        live = after
        if len(done) >= width or step + 1 == most:
            break
        for _, tokens, table in live:
            write(pool, table, length, model.row(tokens[-1], length))
    if len(done) < width:
        done += [(tokens, score / len(tokens) ** alpha) for score, tokens, _ in live]
    for _, _, table in live:
        for id in table:
            pool.drop(id)
    return sorted(done, key=lambda hypothesis: -hypothesis[1])[:width]
    # --- end ---
