"""A paged KV cache (PagedAttention, arXiv 2309.06180): a pool of blocks, and for each sequence a table of block ids.

The token at position n lies in block table[n // block], slot n % block. A table is a plain list; write changes it in place:
  - it takes a block when the first token of that block comes, and not before;
  - a block that several tables hold is never written: the writer takes a block, copies it, and holds that in its place.
Sequences fork by copying a table and sharing each of its blocks; they end by freeing each of them.
`users[id]` counts the tables that hold a block; a block with 0 may be taken again, whatever it holds.
At first all is NaN.
"""

import numpy as np


class Pool:
    def __init__(self, blocks, block, kv_heads, width, dtype):
        """Given. `blocks` blocks of `block` tokens, K heads of width E."""
        self.block = block
        self.k_BSKE = np.full((blocks, block, kv_heads, width), np.nan, dtype)
        self.v_BSKE = np.full((blocks, block, kv_heads, width), np.nan, dtype)
        self.users = [0] * blocks

    def alloc(self):
        """A block that nobody held and one table holds now -> id. Raises MemoryError if there is none."""
        # --- yours ---
        if 0 not in self.users:
            raise MemoryError(f"all {len(self.users)} blocks are in use")
        id = self.users.index(0)
        self.users[id] = 1
        return id
        # --- end ---

    def share(self, id):
        """One more table holds the block. Raises ValueError if none did."""
        # --- yours ---
        if self.users[id] == 0:
            raise ValueError(f"block {id} is free: it cannot be shared")
        self.users[id] += 1
        # --- end ---

    def free(self, id):
        """One table less holds the block. Raises ValueError if none did."""
        # --- yours ---
        if self.users[id] == 0:
            raise ValueError(f"block {id} is free already")
        self.users[id] -= 1
        # --- end ---

    def write(self, table, position, k_KE, v_KE):
        """The token at `position`, at most one past those there. Raises MemoryError, and changes nothing, without a block."""
        # --- yours ---
        place = position // self.block
        slot = position % self.block
        if place == len(table):
            table.append(self.alloc())
        if self.users[table[place]] > 1:
            copy = self.alloc()
            self.k_BSKE[copy] = self.k_BSKE[table[place]]
            self.v_BSKE[copy] = self.v_BSKE[table[place]]
            self.free(table[place])
            table[place] = copy
        self.k_BSKE[table[place], slot] = k_KE
        self.v_BSKE[table[place], slot] = v_KE
        # --- end ---

    def gather(self, table, length):
        """The first `length` tokens, copied: what is written later does not change them -> k (length, K, E), v (length, K, E)."""
        # --- yours ---
        position_S = np.arange(length)
        id_S = np.array(table, int)[position_S // self.block]
        slot_S = position_S % self.block
        return self.k_BSKE[id_S, slot_S], self.v_BSKE[id_S, slot_S]
        # --- end ---
