"""Files that no one would write: some bytes of a valid one changed."""

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
