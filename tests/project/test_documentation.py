"""Every code block of README.md and docs/ is run by a test or checked, and docs/api.md is what the docstrings say.

A block of Python follows a line ``<!-- test: name -->``, and ``RUN_BY`` says which test module runs the blocks of that
name. Commands are compared with the ``--help`` of what they call; other languages have a reason in ``NOT_RUN``.
"""

import functools
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import nn

import blur_optim
from blur_optim import losses
from blur_optim.step.rules import RULES
from blur_optim.step.stash import STASHES

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
#: Which module runs the blocks of a name.
RUN_BY = {
    "readme": "tests/project/test_readme.py",
    "faq": "tests/integrations/test_integrations_docs.py",
    "start": "tests/project/test_documentation.py",
    "distributed": "tests/project/test_documentation.py",
    "integrations": "tests/integrations/test_integrations_docs.py",
    "lightning": "tests/integrations/test_integrations_docs.py",
    "stopping": "tests/integrations/test_stopping.py",
    "open-unlearning": "tests/integrations/test_open_unlearning.py",
    "deepspeed": "tests/parallel/test_deepspeed.py",
    "trl": "tests/integrations/test_trl.py",
    "axolotl": "tests/integrations/test_axolotl.py",
}
#: Languages, and why their blocks are not run.
NOT_RUN = {
    "": "a diagram or a listing",
    "text": "a signature",
    "bibtex": "a citation",
    "yaml": "configuration of another project; those with a mark are run",
}
COMMANDS = ("bash", "sh", "console")
#: What may stand before a script. Their own options, before it, are not ours to check.
LAUNCHERS = ("torchrun", "accelerate")


class Block(NamedTuple):
    page: str
    line: int
    mark: str
    language: str
    code: str

    def __str__(self):
        return f"{self.page}:{self.line}"


def blocks_of(page, text):
    found, opened, mark, before = [], None, "", ""
    for number, line in enumerate(text.splitlines(), start=1):
        fence = re.match(r"\s*```(\S*)", line)
        if fence and opened is None:
            match = re.fullmatch(r"<!-- test: (\S+) -->", before)
            opened, mark, code = (number, fence[1]), match[1] if match else "", []
        elif fence:
            found.append(Block(page, opened[0], mark, opened[1], "\n".join(code)))
            opened = None
        elif opened:
            code.append(line)
        before = line.strip()
    assert opened is None, f"{page}: the block of line {opened[0]} is not closed"
    # Untagged commands are commands.
    commands = [b.language == "" and b.code.startswith("python ") for b in found]
    return [b._replace(language="bash") if c else b for b, c in zip(found, commands, strict=True)]


def python_problem(block):
    if block.page == "docs/api.md":  # Examples of docstrings, with names from around them.
        compile(block.code, str(block), "exec")
        return ""
    if block.mark not in RUN_BY:
        return f"{block} is run by no test. Put <!-- test: name --> above it, and the name into RUN_BY."
    if not re.search(rf"\b{block.mark}\b", (ROOT / RUN_BY[block.mark]).read_text()):
        return f"{block} is said to be run by {RUN_BY[block.mark]}, which does not know {block.mark!r}."
    return ""


def command_problem(block):
    code = block.code.replace("\\\n", " ")
    for line in code.splitlines():
        words = shlex.split(line, comments=True)
        problem = words and one_command_problem(words)
        if problem:
            return f"{block}: {' '.join(words)}: {problem}"
    return ""


