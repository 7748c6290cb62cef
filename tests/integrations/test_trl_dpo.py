"""HumanlineDPOTrainer against TRL's own, and against humanline.objectives in a plain loop."""

import copy
import math
from functools import partial

import pytest
import torch
import trl_tiny as tiny
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from trl import DPOConfig, DPOTrainer

import humanline as hl
from humanline.integrations.trl import HumanlineDPOConfig, HumanlineDPOTrainer, apply_humanline
from humanline.objectives.dpo import LOSSES
from humanline.reference import REFERENCES

LOSS_TYPES = sorted(LOSSES)
EXACT = {"rtol": 0, "atol": 0}
CLIP = {"log_eps_P": -0.3, "log_eps_R": 0.2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("dpo")


def build(folder, policy=None, **options):
    config, arguments = {}, {}
    for name, value in options.items():
        where = arguments if name in ("peft_config", "eval_dataset", "ref_model") else config
        where[name] = value
    return tiny.build(
        HumanlineDPOTrainer, HumanlineDPOConfig, folder, tiny.pairs(), policy, config, **arguments
    )


@pytest.fixture(scope="module")
def theirs(folder):
    return tiny.build(DPOTrainer, DPOConfig, folder, tiny.pairs())


@pytest.fixture(scope="module")
def off(folder):
    return build(folder, humanline=False)


@pytest.fixture(scope="module")
def on(folder):
    trainer = build(folder, **CLIP)
    tiny.disturb(trainer.model)
    return trainer


#: Of several losses and of losses with weights, as TRL's options name them.
MIXED = {
    "plain": {},
    "MPO": {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 0.5]},
    "WPO": {"use_weighting": True},
}


def set_loss(trainer, loss_type):
    trainer.loss_types = [loss_type]
    trainer.label_smoothing = 0.1 if loss_type in ("exo_pair", "robust") else 0.0


def objective(loss_type="sigmoid", perception=None, **options):
    smoothing = 0.1 if loss_type in ("exo_pair", "robust") else 0.0
    perception = perception or hl.Clip(**CLIP)
    return hl.DPO(loss_type=loss_type, label_smoothing=smoothing, perception=perception, **options)


def eager(policy, batch):
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    return tiny.eager_logps(policy, batch["input_ids"], batch["attention_mask"], labels)


# humanline=False


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_off_is_trl_bit_for_bit(theirs, off, loss_type):
    results = []
    for trainer in (theirs, off):
        set_loss(trainer, loss_type)
        kept = copy.deepcopy(trainer.model.state_dict())
        tiny.disturb(trainer.model)
        results.append(tiny.loss_and_gradients(trainer, tiny.batch_of(trainer)))
        trainer.model.load_state_dict(kept)
    (loss, grads, metrics), (our_loss, our_grads, our_metrics) = results
    assert_close(our_loss, loss, **EXACT)
    assert_close(our_grads, grads, **EXACT)
    assert our_metrics == metrics


@pytest.mark.parametrize("mixed", MIXED)
def test_off_trains_as_trl(folder, mixed):
    trainers = [
        tiny.build(DPOTrainer, DPOConfig, folder, tiny.pairs(), options=MIXED[mixed]),
        build(folder, humanline=False, **MIXED[mixed]),
    ]
    for trainer in trainers:
        trainer.train()
    assert tiny.history(trainers[0]) == tiny.history(trainers[1])
    assert_close(tiny.weights(trainers[0]), tiny.weights(trainers[1]), **EXACT)


# humanline=True: one loss


def check_against(objective, trainer):
    """Loss, gradients and metrics of a batch, against an objective's."""

    def of(batch):
        logps, mask = eager(trainer.model, batch)
        with torch.no_grad():
            ref_logps, _ = eager(trainer.reference.model, batch)
        return objective.from_logps(logps, ref_logps, mask)

    tiny.check_loss(trainer, tiny.batch_of(trainer), of)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_loss_and_gradients_are_the_objective_s(on, loss_type):
    set_loss(on, loss_type)
    check_against(objective(loss_type), on)


def test_several_losses_are_the_objective_s(folder):
    trainer = build(folder, **MIXED["MPO"], **CLIP)
    tiny.disturb(trainer.model)
    options = {name: tuple(value) for name, value in MIXED["MPO"].items()}
    check_against(hl.DPO(perception=hl.Clip(**CLIP), **options), trainer)


