"""What is right in exercise 40 (whole texts scored anew, blocks as things that lists hold), and what is often wrong."""

import itertools
from collections import Counter

import numpy as np

from practice.part import Part, mistake

E = 3
FOUND = {}


class Pool:
    """What is handed to the learner. Blocks that are taken are counted, and those in use at once."""

    def __init__(self, block, counts, blocks=200):
        self.block, self.counts = block, counts
        self.rows, self.users = np.full((blocks, block, E), np.nan), [0] * blocks

    def take(self):
        # The last one free: no id is its own place in a table.
        id = len(self.users) - 1 - self.users[::-1].index(0)
        self.users[id] = 1
        self.rows[id] = np.nan
        self.counts["blocks taken"] += 1
        self.counts["blocks in use at once"] = max(self.counts["blocks in use at once"], self.in_use())
        return id

    def share(self, id):
        self._held(id)
        self.users[id] += 1

    def drop(self, id):
        self._held(id)
        self.users[id] -= 1

    def in_use(self):
        return len(self.users) - self.users.count(0)

    def _held(self, id):
        if self.users[id] < 1:
            raise ValueError(f"no table holds block {id}")


class Model:
    """A language of whole numbers, so that sums are exact and often equal: what comes next depends on every row."""

    def __init__(self, a, counts):
        self.R_VE, self.W_EV, self.counts = a["R_VE"], a["W_EV"], counts

    def row(self, token, position):
        self.counts["rows computed"] += 1
        return self.R_VE[token] * (position + 3.0) % 97

    def logp(self, rows_TE):
        self.counts["beams looked at"] += 1
        return -(1 + rows_TE.sum(axis=0) @ self.W_EV % 17) / 8


# --- blocks


def acts(draw, block, beams, steps):
    """A script on beams: write the next row, fork, drop."""
    script, length = [], {0: 0}
    for pick in draw.ids(6, steps).tolist():
        beam = sorted(length)[int(draw.rng.integers(len(length)))]
        if pick == 0 and len(length) < beams and length[beam]:
            child = min(set(range(beams)) - set(length))
            script.append(["fork", beam, child])
            length[child] = length[beam]
        elif pick == 1 and len(length) > 1:
            script.append(["drop", beam, 0])
            del length[beam]
        else:
            script.append(["write", beam, length[beam]])
            length[beam] += 1
    return {"script": script, "row_NE": draw.ids(90, steps, E), "block": block}


def told(a):
    names = {"fork": "{0} forks {1}", "drop": "drop {0}", "write": "{0}[{1}]"}
    said = ", ".join(names[act].format(beam, other) for act, beam, other in a["script"])
    return f"blocks of {a['block']}; writes beam[position]: {said}\nblocks in use, act by act"


def call_acts(code, a, at):
    pool, tables, length, in_use = Pool(a["block"], code.counts), {0: []}, {0: 0}, []
    for (act, beam, other), row_E in zip(a["script"], a["row_NE"], strict=False):
        if act == "write":
            code.write(pool, tables[beam], other, row_E.astype(float))
            length[beam] += 1
        elif act == "fork":
            tables[other], length[other] = code.fork(pool, tables[beam]), length[beam]
        else:
            for id in tables.pop(beam):
                pool.drop(id)
            del length[beam]
        in_use.append(pool.in_use())
    return {told(a): in_use} | {f"read of beam {beam}": code.read(pool, tables[beam], length[beam]) for beam in sorted(tables)}


class Lists:
    """Each beam is a list of things, one a block: a thing that several hold is exchanged before it is written."""

    def __init__(self, block):
        self.block, self.things, self.taken, self.most = block, {0: []}, 0, 0

    def write(self, beam, position):
        mine, place = self.things[beam], len(range(self.block, position + 1, self.block))
        if place == len(mine) or sum(mine[place] in other for other in self.things.values()) > 1:
            mine[place : place + 1] = [object()]
            self.taken += 1
            self.most = max(self.most, self.in_use())

    def in_use(self):
        return len({id(t) for mine in self.things.values() for t in mine})


def played(a):
    lists, rows, in_use = Lists(a["block"]), {0: []}, []
    for n, (act, beam, other) in enumerate(a["script"]):
        if act == "write":
            lists.write(beam, other)
            rows[beam].append(n)
        elif act == "fork":
            lists.things[other], rows[other] = list(lists.things[beam]), list(rows[beam])
        else:
            del lists.things[beam], rows[beam]
        in_use.append(lists.in_use())
    return lists, rows, in_use


