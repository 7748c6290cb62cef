"""Mismatched pairs, a prompt with another's completion: KTO takes its reference point from them."""

from collections.abc import Hashable, Sequence
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
from humanline.parallel import Parallel, check_parallel
from humanline.rows import IGNORE_INDEX, Layout


def mismatched_indices(prompts: Sequence[Any], completions: Sequence[Any]) -> list[int | None]:
    """For each prompt, the index of a completion that is none of its own.

    A prompt's own completions are those of all rows that hold it: a completion of another row may
    be the same text, and would make a pair that matches. All prompts take the completion one row
    on; where that will not do for one of them, two rows on, and so forth: each completion is used
    once. Where no step suits all, each prompt takes the next completion that suits it.

    Args:
        prompts, completions: ``S`` of each, in the same order: texts, chats, or token ids as lists
            or tensors. They are compared by value.

    Returns:
        ``S`` indices; None where every completion is one of the prompt's own.

    Raises:
        ValueError: not as many completions as prompts.
    """
    _require_as_many(prompts, completions)
    prompts, completions = [*map(_value, prompts)], [*map(_value, completions)]
    own: dict[Hashable, set[Hashable]] = {}
    for prompt, completion in zip(prompts, completions, strict=True):
        own.setdefault(prompt, set()).add(completion)
    rows, distinct = len(prompts), len(set(completions))
    possible = [i for i in range(rows) if len(own[prompts[i]]) < distinct]

    def suits(row: int, step: int) -> bool:
        return completions[(row + step) % rows] not in own[prompts[row]]

    steps = range(1, rows)
    common = next((step for step in steps if all(suits(i, step) for i in possible)), None)
    found: list[int | None] = [None] * rows
    for i in possible:
        step = common or next(step for step in steps if suits(i, step))
        found[i] = (i + step) % rows
    return found


def mismatched_pairs(
    prompts: Sequence[Any], completions: Sequence[Any], *, parallel: Parallel | None = None
) -> list[tuple[Any, Any]]:
    """Each prompt with a completion that is none of its own.

    A prompt's own completions are those of all rows that hold it. All prompts take the completion
    one row on; where that will not do for one of them, two rows on, and so forth: each completion
    is used once. Where no step suits all, each prompt takes the next completion that suits it. A
    prompt all of whose batch's completions are its own has no such pair and is left out.

    Args:
        prompts, completions: those of a batch, in the same order: texts, chats, or token ids as
            lists or tensors. They are compared by value.
        parallel: its ``data`` says which ranks have the rest of the batch: a completion may come
            from any of them, and a rank may be left with no pair. All must call it; values are
            pickled.

    Raises:
        ValueError: fewer than two, not as many completions as prompts, or no mismatched pair.
    """
    prompts, completions, own = _of_all_ranks(prompts, completions, parallel)
    found = _found(prompts, completions)
    return [(prompts[i], completions[j]) for i, j in found if i in own]


def _of_all_ranks(
    prompts: Sequence[Any], completions: Sequence[Any], parallel: Parallel | None
) -> tuple[Sequence[Any], Sequence[Any], range]:
    """Those of the batch, and which of them are this rank's."""
    axis = check_parallel(parallel).axis("data")
    if axis is None:
        return prompts, completions, range(len(prompts))
    _require_as_many(prompts, completions)
    everyones = axis.gather_objects(list(zip(prompts, completions, strict=True)))
    own = axis.own([len(pairs) for pairs in everyones])
    pairs = [pair for pairs in everyones for pair in pairs]
    return [p for p, _ in pairs], [c for _, c in pairs], range(own.start, own.stop)


def _require_as_many(prompts: Sequence[Any], completions: Sequence[Any]) -> None:
    require(
        len(prompts) == len(completions),
        lambda: f"got {len(prompts)} prompts, but {len(completions)} completions",
    )


def _found(prompts: Sequence[Any], completions: Sequence[Any]) -> list[tuple[int, int]]:
    """Indices of prompts and of the completions they are set against."""
    indices = mismatched_indices(prompts, completions)
    require(
        len(prompts) > 1,
        lambda: (
            f"mismatched pairs need a batch of at least two sequences, got {len(prompts)}: raise "
            "the batch size, or give KTO its z0"
        ),
    )
    found = [(i, j) for i, j in enumerate(indices) if j is not None]
    require(
        len(found) > 0,
        lambda: (
            f"there is no mismatched pair among {len(prompts)} sequences: every completion is one "
            "of each prompt's own; mix prompts in a batch, raise its size, or give KTO its z0"
        ),
    )
    return found


def _value(x: Any) -> Hashable:
    """What is equal where ``x`` is."""
    if hasattr(x, "tolist"):  # a tensor, or numpy's
        x = x.tolist()
    if isinstance(x, dict):
        return tuple((key, _value(x[key])) for key in sorted(x))
    if isinstance(x, list | tuple):
        return tuple(map(_value, x))
    return x


def mismatched_rows(
    input_ids: Tensor,
    labels: Tensor,
    attention_mask: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    pad_token_id: int = 0,
    parallel: Parallel | None = None,
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
        parallel: as in :func:`~humanline.mismatched_pairs`.

    Returns:
        ``input_ids``, ``labels``, and ``attention_mask`` or ``cu_seqlens``, of as many sequences,
        less those for which there is no mismatched completion. They may be longer: up to the
        longest prompt and the longest completion.

    Raises:
        ValueError: fewer than two sequences, or no mismatched pair; shapes or devices do not fit.
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
    tokens = torch.stack([input_ids.reshape(-1), labels.reshape(-1)], 1)[layout.mask]
    split = [_split(row) for row in tokens.cpu().split(layout.lengths.tolist())]
    prompts, completions, own = _of_all_ranks(
        *([pair[i] for pair in split] for i in range(2)), parallel
    )
    found = _found(*([part[:, 0] for part in parts] for parts in (prompts, completions)))
    rows = [torch.cat([prompts[i], completions[j]]).to(tokens.device) for i, j in found if i in own]
    require(len(rows) > 0, "no prompt of this rank has a mismatched completion: give KTO its z0")
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