@pytest.mark.parametrize("loss_type", ["ipo", "sigmoid_norm"])
def test_a_token_that_is_not_scored_is_not_counted(folder, loss_type):
    """The first of a sequence whose prompt is cut away: of k tokens, k-1 have a log-prob."""
    options = {"max_length": 3, "truncation_mode": "keep_end", "loss_type": [loss_type], **CLIP}
    trainer = build(folder, **options)
    tiny.disturb(trainer.model)
    assert tiny.batch_of(trainer)["completion_mask"][:, 0].any()
    check_against(objective(loss_type), trainer)


def test_bounds_that_do_not_bracket_zero(on):
    """Padding's log-ratio stays 0 where 0 itself would be clamped."""
    set_loss(on, "sigmoid")
    batch = tiny.batch_of(on)
    kept, on.perception = on.perception, hl.Clip(0.1, 0.2)
    loss, _, _ = tiny.loss_and_gradients(on, batch)
    on.perception = kept
    with torch.no_grad():
        (logps, mask), (ref_logps, _) = eager(on.model, batch), eager(on.reference.model, batch)
        expected, _ = objective(perception=hl.Clip(0.1, 0.2)).from_logps(logps, ref_logps, mask)
    assert_close(loss, expected, rtol=1e-5, atol=1e-6)


F_DIVERGENCES = {
    "forward_kl": lambda x: 1 - torch.exp(-x),
    "js_divergence": lambda x: math.log(2) + torch.nn.functional.logsigmoid(x),
    "alpha_divergence": lambda x: (torch.exp(-0.5 * x) - 1) / -0.5,
}


def perceived(trainer, batch):
    """Perceived log-ratios of the batch, and its mask."""
    logps, mask = eager(trainer.model, batch)
    with torch.no_grad():
        ref_logps, _ = eager(trainer.reference.model, batch)
    d = torch.where(mask, logps - ref_logps, 0)
    return torch.where(mask, d.clamp(CLIP["log_eps_P"], CLIP["log_eps_R"]), 0), mask


@pytest.mark.parametrize("name", F_DIVERGENCES)
def test_an_f_divergence_is_of_the_perceived_sequence_ratio(on, monkeypatch, name):
    set_loss(on, "sigmoid")
    monkeypatch.setattr(on, "f_divergence_type", name)
    monkeypatch.setattr(on, "f_alpha_divergence_coef", 0.5)
    batch = tiny.batch_of(on)
    loss, grads, _ = tiny.loss_and_gradients(on, batch)
    w, l = F_DIVERGENCES[name](perceived(on, batch)[0].sum(1)).chunk(2)
    expected = -torch.nn.functional.logsigmoid(0.1 * (w - l)).mean()
    expected.backward()
    assert_close(loss, expected.detach(), rtol=1e-5, atol=1e-6)
    assert_close(grads, tiny.gradients(on.model), rtol=1e-4, atol=2e-6)


def test_ld_dpo_weighs_tokens_once_they_are_perceived(on, monkeypatch):
    set_loss(on, "sigmoid")
    monkeypatch.setattr(on, "ld_alpha", 0.3)
    batch = tiny.batch_of(on)
    loss, grads, _ = tiny.loss_and_gradients(on, batch)
    c, mask = perceived(on, batch)
    shared = torch.minimum(*mask.sum(1).chunk(2)).repeat(2)
    weight = torch.where(mask.cumsum(1) <= shared[:, None], 1.0, 0.3)
    w, l = (weight * c).sum(1).chunk(2)
    expected = -torch.nn.functional.logsigmoid(0.1 * (w - l)).mean()
    expected.backward()
    assert (weight[mask] < 1).any()
    assert_close(loss, expected.detach(), rtol=1e-5, atol=1e-6)
    assert_close(grads, tiny.gradients(on.model), rtol=1e-4, atol=2e-6)


def test_weights_of_pairs_are_of_the_policy_as_it_is(folder):
    """WPO's see its log-probs alone, from which perception takes nothing."""
    trainer = build(folder, **MIXED["WPO"], **CLIP)
    tiny.disturb(trainer.model)
    batch = tiny.batch_of(trainer)
    loss, grads, _ = tiny.loss_and_gradients(trainer, batch)
    c, mask = perceived(trainer, batch)
    with torch.no_grad():
        logits = trainer.model(batch["input_ids"], batch["attention_mask"]).logits[:, :-1]
        aligned = eager(trainer.model, batch)[0] - (2 * logits.log_softmax(-1)).logsumexp(-1)
        of_chosen, of_rejected = ((aligned * mask).sum(1) / mask.sum(1)).exp().chunk(2)
    w, l = c.sum(1).chunk(2)
    losses = -torch.nn.functional.logsigmoid(0.1 * (w - l))
    expected = (losses * of_chosen * of_rejected).mean()
    expected.backward()
    assert_close(loss, expected.detach(), rtol=1e-5, atol=1e-6)
    assert_close(grads, tiny.gradients(trainer.model), rtol=1e-4, atol=2e-6)