def want_acts(a, ref, at):
    _, rows, in_use = played(a)
    read = {f"read of beam {beam}": a["row_NE"][mine].reshape(-1, E).astype(float) for beam, mine in sorted(rows.items())}
    return {told(a): in_use} | read


def limits_acts(a, at):
    lists, *_ = played(a)
    return {"blocks taken": lists.taken}


# --- candidates


def candidates(draw, B, V, width):
    """In eighths, many of them equal; `end` is good in some beams and bad in others."""
    logp_BV = -draw.ids(9, B, V) - 1
    end = int(draw.ids(V))
    logp_BV[::2, end] = -1
    return {"score_B": -draw.ids(12, B), "logp_BV": logp_BV, "width": width, "end": end}


def call_select(code, a, at):
    live, ended = code.select([s / 8 for s in a["score_B"].tolist()], a["logp_BV"] / 8, a["width"], a["end"])
    return {"live": live, "ended": ended}


def want_select(a, ref, at):
    live, ended = best_first([s / 8 for s in a["score_B"]], a["logp_BV"] / 8, a["width"], a["end"])
    return {"live": live, "ended": ended}


def best_first(scores, logp, width, end):
    every = sorted((-(score + x), beam, token) for beam, score in enumerate(scores) for token, x in enumerate(logp[beam]))
    lasting = [n for n, (_, _, token) in enumerate(every) if token != end][:width]
    last = lasting[-1] if len(lasting) == width else len(every)
    chosen = [[beam, token, float(-s)] for s, beam, token in every[: last + 1]]
    return [c for c in chosen if c[1] != end], [c for c in chosen if c[1] == end]


# --- the search


def inputs(draw, prompt, V, width, most, block):
    """Drawn until no two results are nearly equal: rounding orders nobody."""
    while True:
        a = {
            "R_VE": draw.ids(90, V, E) + 1,
            "W_EV": draw.ids(90, E, V) + 1,
            "prompt": draw.ids(V, prompt).tolist(),
            "width": width,
        }
        a |= {
            "end": int(draw.ids(V)),
            "most": most,
            "alpha": [0.6, 1.0, 2.0][int(draw.ids(3))] if most < 7 else 0.0,
            "block": block,
        }
        pairs = itertools.pairwise((score, len(new)) for new, score in found(a)[0])
        if not any(0 < abs(x - y) < 1e-6 or (x == y and m != n and a["alpha"]) for (x, m), (y, n) in pairs):
            return a


def found(a):
    """`searched`, remembered: inputs are drawn by it, and limits are what it counts."""
    plain = {name: x.tobytes() if isinstance(x, np.ndarray) else repr(x) for name, x in a.items()}
    key = repr(plain)
    if key not in FOUND:
        if len(FOUND) > 300:
            FOUND.clear()
        FOUND[key] = searched(a)
    return FOUND[key]


def searched(a):
    """All hypotheses, the best first, and the counts of who writes a row after every step."""
    counts, lists, P = Counter(), Lists(a["block"]), len(a["prompt"])
    model = Model(a, counts)
    for n in range(P):
        lists.write(0, n)
    live, done = [((), 0.0)], []
    for step in range(1, a["most"] + 1):
        texts = [[*a["prompt"], *new] for new, _ in live]
        logp = [model.logp(np.array([model.row(t, n) for n, t in enumerate(text)])) for text in texts]
        picked, ended = best_first([score for _, score in live], logp, a["width"], a["end"])
        done += [((*live[beam][0], token), score / step ** a["alpha"]) for beam, token, score in ended]
        lists.things = {n: list(lists.things[beam]) for n, (beam, _, _) in enumerate(picked)}
        live = [((*live[beam][0], token), score) for beam, token, score in picked]
        for n in range(len(live)):
            lists.write(n, P + step - 1)
        counts["written"] += len(live)
        if len(done) >= a["width"]:
            break
    else:
        done += [(new, score / a["most"] ** a["alpha"]) for new, score in live]
    best = sorted(enumerate(done), key=lambda h: (-h[1][1], h[0]))
    costs = {"rows computed": P + counts["written"], "beams looked at": counts["beams looked at"]}
    costs |= {"blocks taken": lists.taken, "blocks in use at once": lists.most}
    return [h for _, h in best], costs


