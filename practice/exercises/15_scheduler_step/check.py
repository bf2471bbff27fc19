"""What is right in exercise 15 (by sums and prefixes instead of a walk, free blocks by conservation), and what is often wrong."""

import copy
import heapq

import numpy as np

from practice.part import Part, mistake

MANY = 3000


# --- the truth, written another way


def blocks_for(tokens, block):
    return len(range(0, tokens, block))


def decodes(r):
    return r["computed"] == r["tokens"] - 1


def longest(*conditions):
    """Length of the longest prefix on which all of these hold."""
    holds = np.logical_and.reduce(conditions)
    return int(np.logical_and.accumulate(holds).sum())


def right_step(state, slots, budget, block):
    done = [r for r in state["running"] if not r["left"]]
    stay = [r for r in state["running"] if r["left"]]
    free = state["free"] + sum(r["blocks"] for r in done)

    def balance(kept):
        """Free blocks after the decodes, if only the first `kept` stay."""
        given_back = sum(r["blocks"] for r in stay[kept:])
        return free + given_back - sum(decodes(r) and blocks_for(r["tokens"], block) > r["blocks"] for r in stay[:kept])

    kept = max(n for n in range(len(stay) + 1) if balance(n) >= 0)
    decode = [r["id"] for r in stay[:kept] if decodes(r)]
    under_way = [r for r in stay[:kept] if not decodes(r)]
    left, waiting = budget - len(decode), state["waiting"] if kept == len(stay) else []
    wanted = np.array([r["tokens"] - r["computed"] for r in under_way + waiting], int)
    before = np.cumsum(wanted) - wanted
    first = len(under_way)
    needed = np.cumsum([blocks_for(r["tokens"], block) for r in waiting])
    entering = longest(before[first:] < left, needed <= balance(kept), np.arange(len(waiting)) < slots - kept)
    amounts = np.minimum(wanted, np.maximum(0, left - before))[: first + entering].tolist()
    prefill = [[r["id"], n] for r, n in zip(under_way + waiting, amounts, strict=False) if n]
    return {
        "finish": [r["id"] for r in done],
        "decode": decode,
        "preempt": [r["id"] for r in stay[kept:]][::-1],
        "prefill": prefill,
    }


def right_commit(state, plan, block):
    amounts = dict(map(tuple, plan["prefill"])) | dict.fromkeys(plan["decode"], 1)

    def after(r):
        if r["id"] in plan["preempt"]:
            return r | {"computed": 0, "blocks": 0}
        computed = r["computed"] + amounts.get(r["id"], 0)
        enough = blocks_for(r["tokens"], block) if r["id"] in amounts else 0
        new = computed == r["tokens"]
        return r | {
            "computed": computed,
            "blocks": max(r["blocks"], enough),
            "tokens": r["tokens"] + new,
            "left": r["left"] - new,
        }

    old = state["running"] + state["waiting"]
    gone = [*plan["finish"], *plan["preempt"]]
    preempted = [after(r) for r in state["running"] if r["id"] in plan["preempt"]]
    waiting = preempted + [r for r in state["waiting"] if r["id"] not in amounts]
    running = [after(r) for r in state["running"] if r["id"] not in gone] + [
        after(r) for r in state["waiting"] if r["id"] in amounts
    ]
    total = state["free"] + sum(r["blocks"] for r in old)
    return {"waiting": waiting, "running": running, "free": total - sum(r["blocks"] for r in running)}


# --- single steps


def states(draw, running, waiting, slots, budget, block):
    """Eight states of all kinds: with blocks scarce and plenty, with requests that finish, decode and are at their prompts."""

    def request(kind):
        prompt = int(draw.rng.integers(1, 4 * block))
        generated = int(draw.rng.integers(0, 2 * block)) if kind == "waits" and draw.rng.random() < 0.3 else 0
        if kind in ("decodes", "is done"):
            # Every other one stands at the end of a block.
            tokens = (
                int(draw.rng.integers(1, 4)) * block + 1
                if draw.rng.random() < 0.6
                else prompt + int(draw.rng.integers(1, 2 * block))
            )
            prompt = min(prompt, tokens - 1)
            computed, blocks = (
                tokens - 1,
                blocks_for(tokens - 1, block) + (draw.rng.random() < 0.2 and (tokens - 1) % block == 0),
            )
        else:
            prompt += 2
            tokens = prompt + generated
            computed = int(draw.rng.integers(0, tokens - 1)) if kind == "is at its prompt" else 0
            blocks = 0 if kind == "waits" else blocks_for(tokens, block)
        left = 0 if kind == "is done" else int(draw.rng.integers(1, 9))
        return {"id": 0, "prompt": prompt, "tokens": tokens, "computed": computed, "blocks": int(blocks), "left": left}

    found = []
    for n in range(8):
        kinds = draw.rng.choice(["decodes", "is at its prompt", "is done"], running, p=[0.65, 0.2, 0.15])
        some = [request(k) for k in kinds] + [request("waits") for _ in range(waiting)]
        for id, r in zip(draw.rng.permutation(100)[: len(some)].tolist(), some, strict=True):
            r["id"] = id
        if n == 6:
            # Nothing is free, and all stand at the end of their one block: of two each second gives way to the other.
            for r in some[:running]:
                r |= {"prompt": block, "tokens": block + 1, "computed": block, "blocks": 1, "left": max(1, r["left"])}
        free = 0 if n == 6 else int(draw.rng.integers(0, 3) if n % 2 else draw.rng.integers(0, 3 * (waiting + 1)))
        found.append({"waiting": some[running:], "running": some[:running], "free": free})
    return {"states": found, "slots": slots, "budget": budget, "block": block}


