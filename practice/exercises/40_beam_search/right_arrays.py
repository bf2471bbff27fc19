"""With arrays: scores and tokens of all beams side by side, candidates by lexsort; a step's rows are written when the next one begins."""

import numpy as np


def write(pool, table, position, row_E):
    full, slot = position // pool.block, position % pool.block
    if len(table) == full:
        table.append(pool.take())
    old = table[full]
    if pool.users[old] > 1:
        pool.drop(old)
        table[full] = pool.take()
        pool.rows[table[full]] = pool.rows[old].copy()
    pool.rows[table[full]][slot] = row_E


def read(pool, table, length):
    rows = pool.rows[np.array(table, dtype=int)].reshape(-1, pool.rows.shape[2])
    return rows[:length]


def fork(pool, table):
    new = []
    for id in table:
        pool.share(id)
        new.append(id)
    return new


def select(score_B, logp_BV, width, end):
    total = np.add(logp_BV, np.reshape(score_B, (-1, 1)))
    beam, token = np.indices(total.shape).reshape(2, -1)
    order = np.lexsort((token, beam, -total.ravel()))
    lives = token[order] != end
    place = np.cumsum(lives)
    rows = [(int(beam[n]), int(token[n]), float(total.flat[n])) for n in order]
    live = [r for r, on, n in zip(rows, lives, place, strict=True) if on and n <= width]
    return live, [r for r, on, n in zip(rows, lives, place, strict=True) if not on and n < width]


def search(model, pool, prompt, width, end, most, alpha):
    tables, score_B, token_BS = [[]], np.zeros(1), np.zeros((1, 0), int)
    texts, scores = [], []
    for step in range(most):
        for table, tokens in zip(tables, token_BS, strict=True):
            text = [*prompt, *tokens.tolist()]
            for n in range(len(prompt) + step - 1 if step else 0, len(text)):
                write(pool, table, n, model.row(text[n], n))
        logp_BV = np.vstack([model.logp(read(pool, t, len(prompt) + step)) for t in tables])
        live, ended = select(score_B, logp_BV, width, end)
        texts += [[*token_BS[b].tolist(), v] for b, v, _ in ended]
        scores += [s for _, _, s in ended]
        from_B = [b for b, _, _ in live]
        token_BS = np.hstack([token_BS[from_B], np.array([[v] for _, v, _ in live])])
        score_B = np.array([s for _, _, s in live])
        old, tables = tables, [fork(pool, tables[b]) for b in from_B]
        for table in old:
            for id in reversed(table):
                pool.drop(id)
        if len(texts) >= width:
            break
    else:
        texts, scores = texts + token_BS.tolist(), scores + score_B.tolist()
    for table in tables:
        for id in table:
            pool.drop(id)
    final = np.array([s / len(t) ** alpha for s, t in zip(scores, texts, strict=True)])
    return [(texts[n], final[n]) for n in np.argsort(-final, kind="stable")[:width]]
