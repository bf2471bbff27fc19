"""Byte-pair encoding, on characters (Sennrich et al., 1508.07909): merging, training, encoding.

A word is a list of symbols, at first its characters. merge puts a + b for every a that b follows, from left to right: of "a a a"
the pair (a, a) makes "aa a".
train: `words` says how often each word occurs. At each step all neighbouring pairs are counted, at every place and as often as the
word occurs (two in "a a a"; none across words), and the most frequent pair is merged in all words; of equally frequent ones the
smallest, as Python compares tuples of text. It ends after n merges, or when no pair is left, however rare.
encode: of the pairs in the word that are among the merges the one that was learned first is merged, at all its places, and so on
until none is left. (With merges as train learns them: each once, in order.) Characters that were never seen stay as they are.
Leave the arguments as they are.
"""

from itertools import pairwise


def merge(symbols, pair):
    """A list of text, a pair of text (a, b) -> a new list of text."""
    # --- yours ---
    merged = []
    for symbol in symbols:
        if merged and not merged[-1][1] and (merged[-1][0], symbol) == tuple(pair):
            merged[-1] = (pair[0] + pair[1], True)
        else:
            merged.append((symbol, False))
    return [symbol for symbol, _ in merged]
    # --- end ---


def train(words, n):
    """{word: how often it occurs}, the number of merges -> a list of pairs (a, b), in the order of learning."""
    # --- yours ---
    split = {word: list(word) for word in words}
    merges = []
    for _ in range(n):
        counts = {}
        for word, symbols in split.items():
            for pair in pairwise(symbols):
                counts[pair] = counts.get(pair, 0) + words[word]
        if not counts:
            break
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        split = {word: merge(symbols, best) for word, symbols in split.items()}
    return merges
    # --- end ---


def encode(word, merges):
    """A word, pairs in the order of learning -> a list of text, which together is the word."""
    # --- yours ---
    rank = {tuple(pair): i for i, pair in enumerate(merges)}
    symbols = list(word)
    while True:
        known = [pair for pair in pairwise(symbols) if pair in rank]
        if not known:
            break
        symbols = merge(symbols, min(known, key=rank.get))
    return symbols
    # --- end ---