def told(state, plan=None):
    """The state in a few lines, for what is said of a wrong plan."""
    fields = ("tokens", "computed", "blocks", "left")
    lines = [
        f"{name} {r['id']}: " + ", ".join(f"{n} {r[n]}" for n in fields) for name in ("running", "waiting") for r in state[name]
    ]
    last = [f"plan {plan}", "state after it"] if plan else ["plan"]
    return "\n".join([*lines, f"free blocks: {state['free']}", *last])


def call_step(code, a, at):
    found = {}
    for state in a["states"]:
        given = copy.deepcopy(state)
        plan = code.step(given, a["slots"], a["budget"], a["block"])
        found[told(state)] = {n: plan[n] for n in ("finish", "decode", "preempt", "prefill")}
        found[told(state) + ": state left alone"] = given == state
    return found


def want_step(a, ref, at):
    found = {}
    for state in a["states"]:
        found[told(state)] = right_step(state, a["slots"], a["budget"], a["block"])
        found[told(state) + ": state left alone"] = True
    return found


def call_commit(code, a, at):
    found = {}
    for state in a["states"]:
        plan = right_step(state, a["slots"], a["budget"], a["block"])
        given = copy.deepcopy([state, plan])
        after = code.commit(*given, a["block"])
        found[told(state, plan)] = {n: after[n] for n in ("free", "running", "waiting")}
        found[told(state, plan) + ": arguments left alone"] = given == [state, plan]
    return found


def want_commit(a, ref, at):
    found = {}
    for state in a["states"]:
        plan = right_step(state, a["slots"], a["budget"], a["block"])
        after = right_commit(state, plan, a["block"])
        found[told(state, plan)] = {n: after[n] for n in ("free", "running", "waiting")}
        found[told(state, plan) + ": arguments left alone"] = True
    return found


# --- whole workloads


def workload(draw, requests, slots, budget, block, blocks):
    """Each request fits into the pool alone; some prompts are longer than the budget."""
    most = block * blocks
    prompts = draw.rng.integers(1, min(25, most - 8), requests).tolist()
    return {"prompts": prompts, "max_tokens": draw.rng.integers(1, 9, requests).tolist(), "slots": slots, "budget": budget,
            "block": block, "blocks": blocks}  # fmt: skip


def run(a, step, commit):
    """Step by step until all are done; what came of it."""
    todo = enumerate(zip(a["prompts"], a["max_tokens"], strict=True))
    waiting = [{"id": n, "prompt": p, "tokens": p, "computed": 0, "blocks": 0, "left": m} for n, (p, m) in todo]
    state, steps, largest, preempted, last = {"waiting": waiting, "running": [], "free": a["blocks"]}, 0, 0, 0, {}
    while (state["waiting"] or state["running"]) and steps < MANY:
        plan = step(state, a["slots"], a["budget"], a["block"])
        state = commit(state, plan, a["block"])
        steps += 1
        largest = max(largest, len(plan["decode"]) + sum(n for _, n in plan["prefill"]))
        preempted += len(plan["preempt"])
        last |= {r["id"]: r["tokens"] - r["prompt"] for r in [*state["waiting"], *state["running"]]}
    return {"steps": steps if steps < MANY else "without end", "tokens of each request": [last.get(n) for n in range(len(a["prompts"]))],
            "free blocks in the end": state["free"], "preemptions": preempted, "largest step": largest}  # fmt: skip


def call_run(code, a, at):
    return run(a, code.step, code.commit)


def want_run(a, ref, at):
    found = run(a, right_step, right_commit)
    if (
        found["tokens of each request"] != a["max_tokens"]
        or found["free blocks in the end"] != a["blocks"]
        or found["largest step"] > a["budget"]
    ):
        raise AssertionError(f"the truth is wrong: {found}")
    return found


def call_plenty(code, a, at):
    return {n: x for n, x in run(a, code.step, code.commit).items() if n in ("steps", "tokens of each request")}


