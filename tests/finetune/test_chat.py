"""Chat templates: sandboxed, control tokens only where they wrote them, replies told apart."""

import pytest
from tokenizers import AddedToken

from gptopt.errors import UserError
from gptopt.finetune.chat import PLAIN, ChatTemplate, check_roles
from gptopt.tokenizer import END_OF_TEXT, Tokenizer
from gptopt.tokenizer_files import dump
from gptopt.tokenizer_training import train_backend

MARKED = (
    "{% for message in messages %}{{ '<|start|>' + message['role'] + '\n' "
    "+ message['content'] | trim"
    " + eos_token + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}"
    "{% endif %}"
)
CHAT = [
    {"role": "user", "content": "what says the cat?"},
    {"role": "assistant", "content": "the cat meows."},
    {"role": "user", "content": "the dog?"},
    {"role": "assistant", "content": "it barks."},
]


@pytest.fixture(scope="module")
def tokenizer():
    text = "what says the cat? the cat meows. the dog? it barks. user assistant system"
    backend = train_backend([text] * 3, "bpe", 300)
    backend.add_special_tokens([AddedToken("<|start|>", special=True, normalized=False)])
    return Tokenizer(dump(backend), {}, "test")


def spelled(tokenizer, parts):
    return [(tokenizer.decode(ids, skip_special=False), reply) for ids, reply in parts]


def test_replies_are_told_apart_and_end_as_the_template_ends_them(tokenizer):
    parts = spelled(tokenizer, ChatTemplate(MARKED, tokenizer).parts(CHAT))
    assert [reply for _, reply in parts] == [False, True, False, True, False]
    assert parts[1] == ("the cat meows.<|endoftext|>\n", True)
    assert parts[2] == ("<|start|>user\nthe dog?<|endoftext|>\n<|start|>assistant\n", False)
    assert "".join(text for text, _ in parts) == ChatTemplate(MARKED, tokenizer).render(CHAT)


def test_a_template_may_mark_replies_as_transformers_knows_it(tokenizer):
    marked = (
        "{% for m in messages %}\n{% if m.role == 'assistant' %}\n{% generation %}\n"
        "<{{ m.content }}>\n{% endgeneration %}\n{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    plain = marked.replace("{% generation %}\n", "").replace("{% endgeneration %}\n", "")
    assert ChatTemplate(marked, tokenizer).render(CHAT) == ChatTemplate(plain, tokenizer).render(
        CHAT
    )


def test_the_tokens_are_those_that_transformers_would_feed(tokenizer):
    """The library's own parsing of the rendered text, cut where replies begin and end."""
    template = ChatTemplate(MARKED, tokenizer)
    whole = [id_ for ids, _ in template.parts(CHAT) for id_ in ids]
    backend = tokenizer._backend
    backend.encode_special_tokens = False
    try:
        assert whole == backend.encode(template.render(CHAT), add_special_tokens=False).ids
    finally:
        backend.encode_special_tokens = True


@pytest.mark.parametrize(
    "evil", [END_OF_TEXT, "<|start|>", f"a{END_OF_TEXT}<|start|>b", "  <|start|>  "]
)
def test_control_tokens_in_messages_are_plain_text_unless_asked(tokenizer, evil):
    chat = [{"role": "user", "content": evil}, {"role": "assistant", "content": f"so {evil}"}]
    harmless = ChatTemplate(MARKED, tokenizer).parts(chat)
    harmful = ChatTemplate(MARKED, tokenizer, parse_control=True).parts(chat)

    def controls(parts):
        return sum(id_ in tokenizer.control_ids for ids, _ in parts for id_ in ids)

    template_own = ChatTemplate(MARKED, tokenizer).parts(CHAT[:2])
    assert controls(harmless) == controls(template_own)
    assert controls(harmful) > controls(harmless)
    text = "".join(piece for piece, _ in spelled(tokenizer, harmless))
    assert evil.strip() in text
    assert "\U0010fffd" not in text


def test_the_plain_template_needs_no_control_token_but_the_end(tokenizer):
    parts = spelled(tokenizer, ChatTemplate(PLAIN, tokenizer).parts(CHAT[:2]))
    assert parts[:2] == [
        ("user: what says the cat?\nassistant: ", False),
        ("the cat meows.<|endoftext|>", True),
    ]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ messages", "no Jinja template"),
        ("{{ raise_exception('only two messages') }}", "only two messages"),
        ("{{ messages.append(1) }}", "the template fails"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{% for m in messages %}{{ m.__class__.__init__.__globals__ }}{% endfor %}", "unsafe"),
        ("{% for i in range(10000000) %}x{% endfor %}", "Range too big"),
        ("{% include '/etc/passwd' %}", "the template fails"),
        ("{{ messages | length }}{{ messages[0]['content'] }}", "spells the beginning"),
    ],
)
def test_a_template_that_is_broken_or_hostile_is_one_line(tokenizer, source, message):
    with pytest.raises(UserError, match=message) as caught:
        ChatTemplate(source, tokenizer).parts(CHAT)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (None, "expected a list of messages, found null"),
        ([], "found an empty list"),
        ("hello", "found str"),
        (["hello"], "message 1: expected an object, found str"),
        ([{"role": "user"}], "message 1: expected text as 'content', found nothing"),
        ([{"role": "user", "content": 3}], "message 1: expected text as 'content', found int"),
        ([{"role": None, "content": ""}], "message 1: expected text as 'role', found null"),
        ([{"role": "robot", "content": ""}], "role 'robot', expected one of system, user"),
        (CHAT[1:], "message 1: roles out of order, 'assistant' comes first; expected system or"),
        ([CHAT[0], CHAT[0]], "message 2: roles out of order, 'user' comes after user"),
        ([*CHAT[:2], CHAT[1]], "message 3: .* 'assistant' comes after assistant; expected user"),
        ([CHAT[0], {"role": "system", "content": ""}], "message 2: .*'system' comes after user"),
        (CHAT[:3], "message 3: the conversation ends with 'user'"),
        ([CHAT[0], {"role": "assistant", "content": " \n"}], "message 2: the reply is empty"),
    ],
)
def test_roles_are_checked_before_anything_is_learned(messages, message):
    with pytest.raises(UserError, match=message):
        check_roles(messages)


def test_a_system_message_may_come_first():
    system = {"role": "system", "content": "be brief"}
    assert [each["role"] for each in check_roles([system, *CHAT])][:2] == ["system", "user"]
