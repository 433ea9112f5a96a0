"""What limits the goals that a run of `gptopt bench inference` falls short of: a profile of each.

    python -P -m gptopt.bench.inference_profile RESULTS --edge FOLDER --edge FOLDER

profiles anew what stands in RESULTS/inference.jsonl; the bench itself ends with the same profiles.
A token, or a prompt, is cut into products, attention and the other operators; each is held against
what it cannot do without at the rate measured in the same minute. Memory is told by stage.
"""

import argparse
import json
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gptopt.bench.edge_memory import profile_memory
from gptopt.bench.edge_profile import profile, profile_prompt
from gptopt.bench.inference_goals import reached
from gptopt.bench.inference_report import summarise, write_chart, write_table
from gptopt.cli import in_one_line
from gptopt.errors import UserError

logger = logging.getLogger(__name__)

Row = dict[str, Any]


def main() -> None:
    """Profile what falls short, and write rows and table again."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("results", type=Path, help="folder that holds inference.jsonl")
    parser.add_argument("--edge", type=Path, action="append", default=[], help="exported folder")
    given = parser.parse_args()
    path = given.results / "inference.jsonl"
    if not path.is_file():
        raise UserError(f"{path}: no such file; measure first: gptopt bench inference")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if row.get("kind") != "profile"]
    rows += profiles(rows, {folder.name: folder for folder in given.edge})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    summary = summarise(rows)
    write_table(given.results, rows, summary)
    write_chart(given.results, rows, summary)


def profiles(rows: Sequence[Row], folders: Mapping[str, Path]) -> Iterator[Row]:
    """A row for each contender and workload of ours that comes nearest to a goal not reached.

    Args:
        rows: of a run.
        folders: exported folders by name.

    Raises:
        UserError: a folder is not given.
    """
    short = [goal for goal in reached(rows, summarise(rows)) if not goal["reached"]]
    wanted = [(goal["by"], goal["workload"]) for goal in short]
    for contender, workload in dict.fromkeys(wanted):
        _, name, precision = contender.split()
        if name not in folders:
            raise UserError(f"--edge: {contender} needs a profile; give the folder {name}")
        logger.info("profiling %s, %s", contender, workload)
        found = _profiled(folders[name], precision, workload, rows[0]["threads"])
        if found is None:
            logger.warning("%s, %s: no profile is made of this", contender, workload)
        else:
            yield {"kind": "profile", "contender": contender, "workload": workload, **found}


def _profiled(folder: Path, precision: str, workload: str, threads: int) -> Row | None:
    kind, _, sizes = workload.partition(" ")
    if kind == "decode":
        prompt, new = map(int, sizes.split("+"))
        # Half of the new tokens, for the warm-up has read some before: the same room is enough.
        return profile(folder, precision, prompt, new // 2, threads)
    if kind == "prefill":
        return profile_prompt(folder, precision, int(sizes), threads)
    if kind == "peak_mib":
        return profile_memory(folder, precision, threads)
    return None


if __name__ == "__main__":
    sys.exit(in_one_line(main))