# Training


@pytest.mark.parametrize("sync_every", [1, 2])
def test_training_is_the_plain_loop(folder, sync_every):
    options = {"gradient_accumulation_steps": 2, "max_grad_norm": 0.5, "max_steps": 5}
    trainer = build(folder, sync_every=sync_every, **CLIP, **options)
    batches = tiny.recorded(trainer)
    trainer.train()

    def loss_of(policy, reference, batch):
        logps, mask = eager(policy, batch)
        with torch.no_grad():
            ref_logps, _ = eager(reference, batch)
        loss, stats = objective().from_logps(logps, ref_logps, mask)
        return loss / 2, stats

    policy, losses, unclamped = tiny.plain_loop(batches, 2, sync_every, 0.5, loss_of)
    assert unclamped < 1
    logged = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert logged == pytest.approx(losses, rel=1e-5)
    assert_close(dict(policy.named_parameters()), tiny.weights(trainer), rtol=1e-4, atol=1e-5)


def test_without_bounds_and_sync_the_numbers_are_trl_s(folder):
    """All that is left of humanline is its fused head."""
    bounds = {"log_eps_P": float("-inf"), "log_eps_R": float("inf")}
    ours = build(folder, sync_every=0, learning_rate=0.1, **bounds)
    theirs = tiny.build(DPOTrainer, DPOConfig, folder, tiny.pairs(), options={"learning_rate": 0.1})
    for trainer in (ours, theirs):
        trainer.train()
    dropped = ["humanline/unclamped"]
    for row, expected in zip(tiny.history(ours, dropped), tiny.history(theirs), strict=True):
        assert row == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert_close(tiny.weights(ours), tiny.weights(theirs), rtol=1e-4, atol=1e-6)


def test_the_kinds_of_reference_agree(folder):
    """Bit for bit. Accumulation leaves the last step of the epoch one batch short."""
    options = {"sync_every": 2, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 5}
    tiny.check_kinds_agree(partial(build, folder, max_steps=3, **options, **CLIP))


@pytest.mark.parametrize("kind", REFERENCES)
def test_resumed_run_goes_on_bit_for_bit(folder, tmp_path, kind):
    options = {"reference": kind, "sync_every": 2, "max_steps": 6, **CLIP}
    tiny.check_resuming(partial(build, folder, **options), tmp_path, at=3)


def test_under_deepspeed_the_loss_of_the_last_micro_batch_syncs(folder, monkeypatch):
    """DeepSpeed steps inside backward(), before any callback: played by hand."""
    trainer = tiny.build(DPOTrainer, DPOConfig, folder, tiny.pairs())
    monkeypatch.setattr(trainer, "is_deepspeed_enabled", True)
    apply_humanline(trainer)
    callbacks = [type(callback).__name__ for callback in trainer.callback_handler.callbacks]
    assert "SyncBeforeStep" not in callbacks
    batch, reference = tiny.batch_of(trainer), trainer.reference.model
    for step in range(2):
        theta = tiny.weights(trainer)
        for last in (False, True):
            trainer.accelerator.gradient_state._set_sync_gradients(last)
            trainer.compute_loss(trainer.model.train(), batch)
            assert trainer.reference.step == step + last
        tiny.disturb(trainer.model)
        assert_close(dict(reference.named_parameters()), theta, **EXACT)
    trainer.compute_loss(trainer.model.eval(), batch)
    assert trainer.reference.step == 2


def test_a_checkpoint_without_reference_is_refused(folder, tmp_path):
    options = {"output_dir": str(tmp_path), "save_strategy": "steps", "save_steps": 2}
    build(folder, humanline=False, max_steps=2, **options).train()
    with pytest.raises(ValueError, match="not written by a humanline trainer"):
        build(folder, **options).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_evaluation_perceives_too(folder):
    trainer = build(folder, eval_dataset=tiny.pairs(2, seed=3), **CLIP)
    tiny.disturb(trainer.model)
    metrics = trainer.evaluate()
    batch = trainer._prepare_inputs(next(iter(trainer.get_eval_dataloader())))
    with torch.no_grad():
        logps, mask = eager(trainer.model, batch)
        ref_logps, _ = eager(trainer.reference.model, batch)
        loss, stats = objective().from_logps(logps, ref_logps, mask)
    assert metrics["eval_loss"] == pytest.approx(loss.item(), rel=1e-5)
    name = "humanline/unclamped"
    assert trainer.state.log_history[-1][f"eval_{name}"] == pytest.approx(stats[name].item())


