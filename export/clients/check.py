"""A folder in its clients: what each says is judged by the model, as in the proof."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gptopt.errors import UserError
from gptopt.export.clients.limits import RIGHT_ONLY, Limit, known_limit
from gptopt.export.clients.registry import Client, ask
from gptopt.export.reference import Doubles, Reference
from gptopt.export.stream import Claim
from gptopt.export.twin import held_by
from gptopt.export.validate import Outcome, band_of, judge, pool
from gptopt.model import GPT
from gptopt.runtime.folder import load_config, model_file
from gptopt.runtime.variants import choose
from gptopt.tokenizer import Tokenizer, UnknownCharacter

_TEXT = "The model reads this, and goes on:"
_ROWS = (7, 1, 4)  # lengths of ragged prompts
_TOKENS = {"greedy": 64, "left padding": 12, "right padding": 12, "text": 24}
_THREADS = 2
MASKED = "masked"  # the case of a masked language model


@dataclass(kw_only=True, slots=True)
class Said:
    """What a client said in one case.

    Attributes:
        tokens: new tokens, up to the end of the text.
        agreeing: those of them that the model finds likeliest, on the same text so far.
        near_ties: others, whose logit is within the budget of the likeliest.
        distinct: different tokens.
        max_abs_error: of the logits behind the prompts.
        error: why it does not pass, or None.
    """

    client: str
    case: str
    version: str | None = None
    tokens: int = 0
    agreeing: int = 0
    near_ties: int = 0
    distinct: int = 0
    max_abs_error: float = 0.0
    budget: float = 0.0
    error: str | None = None

    @property
    def passed(self) -> bool:
        """Whether the tokens are the model's and the logits within the budget."""
        return self.error is None

    @property
    def limit(self) -> Limit | None:
        """The known limit that kept the client from passing."""
        return None if self.error is None else known_limit(self.client, self.case, self.error)

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        limit = self.limit
        return {**asdict(self), "passed": self.passed, "limit": limit and limit.reason}


def check_clients(
    folder: Path,
    model: GPT,
    clients: Sequence[Client],
    *,
    precision: str = "auto",
    tokens: int | None = None,
    pictures: Path | None = None,
    cases: Sequence[str] | None = None,
) -> list[Said]:
    """Let clients play a folder, and compare what they say with the model.

    Greedy tokens are judged one by one: after the text so far, is it the one that the model, with
    the weights of the file and in float64, finds likeliest?

    Args:
        folder: exported; with a tokenizer.
        model: the one it was exported from, float32, eval().
        clients: see gptopt.export.clients.find_clients.
        precision: of the file to play; "auto": the first.
        tokens: length of the longest text; none: 64 new tokens.
        pictures: a folder for the screenshots of browsers.
        cases: names of the cases to play; none: all that a client has.

    Raises:
        UserError: a client is not installed, the folder has no tokenizer, or it labels texts.
    """
    played = _Play(folder, model, precision, tokens)
    said = []
    for client in clients:
        names = [name for name in played.cases_of(client) if cases is None or name in cases]
        picture = None
        if pictures is not None:
            pictures.mkdir(parents=True, exist_ok=True)
            picture = pictures / f"{client.name}-{folder.name}-{played.precision}.png"
        answer = ask(client, played.request(names), picture)
        own = [Said(client=client.name, case=name, version=answer["version"]) for name in names]
        played.judge(own, answer["cases"])
        said += own
    return said


@dataclass(slots=True)
class _Heard:
    """What a client said in full, beside what the model says.

    Attributes:
        outcome: of the logits behind the prompts.
        wanted: how many new tokens were asked for.
        rows: new tokens of each prompt, none of a masked language model.
        scores: the model's at each of them, (tokens, V) by row.
    """

    said: Said
    outcome: Outcome
    wanted: int
    rows: list[list[int]]
    scores: list[Doubles]


