"""Ops: log-probs from logits and from hidden states, their autograd, and the choice of backend."""

from humanline.ops.backend import choose_backend
from humanline.ops.hidden.columns import check_tolerance
from humanline.ops.hidden.gathered import rows_of_all_ranks, slice_for_all_rows
from humanline.ops.hidden.head import (
    WORKSPACE_BYTES,
    Head,
    check_hidden,
    check_sliced,
    sliced_head,
)
from humanline.ops.hidden.objective import linear_objective
from humanline.ops.hidden.token_logps import (
    linear_token_logps,
    logps_and_columns,
    reference_logps,
)
from humanline.ops.logits.objective import logits_objective
from humanline.ops.logits.token_logps import (
    check_logits,
    logits_logps,
    shift,
    sliced_logits,
    token_logps,
)
from humanline.ops.whole_batch import finish

__all__ = [
    "WORKSPACE_BYTES",
    "Head",
    "check_hidden",
    "check_logits",
    "check_sliced",
    "check_tolerance",
    "choose_backend",
    "finish",
    "linear_objective",
    "linear_token_logps",
    "logits_logps",
    "logits_objective",
    "logps_and_columns",
    "reference_logps",
    "rows_of_all_ranks",
    "shift",
    "slice_for_all_rows",
    "sliced_head",
    "sliced_logits",
    "token_logps",
]
