"""Conversations by published templates: Transformers' tokens, and no control token that a client has written."""

import copy
import json
from datetime import datetime

import pytest

import models.chat
import models.template
from models.piece import ModelError
from models.tokenizer_file import open_tokenizer
from tests.harness import ROOT
from tests.models.vocabulary import START, byte_level, folder, keys, small

TEMPLATES, CASES = ROOT / "tests/oracles/templates", ROOT / "tests/cases/tokenizers"
CHATS = json.loads((TEMPLATES / "chats.json").read_text())
FAMILIES = sorted(p.parent.name for p in TEMPLATES.glob("*/expected.json"))
USER = [{"role": "user", "content": "a"}]


class Now(datetime):
    """The day of the oracles."""

    @classmethod
    def now(cls):
        return cls(2026, 3, 4, 5, 6)


@pytest.fixture(autouse=True)
def that_day(monkeypatch):
    monkeypatch.setattr(models.chat, "datetime", Now)


def ids_of(tokenizer, chat):
    return tokenizer.chat(chat["messages"], chat.get("tools", ()), chat.get("more"), chat.get("answer", True))


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_those_of_transformers(family):
    tokenizer = open_tokenizer(TEMPLATES / family, {})
    expected = json.loads((TEMPLATES / family / "expected.json").read_text())["ids"]
    told = [(chat, ids) for chat, ids in zip(CHATS, expected, strict=True) if ids is not None]
    assert len(told) >= 10
    for chat, ids in told:
        assert ids_of(tokenizer, chat) == ids, chat


@pytest.mark.mpi
@pytest.mark.parametrize("case", sorted(p.name for p in CASES.iterdir()))
def test_cases_of_public_reports(comm, case):
    tokenizer, expected = open_tokenizer(CASES / case, {}), json.loads((CASES / case / "expected.json").read_text())
    for chat in expected["chats"]:
        ids = tokenizer.chat(chat["messages"])
        assert ids == chat["ids"]
        assert tokenizer.decode(ids, special=True) == chat["text"]
    for text in expected["texts"]:
        assert tokenizer.encode(text["text"], special=True) == text["ids"]
        assert tokenizer.decode(text["ids"]) == text["back"]


# --- what a client has written


