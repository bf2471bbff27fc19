"""What is right in exercise 35 (a word as its text and a set of cuts), and what is often wrong."""

from practice.part import Part, mistake


def joined(word, cuts, pair):
    """The cuts that are left when the pair is merged, from left to right."""
    left = sorted(cuts)
    for cut in sorted(cuts):
        at = left.index(cut)
        before = left[at - 1] if at else 0
        after = left[at + 1] if at + 1 < len(left) else len(word)
        if (word[before:cut], word[cut:after]) == tuple(pair):
            left.remove(cut)
    return left


def pieces(word, cuts):
    return [word[a:b] for a, b in zip([0, *cuts], [*cuts, len(word)], strict=True)] if word else []


def learned(words, n):
    cuts = {w: list(range(1, len(w))) for w in words}
    merges = []
    for _ in range(n):
        found = [p for w, c in words.items() for p in [*zip(pieces(w, cuts[w]), pieces(w, cuts[w])[1:], strict=False)] * c]
        if not found:
            break
        most = max(found.count(p) for p in set(found))
        merges.append(min(p for p in set(found) if found.count(p) == most))
        cuts = {w: joined(w, k, merges[-1]) for w, k in cuts.items()}
    return merges


def encoded(word, merges):
    """In the order of learning, once each: no merge of these lists makes what an earlier one needs."""
    cuts = list(range(1, len(word)))
    for pair in merges:
        cuts = joined(word, cuts, pair)
    return pieces(word, cuts)


def word(draw, most, letters="abc"):
    """Of few letters and of pieces that come again; now and then one letter all along."""
    if draw.rng.random() < 0.25:
        return str(draw.rng.choice(list(letters))) * int(draw.rng.integers(1, most + 1))
    return "".join(draw.rng.choice(["a", "b", "c", "ab", "bc", "aab", "ca"], most))[: int(draw.rng.integers(1, most + 1))]


def corpus(draw, words, n):
    """Words, and a list of merges no two of which make the same text: ids and texts are then one and the same."""
    while True:
        some = {word(draw, 7): int(draw.rng.integers(1, 5)) for _ in range(words)}
        # Where all is merged, the last pairs occur once.
        some |= {"cad": 1} if n > 9 else {}
        merges = learned(some, n)
        if len({a + b for a, b in merges}) == len(merges):
            return some, merges


def sentences(draw, words, n):
    return {"words": corpus(draw, words, n)[0], "n": n}


def to_encode(draw, words, n):
    _, merges = corpus(draw, max(words, 3), n)
    return {"texts": ["", *(word(draw, 9, "abcz") for _ in range(words)), "zabcaab"], "merges": merges}


def lists(draw, words):
    pairs = [("a", "a"), ("a", "b"), ("b", "a"), ("ab", "c"), ("b", "c"), ("a", "bc")]
    found = []
    for _ in range(words):
        symbols = draw.rng.choice(["a", "a", "a", "b", "b", "c", "ab", "bc"], int(draw.rng.integers(0, 8))).tolist()
        found.append([symbols, pairs[int(draw.rng.integers(len(pairs)))]])
    run = str(draw.rng.choice(["a", "b"]))
    return {"lists": [*found, [[run] * int(draw.rng.integers(3, 8)), (run, run)], [[], ("a", "b")]]}


def call_merge(code, a, at):
    found = {}
    for symbols, pair in a["lists"]:
        mine = list(symbols)
        found[f"{' '.join(symbols) or '(nothing)'} with {pair}\nmerged"] = code.merge(mine, pair)
        found[f"{' '.join(symbols) or '(nothing)'} with {pair}\nthe argument afterwards"] = mine
    return found


def want_merge(a, ref, at):
    found = {}
    for symbols, pair in a["lists"]:
        text, cuts = "".join(symbols), []
        for s in symbols[:-1]:
            cuts.append((cuts[-1] if cuts else 0) + len(s))
        found[f"{' '.join(symbols) or '(nothing)'} with {pair}\nmerged"] = pieces(text, joined(text, cuts, pair))
        found[f"{' '.join(symbols) or '(nothing)'} with {pair}\nthe argument afterwards"] = list(symbols)
    return found


def told(a):
    return f"words: {', '.join(f'{w} x {c}' for w, c in a['words'].items()) or 'none'}\nmerges"


def call_train(code, a, at):
    words = dict(a["words"])
    code.train({"ab": 2, "cab": 1}, 2)
    return {told(a): [list(p) for p in code.train(words, a["n"])], "words afterwards": words}


def want_train(a, ref, at):
    return {told(a): [list(p) for p in learned(a["words"], a["n"])], "words afterwards": dict(a["words"])}


def each(a):
    merges = ", ".join(f"{x} {y}" for x, y in a["merges"])
    return [(text, f"merges: {merges or 'none'}\n{text or '(no letter)'} as tokens") for text in a["texts"]]