def test_apply_humanline_to_an_instance(folder):
    """Of a subclass, whose own loss is still called."""

    class Doubled(DPOTrainer):
        def _compute_loss(self, *args, **kwargs):
            return 2 * super()._compute_loss(*args, **kwargs)

    ours = build(folder, **CLIP)
    theirs = tiny.build(Doubled, DPOConfig, folder, tiny.pairs())
    apply_humanline(theirs, perception=hl.Clip(**CLIP))
    results = []
    for trainer in (ours, theirs):
        tiny.disturb(trainer.model)
        results.append(tiny.loss_and_gradients(trainer, tiny.batch_of(trainer)))
    assert_close(results[1][0], 2 * results[0][0])
    assert results[1][2] == results[0][2]
    assert isinstance(theirs, Doubled)
    with pytest.raises(ValueError, match="has humanline already"):
        apply_humanline(theirs)


# The fused head


class HeadRows(TorchDispatchMode):
    """Rows that go through a product with the output head's weight or its gradient."""

    rows = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket.__name__ in ("mm", "addmm", "addmm_"):
            a, b = args[-2:]
            if tiny.VOCAB in (*a.shape, *b.shape):
                self.rows += a.numel() * b.shape[1] // (tiny.VOCAB * tiny.SIZES["hidden_size"])
        return function(*args, **(kwargs or {}))


def head_rows(trainer):
    """Rows through the head in a training step; completion tokens; those that are unclamped."""
    tiny.disturb(trainer.model)
    batch = tiny.batch_of(trainer)
    with HeadRows() as head:
        _, _, metrics = tiny.loss_and_gradients(trainer, batch)
    tokens = batch["completion_mask"].sum().item()
    return head.rows, tokens, round(metrics.get("humanline/unclamped", [1])[0] * tokens)


def test_rows_through_the_head(folder):
    """Reference once, policy once, and three times in the backward what was not clipped away."""
    rows, tokens, unclamped = head_rows(build(folder, **CLIP))
    assert 0 < unclamped < tokens
    assert rows == 2 * tokens + 3 * unclamped
    theirs, *_ = head_rows(tiny.build(DPOTrainer, DPOConfig, folder, tiny.pairs()))
    assert theirs >= 5 * tokens


def test_rows_through_a_frozen_head(folder):
    """The hidden states' gradient is formed in the forward."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, **tiny.LORA["attention"])
    rows, tokens, _ = head_rows(build(folder, peft_config=config, **CLIP))
    assert rows == 3 * tokens


# Models and adapters


def check_against_eager(trainer):
    """Loss, gradients and metrics of a batch, against the model's own logits; the metrics."""
    batch = tiny.batch_of(trainer)
    with torch.no_grad():  # the reference begins as the policy
        ref_logps, _ = eager(trainer.model.eval(), batch)
    tiny.disturb(trainer.model)

    def of(batch):
        logps, mask = eager(trainer.model.eval(), batch)
        return objective().from_logps(logps, ref_logps, mask)

    metrics, _ = tiny.check_loss(trainer, batch, of)
    assert "humanline/unclamped" in metrics
    return metrics


@pytest.mark.parametrize("kind", ["tied", "softcap", "scale", "bias"])
def test_models(tmp_path, kind):
    policy = tiny.model(kind, path=tmp_path / "model")
    reference = tiny.model(kind)
    check_against_eager(build(tmp_path, policy, ref_model=reference, reference="copy", **CLIP))


def test_prompt_tuning(folder):
    """Virtual tokens make the outputs longer than the labels."""
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    trainer = build(folder, peft_config=config, log_eps_P=99.0, log_eps_R=100.0)
    batch = tiny.batch_of(trainer)
    _, _, metrics = tiny.loss_and_gradients(trainer, batch)
    # All log-ratios are perceived as the lower bound: those of the completions alone.
    tokens = batch["completion_mask"][:2].sum(1).double().mean().item()
    assert metrics["rewards/chosen"] == [pytest.approx(0.1 * 99 * tokens, rel=1e-4)]
    assert metrics["humanline/unclamped"] == [0]


#: Adapters that do not begin as nothing: virtual tokens, layers of their own, a random product.
NOT_ZERO = {
    "prompt": lambda peft: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "prefix": lambda peft: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "lora": lambda peft: peft.LoraConfig(r=4, init_lora_weights=False, **tiny.LORA["lm_head"]),
}


