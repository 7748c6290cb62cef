"""Every loss TRL has for DPO, KTO and GRPO, against TRL's own code on the same tensors.

The trainers' own ``_compute_loss`` runs unbound: on a bare object with the attributes it reads,
and on models that return prescribed log-probs.
"""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from oracle import DPO_LOSSES, GRPO_LOSSES, PERCEPTIONS, close, gradients, leaf

import humanline as hl

trl = pytest.importorskip("trl")
if not trl.__version__.startswith("1.16."):
    pytest.skip(f"knows the insides of TRL 1.16, not {trl.__version__}", allow_module_level=True)

from trl.trainer.dpo_trainer import DPOTrainer  # noqa: E402
from trl.trainer.grpo_trainer import GRPOTrainer  # noqa: E402
from trl.trainer.kto_trainer import KTOTrainer  # noqa: E402


@pytest.fixture(autouse=True)
def double():
    """TRL makes tensors of Python floats: let them be float64, so that nothing is rounded."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


B, T = 6, 5
# Unequal lengths, and a prompt within the first sequence.
MASK = torch.arange(T) < torch.tensor([5, 3, 4, 2, 5, 1])[:, None]
MASK[0, 0] = False
RNG = torch.Generator().manual_seed(0)
LOGPS = -torch.rand(B, T, generator=RNG, dtype=torch.float64) * 3
REF = LOGPS + 0.5 * torch.randn(B, T, generator=RNG, dtype=torch.float64)
OLD = LOGPS + 0.5 * torch.randn(B, T, generator=RNG, dtype=torch.float64)
ENTROPY = torch.rand(B, T, generator=RNG, dtype=torch.float64)
ADVANTAGES = torch.tensor([1.2, -0.8, 0.5, -0.3, 0.0, -1.5], dtype=torch.float64)
DESIRABLE = torch.tensor([True, False, False, True, True, False])
KL_MASK = torch.arange(4) < torch.tensor([4, 2, 3, 1, 4, 2])[:, None]
KL_LOGPS = -torch.rand(B, 4, generator=RNG, dtype=torch.float64)
KL_REF = KL_LOGPS - 0.1 - 0.2 * torch.rand(B, 4, generator=RNG, dtype=torch.float64)

SHIFTED = {name: p for name, p in PERCEPTIONS.items() if name != "identity"}


def perceived_reference(perception, logps, ref, mask=MASK):
    """The reference whose log-ratio to the policy is the perceived one: any loss of policy minus
    reference then is the humanline variant, in value and gradient."""
    mask = mask.flatten()
    d = torch.where(mask, (logps - ref).flatten(), 0)
    return logps - perception.perceive(d, mask)[0].view(logps.shape)


class Model(torch.nn.Module):
    """Returns prescribed log-probs, 0 where masked; by width, for KTO's mismatched pairs."""

    is_gradient_checkpointing = False

    def __init__(self, *logps_and_masks):
        super().__init__()
        self.logps = {x.shape[1]: torch.where(mask, x, 0) for x, mask in logps_and_masks}

    def forward(self, input_ids, **_):
        logps = self.logps[input_ids.shape[1] - 1]
        return SimpleNamespace(
            log_probs=logps,
            entropy=torch.zeros_like(logps),
            mean_logits=torch.zeros_like(logps),
            is_top1=torch.zeros_like(logps, dtype=torch.bool),
        )


ACCELERATOR = SimpleNamespace(
    device=torch.device("cpu"),
    num_processes=1,
    sync_gradients=True,
    gather=lambda x: x,
    gather_for_metrics=lambda x: x,
    reduce=lambda x, reduction: x,
    unwrap_model=lambda x: x,
)


def trainer(model, ref_model=None, **attributes):
    common = {
        "model": model.train(),
        "ref_model": ref_model,
        "accelerator": ACCELERATOR,
        "args": SimpleNamespace(gradient_checkpointing_kwargs=None),
        "aux_loss_enabled": False,
        "precompute_ref_logps": False,
        "_metrics": {"train": defaultdict(list)},
        "_total_train_tokens": 0,
        "_tp_size": 1,
    }
    return SimpleNamespace(**(common | attributes))


def unshifted(mask):
    """TRL's masks and ids begin one token earlier: with one that nothing predicts."""
    return torch.nn.functional.pad(mask, (1, 0)).long()