def call_encode(code, a, at):
    merges = list(a["merges"])
    return {name: code.encode(text, merges) for text, name in each(a)} | {"merges afterwards": merges}


def want_encode(a, ref, at):
    found = {name: encoded(text, a["merges"]) for text, name in each(a)}
    return found | {"merges afterwards": [list(p) for p in a["merges"]]}


ONE = ("float64",)
PARTS = (
    Part("merge", ((6,), (12,)), lists, call_merge, want_merge, dtypes=ONE, random_size=lambda rng: (int(rng.integers(5, 15)),)),
    Part("train", ((4, 3), (8, 6), (3, 40), (1, 2), (5, 0), (0, 2), (9, 7)), sentences, call_train, want_train, dtypes=ONE,
         random_size=lambda rng: (int(rng.integers(2, 10)), int(rng.integers(1, 9)))),
    Part("encode", ((4, 3), (9, 7), (6, 40), (12, 9)), to_encode, call_encode, want_encode, dtypes=ONE,
         random_size=lambda rng: (int(rng.integers(5, 12)), int(rng.integers(2, 12)))),
)  # fmt: skip

BEST = "min(counts, key=lambda pair: (-counts[pair], pair))"
SCAN = "if merged and not merged[-1][1] and (merged[-1][0], symbol) == tuple(pair):"
MERGED = "merged[-1] = (pair[0] + pair[1], True)"
NEXT = "symbols = merge(symbols, min(known, key=rank.get))"
COUNT = "counts[pair] = counts.get(pair, 0) + words[word]"
ACROSS = "Pairs across two words are counted: nothing is merged over a word's end."
ENDS = (
    "        for (first, one), (second, other) in pairwise(split.items()):\n            pair = one[-1], other[0]\n"
    "            counts[pair] = counts.get(pair, 0) + {}\n        if not counts:"
)
MISTAKES = (
    mistake("second_used_again", "The second symbol of a pair that was merged is the first of another one: of a a a with (a, a) comes aa a. Go on"
            " behind both.", ("    return [symbol for symbol, _ in merged]\n",
             "    n, pair = len(symbols), tuple(pair)\n    joins = [tuple(symbols[i : i + 2]) == pair for i in range(n)]\n"
             "    return [symbols[i] + symbols[i + 1] if joins[i] else symbols[i] for i in range(n) if joins[i] or not (i and joins[i - 1])]\n")),
    mistake("overlapping", "A symbol is used twice: of a a a the pair (a, a) makes aa a, and not aa aa. After a merge go on behind both.",
            ("    merged = []\n    for symbol in symbols:\n", "    merged = []\n    if 1:\n        return [a + b if (a, b) == tuple(pair) else a for a, b in"
             " pairwise(symbols) ] + symbols[-1:]\n    for symbol in symbols:\n")),
    mistake("kept_second", "The pair's second symbol stays behind the merged one: go on behind both.",
            (MERGED, "merged[-1] = (pair[0] + pair[1], True)\n            merged.append((symbol, True))")),
    mistake("from_the_right", "The merging goes from right to left: of a a a, (a, a) makes aa a.",
            ("    for symbol in symbols:\n        if merged", "    symbols, pair, back = symbols[::-1], tuple(pair)[::-1], True\n    for symbol in symbols:\n        if merged"),
            (MERGED, "merged[-1] = (pair[1] + pair[0], True)"), ("return [symbol for symbol, _ in merged]", "return [symbol for symbol, _ in merged][::-1]")),
    mistake("first_place", "Only the first place of the pair is merged: all of them are.",
            (SCAN, "if merged and not any(done for _, done in merged) and (merged[-1][0], symbol) == tuple(pair):")),
    mistake("by_text", "The pair is looked for in the joined text: then (a, b) is also found where a is only the end of a longer symbol. Compare"
            " whole symbols.", (SCAN, "if merged and not merged[-1][1] and merged[-1][0].endswith(pair[0]) and symbol.startswith(pair[1]):"),
            (MERGED, "merged[-1] = (merged[-1][0] + symbol, True)")),
    mistake("by_spaced_text", "The pair is looked for in the symbols joined by spaces: it is also found where a is only the end of a longer symbol, or b"
            " the beginning of one, and no symbols at all become one of no text. Compare whole symbols.",
            ("    merged = []\n    for", "    return ' '.join(symbols).replace(' '.join(pair), ''.join(pair)).split(' ')\n    merged = []\n    for")),
    mistake("by_sum", "Whatever makes the same text is merged: (a, bc) is another pair than (ab, c).",
            (SCAN, "if merged and not merged[-1][1] and merged[-1][0] + symbol == pair[0] + pair[1]:"), (MERGED, "merged[-1] = (merged[-1][0] + symbol, True)")),
    mistake("in_place", "The list that was given is changed: return a new one.",
            ("return [symbol for symbol, _ in merged]", "symbols[:] = [symbol for symbol, _ in merged]\n    return symbols")),
    mistake("ties_first", "Of equally frequent pairs the one that was met first is taken: it is the smallest.", (BEST, "max(counts, key=counts.get)")),
    mistake("ties_last", "Of equally frequent pairs the one that was met last is taken: it is the smallest.",
            (BEST, "max(reversed(counts), key=counts.get)")),
    mistake("ties_largest", "Of equally frequent pairs the largest is taken: it is the smallest.",
            (BEST, "max(counts, key=lambda pair: (counts[pair], pair))")),
    mistake("rarest", "The rarest pair is merged: it is the most frequent.", (BEST, "min(counts, key=lambda pair: (counts[pair], pair))")),
    mistake("words_once", "Each word counts once: it counts as often as it occurs.", (COUNT, "counts[pair] = counts.get(pair, 0) + 1")),
    mistake("once_a_word", "A pair counts once a word: every place in it counts.", ("for pair in pairwise(symbols):\n                counts",
            "for pair in dict.fromkeys(pairwise(symbols)):\n                counts")),
    mistake("across_words", ACROSS, ("        if not counts:", ENDS.format("words[second]"))),
    mistake("across_words_by_first", ACROSS, ("        if not counts:", ENDS.format("words[first]"))),
    mistake("across_words_once", ACROSS, ("        if not counts:", ENDS.format("1"))),
    mistake("counted_apart", "Places that overlap are counted once: all places count, and a a a has (a, a) twice. Only merging takes those apart.",
            ("            for pair in pairwise(symbols):\n", "            last = None\n            for pair in pairwise(symbols):\n                last = pair if pair != last"
             " else None\n                if last is None:\n                    continue\n")),
    mistake("not_recounted", "The counts are those of the characters, from before the first merge: each merge changes them, so count again.",
            ("        counts = {}\n", "        counts = {} if not merges else {p: c for p, c in counts.items() if p not in merges}\n"),
            ("        for word, symbols in split.items():\n", "        for word, symbols in (split.items() if not merges else ()):\n")),
    mistake("stops_at_one", "It ends when no pair occurs twice: it goes on, however rare the pairs are, while there is one.",
            ("if not counts:", "if not counts or max(counts.values()) < 2:")),
    mistake("no_end", "When no pair is left it goes on looking for one: it ends there, with fewer merges.",
            ("        if not counts:\n            break\n", "")),
    mistake("one_too_few", "It learns a merge too few.", ("range(n)", "range(n - 1)")),
    mistake("one_too_many", "It learns a merge too many.", ("range(n)", "range(n + 1)")),
    mistake("joined_merges", "The merges are returned as joined texts: pairs are asked for, or their order could not be replayed.",
            ("merges.append(best)", "merges.append(best[0] + best[1])")),
    mistake("longest_match", "The longest known token is taken, from left to right: encoding replays the merges in the order of learning.",
            ("    symbols = list(word)\n    while True:", "    known, symbols, at = {*word} | {a + b for a, b in merges}, [], 0\n    while at < len(word):\n"
             "        symbols.append(next(word[at:end] for end in range(len(word), at, -1) if word[at:end] in known))\n        at += len(symbols[-1])\n    while False:")),
    mistake("leftmost", "The leftmost pair that is known is merged: of all that are there, the one that was learned first goes first.",
            (NEXT, "symbols = merge(symbols, known[0])")),
    mistake("latest_first", "The pair that was learned last is merged first: the one that was learned first is.",
            (NEXT, "symbols = merge(symbols, max(known, key=rank.get))")),
    mistake("one_pass", "Only the first of the merges that apply is made: go on until none is left.", (NEXT, NEXT + "\n        break")),
    mistake("pairs_of_word", "It looks only at pairs of characters: merged symbols are merged again.",
            ("known = [pair for pair in pairwise(symbols) if pair in rank]",
             "known = [pair for pair in pairwise(symbols) if pair in rank and len(pair[0] + pair[1]) == 2]")),
    mistake("unknown_marked", "Characters that no merge has are replaced: they stay as they are, or the text cannot be put together again.",
            ("    return symbols\n", "    known = {c for pair in merges for c in pair[0] + pair[1]}\n    return [s if s[0] in known else '<unk>' for s in symbols]\n")),
    mistake("unknown_lost", "Characters that no merge has are dropped: they stay as they are, or the text cannot be put together again.",
            ("    return symbols\n", "    known = {c for pair in merges for c in pair[0] + pair[1]}\n    return [s for s in symbols if s[0] in known]\n")),
)  # fmt: skip
