"""Which tokens are the assistant's: over several turns, whatever the template; strings whatever the
tokenizer puts around them."""

import re
from pathlib import Path

import pytest

from humanline.conversation import encode, render, render_prompt

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

PLAIN = (
    "{% for m in messages %}<s>{{ m['role'] }} {{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant {% endif %}"
)
MARKED = (
    "{% for m in messages %}<s>{{ m['role'] }} {% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}</s>{% endgeneration %}"
    "{% else %}{{ m['content'] }}</s>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant {% endif %}"
)
# As Phi has it: another token ends the conversation where nothing follows.
ENDS_TWICE = PLAIN.replace("</s>\n", "<end>\n").replace("{% endif %}", "{% else %}</s>{% endif %}")
# As Qwen 3 has it: thoughts before the last answer alone; as Gemma: the eos token is another.
THINKS = (
    "{% for m in messages %}<s>{{ m['role'] }} {% if m['role'] == 'assistant' and loop.last %}"
    "<think> </think>{% endif %}{{ m['content'].split('</think>')[-1] }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant {% endif %}"
)
# The end of a turn comes with what follows it.
ENDS_LATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}<s>{{ m['content'] }}<end>"
    "{% else %}{{ m['content'] }}{% if not loop.last %}</s>{% endif %}{% endif %}{% endfor %}"
)
TOOLS = (
    "{% if tools %}<s>{{ tools[0]['name'] }}</s>{% endif %}"
    "{% for m in messages %}<s>{{ m['role'] }} {{ m['content'] or '' }}"
    "{% for c in m['tool_calls'] or [] %}<call>{{ c['function']['name'] }}{% endfor %}</s>\n"
    "{% endfor %}{% if add_generation_prompt %}<s>assistant {% endif %}"
)


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


def byte_level(template=None, merges=()):
    """A tokenizer of bytes, and of pairs of them."""
    alphabet = [*tokenizers.pre_tokenizers.ByteLevel.alphabet(), *map("".join, merges)]
    vocab = {piece: i for i, piece in enumerate(sorted(alphabet))}
    model = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=list(merges)))
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=model,
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens=["<end>", "<call>"],
    )
    tokenizer.chat_template = template
    return tokenizer


def written(tokenizer, prompt, completion, **options):
    """What the assistant wrote, span by span, and all that follows the prompt."""
    (tokens,) = encode(tokenizer, [render(tokenizer, prompt, completion, **options)])
    mask = tokens.written or [True] * len(tokens.completion)
    spans, previous = [], False
    for token, own in zip(tokens.completion, mask, strict=True):
        if own:
            spans = spans if previous else [*spans, []]
            spans[-1].append(token)
        previous = own
    return [tokenizer.decode(s) for s in spans], tokenizer.decode(tokens.completion)


TURNS = [assistant("one"), user("more"), assistant("two"), user("again"), assistant("three")]


@pytest.mark.parametrize(
    "template, expected",
    [
        (PLAIN, ["one</s>", "two</s>", "three</s>"]),
        (MARKED, ["one</s>", "two</s>", "three</s>"]),
        (ENDS_TWICE, ["one<end>", "two<end>", "three<end>\n</s>"]),
        (THINKS, ["one<end>", "two<end>", "<think> </think>three<end>"]),
        (ENDS_LATE, ["one</s>", "two</s>", "three"]),
    ],
    ids=["plain", "marked", "ends twice", "thinks", "ends late"],
)
def test_every_turn_of_the_assistants_and_nothing_else(template, expected):
    spans, whole = written(byte_level(template), [user("hello")], TURNS)
    assert spans == expected
    assert "more" in whole and "again" in whole and whole.endswith(expected[-1])


def test_the_spans_are_those_the_template_marks():
    tokenizer = byte_level(MARKED)
    (tokens,) = encode(tokenizer, [render(tokenizer, [user("hello")], TURNS)])
    theirs = tokenizer.apply_chat_template(
        [user("hello"), *TURNS], return_dict=True, return_assistant_tokens_mask=True
    )
    assert theirs["input_ids"][:-1] == tokens.prompt + tokens.completion  # less the last "\n"
    mask = [bool(x) for x in theirs["assistant_masks"]]
    assert mask[len(tokens.prompt) : -1] == tokens.written and not any(mask[: len(tokens.prompt)])


