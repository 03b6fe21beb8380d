"""Steps of a few layouts with CUDA graphs and without, under torchrun: a JSON line a layout and precision.

    torchrun --standalone --nproc_per_node 2 tests/graphed.py

All in one process a rank, as starting it takes longer than the steps.
"""

import dataclasses
import json

import torch

from odit import config, data, plan, random, train, tree
from odit.config import Parallel
from odit.data import loader
from odit.models import dit
from odit.parallel import mesh as meshes

KEY, STEPS = random.key(2), 4
LAYOUTS = {
    "zero 0": Parallel(),
    "zero 1": Parallel(zero=1),
    "zero 2": Parallel(zero=2),
    "zero 2, selective, bf16 sums": Parallel(zero=2, remat="selective", reduce="bf16"),
    "zero 3": Parallel(zero=3),
    "zero 3, block": Parallel(zero=3, remat="block"),
    "zero 0, fastseq, fp8": Parallel(sp=2, sequence="fastseq", ring_fp8=True),
    "zero 1, ulysses": Parallel(zero=1, sp=2, sequence="ulysses"),
    "zero 2, fastseq": Parallel(zero=2, sp=2, sequence="fastseq"),
    "zero 2, megatron": Parallel(zero=2, sp=2, sequence="megatron"),
    "zero 3, ring": Parallel(zero=3, sp=2, sequence="ring"),
    "zero 3, latte, dsp": Parallel(zero=3, sp=2, sequence="dsp"),
}


def run_of(layout: str, precision: str) -> config.Run:
    """A step of 2 or 4 micro-batches."""
    clip = dict(frames=4, image_size=16) if "latte" in layout else dict(image_size=16)
    wide = dict(width=128, heads=2, patch=2, depth=4)  # heads of 64, as flash attention takes them
    model = dit.Config(arch="latte", **wide) if "latte" in layout else dit.Config(**wide)
    return dataclasses.replace(
        config.presets()["dit-s-8"][1],
        data=data.Config(source="synthetic", channels=3, num_classes=10, held_out=0.0, **clip),
        model=model,
        precision=precision,
        parallel=LAYOUTS[layout],
        device="cuda",
        global_batch=16,
        micro_batch=4,
        evaluate=False,
    )


def steps(run: config.Run, mesh: meshes.Mesh) -> tuple[list, bool]:
    """Metrics of the steps and the sum of each leaf at their end; whether there were graphs."""
    dataset = data.open_dataset(run.data)
    composed = plan.make(run, dataset, mesh)
    share = (mesh.dp.rank, mesh.dp.size)
    state, step, told = train.init_state(composed, KEY), train.make_step(composed), []
    for leaf in tree.leaves(state.params):
        leaf.add_(0.01)  # or adaLN-Zero's gates would keep the blocks out of the first steps
    for batch in loader.batches(dataset, KEY, global_batch=run.global_batch, stop=STEPS, part=share):
        state, metrics = step(state, batch, KEY)
        told.append((metrics["loss"], metrics["grad_norm"], metrics["draw_digest"]))
    told.append([leaf.double().sum().item() for leaf in tree.leaves(state.params)])
    found = bool(composed.graphs)
    composed.graphs.clear()
    return told, found


def main() -> None:
    """Prints what rank 0 found."""
    rank, world, _ = meshes.start("cuda")
    made = {sp: meshes.make_mesh(world, rank, world // sp, sp) for sp in (1, 2)}
    for layout, parallel in LAYOUTS.items():
        for precision in ("fp32", "bf16"):
            run = run_of(layout, precision)
            plainly, none = steps(dataclasses.replace(run, graphs=False), made[parallel.sp or 1])
            found, some = steps(run, made[parallel.sp or 1])
            row = dict(layout=layout, precision=precision, equal=found == plainly, graphs=some and not none)
            if rank == 0:
                print(json.dumps(row | dict(losses=[found[0][0], plainly[0][0]])), flush=True)
            torch.cuda.empty_cache()
    meshes.stop()


if __name__ == "__main__":
    main()
