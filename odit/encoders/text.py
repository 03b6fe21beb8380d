"""Captions to text tokens: CLIP's and T5's text encoders, frozen.

Letters: B captions, S text tokens, E text width.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from odit.encoders import frozen
from odit.encoders.frozen import Frozen

Kind = Literal["clip", "t5"]
SETTING = "encoders.text_path"
MODEL_TYPES = {"clip": ("clip_text_model", "clip"), "t5": ("t5",)}
VOCABULARIES = ("tokenizer.json", "vocab.json", "*.model")
PROBE = "A Photo of 2 naïve cats, isn't it?  <b>\n漢字"  # what a tokenizer makes of it belongs to its fingerprint


@dataclass(frozen=True)
class Tokenize:
    """Captions to tokens, as they are; picklable, so that worker processes can have it."""

    tokenizer: Any
    length: int

    def __call__(self, captions: list[str]) -> dict[str, Tensor]:
        """Returns tokens (B, S) int64, cut and padded to S = length, and mask (B, S) bool, True at a caption's tokens.

        The begin and end tokens are a caption's own, also where it was cut.
        """
        ids = self.tokenizer(
            captions,
            padding="max_length",
            padding_side="right",
            truncation=True,
            max_length=self.length,
            return_attention_mask=True,
            return_tensors="pt",
        )
        return {"tokens": ids["input_ids"], "mask": ids["attention_mask"].bool()}


@dataclass(frozen=True)
class TextEncoder:
    """A text encoder without its weights, and its tokenizer."""

    kind: Kind
    frozen: Frozen
    tokenize: Tokenize
    width: int
    """E."""
    fingerprint: str
    """Of the weights and of what the tokenizer does; the length is not in it."""

    @property
    def length(self) -> int:
        """S."""
        return self.tokenize.length

    def encode(self, weights: dict[str, Tensor], batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Encodes what ``tokenize`` gave, on the weights' device: text (B, S, E), mask (B, S) and pooled (B, E).

        T5 reads its tokens under the mask; pooled is the mean over the tokens that count. CLIP is causal, so that no
        token sees the padding behind it, and runs without the mask as in the pipelines that were trained with it;
        pooled is its output at the end token. In both, text at padding means nothing: cross-attention leaves it out by
        the mask, which is handed on.
        """
        tokens_BS, mask_BS = batch["tokens"], batch["mask"]
        if self.kind == "clip":
            out = self.frozen(weights, "forward", input_ids=tokens_BS)
            return {"text": out.last_hidden_state, "mask": mask_BS, "pooled": out.pooler_output}
        out = self.frozen(weights, "forward", input_ids=tokens_BS, attention_mask=mask_BS.long())
        text_BSE = out.last_hidden_state
        return {"text": text_BSE, "mask": mask_BS, "pooled": _masked_mean(text_BSE, mask_BS)}


def _masked_mean(text_BSE: Tensor, mask_BS: Tensor) -> Tensor:
    """Averages in fp32 over the tokens that count; zero where none does."""
    total_BE = torch.where(mask_BS[..., None], text_BSE.float(), 0.0).sum(1)
    return (total_BE / mask_BS.sum(1, keepdim=True).clamp(min=1)).to(text_BSE.dtype)


def load(kind: Kind, path: Path | str, length: int, dtype: torch.dtype = torch.float32) -> TextEncoder:
    """Loads a text encoder and its tokenizer.

    Args:
        path: a folder with both, or with ``text_encoder/`` and ``tokenizer/``, or the hub name of such.
        length: S, at most the model's number of positions (77 for CLIP; T5's are relative and have no end).
    Raises:
        ValueError: what is no such model or lacks a part, naming ``encoders.text_path``.
    """
    transformers = _transformers(kind)
    source = frozen.find(path, "text_encoder", SETTING)
    found = source.config.get("model_type")
    if found not in MODEL_TYPES[kind]:
        what = f"a model of type {found}" if found else "no text encoder"
        raise ValueError(f"{SETTING} {source.path!r} holds {what} but encoders.text is {kind}: give one of type {kind}")
    cls = transformers.CLIPTextModel if kind == "clip" else transformers.T5EncoderModel
    module = frozen.load_module(cls, source, SETTING, dtype=dtype)
    tokenizer = _tokenizer(transformers, kind, source)
    _check(kind, module.config, tokenizer, length, source)
    pure = Frozen(module)
    return TextEncoder(
        kind=kind,
        frozen=pure,
        tokenize=Tokenize(tokenizer, length),
        width=module.config.hidden_size,
        fingerprint=frozen.digest(kind, pure.fingerprint, _fingerprint(tokenizer)),
    )


def _check(kind: Kind, config: Any, tokenizer: Any, length: int, source: frozen.Source) -> None:
    """Refuses a length that the model cannot serve and a tokenizer of another model."""
    limit = config.max_position_embeddings if kind == "clip" else None
    if length < 2:
        raise ValueError(f"encoders.text_length is {length}: use 2 or more, as one token ends a caption")
    if limit is not None and length > limit:
        raise ValueError(f"encoders.text_length is {length} but the model has {limit} positions: use {limit} or less")
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"{SETTING} {source.path!r} has a tokenizer of {len(tokenizer)} tokens but a model that embeds "
            f"{config.vocab_size}: give the two that belong together"
        )


def _transformers(kind: str) -> Any:
    if kind not in get_args(Kind):
        raise ValueError(f"encoders.text is {kind!r}: use one of {', '.join(get_args(Kind))}")
    try:
        import transformers
    except ImportError as error:
        raise ValueError(f"encoders.text {kind} needs transformers: pip install 'odit[hub]'") from error
    transformers.utils.logging.disable_progress_bar()  # one bar a rank would tell nothing
    return transformers


def _tokenizer(transformers: Any, kind: Kind, source: frozen.Source) -> Any:
    """Loads the tokenizer: inside ``tokenizer/``, beside a folder named text_encoder..., or with the model."""
    folder, subfolder = Path(source.path), "tokenizer" if source.subfolder else ""
    beside = folder.parent / folder.name.replace("text_encoder", "tokenizer")
    if folder.is_dir() and not subfolder and beside != folder and beside.is_dir():
        folder = beside
    # of a folder without these, transformers makes a tokenizer without words
    if folder.is_dir() and not any(any((folder / subfolder).glob(name)) for name in VOCABULARIES):
        raise ValueError(
            f"{SETTING} {source.path!r} has no tokenizer: {folder / subfolder} needs {' or '.join(VOCABULARIES)}"
        )
    cls = transformers.CLIPTokenizer if kind == "clip" else transformers.AutoTokenizer
    try:
        return cls.from_pretrained(str(folder), subfolder=subfolder)
    except Exception as error:  # what a library makes of a broken folder is anything
        raise ValueError(
            f"{SETTING} {source.path!r} has a tokenizer that cannot be loaded: {frozen.first_line(error)}"
        ) from error


def _fingerprint(tokenizer: Any) -> str:
    """Hashes the vocabulary and what becomes of a probe, which a change of merges or of clean-up changes."""
    return frozen.digest(json.dumps(sorted(tokenizer.get_vocab().items())), json.dumps(tokenizer(PROBE)["input_ids"]))
