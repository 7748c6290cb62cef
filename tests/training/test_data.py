"""Every column layout; and for every bad file, what is wrong and where."""

import json

import pytest
import torch
from toy import assistant, make_model_folder, write_jsonl

from humanline.training import data, examples
from humanline.training.config import TrainConfig
from humanline.training.errors import UserError
from humanline.training.model import load_tokenizer


def chat(text):
    return [{"role": "user", "content": text}]


PAIRS = {"prompt": chat("1 + 2 ="), "chosen": assistant("3"), "rejected": assistant("4")}
LABEL = {"prompt": chat("1 + 2 ="), "completion": assistant("3"), "label": True}
GROUP = {
    "prompt": chat("1 + 2 ="),
    "completions": [assistant("3"), assistant("4"), assistant("5")],
    "rewards": [1.0, 0.0, 0.5],
}
REWARD = {"prompt": chat("1 + 2 ="), "completion": assistant("3"), "reward": 0.5}
WHOLE = {"chosen": chat("1 + 2 =") + assistant("3"), "rejected": chat("1 + 2 =") + assistant("4")}
STRINGS = {"prompt": "1 + 2 =", "chosen": " 3", "rejected": " 4"}


@pytest.fixture(scope="module")
def tokenizer(model_folder):
    return load_tokenizer(model_folder)


def dataset(tmp_path, *rows):
    return data.read_examples(write_jsonl(tmp_path / "d.jsonl", rows))


def texts(chosen):
    example, index = chosen
    completion = example.completions[index]
    return completion if isinstance(completion, str) else completion[0]["content"]


# Layouts


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize(
    "row, kind, rewards",
    [
        (PAIRS, "pairs", (1.0, 0.0)),
        (WHOLE, "pairs", (1.0, 0.0)),
        (STRINGS, "pairs", (1.0, 0.0)),
        (LABEL, "labels", (1.0,)),
        (GROUP, "rewards", (1.0, 0.0, 0.5)),
        (REWARD, "rewards", (0.5,)),
    ],
)
def test_every_layout_is_read(row, kind, rewards, suffix, tmp_path):
    path = tmp_path / f"data{suffix}"
    if suffix == ".jsonl":
        write_jsonl(path, [row, row])
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row, row]), path)
    read = data.read_examples(path)
    assert read.kind == kind and len(read.examples) == 2
    example = read.examples[1]
    assert example.rewards == rewards
    assert example.prompt == row.get("prompt", chat("1 + 2 ="))
    assert example.where.endswith("line 2" if suffix == ".jsonl" else "row 2")


def test_pairs_from_rewards_set_best_against_worst(tmp_path):
    group = GROUP | {
        "completions": [assistant(c) for c in "abcde"],
        "rewards": [0.1, 0.9, 0.5, 0.5, 0.2],
    }
    equal = GROUP | {"rewards": [1.0, 1.0, 1.0]}
    found = examples.pairs(dataset(tmp_path, group, equal))
    assert [(texts(w), texts(l)) for w, l in found] == [("b", "a"), ("c", "e")]


def test_pairs_from_labels_need_one_prompt_with_both(tmp_path):
    rows = [
        LABEL,
        LABEL | {"completion": assistant("4"), "label": False},
        LABEL | {"prompt": chat("2 + 2 ="), "completion": assistant("4")},
    ]
    found = examples.pairs(dataset(tmp_path, *rows))
    assert [(texts(w), texts(l)) for w, l in found] == [("3", "4")]


def test_pairs_of_one_prompt_are_not_mixed(tmp_path):
    other = PAIRS | {"chosen": assistant("5"), "rejected": assistant("6")}
    found = examples.pairs(dataset(tmp_path, PAIRS, other))
    assert [(texts(w), texts(l)) for w, l in found] == [("3", "4"), ("5", "6")]


