"""What is right in exercise 11 (lists of tokens, and blocks as things that lists hold), and what is often wrong."""

import contextlib

import numpy as np

from practice.part import Part, mistake

K, E = 2, 3


# --- the counts alone


def handles(draw, blocks, steps):
    """A script of alloc, share and free on what was allocated 1st, 2nd, ...; what is freed for good is tried once more."""
    script, held = [], []
    for _ in range(steps):
        live = [n for n, users in enumerate(held) if users]
        act = draw.rng.choice(["alloc", "share", "free", "free"]) if live else "alloc"
        which = int(draw.rng.choice(live)) if act != "alloc" else len(held)
        script.append([str(act), which])
        if act == "alloc":
            held += [1] if len(live) < blocks else []
        else:
            held[which] += 1 if act == "share" else -1
            if not held[which]:
                script += [["free", which], ["share", which]]
    return {"script": script, "blocks": blocks}


def call_handles(code, a, at):
    pool, ids, users, raised = code.Pool(a["blocks"], 4, K, E, np.float64), [], [], []
    for n, (act, which) in enumerate(a["script"]):
        try:
            if act == "alloc":
                ids.append(int(pool.alloc()))
            elif which >= len(ids):
                raised.append([n, act, "alloc has failed before"])
            else:
                getattr(pool, act)(ids[which])
        except (MemoryError, ValueError) as error:
            raised.append([n, act, type(error).__name__])
        users.append(sorted(n for n in pool.users if n))
    return {"users of the blocks in use, after each act": users, "raised": raised}


def want_handles(a, ref, at):
    held, users, raised = [], [], []
    for n, (act, which) in enumerate(a["script"]):
        if act == "alloc" and sum(map(bool, held)) == a["blocks"]:
            raised.append([n, act, "MemoryError"])
        elif act == "alloc":
            held.append(1)
        elif not held[which]:
            raised.append([n, act, "ValueError"])
        else:
            held[which] += {"share": 1, "free": -1}[act]
        users.append(sorted(n for n in held if n))
    return {"users of the blocks in use, after each act": users, "raised": raised}


# --- sequences


def scripted(acts):
    """Inputs of a part: acts on sequences, chosen among `acts`, and a token's k and v for each write."""

    def inputs(draw, blocks, block, sequences, steps):
        script, length = [], {}
        for _ in range(steps):
            act = str(draw.rng.choice(acts))
            if act == "fork" and length and len(length) < sequences:
                parent, child = int(draw.rng.choice(list(length))), min(set(range(sequences)) - set(length))
                script.append(["fork", parent, child])
                length[child] = length[parent]
            elif act == "end" and len(length) > 1:
                script.append(["end", int(draw.rng.choice(list(length))), 0])
                del length[script[-1][1]]
            elif act == "rewrite" and any(length.values()):
                s = int(draw.rng.choice([s for s in length if length[s]]))
                script.append(["write", s, int(draw.rng.integers(length[s]))])
            else:
                s = int(draw.rng.integers(sequences))
                if s not in length and "fork" in acts and length:
                    s = int(draw.rng.choice(list(length)))
                script.append(["write", s, length.setdefault(s, 0)])
                length[s] += 1
        return {"k_NKE": draw(steps, K, E), "v_NKE": draw(steps, K, E), "script": script, "blocks": blocks, "block": block}

    return inputs


def told(a):
    """The acts in one line, for what is said of a wrong count."""
    names = {"fork": "{0}>{1}", "end": "end {0}", "write": "{0}[{1}]"}
    acts = ", ".join(names[act].format(s, other) for act, s, other in a["script"])
    return f"writes s[position], forks s>new: {acts}\nblocks in use"


