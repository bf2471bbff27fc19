"""Symbols are numbers inside; the counts are kept and changed by what each merge changes; encode on a recursion."""

from collections import defaultdict
from itertools import pairwise


def merge(symbols, pair):
    if len(symbols) < 2:
        return list(symbols)
    if tuple(symbols[:2]) == tuple(pair):
        return ["".join(pair), *merge(symbols[2:], pair)]
    return [symbols[0], *merge(symbols[1:], pair)]


def train(words, n):
    names = sorted({c for word in words for c in word})
    number = {c: i for i, c in enumerate(names)}
    sequences = [[number[c] for c in word] for word in words]
    counts = list(words.values())
    tally = defaultdict(int)
    for sequence, count in zip(sequences, counts, strict=True):
        for pair in pairwise(sequence):
            tally[pair] += count
    merges = []
    while len(merges) < n and any(tally.values()):
        most = max(tally.values())
        a, b = min((p for p, c in tally.items() if c == most), key=lambda p: (names[p[0]], names[p[1]]))
        merges.append((names[a], names[b]))
        names.append(names[a] + names[b])
        for i, (sequence, count) in enumerate(zip(sequences, counts, strict=True)):
            if (a, b) not in pairwise(sequence):
                continue
            fresh = []
            for symbol in sequence:
                if fresh and fresh[-1] == a and symbol == b:
                    fresh[-1] = len(names) - 1
                else:
                    fresh.append(symbol)
            for old, sign in ((sequence, -1), (fresh, 1)):
                for pair in pairwise(old):
                    tally[pair] += sign * count
            sequences[i] = fresh
    return merges


def encode(word, merges):
    order = [tuple(pair) for pair in merges]

    def go(symbols):
        ranked = [order.index(pair) for pair in pairwise(symbols) if pair in order]
        return go(merge(symbols, order[min(ranked)])) if ranked else symbols

    return go(list(word))