def differentiated(loss, metrics, *inputs):
    """Loss, gradients on completion tokens, logged numbers."""
    grads = [torch.where(MASK, grad, 0) for grad in gradients(loss, *inputs)]
    numbers = {name: x if isinstance(x, torch.Tensor) else x[-1] for name, x in metrics.items()}
    return loss.detach(), grads, {name: float(x) for name, x in numbers.items()}


def assert_agree(ours, trls, stats=()):
    """Equal losses and gradients, and equal statistics wherever TRL logs the same name."""
    close(ours[:2], trls[:2])
    common = ours[2].keys() & trls[2].keys()
    assert common >= set(stats), common
    for name in common:  # TRL makes its booleans float32
        assert ours[2][name] == pytest.approx(trls[2][name], abs=1e-6), name
    assert ours[1][0].any()


# DPO

DPO_STATS = [f"rewards/{x}" for x in ("chosen", "rejected", "accuracies", "margins")]
DPO_STATS += ["logps/chosen", "logps/rejected"]


def trl_dpo(loss_types, weights=None, label_smoothing=0.0, beta=0.3, perception=None):
    logps = leaf(LOGPS)
    ref = REF if perception is None else perceived_reference(perception, logps, REF)
    model = Model((logps, MASK))
    self = trainer(
        model,
        Model((ref, MASK)),
        loss_types=loss_types,
        loss_weights=weights or [1.0] * len(loss_types),
        beta=beta,
        label_smoothing=label_smoothing,
        ld_alpha=None,
        f_divergence_type="reverse_kl",
        use_weighting=False,
    )
    self.args.discopop_tau = 0.05
    mask = unshifted(MASK)
    inputs = {"input_ids": mask, "attention_mask": mask, "completion_mask": mask}
    loss = DPOTrainer._compute_loss(self, model, inputs, False)
    return differentiated(loss, self._metrics["train"], logps)


def our_dpo(perception=None, beta=0.3, **options):
    logps = leaf(LOGPS)
    objective = hl.DPO(beta=beta, perception=perception or hl.Identity(), **options)
    loss, stats = objective.from_logps(logps, REF, MASK)
    return differentiated(loss, stats, logps)


# TRL's "sigmoid" knows no label smoothing; ours is cDPO with it.
SMOOTHINGS = {"robust": [0.0, 0.1], "exo_pair": [1e-3, 0.1], "aot": [0.0, 0.1]}
SMOOTHINGS["aot_unpaired"] = SMOOTHINGS["aot"]
DPO_OPTIONS = [(name, e) for name in DPO_LOSSES for e in SMOOTHINGS.get(name, [0.0])]


@pytest.mark.parametrize(("loss_type", "label_smoothing"), DPO_OPTIONS)
def test_dpo_equals_trl(loss_type, label_smoothing):
    assert_agree(
        our_dpo(loss_type=loss_type, label_smoothing=label_smoothing),
        trl_dpo([loss_type], label_smoothing=label_smoothing),
        DPO_STATS,
    )


@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_dpo_equals_trl_at_other_betas(beta):
    assert_agree(our_dpo(beta=beta), trl_dpo(["sigmoid"], beta=beta), DPO_STATS)


@pytest.mark.parametrize("sequence", [list, tuple])
@pytest.mark.parametrize("weights", [None, [0.8, 0.2, 1.0]])
def test_weighted_sums_of_dpo_losses_equal_trl(weights, sequence):
    names = ["sigmoid", "bco_pair", "sft"]
    ours = our_dpo(loss_type=sequence(names), loss_weights=weights and sequence(weights))
    assert_agree(ours, trl_dpo(names, weights), DPO_STATS)


@pytest.mark.parametrize("perception", SHIFTED.values(), ids=SHIFTED)
@pytest.mark.parametrize(("loss_type", "label_smoothing"), DPO_OPTIONS)
def test_perceiving_dpo_equals_trl_with_the_perceived_reference(
    loss_type, label_smoothing, perception
):
    ours = our_dpo(perception, loss_type=loss_type, label_smoothing=label_smoothing)
    trls = trl_dpo([loss_type], label_smoothing=label_smoothing, perception=perception)
    assert_agree(ours, trls, DPO_STATS)


# KTO

KTO_STATS = [f"{name}/{side}" for name in ("rewards", "logps") for side in ("chosen", "rejected")]
DESIRABLES = {
    "both": DESIRABLE,
    "only desirable": torch.ones(B, dtype=torch.bool),
    "only undesirable": torch.zeros(B, dtype=torch.bool),
}