def call(code, a, at):
    """A write for which there is no block is left out, and so are that sequence's next."""
    k, v = a["k_NKE"], a["v_NKE"]
    pool, tables, length, in_use, full = code.Pool(a["blocks"], a["block"], K, E, k.dtype), {}, {}, [], []
    for n, (act, s, other) in enumerate(a["script"]):
        if act == "fork" and s in tables:
            tables[other], length[other] = list(tables[s]), length[s]
            for id in tables[s]:
                pool.share(id)
        elif act == "end" and s in tables:
            for id in tables.pop(s):
                pool.free(id)
            del length[s]
        elif act == "write" and other <= length.get(s, 0):
            try:
                pool.write(tables.setdefault(s, []), other, k[n], v[n])
                length[s] = max(length.get(s, 0), other + 1)
            except MemoryError:
                full.append(n)
        in_use.append(sum(users > 0 for users in pool.users))
    found = {}
    for s in sorted(length):
        found[f"k of sequence {s}"], found[f"v of sequence {s}"] = pool.gather(tables[s], length[s])
    for table in tables.values():
        for id in table:
            pool.free(id)
    left = sum(users > 0 for users in pool.users)
    # What was gathered is a copy: now another sequence takes all blocks.
    with contextlib.suppress(MemoryError):
        new = []
        for n in range(a["blocks"] * a["block"]):
            pool.write(new, n, np.zeros_like(k[0]), np.zeros_like(v[0]))
    return found | {told(a): in_use, "no block for": full, "blocks in use when all have ended": left}


def want(a, ref, at):
    """Each sequence is a list of tokens and a list of things; a thing that two lists hold is exchanged before it is written."""
    tokens, things, in_use, full = {}, {}, [], []
    for n, (act, s, other) in enumerate(a["script"]):
        if act == "fork" and s in tokens:
            tokens[other], things[other] = list(tokens[s]), list(things[s])
        elif act == "end" and s in tokens:
            del tokens[s], things[s]
        elif act == "write" and other <= len(tokens.get(s, ())):
            mine, own = tokens.setdefault(s, []), things.setdefault(s, [])
            which = sum(1 for end in range(a["block"], other + 1, a["block"]))
            held = which < len(own) and [t for held in things.values() for t in held].count(own[which])
            alive = len({t for held in things.values() for t in held})
            if held != 1 and alive == a["blocks"]:
                full.append(n)
            else:
                if held != 1:
                    own[which : which + 1] = [object()]
                mine[other : other + 1] = [n]
        in_use.append(len({t for held in things.values() for t in held}))
    found = {}
    for s, mine in sorted(tokens.items()):
        if mine:
            found[f"k of sequence {s}"], found[f"v of sequence {s}"] = (
                np.stack([a[x][n] for n in mine]) for x in ("k_NKE", "v_NKE")
            )
    return found | {told(a): in_use, "no block for": full, "blocks in use when all have ended": 0}


def part(name, acts, sizes, random_size):
    return Part(name, sizes, scripted(acts), call, want, random_size=random_size)


ALL = ("write", "write", "write", "write", "fork", "rewrite", "end")
PARTS = (
    Part("alloc, share, free", ((3, 20), (1, 8), (5, 40)), handles, call_handles, want_handles, dtypes=("float64",),
         random_size=lambda rng: (int(rng.integers(1, 7)), 30)),
    part("write and gather", ("write",), ((5, 4, 1, 9), (5, 4, 1, 8), (1, 3, 1, 1)),
         lambda rng: (9, int(rng.choice([2, 3, 5])), 1, int(rng.integers(1, 17)))),
    part("several sequences", ("write", "write", "write", "end"), ((11, 4, 3, 40), (9, 3, 2, 12)),
         lambda rng: (25, int(rng.choice([2, 3, 5])), 3, int(rng.integers(10, 40)))),
    part("forks", ALL, ((25, 4, 3, 60), (15, 3, 2, 14), (30, 2, 5, 40)), lambda rng: (60, int(rng.choice([2, 3, 5])), 4, 50)),
    part("a pool that is full", ALL, ((3, 2, 3, 30), (2, 3, 2, 16), (4, 3, 3, 50)), lambda rng: (int(rng.integers(2, 6)), 2, 3, 40)),
)  # fmt: skip

