"""The study on sampling rarely, with a tiny model: its parts, its arms, its rules, its report."""

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bench.study import blocks, freshness, freshness_report, judge
from bench.study import freshness_arms as arms
from bench.study import freshness_world as worlds
from bench.study.analyse import interval
from bench.study.run import recipe

END, BEGINNING = 2, 3


@pytest.fixture(scope="module")
def config():
    """The committed rules with little to do."""
    return with_little_to_do(arms.config_of("freshness"))


@pytest.fixture(scope="module")
def judged():
    """With a judge who hardly errs."""
    found = with_little_to_do(arms.config_of("judged"))
    return found | {"task": found["task"] | {"slope": 20.0}}


def with_little_to_do(found):
    found["task"] |= {"blocks": 2, "tokens": 3, "at_once": 3, "samples": 6}
    found["training"] |= {"steps": 4, "prompts": 8, "evaluate_every": 2, "warmup": 1}
    return found | {"sample_every": [1, 2, 0], "sync_every": [*found["sync_every"][:1], 2]}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    options = LlamaConfig(
        vocab_size=4,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(options).eval()


@pytest.fixture(scope="module")
def prompts(config):
    count = config["training"]["steps"] * config["training"]["prompts"]
    tokens = torch.randint(4, (count, 5), generator=torch.Generator().manual_seed(0))
    return torch.cat([torch.tensor([[3, 0, 1]]).expand(count, BEGINNING), tokens], 1)


@pytest.fixture
def taken_apart(model, config, prompts):
    return blocks.split(copy.deepcopy(model), config["task"]["blocks"], prompts[0, :BEGINNING])


@pytest.fixture
def world(taken_apart, config, prompts):
    """The right answer is a token and the end: an untrained model finds it often enough."""
    frozen, policy = taken_apart
    after, draws = prompts[:, BEGINNING:], torch.Generator().manual_seed(1)
    read = worlds.read_prompts(frozen, after, config)
    pool = worlds.draw(frozen, policy, read, slice(0, len(after)), config, END, draws)
    answers = torch.tensor([[3, END]]).expand(len(after), 2)
    first, right = frozen.read_prompts(after[:6]), answers[:6, None]
    measured = blocks.known(frozen, first, right, torch.ones_like(right, dtype=torch.bool))
    asked = worlds.read_prompts(frozen, after[:6], config)
    wrong = judge.wrong_digits(worlds.answer(frozen, policy, asked, config, END), answers[:6])
    return worlds.World(after, answers, pool, measured, wrong, draws.get_state())


def made_of(world, frozen, config):
    read = worlds.read_prompts(frozen, world.prompts, config)
    asked = worlds.read_prompts(frozen, world.prompts[:6], config)
    return worlds.Run(config, world, frozen, read, asked, END)


def test_the_parts_are_the_model(model, taken_apart, prompts):
    """Frozen part, common beginning and prompts read apart give the whole model's log-probs."""
    frozen, policy = taken_apart
    read = frozen.read_prompts(prompts[:5, BEGINNING:])
    texts = blocks.sample(frozen, policy, read, 3, 4, END, torch.Generator().manual_seed(2))
    ids = torch.cat([prompts[:5].repeat_interleave(3, 0), texts.ids.flatten(0, 1)], 1)
    with torch.no_grad():
        scores = model(ids).logits[:, prompts.shape[1] - 1 : -1].log_softmax(-1)
    expected = scores.gather(2, texts.ids.flatten(0, 1)[:, :, None])[:, :, 0]
    mask = texts.mask.flatten(0, 1)
    torch.testing.assert_close(policy.logps(texts)[mask], expected[mask], atol=1e-5, rtol=0)
    torch.testing.assert_close(texts.logps.flatten(0, 1)[mask], expected[mask], atol=1e-5, rtol=0)
    ended = texts.ids == END
    assert ended.any() and not ended.all(2).any()
    assert (texts.mask.sum(2) == torch.where(ended.any(2), ended.int().argmax(2) + 1, 4)).all()


def test_a_right_answer_is_the_number_and_nothing_else(world):
    texts, answers = world.pool, world.answers
    for p, g in ((p, g) for p in range(len(answers)) for g in range(texts.ids.shape[1])):
        written = texts.ids[p, g][texts.mask[p, g]].tolist()
        assert freshness.right(texts, answers)[p, g] == (written == answers[p].tolist())
    assert 0 < freshness.right(texts, answers).mean() < 1


def run(arm, world, taken_apart, config, lr=1e-3):
    bound = 0.01 if arm.method in arms.WITHIN else None
    frozen, policy = copy.deepcopy(taken_apart)
    return freshness.train(arm, made_of(world, frozen, config), policy, 0, lr, bound)


def test_every_arm_runs_and_the_same_again(world, taken_apart, config):
    for objective in config["objectives"]:
        for arm in arms.grid(config, objective):
            one, again = (run(arm, world, taken_apart, config) for _ in range(2))
            assert one["pass@1"] == again["pass@1"] and len(one["pass@1"]) == 3
            assert one["pass@1"][0] < one["pass@1"][-1]
            assert (one["tokens_sampled"] > 0) == (arm.every != 0)
            assert ("drift" in one) == (arm.method != arms.PLAIN or objective == "DPO")


def test_only_the_age_of_completions_differs(world, taken_apart, config):
    """At a rate of nearly 0 the policy stays as it is: all intervals see the same prompts, and as
    many completions, and those of the first steps are the pool's."""
    seen = {}
    for every in config["sample_every"]:
        arm = arms.Arm("GRPO", every, arms.PLAIN, 0)
        cost = {"sampling_seconds": 0.0, "tokens_sampled": 0}
        frozen, policy = taken_apart
        steps = list(freshness.steps(arm, made_of(world, frozen, config), policy, cost))
        assert len(steps) == config["training"]["steps"]
        assert torch.equal(torch.cat([texts.prompts for texts, *_ in steps]), world.pool.prompts)
        seen[every] = steps
        fresh = (every or len(steps)) * config["training"]["prompts"]
        drawn = torch.cat([texts.ids for texts, *_ in steps])
        assert torch.equal(drawn[:fresh], world.pool.ids[:fresh])
        assert every == 0 or not torch.equal(drawn[fresh:], world.pool.ids[fresh:])


def test_pairs_are_a_right_and_a_wrong_completion_of_one_prompt(world):
    arm = arms.Arm("DPO", 0, arms.PLAIN, 0)
    rewards = freshness.right(world.pool, world.answers)
    draws = torch.Generator().manual_seed(0)
    batch = freshness.make_batch(arm, world.pool, rewards, None, None, draws)
    of = rewards[(rewards.any(1) & ~rewards.all(1))].flatten()[batch.rows]
    chosen, rejected = batch.rows.chunk(2)
    assert of.tolist() == [1.0] * len(chosen) + [0.0] * len(rejected)
    each = rewards.shape[1]
    assert torch.equal(chosen // each, rejected // each)
    nothing = torch.ones_like(rewards)
    assert freshness.make_batch(arm, world.pool, nothing, None, None, draws) is None


def test_the_judge_prefers_fewer_wrong_digits_and_errs(world):
    texts, answers = world.pool, world.answers
    wrong = judge.wrong_digits(texts, answers)
    for p, g in ((p, g) for p in range(len(answers)) for g in range(texts.ids.shape[1])):
        written = [*texts.ids[p, g][texts.mask[p, g]].tolist(), None, None]
        places = zip(written, answers[p].tolist(), strict=False)
        assert wrong[p, g] == sum(mine != right for mine, right in places)
    many = torch.tensor([[0, 0, 3, 3]]).expand(4000, 4)
    chosen, rejected = judge.pairs(many, 1.0, torch.Generator().manual_seed(0))
    assert (chosen != rejected).all()
    ours, theirs = (many.gather(1, x[:, None])[:, 0] for x in (chosen, rejected))
    better = (ours[ours != theirs] == 0).double().mean()
    assert better == pytest.approx(0.953, abs=0.02)  # σ(3)
    assert judge.win_rate(many[:1], many[:1], 1.0) == 0.5
    none, three = torch.zeros(2, 1), torch.full((2, 3), 3.0)
    assert judge.win_rate(none, three, 1.0) == pytest.approx(0.953, abs=0.001)


def test_kto_takes_the_pair_and_reads_each_completion_after_another_prompt(
    world, taken_apart, judged
):
    frozen, _ = taken_apart
    whole = made_of(world, frozen, judged)
    arm, span = arms.Arm("KTO", 0, arms.PLAIN, 0), slice(0, 3)
    texts, draws = world.pool[span], torch.Generator().manual_seed(0)
    rewards = -judge.wrong_digits(texts, world.answers[span]).float()

    def others():
        return freshness.mismatched(whole, texts, span)

    batch = freshness.make_batch(arm, texts, rewards, 1.0, others, draws)
    assert batch.arguments["desirable"].tolist() == [True] * 3 + [False] * 3
    assert batch.mismatched == batch.own == 6 == len(batch.rows) - 6
    ids, prompts = batch.texts.ids, batch.texts.prompts
    assert torch.equal(ids[3:], ids[:3].roll(1, 0)) and torch.equal(prompts[3:], prompts[:3])
    again = blocks.known(frozen, next(worlds.some(whole.read, span, 3)), texts.ids, texts.mask)
    torch.testing.assert_close(again.completions, texts.completions)  # read after their own


def test_every_judged_arm_runs_and_learns(world, taken_apart, judged):
    for objective in judged["objectives"]:
        for arm in arms.grid(judged, objective):
            one, again = (run(arm, world, taken_apart, judged) for _ in range(2))
            assert one["win rate"] == again["win rate"] and one["win rate"][0] == pytest.approx(0.5)
            assert one["pass@1"][0] < one["pass@1"][-1]


def test_a_run_that_diverges_counts_as_right_on_no_question(world, taken_apart, config):
    frozen, policy = taken_apart
    with torch.no_grad():
        policy.weight.fill_(float("nan"))
    arm, whole = arms.Arm("GRPO", 0, arms.PLAIN, 0), made_of(world, frozen, config)
    broken = freshness.train(arm, whole, policy, 0, 1e-3, None)
    assert broken["pass@1"][-1] == 0


# Rules


def line(run, config, score):
    arm, seed, lr, bound = run
    found = {"arm": str(arm), "seed": seed, "lr": lr, "bound": bound, "recipe": recipe(config)}
    found |= {"pass@1": [0.2, score], "greedy": [0.2, score], "unclamped": 0.9}
    found["drift"] = {"drift_quantile": 1000 * lr, "narrow_quantile": 100 * lr}
    found |= {"device": "a CPU", "torch": "2.13.0", "tokens_sampled": 7, "sampling_seconds": 7.0}
    return found | {"training_seconds": 1.0, "trained_on": 16}


def finished(config, objective, score):
    """All lines, as the loop would find them."""
    lines, rounds = [], 0
    while True:
        done = arms.Done(lines, config)
        missing = done.missing(arms.wanted(done, objective))
        if not missing:
            return done, rounds
        lines += [line(run, config, score(*run)) for run in missing]
        rounds += 1
        assert rounds < 20


@pytest.fixture
def rules():
    return arms.config_of("freshness")


def best_at(lr):
    return lambda arm, seed, tried, bound: 0.5 - abs(tried - lr)


def test_the_list_of_rates_is_lengthened_where_the_best_lies(rules):
    lrs = rules["tuning"]["lrs"]
    arm = arms.grid(rules, "GRPO")[0]
    inner, _ = finished(rules, "GRPO", best_at(lrs[1]))
    assert list(inner.tried(arm)[0]) == lrs and inner.rate(arm) == lrs[1]
    above, _ = finished(rules, "GRPO", best_at(2 * lrs[-1]))
    assert list(above.tried(arm)[0]) == [*lrs, 2 * lrs[-1], 4 * lrs[-1]]
    assert above.rate(arm) == 2 * lrs[-1]
    far, _ = finished(rules, "GRPO", best_at(100 * lrs[-1]))
    assert far.rate(arm) == 4 * lrs[-1]  # lengthened twice, and no further


def test_what_the_main_contrasts_need_is_run_first(rules):
    first, narrow, late = arms.stages(rules, "GRPO")
    assert sorted(map(str, first + narrow + late)) == sorted(map(str, arms.grid(rules, "GRPO")))
    named = {name for contrast in rules["analysis"]["contrasts"] for name in contrast[:2]}
    assert {f"GRPO {name}" for name in named} <= set(map(str, first))
    begun = {run[0] for run in arms.wanted(arms.Done([], rules), "GRPO")}
    assert begun <= {*first, *(arm.twin for arm in first)}


def test_bounds_are_the_twins_drift_and_all_runs_get_done(rules):
    done, _ = finished(rules, "GRPO", best_at(rules["tuning"]["lrs"][1]))
    runs = freshness_report.Runs("freshness", done)
    grid = arms.grid(rules, "GRPO")
    assert len(grid) == 19
    for arm in grid:
        assert set(runs.of[arm]) == set(rules["seeds"])
        for found in runs.of[arm].values():
            factor = {arms.HUMANLINE: 1000, arms.NARROW: 100}.get(arm.method)
            assert found["bound"] == (factor and round(factor * found["lr"], 5))


def test_the_report_says_what_is_missing(rules):
    done, _ = finished(rules, "GRPO", best_at(rules["tuning"]["lrs"][1]))
    text = freshness_report.report(freshness_report.Runs("freshness", done))
    assert "**Unfinished: 95 of 190 final runs are done." in text
    assert text.count("Not run yet.") == 1  # DPO
    difference = "| every 64, humanline k=1 − every 1, plain | 5 | +0.000 ± 0.000 | **shown** |"
    assert difference in text
    some = {name: found for name, found in done.items() if name[1] != rules["seeds"][-1]}
    partly = freshness_report.report(
        freshness_report.Runs("freshness", arms.Done(list(some.values()), rules))
    )
    assert "| 4 | +0.000 ± 0.000 | seeds are missing |" in partly
    assert "**shown**" not in partly


@pytest.mark.parametrize("name", arms.RULES)
def test_the_committed_report_is_that_of_the_committed_runs(name):
    runs = freshness_report.read(name)
    written = (freshness_report.HERE / f"{name.upper()}.md").read_text(encoding="utf-8")
    assert freshness_report.report(runs) == written, "run: python -m bench.study.freshness_report"
    figure = freshness_report.HERE / f"{name}.png"
    assert not runs.counted[0] or freshness_report.digest(runs).encode() in figure.read_bytes()


def short(value):
    return f"{value:.3f}".replace("0.", ".", 1)


def test_the_readme_says_of_grpo_what_its_runs_say():
    runs = freshness_report.read("freshness")
    page = (freshness_report.HERE / "README.md").read_text(encoding="utf-8")
    text = page.split("### Sampling rarely")[1].split("\n#")[0]

    def values(name):
        found = runs.values(freshness_report.arm_of(runs.config, "GRPO", name), runs.measure)
        assert set(found) == set(runs.config["seeds"])
        return [found[seed] for seed in runs.config["seeds"]]

    def said(one, other=None):
        of = values(one)
        if other is not None:
            of = [a - b for a, b in zip(values(other), of, strict=True)]
        mean, half = interval(of)
        return f"{short(mean)} ± {short(half)}"

    fresh = "every 1, plain"

    def means(every):
        methods = ("plain", "humanline k=1", "sync only k=1")
        return [short(interval(values(f"{every}, {method}"))[0]) for method in methods]

    assert "({} and {}; the sync alone {})".format(*means("every 8")) in text
    assert ": {} plain, {} humanline, {} the sync alone".format(*means("every 64")) in text
    assert f"costs plain GRPO {said('every 8, plain', fresh)} and " in text
    assert f"humanline {said('every 8, humanline k=1', fresh)} (" in text
    assert f"{said('every 64, humanline k=1', fresh)} below fresh samples" in text
    assert f"{said('every 64, humanline k=1', 'every 64, plain')} below plain GRPO" in text
    assert f"plain GRPO ends at {said('once, plain')}, " in text
    assert f"humanline at {said('once, humanline k=1')}:" in text
    assert f"every step ({short(interval(values(fresh))[0])})" in text
    [before] = {c[0] for c in runs.curves(freshness_report.arm_of(runs.config, "GRPO", fresh))}
    assert f"before: {short(before)})" in text
    for forgets in ("once, humanline k=1", "once, sync only k=1"):
        assert min(values(forgets)) < before


def test_the_readme_says_how_grpo_s_rates_were_found():
    runs = freshness_report.read("freshness")
    page = (freshness_report.HERE / "README.md").read_text(encoding="utf-8")
    rare = [
        freshness_report.arm_of(runs.config, "GRPO", f"every 64, {method}")
        for method in ("humanline k=1", "plain")
    ]
    best = [max(runs.done.tried(arm)[0].values()) for arm in rare]
    assert f"({short(best[0])}, {short(best[1])})" in page
    twice = runs.done.tried(rare[0])[0][2 * runs.done.rate(rare[0])]
    assert twice < 0.01, "the run at twice the rate collapses"