def trl_kto(desirable, kl_ref=KL_REF, perception=None, **options):
    logps, kl_logps = leaf(LOGPS), KL_LOGPS
    ref = REF
    if perception is not None:
        ref = perceived_reference(perception, logps, REF)
        kl_ref = perceived_reference(perception, kl_logps, kl_ref, KL_MASK)
    model = Model((logps, MASK), (kl_logps, KL_MASK))
    self = trainer(
        model,
        Model((ref, MASK), (kl_ref, KL_MASK)),
        calculate_KL=options["loss_type"] == "kto",
        **options,
    )
    self._compute_kl_logps = lambda *args: KTOTrainer._compute_kl_logps(self, *args)
    mask, kl_mask = unshifted(MASK), unshifted(KL_MASK)
    inputs = {"input_ids": mask, "attention_mask": mask, "completion_mask": mask}
    inputs |= {f"KL_{name}": kl_mask for name in inputs} | {"label": desirable}
    loss = KTOTrainer._compute_loss(self, model, inputs, False)
    return differentiated(loss, self._metrics["train"], logps)


def our_kto(desirable, kl_ref=KL_REF, perception=None, **options):
    logps = leaf(LOGPS)
    loss, stats = hl.KTO(**options, perception=perception or hl.Identity()).from_logps(
        *(logps, REF, MASK),
        desirable=desirable,
        kl_logps=KL_LOGPS,
        kl_ref_logps=kl_ref,
        kl_mask=KL_MASK,
    )
    return differentiated(loss, stats, logps)


KTO_OPTIONS = [
    {"loss_type": loss_type, "beta": 0.4, "desirable_weight": w, "undesirable_weight": u}
    for loss_type in ("kto", "apo_zero_unpaired")
    for w, u in [(1.0, 1.0), (1.3, 0.6)]
]


@pytest.mark.parametrize("desirable", DESIRABLES.values(), ids=DESIRABLES)
@pytest.mark.parametrize("options", KTO_OPTIONS)
def test_kto_equals_trl(options, desirable):
    trls = trl_kto(desirable, **options)
    sides = [name for name in KTO_STATS if name in trls[2]]
    assert len(sides) == (4 if desirable is DESIRABLE else 2)
    assert_agree(our_kto(desirable, **options), trls, [*sides, "kl"])


def test_ktos_reference_point_equals_trls_where_it_is_clamped():
    above = KL_LOGPS + 1
    trls = trl_kto(DESIRABLE, above, **KTO_OPTIONS[0])
    assert trls[2]["kl"] == 0
    assert_agree(our_kto(DESIRABLE, above, **KTO_OPTIONS[0]), trls, [*KTO_STATS, "kl"])


@pytest.mark.parametrize("perception", SHIFTED.values(), ids=SHIFTED)
@pytest.mark.parametrize("options", KTO_OPTIONS)
def test_perceiving_kto_equals_trl_with_the_perceived_reference(options, perception):
    ours = our_kto(DESIRABLE, perception=perception, **options)
    assert_agree(ours, trl_kto(DESIRABLE, perception=perception, **options), [*KTO_STATS, "kl"])


# GRPO


def trl_grpo(old=OLD, perception=None, advantages=ADVANTAGES, items=31, **options):
    logps, entropy = leaf(LOGPS), leaf(ENTROPY)
    objective = hl.GRPO(**options)  # for its defaults, which are TRL's
    if perception is not None:
        old = perceived_reference(perception, logps, old)
    self = trainer(
        Model(),
        _get_per_token_logps_and_entropies=lambda *args, **kwargs: (logps, entropy, None),
        get_gamma_weights=GRPOTrainer.get_gamma_weights,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_vllm=False,
        current_gradient_accumulation_steps=1,
        use_adaptive_entropy=False,
        _entropy_bonus_enabled=objective.entropy_coef != 0,
        epsilon_low=objective.epsilon,
        epsilon_high=objective.upper_epsilon,
        args=SimpleNamespace(**vars(objective), steps_per_generation=1),
        **{
            name: getattr(objective, name)
            for name in ("beta", "loss_type", "importance_sampling_level", "entropy_coef")
        },
        max_completion_length=objective.max_completion_length,
    )
    inputs = {
        "prompt_ids": torch.zeros(B, 2).long(),
        "prompt_mask": torch.ones(B, 2).long(),
        "completion_ids": torch.zeros(B, T).long(),
        "completion_mask": MASK.long(),
        "advantages": advantages,
        "old_per_token_logps": old,
        "ref_per_token_logps": REF,
        "num_items_in_batch": torch.tensor(items),
    }
    loss = GRPOTrainer._compute_loss(self, self.model, inputs)
    return differentiated(loss, self._metrics["train"], logps, entropy)