def want_plenty(a, ref, at):
    """With budget and blocks for all, requests go one after another to whichever slot is free first, for as many steps as tokens."""
    busy = [0] * a["slots"]
    for steps in a["max_tokens"]:
        heapq.heappush(busy, heapq.heappop(busy) + steps)
    return {"steps": max(busy) + 1, "tokens of each request": a["max_tokens"]}


def random_state(rng):
    slots = int(rng.integers(1, 7))
    return (
        int(rng.integers(0, slots + 1)),
        int(rng.integers(0, 5)),
        slots,
        slots + int(rng.integers(0, 20)),
        int(rng.choice([2, 3, 4])),
    )


def random_load(rng):
    slots = int(rng.integers(2, 6))
    return (
        int(rng.integers(3, 12)),
        slots,
        slots + int(rng.integers(0, 10)),
        int(rng.choice([2, 3, 4])),
        int(rng.integers(11, 16)),
    )


STATES = ((2, 1, 3, 11, 3), (3, 3, 5, 9, 4), (5, 4, 6, 23, 3), (0, 5, 3, 60, 4), (4, 2, 4, 11, 2), (7, 0, 8, 11, 2))
ONLY = ("float64",)
PARTS = (
    Part("step", STATES, states, call_step, want_step, random_size=random_state, dtypes=ONLY),
    Part("commit", STATES, states, call_commit, want_commit, random_size=random_state, dtypes=ONLY),
    Part("a workload, all plenty", ((5, 2, 999, 4, 999), (16, 4, 999, 4, 999)), workload, call_plenty, want_plenty, dtypes=ONLY,
         random_size=lambda rng: (int(rng.integers(1, 20)), int(rng.integers(1, 6)), 999, 3, 999)),
    Part("a workload, all scarce", ((4, 3, 5, 3, 11), (9, 4, 7, 4, 9)), workload, call_run, want_run, dtypes=ONLY, random_size=random_load),
)  # fmt: skip