def call_search(code, a, at):
    pool = Pool(a["block"], code.counts)
    args = (list(a["prompt"]), a["width"], a["end"], a["most"], a["alpha"])
    best = code.search(Model(a, code.counts), pool, *args)
    return {"tokens": [list(tokens) for tokens, _ in best], "score": np.array([score for _, score in best], float),
            "blocks held at the end": pool.in_use()}  # fmt: skip


def want_search(a, ref, at):
    best = found(a)[0][: a["width"]]
    return {
        "tokens": [list(new) for new, _ in best],
        "score": np.array([score for _, score in best]),
        "blocks held at the end": 0,
    }


SIZES = ((6, 9, 5, 2, 4), (5, 7, 3, 6, 3), (4, 5, 2, 5, 2), (1, 6, 4, 4, 3), (7, 4, 3, 1, 4), (3, 5, 1, 5, 2), (5, 3, 2, 7, 3))
PARTS = (
    Part("write, read, fork", ((3, 3, 30), (2, 4, 40), (4, 2, 25), (1, 3, 12)), acts, call_acts, want_acts, limits=limits_acts, dtypes=("float64",), changes=("table",),
         random_size=lambda rng: (int(rng.choice([2, 3, 4])), 4, int(rng.integers(20, 50)))),
    Part("select", ((3, 7, 3), (1, 5, 3), (4, 6, 2), (2, 3, 4), (1, 4, 5)), candidates, call_select, want_select, dtypes=("float64",),
         random_size=lambda rng: (int(rng.integers(1, 6)), int(rng.integers(4, 9)), int(rng.integers(1, 4)))),
    Part("search", SIZES, inputs, call_search, want_search, limits=lambda a, at: found(a)[1], dtypes=("float64",),
         random_size=lambda rng: tuple(int(rng.integers(*r)) for r in ((1, 8), (4, 9), (2, 5), (3, 8), (2, 5)))),
)  # fmt: skip