def test_labels(tmp_path):
    assert [v for _, v in examples.labelled(dataset(tmp_path, PAIRS), None)] == [True, False]
    assert [v for _, v in examples.labelled(dataset(tmp_path, LABEL), None)] == [True]
    above_mean = examples.labelled(dataset(tmp_path, GROUP), None)
    assert [v for _, v in above_mean] == [True, False, False]  # 0.5 is the mean, not above it
    above_threshold = examples.labelled(dataset(tmp_path, GROUP), 0.4)
    assert [v for _, v in above_threshold] == [True, False, True]


def test_advantages_are_trls(tmp_path):
    equal = GROUP | {"rewards": [1.0, 1.0, 1.0]}
    (group,) = examples.advantages(dataset(tmp_path, GROUP, equal))
    rewards = torch.tensor([1.0, 0.0, 0.5], dtype=torch.float64)
    expected = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
    assert [a for _, a in group] == pytest.approx(expected.tolist())
    (group,) = examples.advantages(dataset(tmp_path, PAIRS))
    assert [a for _, a in group] == pytest.approx([0.7071, -0.7071], abs=1e-3)
    rows = [REWARD, REWARD | {"reward": 1.0}]
    assert len(examples.advantages(dataset(tmp_path, *rows))[0]) == 2


@pytest.mark.parametrize(
    "objective, row", [("dpo", LABEL), ("kto", REWARD), ("grpo", LABEL), ("grpo", REWARD)]
)
def test_data_an_objective_cannot_learn_from(objective, row, tokenizer, tmp_path):
    config = TrainConfig(objective=objective)
    with pytest.raises(UserError, match=f"1 examples .* hold nothing {objective} can learn from"):
        examples.make_units(dataset(tmp_path, row), tokenizer, config)


# Tokenizing


def test_chats_end_with_the_eos_token_and_hold_no_more(tokenizer, tmp_path):
    (pair,) = examples.pairs(dataset(tmp_path, PAIRS))
    chosen, _ = tokenizer.sequences(list(pair))
    hf = tokenizer.tokenizer
    assert hf.decode(chosen.prompt) == "<s> user 1 + 2 = </s> <s> assistant"
    assert hf.decode(chosen.completion) == "3 </s>"


def test_strings_get_the_eos_token(tokenizer, tmp_path):
    already = STRINGS | {"chosen": " 3 </s>"}
    rows = [STRINGS | {"chosen": " 3 "}, already]
    for pair in examples.pairs(dataset(tmp_path, *rows)):
        tokens = tokenizer.sequences([pair[0]])[0]
        assert tokenizer.tokenizer.decode(tokens.completion) == "3 </s>"


