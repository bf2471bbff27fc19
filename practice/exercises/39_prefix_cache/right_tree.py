"""A tree of blocks, an edge each with its tokens as a tuple, as a radix tree has them: keys are made, but not used."""

import zlib


def key(parent, tokens):
    text = ",".join(map(str, [parent, *tokens])).encode()
    return zlib.crc32(text), zlib.adler32(text), len(text)


class Node(dict):
    """Children by tokens; `blocks`: who holds these tokens after those of the nodes above, the first in front."""

    def __init__(self):
        super().__init__()
        self.blocks = []


class Cache:
    def __init__(self, blocks, block):
        self.block, self.root = block, Node()
        self.users, self.queue, self.at = [0] * blocks, [*range(blocks)], {}

    def walk(self, tokens):
        node = self.root
        for edge in zip(*[iter(tokens)] * self.block, strict=False):
            node = node.setdefault(edge, Node())
            yield node

    def match(self, tokens):
        table = []
        for node in self.walk(tokens[:-1]):
            if not node.blocks:
                break
            table += node.blocks[:1]
        return table

    def pick(self):
        id = self.queue[0]
        self.queue = self.queue[1:]
        if id in self.at:
            self.at.pop(id).blocks.remove(id)
        self.users[id] = 1
        return id

    def plant(self, id, node):
        self.at[id] = node
        node.blocks.append(id)

    def admit(self, tokens):
        shared = self.match(tokens)
        rest = [id for id in self.queue if id not in shared]
        needed = len(tokens[:: self.block]) - len(shared)
        if needed > len(rest):
            raise MemoryError("full")
        self.queue = rest
        for id in shared:
            self.users[id] += 1
        table = shared + [self.pick() for _ in range(needed)]
        for id, node in list(zip(table, self.walk(tokens), strict=False))[len(shared) :]:
            self.plant(id, node)
        return table, self.block * len(shared)

    def append(self, table, tokens):
        full, over = divmod(len(tokens), self.block)
        if full + bool(over) > len(table):
            if not self.queue:
                raise MemoryError("full")
            table.append(self.pick())
        if not over:
            self.plant(table[-1], list(self.walk(tokens))[-1])

    def release(self, table):
        ended = []
        for id in table:
            self.users[id] -= 1
            if not self.users[id]:
                ended.insert(0, id)
        self.queue = self.queue + ended
