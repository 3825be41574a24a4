"""Strings in one buffer read as the list they were made of, in a fraction of its memory."""

import pickle
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.data.strings import Strings


@given(
    st.text(max_size=5),
    st.lists(st.text(max_size=8) | st.from_regex(r"\A([0-9a-f]{2}){0,4}\Z"), max_size=9),
)
def test_strings_are_a_list_of_them(prefix: str, values: list[str]) -> None:
    values = [prefix + v for v in values]
    for held in (Strings(values), pickle.loads(pickle.dumps(Strings(values)))):
        assert list(held) == values and len(held) == len(values)
        assert [held[i] for i in range(-len(values), len(values))] == values * 2
        assert held[1:4] == values[1:4]
        with pytest.raises(IndexError):
            held[len(values)]


@pytest.mark.parametrize("values", [["ab", "cd"], ["AB", "CD"], ["", ""], ["0x", "ab"], ["abc"]])
def test_digits_come_back_as_they_were(values: list[str]) -> None:
    assert list(Strings(values)) == values


def test_a_hash_takes_its_bytes_and_a_name_what_sets_it_apart() -> None:
    def held(values: list[str]) -> float:
        tracemalloc.start()
        kept = Strings(values)
        used = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        return used / len(kept)

    assert held([f"{n * 7919:064x}" for n in range(5000)]) < 33
    assert held([f"s3://bucket/a/long/name/of/a/folder/{n:08d}.tar" for n in range(5000)]) < 10