def our_grpo(old=OLD, perception=None, advantages=ADVANTAGES, items=31, **options):
    logps, entropy = leaf(LOGPS), leaf(ENTROPY)
    objective = hl.GRPO(**options, perception=perception or hl.Identity())
    loss, stats = objective.from_logps(
        *(logps, REF, MASK),
        entropy=entropy,
        advantages=advantages,
        old_logps="policy" if old is None else old,
        num_items_in_batch=items,
    )
    return differentiated(loss, stats, logps, entropy)


CLIP_STATS = [f"clip_ratio/{x}" for x in ("low_mean", "low_min", "high_mean", "high_max")]
CLIP_STATS += ["clip_ratio/region_mean"]
STATS = {"cispo": ["cispo_clip_ratio"], "vespo": ["vespo/phi_seq_mean"], "sapo": []}
LEVELS = pytest.mark.parametrize("level", ["token", "sequence"])
LOSS_TYPES = pytest.mark.parametrize("loss_type", GRPO_LOSSES)


def check_grpo(loss_type, level, stats=(), **options):
    over = {
        name: options.pop(name) for name in ("old", "perception", "advantages") & options.keys()
    }
    options |= {"loss_type": loss_type, "importance_sampling_level": level}
    options |= {"max_completion_length": 7}
    ours, trls = our_grpo(**over, **options), trl_grpo(**over, **options)
    assert_agree(ours, trls, [*STATS.get(loss_type, CLIP_STATS), *stats])


@LEVELS
@LOSS_TYPES
def test_grpo_equals_trl(loss_type, level):
    check_grpo(loss_type, level)


@LEVELS
@LOSS_TYPES
def test_grpo_equals_trl_with_an_upper_epsilon(loss_type, level):
    check_grpo(loss_type, level, epsilon=0.1, epsilon_high=1.4 if loss_type == "cispo" else 0.3)


@LEVELS
@LOSS_TYPES
@pytest.mark.parametrize("corrected", [True, False])
def test_grpos_penalty_equals_trls(loss_type, level, corrected):
    check_grpo(loss_type, level, ["kl"], beta=0.3, use_bias_correction_kl=corrected)


@LEVELS
@LOSS_TYPES
@pytest.mark.parametrize("delta", [1.3, 2.0])
def test_two_sided_clipping_equals_trls(loss_type, level, delta):
    check_grpo(loss_type, level, delta=delta)


@LEVELS
def test_two_sided_clipping_below_the_upper_epsilon_equals_trls(level):
    """Loss and gradient: TRL counts as clipped what its ratio is after ``delta``, ours before."""
    options = {"delta": 1.1, "importance_sampling_level": level}
    ours, trls = our_grpo(**options), trl_grpo(**options)
    close(ours[:2], trls[:2])


@LEVELS
@LOSS_TYPES
def test_on_policy_grpo_equals_trl_without_old_log_probs(loss_type, level):
    check_grpo(loss_type, level, old=None, epsilon_high=1.5)


@LEVELS
@LOSS_TYPES
def test_the_entropy_bonus_equals_trls(loss_type, level):
    check_grpo(loss_type, level, ["entropy"], entropy_coef=0.07)


@pytest.mark.parametrize("loss_type", [x for x in GRPO_LOSSES if x != "vespo"])
def test_grpo_with_an_advantage_a_token_equals_trl(loss_type):
    advantages = torch.randn(B, T, dtype=torch.float64)
    check_grpo(loss_type, "token", advantages=advantages)


@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": "sapo", "sapo_temperature_pos": 2.0, "sapo_temperature_neg": 0.7},
        {"loss_type": "vespo", "vespo_k_pos": 1.0, "vespo_lambda_pos": 2.0},
        {"loss_type": "vespo", "vespo_k_neg": 1.5, "vespo_lambda_neg": 0.5},
    ],
    ids=str,
)
def test_grpos_further_parameters_equal_trls(options):
    check_grpo(level="token", **options)


# The gradient of cispo and vespo goes through the log-prob, past the reference: see test_formulas.
@LEVELS
@pytest.mark.parametrize("loss_type", [x for x in GRPO_LOSSES if x not in ("cispo", "vespo")])
@pytest.mark.parametrize("perception", SHIFTED.values(), ids=SHIFTED)
def test_perceiving_grpo_equals_trl_with_the_perceived_reference(loss_type, level, perception):
    check_grpo(loss_type, level, perception=perception, epsilon=0.4, epsilon_high=2.0)