def one_command_problem(words):
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words = words[1:]
    program, *rest = words
    if program == "make":
        return "" if re.search(rf"^{rest[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE) else "no such target"
    if program == "pip":
        return pip_problem(rest)
    if program in ("python", *LAUNCHERS):
        return script_problem(rest)
    return "a command that this test does not know"


def pip_problem(words):
    text = (ROOT / "pyproject.toml").read_text()
    wanted = [extra for word in words for extra in ",".join(re.findall(r"\[(.*?)\]", word)).split(",") if extra]
    missing = [extra for extra in wanted if not re.search(rf"^{extra} = \[", text, re.MULTILINE)]
    return f"no such extras: {missing}" if missing else ""


def script_problem(words):
    place = next((i for i, word in enumerate(words) if word == "-m" or word.endswith(".py")), None)
    if place is None:
        return "no script"
    target = words[place : place + 2] if words[place] == "-m" else words[place : place + 1]
    if target[0] == "-m":
        if importlib.util.find_spec(target[1]) is None:
            return "no such module"
    elif not (ROOT / target[0]).exists():
        return "no such file"
    options = [word.partition("=")[0] for word in words[place + len(target) :] if word.startswith("-")]
    known = set(re.findall(r"(?<![\w-])--?[a-zA-Z][\w-]*", help_of(*target))) if options else set()
    unknown = [option for option in options if option not in known]
    return f"--help does not know {unknown}" if unknown else ""


@functools.cache
def help_of(*target):
    command = [sys.executable, *target, "--help"]
    environment = {**os.environ, "COLUMNS": "200", "NO_COLOR": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def problem_of(block):
    if block.language == "python":
        return python_problem(block)
    if block.language in COMMANDS:  # With a mark, those of another project.
        return python_problem(block) if block.mark else command_problem(block)
    if block.language == "json":
        for line in filter(None, block.code.splitlines()):
            json.loads(line)
        return ""
    return "" if block.language in NOT_RUN else f"{block}: {block.language!r} is not in NOT_RUN, with a reason."


BLOCKS = [b for page in PAGES for b in blocks_of(str(page.relative_to(ROOT)), page.read_text(encoding="utf-8"))]


def codes(mark):
    return [block.code for block in BLOCKS if block.mark == mark]


def run(code, names):
    exec(compile(code, "docs", "exec"), names)


class TestBlocks:
    def test_all_are_found(self):
        assert {block.page for block in BLOCKS} >= {"README.md", "docs/start.md", "docs/integrations.md", "docs/api.md"}
        assert {block.mark for block in BLOCKS if block.mark} == RUN_BY.keys()

    @pytest.mark.parametrize("language", sorted({block.language for block in BLOCKS}))
    def test_each_is_run_or_checked_or_has_a_reason(self, language):
        problems = [problem for block in BLOCKS if block.language == language if (problem := problem_of(block))]
        assert not problems

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("```python\nx = 1\n```", r"a.md:1 is run by no test"),
            ("<!-- test: nothing -->\n```python\nx = 1\n```", r"a.md:2 is run by no test"),
            ("```cobol\nSTOP RUN.\n```", "not in NOT_RUN"),
            ("```bash\npython examples/none.py\n```", "no such file"),
            ("```\npython examples/none.py\n```", "no such file"),
            ("```bash\npython -m blur_optim.none\n```", "no such module"),
            (
                "```bash\npython examples/fsdp2.py --lr 1 \\\n  --colour red\n```",
                r"--help does not know \['--colour'\]",
            ),
            ("```bash\npip install '.[plot,nothing]'\n```", r"no such extras: \['nothing'\]"),
            ("```bash\nmake nothing\n```", "no such target"),
            ("```bash\nrm -rf x\n```", "does not know"),
        ],
    )
    def test_what_is_wrong_is_found(self, text, message):
        (block,) = blocks_of("a.md", text)
        assert re.search(message, problem_of(block))

    def test_a_block_that_is_not_closed_is_found(self):
        with pytest.raises(AssertionError, match=r"line 2 is not closed"):
            blocks_of("a.md", "\n```python\n")

    def test_links_between_the_pages_lead_somewhere(self):
        missing = []
        for page in PAGES:
            for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
                if not (page.parent / target).exists():
                    missing.append(f"{page.name}: {target}")
        assert not missing


class TestStart:
    def test_a_loop_of_your_own(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        names = {}
        run(codes("start")[0], names)
        assert float(names["forget_loss"]) < 0.9
        assert len(Path("run.jsonl").read_text().splitlines()) == 101

    # A user sees it too: the Trainer looks for a GPU to pin memory for.
    @pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")
    def test_transformers(self, tmp_path, monkeypatch):
        pytest.importorskip("transformers", reason="transformers is not installed")
        monkeypatch.syspath_prepend(str(ROOT / "tests" / "integrations"))
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        monkeypatch.chdir(tmp_path)
        from tiny import collate, rows, tiny_llama

        names = {"model": tiny_llama(), "forget_rows": rows(8, 1), "retain_rows": rows(8, 2), "collator": collate}
        run(codes("start")[1], names)
        assert "alignment" in json.loads(Path("unlearned.jsonl").read_text().splitlines()[1])

    def test_the_page_is_short(self):
        assert len((ROOT / "docs" / "start.md").read_text().splitlines()) <= 90


class TestDistributed:
    def test_the_block_runs_in_a_group_of_one(self, tmp_path):
        (code,) = codes("distributed")
        torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
        try:
            model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
            before = [p.detach().clone() for p in model.parameters()]
            names = {
                "model": model,
                "forget_batches": torch.randn(2, 5, 4),
                "retain_batches": torch.randn(3, 5, 4),
                "npo": lambda batch: model(batch).square().mean(),
                "nll": lambda batch: (model(batch) - 1).square().mean(),
            }
            run(code, names)
            after = [p.full_tensor() for p in model.parameters()]
            assert not any(torch.equal(a, b) for a, b in zip(after, before, strict=True))
            assert float(names["opt"].statistics.forget_norm) > 0
        finally:
            torch.distributed.destroy_process_group()


class TestReference:
    PAGE = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")

    def test_is_what_the_docstrings_say_now(self):
        result = subprocess.run(
            [sys.executable, "docs/make_api.py", "--check"], cwd=ROOT, capture_output=True, text=True
        )
        assert result.returncode == 0, result.stderr

    @pytest.mark.parametrize(
        "name",
        sorted(
            {*blur_optim.__all__, *losses.__all__, *RULES, "Recorder", "read_record", "BLURTrainer", "BLURModule"}
            - {"IDK_ANSWERS", "IGNORE_INDEX"}
        ),
    )
    def test_has_every_public_name(self, name):
        assert f"\n### `{name}`\n" in self.PAGE

    def test_has_every_stash(self):
        sentence = self.PAGE.partition("## Stashes")[2].splitlines()[2]
        assert set(re.findall(r"`(\w+)`", sentence)) == set(STASHES)

    def test_nothing_of_sphinx_is_left(self):
        assert re.findall(r":\w+:`|\.\. \w+::|``\w", self.PAGE.replace("```", "")) == []

    def test_equations_are_blocks_of_their_own(self):
        fences = [line for line in self.PAGE.splitlines() if "$$" in line]
        assert set(fences) == {"$$"}
        assert len(fences) % 2 == 0
        assert len(fences) > 20
