"""The plan by indices: how many of the running stay is counted down; commit on a deep copy."""

from copy import deepcopy


def step(state, slots, budget, block):
    run = [r for r in state["running"] if r["left"] != 0]
    room = state["free"]
    for r in state["running"]:
        room += r["blocks"] if r["left"] == 0 else 0
    ready = [r["computed"] + 1 == r["tokens"] for r in run]
    full = [ok and r["computed"] == r["blocks"] * block for ok, r in zip(ready, run, strict=True)]
    stay = len(run)
    while sum(full[:stay]) > room:
        stay -= 1
        room += run[stay]["blocks"]
    room -= sum(full[:stay])
    plan = {"finish": [r["id"] for r in state["running"] if r["left"] == 0]}
    plan["decode"] = [r["id"] for ok, r in zip(ready[:stay], run[:stay], strict=True) if ok]
    plan["preempt"] = [r["id"] for r in reversed(run[stay:])]
    plan["prefill"] = []
    tokens = budget - len(plan["decode"])
    jobs = [(r, 0) for ok, r in zip(ready[:stay], run[:stay], strict=True) if not ok]
    if stay == len(run):
        jobs += [(r, 1) for r in state["waiting"]]
    for r, enters in jobs:
        price = enters * -(-r["tokens"] // block)
        if tokens == 0 or (enters and (stay == slots or price > room)):
            break
        n = min(tokens, r["tokens"] - r["computed"])
        plan["prefill"].append([r["id"], n])
        tokens, room, stay = tokens - n, room - price, stay + enters
    return plan


def commit(state, plan, block):
    state = deepcopy(state)
    find = lambda id: next(r for k in ("running", "waiting") for r in state[k] if r["id"] == id)  # noqa: E731
    for id in plan["finish"] + plan["preempt"]:
        r = find(id)
        state["running"].remove(r)
        state["free"] += r["blocks"]
        if id in plan["preempt"]:
            r.update(blocks=0, computed=0)
            state["waiting"] = [r, *state["waiting"]]
    for id, n in [(id, 1) for id in plan["decode"]] + [tuple(x) for x in plan["prefill"]]:
        r = find(id)
        if r in state["waiting"]:
            state["waiting"].remove(r)
            state["running"].append(r)
        while r["blocks"] * block < r["tokens"]:
            r["blocks"] += 1
            state["free"] -= 1
        r["computed"] += n
        if r["computed"] == r["tokens"]:
            r["tokens"] += 1
            r["left"] -= 1
    return state
