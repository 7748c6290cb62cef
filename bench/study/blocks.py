"""A pretrained model whose last blocks train, at the cost of those: the others' work is done once.

The blocks below are frozen, hence what they make of a text never changes. Prompts they read once;
where a completion is sampled their hidden states are kept, and training, scoring and measuring read
only the last blocks. All prompts begin alike: that part is read once a forward, whatever the number
of prompts, and a prompt once for all of its completions. The head is frozen too (it is tied to the
embedding).
"""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

import humanline as hl


@dataclass(frozen=True)
class Texts:
    """Prompts and their completions, ``G`` of each, as the frozen blocks leave them.

    Attributes:
        prompts: hidden states ``[P, T, H]`` of what follows the common beginning.
        completions: hidden states ``[P, G, C − 1, H]`` of all tokens but the last.
        ids: tokens of the completions, int64 ``[P, G, C]``.
        mask: bool ``[P, G, C]``, up to and with the token that ends a completion.
        logps: log-probs ``[P, G, C]`` that the sampling policy gave them, 0 outside of the mask.
    """

    prompts: Tensor
    completions: Tensor
    ids: Tensor
    mask: Tensor
    logps: Tensor

    def __getitem__(self, index) -> "Texts":
        return Texts(*(value[index] for value in vars(self).values()))

    @staticmethod
    def cat(parts: list["Texts"]) -> "Texts":
        return Texts(*map(torch.cat, zip(*(vars(part).values() for part in parts), strict=True)))


@dataclass(frozen=True)
class Prompts:
    """Prompts as the frozen blocks leave them.

    Attributes:
        states: ``[P, T, H]`` of what follows the common beginning.
        cache: keys and values, of the common beginning too.
    """

    states: Tensor
    cache: DynamicCache

    def __len__(self) -> int:
        return len(self.states)

    def __getitem__(self, rows: slice) -> "Prompts":
        """Some of them; what is appended to their cache is not to this one."""
        cache = copy.deepcopy(self.cache)
        cache.batch_select_indices(torch.arange(len(self))[rows])
        return Prompts(self.states[rows], cache)


class Policy(nn.Module):
    """The last blocks and the frozen head.

    Args:
        body: the blocks, called with ``inputs_embeds``.
        beginning: hidden states ``[1, B, H]`` of the common beginning.
        weight: of the head.
    """

    def __init__(self, body: nn.Module, beginning: Tensor, weight: Tensor):
        super().__init__()
        self.body = body
        self.beginning = nn.Parameter(beginning, requires_grad=False)
        self.weight = nn.Parameter(weight, requires_grad=False)

    def read(self, prompts: Tensor) -> tuple[Tensor, DynamicCache]:
        """Final hidden state ``[P, 1, H]`` of each prompt's last token, and keys and values."""
        cache = _read(self.body, self.beginning)[1]
        cache.batch_repeat_interleave(len(prompts))
        return _read(self.body, prompts, cache)[0][:, -1:], cache

    def hidden(self, texts: Texts) -> Tensor:
        """Final hidden states ``[P·G, C, H]`` that predict the completions' tokens."""
        last, cache = self.read(texts.prompts)
        each = texts.ids.shape[1]
        cache.batch_repeat_interleave(each)
        rest, _ = _read(self.body, texts.completions.flatten(0, 1), cache)
        return torch.cat([last.repeat_interleave(each, 0), rest], 1)

    def logps(self, texts: Texts) -> Tensor:
        """Log-probs ``[P·G, C]`` of the completions' tokens, 0 outside of the mask."""
        labels = texts.ids.masked_fill(~texts.mask, -100).flatten(0, 1)
        return hl.linear_token_logps(self.hidden(texts), self.weight, labels)


def _read(body: nn.Module, states: Tensor, cache: DynamicCache | None = None):
    cache = DynamicCache(config=body.config) if cache is None else cache
    output = body(inputs_embeds=states, past_key_values=cache, use_cache=True)
    return output.last_hidden_state, cache


