"""README is true: its commands are accepted, its Python compiles, its links lead somewhere."""

import re
import shlex
from pathlib import Path

from gptopt import cli
from gptopt.verbs import VERBS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, flags=re.DOTALL)


def commands():
    for _, block in BLOCKS:
        for line in block.splitlines():
            if line.startswith("gptopt "):
                words = shlex.split(line, comments=True)[1:]
                count = 2 if " ".join(words[:2]) in VERBS else 1
                yield [" ".join(words[:count]), *words[count:]]


def test_every_command_of_the_readme_is_accepted():
    seen = set()
    for verb, *arguments in commands():
        cli.parse(verb, arguments)
        seen.add(verb)
    assert seen >= {"tokenize", "train", "generate", "evaluate", "export", "run"}


def test_the_python_of_the_readme_imports_what_exists():
    for language, block in BLOCKS:
        if language == "python":
            compile(block, "README", "exec")
            for line in block.splitlines():
                if line.startswith("from "):
                    exec(line, {})


def test_links_within_the_repository_lead_somewhere():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_every_verb_is_in_the_table_of_json_keys():
    table = README[README.index("## JSON output") :]
    for verb in VERBS:
        assert f"`{verb}`" in table, verb


def test_nothing_was_left_to_fill_in():
    assert not re.search(r"[A-Z]+_(PLACEHOLDER|NUMBERS|OURS|NANO|DIFF|KEYS)", README)
