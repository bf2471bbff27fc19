"""What is right in exercise 29 (a simulation in ticks; gradients by complex step), and what is often wrong."""

import numpy as np

from practice.part import Part, mistake


def numbers(draw, stages, m):
    return {"stages": stages, "m": m}


def plan(code, a, pipe):
    found = code.schedule(pipe.rank % a["stages"], a["stages"], a["m"])
    return {"plan": [[str(kind), int(i)] for kind, i in found]}


def want_plan(a, ref, pipe):
    """In ticks: a stage does a backward if it can, else a forward if it may have one more in flight."""
    p, m = a["stages"], a["m"]
    done = [{"F": [], "B": []} for _ in range(p)]
    plans = [[] for _ in range(p)]
    while any(len(d["B"]) < m for d in done):
        before = [{k: len(v) for k, v in d.items()} for d in done]
        for s in range(p):
            f, b = before[s]["F"], before[s]["B"]
            may_back = b < (before[s + 1]["B"] if s + 1 < p else f)
            may_go = f < m and f - b < p - s and (s == 0 or f < before[s - 1]["F"])
            kind = "B" if may_back else "F" if may_go else None
            if kind:
                plans[s].append([kind, len(done[s][kind])])
                done[s][kind].append(True)
    return {"plan": plans[pipe.rank % p]}


def batches(draw, T, D, m, ranks):
    return {"W_pDD": draw(ranks, D, D), "x_mTD": draw(m, T, D), "target_mTD": draw(m, T, D)}


def run(code, a, pipe):
    m = len(a["x_mTD"])
    xs = list(a["x_mTD"]) if pipe.rank == 0 else None
    targets = list(a["target_mTD"]) if pipe.rank == pipe.size - 1 else None
    with code.noting("forward", "backward") as order:
        dW = code.run(a["W_pDD"][pipe.rank], xs, targets, m, pipe)
    done = ["F" if name == "forward" else "B" for name in order]
    return {"dW": dW, "order of work": " ".join(done) if done.count("F") == done.count("B") == m else talked(m, pipe)}


def talked(m, pipe):
    """The order of work as the messages have it, where `forward` and `backward` were not called: what goes on, what comes back.

    A message may be taken one piece of work early: an order within that of the right one counts as right.
    """
    s, work = pipe.rank, []
    onward = s + 1 < pipe.size
    for to, source in pipe.talk:
        if onward:
            work += ["F"] * (to == s + 1) + ["B"] * (source == s + 1)
        else:
            work += ["B"] * (to == s - 1) + ["F"] * (source == s - 1)
    ahead = np.cumsum([1 if kind == "F" else -1 for kind in work])
    before = work.index("B") if "B" in work else 0
    most = pipe.size - s
    near = work.count("F") == work.count("B") == m and ahead.max() <= most + 1 and before >= min(m, most)
    return want_order(m, pipe) if near else " ".join(work)


def want_order(m, pipe):
    """By counting: a stage is at most p - s forwards ahead of its backwards, and goes on as far as it may."""
    work, forwards, backwards = [], 0, 0
    while backwards < m:
        ahead = forwards < m and forwards - backwards < pipe.size - pipe.rank
        work.append("F" if ahead else "B")
        forwards, backwards = forwards + ahead, backwards + (not ahead)
    return " ".join(work)


def want_run(a, ref, pipe):
    def loss(moved, name, index):
        y = a["x_mTD"]
        for W in moved["W"]:
            y = np.tanh(y @ W)
        return ((y - a["target_mTD"]) ** 2).sum() / 2 / len(y)

    own = [np.array([pipe.rank]), *(np.arange(n) for n in a["W_pDD"].shape[1:])]
    dW = ref.gradient.at_entries(loss, {"W": a["W_pDD"]}, "W", own)[0]
    return {"dW": dW, "order of work": want_order(len(a["x_mTD"]), pipe)}


def terms(a, ref, pipe):
    """The gradient is the mean of the micro-batches' own: one term each."""
    m = len(a["x_mTD"])
    each = [{**a, "x_mTD": a["x_mTD"][i : i + 1], "target_mTD": a["target_mTD"][i : i + 1]} for i in range(m)]
    return {"dW": {f"micro-batch {i}": want_run(one, ref, pipe)["dW"] / m for i, one in enumerate(each)}}


def limits(a, pipe):
    m, T, D = a["x_mTD"].shape
    neighbours = (pipe.rank > 0) + (pipe.rank < pipe.size - 1)
    return {"messages": m * neighbours, "numbers sent": m * neighbours * T * D, "largest message": T * D}


def random_plan(rng):
    return int(rng.integers(1, 7)), int(rng.integers(1, 9))


def random_run(rng):
    return int(rng.choice([2, 3, 5])), int(rng.choice([3, 4])), int(rng.integers(1, 8)), 4


