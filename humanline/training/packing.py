"""Padding-free batches: all that a batch's completions need in one row, each prompt once.

    [prompt 0 | prompt 1 | … | completion 0 | completion 1 | …]

A completion's tokens attend to its prompt's and to one another. No token is padding, no prompt is
computed twice, and there is no cache: with gradient checkpointing too, a prompt is read once.

For this the model gets an attention function of ours, which is transformers' own on each piece of
the row; called without pieces, as in generation, it is just that.
"""

from dataclasses import dataclass
from inspect import Parameter, signature
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from humanline.training.errors import UserError
from humanline.training.examples import Batch, Completions

ATTENTION = "humanline_pieces"
_LAYERS = {"full_attention", "sliding_attention"}


@dataclass(frozen=True)
class Piece:
    """Tokens that attend to one another, causally, and to all of a prompt's before them."""

    own: slice
    prompt: slice | None = None


@dataclass(frozen=True)
class Pack:
    """A batch's prompts and some completions of theirs, without the last token of each: that one
    predicts nothing that is asked for.

    Attributes:
        ids: int64 ``[1, N]``.
        positions: int64 ``[1, N]``, each token's place in its own sequence.
        pieces: what attends to what.
        predicting: int64 ``[M]``, which of the ``N`` tokens predicts each completion token.
        labels: int64 ``[M]``, the completion tokens.
        cu_seqlens: int64 ``[S+1]``, where each completion's begin.
    """

    ids: Tensor
    positions: Tensor
    pieces: tuple[Piece, ...]
    predicting: Tensor
    labels: Tensor
    cu_seqlens: Tensor

    @classmethod
    def of(cls, batch: Batch, completions: Completions) -> "Pack":
        mask, device = completions.mask, completions.ids.device
        lengths = mask.sum(1).tolist()
        prompt_of = completions.prompt.tolist()
        prompts = _consecutive(batch.prompt_mask.sum(1).tolist(), start=0)
        own = _consecutive([max(n - 1, 0) for n in lengths], start=prompts[-1].stop)
        pieces = [Piece(prompt) for prompt in prompts]
        positions = [torch.arange(_length(prompt)) for prompt in prompts]
        predicting = []
        for place, p, length in zip(own, prompt_of, lengths, strict=True):
            last = prompts[p].stop - 1
            pieces.append(Piece(place, prompts[p]))
            positions.append(torch.arange(_length(place)) + _length(prompts[p]))
            predicting.append(torch.tensor([last, *range(place.start, place.stop)][:length]))
        kept = completions.ids[:, :-1][mask[:, 1:]]
        return cls(
            torch.cat([batch.prompt_ids[batch.prompt_mask], kept])[None],
            torch.cat(positions)[None].to(device),
            tuple(piece for piece in pieces if _length(piece.own)),
            torch.cat(predicting).to(device),
            completions.ids[mask],
            torch.tensor([0, *accumulate(lengths)], device=device),
        )


def _consecutive(lengths: list[int], start: int) -> list[slice]:
    return [slice(*ends) for ends in pairwise(accumulate(lengths, initial=start))]


def _length(place: slice) -> int:
    return place.stop - place.start


def enable(model: nn.Module) -> None:
    """Let a transformers model read packs.

    Raises:
        UserError: its attention cannot be taken apart into pieces.
    """
    obstacle = _obstacle(model)
    if obstacle:
        raise UserError(f"--padding-free: {type(model).__name__} {obstacle}; leave the option out")
    AttentionInterface.register(ATTENTION, attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    model.set_attn_implementation(ATTENTION)


def _obstacle(model: nn.Module) -> str | None:
    config = model.config.get_text_config()
    others = set(getattr(config, "layer_types", None) or ()) - _LAYERS
    if others:
        return f"has layers of type {', '.join(sorted(others))}"
    if not model._supports_sdpa or getattr(config, "attn_logit_softcapping", None):
        return "has an attention that SDPA does not compute"
    parameters = signature(model.get_decoder().forward).parameters
    options = any(p.kind is Parameter.VAR_KEYWORD for p in parameters.values())
    if not options or "position_ids" not in parameters:
        return "does not hand position_ids and other options on to its attention"
    return None


def enabled(model: nn.Module) -> bool:
    """Whether :func:`enable` was called on it."""
    return model.config.get_text_config()._attn_implementation == ATTENTION


def read(body: nn.Module, pack: Pack) -> Tensor:
    """The hidden states ``[M, H]`` from which the pack's labels are predicted."""
    # The body must not make a mask [N, N]: it hands on whatever has four dimensions.
    no_mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=pack.ids.device)
    output = body(
        input_ids=pack.ids,
        position_ids=pack.positions,
        attention_mask=no_mask,
        use_cache=False,
        pieces=pack.pieces,
    )
    return output.last_hidden_state[0, pack.predicting]


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    pieces: tuple[Piece, ...] | None = None,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' SDPA attention, piece by piece: queries, keys, values ``[1, heads, N, D]``."""
    if pieces is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    outputs = []
    for piece in pieces:
        q, k, v = (x[:, :, piece.own] for x in (query, key, value))
        if piece.prompt is not None:
            k, v = (torch.cat([x[:, :, piece.prompt], own], 2) for x, own in ((key, k), (value, v)))
        mask = _mask(q.shape[2], k.shape[2], sliding_window, q.device)
        outputs.append(sdpa_attention_forward(module, q, k, v, mask, **options)[0])
    return torch.cat(outputs, 1), None


def _mask(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor | None:
    """What the last ``queries`` of ``keys`` tokens attend to; None where that is plain causal."""
    windowed = window is not None and keys > window
    if queries == keys and not windowed:
        return None
    mask = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
    return (mask.triu(keys - queries - window + 1) if windowed else mask)[None, None]