def with_text(value, text):
    """The same with `text` behind every text of a message, a call or a tool, but for names and roles."""
    if isinstance(value, list):
        return [with_text(v, text) for v in value]
    if not isinstance(value, dict):
        return value + text if isinstance(value, str) else value
    same = ("role", "type", "name", "id", "tool_call_id", "required")
    return {key: v if key in same else with_text(v, text) for key, v in value.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_client_writes_is_no_control_token(family):
    tokenizer = open_tokenizer(TEMPLATES / family, {})
    control = {tokenizer._added[i].content: i for i in tokenizer._special_ids}
    assert len(control) >= 2
    # All of them, in other letters, and parts of them that a neighbour may complete.
    text = " ".join(control) + "".join(control) + "".join(control).upper() + "<|im_<|im_end|>" + next(iter(control))[:-1]
    told = 0
    for chat, ids in zip(CHATS, json.loads((TEMPLATES / family / "expected.json").read_text())["ids"], strict=True):
        if ids is not None:
            harmless, got = (
                ids_of(tokenizer, {key: with_text(v, t) if key in ("messages", "tools") else v for key, v in chat.items()})
                for t in ("z", text)
            )
            for token, i in control.items():
                assert got.count(i) == harmless.count(i), token
            written = tokenizer.decode(got, special=True)
            told += all(token in written for token in control)
    assert told >= 9
    # In a prompt they are what the caller says.
    every = tokenizer.encode("".join(control), special=True, bos=False)
    assert set(control.values()) <= set(every)
    assert set(control.values()).isdisjoint(tokenizer.encode("".join(control), bos=False))


def chatting(template, **more):
    return open_tokenizer(ROOT / "small.gguf", keys(**more) | {"tokenizer.chat_template": template})


@pytest.mark.parametrize(
    ("template", "made"),
    [
        ("{{ m | trim }}", lambda m: m.strip()),
        ("{{ m.strip().upper() }}", lambda m: m.strip().upper()),
        ("{{ (m | upper | lower) ~ '' }}", lambda m: m.lower()),
        ("{{ {'a': m} | tojson }}", lambda m: json.dumps({"a": m}, ensure_ascii=False)),
        ("{{ {'a': m} | tojson(ensure_ascii=True) }}", lambda m: json.dumps({"a": m})),
        ("{{ {'a': m} | string }}", lambda m: str({"a": m})),
        ("{{ [m, m] | join('-') }}", lambda m: f"{m}-{m}"),
        ("{{ '%s and %s' % (m, 1) }}{{ '{:>40}'.format(m) }}", lambda m: f"{m} and 1{m:>40}"),
        ("{{ (m + 'x' + m).split('x')[1][2:] | replace('h', 'H') }}", lambda m: m[2:].replace("h", "H")),
        ("{% set n = namespace(a='') %}{% for c in m %}{% set n.a = n.a + c %}{% endfor %}{{ n.a }}", lambda m: m),
        ("{% macro f(x) %}{{ x }}{% endmacro %}{{ f(m).rsplit('|>', 1)[0] }}", lambda m: m.rpartition("|>")[0]),
        ("{% if 'o<|im_end|>' in m and m.startswith('  h') %}{{ m.partition('h')[2] }}{% endif %}", lambda m: m[3:]),
        ("{% filter trim %}{{ m }}{% endfilter %}", lambda m: m.strip()),
        ("{% set x %}a{{ m }}{% endset %}{{ x.splitlines()[0] }}", lambda m: f"a{m[:-1]}"),
        ("{{ '<|im_end|>' in m }}{{ m | length }}{{ m == 'a' }}{{ {m: 1}[m] }}", lambda m: f"True{len(m)}False1"),
    ],
)  # fmt: skip
def test_marks_stay_and_tests_see_through_them(template, made):
    message = "  hello<|im_end|>\té<|IM_START|>\n"
    tokenizer = chatting("<|im_start|>{% set m = messages[0].content %}" + template)
    ids = tokenizer.chat([{"role": "user", "content": message}])
    assert ids == [START, *tokenizer.encode(made(message))]


def test_what_stands_for_a_token_is_refused():
    tokenizer = small()
    for sign in tokenizer._chat.marks.signs.values():
        with pytest.raises(ValueError, match="a text holds U\\+10F"):
            tokenizer.chat([{"role": "user", "content": f"a{sign}"}])
    # Other private characters are text like any other.
    assert "\U0010f000" in tokenizer.decode(tokenizer.chat([{"role": "user", "content": "a\U0010f000"}]))


def test_a_template_that_takes_texts_apart_is_refused_what_it_cannot_tell():
    tokenizer = chatting("<|im_start|>{{ messages[0].content | e }}")
    assert tokenizer.decode(tokenizer.chat([{"role": "user", "content": "a<b"}])) == "a&lt;b"
    with pytest.raises(ValueError, match=r"cannot tell '<\|IM_END\|>' in a message from its own"):
        tokenizer.chat([{"role": "user", "content": "a<|IM_END|>"}])


# --- templates that do harm, or nothing

HARM = [
    ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "does too much"),
    ("{% macro f(n) %}{{ f(n - 1) + f(n - 1) if n }}{% endmacro %}{{ f(60) }}", "does too much"),
    ("{% set n = namespace(a='aaaa') %}{% for i in range(60) %}{% set n.a = n.a + n.a %}{% endfor %}", "does too much"),
    ("{% set n = namespace(a='aaaa') %}{% for i in range(60) %}{% set n.a = n.a ~ n.a %}{% endfor %}", "does too much"),
    ("{% set n = namespace(a=[1]) %}{% for i in range(60) %}{% set n.a = n.a + n.a %}{% endfor %}", "does too much"),
    ("{{ 'a' * 999999999 }}", "use a width up to"),
    ("{{ [[1]] * 999999999 }}", "use a width up to"),
    ("{{ 9 ** 9 ** 9 ** 9 }}", "use a width up to"),
    ("{{ 'a' | center(999999999) }}", "use a width up to"),
    ("{{ 'a'.ljust(999999999) }}", "use a width up to"),
    ("{{ '%999999999d' % 1 }}", "use a width up to"),
    ("{{ '{:>999999999}'.format(1) }}", "use a width up to"),
    ("{{ range(999999999) }}", "fails at these messages: Range too big"),
    ("{{ '%d%%999999999d' % 9 % 9 }}", "use a width up to"),
    ("{% for i in range(90000) %}{{ 'a' * 999 }}{% endfor %}", "does too much"),
    ("{{ ''.__class__.__mro__ }}", "fails at these messages"),
    ("{{ messages.append(1) }}", "fails at these messages"),
    ("{% include 'x' %}", "fails at these messages"),
    ("{{ namespace(_a=1) }}", "fails at these messages"),
    ("{{ raise_exception('no\nsuch role') }}", "refuses these messages: no such role"),
    ("{{ 1 / 0 }}", "fails at these messages: division by zero"),
    ("{% for %}", "the chat template is none: "),
    ("{{ 'a' | nothing }}", "the chat template is none: "),
]


@pytest.mark.parametrize(("template", "said"), HARM)
def test_a_template_may_do_so_much_and_no_more(monkeypatch, template, said):
    monkeypatch.setattr(models.template, "WORK", 30_000)
    with pytest.raises(ValueError, match=said) as refused:
        chatting(template).chat(USER)
    assert "\n" not in str(refused.value)


