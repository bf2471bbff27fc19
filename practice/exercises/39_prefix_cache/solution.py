"""A prefix cache over paged blocks (vLLM's automatic prefix caching; SGLang, arXiv 2312.07104, has a tree in place of keys), as plain data.

A request holds a table: a list of block ids, one for each `block` tokens, the last of which may not be full. A full block has a key,
made of the key of the block before it and of its own tokens: so it stands for all tokens from the first to its last. Only full
blocks have keys, and only what has a key is found.
  admit    a prompt comes: it shares the blocks of its longest prefix that is found, and takes others for the rest. Its last token is
           never shared: somebody must compute it to get the next one. All its full blocks are found from now on
  append   a token comes: it takes a block when the first token of that block comes; with its last the block gets its key
  release  a request ends. A block that nobody holds is free, and is found until it is taken
Free blocks stand in a queue, at first by id. Blocks are taken from its front; release puts those that nobody holds any more at its end,
the last of the table first. A block loses its key when it is taken. Of blocks with the same key the one that got it first is found.
`users[id]` counts the requests that hold a block. take and fill are there to help you: called from outside are the others.
"""

import hashlib


def key(parent, tokens):
    """Of a full block: `parent` is the key of the block before it, None at the first; tokens: a list of ints -> key, to look up in a dict.

    Equal only if parent and tokens are the same, and never longer as text than 300 characters, however many blocks came before.
    """
    # --- yours ---
    return hashlib.sha256(repr((parent, tokens)).encode()).hexdigest()
    # --- end ---


class Cache:
    def __init__(self, blocks, block):
        """Given. free: ids, the next to be taken in front; key_of[id]: None without one; ids[key]: who has it, the first to get it in front."""
        self.block, self.users = block, [0] * blocks
        self.free, self.key_of, self.ids = list(range(blocks)), [None] * blocks, {}

    def match(self, tokens):
        """-> table: the ids of the blocks that a prompt of these tokens (one or more) would share. Changes nothing."""
        # --- yours ---
        table, parent = [], None
        for n in range((len(tokens) - 1) // self.block):
            parent = key(parent, tokens[n * self.block : (n + 1) * self.block])
            if parent not in self.ids:
                break
            table.append(self.ids[parent][0])
        return table
        # --- end ---

    def take(self):
        """The free block in front, which loses its key, for one request -> id."""
        # --- yours ---
        id = self.free.pop(0)
        old = self.key_of[id]
        if old is not None:
            self.ids[old].remove(id)
            if not self.ids[old]:
                del self.ids[old]
        self.key_of[id] = None
        self.users[id] = 1
        return id
        # --- end ---

    def fill(self, table, n, tokens):
        """Block n of the table has all its tokens: it gets its key. tokens: all of the request's."""
        # --- yours ---
        parent = self.key_of[table[n - 1]] if n else None
        own = key(parent, tokens[n * self.block : (n + 1) * self.block])
        self.key_of[table[n]] = own
        self.ids.setdefault(own, []).append(table[n])
        # --- end ---

    def admit(self, tokens):
        """-> table, and how many of the prompt's tokens need not be computed. Raises MemoryError, and changes nothing, without enough blocks."""
        # --- yours ---
        table = self.match(tokens)
        shared = len(table)
        more = -(-len(tokens) // self.block) - shared
        woken = [id for id in table if self.users[id] == 0]
        if more > len(self.free) - len(woken):
            raise MemoryError(f"{more} blocks are needed, {len(self.free) - len(woken)} are free")
        for id in woken:
            self.free.remove(id)
        for id in table:
            self.users[id] += 1
        for _ in range(more):
            table.append(self.take())
        for n in range(shared, len(tokens) // self.block):
            self.fill(table, n, tokens)
        return table, shared * self.block
        # --- end ---

    def append(self, table, tokens):
        """tokens: all of the request's, the last of them new. Changes the table in place. Raises MemoryError, and changes nothing, without a block."""
        # --- yours ---
        if (len(tokens) - 1) % self.block == 0:
            if not self.free:
                raise MemoryError("no block is free")
            table.append(self.take())
        if len(tokens) % self.block == 0:
            self.fill(table, len(table) - 1, tokens)
        # --- end ---

    def release(self, table):
        """One request less holds the table's blocks."""
        # --- yours ---
        for id in reversed(table):
            self.users[id] -= 1
            if self.users[id] == 0:
                self.free.append(id)
        # --- end ---
