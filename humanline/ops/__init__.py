"""Ops: log-probs from logits and from hidden states, their autograd, and the choice of backend."""

from humanline.ops.head import WORKSPACE_BYTES, Head, check_hidden
from humanline.ops.linear import linear_token_logps
from humanline.ops.linear_objective import linear_objective
from humanline.ops.logits import check_logits, shift, token_logps

__all__ = [
    "WORKSPACE_BYTES",
    "Head",
    "check_hidden",
    "check_logits",
    "linear_objective",
    "linear_token_logps",
    "shift",
    "token_logps",
]
