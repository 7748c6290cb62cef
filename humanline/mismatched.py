"""Mismatched pairs, a prompt with another's completion: KTO takes its reference point from them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from humanline.checks import (
    require,
    require_mask,
    require_same_device,
    require_tensors,
    require_tensors_or_none,
)
from humanline.rows import IGNORE_INDEX, Layout


def mismatched_pairs(prompts: Sequence[Any], completions: Sequence[Any]) -> list[tuple[Any, Any]]:
    """Each prompt with the completion of the next, the last with that of the first.

    Args:
        prompts, completions: those of a batch, texts or token ids, in the same order.

    Raises:
        ValueError: fewer than two, or not as many completions as prompts.
    """
    require(
        len(prompts) == len(completions),
        lambda: f"got {len(prompts)} prompts, but {len(completions)} completions",
    )
    _require_two(len(prompts))
    return list(zip(prompts, [*completions[1:], completions[0]], strict=True))


def mismatched_rows(
    input_ids: Tensor,
    labels: Tensor,
    attention_mask: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    pad_token_id: int = 0,
) -> dict[str, Tensor]:
    """The same for tokenised sequences, padded or packed, in the layout they came in.

    A completion begins at its sequence's first label; a sequence without a label is all prompt.

    Args:
        input_ids: integers ``[B, T]``, padded on either side, or ``[N]`` packed.
        labels: as Hugging Face has them, not shifted: the token itself, -100 outside the
            completion; same shape.
        attention_mask: where there is a token; ``[B, T]``, for padded sequences.
        cu_seqlens: offsets ``[S+1]`` of packed sequences.
        pad_token_id: what to pad with, on the right.

    Returns:
        ``input_ids``, ``labels``, and ``attention_mask`` or ``cu_seqlens``, of as many sequences,
        which may be longer: up to the longest prompt and the longest completion.

    Raises:
        ValueError: fewer than two sequences; shapes or devices do not fit.
    """
    require_tensors(input_ids=input_ids, labels=labels)
    require_tensors_or_none(attention_mask=attention_mask, cu_seqlens=cu_seqlens)
    require(
        (attention_mask is None) != (cu_seqlens is None),
        "padded sequences come with attention_mask, packed ones with cu_seqlens: give one of them",
    )
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    require(
        input_ids.shape == labels.shape == mask.shape,
        lambda: (
            f"input_ids, labels and attention_mask must have one shape, got "
            f"{list(input_ids.shape)}, {list(labels.shape)} and {list(mask.shape)}"
        ),
    )
    require_same_device(input_ids=input_ids, labels=labels, mask=mask, cu_seqlens=cu_seqlens)
    require_mask("attention_mask", mask)
    layout = Layout.of(mask, cu_seqlens)
    _require_two(layout.num_sequences)
    tokens = torch.stack([input_ids.reshape(-1), labels.reshape(-1)], 1)[layout.mask]
    prompts, completions = zip(*map(_split, tokens.split(layout.lengths.tolist())), strict=True)
    rows = [torch.cat(pair) for pair in mismatched_pairs(prompts, completions)]
    lengths = torch.tensor([len(row) for row in rows], device=input_ids.device)
    if cu_seqlens is not None:
        ids, labels = torch.cat(rows).unbind(1)
        ends = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).to(cu_seqlens.dtype)
        return {"input_ids": ids, "labels": labels, "cu_seqlens": ends}
    ids = pad_sequence([row[:, 0] for row in rows], True, pad_token_id)
    labels = pad_sequence([row[:, 1] for row in rows], True, IGNORE_INDEX)
    mask = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
    return {"input_ids": ids, "labels": labels, "attention_mask": mask.to(attention_mask.dtype)}


def _split(row: Tensor) -> tuple[Tensor, Tensor]:
    """Prompt and completion of ids and labels ``[T, 2]``."""
    labelled = (row[:, 1] != IGNORE_INDEX).cumsum(0) > 0
    prompt = int((~labelled).sum())
    return row[:prompt], row[prompt:]


def _require_two(sequences: int) -> None:
    require(
        sequences > 1,
        lambda: (
            f"mismatched pairs need a batch of at least two sequences, got {sequences}: raise the "
            "batch size, or give KTO its z0"
        ),
    )