STOP = "if preempt or seats == 0 or left == 0 or needs > free:"
MISTAKES = (
    mistake("static", "Nobody enters before all of the running are through: that is static batching (808 steps where 586 are enough).",
            (STOP, "if running or preempt or seats == 0 or left == 0 or needs > free:")),
    mistake("long_prompt", "A prompt longer than what is left of the budget does not start: it may wait for ever. Cut it.",
            (STOP, STOP.replace("left == 0", "left < r[\"tokens\"]")), seen="gittensor-ai-lab/sparkinfer #217"),
    mistake("over_budget", "A prompt is not cut to what is left of the budget.", ("n = min(left, r[\"tokens\"])", "n = r[\"tokens\"]")),
    mistake("decodes_free", "Decodes are not counted: they come out of the same budget as prompts.", ("left = budget - len(decode)", "left = budget")),
    mistake("oldest_preempted", "The oldest request is preempted: take the youngest, the last of the running, so that somebody always gets through.",
            ("last = running.pop()", "last = running.pop(0)")),
    mistake("preempted_turned", "Of several that are preempted the first to go stands last in the plan: each list is in the order of its making.",
            ("preempt.append(last[\"id\"])", "preempt.insert(0, last[\"id\"])")),
    mistake("own_victim", "Who needs a block while none is free is preempted itself: it is the last of the running that goes, whoever needs it.",
            ("last = running.pop()\n", "last = r\n            running.remove(r)\n")),
    mistake("blocks_kept", "The blocks of a preempted request are not counted as free in this step.", ("            free += last[\"blocks\"]\n", "            free += 1\n")),
    mistake("self_spared", "A request that needs a block and is the last of the running itself must give way as well.",
            ("while needs and free == 0 and r in running:", "while needs and free == 0 and running[-1] is not r:")),
    mistake("self_spared_waits", "A request that needs a block and is the last of the running itself must give way as well: it is preempted,"
            " and does not wait as it is.",
            ("while needs and free == 0 and r in running:", "while needs and free == 0 and running[-1] is not r:"),
            ("        if r in running:\n", "        if free or not needs:\n"),
            ("if r[\"id\"] not in decode and n > 0:", "if r[\"id\"] not in decode and n > 0 and r[\"computed\"] < r[\"tokens\"] - 1:")),
    mistake("other_victim", "A request that needs a block is never its own victim here: if it is the last of the running it is preempted itself,"
            " and no other that does not decode.",
            ("            last = running.pop()\n",
             "            others = [x for x in running if x is not r and x['id'] not in decode]\n"
             "            if not others:\n                break\n            last = others[-1]\n            running.remove(last)\n"),
            ("        if r in running:\n", "        if r in running and (free or not needs):\n"),
            ("if r[\"id\"] not in decode and n > 0:", "if r[\"id\"] not in decode and n > 0 and r[\"computed\"] < r[\"tokens\"] - 1:")),
    mistake("enters_after_preemption", "Somebody enters in a step that preempts: they take each other's blocks without end.",
            (STOP, STOP.replace("preempt or ", "")), seen="vllm-project/vllm #25538"),
    mistake("seat_next_step", "The slots of those that finish are used only in the next step: admission is late by one.",
            ("seats = slots - len(running)", "seats = slots - len(running) - len(finish)")),
    mistake("finished_blocks_late", "The blocks of those that finish are used only in the next step.",
            ('state["free"] + sum(r["blocks"] for r in state["running"] if r["left"] == 0)', 'state["free"]')),
    mistake("overtaking", "Who does not fit is overtaken by those behind it: a long prompt may then wait for ever.",
            (STOP + "\n            break", STOP + "\n            continue")),
    mistake("same_blocks_twice", "All who enter in a step are promised the same free blocks: take off what each gets.", ("        free -= needs\n        seats", "        seats")),
    mistake("decode_blocks_forgotten", "The blocks that decodes take in this step are promised to those who enter as well.", ("            free -= needs\n            decode", "            decode")),
    mistake("rounded_down", "Blocks are rounded down: 17 tokens need 2 blocks of 16.",
            ('needs = -(-r["tokens"] // block)', 'needs = r["tokens"] // block')),
    mistake("one_block_early", "A decode takes a block before its last one is full.",
            ('needs = r["blocks"] * block == r["computed"]', 'needs = r["blocks"] * block <= r["computed"] + 1')),
    mistake("one_block_early_commit", "A decode takes a block before its last one is full.",
            ('        if r["blocks"] * block == r["computed"]:', '        if r["blocks"] * block <= r["computed"] + 1:')),
    mistake("under_way_forgotten", "A prompt of which a part is computed never goes on: who runs and does not decode needs prefill.",
            ('if r["id"] not in decode and n > 0:', "if False:")),
    mistake("no_slots", "More run than there are slots.", ("preempt or seats == 0 or", "preempt or")),
    mistake("finish_leaks", "The blocks of those that finish are not given back: the pool leaks.",
            ('        free += by_id[id]["blocks"]\n', "")),
    mistake("preempt_leaks", "The blocks of those that are preempted are not given back: the pool leaks.",
            ('        free += r["blocks"]\n', "")),
    mistake("outputs_lost", "Who is preempted loses the tokens it got: they are known, and are computed again with the prompt.",
            ('r["blocks"] = r["computed"] = 0', 'r["blocks"] = r["computed"] = 0\n        r["tokens"] = r["prompt"]'), seen="PaddlePaddle/FastDeploy #3080"),
    mistake("computed_kept", "Who is preempted keeps `computed`: its blocks are gone, and the cache with them.",
            ('r["blocks"] = r["computed"] = 0', 'r["blocks"] = 0')),
    mistake("to_the_end", "Who is preempted goes to the end of the queue: it came before all that wait.",
            ("waiting.insert(0, r)", "waiting.append(r)")),
    mistake("token_a_chunk", "Each chunk of a prompt brings a new token: only the one that completes it does.",
            ('        r["computed"] += n\n', '        r["computed"] += n\n        if r["computed"] < r["tokens"]:\n            r["tokens"] += 1\n            r["left"] -= 1\n')),
    mistake("no_first_token", "The step that completes a prompt brings no token: its last position's logits are the first token.",
            ('if r["computed"] == r["tokens"]:', 'if r["id"] in plan["decode"]:')),
    mistake("chunk_blocks", "A request gets blocks for its first chunk only: it has those for all its tokens from the start.",
            ('r["blocks"] = -(-r["tokens"] // block)', 'r["blocks"] = -(-n // block)')),
    mistake("in_place", "The state is changed in place: work on copies of the requests.",
            ('running = [dict(r) for r in state["running"]]', 'running = list(state["running"])')),
    mistake("order_of_preemption", "Several that are preempted wait again in the order in which they went, the youngest first: the"
            " oldest of them was before the others, and is again.",
            ("waiting.insert(0, r)", 'waiting.insert(plan["preempt"].index(id), r)')),
    mistake("room_for_a_chunk", "Who enters needs blocks for its first chunk only: it holds those for all its tokens from the start.",
            ('needs = -(-r["tokens"] // block)', 'needs = -(-min(left, r["tokens"]) // block)')),
    mistake("to_the_end_in_order", "Who is preempted goes to the end of the queue: it came before all that wait.",
            ('    for id in plan["preempt"]:\n        r = by_id[id]', '    for id in plan["preempt"][::-1]:\n        r = by_id[id]'),
            ("waiting.insert(0, r)", "waiting.append(r)")),
)  # fmt: skip