@pytest.mark.parametrize("reference", ["adapter", "copy"])
@pytest.mark.parametrize("name", NOT_ZERO)
def test_an_adapter_that_is_not_zero_begins_with_the_base_as_reference(folder, name, reference):
    """As in TRL. Never synced it stays so, and a sync makes it the policy."""
    config = NOT_ZERO[name](pytest.importorskip("peft"))
    base = tiny.model()
    for sync_every in (0, 1):
        bounds = {"log_eps_P": -1e-3, "log_eps_R": 1e-3}
        trainer = build(
            folder, peft_config=config, reference=reference, sync_every=sync_every, **bounds
        )
        batch = tiny.batch_of(trainer)
        arguments = {k: batch[k] for k in ("input_ids", "attention_mask")}
        arguments |= {"labels": batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)}
        arguments |= {"fused_lm_head": True, "use_cache": False}
        with torch.no_grad():
            expected, _ = eager(base, batch)
        for _ in range(2):
            (found,) = trainer.reference.scores([arguments])
            assert_close(found, expected, rtol=1e-4, atol=1e-4)
            if sync_every == 0:
                trainer.reference.before_step()
        _, _, metrics = tiny.loss_and_gradients(trainer, batch)
        assert metrics["humanline/unclamped"][0] < 0.5
        if sync_every:
            trainer.reference.before_step()
            _, _, metrics = tiny.loss_and_gradients(trainer, batch)
            assert metrics["humanline/unclamped"] == [1]


def test_with_prompt_tuning_the_numbers_are_trl_s_too(folder):
    config = NOT_ZERO["prompt"](pytest.importorskip("peft"))
    bounds = {"log_eps_P": float("-inf"), "log_eps_R": float("inf")}
    runs = []
    for trainer in (
        build(folder, peft_config=config, sync_every=0, **bounds),
        tiny.build(DPOTrainer, DPOConfig, folder, tiny.pairs(), peft_config=config),
    ):
        torch.manual_seed(0)
        for p in trainer.model.parameters():
            if p.requires_grad:
                torch.nn.init.normal_(p.data)
        trainer.train()
        runs.append(tiny.history(trainer, ["humanline/unclamped"]))
    for row, expected in zip(*runs, strict=True):
        assert row == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_the_kinds_of_reference_agree_with_prompt_tuning(folder):
    config = NOT_ZERO["prompt"](pytest.importorskip("peft"))
    bounds = {"log_eps_P": -0.05, "log_eps_R": 0.05}

    def make(**options):
        torch.manual_seed(0)
        return build(folder, tiny.model(path=folder / "model"), peft_config=config, **options)

    tiny.check_kinds_agree(partial(make, sync_every=2, max_steps=4, **bounds))


@pytest.mark.parametrize("reference", ["adapter", "copy"])
@pytest.mark.parametrize("where", tiny.LORA)
def test_lora(folder, where, reference):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, **tiny.LORA[where])
    trainer = build(folder, peft_config=config, reference=reference, **CLIP)
    check_against_eager(trainer)


def test_lora_on_the_head_trains_and_resumes(folder, tmp_path):
    peft = pytest.importorskip("peft")

    def make(**options):
        config = peft.LoraConfig(r=4, **tiny.LORA["lm_head"])
        return build(folder, peft_config=config, **options, **CLIP)

    weights = tiny.check_resuming(make, tmp_path, at=2)
    (head,) = [w for name, w in weights.items() if "lm_head.lora_B" in name]
    assert head.abs().max() > 0


@pytest.mark.parametrize("kind", ["llama", "tied"])
def test_the_kinds_of_reference_agree_with_lora_on_the_head(folder, kind):
    """Tied to the embeddings or not: the adapter is the head's alone."""
    peft = pytest.importorskip("peft")

    def make(**options):
        config = peft.LoraConfig(r=4, **tiny.LORA["lm_head"])
        return build(folder, tiny.model(kind), peft_config=config, max_steps=3, **options, **CLIP)

    check_against_eager(make())
    tiny.check_kinds_agree(make)


def test_a_peft_model_of_the_caller_s_with_a_trained_adapter(folder):
    """TRL adds a second adapter, "ref", which humanline leaves alone."""
    peft = pytest.importorskip("peft")
    policy = tiny.model(path=folder / "model")
    policy = peft.get_peft_model(policy, peft.LoraConfig(r=4, **tiny.LORA["lm_head"]))
    tiny.disturb(policy, seed=5)
    trainer = build(folder, policy, **CLIP)
    assert not any(".ref." in name for name in trainer.reference.snapshot)
    check_against_eager(trainer)