def test_a_token_across_the_border_is_split(model_folder, tmp_path):
    """Where "ab" is one token, the prompt "a" still ends with "a"."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocab = {"a": 0, "b": 1, "ab": 2, "</s>": 3}
    bpe = Tokenizer(models.BPE(vocab=vocab, merges=[("a", "b")]))
    hf = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="</s>")
    row = {"prompt": "a", "chosen": "b", "rejected": "a"}
    (pair,) = examples.pairs(dataset(tmp_path, row))
    tokens = examples.Tokenizer(hf, model_folder).sequences([pair[0]])[0]
    assert (tokens.prompt, tokens.completion) == ([0], [1, 3])


def test_prompts_are_padded_left_and_mismatched_pairs_are_shifted():
    units = [
        examples.Unit((examples.Tokens([1, 2], [3, 4]),), True),
        examples.Unit((examples.Tokens([5], [6]),), False),
    ]
    batch = examples.collate(units, "kto", pad=9)
    assert batch.prompt_ids.tolist() == [[1, 2], [9, 5]]
    assert batch.prompt_mask.tolist() == [[True, True], [False, True]]
    own, other = batch.completions, batch.mismatched
    assert own.labels.tolist() == [[3, 4], [6, -100]]
    assert own.ids.tolist() == [[3, 4], [6, 9]] and own.prompt.tolist() == [0, 1]
    assert other.labels.tolist() == [[6, -100], [3, 4]] and other.prompt.tolist() == [0, 1]
    assert batch.extra["desirable"].tolist() == [True, False]
    assert batch.tokens() == 3 + 3 + 3


def unit(prompt, completion):
    return examples.Unit((examples.Tokens([prompt], [completion]),), True)


@pytest.mark.parametrize(
    "batch, others, expected",
    [
        ([(1, 7), (1, 8), (2, 9)], [], [(0, 9), (0, 9), (1, 7)]),
        ([(1, 7), (2, 7), (3, 8)], [], [(0, 8), (1, 8), (2, 7)]),  # its own text, of another
        ([(1, 7), (1, 8)], [(1, 9), (2, 8), (2, 5), (3, 6)], [(0, 5), (0, 5)]),
        ([(1, 7), (2, 7), (2, 8)], [(2, 5)], [(0, 8)]),  # what has none is left out
    ],
)
def test_a_mismatched_pair_never_matches(batch, others, expected):
    batch, others = ([unit(*u) for u in units] for units in (batch, others))
    found = examples.collate(batch, "kto", 0, iter(others)).mismatched
    assert list(zip(found.prompt.tolist(), found.ids[:, 0].tolist(), strict=True)) == expected


def test_without_a_mismatched_pair_the_reference_point_is_the_least_there_is():
    batch = examples.collate([unit(1, 7), unit(1, 8)], "kto", 0, iter([unit(2, 7)]))
    assert batch.mismatched is None and batch.extra["z0"] == 0.0


def test_a_batch_of_one_prompt_looks_for_mismatched_pairs_in_the_data():
    groups = [[unit(i // 4, i)] for i in range(12)]  # 4 completions of each prompt
    config = TrainConfig(objective="kto", per_device_train_batch_size=2, max_steps=12)
    for (batch,) in examples.optimizer_steps(groups, config, 0):
        prompts = batch.prompt_ids[batch.mismatched.prompt, 0]
        assert len(prompts) == 2 and not (prompts == batch.mismatched.ids[:, 0] // 4).any()


def test_data_without_any_mismatched_pair_are_warned_of(tokenizer, tmp_path):
    rows = [REWARD | {"completion": assistant(c), "reward": float(c)} for c in "012"]
    config = TrainConfig(objective="kto")
    _, warnings = examples.make_units(dataset(tmp_path, *rows), tokenizer, config)
    assert any(w.startswith("3 of 3 completions have no mismatched pair for KTO") for w in warnings)
    other = REWARD | {"prompt": chat("5"), "completion": assistant("1")}
    more = [other, other | {"completion": assistant("9"), "reward": 0.9}]
    _, warnings = examples.make_units(dataset(tmp_path, *rows, *more), tokenizer, config)
    assert not any("mismatched" in w for w in warnings)
    config = TrainConfig(objective="kto", loss_type="apo_zero_unpaired")  # has no reference point
    _, warnings = examples.make_units(dataset(tmp_path, *rows), tokenizer, config)
    assert not any("mismatched" in w for w in warnings)


def test_turns_of_others_in_a_completion_are_not_trained_on(tokenizer, tmp_path):
    tool = {"role": "user", "content": "7 8"}
    row = PAIRS | {"chosen": [*assistant("3"), tool, *assistant("5 6")]}
    (pair,) = examples.pairs(dataset(tmp_path, row))
    batch = examples.make_batch(tokenizer.sequences(list(pair)), tokenizer.tokenizer.pad_token_id)
    decode = tokenizer.tokenizer.decode
    chosen, rejected = batch.completions.labels
    assert decode(chosen[chosen != -100]) == "3 </s> 5 6 </s>"
    assert decode(rejected[rejected != -100]) == "4 </s>"
    whole = batch.completions.ids[0]
    assert decode(whole) == "3 </s> <s> user 7 8 </s> <s> assistant 5 6 </s>"


def test_tool_calls_come_without_content_and_with_their_tools(tmp_path):
    template = (
        "{% for t in tools or [] %}{{ t['name'] }} {% endfor %}{% for m in messages %}"
        "<s> {{ m['role'] }} {{ m['content'] or '' }}"
        "{% for c in m['tool_calls'] or [] %} {{ c['function']['name'] }} {% endfor %} </s> "
        "{% endfor %}{% if add_generation_prompt %}<s> assistant {% endif %}"
    )
    tokenizer = load_tokenizer(make_model_folder(tmp_path, chat_template=template))
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "a"}}]}
    completion = [call, {"role": "user", "content": "7"}, *assistant("3")]
    for tools in ([{"name": "b"}], json.dumps([{"name": "b"}])):
        read = dataset(tmp_path, LABEL | {"completion": completion, "tools": tools})
        (tokens,) = tokenizer.sequences([(read.examples[0], 0)])
        assert tokenizer.tokenizer.decode(tokens.prompt) == "b <s> user 1 + 2 = </s> <s> assistant"
        own = [t for t, w in zip(tokens.completion, tokens.written, strict=True) if w]
        assert tokenizer.tokenizer.decode(own) == "a </s> 3 </s>"
    for tools, expected in (("b", "line 1: tools is not JSON"), (3, "tools must be a list")):
        with pytest.raises(UserError, match=expected):
            dataset(tmp_path, LABEL | {"tools": tools})


def test_eos_is_where_it_belongs_whatever_the_tokenizer_appends(model_folder, tmp_path):
    from tokenizers.processors import TemplateProcessing

    tokenizer = load_tokenizer(model_folder)
    tokenizer.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    (pair,) = examples.pairs(dataset(tmp_path, STRINGS))
    (tokens,) = tokenizer.sequences([pair[0]])
    decode = tokenizer.tokenizer.decode
    assert (decode(tokens.prompt), decode(tokens.completion)) == ("<s> 1 + 2 =", "3 </s>")
    assert tokenizer.prompt("1 + 2 =", "here") == tokens.prompt


def test_pairs_are_collated_chosen_first_and_share_their_prompt():
    units = [
        examples.Unit((examples.Tokens([1], [2]), examples.Tokens([1], [3]))),
        examples.Unit((examples.Tokens([4], [5]), examples.Tokens([4], [6]))),
    ]
    batch = examples.collate(units, "dpo", 0)
    assert batch.prompt_ids.tolist() == [[1], [4]]
    assert batch.completions.ids.tolist() == [[2], [5], [3], [6]]
    assert batch.completions.prompt.tolist() == [0, 1, 0, 1]


# Order


def test_the_order_depends_on_seed_and_step_alone_and_covers_every_epoch():
    groups = [[examples.Unit((examples.Tokens([i], [i]),), 1.0)] for i in range(10)]

    def order(first=0, **options):
        options = {"per_device_train_batch_size": 2, "max_steps": 10} | options
        config = TrainConfig(objective="grpo", **options)
        steps = examples.optimizer_steps(groups, config, 0, first)
        return [[b.completions.ids[:, 0].tolist() for b in batches] for batches in steps]

    whole = order()
    assert order(first=4) == whole[4:]
    assert order(max_steps=20)[:10] == whole and order(seed=1) != whole
    flat = [i for batches in whole for batch in batches for i in batch]
    assert sorted(flat[:10]) == sorted(flat[10:]) == list(range(10)) and flat[:10] != flat[10:]
    accumulated = order(gradient_accumulation_steps=5, max_steps=2)
    assert [b for batches in accumulated for b in batches] == [b for (b,) in whole]


def test_holding_out_keeps_prompts_apart(tmp_path):
    rows = [PAIRS | {"prompt": chat(f"{i % 10} + 1 =")} for i in range(40)]
    kept, held = examples.split(dataset(tmp_path, *rows), 0.3, seed=0)
    assert len(kept.examples) == 28 and len(held.examples) == 12
    prompts = [{json.dumps(e.prompt) for e in part.examples} for part in (kept, held)]
    assert not prompts[0] & prompts[1]


# Bad files


@pytest.mark.parametrize(
    "row, expected",
    [
        ({"prompt": "a", "answer": "b"}, "columns found: prompt, answer; wanted one of: prompt, "),
        (PAIRS | {"chosen": []}, "line 1: chosen is empty"),
        (PAIRS | {"chosen": assistant("")}, "line 1: chosen is empty"),
        (STRINGS | {"rejected": ""}, "line 1: rejected is empty"),
        (PAIRS | {"prompt": 3}, "line 1: prompt must be a string or a list of messages, got 3"),
        (PAIRS | {"prompt": [{"role": "user"}]}, "line 1: prompt must hold messages such as"),
        (PAIRS | {"chosen": "3"}, "line 1: prompt and chosen must both be strings or both"),
        (LABEL | {"label": 2}, "line 1: label must be true or false, got 2"),
        (GROUP | {"rewards": [1.0]}, "line 1: 3 completions, but 1 rewards"),
        (GROUP | {"rewards": []}, "line 1: rewards must be a non-empty list"),
        (GROUP | {"completions": "3"}, "line 1: completions must be a non-empty list, got '3'"),
        (GROUP | {"completions": [[], [], []]}, r"line 1: completions\[0\] is empty"),
        (
            GROUP | {"rewards": [1, None, 0]},
            "line 1: a reward must be a finite number .*, got None",
        ),
        (REWARD | {"reward": float("nan")}, "line 1: a reward must be a finite number .*, got nan"),
        (WHOLE | {"chosen": "text"}, "line 1: without a prompt, chosen and rejected must be lists"),
        ([1], "line 1: starts a list; one JSON object per line is expected"),
        (REWARD | {"reward": 10**400}, "line 1: a reward must be a finite number .*, got 1000"),
        (REWARD | {"reward": 1e308}, "line 1: a reward must be a finite number .*, got 1e"),
        (STRINGS | {"chosen": "\ud800"}, "line 1: not text"),
    ],
)
def test_a_bad_row_is_named(row, expected, tmp_path):
    with pytest.raises(UserError, match=expected):
        dataset(tmp_path, row)


@pytest.mark.parametrize(
    "name, content, expected",
    [
        ("d.jsonl", b"", "is empty"),
        ("d.jsonl", b"\n\n", "is empty"),
        ("d.jsonl", json.dumps(LABEL).encode() + b'\n{"prompt": ', r"line 2: not JSON \("),
        ("d.jsonl", b'{"prompt": "\xff"}', "line 1: not UTF-8"),
        ("d.jsonl", b'{"a": ' * 100_000, "line 1: nested too deeply"),
        ("d.csv", b"", "unknown extension '.csv'; known: .jsonl, .parquet"),
        ("d.parquet", b"nonsense", "not a parquet file"),
    ],
)
def test_a_bad_file_is_named(name, content, expected, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name}.*{expected}"):
        data.read_examples(tmp_path / name)


@pytest.mark.parametrize(
    "row, reason",
    [
        (PAIRS | {"chosen": []}, "chosen is empty"),
        (PAIRS | {"prompt": None}, "prompt is null"),
        (STRINGS | {"rejected": ""}, "rejected is empty"),
        (
            GROUP | {"completions": [], "rewards": []},
            "completions must be a non-empty list, got []",
        ),
        (WHOLE | {"chosen": []}, "chosen is empty"),
    ],
)
def test_an_empty_row_is_skipped(row, reason, tmp_path):
    good = {k: v for k, v in (GROUP if "completions" in row else PAIRS).items()}
    if "prompt" not in row:
        good = WHOLE
    elif row["prompt"] == STRINGS["prompt"]:
        good = STRINGS
    read = dataset(tmp_path, good, row, good)
    assert len(read.examples) == 2
    assert read.skipped == {f"{tmp_path}/d.jsonl, line 2": reason}


def test_equal_chats_are_a_pair(tmp_path):
    (example,) = dataset(tmp_path, WHOLE | {"rejected": WHOLE["chosen"]}).examples
    assert example.completions == (assistant("3"), assistant("3"))


def test_a_later_row_without_a_column(tmp_path):
    expected = r"line 3: columns found: prompt, label; wanted: .*; missing: completion"
    with pytest.raises(UserError, match=expected):
        dataset(tmp_path, LABEL, LABEL, {"prompt": chat("1"), "label": True})


def test_an_absent_file(tmp_path):
    with pytest.raises(UserError, match=r"gone.jsonl does not exist"):
        data.read_examples(tmp_path / "gone.jsonl")


def test_held_out_questions(tmp_path):
    path = write_jsonl(tmp_path / "q.jsonl", [{"prompt": chat("1 + 2 ="), "answer": 3}])
    assert data.read_questions(path)[0].answer == "3"
    write_jsonl(path, [{"prompt": chat("1 + 2 =")}])
    with pytest.raises(UserError, match=r"line 1: columns found: prompt; .*missing: answer"):
        data.read_questions(path)
    write_jsonl(path, [{"prompt": chat("1 + 2 ="), "answer": None}])
    with pytest.raises(UserError, match="line 1: answer must be a number, got None"):
        data.read_questions(path)


def test_strings_and_chats_in_one_file(tmp_path):
    with pytest.raises(UserError, match="line 2: strings and lists of messages are mixed"):
        dataset(tmp_path, PAIRS, STRINGS)


def test_labels_may_be_0_and_1(tmp_path):
    read = dataset(tmp_path, LABEL | {"label": 0}, LABEL | {"label": 1})
    assert [e.rewards for e in read.examples] == [(0.0,), (1.0,)]


def test_a_byte_order_mark_is_skipped(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(LABEL).encode())
    assert len(data.read_examples(path).examples) == 1


@pytest.mark.parametrize("answer", ["Paris", "1,000", "nan", True])
def test_answers_that_are_no_numbers(answer, tmp_path):
    path = write_jsonl(tmp_path / "q.jsonl", [{"prompt": "1 + 2 =", "answer": answer}])
    with pytest.raises(UserError, match=r"q\.jsonl, line 1: answer must be a number, got"):
        data.read_questions(path)


def test_chats_need_a_chat_template(tmp_path):
    folder = make_model_folder(tmp_path, chat_template=None)
    tokenizer = load_tokenizer(folder)
    with pytest.raises(UserError, match=r"line 1: chat messages, but .* has no chat template"):
        examples.make_units(dataset(tmp_path, PAIRS), tokenizer, TrainConfig())
    examples.make_units(dataset(tmp_path, STRINGS), tokenizer, TrainConfig())


def test_a_chat_template_that_refuses(tmp_path):
    template = "{{ raise_exception('no system prompt, please') }}"
    tokenizer = load_tokenizer(make_model_folder(tmp_path, chat_template=template))
    with pytest.raises(UserError, match="line 1: the chat template refuses this: no system"):
        examples.make_units(dataset(tmp_path, PAIRS), tokenizer, TrainConfig())


def test_no_prompt_left(tokenizer, tmp_path):
    with pytest.raises(UserError, match=r"none of the 1 examples is left.*--max-length 3"):
        examples.make_units(dataset(tmp_path, PAIRS), tokenizer, TrainConfig(max_length=3))


def test_the_committed_set_is_well_formed():
    questions = data.read_questions(data.DEFAULT_HELDOUT)
    assert len(questions) >= 100
    if not data.DEFAULT_TRAIN.exists():
        pytest.skip("no training set yet")
    train = data.read_examples(data.DEFAULT_TRAIN)
    assert train.kind == "rewards"
    trained_on = {json.dumps(e.prompt) for e in train.examples}
    assert not any(json.dumps(q.prompt) in trained_on for q in questions)