SHARED = "elif pool.users[table[place]] > 1:"
COPY = "        pool.rows[table[place]] = pool.rows[old]\n"
STOP = "if len(done) >= width or step + 1 == most:"
CHOSEN = "        chosen = ended if token == end else live\n        chosen.append("
LAST = "    if len(done) < width:\n        done += [(tokens, score / len(tokens) ** alpha) for score, tokens, _ in live]\n"
DROPS = "        for _, _, table in live:\n            for id in table:\n                pool.drop(id)\n"
ENDS = "    for _, _, table in live:\n        for id in table:\n            pool.drop(id)\n"
WRITE = "write(pool, table, length, model.row(tokens[-1], length))"
AFTER = "after = [(score, [*live[beam][1], token], fork(pool, live[beam][2])) for beam, token, score in picked]"
MISTAKES = (
    mistake("shared_written", "A block that other beams hold is written: their last tokens are this beam's now. Copy it first.", (SHARED, "elif False:")),
    mistake("always_copied", "A block is copied although nobody else holds it.", (SHARED, "elif pool.users[table[place]] >= 1:")),
    mistake("not_copied", "A new block takes the shared one's place, but the rows that were there are not copied.", (COPY, "")),
    mistake("old_kept", "The block that was copied still counts the writer's table.", ("        pool.drop(old)\n", "")),
    mistake("taken_early", "A block is taken when the last one is full: it comes with its first row.",
            ("    pool.rows[table[place], slot] = row_E\n",
             "    pool.rows[table[place], slot] = row_E\n    if slot + 1 == pool.block and place + 1 == len(table):\n        table.append(pool.take())\n")),
    mistake("exchanged", "// and % are exchanged: the block is position // block, the slot what remains.",
            ("place, slot = divmod(position, pool.block)", "slot, place = divmod(position, pool.block)"),
            ("np.array(table, int)[n_T // pool.block], n_T % pool.block", "np.array(table, int)[n_T % pool.block], n_T // pool.block")),
    mistake("whole_blocks", "The last block is read whole: behind the length lies what was never written.",
            ("n_T = np.arange(length)", "n_T = np.arange(len(table) * pool.block)")),
    mistake("not_shared", "fork does not count the new table: the blocks are dropped while it holds them.", ("    for id in table:\n        pool.share(id)\n    return", "    return")),
    mistake("same_list", "fork returns the same list: what one beam takes stands in the other's table, too.", ("return list(table)", "return table")),
    mistake("all_copied", "fork copies every block: sharing them costs nothing until somebody writes.",
            ("    for id in table:\n        pool.share(id)\n    return list(table)",
             "    mine = [pool.take() for _ in table]\n    for new, old in zip(mine, table):\n        pool.rows[new] = pool.rows[old]\n    return mine")),
    mistake("no_stop", "The search goes on although `width` hypotheses have ended.", (STOP, "if step + 1 == most:")),
    mistake("worst", "The worst candidates are chosen.", ("np.argsort(-score_BV,", "np.argsort(score_BV,")),
    mistake("ties_turned", "Of equal candidates the later comes first: an ascending sort that is turned round turns ties too.",
            ('np.argsort(-score_BV, axis=None, kind="stable")', 'np.argsort(score_BV, axis=None, kind="stable")[::-1]')),
    mistake("ties_by_token", "Of equal candidates the lower token comes first, whatever its beam: the lower beam does.",
            ('np.argsort(-score_BV, axis=None, kind="stable")', 'np.lexsort((np.indices(score_BV.shape)[1].ravel(), -score_BV.ravel()))')),
    mistake("no_history", "Candidates are compared by their last token alone: a beam's score is the sum of all its tokens'.",
            ("np.asarray(score_B)[:, None] + logp_BV", "0 * np.asarray(score_B)[:, None] + logp_BV")),
    mistake("probabilities", "Probabilities are added: a text's probability is their product, so their logarithms are.",
            ("np.asarray(score_B)[:, None] + logp_BV", "np.log(np.exp(np.asarray(score_B)[:, None]) + np.exp(logp_BV))")),
    mistake("one_a_beam", "Each beam is continued with its own best token: all beams' candidates compete, and one beam may have several of the best.",
            ("        beam, token = divmod", "        if any(beam == int(at) // score_BV.shape[1] for beam, token, _ in live if token != end):\n            continue\n        beam, token = divmod")),
    mistake("end_takes_place", "A hypothesis that ends takes a beam's place: there are `width` beams beside it.",
            ("if len(live) == width:", "if len(live) + len(ended) == width:")),
    mistake("end_ignored", "A token that ends the text is passed over: nothing ever ends.", (CHOSEN, "        if token == end:\n            continue\n        live.append(")),
    mistake("end_goes_on", "A beam goes on behind the token that ends it.", ("chosen = ended if token == end else live", "chosen = live")),
    mistake("ended_too_late", "Candidates that end count however bad they are: only those before the last live one do.",
            ("        if len(live) == width:\n            break\n", ""), (CHOSEN, "        if len(live) == width and token != end:\n            continue\n" + CHOSEN)),
    mistake("ended_behind", "What ends right behind the last live candidate counts, too: only what comes before it does.",
            ("        if len(live) == width:\n            break\n", ""), (CHOSEN, "        if len(live) == width and token != end:\n            break\n" + CHOSEN)),
    mistake("best_end_only", "A step ends one hypothesis at most here: every candidate that is good enough may end.",
            (CHOSEN, "        if token == end and ended:\n            continue\n" + CHOSEN)),
    mistake("many_prompts", "The prompt is there `width` times at first: the same candidates come from each, and all beams are alike.",
            ("    for step in range(most):\n", "    live += [(0.0, [], fork(pool, live[0][2])) for _ in range(width - 1)]\n    for step in range(most):\n")),
    mistake("no_penalty", "The score is the plain sum, which favours short texts: it is divided by the length ** alpha.",
            ("score / (step + 1) ** alpha", "score"), ("score / len(tokens) ** alpha", "score")),
    mistake("multiplied", "The score is multiplied by the length ** alpha: it is divided.",
            ("score / (step + 1) ** alpha", "score * (step + 1) ** alpha"), ("score / len(tokens) ** alpha", "score * len(tokens) ** alpha")),
    mistake("whole_length", "The length counts the prompt, too: new tokens count.",
            ("score / (step + 1) ** alpha", "score / (length + 1) ** alpha"), ("score / len(tokens) ** alpha", "score / (len(prompt) + len(tokens)) ** alpha")),
    mistake("end_not_counted", "The length does not count the token that ends: it is one of the new tokens.", ("score / (step + 1) ** alpha", "score / max(step, 1) ** alpha")),
    mistake("beams_not_divided", "Beams that are left at the end keep their plain sum: it is divided as the others'.", ("score / len(tokens) ** alpha", "score")),
    mistake("divided_each_step", "Scores are divided in every step: beams of a step are equally long and compete by their sums; what is finished is divided, once.",
            (AFTER, AFTER.replace("(score,", "(score / (step + 1) ** alpha,"))),
    mistake("divided_carried", "The score that is carried on is divided already, so that beams compete by what is divided again and again: carry the"
            " sums, and divide what is finished, once.",
            (AFTER, AFTER.replace("(score,", "(score / (step + 1) ** alpha,")), ("score / len(tokens) ** alpha", "score")),
    mistake("first_end", "The search stops with the first hypothesis that ends: it goes on until there are `width`.", ("len(done) >= width or", "done or")),
    mistake("beams_count_always", "Beams count as hypotheses although `width` have ended.", (LAST, LAST.replace("if len(done) < width", "if True"))),
    mistake("beams_never_count", "What has not ended is lost: without `width` that have, beams are hypotheses as they are.", (LAST, "")),
    mistake("no_end_token", "The token that ends a hypothesis is not among its tokens.", ("done.append(([*live[beam][1], token],", "done.append(([*live[beam][1]],")),
    mistake("unsorted", "The hypotheses stand in the order in which they ended: the best comes first.", ("sorted(done, key=lambda hypothesis: -hypothesis[1])", "done")),
    mistake("worst_first", "The worst hypothesis comes first.", ("key=lambda hypothesis: -hypothesis[1]", "key=lambda hypothesis: hypothesis[1]")),
    mistake("last_first", "Of hypotheses with equal scores the one that ended last comes first: an ascending order that is turned round turns ties too.",
            ("sorted(done, key=lambda hypothesis: -hypothesis[1])", "sorted(done, key=lambda hypothesis: hypothesis[1])[::-1]")),
    mistake("all_returned", "All hypotheses come back: the best `width` are asked for.", ("-hypothesis[1])[:width]", "-hypothesis[1])")),
    mistake("tokens_of_place", "The n-th new beam gets the n-th old one's tokens: it comes from the beam that select names.",
            (AFTER, AFTER.replace("live[beam][1]", "live[min(n, len(live) - 1)][1]").replace("for beam, token, score in picked", "for n, (beam, token, score) in enumerate(picked)"))),
    mistake("table_of_place", "The n-th new beam gets the n-th old one's cache: it comes from the beam that select names.",
            (AFTER, AFTER.replace("live[beam][2]", "live[min(n, len(live) - 1)][2]").replace("for beam, token, score in picked", "for n, (beam, token, score) in enumerate(picked)"))),
    mistake("position_off", "A new token's row is that of the next position.", (WRITE, WRITE.replace("tokens[-1], length", "tokens[-1], length + 1"))),
    mistake("position_of_answer", "Positions begin anew with the answer: they go on behind the prompt.", (WRITE, WRITE.replace("tokens[-1], length", "tokens[-1], step"))),
    mistake("all_rows_anew", "This is right, but every step computes all rows of a beam: those before are in the cache.",
            (WRITE, "rows = [model.row(token, n) for n, token in enumerate([*prompt, *tokens])]\n            write(pool, table, length, rows[-1])")),
    mistake("dropped_late", "This is right, but the beams of the step before hold their blocks until the new rows are written: blocks are copied that nobody needs.",
            (DROPS, "        before = live\n"), ("        live = after\n", "        live = after\n        dropped = [id for _, _, table in before for id in table]\n"),
            (f"        {STOP}\n            break\n", "        if len(done) >= width or step + 1 == most:\n            for id in dropped:\n                pool.drop(id)\n            break\n"),
            (f"            {WRITE}\n", f"            {WRITE}\n        for id in dropped:\n            pool.drop(id)\n")),
    mistake("never_dropped", "The beams of the step before are never dropped: their blocks stay in use.", (DROPS, "")),
    mistake("held_at_the_end", "At the end the last beams still hold their blocks.", (ENDS, "")),
)  # fmt: skip
