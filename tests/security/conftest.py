"""The small exported folders of tests/runtime, for tests that attack them."""

import importlib.util
from pathlib import Path

_PATH = Path(__file__).parents[1] / "runtime" / "conftest.py"
_SPEC = importlib.util.spec_from_file_location("runtime_fixtures", _PATH)
_FIXTURES = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(_FIXTURES)

tokenizer = _FIXTURES.tokenizer
build_folder = _FIXTURES.build_folder
pristine = _FIXTURES.pristine
folder = _FIXTURES.folder
