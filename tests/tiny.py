"""Makers of the smallest sensible text encoders and autoencoders: random weights from a fixed seed, saved to a folder.

Each returns its folder. Weights are all drawn, also those that a library sets to 0 or 1.
"""

import json
from pathlib import Path

import torch

WORDS = ["a", "red", "green", "blue", "square", "circle", "of", "photo", "small", "large", "moves", "left", "right"]


def drawn(make, seed=0, std=0.05):
    """Builds a module and adds noise to all its first weights, without touching the global generator."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        module = make().eval()
        for p in module.parameters():
            p.add_(std * torch.randn_like(p))
    return module


def clip(folder: Path, width=16, positions=77, seed=0) -> Path:
    """A CLIPTextModel of two layers with a tokenizer of letters and a few words."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    letters = sorted(ByteLevel.alphabet())
    merges, pieces = _merges(WORDS)
    names = [*letters, *(f"{letter}</w>" for letter in letters), *pieces, "<|startoftext|>", "<|endoftext|>"]
    vocab = {name: i for i, name in enumerate(dict.fromkeys(names))}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    CLIPTokenizer.from_pretrained(str(folder)).save_pretrained(folder)
    cfg = CLIPTextConfig(
        vocab_size=len(vocab),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=positions,
        projection_dim=width,
        bos_token_id=vocab["<|startoftext|>"],
        eos_token_id=vocab["<|endoftext|>"],
    )
    drawn(lambda: CLIPTextModel(cfg), seed).save_pretrained(folder)
    return folder


def _merges(words: list[str]) -> tuple[list[str], list[str]]:
    """Byte-pair merges that join each word from its left, and the pieces they make."""
    merges, pieces = [], []
    for word in words:
        letters = [*word[:-1], f"{word[-1]}</w>"]
        piece = letters[0]
        for letter in letters[1:]:
            merges.append(f"{piece} {letter}")
            piece += letter
            pieces.append(piece)
    return list(dict.fromkeys(merges)), pieces


def t5(folder: Path, width=16, seed=0) -> Path:
    """A T5EncoderModel of two layers (gated, as v1.1) with a tokenizer of a few words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    vocab = {name: i for i, name in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    cfg = T5Config(
        vocab_size=len(vocab),
        d_model=width,
        d_kv=width // 2,
        d_ff=2 * width,
        num_layers=2,
        num_heads=2,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=16,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
    )
    drawn(lambda: T5EncoderModel(cfg), seed).save_pretrained(folder)
    return folder


def kl(folder: Path, levels=2, latent_channels=4, width=8, seed=0, **config) -> Path:
    """An AutoencoderKL of factor 2 ** (levels - 1)."""
    from diffusers import AutoencoderKL

    cfg = dict(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=(width,) * levels,
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=2,
        sample_size=16,
    )
    drawn(lambda: AutoencoderKL(**{**cfg, **config}), seed).save_pretrained(folder)
    return folder


def cogvideox(folder: Path, latent_channels=4, width=4, seed=0, **config) -> Path:
    """An AutoencoderKLCogVideoX of factor 4 in space and in time."""
    from diffusers import AutoencoderKLCogVideoX

    cfg = dict(
        down_block_types=("CogVideoXDownBlock3D",) * 3,
        up_block_types=("CogVideoXUpBlock3D",) * 3,
        block_out_channels=(width,) * 3,
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=2,
        temporal_compression_ratio=4,
        sample_height=16,
        sample_width=16,
    )
    drawn(lambda: AutoencoderKLCogVideoX(**{**cfg, **config}), seed).save_pretrained(folder)
    return folder


def wan(folder: Path, latent_channels=4, width=4, seed=0, **config) -> Path:
    """An AutoencoderKLWan of factor 4 in space and in time."""
    from diffusers import AutoencoderKLWan

    cfg = dict(
        base_dim=width,
        z_dim=latent_channels,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        attn_scales=[],
        temperal_downsample=[True, True],
        latents_mean=[0.1 * (i - 1) for i in range(latent_channels)],
        latents_std=[1.0 + 0.5 * i for i in range(latent_channels)],
        scale_factor_spatial=4,
    )
    drawn(lambda: AutoencoderKLWan(**{**cfg, **config}), seed).save_pretrained(folder)
    return folder
