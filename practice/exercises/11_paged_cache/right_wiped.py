"""A block is wiped when it is taken, so that nothing of its last holder can be read."""

import numpy as np


class Pool(Pool):  # noqa: F821  the solution's
    def alloc(self):
        id = super().alloc()
        self.k_BSKE[id] = self.v_BSKE[id] = np.nan
        return id

    def write(self, table, position, k_KE, v_KE):
        place, slot = divmod(position, self.block)
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
