"""What is right in exercise 39 (blocks that know their whole prefix and when they were freed, searched anew each time), and what is often wrong."""

from practice.part import Part, mistake

# --- keys


def chains(draw, blocks, block):
    """Rows of blocks of which several begin, go on or end alike, or have the same tokens in another order or with other commas."""
    ids = draw.ids(9, blocks, block).tolist()
    ids[0] = list(range(1, block + 1))
    other = [row[::-1] for row in ids]
    moved = [*ids[1:], ids[0]]
    last = [*ids[:-1], [*ids[-1][:-1], ids[-1][-1] + 1]]
    joined = [[1, 23, *ids[0]], [12, 3, *ids[0]]]
    return {
        "chains": [ids, other, moved, [ids[0], *ids], [ids[1], *ids[1:]], last, ids, *([j] for j in joined)],
        # Long enough for any text of all tokens to be longer than a key may be, in few enough blocks for keys within keys.
        "long": ids * -(-400 // (blocks * block)),
    }


def call_key(code, a, at):
    first, alike = {}, []
    for chain in a["chains"]:
        parent = None
        for tokens in chain:
            parent = code.key(parent, list(tokens))
            alike.append(first.setdefault(parent, len(alike)))
    parent = None
    for tokens in a["long"]:
        parent = code.key(parent, list(tokens))
    code.counts["characters of a key"] = len(str(parent))
    return {"for each key, the first that equals it": alike}


def want_key(a, ref, at):
    prefixes = [repr(chain[: n + 1]) for chain in a["chains"] for n in range(len(chain))]
    return {"for each key, the first that equals it": [prefixes.index(p) for p in prefixes]}


# --- requests


def scripted(acts, full=False):
    """Inputs of a part: acts on requests, chosen among `acts`. Prompts are beginnings of few texts, and go on as these do or do not.

    full: at last, when all have ended, come a prompt of all blocks, one that begins alike and needs a block too many, and two that fit.
    """

    def inputs(draw, blocks, block, requests, steps):
        texts = [draw.ids(2, 5 * block).tolist() for _ in range(2)]
        texts += [texts[0][: 2 * block] + texts[1][2 * block :], texts[0][block:] + texts[1][:block]]
        script, length = [], {}
        for pick in draw.ids(len(acts), steps).tolist():
            act, live = acts[pick], sorted(length)
            r = live[int(draw.rng.integers(len(live)))] if live else 0
            if act == "release" and live:
                script.append(["release", r, []])
                del length[r]
            elif act == "append" and live:
                text, n = length[r]
                token = text[n] if n < len(text) and draw.rng.random() < 0.8 else int(draw.rng.integers(2))
                script.append(["append", r, [token]])
                length[r] = text, n + 1
            elif len(length) < requests:
                r = min(set(range(requests)) - set(length))
                text = texts[int(draw.rng.integers(len(texts)))]
                # Every other prompt ends with a block.
                n = int(draw.rng.integers(1, len(text)))
                n = max(1, n // block) * block if draw.rng.random() < 0.5 else n
                script.append(["admit", r, text[:n]])
                length[r] = text, n
        if full:
            script += [["release", r, []] for r in length]
            whole = draw.ids(2, blocks * block).tolist()
            other = whole[:block] + [1 - token for token in whole[block:]]
            script += [["admit", 0, whole], ["release", 0, []], ["admit", 0, [*other, 1]], ["admit", 0, other[:-block]]]
            # All but the last of its blocks are found, and held.
            script.append(["admit", 1, [*other[: -2 * block], 1]])
        return {"script": script, "texts": [[*t, 0] for t in texts], "blocks": blocks, "block": block}

    return inputs


def told(a):
    """The acts in one line, for what is said of a wrong table."""
    said = {"admit": "{0} {1}", "append": "{0}+{1}", "release": "end {0}"}
    acts = ", ".join(said[act].format("abcdef"[r], "".join(map(str, tokens))) for act, r, tokens in a["script"])
    return f"blocks of {a['block']}; a, b, ... with their tokens: {acts}"


def call(code, a, at):
    """A request that could not be admitted, or get a token, is left as it was."""
    cache, tables, tokens, shared, full = code.Cache(a["blocks"], a["block"]), {}, {}, [], []
    seen = []
    for n, (act, r, new) in enumerate(a["script"]):
        try:
            if act == "admit":
                tables[r], computed = cache.admit(list(new))
                tokens[r] = list(new)
                shared.append(computed)
            elif r in tables and act == "append":
                cache.append(tables[r], tokens[r] + new)
                tokens[r] += new
            elif r in tables:
                cache.release(tables.pop(r))
        except MemoryError:
            full.append(n)
        found = cache.match(list(a["texts"][n % len(a["texts"])]))
        seen.append((listed(tables.get(r, ())), listed(cache.users), listed(found)))
    return results(a, shared, full, *zip(*seen, strict=True))


def listed(ids):
    return " ".join(map(str, ids))


def results(a, shared, full, tables, users, found):
    """Of each act: its request's table, all blocks' users and what would be found, as text, which is quick to compare and short to read."""
    by_act = {"users, act by act": list(users), "match, of another text after each act": list(found)}
    return {f"{told(a)}\ntable, act by act": list(tables), "not to be computed": shared, "acts without blocks": full} | by_act


class Block:
    """holds: all tokens up to its last, once it is full; got, freed: when it got its key and when it was freed."""

    def __init__(self, id):
        self.id, self.users, self.holds, self.got, self.freed = id, 0, None, 0, id


def shareable(pool, block, tokens):
    """The blocks of the longest prefix that is found, without the last token."""
    found = []
    for end in range(block, len(tokens), block):
        same = [b for b in pool if b.holds == tokens[:end]]
        if not same:
            break
        found.append(min(same, key=lambda b: b.got))
    return found


def want(a, ref, at):
    pool, tables, tokens = [Block(id) for id in range(a["blocks"])], {}, {}
    shared, full, seen, clock = [], [], [], a["blocks"]
    for n, (act, r, new) in enumerate(a["script"]):
        clock += 1
        if act == "release":
            for b in reversed(tables.pop(r, [])):
                b.users -= 1
                clock += 1
                b.freed = clock
        elif act == "admit" or r in tables:
            held = tables.get(r) or shareable(pool, a["block"], new)
            text = (tokens[r] if act == "append" else []) + new
            needed = len(range(0, len(text), a["block"])) - len(held)
            free = sorted((b for b in pool if not b.users and b not in held), key=lambda b: b.freed)
            if needed > len(free):
                full.append(n)
            else:
                if act == "admit":
                    shared.append(len(held) * a["block"])
                for b in free[:needed]:
                    b.holds = None
                tokens[r], before = text, tables.get(r, [])
                tables[r] = [*held, *free[:needed]]
                for m, b in enumerate(tables[r]):
                    clock += 1
                    b.users += b not in before
                    end = (m + 1) * a["block"]
                    if b.holds is None and end <= len(text):
                        b.holds, b.got = text[:end], clock
        held = [b.id for b in tables.get(r, ())]
        found = [b.id for b in shareable(pool, a["block"], a["texts"][n % len(a["texts"])])]
        seen.append((listed(held), listed(b.users for b in pool), listed(found)))
    return results(a, shared, full, *zip(*seen, strict=True))


def part(name, acts, sizes, random_size, full=False):
    return Part(name, sizes, scripted(acts, full), call, want, random_size=random_size, dtypes=("float64",))


def sizes(blocks, requests, steps):
    def random_size(rng):
        block = int(rng.choice([2, 3, 4]))
        return blocks or int(rng.integers(6, 10)), block, requests, int(rng.integers(*steps))

    return random_size


ALL = ("admit", "append", "append", "append", "release")
PARTS = (
    Part("key", ((4, 3), (2, 5), (3, 2)), chains, call_key, want_key, dtypes=("float64",), limits=lambda a, at: {"characters of a key": 300},
         random_size=lambda rng: (int(rng.integers(2, 5)), int(rng.integers(2, 7)))),
    part("admit", ("admit",), ((31, 3, 6, 6), (31, 2, 3, 3), (31, 4, 6, 6), (15, 1, 3, 3)), sizes(31, 6, (4, 7))),
    part("append", ("admit", "append", "append", "append"), ((41, 3, 4, 30), (41, 2, 4, 25), (25, 1, 3, 12)), sizes(41, 4, (15, 30))),
    part("release and take again", ALL, ((15, 3, 2, 40), (13, 2, 2, 30), (19, 4, 3, 45), (13, 1, 2, 12)), sizes(16, 2, (30, 50))),
    part("a pool that is full", ALL, ((7, 2, 3, 30), (6, 3, 3, 40), (9, 2, 4, 50), (4, 1, 3, 15)), sizes(0, 4, (30, 50)), full=True),
)  # fmt: skip

KEY = "hashlib.sha256(repr((parent, tokens)).encode()).hexdigest()"
CHECK = "more > len(self.free) - len(woken)"
WAKE = "        for id in woken:\n            self.free.remove(id)\n"
COUNT = "        for id in table:\n            self.users[id] += 1\n"
TAKE = "        for _ in range(more):\n            table.append(self.take())\n"
FORGET = "            self.ids[old].remove(id)\n            if not self.ids[old]:\n                del self.ids[old]\n"
MISTAKES = (
    mistake("no_parent", "The key is made of the block's own tokens alone: the same tokens after another prefix have other keys and values.",
            (KEY, KEY.replace("(parent, tokens)", "tokens"))),
    mistake("order_lost", "The key does not depend on the order of the tokens.", ("repr((parent, tokens))", "repr((parent, sorted(tokens)))")),
    mistake("joined", "The tokens' digits are joined without anything between: 1, 23 and 12, 3 get the same key.",
            ("repr((parent, tokens))", 'f"{parent} {str().join(map(str, tokens))}"')),
    mistake("first_token", "The key has only the block's first token: all of them belong in it.", ("repr((parent, tokens))", "repr((parent, tokens[0]))")),
    mistake("whole_prefix", "This is right, but the key holds all tokens before it and grows with the text: hash the parent's key and the block's tokens"
            " to something short.", (KEY, "(parent, tuple(tokens))")),
    mistake("all_shared", "A prompt all of whose blocks are found shares them all: nothing is left to compute, and nothing gives the next token."
            " Its last token is never shared.", ("range((len(tokens) - 1) // self.block)", "range(len(tokens) // self.block)")),
    mistake("last_token_shared", "The last block of a prompt that is found whole is shared, and its last token is to be computed into it: others hold"
            " that block. Share the blocks before it.",
            ("range((len(tokens) - 1) // self.block)", "range(len(tokens) // self.block)"),
            ("return table, shared * self.block", "return table, min(shared * self.block, len(tokens) - 1)")),
    mistake("one_block_less", "The last full block is not shared even where tokens come behind it.",
            ("range((len(tokens) - 1) // self.block)", "range(len(tokens) // self.block - 1)")),
    mistake("first_block_only", "Only the first block is looked up: go on until one is not found.",
            ("            table.append(self.ids[parent][0])\n", "            table.append(self.ids[parent][0])\n            break\n")),
    mistake("all_or_nothing", "A prompt shares nothing unless all its blocks are found: it shares those up to the first that is not.",
            ("                break\n            table.append", "                return []\n            table.append")),
    mistake("newest", "Of blocks with the same key the newest is found: the one that got it first is.", ("self.ids[parent][0]", "self.ids[parent][-1]")),
    mistake("key_kept", "A block that is taken keeps its key: it is found for tokens that it does not hold any more.",
            (f"        if old is not None:\n{FORGET}        self.key_of[id] = None\n", ""), seen="vllm-project/vllm #4764"),
    mistake("key_kept_until_full", "A block that is taken keeps its key until it has a new one: till then it is found for tokens that are written over.",
            (f"        if old is not None:\n{FORGET}        self.key_of[id] = None\n", ""),
            ("        self.key_of[table[n]] = own\n", "        id, old = table[n], self.key_of[table[n]]\n        if old is not None:\n" + FORGET + "        self.key_of[id] = own\n")),
    mistake("twins_lost", "When one of several blocks with the same key is taken the key is forgotten for all: the others still hold it.",
            (FORGET, "            self.ids.pop(old, None)\n")),
    mistake("any_taken", "Blocks are taken by their number: the one in front, which has been free longest, is next.",
            ("self.free.pop(0)", "self.free.pop(self.free.index(min(self.free)))")),
    mistake("newest_taken", "The block that was freed last is taken first: it is the likeliest to be asked for again. Take the one in front.",
            ("self.free.pop(0)", "self.free.pop()")),
    mistake("no_admit_key", "admit gives the prompt's full blocks no keys: nobody will find them.",
            ("        for n in range(shared, len(tokens) // self.block):\n            self.fill(table, n, tokens)\n", "")),
    mistake("no_append_key", "append gives a block that is full now no key: answers are not found, and they are the beginning of the next turn's prompt.",
            ("        if len(tokens) % self.block == 0:\n            self.fill(table, len(table) - 1, tokens)\n", "")),
    mistake("chain_begins_anew", "A block that append fills gets a key without the block before it.",
            ("self.fill(table, len(table) - 1, tokens)", "self.fill(table[-1:], 0, tokens[-self.block :])")),
    mistake("found_not_counted", "Blocks that are found are not counted for who shares them: they are freed under their readers' feet.", (COUNT, "")),
    mistake("still_in_queue", "A free block that is found stays in the queue: it will be given to somebody else.", (WAKE, "")),
    mistake("takes_its_own", "Blocks are taken before those that are found are out of the queue: a request takes what it shares.",
            (WAKE + COUNT + TAKE, COUNT + TAKE + WAKE.replace("self.free.remove(id)", "id in self.free and self.free.remove(id)"))),
    mistake("counted_twice", "Free blocks that are found are counted as free for the rest too: they cannot serve twice.",
            (CHECK, "more > len(self.free)"), ("id = self.free.pop(0)\n", "if not self.free:\n            raise MemoryError\n        id = self.free.pop(0)\n")),
    mistake("counted_twice_and_taken", "Free blocks that are found are counted as free for the rest too: they cannot serve twice. So admit fails half-way,"
            " with no block left to take.", (CHECK, "more > len(self.free)")),
    mistake("half_admitted", "The MemoryError comes when some blocks are taken already: look before you take.",
            (f"        if {CHECK}:\n" '            raise MemoryError(f"{more} blocks are needed, {len(self.free) - len(woken)} are free")\n', ""),
            ("id = self.free.pop(0)\n", "if not self.free:\n            raise MemoryError\n        id = self.free.pop(0)\n")),
    mistake("shared_before_looking", "The MemoryError comes when the blocks that are found are out of the queue and counted, and some are taken:"
            " count how many are free before you change anything.",
            (f"        if {CHECK}:\n" '            raise MemoryError(f"{more} blocks are needed, {len(self.free) - len(woken)} are free")\n', ""),
            ("            table.append(self.take())\n        for n in range(shared, len(tokens) // self.block):\n            self.fill(table, n, tokens)\n",
             "            if not self.free:\n                raise MemoryError\n            table.append(self.take())\n            if len(table) * self.block <= len(tokens):\n"
             "                self.fill(table, len(table) - 1, tokens)\n")),
    mistake("all_needed", "As many free blocks are asked for as the whole prompt has: those that are found and held need none.",
            (CHECK, "more + shared > len(self.free)")),
    mistake("one_too_many", "A prompt that ends with a block takes another: it comes with the next token.",
            ("-(-len(tokens) // self.block) - shared", "len(tokens) // self.block + 1 - shared")),
    mistake("taken_early", "append takes a block when the last one is full: it takes one when the first token of the next comes.",
            ("            if not self.free:\n                raise MemoryError(\"no block is free\")\n            table.append(self.take())\n"
             "        if len(tokens) % self.block == 0:\n            self.fill(table, len(table) - 1, tokens)\n",
             "            if len(table) * self.block < len(tokens):\n                table.append(self.take())\n"
             "        if len(tokens) % self.block == 0:\n            self.fill(table, len(table) - 1, tokens)\n            table.append(self.take())\n")),
    mistake("front_first", "release frees the first block of the table first: it is taken first then, and without it those behind are not found. Begin with the last.",
            ("for id in reversed(table):", "for id in table:")),
    mistake("to_the_front", "Blocks are freed to the front of the queue: what was just used is taken next.", ("self.free.append(id)", "self.free.insert(0, id)")),
    mistake("to_the_front_in_order", "Blocks are freed to the front of the queue: what was just used is taken next, before what has been free longer.",
            ("for id in reversed(table):", "for id in table:"), ("self.free.append(id)", "self.free.insert(0, id)")),
    mistake("freed_for_all", "release frees blocks that others hold.", ("            self.users[id] -= 1\n            if self.users[id] == 0:\n                self.free.append(id)\n",
                                                                      "            self.users[id] = 0\n            self.free.append(id)\n")),
    mistake("forgotten", "release takes the blocks' keys away: free blocks are found until they are taken.",
            ("                self.free.append(id)\n",
             "                self.free.append(id)\n                if self.key_of[id] in self.ids:\n                    self.ids[self.key_of[id]].remove(id)\n"
             "                    if not self.ids[self.key_of[id]]:\n                        del self.ids[self.key_of[id]]\n                self.key_of[id] = None\n")),
    mistake("never_freed", "release counts down, but the blocks do not come back into the queue.",
            ("            if self.users[id] == 0:\n                self.free.append(id)\n", "")),
)  # fmt: skip
