"""Which block of keys and values is whose: free, in use (by one sequence or several), or kept for the prefix that it holds.

Plain data: a block is a number below the pool's size, and has room for 16 tokens. Its arrays are elsewhere. After
PagedAttention (arXiv 2309.06180): a sequence has a table of blocks, and several tables may name the same block.

A full block whose tokens have all been computed may be published. Then it is known by its link: its own tokens and, through the
link before it, all tokens before them. A later request that begins with the same tokens takes the block into its table instead
of computing it again. Published blocks that nobody uses stay until no other block is free; then the one that was used longest
ago goes first. A table is dropped from its end, so that a link goes before the one that it follows.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

BLOCK = 16


class OutOfBlocks(MemoryError):
    """The pool has not as many free blocks as were asked for; nothing was changed."""


def needed(tokens: int) -> int:
    """Blocks that hold so many tokens."""
    return -(-tokens // BLOCK)


def part_of(tokens: Sequence[int], first: int, owner: str = "") -> tuple[int | str, ...]:
    """What a full block is known by: its tokens, from `first` on. At the beginning of a text, also whose it is: nobody finds
    what another owner has computed."""
    part = tuple(tokens[first : first + BLOCK])
    return (owner, *part) if owner and not first else part


class Link:
    """The tokens of a full block, and the link of the block before it. Two links are the same only if they are one object."""

    __slots__ = ("before", "hash", "tokens")

    def __init__(self, before: Link | None, tokens: tuple[int | str, ...]) -> None:
        self.before, self.tokens = before, tokens
        self.hash = chain(before, tokens)


def chain(before: Link | None, tokens: tuple[int | str, ...]) -> int:
    """The hash of a block's tokens and, through that of the link before, of all tokens before them. It is the same in every
    process: Python salts the hashes of strings only."""
    return hash((before.hash if before is not None else 0, tokens))


class Opened(NamedTuple):
    """A new table. `published`: how many of its first blocks are published ones; `link`: that of the last of these; `computed`:
    how many tokens need not be computed; `copy`: the block to copy before the step, if any, as (from, to)."""

    table: list[int]
    published: int
    link: Link | None
    computed: int
    copy: tuple[int, int] | None


class BlockPool:
    """`size` blocks; None: as many as are asked for. `users`: how many tables name each block."""

    def __init__(self, size: int | None = None) -> None:
        self.size = size
        self.users = [0] * (size or 0)
        self._free = list(range((size or 0) - 1, -1, -1))
        # Published and without users, the one used longest ago first.
        self._kept: OrderedDict[int, None] = OrderedDict()
        self._links: dict[int, Link] = {}
        self._published: dict[int, int] = {}

    @property
    def free(self) -> int:
        """Blocks that can be taken, kept ones among them."""
        return sys.maxsize if self.size is None else len(self._free) + len(self._kept)

    @property
    def kept(self) -> int:
        """Published blocks that nobody uses."""
        return len(self._kept)

    @property
    def used(self) -> int:
        return len(self.users) - len(self._free) - len(self._kept)

    def take(self) -> int:
        """A block for one user; what it holds means nothing any more. Raises OutOfBlocks."""
        if not self._free and self.size is None:
            # Doubled: whoever keeps an array of as many blocks then copies each once on average.
            there = len(self.users)
            self.users += [0] * max(8, there)
            self._free = list(range(len(self.users) - 1, there - 1, -1))
        if self._free:
            block = self._free.pop()
        elif self._kept:
            block, _ = self._kept.popitem(last=False)
            del self._published[self._links.pop(block).hash]
        else:
            raise OutOfBlocks(f"all {self.size} blocks of {BLOCK} tokens are in use")
        self.users[block] = 1
        return block

    def use(self, block: int) -> None:
        """A block that is in use or kept gets one user more."""
        self._kept.pop(block, None)
        self.users[block] += 1

    def drop(self, block: int) -> None:
        """A block loses a user. Raises ValueError if it has none."""
        if not self.users[block]:
            raise ValueError(f"block {block} is free already")
        self.users[block] -= 1
        if self.users[block]:
            return
        if block in self._links:
            self._kept[block] = None
        else:
            self._free.append(block)

    def grow(self, table: list[int], tokens: int) -> None:
        """Take blocks until a table has room for so many tokens. Raises OutOfBlocks."""
        while len(table) < needed(tokens):
            table.append(self.take())

    def cut(self, table: list[int], tokens: int) -> None:
        """Drop the blocks behind the first `tokens` tokens of a table, from its end."""
        while len(table) > needed(tokens):
            self.drop(table.pop())

    def shed(self, table: list[int], tokens: int) -> int:
        """Drop the blocks of a table that hold nothing but its first `tokens` tokens. Returns how many these were."""
        count = max(0, tokens // BLOCK)
        for block in table[:count]:
            self.drop(block)
        del table[:count]
        return count

    def unpublish(self, table: Sequence[int]) -> None:
        """Nobody is to find these blocks any more."""
        for block in table:
            link = self._links.pop(block, None)
            if link is not None:
                del self._published[link.hash]
                if block in self._kept:
                    del self._kept[block]
                    self._free.append(block)

    def find(self, tokens: Sequence[int], owner: str = "") -> list[int]:
        """The published blocks of this owner that hold the longest beginning of `tokens`. An equal hash proves nothing: the
        block must hold the same tokens, and follow the link of the block before it."""
        table: list[int] = []
        link = None
        for first in range(0, len(tokens) - BLOCK + 1, BLOCK):
            part = part_of(tokens, first, owner)
            block = self._published.get(chain(link, part))
            if block is None or self._links[block].before is not link or self._links[block].tokens != part:
                break
            link = self._links[block]
            table.append(block)
        return table

    def open(self, tokens: Sequence[int], reserve: int = 0, reuse: bool = True, owner: str = "") -> Opened | None:
        """A table for all of `tokens`, which leaves at least `reserve` blocks free; None, and nothing changed, if there are not
        enough. `reuse`: begin with published blocks, of this owner.

        The last token at least is left to compute, since its logits are wanted. Where published blocks hold all tokens, the
        last block is copied and not shared, since that token is written again.
        """
        shared = self.find(tokens, owner) if reuse else []
        for block in shared:
            self.use(block)
        whole = bool(shared) and len(shared) * BLOCK == len(tokens)
        if whole and self.free < 1 + reserve:
            # No room for the copy beside what it is copied from: that block is computed again.
            self.drop(shared.pop())
            whole = False
        new = needed(len(tokens)) - len(shared)
        if self.free < new + reserve:
            self.cut(shared, 0)
            return None
        source = shared.pop() if whole else None
        table = shared + [self.take() for _ in range(new + whole)]
        computed = len(tokens) - 1 if whole else len(shared) * BLOCK
        link = self._links[shared[-1]] if shared else None
        if source is None:
            return Opened(table, len(shared), link, computed, None)
        self.drop(source)
        return Opened(table, len(shared), link, computed, (source, table[-1]))

    def publish(self, block: int, before: Link | None, tokens: tuple[int | str, ...]) -> tuple[int, Link]:
        """Make a full, computed block known: its number from now on and its link.

        If another block holds the same after the same, the user of this one is moved to that one and this one is dropped.
        """
        link = Link(before, tokens)
        other = self._published.get(link.hash)
        if other is None:
            self._published[link.hash], self._links[block] = block, link
            return block, link
        known = self._links[other]
        if known.before is before and known.tokens == tokens:
            self.use(other)
            self.drop(block)
            return other, known
        # Equal hashes by chance: the first stays known, this one is not.
        return block, link
