"""A view of the pool as one row of slots; the search for a block begins behind the last one taken."""

import numpy as np


class Pool:
    def __init__(self, blocks, block, kv_heads, width, dtype):
        self.block, self.last = block, 0
        self.k_NKE, self.v_NKE = (np.empty((blocks * block, kv_heads, width), dtype) for _ in range(2))
        self.users = np.zeros(blocks, int)

    def alloc(self):
        for id in [*range(self.last, len(self.users)), *range(self.last)]:
            if not self.users[id]:
                self.last, self.users[id] = id, 1
                return id
        raise MemoryError

    def share(self, id, more=1):
        if self.users[id] < 1:
            raise ValueError
        self.users[id] += more

    def free(self, id):
        self.share(id, -1)

    def slots(self, id):
        return slice(id * self.block, (id + 1) * self.block)

    def write(self, table, position, k_KE, v_KE):
        which = position // self.block
        if which == len(table):
            table.append(self.alloc())
        elif self.users[table[which]] > 1:
            new, old = self.alloc(), table[which]
            for a in (self.k_NKE, self.v_NKE):
                a[self.slots(new)] = a[self.slots(old)]
            self.free(old)
            table[which] = new
        at = table[which] * self.block + position - which * self.block
        self.k_NKE[at], self.v_NKE[at] = k_KE, v_KE

    def gather(self, table, length):
        at = [table[n // self.block] * self.block + n % self.block for n in range(length)]
        return self.k_NKE[at], self.v_NKE[at]
