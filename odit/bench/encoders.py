"""Training behind frozen encoders of full size and random weights: encoded in each step, against encoded before."""

from __future__ import annotations

import csv
import dataclasses
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from odit import checks, config, data, media, plan, random, train, tree
from odit.bench.common import clear_peaks, device_name, now, peak, preset
from odit.data import loader
from odit.encoders import config as encoder_config

SCRIPT = Path(__file__).parents[2] / "experiments" / "encode.py"


@dataclass(frozen=True)
class Encoders:
    """Clips as MP4 files, through AutoencoderKL (as of Stable Diffusion) and CLIP's text encoder (ViT-L/14), both drawn
    at random and saved, into a model: training steps, online and from the files of experiments/encode.py.

    Decoding is not in the times: a run reads ahead in worker processes.
    """

    presets: tuple[str, ...] = ("vdit-xl-1x2x2", "latte-xl-1x2x2")
    """Models and objectives of these presets of train.py, with captions by cross-attention."""
    batch: int = 8
    """Clips a step."""
    frames: int = 16
    """Frames of a clip."""
    size: int = 256
    """Pixels of a side."""
    scale: Literal["full", "tiny"] = "full"
    """Size of the encoders; tiny ones are for trying the benchmark."""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Dtype of matrix products, and of the encoders."""
    remat: Literal["none", "block", "selective"] = "none"
    """Activations computed again in backward."""
    compile: bool = False
    """Compiles the blocks."""
    steps: int = 5
    """Measured steps; the row has their median."""
    warmup: int = 2
    """Steps before them."""
    device: str = "auto"
    """'auto' takes a GPU where there is one."""


def encoders(cfg: Encoders) -> None:
    """Prints a row of encode.py, then two a preset: ms, samples/s, ms and share of the encoders, peak memory."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_autoencoder(folder / "vae", cfg.scale)
        write_text_encoder(folder / "clip", cfg.scale)
        table = write_clips(folder, cfg)
        source = data.Config(
            source="table", path=str(table), image_size=cfg.size, frames=cfg.frames, interval=1, held_out=0.0
        )
        online = encoder_config.Config(
            text="clip", text_path=str(folder / "clip"), text_length=77, vae="kl", vae_path=str(folder / "vae")
        )
        print(json.dumps(encode_row(cfg, source, online, folder / "latents")), flush=True)
        cached = data.Config(source="latents", path=str(folder / "latents"), held_out=0.0)
        for name in cfg.presets:
            for how, data_cfg, enc in (("online", source, online), ("cached", cached, encoder_config.Config())):
                row = steps_row(cfg, name, data_cfg, enc)
                print(json.dumps({"name": f"encoders {how}", "preset": name, **row}), flush=True)


