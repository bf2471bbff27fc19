"""No queue: when a block was freed and when it got its key are numbers, and the smallest is looked for each time."""

import numpy as np


def key(parent, tokens):
    return hash((parent or 17, *tokens))


class Cache:
    def __init__(self, blocks, block):
        self.block, self.now = block, 0
        self.users = np.zeros(blocks, int)
        self.freed = np.arange(blocks) - blocks
        self.keys, self.got = [None] * blocks, np.zeros(blocks, int)

    def tick(self):
        self.now += 1
        return self.now

    def find(self, k):
        have = [id for id, other in enumerate(self.keys) if other == k]
        return min(have, key=self.got.__getitem__, default=None)

    def match(self, tokens):
        table, k = [], None
        for start in range(0, len(tokens) - self.block, self.block):
            k = key(k, tokens[start : start + self.block])
            id = self.find(k)
            if id is None:
                break
            table.append(id)
        return table

    def oldest(self, besides=()):
        return sorted((id for id in np.flatnonzero(self.users == 0).tolist() if id not in besides), key=self.freed.__getitem__)

    def name(self, table, tokens, first):
        k = None
        for n in range(len(tokens) // self.block):
            k = key(k, tokens[n * self.block :][: self.block])
            if n >= first:
                self.keys[table[n]], self.got[table[n]] = k, self.tick()

    def admit(self, tokens):
        hit = self.match(tokens)
        needed = -(-len(tokens) // self.block) - len(hit)
        new = self.oldest(besides=hit)[:needed]
        if len(new) < needed:
            raise MemoryError
        for id in new:
            self.keys[id] = None
        table = hit + new
        self.users[table] += 1
        self.name(table, tokens, len(hit))
        return table, len(hit) * self.block

    def append(self, table, tokens):
        if len(table) * self.block < len(tokens):
            free = self.oldest()
            if not free:
                raise MemoryError
            self.keys[free[0]], self.users[free[0]] = None, 1
            table.append(free[0])
        if len(tokens) % self.block == 0:
            self.name(table, tokens, len(table) - 1)

    def release(self, table):
        self.users[table] -= 1
        for id in reversed(table):
            self.freed[id] = self.tick()