PARTS = (
    Part(
        "schedule",
        ((4, 6), (4, 2), (3, 7), (4, 1), (5, 4)),
        numbers,
        plan,
        want_plan,
        random_size=random_plan,
        dtypes=("float64",),
    ),
    Part(
        "run",
        ((3, 2, 6, 4), (2, 3, 2, 4), (3, 4, 1, 4), (2, 3, 4, 4)),
        batches,
        run,
        want_run,
        terms,
        limits,
        random_size=random_run,
    ),
)

WARM = "first = min(stages - 1 - stage, m)"
MISTAKES = (
    mistake("runs_gpipe", "`run` does all forwards, then all backwards (GPipe), whatever the schedule says: it is to do what the schedule has.",
            ("plan = schedule(s, pipe.size, m)", "plan = [(\"F\", i) for i in range(m)] + [(\"B\", i) for i in range(m)]")),
    mistake("gpipe", "All forwards come first (GPipe): m micro-batches are in flight. 1F1B begins backwards as soon as they can come,"
            " and keeps at most p - s.", (WARM, "first = m")),
    mistake("one_more", "One forward too many before the first backward: after its own next forward, p - 1 - s of warming up are enough.",
            (WARM, "first = min(stages - stage, m)")),
    mistake("one_less", "One forward too few before the first backward: the stage idles until the gradient has come back.",
            (WARM, "first = min(max(stages - 2 - stage, 0), m)")),
    mistake("wrong_end", "The warming up grows towards the last stage: it is the first one that waits longest for a gradient.",
            (WARM, "first = min(stage, m)")),
    mistake("few_micro_batches", "With fewer micro-batches than stages the warming up runs past the last one: it is at most m.",
            (WARM, "first = stages - 1 - stage"), ("range(m - first, m)", "range(max(m - first, 0), m)"), seen="pytorch/torchtitan #775"),
    mistake("no_end", "The backwards of the last micro-batches are missing: those that were ahead are still in flight at the end.",
            ("return plan + [(\"B\", i) for i in range(m - first, m)]", "return plan")),
    mistake("last_first", "The last backwards go from the newest to the oldest: the next stage sends gradients in order.",
            ("for i in range(m - first, m)]", "for i in range(m - 1, m - first - 1, -1)]")),
    mistake("one_by_one", "`run` takes each micro-batch forward and back before the next one starts: there is no pipeline, the stages wait in turn.",
            ("plan = schedule(s, pipe.size, m)", "plan = [(kind, i) for i in range(m) for kind in \"FB\"]")),
    mistake("send_then_receive", "Both neighbours send before they receive: one a result onwards, the other a gradient back. Exchange them"
            " in one call.",
            ("came[\"B\"] = pipe.sendrecv(s + 1, y, s + 1)", "pipe.send(s + 1, y)\n                came[\"B\"] = pipe.recv(s + 1)"),
            ("came[\"F\"] = pipe.sendrecv(s - 1, dx, s - 1)", "pipe.send(s - 1, dx)\n                came[\"F\"] = pipe.recv(s - 1)"),
            seen="pytorch/pytorch #172668"),
    mistake("newest_saved", "Backward takes what the newest forward saved: it belongs to another micro-batch.",
            ("saved.pop(i)", "saved[max(saved)]")),
    mistake("last_in_first_out", "Backward takes what the newest forward saved, last in, first out: micro-batches go back in the order in which"
            " they came.", ("saved.pop(i)", "saved.pop(max(saved))")),
    mistake("target_from_y", "The target is taken away from the last stage's y in place: `saved` holds this y, and backward reads it.",
            ("                dys[i] = (y - targets[i]) / m\n", "                y -= targets[i]\n                dys[i] = y / m\n")),
    mistake("target_from_y_divided", "The last stage's y is overwritten with its gradient, (y - target) / m: `saved` holds this y, and"
            " backward reads it.", ("                dys[i] = (y - targets[i]) / m\n",
            "                y -= targets[i]\n                y /= m\n                dys[i] = y\n")),
    mistake("no_half", "The gradient of sum((y - target)^2) / 2 is y - target: the half takes the 2 away.",
            ("(y - targets[i]) / m", "2 * (y - targets[i]) / m")),
    mistake("overwritten", "The gradient is that of the last micro-batch: each one replaces those before instead of being added.",
            ("dW_DD += dW", "dW_DD = dW")),
    mistake("sum", "The micro-batches' losses are summed: the mean over m is asked for.", ("(y - targets[i]) / m", "y - targets[i]")),
    mistake("by_stages", "The gradient is divided by the stages: they are parts of one function, the mean is over micro-batches.",
            ("    return dW_DD", "    return dW_DD / pipe.size")),
    mistake("first_target", "Every micro-batch is compared with the first one's target.", ("targets[i]", "targets[0]")),
    mistake("dy_passed_on", "dy goes back through the stages unchanged: pass on dx.",
            ("pipe.sendrecv(s - 1, dx, s - 1)", "pipe.sendrecv(s - 1, dy, s - 1)"), ("pipe.send(s - 1, dx)", "pipe.send(s - 1, dy)")),
    mistake("sign", "The loss's gradient has the wrong sign: y - target.", ("(y - targets[i])", "(targets[i] - y)")),
)  # fmt: skip