class _Play:
    """A file of a folder, its cases, and the judge."""

    def __init__(self, folder: Path, model: GPT, precision: str, tokens: int | None) -> None:
        self.folder, self.model = folder, model
        self.precision, self.file = choose(folder, precision)
        sizes = load_config(folder)
        if sizes["labels"] is not None:
            raise UserError(
                f"{folder}: labels texts, and clients are asked for tokens; without --clients its "
                f"files are proven all the same"
            )
        self._causal = sizes["causal"]
        self._tokenizer = Tokenizer.load(folder)
        path = model_file(folder, self.file.file)
        self._held = held_by(path)
        self._reference = Reference(model, causal=self._causal, held=self._held)
        self._external = [each.name for each in sorted(path.parent.glob(path.name + "_data*"))]
        self._room = sizes["block_size"] - max(_ROWS)
        self._tokens = {**_TOKENS, **({} if tokens is None else {"greedy": tokens})}

    def cases_of(self, client: Client) -> tuple[str, ...]:
        """What a client can be asked for with this model."""
        return client.cases if self._causal else (MASKED,)

    def request(self, names: Sequence[str]) -> dict[str, Any]:
        """See gptopt.export.clients.registry.ask."""
        return {
            "folder": str(self.folder.absolute()),
            "file": self.file.file,
            "precision": self.precision,
            "cache": self.file.cache,
            "external": self._external,
            "pad_id": self._tokenizer.pad_id,
            "threads": _THREADS,
            "causal": self._causal,
            "cases": [self._case(name) for name in names],
        }

    def _case(self, name: str) -> dict[str, Any]:
        case: dict[str, Any] = {"name": name}
        if name == MASKED:
            return case | {"tokens": 0, "padding": "right", "prompts": self._prompts(_ROWS)}
        case["tokens"] = max(1, min(self._tokens[name], self._room))
        if name == "text":
            case["text"] = self._text(self._room - case["tokens"])
            return case
        rows = _ROWS if "padding" in name else _ROWS[:1]
        case["padding"] = name.split()[0] if "padding" in name else "right"
        case["prompts"] = self._prompts(rows)
        return case

    def _text(self, longest: int) -> str:
        try:
            ids = self._tokenizer.encode(_TEXT)
        except UnknownCharacter:
            ids = self._prompts((len(_TEXT),))[0]
        return self._tokenizer.decode(ids[: max(1, longest)])

    def _prompts(self, rows: Sequence[int]) -> list[list[int]]:
        """Random ids of real tokens: genai finds padding by its id."""
        random = np.random.default_rng(len(rows))
        kept = [id_ for id_ in range(self._tokenizer.size) if id_ not in self._control()]
        return [random.choice(kept, n).tolist() for n in rows]

    def _control(self) -> set[int]:
        return {self._tokenizer.bos_id, self._tokenizer.eos_id, self._tokenizer.pad_id}

    def judge(self, said: Sequence[Said], answers: Mapping[str, dict[str, Any]]) -> None:
        """Fill in what a client said, case by case.

        PyTorch's error, from which the budget follows, is that of prompts and new tokens alike; for
        a file that rounds what it computes with, the largest of all cases, as in the proof.
        """
        answered = [(each, answers.get(each.case, {"error": "no answer"})) for each in said]
        found = [self._hear(each, answer) for each, answer in answered]
        heard = [each for each in found if each is not None]
        if self._held.products or self._held.cache:
            pool([each.outcome for each in heard])
        for one in heard:
            self._judge_logits(one)
            self._judge_tokens(one)

    def _hear(self, said: Said, answer: dict[str, Any]) -> _Heard | None:
        """An answer beside the model's; None, and the reason in `said`, where it is none."""
        if said.case == "left padding" and self.file.padding == "right":
            said.error = RIGHT_ONLY
        elif "error" in answer:
            said.error = " ".join(str(answer["error"]).split())[:600]
        if said.error is not None:
            return None
        case = self._case(said.case)
        prompts = case.get("prompts") or [self._tokenizer.encode(case["text"])]
        if answer.get("prompts", prompts) != prompts:
            said.error = f"the text became {answer['prompts'][0]}, expected {prompts[0]}"
            return None
        rows = [self._until_end(row) for row in answer["tokens"]]
        if len(rows) != len(prompts) or not (all(rows) or said.case == MASKED):
            said.error = f"{len(rows)} rows, some empty perhaps; expected {len(prompts)} texts"
            return None
        if "text" in case and answer["text"] != case["text"]:
            said.error = f"the text came back as {answer['text']!r}"
        claims, new = [], []
        for index, (prompt, row) in enumerate(zip(prompts, answer["logits"], strict=True)):
            scored = len(prompt) if said.case == MASKED else 1
            logits = np.asarray(row, np.float32).reshape(scored, -1)
            first = len(prompt) - scored
            claims.append(Claim(tuple(prompt), first, logits, row=index, offset=0))
            if rows[index]:
                text, none = (*prompt, *rows[index][:-1]), np.zeros((0, 0), np.float32)
                new.append(Claim(text, len(prompt) - 1, none, row=index, offset=0))
        outcome = judge(said.case, claims, self._reference.expect(claims), band_of(self._held))
        expected = self._reference.expect(new)
        errors = [float(np.abs(single - double).max()) for double, single in expected]
        outcome.settle(max([outcome.torch_error, *errors]))
        return _Heard(said, outcome, case["tokens"], rows, [each.double for each in expected])

    def _judge_logits(self, heard: _Heard) -> None:
        said, outcome = heard.said, heard.outcome
        said.max_abs_error, said.budget = outcome.max_abs_error, outcome.budget
        if not outcome.passed and said.error is None:
            said.error = f"logit error {said.max_abs_error:.2e}, budget {said.budget:.2e}"

    def _until_end(self, row: Sequence[int]) -> list[int]:
        end = self._tokenizer.eos_id
        return list(row[: row.index(end) + 1] if end in row else row)

    def _judge_tokens(self, heard: _Heard) -> None:
        """Tokens of a quantised file are counted only: they say which way many roundings went."""
        said = heard.said
        said.distinct = len({token for row in heard.rows for token in row})
        for index, (row, scores) in enumerate(zip(heard.rows, heard.scores, strict=False)):
            said.tokens += len(row)
            for at, (token, own) in enumerate(zip(row, scores, strict=True)):
                if token == int(own.argmax()):
                    said.agreeing += 1
                elif own.max() - own[token] <= said.budget:
                    said.near_ties += 1
                elif self._held.exact and said.error is None:
                    said.error = f"another token at {at} of row {index}"
            ended = row[-1] == self._tokenizer.eos_id
            if len(row) < heard.wanted and not ended and said.error is None:
                said.error = f"{len(row)} tokens in row {index}, expected {heard.wanted}"
