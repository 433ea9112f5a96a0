"""`gptopt chat`: history, what is read again, the context's edge, commands, a pipe."""

import io
import subprocess
import sys

import pytest

from gptopt.chat import Conversation, _edge_talker, chat
from gptopt.config import SamplingOptions
from gptopt.config_chat import ChatOptions
from gptopt.errors import UserError
from gptopt.finetune.chat import PLAIN, ChatTemplate
from gptopt.runtime.generation import Completion, Generated
from gptopt.tokenizer import Tokenizer

TEXT = "user: the cat sat on the mat\nassistant: and the dog ran to the door " * 20
GREEDY = SamplingOptions(temperature=0, max_new_tokens=5)


@pytest.fixture(scope="module")
def folders(make_reading_model, make_folders):
    """(model folder, exported folder) of one random model."""
    return make_folders(*make_reading_model(TEXT, vocab_size=320, block_size=64))


class Echo:
    """Says how many tokens it was given; what it was given is kept."""

    def __init__(self, block_size=400):
        self.block_size = block_size
        self.tokenizer = Tokenizer.train([TEXT], vocab_size=320)
        self.read = []
        self.forgot = 0

    def reply(self, prompt, sampling, on_text):
        self.read.append(self.tokenizer.decode(prompt, skip_special=False))
        on_text(0, "yes")
        if "stop" in self.read[-1]:
            raise KeyboardInterrupt
        row = Generated(len(prompt), [1, 2], "yes, indeed", "eos")
        return Completion([row], 1.0, 2.0)

    def forget(self):
        self.forgot += 1


def talk(talker, system=None):
    template = ChatTemplate(PLAIN, talker.tokenizer)
    return Conversation(talker, template, GREEDY, system)


def hush(row, text):
    pass


def test_a_reply_becomes_part_of_what_is_read_next():
    talker = Echo()
    conversation = talk(talker, system="be kind")
    conversation.ask("cat?", hush)
    conversation.ask("dog?", hush)
    assert talker.read[1] == (
        "system: be kind\nuser: cat?\nassistant: yes, indeed<|endoftext|>user: dog?\nassistant: "
    )
    roles = [message["role"] for message in conversation.messages]
    assert roles == ["system", "user", "assistant", "user", "assistant"]


def test_undo_and_new_take_turns_back_but_not_the_system():
    talker = Echo()
    conversation = talk(talker, system="be kind")
    for text in ("cat?", "dog?"):
        conversation.ask(text, hush)
    assert conversation.undo()
    conversation.ask("mat?", hush)
    assert "dog?" not in talker.read[-1]
    assert "cat?" in talker.read[-1]
    conversation.clear()
    assert [message["content"] for message in conversation.messages] == ["be kind"]
    assert not conversation.undo()


def test_at_the_context_edge_the_oldest_turns_go_and_that_is_told(caplog):
    talker = Echo(block_size=48)
    conversation = talk(talker, system="be kind")
    for text in ("first cat", "second dog", "third mat", "fourth door"):
        conversation.ask(text, hush)
    last = talker.read[-1]
    assert "first" not in last
    assert last.startswith("system: be kind\n")
    assert last.endswith("user: fourth door\nassistant: ")
    assert len(talker.tokenizer.encode(last)) <= 48
    assert "no longer read" in caplog.text
    assert len(conversation.messages) == 9  # the history itself stays whole


def test_a_message_that_never_fits_is_one_line_and_no_turn():
    conversation = talk(Echo(block_size=30))
    with pytest.raises(UserError, match="the model sees 30 and needs 5 to answer; shorten it"):
        conversation.ask("zq " * 30, hush)
    assert conversation.messages == []


def test_ctrl_c_keeps_what_was_said_and_drops_the_cache():
    talker = Echo()
    conversation = talk(talker)
    with pytest.raises(KeyboardInterrupt):
        conversation.ask("stop", hush)
    assert [message["content"] for message in conversation.messages] == ["stop", "yes"]
    assert talker.forgot == 1


def test_an_exported_folder_reads_only_what_is_new(folders):
    talker, where = _edge_talker(ChatOptions(model=folders[1]))
    assert where == {"provider": "cpu", "precision": "fp32"}
    conversation = talk(talker)
    conversation.ask("the cat", hush)
    cache, read = talker._cache, []
    first = len(talk(talker)._template.prompt([{"role": "user", "content": "the cat"}]))
    real = type(cache).read
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            type(cache), "read", lambda self, texts: (read.append(texts[0]), real(self, texts))[1]
        )
        conversation.ask("the dog", hush)
    (text,) = read
    asked = conversation._template.prompt(conversation.messages[:-1])
    assert cache.tokens[0][: len(asked)] == asked
    assert 0 < len(text) <= len(asked) - first


def options(folder, **more):
    return ChatOptions(model=folder, temperature=0, max_new_tokens=6, **more)


def piped(monkeypatch, text):
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))


def test_both_kinds_of_folder_say_the_same(folders, monkeypatch, capsys):
    said = []
    for folder in folders:
        piped(monkeypatch, "the cat\n\n the dog \n/undo\nthe mat\n")
        result = chat(options(folder))
        said.append(result["messages"])
        replies = [m["content"] for m in result["messages"] if m["role"] == "assistant"]
        shown = capsys.readouterr().out
        assert shown.endswith(replies[-1] + "\n")
        assert (result["turns"], len(replies)) == (3, 2)
        assert 3 <= result["new_tokens"] <= 18
    assert said[0] == said[1]
    assert [m["content"] for m in said[0] if m["role"] == "user"] == ["the cat", "the mat"]


def test_commands_end_begin_again_and_explain_themselves(folders, monkeypatch, caplog):
    caplog.set_level("INFO", logger="gptopt")
    piped(monkeypatch, "/undo\n/hello there\nthe cat\n/new\n/exit\nthe dog\n")
    result = chat(options(folders[1], json=True))
    assert result["messages"] == []
    assert result["turns"] == 1
    assert "there is no turn to take back" in caplog.text
    assert "/hello is not a command" in caplog.text


def test_a_template_of_the_users_is_used_and_a_broken_one_named(folders, monkeypatch, tmp_path):
    path = tmp_path / "t.jinja"
    path.write_text("{{ raise_exception('never') }}")
    piped(monkeypatch, "the cat\n")
    with pytest.raises(UserError, match=r"t\.jinja: the template fails on this conversation"):
        chat(options(folders[1], chat_template=str(path)))
    with pytest.raises(UserError, match="cannot be read"):
        chat(options(folders[1], chat_template=str(tmp_path / "no.jinja")))


@pytest.mark.parametrize(
    ("which", "changes", "named"),
    [(0, {"precision": "q4"}, "knows no --precision"), (1, {"checkpoint": "best"}, "--checkpoint")],
)
def test_options_of_the_other_kind_are_refused(folders, which, changes, named):
    with pytest.raises(UserError, match=named):
        chat(options(folders[which], **changes))


def test_an_exported_folder_talks_without_torch(folders):
    code = (
        "import sys\n"
        "from gptopt.cli import main\n"
        f"code = main(['chat', {folders[1]!r}, '--max-new-tokens', '3'])\n"
        "assert code == 0 and 'torch' not in sys.modules, sorted(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], input="the cat\n", capture_output=True, text=True,
        check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
