"""Axolotl: a plugin that makes the preference trainer it builds a humanline one.

    plugins:
      - humanline.integrations.axolotl.HumanlinePlugin
    rl: dpo
    log_eps_P: -1.5
    log_eps_R: 1.5
    sync_every: 1

Axolotl's trainers are TRL's: which of them can be humanline, and under which versions of TRL, is up
to ``humanline.integrations.trl``. Axolotl 0.19 pins TRL 1.9, older than any it knows: there the
plugin refuses, and names the versions.
"""

from typing import Any, Literal

import humanline as hl
from humanline import install
from humanline.ops import check_tolerance

try:
    from axolotl.integrations.base import BasePlugin
    from pydantic import BaseModel, NonNegativeInt, model_validator
except ImportError as error:
    raise ImportError(
        f"humanline.integrations.axolotl needs axolotl: {install.command('axolotl')}"
    ) from error


class HumanlineArgs(BaseModel):
    """The plugin's options in Axolotl's YAML, checked when it is read.

    Attributes:
        humanline: False leaves the trainer alone.
        log_eps_P, log_eps_R: bounds of the clip, in nats.
        sync_every: optimizer steps between syncs of the reference; 0 for never.
        reference: what provides it; left out, the trainer's choice.
        gradient_tolerance: columns that hold less than this share of the norm of the logits'
            gradient may be left out of the head's backward; 0 is exact.
    """

    humanline: bool = True
    log_eps_P: float = hl.Clip.log_eps_P
    log_eps_R: float = hl.Clip.log_eps_R
    sync_every: NonNegativeInt = 1
    reference: Literal["copy", "adapter", "lookahead"] | None = None
    gradient_tolerance: float = 0.0

    @model_validator(mode="after")
    def check_bounds(self):
        hl.Clip(self.log_eps_P, self.log_eps_R)
        check_tolerance(self.gradient_tolerance, capturable=False)
        return self


class HumanlinePlugin(BasePlugin):
    """What Axolotl's ``plugins:`` names."""

    def get_input_args(self) -> str:
        return f"{__name__}.{HumanlineArgs.__name__}"

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        if cfg.humanline:
            from humanline.integrations.trl import apply_humanline

            apply_humanline(
                trainer,
                perception=hl.Clip(cfg.log_eps_P, cfg.log_eps_R),
                sync_every=cfg.sync_every,
                reference=cfg.reference,
                gradient_tolerance=cfg.gradient_tolerance,
            )
