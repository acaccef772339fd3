"""docs/distributed.md names a test for each of its claims."""

import re
from pathlib import Path

HERE = Path(__file__).parent
DOCS = HERE.parent.parent / "docs" / "distributed.md"


def test_every_test_that_the_documentation_names_exists():
    code = "".join(file.read_text() for file in HERE.glob("test_*.py"))
    names = set(re.findall(r"\b(test_\w+)\b(?!\.py)", DOCS.read_text()))
    files = set(re.findall(r"\b(test_\w+\.py)", DOCS.read_text()))
    assert len(names) > 30
    assert {name for name in names if f"def {name}(" not in code} == set()
    assert {name for name in files if not (HERE / name).exists()} == set()
