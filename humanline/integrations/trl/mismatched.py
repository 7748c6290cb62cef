"""KTO's mismatched pairs in TRL's trainer, which do not match.

TRL takes the completion of the row before, whatever it is: where rows come in groups, often one of
the same prompt, and its own where a batch has one row.
"""

from collections.abc import Iterator
from typing import Any

from datasets import Dataset
from datasets.fingerprint import Hasher

from humanline.integrations.trl.checks import first_row
from humanline.mismatched import mismatched_indices

COLUMN = "KL_completion_ids"


def mismatched(dataset: Any, batch_size: int, name: str) -> Any:
    """The dataset with other completions for its prompts, none of them the prompt's own.

    They are those of the row's own batch, as TRL has it, so that what the reference point is
    estimated from is what the batch is about; where TRL's will do, they are TRL's. Where the batch
    has none for a prompt, a later row's is taken (of a stream the first that will do).

    Args:
        dataset: as TRL has tokenized it; without the column (DPO's, one with images, a loss without
            a reference point) it is left as it is.
        batch_size: rows of a batch.
        name: of the dataset, for messages.

    Raises:
        ValueError: there is no such completion. Of a stream, when it gets there.
    """
    if COLUMN not in first_row(dataset):
        return dataset

    def pair(batch: dict[str, list], indices: list[int]) -> dict[str, list]:
        # Backwards, one row on is TRL's row before.
        backwards = batch["completion_ids"][::-1]
        found = mismatched_indices(batch["prompt_ids"][::-1], backwards)[::-1]
        return {
            COLUMN: [
                _later(dataset, row, batch_size, batch, i, name) if j is None else backwards[j]
                for i, (row, j) in enumerate(zip(indices, found, strict=True))
            ]
        }

    options = {"batched": True, "batch_size": batch_size, "with_indices": True}
    if isinstance(dataset, Dataset):  # whose own fingerprint would be of all that ``pair`` holds
        known = dataset._fingerprint, batch_size, "humanline's mismatched pairs"
        options |= {"new_fingerprint": Hasher.hash(known), "desc": f"Mismatching pairs of {name}"}
    return dataset.map(pair, **options)


def _later(
    dataset: Any, row: int, batch_size: int, batch: dict[str, list], i: int, name: str
) -> list[int]:
    """A completion from outside the batch for its ``i``-th prompt, which is in row ``row``."""
    prompt = batch["prompt_ids"][i]
    pairs = zip(batch["prompt_ids"], batch["completion_ids"], strict=True)
    own = [completion for p, completion in pairs if p == prompt]
    for other in _rows_from(dataset, row + batch_size):
        if other["prompt_ids"] != prompt and other["completion_ids"] not in own:
            return other["completion_ids"]
    raise ValueError(
        f"dataset {name!r} has no mismatched pair for its row {row}: every completion is of the "
        "same prompt, or the same as one of its own. KTO's reference point needs several prompts; "
        'or set loss_type="apo_zero_unpaired", which has none'
    )


def _rows_from(dataset: Any, start: int) -> Iterator[dict[str, Any]]:
    """All rows of a dataset, beginning there, round its end; of a stream, from its beginning."""
    if isinstance(dataset, Dataset):
        return (dataset[(start + k) % len(dataset)] for k in range(len(dataset)))
    return iter(dataset)
