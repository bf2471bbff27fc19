"""With small objects: a plan walks over a ledger of free blocks and budget; preemption first, as often as needed."""

from collections import deque


def ceil(a, b):
    return (a + b - 1) // b


def step(state, slots, budget, block):
    out = {"finish": [], "decode": [], "preempt": [], "prefill": []}
    free, active = state["free"], deque()
    for r in state["running"]:
        if r["left"]:
            active.append(r)
        else:
            out["finish"].append(r["id"])
            free += r["blocks"]
    decoding = lambda r: r["tokens"] - r["computed"] == 1  # noqa: E731
    short = lambda: sum(decoding(r) and r["computed"] >= block * r["blocks"] for r in active)  # noqa: E731
    while short() > free:
        gone = active.pop()
        out["preempt"].append(gone["id"])
        free += gone["blocks"]
    free -= short()
    for r in active:
        if decoding(r):
            out["decode"].append(r["id"])
            budget -= 1
    for r in active:
        if not decoding(r) and budget:
            take = min(budget, r["tokens"] - r["computed"])
            out["prefill"].append((r["id"], take))
            budget -= take
    queue = deque() if out["preempt"] else deque(state["waiting"])
    while queue and budget and len(active) < slots and ceil(queue[0]["tokens"], block) <= free:
        r = queue.popleft()
        active.append(r)
        free -= ceil(r["tokens"], block)
        out["prefill"].append((r["id"], min(budget, r["tokens"])))
        budget -= out["prefill"][-1][1]
    return out


def commit(state, plan, block):
    ran = dict(plan["prefill"]) | dict.fromkeys(plan["decode"], 1)
    state = {"waiting": [], "running": [], "old": state, "free": state["free"]}
    for r in state["old"]["running"] + state["old"]["waiting"]:
        r = r.copy()
        if r["id"] in plan["finish"] or r["id"] in plan["preempt"]:
            state["free"] += r["blocks"]
            if r["id"] in plan["preempt"]:
                state["waiting"].append(r | {"blocks": 0, "computed": 0})
            continue
        if r["id"] in ran:
            more = max(0, ceil(r["tokens"], block) - r["blocks"])
            r["blocks"] += more
            state["free"] -= more
            r["computed"] += ran[r["id"]]
            if r["computed"] == r["tokens"]:
                r["tokens"], r["left"] = r["tokens"] + 1, r["left"] - 1
        state["waiting" if not r["blocks"] else "running"].append(r)
    del state["old"]
    return state