class Frozen:
    """The embedding and the blocks below.

    Args:
        embedding: of tokens.
        body: the blocks.
        beginning: tokens ``[B]`` that all prompts begin with.
    """

    def __init__(self, embedding: nn.Module, body: nn.Module, beginning: Tensor):
        self.embedding, self.body = embedding.requires_grad_(False), body.requires_grad_(False)
        self.beginning, self.cache = self.read(beginning[None])

    @torch.no_grad()
    def read(self, ids: Tensor, cache: DynamicCache | None = None) -> tuple[Tensor, DynamicCache]:
        """Hidden states ``[P, t, H]`` of tokens ``[P, t]``, and keys and values."""
        return _read(self.body, self.embedding(ids), cache)

    def read_prompts(self, ids: Tensor) -> Prompts:
        """Of tokens ``[P, T]``, without the common beginning."""
        cache = copy.deepcopy(self.cache)
        cache.batch_repeat_interleave(len(ids))
        return Prompts(*self.read(ids, cache))


def split(model: PreTrainedModel, blocks: int, beginning: Tensor) -> tuple[Frozen, Policy]:
    """Take a Llama model apart below its last ``blocks``; both parts hold the model's own weights.

    Args:
        model: with a body (``layers``, ``norm``, ``rotary_emb``) and a head without bias.
        blocks: how many train.
        beginning: tokens ``[B]`` that all prompts begin with.
    """
    whole = model.get_decoder().eval()
    count = len(whole.layers) - blocks
    below = _with_blocks(whole, whole.layers[:count], nn.Identity())
    above = _with_blocks(whole, whole.layers[count:], whole.norm)
    frozen = Frozen(whole.embed_tokens, below, beginning)
    return frozen, Policy(above, frozen.beginning, model.get_output_embeddings().weight.detach())


def _with_blocks(whole: nn.Module, layers, norm: nn.Module) -> nn.Module:
    config = copy.copy(whole.config)
    config.num_hidden_layers = len(layers)
    with torch.device("meta"):
        body = type(whole)(config)
    body.embed_tokens, body.norm, body.rotary_emb = nn.Identity(), norm, whole.rotary_emb
    body.layers = nn.ModuleList(layers)
    for index, layer in enumerate(layers):
        layer.self_attn.layer_idx = index  # its place in a cache
    return body.eval()


@torch.no_grad()
def sample(
    frozen: Frozen,
    policy: Policy,
    prompts: Prompts,
    each: int,
    tokens: int,
    end: int,
    generator: torch.Generator,
) -> Texts:
    """``each`` completions of prompts at temperature 1, of at most so many tokens; one that has not
    ended by then is cut. What it reads is appended to the prompts' cache."""
    last, cache = policy.read(prompts.states)
    frozen_cache = prompts.cache
    frozen_cache.batch_repeat_interleave(each)
    cache.batch_repeat_interleave(each)
    last = last.repeat_interleave(each, 0)
    going = torch.ones(len(last), dtype=torch.bool)
    ids, mask, logps, states = [], [], [], []
    for _ in range(tokens):
        scores = (last[:, 0] @ policy.weight.T).log_softmax(-1)
        token = torch.multinomial(scores.exp(), 1, generator=generator)
        ids.append(token)
        mask.append(going[:, None])
        logps.append(scores.gather(1, token).masked_fill(~going[:, None], 0.0))
        going = going & (token[:, 0] != end)
        if len(ids) < tokens:
            state, _ = frozen.read(token, frozen_cache)
            states.append(state)
            last, _ = _read(policy.body, state, cache)
    drawn = torch.cat(states, 1), torch.cat(ids, 1), torch.cat(mask, 1), torch.cat(logps, 1)
    return Texts(prompts.states, *(x.unflatten(0, (len(prompts), each)) for x in drawn))


def known(frozen: Frozen, prompts: Prompts, ids: Tensor, mask: Tensor) -> Texts:
    """Given completions ``[P, G, C]`` of prompts, as :func:`sample` would return them, but for the
    log-probs. What it reads is appended to the prompts' cache."""
    prompts.cache.batch_repeat_interleave(ids.shape[1])
    states, _ = frozen.read(ids[:, :, :-1].flatten(0, 1), prompts.cache)
    states = states.unflatten(0, ids.shape[:2])
    return Texts(prompts.states, states, ids, mask, torch.zeros(ids.shape))
