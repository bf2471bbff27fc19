"""Caches: what is kept of a sequence, shared, copied, cut and given back."""

from collections import Counter

import numpy as np
import pytest

from inference.cache import BLOCK, ContiguousCache, OutOfBlocks, PagedCache, Striped


def filled(cache, sequence, tokens, value):
    cache.extend(sequence, tokens)
    for store in cache.stores([(sequence, tokens)]):
        list(store(*(np.full((tokens, *shape), float(value)) for shape in cache.shapes[0])))


def test_paged_blocks_are_shared_copied_on_write_and_given_back():
    cache = PagedCache([[(2, 3), (2, 3)]] * 2, "float64", blocks=5)
    cache.open(0)
    filled(cache, 0, BLOCK + 2, 1)
    cache.branch(0, 1)
    assert cache.blocks.free == 3
    filled(cache, 1, 1, 2)
    # The shared last block was copied; the full first one is still shared.
    assert cache.blocks.free == 2
    assert cache.tables[0][0] == cache.tables[1][0]
    assert cache.tables[0][1] != cache.tables[1][1]
    (first, _), (second, _) = (cache._read(1, s) for s in (0, 1))
    assert first.shape == (BLOCK + 2, 2, 3)
    assert (first == 1).all()
    assert second[-1, 0, 0] == 2
    assert (second[:-1] == 1).all()
    with pytest.raises(OutOfBlocks, match="sequence 0 needs 3 blocks of 16 tokens, 2 are free"):
        cache.extend(0, 3 * BLOCK)
    assert cache.lengths[0] == BLOCK + 2
    cache.truncate(1, BLOCK)
    assert cache.blocks.free == 3
    cache.free(0)
    cache.free(1)
    assert cache.blocks.free == 5
    assert cache.bytes_per_token == 2 * 2 * 6 * 8


def test_random_use_of_a_paged_cache_loses_and_doubles_no_block():
    random = np.random.default_rng(0)
    paged, plain = PagedCache([[(3,)]], "float64", blocks=40), ContiguousCache([[(3,)]], "float64")
    value = new = 0
    for _ in range(1500):
        held = list(paged.lengths)
        what = random.integers(0, 5)
        if what == 0 or not held:
            for cache in (paged, plain):
                cache.open(new)
            new += 1
            continue
        s = held[random.integers(len(held))]
        tokens = int(random.integers(0, 40))
        if what in (1, 2) and paged.needed(s, tokens) <= paged.blocks.free:
            value += 1
            for cache in (paged, plain):
                filled(cache, s, tokens, value)
        elif what == 3:
            length = int(random.integers(0, paged.lengths[s] + 1))
            for cache in (paged, plain):
                cache.truncate(s, length)
        elif what == 4:
            branch = bool(random.integers(2))
            for cache in (paged, plain):
                cache.branch(s, new) if branch else cache.free(s)
            new += branch
        used = Counter(block for table in paged.tables.values() for block in table)
        assert paged.blocks.users == [used[block] for block in range(40)]
        assert paged.blocks.free == 40 - len(used)
        for s in paged.lengths:
            if paged.lengths[s]:
                assert np.array_equal(paged._read(0, s)[0], plain._read(0, s)[0])
    assert value > 100


def test_striped_positions_are_dealt_out_in_turn():
    caches = [Striped(ContiguousCache([[(1,)]], "float64"), 3, rank) for rank in range(3)]
    for cache in caches:
        cache.open(0)
        cache.extend(0, 5)
        cache.truncate(0, 4)
        cache.extend(0, 4)
    assert [c.own.lengths[0] for c in caches] == [3, 3, 2]
    assert caches[0].bytes_per_token == 8 / 3


def test_what_cannot_be_is_refused():
    cache = ContiguousCache([[(1,)]], "float64")
    cache.open(3)
    with pytest.raises(ValueError, match="sequence 3 is open already"):
        cache.open(3)
    with pytest.raises(ValueError, match="cannot cut sequence 3 to 1 tokens: it has 0"):
        cache.truncate(3, 1)
