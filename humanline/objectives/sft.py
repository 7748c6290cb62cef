"""SFT: plain supervised fine-tuning, the baseline."""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from humanline.objectives.base import TokenObjective
from humanline.rows import Layout, Rows


@dataclass(frozen=True)
class SFT(TokenObjective):
    """Mean negative log-likelihood of the completion tokens.

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
        return {"num_items_in_batch": num_items_in_batch}

    def token_loss(self, rows: Rows, num_items_in_batch) -> Tensor:
        if num_items_in_batch is None:
            return rows.token_mean(-rows.logps)
        return -rows.logps / num_items_in_batch

    def stats(self, rows: Rows, num_items_in_batch) -> dict[str, Tensor]:
        return {"logps/mean": rows.token_mean(rows.logps).sum()}
