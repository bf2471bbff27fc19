"""One step of continuous batching (Orca; vLLM, arXiv 2309.06180; prefill in chunks), as plain data.

state = {"waiting": [request, ...], "running": [...], "free": blocks}, both oldest first. A request is a dict: id, prompt, tokens
(known: prompt and generated), computed (of them, in the cache), blocks (held), left (tokens to come). A step, in this order:
  finish   who runs and has left 0; their slots and blocks can be used in this very step
  decode   who runs with computed = tokens - 1: one token each. Who has no room for it in its blocks takes one; while none is free
           the last of the running is preempted, be it the one that needs it
  prefill  the budget that decodes leave: who runs and does not decode, then who waits, in order, each as much as is left. A waiting
           one enters, and holds blocks for all its tokens from then on, if there are a slot, budget and these blocks; nobody
           overtakes, and nobody enters in a step that preempts
When all of its tokens are computed a request gets a new one. Change neither state nor plan.
"""


def step(state, slots, budget, block):
    """-> plan {"finish": [id], "decode": [id], "preempt": [id], "prefill": [[id, tokens]]}, each in the order of its making.

    `slots`: how many may run; `budget` >= slots: tokens a step; `block`: tokens a block.
    """
    # --- yours ---
    finish = [r["id"] for r in state["running"] if r["left"] == 0]
    free = state["free"] + sum(r["blocks"] for r in state["running"] if r["left"] == 0)
    running = [r for r in state["running"] if r["left"] > 0]
    decode, preempt, prefill = [], [], []
    for r in list(running):
        if r not in running or r["computed"] < r["tokens"] - 1:
            continue
        needs = r["blocks"] * block == r["computed"]
        while needs and free == 0 and r in running:
            last = running.pop()
            preempt.append(last["id"])
            free += last["blocks"]
        if r in running:
            free -= needs
            decode.append(r["id"])
    left = budget - len(decode)
    for r in running:
        n = min(left, r["tokens"] - r["computed"])
        if r["id"] not in decode and n > 0:
            prefill.append([r["id"], n])
            left -= n
    seats = slots - len(running)
    for r in state["waiting"]:
        needs = -(-r["tokens"] // block)
        if preempt or seats == 0 or left == 0 or needs > free:
            break
        n = min(left, r["tokens"])
        prefill.append([r["id"], n])
        left -= n
        free -= needs
        seats -= 1
    return {"finish": finish, "decode": decode, "preempt": preempt, "prefill": prefill}
    # --- end ---


def commit(state, plan, block):
    """-> the state after the step. Who is preempted waits again, before all others, with its tokens but without blocks."""
    # --- yours ---
    waiting = [dict(r) for r in state["waiting"]]
    running = [dict(r) for r in state["running"]]
    by_id = {r["id"]: r for r in waiting + running}
    free = state["free"]
    for id in plan["finish"]:
        running.remove(by_id[id])
        free += by_id[id]["blocks"]
    for id in plan["preempt"]:
        r = by_id[id]
        running.remove(r)
        waiting.insert(0, r)
        free += r["blocks"]
        r["blocks"] = r["computed"] = 0
    for id in plan["decode"]:
        r = by_id[id]
        if r["blocks"] * block == r["computed"]:
            r["blocks"] += 1
            free -= 1
        r["computed"] += 1
    for id, n in plan["prefill"]:
        r = by_id[id]
        if r in waiting:
            waiting.remove(r)
            running.append(r)
            r["blocks"] = -(-r["tokens"] // block)
            free -= r["blocks"]
        r["computed"] += n
    for r in running:
        if r["computed"] == r["tokens"]:
            r["tokens"] += 1
            r["left"] -= 1
    return {"waiting": waiting, "running": running, "free": free}
    # --- end ---
