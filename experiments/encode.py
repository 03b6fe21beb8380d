"""Encodes a data set once, so that many runs train from its latents and text features:

    python experiments/encode.py --data.source table --data.path cats.csv --data.image-size 256 \\
        --encoders.vae kl --encoders.vae-path VAE --encoders.text t5 --encoders.text-path T5 --out cats-latents
    python experiments/train.py latents --data.path cats-latents

Under torchrun the ranks write a share of the files each, the same to the bit. Run again after a stop it writes what is
missing. What chance decides in reading, where in a film a clip starts and which of several captions is used, is what
validation sees: epoch 0, whatever seed a run has.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import Tensor
from tqdm import tqdm

from odit import checks, config, data, health, peers, plan, tree
from odit import front as fronts
from odit.config_json import to_json
from odit.data import ahead, latents, loader
from odit.encoders import config as encoders
from odit.parallel import mesh as meshes


@dataclass(frozen=True)
class Encode:
    """What to encode, with what, into which files."""

    out: Path
    """Folder to write; one that was begun with the same settings is completed."""
    batch: int = 16
    """Samples at once."""
    shard_size: int = 1024
    """Samples a file."""
    mirror: bool = False
    """Encodes mirror images too, for runs with --data.flip."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Dtype in which encoders run."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Dtype in which latents and text features are stored."""
    device: str = "auto"
    """'auto' takes a GPU where there is one."""
    threads: int | None = None
    """CPU threads a rank, 1 unless given: bits of a result may depend on it."""
    progress: bool = True
    """Progress bar."""
    data: data.Config = field(default_factory=lambda: data.Config(source="folder"))
    encoders: encoders.Config = field(default_factory=encoders.Config)


@dataclass(frozen=True)
class Job:
    """Data and encoders, opened."""

    args: Encode
    dataset: data.Dataset
    front: fronts.Front
    device: torch.device

    @property
    def num(self) -> int:
        """Samples."""
        return len(self.dataset.train_ids) + len(self.dataset.held_out_ids)

    @property
    def num_shards(self) -> int:
        return latents.num_shards(self.num, self.args.shard_size)

    @property
    def settings(self) -> dict:
        """All that the files depend on."""
        args, text = self.args, {"text_length": self.front.text_size[0]} if self.front.tokenize else {}
        return {
            "num_samples": self.num,
            "data": self.dataset.fingerprint(),
            **{f"encoder of {name}": found for name, found in self.front.fingerprints.items()},
            **text,
            **{name: getattr(args, name) for name in ("batch", "shard_size", "mirror", "precision", "dtype")},
        }

    def ids(self, shard: int) -> Tensor:
        """Sample ids of a shard."""
        size = self.args.shard_size
        return torch.arange(shard * size, min(self.num, (shard + 1) * size))


def main(args: Encode) -> None:
    """Joins the other ranks, encodes a share of the shards; rank 0 waits for all and writes the index."""
    check(args)
    torch.set_num_threads(args.threads or 1)
    rank, world, _ = meshes.start(checks.pick_device(args.device))
    with contextlib.ExitStack() as stack:
        stack.callback(meshes.stop)
        job = open_job(args)
        told = {key: value for key, value in to_json(args).items() if key in ("out", "batch", "shard_size")}
        peers.same_everywhere(meshes.store(), rank, world, "command line", told | {"settings": job.settings})
        latents.begin(args.out, job.settings)
        before = job.num_shards - len(latents.missing_shards(args.out, job.num_shards))
        if rank == 0 and before:
            print(f"{args.out}: {before} of {job.num_shards} shards are there already", flush=True)
        encode(job, rank, world)
        if rank == 0:
            wait(job)
            report(args, finish(job))


def check(args: Encode) -> None:
    """Refuses what cannot be encoded; raises ValueError."""
    data.check(args.data)
    encoders.check(args.encoders)
    for name in ("batch", "shard_size", "threads"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"{name} is {getattr(args, name)}: use 1 or more")
    if args.data.buckets:
        raise ValueError(
            f"data.buckets is {' '.join(args.data.buckets)} but files of latents hold one size: leave it out and give "
            "--data.image-size"
        )
    if args.data.source == "latents" or data.expected(args.data)[0] != 3:
        raise ValueError(f"data.source is {args.data.source}, which has no pictures of 3 channels: give data that has")
    if args.encoders.vae == "none":
        raise ValueError("encoders.vae is none, which leaves nothing to encode: use kl, cogvideox or wan")
    if args.encoders.text != "bytes" and not data.has_captions(args.data):
        raise ValueError(f"encoders.text is {args.encoders.text} but the data has no captions: leave it out")
    if args.encoders.place == "shard":
        raise ValueError("encoders.place is shard but ranks encode apart from each other: use device or host")
    if args.encoders.precision is not None:
        raise ValueError(f"encoders.precision is {args.encoders.precision}: use --precision")
    if args.data.flip:
        raise ValueError("data.flip is on, which is a run's choice: use --mirror to encode both images")
    if args.data.held_out != data.Config.held_out:
        raise ValueError(f"data.held_out is {args.data.held_out}, which is a run's choice: leave it out")


def open_job(args: Encode) -> Job:
    """Loads encoders, each rank its own, and opens the data."""
    run = config.Run(data=args.data, encoders=args.encoders, precision=args.precision, device=args.device)
    front = plan.load_front(run)
    dataset = data.open_dataset(args.data, front.tokenize)
    front.sample_shape(dataset.shape)  # sizes that do not fit are refused before the work
    return Job(args, dataset, front, checks.pick_device(args.device))


def encode(job: Job, rank: int = 0, world: int = 1) -> None:
    """Writes those of this rank's shards that are missing: every ``world``-th, from ``rank`` on."""
    args, missing = job.args, set(latents.missing_shards(job.args.out, job.num_shards))
    shards = [shard for shard in range(rank, job.num_shards, world) if shard in missing]
    parts = read(job, shards)
    bad: list[tuple[int, str, str]] = []
    done = sum(len(job.ids(shard)) for shard in range(rank, job.num_shards, world) if shard not in missing)
    total = sum(len(job.ids(shard)) for shard in range(rank, job.num_shards, world))
    name = "samples" if world == 1 else f"samples of rank 0 of {world}"
    with tqdm(total=total, initial=done, unit="sample", desc=name, disable=not args.progress or rank > 0) as bar:
        for shard in shards:
            rows, lost = [], []
            for ids in job.ids(shard).split(args.batch):
                tensors, left_out = encode_part(job, next(parts))
                rows += [tensors] if tensors is not None else []
                lost += left_out
                bar.update(len(ids))
            bad += lost
            check_budget(args, bad, job.num)
            tensors = tree.map(lambda *x: torch.cat(x), *rows) if rows else empty(job)
            latents.write_shard(args.out, shard, tensors, lost)
    parts.close()


