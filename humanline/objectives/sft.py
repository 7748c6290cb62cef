"""SFT: plain supervised fine-tuning, the baseline."""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from humanline.objectives.base import TokenObjective, as_count
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
        return {"num_items_in_batch": as_count(num_items_in_batch)}

    def kernel_arguments(
        self, layout: Layout, ref_logps: Tensor | None, num_items_in_batch
    ) -> dict[str, Any] | None:
        if type(self) is not SFT:  # a subclass may define another loss
            return None
        rows = Rows.blank(layout)
        return {"kind": "nll", "weight": rows.weights(self._share(rows, 1.0, num_items_in_batch))}

    def token_loss(self, rows: Rows, num_items_in_batch) -> Tensor:
        return self._share(rows, -rows.logps, num_items_in_batch)

    @staticmethod
    def _share(rows: Rows, loss: Tensor | float, num_items: int | Tensor | None) -> Tensor | float:
        return rows.token_mean(loss) if num_items is None else loss / num_items

    def stats(self, rows: Rows, num_items_in_batch) -> dict[str, Tensor]:
        return {"logps/mean": rows.token_mean(rows.logps).sum()}

    def token_stats_of(self, report: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"logps/mean": report["logps"]}