def test_tool_results_are_read_and_not_written():
    call = assistant(None, tool_calls=[{"type": "function", "function": {"name": "add"}}])
    result = {"role": "tool", "content": "3"}
    spans, whole = written(byte_level(TOOLS), [user("1 + 2")], [call, result, assistant("three")])
    assert spans == ["<call>add</s>", "three</s>"] and "tool 3" in whole
    spans, whole = written(byte_level(TOOLS), [user("1 + 2"), call], [result, assistant("three")])
    assert spans == ["three</s>"] and whole.startswith("<s>tool 3")
    rendered = render(byte_level(TOOLS), [user("1")], [assistant("2")], tools=[{"name": "add"}])
    assert rendered.prompt.startswith("<s>add</s>")


def test_thoughts_that_history_drops():
    """The content is nowhere in the text: its turn ends at the eos token."""
    template = THINKS.replace("<end>", "</s>")
    completion = [assistant("<think>x</think>one"), user("more"), assistant("two")]
    spans, _ = written(byte_level(template), [user("hello")], completion)
    assert spans == ["one</s>", "<think> </think>two</s>"]


def test_what_follows_the_last_turn_is_left_out():
    spans, whole = written(byte_level(PLAIN), [user("hi")], [assistant("one"), user("thanks")])
    assert spans == [whole] == ["one</s>"]


def test_a_token_across_the_end_of_a_turn_is_not_the_assistants():
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer = byte_level(template, merges=[("a", "b")])
    spans, whole = written(tokenizer, [user("u")], [assistant("xa"), user("b"), assistant("y")])
    assert spans == ["x", "y"] and whole == "xaby"


@pytest.mark.parametrize(
    "template, completion, expected",
    [
        (None, [assistant("one")], "chat messages, but the tokenizer has no chat template"),
        (PLAIN, [user("one")], "no message of role 'assistant'.*its roles: user"),
        ("{{ raise_exception('no') }}", [assistant("one")], "the chat template refuses this: no"),
        (
            "{% if messages|length > 1 %}x{% endif %}" + PLAIN,
            [assistant("one")],
            "does not render the prompt as it does without",
        ),
        (
            "{% for m in messages %}{{ loop.length if loop.length > 1 else '' }}"
            "{{ m['content']|upper }}{% endfor %}",
            [assistant("one"), user("two"), assistant("three")],
            "does not render the prompt as it does without",
        ),
    ],
)
def test_chats_that_cannot_be_taken_apart(template, completion, expected):
    with pytest.raises(ValueError, match=expected):
        render(byte_level(template), [user("hello")], completion)


# Strings


POST_PROCESSORS = {
    "nothing": None,
    "bos": "<s> $A",
    "eos": "$A </s>",
    "both": "<s> $A </s>",
}


@pytest.fixture(params=POST_PROCESSORS)
def words(request):
    """A tokenizer of words, and what it puts before a text."""
    pieces = ["<unk>", "<s>", "</s>", "w1", "w2", "w3", "w4"]
    vocab = {w: i for i, w in enumerate(pieces)}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<unk>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    form = POST_PROCESSORS[request.param]
    if form:
        model.post_processor = tokenizers.processors.TemplateProcessing(
            single=form, special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    return tokenizer, [1] if form and form.startswith("<s>") else []


@pytest.mark.parametrize("prompt", ["w1 w2", "w1 w2 "])
@pytest.mark.parametrize("completion", ["w3 w4", " w3 w4", " w3 w4 </s>"])
def test_strings_whatever_the_tokenizer_puts_around_them(words, prompt, completion):
    tokenizer, bos = words
    (tokens,) = encode(tokenizer, [render(tokenizer, prompt + " ", completion)])
    assert tokens.prompt == [*bos, 3, 4] and tokens.completion == [5, 6, 2]
    (alone,) = encode(tokenizer, [render_prompt(tokenizer, prompt)])
    assert alone.prompt == tokens.prompt and alone.completion == []


def test_a_prompt_that_brings_its_bos_has_it_once(words):
    tokenizer, _ = words
    (tokens,) = encode(tokenizer, [render(tokenizer, "<s> w1", " w3")])
    assert tokens.prompt == [1, 3] and tokens.completion == [5, 2]


def test_a_template_writes_the_special_tokens_itself(words):
    tokenizer, _ = words
    tokenizer.chat_template = (
        "{% for m in messages %}<s> {{ m['content'] }} </s> {% endfor %}"
        "{% if add_generation_prompt %}<s> {% endif %}"
    )
    (tokens,) = encode(tokenizer, [render(tokenizer, [user("w1")], [assistant("w3")])])
    assert tokens.prompt == [1, 3, 2, 1] and tokens.completion == [5, 2]


def test_nothing_is_imported_for_it():
    """The trainers' integrations and ``humanline train`` share it."""
    import humanline.conversation as module

    source = Path(module.__file__).read_text(encoding="utf-8")
    assert not re.search(r"^\s*(from|import) (trl|transformers|humanline\.training)", source, re.M)
