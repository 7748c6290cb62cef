"""Padding-free batches: all that a batch's completions need in one row, each prompt once.

    [prompt 0 | prompt 1 | … | completion 0 | completion 1 | …]

A completion's tokens attend to its prompt's and to one another. No token is padding, no prompt is
computed twice, and there is no cache: with gradient checkpointing too, a prompt is read once.

For this the model gets an attention function of ours, which is transformers' own for each prompt
with each of its completions; called for anything else, as in generation, it is just that. What is
saved is all work but the attention's: a prompt's queries run again with each completion, since only
plain causal attention does without a mask, and a mask's memory is quadratic in the length.
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
    """Where a completion and its prompt are in the row; whether it is the prompt's first."""

    prompt: slice
    own: slice
    first: bool


@dataclass(frozen=True)
class Pack:
    """A batch's prompts and some completions of theirs, without the last token of each: that one
    predicts nothing that is asked for.

    Attributes:
        ids: int64 ``[1, N]``.
        positions: int64 ``[1, N]``, each token's place in its own sequence.
        pieces: what attends to what; one a completion.
        predicting: int64 ``[M]``, which of the ``N`` tokens predicts each completion token.
        labels: int64 ``[M]``, the completion tokens; -100 where the assistant did not write it.
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
        positions = [torch.arange(_length(prompt)) for prompt in prompts]
        pieces, predicting = [], []
        for place, p, length in zip(own, prompt_of, lengths, strict=True):
            prompt = prompts[p]
            pieces.append(Piece(prompt, place, first=prompt_of.index(p) == len(pieces)))
            positions.append(torch.arange(_length(place)) + _length(prompt))
            rows = [prompt.stop - 1, *range(place.start, place.stop)]
            predicting.append(torch.tensor(rows[:length], dtype=torch.long))
        kept = completions.ids[:, :-1][mask[:, 1:]]
        return cls(
            torch.cat([batch.prompt_ids[batch.prompt_mask], kept])[None],
            torch.cat(positions)[None].to(device),
            tuple(pieces),
            torch.cat(predicting).to(device),
            completions.labels[mask],
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
    outputs: dict[int, Tensor] = {}  # by where they begin
    for piece in pieces:
        q, k, v = (
            torch.cat([x[:, :, piece.prompt], x[:, :, piece.own]], 2) for x in (query, key, value)
        )
        mask = _window(q.shape[2], sliding_window, q.device)
        output = sdpa_attention_forward(module, q, k, v, mask, **options)[0]
        of_prompt, of_own = output.split([_length(piece.prompt), _length(piece.own)], 1)
        if piece.first:
            outputs[piece.prompt.start] = of_prompt
        if _length(piece.own):
            outputs[piece.own.start] = of_own
    return torch.cat([outputs[start] for start in sorted(outputs)], 1), None


def _window(length: int, window: int | None, device: torch.device) -> Tensor | None:
    """The mask of causal attention to the last ``window`` tokens; None where plain causal is it."""
    if window is None or length <= window:
        return None
    mask = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return mask.triu(1 - window)[None, None]