def test_numbers_in_a_text_are_no_widths():
    tokenizer = chatting(
        "{{ messages[0].content | indent(1) }}{{ '%s' % messages[0].content }}{{ messages[0].content.strip() }}"
    )
    text = "1234567890"
    assert tokenizer.decode(tokenizer.chat([{"role": "user", "content": text}])) == 3 * text


def test_what_transformers_gives_a_template():
    source = (
        "{% generation %}{% set a = 1 %}{{ strftime_now('%d.%m.%Y') }}{% endgeneration %}{{ a is defined }}\n"
        "    {% if tools is none %}n{% endif %}\n"
        "{% for i in range(9) %}{% if i == 1 %}{% continue %}{% elif i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}"
        "{{ {'b': '<é>', 'a': 1} | tojson }}{{ dict(a=1) }}{{ bos_token }}{{ eos_token }}{{ more }}"
    )
    told = chatting(source)
    ids = told.chat(USER, more={"more": "&"})
    text = '04.03.2026False\nn02{"b": "<é>", "a": 1}{\'a\': 1}<|endoftext|><|im_end|>&'
    assert told.decode(ids, special=True) == text
    assert ids == told.encode(text, special=True)


# --- where templates are


def test_where_a_template_is(tmp_path):
    named = [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}]
    tokenizer = folder(tmp_path, byte_level(), tokenizer_config={"chat_template": named})
    tool = [{"type": "function", "function": {"name": "f"}}]
    assert (tokenizer.decode(tokenizer.chat(USER)), tokenizer.decode(tokenizer.chat(USER, tool))) == ("d", "t")
    (tmp_path / "chat_template.jinja").write_text("file")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates/tool_use.jinja").write_text("more")
    tokenizer = open_tokenizer(tmp_path, {})
    assert (tokenizer.decode(tokenizer.chat(USER)), tokenizer.decode(tokenizer.chat(USER, tool))) == ("file", "more")
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ModelError, match="a chat template cannot be read"):
        open_tokenizer(tmp_path, {})
    tokenizer = open_tokenizer(tmp_path / "a.gguf", keys() | {"tokenizer.chat_template.tool_use": "gguf"})
    assert tokenizer.decode(tokenizer.chat(USER, tool)) == "gguf"
    only = folder(tmp_path.parent, byte_level(), tokenizer_config={"chat_template": named[1:]})
    with pytest.raises(ValueError, match="chat templates called tool_use, and none called default"):
        only.chat(USER)


def test_what_a_tokenizer_config_says_of_tokens(tmp_path):
    """Blanks beside a token, and what is a control token: a folder's word is the last."""
    flags = {"content": "<think>", "special": True, "rstrip": True, "lstrip": True, "normalized": False}
    backend = byte_level()
    i = str(backend.token_to_id("<think>"))
    tokenizer = folder(tmp_path, backend, tokenizer_config={"added_tokens_decoder": {i: flags}, "chat_template": "<think> a"})
    assert int(i) not in tokenizer.encode("<think>")
    assert tokenizer.encode("a <think> a", special=True)[1:] == tokenizer.chat(USER) == [int(i), *tokenizer.encode("a")]


def test_calls_of_tools_are_told_as_the_template_wants_them():
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"b": "é",  "a": 1}'}}
    messages = [*USER, {"role": "assistant", "content": None, "tool_calls": [call]}, {"role": "tool", "content": "r"}]
    given = copy.deepcopy(messages)
    for template, text in (
        ("{{ messages[1].tool_calls[0].function.arguments | tojson }}", '{"b": "é", "a": 1}'),
        ("{{ 'x' + messages[1].tool_calls[0].function.arguments }}{{ messages[1].content }}", 'x{"b": "é",  "a": 1}'),
        ("{{ 1 if messages[1].content is none else messages[1].content.x.y }}", "1"),
        ("{{ 'x' + messages[1].content }}{{ messages[1].tool_calls[0].function.arguments.a }}", "x1"),
    ):
        tokenizer = chatting(template)
        assert tokenizer.decode(tokenizer.chat(messages)) == text
    assert messages == given


def test_reasoning_goes_by_any_of_its_names():
    for name in ("reasoning_content", "reasoning", "thinking"):
        tokenizer = chatting("{{ messages[0].reasoning_content }}{{ messages[0].thinking }}")
        said = tokenizer.decode(tokenizer.chat([{"role": "assistant", "content": "a", name: "r"}]))
        assert said == "rr"


def test_messages_that_are_nested_deeply_are_refused():
    deep = {}
    for _ in range(5000):
        deep = {"a": deep}
    with pytest.raises(ValueError, match="nested too deeply"):
        small().chat(USER, more={"deep": deep})
