"""What JSON holds, with a few entries as nobody would write them: files that are damaged, or made to harm."""

import copy

# What stands where something else should.
ODD = [
    None,
    True,
    0,
    -1,
    2**31,
    2**63,
    -(2**70),
    1.5,
    float("nan"),
    10**400,
    "",
    "x",
    "\ud800",
    "../x",
    [],
    {},
    [[]],
    [1],
    [None],
]
ODD += [["a"], {"a": 1}]


def mutated(value, draw):
    """A copy of what JSON holds in which one to three entries are left out, doubled or something else."""
    value = copy.deepcopy(value)
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        places = [place for place in _places(value) if place]
        if not places:
            break
        *way, last = draw.choice(places)
        at = value
        for step in way:
            at = at[step]
        kind = draw.random()
        if kind < 0.15:
            del at[last]
        elif kind < 0.25 and isinstance(at, list):
            at.insert(draw.randrange(len(at) + 1), copy.deepcopy(draw.choice(at)))
        else:
            at[last] = copy.deepcopy(draw.choice(ODD))
    return value


def _places(value, way=()):
    yield way
    for step in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from _places(value[step], (*way, step))
