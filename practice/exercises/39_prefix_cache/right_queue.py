"""An ordered dict as the queue, small objects for blocks; keys are pairs of numbers, given out as they are first seen."""

from collections import OrderedDict
from types import SimpleNamespace

NUMBERS = {}


def key(parent, tokens):
    return NUMBERS.setdefault((parent, *tokens), len(NUMBERS))


class Cache:
    def __init__(self, blocks, block):
        self.block = block
        self.pool = [SimpleNamespace(id=id, users=0, key=None) for id in range(blocks)]
        self.idle = OrderedDict((b.id, b) for b in self.pool)
        self.known = {}

    @property
    def users(self):
        return [b.users for b in self.pool]

    def full(self, tokens):
        parent, size = None, self.block
        for end in range(size, len(tokens) + 1, size):
            parent = key(parent, tokens[end - size : end])
            yield parent

    def match(self, tokens):
        found = []
        for k in self.full(tokens[:-1]):
            if not self.known.get(k):
                return found
            found.append(next(iter(self.known[k])))
        return found

    def fresh(self):
        _, b = self.idle.popitem(last=False)
        if b.key is not None:
            del self.known[b.key][b.id]
        b.key, b.users = None, 1
        return b

    def mark(self, id, k):
        self.pool[id].key = k
        self.known.setdefault(k, {})[id] = True

    def admit(self, tokens):
        table = self.match(tokens)
        hits = len(table)
        blocks = (len(tokens) + self.block - 1) // self.block
        idle = [id for id in self.idle if id not in table]
        if blocks - hits > len(idle):
            raise MemoryError
        for id in table:
            self.pool[id].users += 1
            self.idle.pop(id, None)
        table += [self.fresh().id for _ in range(blocks - hits)]
        for n, k in enumerate(self.full(tokens)):
            if n >= hits:
                self.mark(table[n], k)
        return table, hits * self.block

    def append(self, table, tokens):
        if len(tokens) > len(table) * self.block:
            if len(self.idle) == 0:
                raise MemoryError
            table += [self.fresh().id]
        if len(tokens) == len(table) * self.block:
            *_, k = self.full(tokens)
            self.mark(table[-1], k)

    def release(self, table):
        for id in table[::-1]:
            b = self.pool[id]
            b.users -= 1
            if b.users == 0:
                self.idle[id] = b
