"""Pytrees: nested dicts and lists whose leaves are anything else (tensors, parameter declarations, None).

Dict keys are visited in insertion order, list items by index. A leaf's path, such as ``blocks.3.qkv.w``, is its one
name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

Tree = Any  # dict[str, Tree] | list[Tree] | leaf


def map(fn: Callable, tree: Tree, *rest: Tree) -> Tree:
    """Applies ``fn`` leaf by leaf to trees of one structure; raises ValueError where the structures differ."""
    try:
        return _map(fn, tree, rest)
    except _Differ:
        return map_with_path(lambda _, *leaves: fn(*leaves), tree, *rest)  # which says where


class _Differ(Exception):
    """Trees of two structures."""


def _map(fn: Callable, tree: Tree, rest: tuple[Tree, ...]) -> Tree:
    """``map`` without paths: a training step goes through its trees many times."""
    if isinstance(tree, dict):
        if any(type(other) is not type(tree) or list(other) != list(tree) for other in rest):
            raise _Differ
        return {key: _map(fn, child, tuple(other[key] for other in rest)) for key, child in tree.items()}
    if isinstance(tree, list):
        if any(type(other) is not type(tree) or len(other) != len(tree) for other in rest):
            raise _Differ
        return [_map(fn, child, tuple(other[i] for other in rest)) for i, child in enumerate(tree)]
    return fn(tree, *rest)


def map_with_path(fn: Callable, tree: Tree, *rest: Tree, path: str = "") -> Tree:
    """Applies ``fn(path, leaf, *other_leaves)``; raises ValueError where the structures differ."""
    children = _children(tree)
    if children is None:
        return fn(path, tree, *rest)
    for other in rest:
        if type(other) is not type(tree) or [k for k, _ in _children(other)] != [k for k, _ in children]:
            raise ValueError(f"trees differ at {path or 'the root'!r}: {_describe(tree)} against {_describe(other)}")
    mapped = {
        key: map_with_path(fn, child, *(other[key] for other in rest), path=_join(path, key)) for key, child in children
    }
    return mapped if isinstance(tree, dict) else list(mapped.values())


def items(tree: Tree, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yields (path, leaf) in order."""
    children = _children(tree)
    if children is None:
        yield path, tree
    else:
        for key, child in children:
            yield from items(child, _join(path, key))


def leaves(tree: Tree) -> list:
    """Lists the leaves in order."""
    found: list = []
    _collect(tree, found)
    return found


def _collect(tree: Tree, found: list) -> None:
    if isinstance(tree, dict):
        for child in tree.values():
            _collect(child, found)
    elif isinstance(tree, list):
        for child in tree:
            _collect(child, found)
    else:
        found.append(tree)


def paths(tree: Tree) -> list[str]:
    """Lists the paths in the order of ``leaves``."""
    return [path for path, _ in items(tree)]


def unflatten(tree: Tree, new_leaves: list) -> Tree:
    """Puts ``new_leaves``, in the order of ``leaves(tree)``, into the structure of ``tree``."""
    iterator = iter(new_leaves)
    result = map(lambda _: next(iterator), tree)
    assert next(iterator, None) is None, "more leaves than the tree holds"
    return result


def _children(tree: Tree) -> list[tuple[Any, Tree]] | None:
    if isinstance(tree, dict):
        return list(tree.items())
    if isinstance(tree, list):
        return list(enumerate(tree))
    return None


def _join(path: str, key: Any) -> str:
    return f"{path}.{key}" if path else str(key)


def _describe(tree: Tree) -> str:
    children = _children(tree)
    if children is None:
        return f"a leaf ({type(tree).__name__})"
    return f"a {type(tree).__name__} of {[k for k, _ in children]}"