def encode_row(cfg: Encoders, source: data.Config, online: encoder_config.Config, out: Path) -> dict[str, Any]:
    """Runs experiments/encode.py on the clips: its wall time, start included."""
    began = now(torch.device("cpu"))
    given = [
        *("--data.source", "table", "--data.path", source.path, "--data.image-size", cfg.size),
        *("--data.frames", cfg.frames, "--data.interval", 1, "--out", out, "--batch", cfg.batch),
        *("--encoders.text", "clip", "--encoders.text-path", online.text_path, "--encoders.text-length", 77),
        *("--encoders.vae", "kl", "--encoders.vae-path", online.vae_path),
        *("--precision", cfg.precision, "--device", cfg.device, "--no-progress"),
    ]
    done = subprocess.run([sys.executable, SCRIPT, *map(str, given)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"experiments/encode.py ended with {done.returncode}: {done.stderr.strip()}")
    seconds = now(torch.device("cpu")) - began
    return {"name": "encoders encode.py", "samples": cfg.batch, "wall_s": round(seconds, 1)}


def steps_row(cfg: Encoders, name: str, source: data.Config, enc: encoder_config.Config) -> dict[str, Any]:
    """Whole training steps on one batch, and what of their time the encoders take, measured by themselves."""
    run = preset(name)
    run = dataclasses.replace(
        run,
        data=source,
        encoders=enc,
        global_batch=cfg.batch,
        precision=cfg.precision,
        device=cfg.device,
        steps=cfg.warmup + cfg.steps,
        evaluate=False,
        compile=cfg.compile,
        parallel=config.Parallel(remat=cfg.remat),
    )
    checks.check(run, world=1)
    front = plan.load_front(run)
    dataset = data.open_dataset(run.data, front.tokenize)
    composed = plan.make(run, dataset, front=front)
    clear_peaks(composed.device)
    key = random.key(0)
    (batch,) = loader.batches(dataset, key, global_batch=cfg.batch, stop=1)
    state, step = train.init_state(composed, key), train.make_step(composed)
    steps, encoding = [], []
    for number in range(cfg.warmup + cfg.steps):
        began = now(composed.device)
        state, metrics = step(state, batch, key)
        steps.append(1e3 * (now(composed.device) - began))
        if number == cfg.warmup:
            most = peak(composed.device)
        encoding.append(encoders_ms(composed, batch, key))
    ms, of_it = (sorted(times[cfg.warmup :])[cfg.steps // 2] for times in (steps, encoding))
    return {
        "batch": cfg.batch,
        "clip": f"{cfg.frames}x{cfg.size}x{cfg.size}",
        "precision": cfg.precision,
        "remat": cfg.remat,
        "compile": cfg.compile,
        "device": device_name(composed.device),
        "ms": round(ms, 2),
        "samples_per_s": round(1e3 * cfg.batch / ms, 2),
        "encoders_ms": round(of_it, 2),
        "encoders_share": round(of_it / ms, 4),
        "peak_gib": round(most / 2**30, 3),
        "loss": metrics["loss"],
    }


def encoders_ms(composed: plan.Plan, batch: data.Batch, key: random.Key) -> float:
    """Milliseconds that a step spends before the model: what samples and captions become."""
    ids, x, y = tree.map(lambda field: field.to(composed.device), list(batch))
    began = now(composed.device)
    composed.front.latents(x, ids, key, composed.kernels.normal)
    composed.front.embed(y)
    return 1e3 * (now(composed.device) - began)


def write_autoencoder(folder: Path, scale: str) -> None:
    """Saves an AutoencoderKL of Stable Diffusion's shape (84 M parameters), or a tiny one, with random weights."""
    from diffusers import AutoencoderKL

    channels = (128, 256, 512, 512) if scale == "full" else (8, 8, 8, 8)
    torch.manual_seed(0)  # torch's own draws: the weights are another library's
    AutoencoderKL(
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2 if scale == "full" else 1,
        norm_num_groups=32 if scale == "full" else 4,
        latent_channels=4,
        sample_size=256,
        scaling_factor=0.18215,
    ).save_pretrained(folder)


def write_text_encoder(folder: Path, scale: str) -> None:
    """Saves a CLIP text encoder of ViT-L/14's shape (123 M parameters), or a tiny one, and a tokenizer of bytes."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    folder.mkdir(parents=True)
    letters = [chr(byte) for byte in range(33, 127)]
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer.from_pretrained(str(folder))
    tokenizer.save_pretrained(folder)
    size = (
        {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
        if scale == "full"
        else {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    )
    torch.manual_seed(0)
    shape = CLIPTextConfig(
        vocab_size=49408,
        **size,
        projection_dim=size["hidden_size"],
        bos_token_id=len(words) - 2,
        eos_token_id=len(words) - 1,
    )
    CLIPTextModel(shape).save_pretrained(folder)


def write_clips(folder: Path, cfg: Encoders) -> Path:
    """Writes as many films as a batch has, of smooth noise, and the table of them."""
    rows = []
    for number in range(cfg.batch):
        key = random.fold_in(random.key(0), "film", number)
        coarse = random.uniform(key, (cfg.frames, 3, 8, 8)) * 2 - 1
        film = torch.nn.functional.interpolate(coarse, size=(cfg.size, cfg.size), mode="bilinear")
        media.save_mp4(folder / f"{number}.mp4", film, 8.0, {})
        rows.append({"path": f"{number}.mp4", "caption": f"film number {number}"})
    table = folder / "films.csv"
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, ("path", "caption"))
        writer.writeheader()
        writer.writerows(rows)
    return table