COPY_K = "            self.k_BSKE[copy] = self.k_BSKE[table[place]]\n"
COPY_V = "            self.v_BSKE[copy] = self.v_BSKE[table[place]]\n"
DROP = "            self.free(table[place])\n"
MISTAKES = (
    mistake("exchanged", "// and % are exchanged: the block is position // block, the slot what remains.",
            ("place = position // self.block\n        slot = position % self.block", "slot = position // self.block\n        place = position % self.block"),
            ("np.array(table, int)[position_S // self.block]", "np.array(table, int)[position_S % self.block]"),
            ("slot_S = position_S % self.block", "slot_S = position_S // self.block")),
    mistake("whole_blocks", "The last block is read whole: past the length lies what was never written, or another's.",
            ("        position_S = np.arange(length)\n", "        position_S = np.arange(len(table) * self.block)\n")),
    mistake("one_block_short", "Only full blocks are read: the last length % block tokens are missing.",
            ("position_S = np.arange(length)", "position_S = np.arange(length // self.block * self.block)")),
    mistake("one_too_many", "A block is taken as soon as the last one is full: it may never be needed. Take it when its first token comes.",
            ("        self.v_BSKE[table[place], slot] = v_KE\n",
             "        self.v_BSKE[table[place], slot] = v_KE\n        if slot == self.block - 1 and place == len(table) - 1:\n            table.append(self.alloc())\n")),
    mistake("table_ignored", "Block n is read for the n-th part: which block that is stands in the table.",
            ("np.array(table, int)[position_S // self.block]", "position_S // self.block")),
    mistake("table_sorted", "The blocks are read in order of their ids: the order is that of the table.",
            ("np.array(table, int)", "np.array(sorted(table), int)")),
    mistake("not_marked", "alloc does not mark the block: the next caller gets the same one.", ("        self.users[id] = 1\n", "")),
    mistake("never_again", "Blocks that were freed are never taken again: the pool runs dry.",
            ("        id = self.users.index(0)\n", "        id = self.taken = getattr(self, 'taken', -1) + 1\n"),
            ("if 0 not in self.users:", "if getattr(self, 'taken', -1) + 1 == len(self.users):")),
    mistake("freed_never", "free does not count down: the blocks of a request that has ended stay in use.",
            ("        self.users[id] -= 1\n", "")),
    mistake("freed_for_all", "free frees the block for all: other tables hold it still, and it will be given to somebody else.",
            ("self.users[id] -= 1", "self.users[id] = 0")),
    mistake("freed_twice", "A block may be freed twice: it counts -1 then, and is lost or has two owners. Raise ValueError.",
            ('        if self.users[id] == 0:\n            raise ValueError(f"block {id} is free already")\n', "")),
    mistake("share_not_counted", "share does not count up: the first of two tables that frees the block takes it from the other.",
            ("        self.users[id] += 1\n", "        pass\n")),
    mistake("free_shared", "A free block may be shared: nobody has written what is in it. Raise ValueError.",
            ('        if self.users[id] == 0:\n            raise ValueError(f"block {id} is free: it cannot be shared")\n', "")),
    mistake("shared_written", "A shared block is written: what one sequence appends changes the other. Copy it first.",
            ("if self.users[table[place]] > 1:", "if False:")),
    mistake("copied_at_the_end", "A shared block is copied only if it is the table's last: writing again at an earlier position writes into a"
            " block that other tables hold.",
            ("if self.users[table[place]] > 1:", "if self.users[table[place]] > 1 and place == len(table) - 1:")),
    mistake("k_only", "Of a shared block only k is copied: v of the tokens before is missing.", (COPY_V, "")),
    mistake("v_only", "Of a shared block only v is copied: k of the tokens before is missing.", (COPY_K, "")),
    mistake("old_kept", "The shared block that was copied still counts the writer's table: it will never be free.", (DROP, "")),
    mistake("private_copied", "A block is copied though nobody else holds it: that costs a copy a token, and a free block.",
            ("if self.users[table[place]] > 1:", "if slot and self.users[table[place]] >= 1:")),
    mistake("table_replaced", "The copy is written but the caller's table still names the shared block: change the list in place.",
            ("            table[place] = copy\n", "            table = [*table[:place], copy, *table[place + 1 :]]\n")),
    mistake("nothing_copied", "Of a shared block nothing is copied: k and v of the tokens before are missing in the writer's new one.",
            (COPY_K, ""), (COPY_V, "")),
    mistake("freed_silently", "free passes over a block that nobody holds: raise ValueError, or a block freed twice is never noticed.",
            ('            raise ValueError(f"block {id} is free already")\n', "            return\n")),
    mistake("freed_first", "The shared block is given up before another one is found: without one, write has changed a count, and must"
            " change nothing.",
            (DROP, ""), ("            copy = self.alloc()\n", "            self.free(table[place])\n            copy = self.alloc()\n")),
    mistake("always_copied", "A block is copied though nobody else holds it: that costs a copy a token, and a free block.",
            ("        if place == len(table):\n", "        old = place < len(table)\n        if place == len(table):\n"),
            ("if self.users[table[place]] > 1:", "if old:")),
    mistake("slots_before", "Of a shared block only the slots before the written one are copied: those after it may hold tokens too.",
            (COPY_K, "            self.k_BSKE[copy] = np.nan\n            self.k_BSKE[copy, :slot] = self.k_BSKE[table[place], :slot]\n"),
            (COPY_V, "            self.v_BSKE[copy] = np.nan\n            self.v_BSKE[copy, :slot] = self.v_BSKE[table[place], :slot]\n")),
    mistake("slots_before_kept", "Of a shared block only the slots before the written one are copied: those after it may hold tokens too.",
            (COPY_K, "            self.k_BSKE[copy, :slot] = self.k_BSKE[table[place], :slot]\n"),
            (COPY_V, "            self.v_BSKE[copy, :slot] = self.v_BSKE[table[place], :slot]\n")),
    mistake("table_not_grown", "The block that write takes is not in the caller's table: table + [id], or another name for a new list, leaves"
            " the caller's as it was. Change the list in place, by append or table[place] = id.",
            ("if place == len(table):\n            table.append(self.alloc())\n",
             "if place >= len(table):\n            table = [*table, self.alloc()]\n            place = len(table) - 1\n"),
            ("            table[place] = copy\n", "            table = [*table[:place], copy, *table[place + 1 :]]\n"),
            ("        position_S = np.arange(length)\n",
             "        k_SKE, v_SKE = (np.full((length, *x.shape[2:]), np.nan, x.dtype) for x in (self.k_BSKE, self.v_BSKE))\n"
             "        length = min(length, len(table) * self.block)\n        position_S = np.arange(length)\n"),
            ("        return self.k_BSKE[id_S, slot_S], self.v_BSKE[id_S, slot_S]\n",
             "        k_SKE[:length], v_SKE[:length] = self.k_BSKE[id_S, slot_S], self.v_BSKE[id_S, slot_S]\n        return k_SKE, v_SKE\n")),
    mistake("in_a_row", "gather reads the blocks that follow the table's first one in the pool: each is where the table says.",
            ("        id_S = np.array(table, int)[position_S // self.block]\n        slot_S = position_S % self.block\n"
             "        return self.k_BSKE[id_S, slot_S], self.v_BSKE[id_S, slot_S]\n",
             "        found = []\n        for x in (self.k_BSKE, self.v_BSKE):\n            y = np.full((length, *x.shape[2:]), np.nan, x.dtype)\n"
             "            got = x.reshape(-1, *x.shape[2:])[table[0] * self.block if table else 0 :][:length]\n"
             "            y[: len(got)] = got\n            found.append(y)\n        return tuple(found)\n")),
    mistake("slot_0_again", "A block is taken whenever slot 0 is written: a position that is written again has its block already. One is due"
            " where the table ends.", ("if place == len(table):", "if slot == 0:")),
    mistake("shared_given_up", "When a shared block is copied it counts as free for all: the other tables hold it still. Count one less.",
            (DROP, "            self.users[table[place]] = 0\n")),
    mistake("views", "gather returns a part of the pool itself, not a copy: what is written into the block later changes it.",
            ("        return self.k_BSKE[id_S, slot_S], self.v_BSKE[id_S, slot_S]\n",
             "        if len(set(id_S.tolist())) == 1:\n            return self.k_BSKE[id_S[0], :length], self.v_BSKE[id_S[0], :length]\n"
             "        return self.k_BSKE[id_S, slot_S], self.v_BSKE[id_S, slot_S]\n")),
)  # fmt: skip
