"""SFT: plain supervised fine-tuning, the baseline."""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from humanline.objectives.base import TokenObjective, as_count
from humanline.rows import Layout, Rows


@dataclass(frozen=True)
class SFT(TokenObjective):
    """Mean negative log-likelihood of the completion tokens.

    Args:
        perception: stays Identity(): without a reference there is no log-ratio to perceive.

    Batch arguments:
        num_items_in_batch: completion tokens of the whole accumulated batch, if it is the
            normaliser; this batch's if left out.
    """

    needs_reference: ClassVar[bool] = False

    def prepare(
        self,
        layout: Layout,
        ref_logps: Tensor | None,
        *,
        num_items_in_batch: int | Tensor | None = None,
    ) -> dict[str, Any]:
        return {"num_items_in_batch": as_count(num_items_in_batch)}

    def kernel_arguments(
        self, layout: Layout, ref_logps: Tensor | None, num_items_in_batch
    ) -> dict[str, Any] | None:
        if type(self) is not SFT:  # a subclass may define another loss
            return None
        items = num_items_in_batch
        share = layout.over_tokens(1.0) if items is None else 1.0 / items
        return {"kind": "nll", "weight": layout.weights(share, layout.mask)}

    def token_loss(self, rows: Rows, num_items_in_batch) -> Tensor:
        loss, items = -rows.logps, num_items_in_batch
        return rows.token_mean(loss) if items is None else loss / items

    def stats(self, rows: Rows, num_items_in_batch) -> dict[str, Tensor]:
        return {"logps/mean": rows.token_mean(rows.logps).sum()}

    def token_stats_of(self, report: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"logps/mean": report["logps"]}
