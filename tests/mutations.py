"""Files that no one would write: some bytes of a valid one changed, or one value of it."""

import copy
import math

from hypothesis import strategies as st

# Each a kind, a place as a ten-thousandth of the file, and a byte.
CHANGES = st.lists(
    st.tuples(st.sampled_from(["set", "set", "insert", "drop", "cut"]), st.integers(0, 9_999), st.integers(0, 255)),
    min_size=1,
    max_size=4,
)


def mutate(data, changes):
    data = bytearray(data)
    for kind, at, value in changes:
        at = at * len(data) // 10_000
        if kind == "set" and at < len(data):
            data[at] = value
        elif kind == "cut":
            del data[at:]
        elif kind == "insert":
            data[at:at] = bytes([value])
        elif kind == "drop":
            del data[at : at + value % 16]
    return bytes(data)


OTHERS = (
    None,
    True,
    False,
    0,
    1,
    -1,
    3,
    10**12,
    10**30,
    0.5,
    math.nan,
    math.inf,
    "",
    "gelu",
    [],
    [1],
    ["x"],
    {},
    {"a": 1},
)


def with_other_values(tree):
    """Copies of a JSON object in each of which one value, at any depth, is another one."""
    for path in _paths(tree):
        for other in OTHERS:
            changed = copy.deepcopy(tree)
            *parents, last = path
            inside = changed
            for key in parents:
                inside = inside[key]
            inside[last] = copy.deepcopy(other)
            yield changed


def _paths(tree, path=()):
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from _paths(value, (*path, key))
