import pytest

from odit import tree

T = {"a": 1, "blocks": [{"w": 2}, {"w": 3}], "z": {}}


def test_paths_leaves_and_structure():
    assert tree.paths(T) == ["a", "blocks.0.w", "blocks.1.w"]
    assert tree.leaves(T) == [1, 2, 3]
    assert tree.map(lambda a, b: a + b, T, T) == {"a": 2, "blocks": [{"w": 4}, {"w": 6}], "z": {}}
    assert tree.unflatten(T, [7, 8, 9]) == {"a": 7, "blocks": [{"w": 8}, {"w": 9}], "z": {}}


@pytest.mark.parametrize("other", [{"a": 1}, {"a": 1, "blocks": [{"w": 2}], "z": {}}, {"a": [1], "blocks": {}, "z": 1}])
def test_other_structures_are_refused(other):
    with pytest.raises(ValueError, match="trees differ at"):
        tree.map(lambda a, b: a, T, other)


def test_unflatten_wants_every_leaf():
    with pytest.raises(AssertionError):
        tree.unflatten(T, [1, 2, 3, 4])
