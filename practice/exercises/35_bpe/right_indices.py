"""By index with while, counts in a Counter and a sort; encode goes through all merges in their order."""

from collections import Counter


def merge(symbols, pair):
    a, b = pair
    out, i = [], 0
    while i < len(symbols):
        if i + 1 < len(symbols) and symbols[i] == a and symbols[i + 1] == b:
            out.append(a + b)
            i += 2
        else:
            out.append(symbols[i])
            i += 1
    return out


def train(words, n):
    corpus = [([*word], count) for word, count in words.items()]
    learned = []
    while len(learned) < n:
        tally = Counter()
        for symbols, count in corpus:
            for i in range(len(symbols) - 1):
                tally[symbols[i], symbols[i + 1]] += count
        if not tally:
            return learned
        (pair, _), *_ = sorted(tally.items(), key=lambda item: (-item[1], item[0]))
        learned.append(list(pair))
        corpus = [(merge(symbols, pair), count) for symbols, count in corpus]
    return learned


def encode(word, merges):
    symbols = [*word]
    for pair in merges:
        symbols = merge(symbols, pair)
    return symbols
