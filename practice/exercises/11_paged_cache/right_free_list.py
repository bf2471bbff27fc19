"""A list of free ids, last in, first out; gather block by block."""

import numpy as np


class Pool:
    def __init__(self, blocks, block, kv_heads, width, dtype):
        self.kv = np.full((2, blocks, block, kv_heads, width), np.nan, dtype)
        self.block, self.users, self.idle = block, [0] * blocks, list(range(blocks))

    def alloc(self):
        try:
            id = self.idle.pop()
        except IndexError:
            raise MemoryError("full") from None
        self.users[id] += 1
        return id

    def share(self, id):
        if id in self.idle:
            raise ValueError(f"{id} is free")
        self.users[id] += 1

    def free(self, id):
        if id in self.idle:
            raise ValueError(f"{id} is free")
        self.users[id] -= 1
        if not self.users[id]:
            self.idle.append(id)

    def write(self, table, position, k_KE, v_KE):
        n, slot = divmod(position, self.block)
        if n < len(table) and self.users[table[n]] != 1:
            mine, old = self.alloc(), table[n]
            self.kv[:, mine, :] = self.kv[:, old]
            table[n] = mine
            self.free(old)
        elif n >= len(table):
            table += [self.alloc()]
        self.kv[:, table[n], slot] = k_KE, v_KE

    def gather(self, table, length):
        kv = np.concatenate([self.kv[:, id] for id in table], axis=1)[:, :length]
        return kv[0], kv[1]
