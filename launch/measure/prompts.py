"""Real prompts to measure speculation on: what it gains depends on the text more than on anything else."""

from __future__ import annotations

from typing import NamedTuple

from models.tokenizer import Tokenizer


class Prompt(NamedTuple):
    """`chat`: a user says it, and the model's chat template asks for an answer; otherwise it is continued. `repeats`: most of
    what a model writes after it stands in it already."""

    text: str
    chat: bool = False
    repeats: bool = False

    def ids(self, tokenizer: Tokenizer) -> list[int]:
        """Raises ValueError where the model has no chat template that is known."""
        return tokenizer.chat([{"role": "user", "content": self.text}]) if self.chat else tokenizer.encode(self.text)


STORY = """\
The ferry had not run since the storm, and so Marta walked down to the harbour every morning to look at it. The ropes \
were new, the paint was not, and the man who sold tickets slept in his hut with the door open. On the fourth day she \
found a letter pushed under the stone where she used to sit. It was addressed to nobody. She turned it over twice, \
looked back at the town, and"""

ESSAY = """\
Why do old cities have crooked streets? Part of the answer is that nobody drew them. People walked where the ground \
was dry and the slope was gentle, and houses were built along the paths that feet had already made. A straight road \
needs someone with the power to say where it goes, and with the patience to move whatever stands in its way. Yet the \
crooked street has advantages of its own."""

FUNCTION = '''\
import csv
from collections import defaultdict


def read_orders(path):
    """Read a CSV file of orders with the columns customer, product, quantity and price."""
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def total_by_customer(orders):
    """Return a dictionary from each customer to the sum of quantity times price."""
'''

RENAME = '''\
Here is a Python file.

```python
import csv
from pathlib import Path


def load(path, delimiter=","):
    """Return the rows of a CSV file as a list of dictionaries."""
    with open(path, newline="") as file:
        reader = csv.DictReader(file, delimiter=delimiter)
        rows = [dict(row) for row in reader]
    return rows


def average(rows, column):
    """Return the mean of a column, leaving out empty cells."""
    values = [float(row[column]) for row in rows if row[column]]
    if not values:
        raise ValueError(f"no values in column {column}")
    return sum(values) / len(values)
```

Write the whole file again, with the function `load` renamed to `read_table`.'''

QUOTES = """\
Report of the harbour office, 14 March. The storm reached the outer wall shortly after four in the morning. Two \
fishing boats broke loose and drifted against the northern pier, where they sank before a tug could reach them. Nobody \
was on board. The lighthouse lost its power at half past four and was dark until the keeper started the old diesel \
engine by hand. By noon the wind had fallen, and the ferry company announced that no ship would leave before the wall \
had been inspected by divers.

What does the report say about the boats, the lighthouse and the ferry? Quote its sentences."""

PROOFREAD = """\
Correct the spelling of this text.

The libary opens at nine in the morning and closes at six in the evening, except on Sundays, when it is closed all \
day. Readers may borow up to five books at a time and keep them for three weeks. Books that are not returned in time \
cost ten cents a day. Children under twelve need the signature of a parent before they can borrow anything. Newspapers \
and dictionaries can only be read in the reading room, wich is on the first floor next to the stairs."""

LIST = """\
Things to pack for a week of walking in the mountains:

1. Boots that have been worn before, with spare laces
2. Two pairs of wool socks
3. A rain jacket that packs small
4."""

QUESTIONS = "Why is the sky blue during the day but red at sunset? Explain it to a child of ten, in a few short paragraphs."

TABLE = """\
Turn this list into a Markdown table with the columns Planet, Diameter and Moons.

Mercury: diameter 4,879 km, 0 moons
Venus: diameter 12,104 km, 0 moons
Earth: diameter 12,756 km, 1 moon
Mars: diameter 6,792 km, 2 moons
Jupiter: diameter 142,984 km, 95 moons
Saturn: diameter 120,536 km, 146 moons"""

PROMPTS = {
    "story": Prompt(STORY),
    "essay": Prompt(ESSAY),
    "function": Prompt(FUNCTION),
    "rename": Prompt(RENAME, chat=True, repeats=True),
    "quotes": Prompt(QUOTES, chat=True, repeats=True),
    "proofread": Prompt(PROOFREAD, chat=True, repeats=True),
    "list": Prompt(LIST),
    "questions": Prompt(QUESTIONS, chat=True),
    "table": Prompt(TABLE, chat=True),
}
