"""The trainers' calls, as in calls.py."""

import humanline as hl
from humanline.integrations.trl import (
    HumanlineDPOConfig,
    HumanlineDPOTrainer,
    HumanlineGRPOConfig,
    HumanlineGRPOTrainer,
    HumanlineKTOConfig,
    HumanlineKTOTrainer,
    apply_humanline,
    patch_trl,
)

with patch_trl(gradient_tolerance=0.01):
    dpo = HumanlineDPOTrainer("model", args=HumanlineDPOConfig(log_eps_P=-0.5, max_length=512))
    dpo.train()
HumanlineKTOTrainer("model", args=HumanlineKTOConfig(reference="copy")).train()
HumanlineGRPOTrainer("model", args=HumanlineGRPOConfig(generate_every=4)).train()
apply_humanline(dpo, perception=hl.Clip(), sync_every=2)

HumanlineDPOConfig(sync_every="one")  # type: ignore[arg-type]
HumanlineDPOTrainer("model", arg=HumanlineDPOConfig())  # type: ignore[call-arg]
HumanlineKTOTrainer("model", arg=HumanlineKTOConfig())  # type: ignore[call-arg]
HumanlineGRPOTrainer("model", arg=HumanlineGRPOConfig())  # type: ignore[call-arg]
apply_humanline(dpo, synced=1)  # type: ignore[call-arg]
apply_humanline("model")  # type: ignore[arg-type]
