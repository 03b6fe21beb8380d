"""Resharding: what any layout wrote every other reads, bit for bit, and hardly a byte beside what its ranks need."""

import functools
import itertools
import math

import pytest
import states

from odit import checkpoint, config, manifest, models, shards, tree
from odit.manifest import Box
from odit.models.config import Shape
from odit.parallel import spec
from odit.parallel.megatron import CLAIMS

WORLDS, STAGES, SEQUENCES = (1, 2, 3, 4, 8), (0, 1, 2, 3), ("none", "sp 2", "megatron sp 2")
LAYOUTS = [
    (world, zero, sequence)
    for world, zero, sequence in itertools.product(WORLDS, STAGES, SEQUENCES)
    if sequence == "none" or world % 2 == 0
]


def layout_of(world, zero, sequence):
    return {"zero": zero, "sp": 1 if sequence == "none" else 2, "claimed": CLAIMS if "megatron" in sequence else ""}


def write(out, layout):
    """The folder of a checkpoint of step 7 by a layout; every element is a cell, so that tiny leaves have rims."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manifest, "CELL", 4)
        found = states.save(out, 7, layout[0], **layout_of(*layout))
    assert not any(isinstance(one, Exception) for one in found), found
    return found[0]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """What ``write`` makes, once a layout."""
    return functools.cache(lambda layout: write(tmp_path_factory.mktemp("layout"), layout))


PAIRS = list(itertools.product(LAYOUTS, LAYOUTS))


@pytest.mark.every(37)  # coprime to the layouts' number, so that all come on both sides
@pytest.mark.parametrize("writer, reader", PAIRS)
def test_any_layout_reads_any_other(written, writer, reader):
    assert_read(written(writer), reader)


def assert_read(folder, reader):
    """Every rank of a layout reads its state bit for bit, and all of them together few bytes beside what they need."""
    read, stored, needed = [], shards.Reader._stored, 0

    def counting(self, name, piece, box):
        read.append(4 * math.prod(box.shape))
        return stored(self, name, piece, box)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards.Reader, "_stored", counting)
        for rank in range(reader[0]):
            composed = states.plan_of(folder, reader[0], rank, **layout_of(*reader))
            state, about = checkpoint.read(folder, composed)
            assert states.is_state(composed, state, 7) and about["note"] == 7, rank
            needed += 4 * 4 * sum(leaf.numel() for leaf in tree.leaves(state.params))
    assert needed <= sum(read) <= 1.05 * needed


def test_both_sides_see_all_layouts():
    chosen = PAIRS[::37]
    assert len(chosen) > 30
    for side in (0, 1):
        assert {layout[0] for layout in (pair[side] for pair in chosen)} == set(WORLDS)
        assert {layout[1:] for layout in (pair[side] for pair in chosen)} == set(itertools.product(STAGES, SEQUENCES))


def test_the_published_model_is_read_with_hardly_a_byte_in_vain():
    """DiT-XL/2 in cells of their real size: bytes read / needed over all ranks, by arithmetic, for every pair."""
    model = config.presets()["dit-xl-2"][1].model
    declared = models.of(model).declare(model, Shape(4, (32, 32), 1000, 2))
    leaves = {path: p for path, p in tree.items(declared) if not path.startswith("blocks.") or ".0." in path}
    kinds = {
        (world, zero > 0, sequence): spec.specs(leaves, world, zero > 0, 2 if sequence != "none" else 1, CLAIMS)
        for world, zero, sequence in LAYOUTS
        if sequence != "sp 2" and zero < 2  # by spec these are like others
    }
    writers = [(key, kinds[key]) for key in ((1, False, "none"), (3, True, "none"), (8, True, "megatron sp 2"))]
    worst = max(bytes_of(leaves, *pair) for pair in itertools.product(writers, kinds.items()))
    assert 1 <= worst <= 1.05


def bytes_of(leaves, writer, reader):
    """Bytes read / bytes needed of one block and what is outside, over all ranks of the reader."""
    ((world_w, *_), specs_w), ((world_r, *_), specs_r) = writer, reader
    read = needed = 0
    for name, p in leaves.items():
        times = 28 if name.startswith("blocks.") else 1
        cell = manifest.cell_shape(p.shape, tuple(letter in CLAIMS for letter in p.dims))
        w, r = specs_w[name], specs_r[name]
        pieces = [Box(w.offsets(p.shape, i), w.local_shape(p.shape)) for i in range(world_w) if w.owns(i)]
        for rank in range(world_r):
            box = Box(r.offsets(p.shape, rank), r.local_shape(p.shape))
            for piece in pieces:
                if (common := box.common(piece)) is not None:
                    needed += times * math.prod(common.shape)
                    read += times * math.prod(manifest.whole_cells(cell, common, piece).shape)
    return read / needed


@pytest.mark.parametrize("size", [4, 64, 1 << 18])
def test_cells_tile_a_piece(monkeypatch, size):
    """Each element of a piece is in one of its cells, each cell in the grid; the smallest box of cells is that."""
    monkeypatch.setattr(manifest, "CELL", size)
    for _, p in tree.items(states.DECLARED):
        cell = manifest.cell_shape(p.shape, tuple(letter in CLAIMS for letter in p.dims))
        assert all(n % c == 0 for n, c in zip(p.shape, cell)) and (math.prod(cell) * 4 <= size or size < 64)
        for low in itertools.product(*(range(0, n, 2) for n in p.shape)):
            box = Box(low, tuple(min(3, n - a) for a, n in zip(low, p.shape)))
            seen = [
                index
                for part in manifest.cells(cell, box)
                for index in itertools.product(*(range(a, b) for a, b in zip(part.offsets, part.ends)))
            ]
            expected = list(itertools.product(*(range(a, b) for a, b in zip(box.offsets, box.ends))))
            assert sorted(seen) == expected
            whole = list(manifest.cells(cell, Box((0,) * len(p.shape), p.shape)))
            wide = manifest.whole_cells(cell, box, Box((0,) * len(p.shape), p.shape))
            assert all(a % c == 0 and b % c == 0 for a, b, c in zip(wide.offsets, wide.ends, cell))
            assert all(a - w < c for a, w, c in zip(box.offsets, wide.offsets, cell)) and wide.common(box) == box
            numbered = manifest.numbered_cells(cell, wide, Box((0,) * len(p.shape), p.shape))
            assert [part for _, part in numbered] == [part for part in whole if part.common(wide)]
            numbered = manifest.numbered_cells(cell, wide, Box((0,) * len(p.shape), p.shape))
            assert all(whole[number] == part for number, part in numbered)