def read(job: Job, shards: list[int]) -> Iterator[latents.Part]:
    """Batches of these shards, read ahead where workers do."""
    batches = [ids for shard in shards for ids in job.ids(shard).split(job.args.batch)]
    return ahead.read_ahead(functools.partial(latents.read_part, job.dataset), batches, job.args.data.workers)


def encode_part(job: Job, part: latents.Part) -> tuple[dict[str, Tensor] | None, list[tuple[int, str, str]]]:
    """The rows of a part of a shard, None where there are none, and what is bad in it."""
    if part.samples is None:
        return None, part.bad
    x, y = tree.map(lambda field: field.to(job.device), list(part.samples))
    y = job.front.embed(y)
    rows = {**dict(zip(latents.MEANS, job.front.moments(x))), **(y if isinstance(y, dict) else {"y": y})}
    if job.args.mirror:
        rows |= zip(latents.MIRRORED, job.front.moments(x.flip(-1)))
    dtype = plan.DTYPES[job.args.dtype]
    rows = {name: row.to("cpu", dtype if row.is_floating_point() else None) for name, row in rows.items()}
    floats = [row for row in rows.values() if row.is_floating_point()]
    finite_B = torch.stack([row.isfinite().flatten(1).all(1) for row in floats]).all(0)
    where, reason = f"data.path {str(job.args.data.path)!r}: sample", f"its features are not finite in {job.args.dtype}"
    lost = [(sample, f"{where} {sample}", reason) for sample in part.ids_B[~finite_B].tolist()]
    rows = {"ids": part.ids_B, **rows}
    kept = {name: row[finite_B] for name, row in rows.items()} if bool(finite_B.any()) else None
    return kept, sorted([*part.bad, *lost])


def empty(job: Job) -> dict[str, Tensor]:
    """The rows of a shard in which all is bad."""
    nothing = torch.zeros(0, *job.front.sample_shape(job.dataset.shape), dtype=plan.DTYPES[job.args.dtype])
    return {"ids": torch.zeros(0, dtype=torch.int64), **{name: nothing for name in latents.MEANS}}


def check_budget(args: Encode, bad: list, num: int) -> None:
    """Stops where too much of the data is bad; raises DataError."""
    if len(bad) > max(loader.ALWAYS_ALLOWED, args.data.bad_budget * num):
        files = "\n".join(f"  {path}: {reason}" for _, path, reason in bad)
        raise data.DataError(
            f"{len(bad)} bad samples of {num}, data.bad_budget is {args.data.bad_budget} ({loader.ALWAYS_ALLOWED} are "
            f"always allowed): repair these files and begin with another --out, or raise the budget\n{files}"
        )


def wait(job: Job) -> None:
    """Waits for the shards of other ranks; the launcher ends all where one of them fails."""
    missing = latents.missing_shards(job.args.out, job.num_shards)
    while missing:
        time.sleep(0.2)
        missing = [shard for shard in missing if latents.read_shard_told(job.args.out, shard) is None]


def finish(job: Job) -> dict[str, Any]:
    """Writes the index."""
    front, dataset, settings = job.front, job.dataset, job.settings
    assert front.vae is not None  # check saw to it
    bad = latents.bad_samples(job.args.out, job.num_shards)
    check_budget(job.args, bad, job.num)
    null = None
    if front.tokenize is not None:
        tokens = tree.map(lambda x: x.to(job.device), front.tokenize([""]))
        dtype = plan.DTYPES[job.args.dtype]
        null = tree.map(lambda x: x.to("cpu", dtype if x.is_floating_point() else None), front.embed(tokens))
    about = {
        "sample": list(front.sample_shape(dataset.shape)),
        "num_samples": job.num,
        "num_classes": dataset.num_classes,
        "class_names": dataset.class_names,
        "mirrored": job.args.mirror,
        "encoders": front.fingerprints,
        "data": settings["data"],
        "source": to_json(job.args),
        "settings": settings,
    }
    return latents.finish(job.args.out, about, front.vae.scale, front.vae.shift, null)


def report(args: Encode, index: dict[str, Any]) -> None:
    """Says what is there now, and what is not."""
    shape = "x".join(map(str, index["sample"]))
    size = sum(shard["size"] for shard in index["shards"]) / 2**20
    print(f"{args.out}: {index['num']} of {index['num_samples']} samples, {shape}, {size:.1f} MiB")
    for name in ("latents", "scaled"):
        mean, std = (" ".join(f"{value:.3f}" for value in index[name][what]) for what in ("mean", "std"))
        print(f"{name}: mean {mean}, std {std}")
    for _, path, reason in index["bad"]:
        print(f"left out {path}: {reason}")


def cli() -> None:
    """Reads the command line."""
    main(tyro.cli(Encode, description=__doc__))


if __name__ == "__main__":
    health.run(cli)
