"""Write docs/api.md from the docstrings: ``python docs/make_api.py``, or ``make docs``.

Reads the sources without importing them, so it needs nothing installed and says the same on every machine.
``python docs/make_api.py --check`` writes nothing and fails where the file is not what would be written.
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "blur_optim"
API = ROOT / "docs" / "api.md"

# Title, sentence below it, and module: names. "*": its docstring and every public name.
SECTIONS: tuple[tuple[str, str, dict[str, str]], ...] = (
    ("The optimizer", "`from blur_optim import BLUR`", {"optimizer": "BLUR", "chained": "*"}),
    (
        "A wrapper of your own",
        "What BLUR owes to torch as an optimizer around another, without BLUR.",
        {"optimizer_wrapper": "OptimizerWrapper supports_amp_scaling lent"},
    ),
    ("Statistics", "`opt.statistics` after a step.", {"step.statistics": "StepStatistics"}),
    (
        "Rules",
        "`from blur_optim.step.rules import ...`; `BLUR(rule=...)` takes a name or a function.",
        {"step.rules": "Dots RULES blur retain_first conflict barrier weighted_sum normalized on_unit_gradients"},
    ),
    (
        "Stashes",
        "`BLUR(stash=...)` takes a name: `reference`, `bfloat16`, `int8`, `cpu`, `recompute`. [More](memory.md).",
        {"step.stash": "STASHES Stash BFloat16Stash Int8Stash HostStash", "step.recompute": ""},
    ),
    (
        "Losses",
        "`from blur_optim.losses import ...`",
        {
            "losses": "",
            "losses.text": "*",
            "losses.rmu": "*",
            "losses.stored_log_probs": "*",
            "losses.reference": "reference_logits reference_log_probs stored_reference_log_probs adapter_changes",
            "losses.forward": "run_model model_logits",
        },
    ),
    (
        "Recorder",
        "`from blur_optim.record import Recorder, read_record`",
        {"record.recorder": "*", "record.record_file": "Record read_record"},
    ),
    ("Pictures", "", {"record.plot": "plot"}),
    (
        "transformers",
        "",
        {
            "integrations.arguments": "BLURArguments BLURTrainingArguments",
            "integrations.transformers": "BLURTrainer",
            "integrations.trainer_step": "BLURStepMixin",
            "integrations.record": "*",
            "integrations.stopping": "*",
        },
    ),
    (
        "DeepSpeed",
        "`from blur_optim.integrations.deepspeed import DeepSpeedBLUR`",
        {"integrations.deepspeed.optimizer": "DeepSpeedBLUR"},
    ),
    ("axolotl", "", {"integrations.axolotl": "BLURPlugin"}),
    ("Lightning", "", {"integrations.lightning": "*"}),
    ("open-unlearning", "", {"integrations.open_unlearning": "register"}),
    ("Environment", "", {"env": "facts"}),
)
_INLINE_MATH = re.compile(r":math:`([^`]+)`")
_ROLE = re.compile(r":(?:class|func|meth|mod|attr|data):`~?([^`]+)`")
_CITATION = re.compile(r"\s+\(((?:\w+, )?arXiv:[\d.]+)\)$")
_SECTION = re.compile(r"^(Args|Attributes|Returns|Yields|Raises|Cost|Example):{1,2}(.*)$")


def main(arguments: list[str]) -> None:
    text = make()
    if "--check" in arguments:
        if not API.exists() or API.read_text(encoding="utf-8") != text:
            sys.exit("docs/api.md is not what the docstrings say now. Run: python docs/make_api.py")
        return
    API.write_text(text, encoding="utf-8")
    print(API)


def make() -> str:
    """The whole page."""
    lines = [
        "<!-- Made by docs/make_api.py from the docstrings: edit those, and run `make docs`. -->",
        "# Reference",
        "",
        "Every public name, from its docstring. Shapes are in brackets; g_f and g_r are forget and retain gradient.",
        "",
    ]
    contents = [f"- [{title}](#{_anchor(title)})" for title, _, _ in SECTIONS]
    lines += [*contents, ""]
    for title, sentence, modules in SECTIONS:
        lines += [f"## {title}", ""]
        if sentence:
            lines += [sentence, ""]
        for module, names in modules.items():
            lines += _module(module, names)
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).rstrip() + "\n"


def _module(module: str, names: str) -> Iterator[str]:
    path = PACKAGE.joinpath(*module.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    source = path.read_text(encoding="utf-8")
    tree = ast.parse(source)
    public = [node for node in tree.body if _name(node) and not _name(node).startswith("_")]
    if names == "*":
        wanted = [_name(node) for node in public if isinstance(node, ast.ClassDef | ast.FunctionDef)]
    else:
        wanted = names.split()
    if not names or len(wanted) > 1 or module in ("record.plot", "env", "integrations.open_unlearning"):
        yield from _docstring(tree)
    nodes = {_name(node): node for node in public}
    for name in wanted:
        yield from _entry(nodes[name], f"blur_optim.{module}", source.splitlines())


def _entry(node: ast.stmt, module: str, source: list[str]) -> Iterator[str]:
    name = _name(node)
    module = "blur_optim" if module == "blur_optim.optimizer" else module
    yield from ("", f"### `{name}`", "")
    if isinstance(node, ast.FunctionDef):
        yield from ("```text", f"{module}.{_signature(node)}", "```", "")
        yield from _docstring(node)
    elif isinstance(node, ast.ClassDef):
        yield from _class(node, module)
    else:
        yield from _comment(node, source)


def _class(node: ast.ClassDef, module: str) -> Iterator[str]:
    methods = [item for item in node.body if isinstance(item, ast.FunctionDef)]
    init = next((item for item in methods if item.name == "__init__"), None)
    bases = ", ".join(ast.unparse(base) for base in node.bases)
    head = _signature(init, node.name) if init and init.args.args[1:] + init.args.kwonlyargs else node.name
    yield from ("```text", f"class {module}.{head}" + (f"   # bases: {bases}" if bases else ""), "```", "")
    yield from _docstring(node)
    yield from _fields(node)
    for method in methods:
        doc = ast.get_docstring(method)
        if doc is None or (method.name.startswith("_") and method.name != "__call__"):
            continue
        decorators = {ast.unparse(item) for item in method.decorator_list}
        if "property" in decorators:
            yield from (
                "",
                f"**`.{method.name}`**" + (f" → `{ast.unparse(method.returns)}`" if method.returns else ""),
                "",
            )
        else:
            yield from ("", f"**`.{_signature(method)}`**", "")
        yield from _docstring(method)


def _fields(node: ast.ClassDef) -> Iterator[str]:
    """The fields of a dataclass that say in their metadata what they are."""
    for item in node.body:
        call = item.value if isinstance(item, ast.AnnAssign) else None
        if not (isinstance(call, ast.Call) and ast.unparse(call.func) == "field"):
            continue
        options = {keyword.arg: keyword.value for keyword in call.keywords}
        text = ast.unparse(options["metadata"]).removeprefix("{'help': ").removesuffix("}")
        text = text.removeprefix("f")[1:-1].replace("{REFERENCE_FILE}", "reference.safetensors")
        default = ast.unparse(options["default"])
        yield f"- `{_name(item)}: {ast.unparse(item.annotation)} = {default}`: {text}"


def _comment(node: ast.stmt, source: list[str]) -> Iterator[str]:
    """What the lines above an assignment that begin with ``#:`` say, else its value."""
    first = node.lineno - 1
    while source[first - 1].startswith("#"):
        first -= 1
    comment = [line.lstrip("#: ") for line in source[first : node.lineno - 1]]
    yield from _markdown("\n".join(comment)) if comment else [f"`{ast.unparse(node)}`"]


def _signature(node: ast.FunctionDef, name: str | None = None) -> str:
    """Names and defaults; types and shapes are what the docstring is for."""
    arguments = node.args
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults = [None] * (len(positional) - len(arguments.defaults)) + list(arguments.defaults)
    decorators = {ast.unparse(item) for item in node.decorator_list}
    pairs = list(zip(positional, defaults, strict=True))
    if positional and positional[0].arg in ("self", "cls") and "staticmethod" not in decorators:
        pairs = pairs[1:]
    parts = [_argument(argument.arg, default) for argument, default in pairs]
    if arguments.vararg:
        parts.append(f"*{arguments.vararg.arg}")
    elif arguments.kwonlyargs:
        parts.append("*")
    parts += [_argument(a.arg, d) for a, d in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)]
    if arguments.kwarg:
        parts.append(f"**{arguments.kwarg.arg}")
    return f"{name or node.name}({', '.join(parts)})"


def _argument(name: str, default: ast.expr | None) -> str:
    return name if default is None else f"{name}={ast.unparse(default)}"


def _docstring(node: ast.Module | ast.ClassDef | ast.FunctionDef) -> Iterator[str]:
    doc = ast.get_docstring(node)
    if doc:
        yield from _markdown(doc)
        yield ""


def _markdown(doc: str) -> Iterator[str]:
    """A docstring in this project's style as Markdown: sections, equations, code."""
    blocks = _blocks(doc.splitlines())
    for head, body in blocks:
        section = _SECTION.match(head)
        if head.startswith(".. math::"):
            yield from _equation([head.removeprefix(".. math::"), *body])
        elif section and section[1] not in ("Cost", "Example"):
            yield from ("", f"**{section[1]}**{':' + _inline(section[2]) if section[2] else ''}", "")
            yield from _items(dedent("\n".join(body)).splitlines(), listed=section[1] not in ("Returns", "Yields"))
        elif head.endswith("::"):
            yield from (
                _inline(head[:-1]),
                "",
                "```python",
                *dedent("\n".join(body)).strip("\n").splitlines(),
                "```",
                "",
            )
        else:
            yield _inline(head)
            yield from (_inline(line) for line in body)


def _blocks(lines: list[str]) -> Iterator[tuple[str, list[str]]]:
    """Each line that is not indented, with the indented ones below it."""
    position = 0
    while position < len(lines):
        head, body = lines[position], []
        position += 1
        opens = head.startswith(".. ") or head.endswith("::") or _SECTION.match(head)
        while opens and position < len(lines) and (lines[position].startswith(" ") or not lines[position].strip()):
            body.append(lines[position])
            position += 1
        yield head, body


def _items(lines: list[str], listed: bool) -> Iterator[str]:
    """The entries of a section as a list, those that go on over several lines joined."""
    entries: list[str] = []
    for line in lines:
        if line.startswith(" ") and entries:
            entries[-1] += " " + line.strip()
        elif line.strip() and (listed or not entries):
            entries.append(line.strip())
        elif line.strip():
            entries[-1] += " " + line.strip()
    for entry in entries:
        name, colon, text = entry.partition(": ")
        yield (
            f"- `{name}`: {_inline(text)}" if listed and colon else f"- {_inline(entry)}" if listed else _inline(entry)
        )
    yield ""


def _equation(lines: list[str]) -> Iterator[str]:
    text = " ".join(line.strip() for line in lines if line.strip())
    citation = _CITATION.search(text)
    text = _CITATION.sub("", text)
    yield from ("", "$$", _tex(text), "$$", "")
    if citation:
        yield from (f"({citation[1]})", "")


def _inline(text: str) -> str:
    """Roles as code, math as math."""
    text = _INLINE_MATH.sub(lambda match: f"${_tex(match[1])}$", text)
    text = _ROLE.sub(lambda match: f"`{match[1]}`", text)
    return text.replace("``", "`")


def _tex(text: str) -> str:
    """TeX without the escapes that Markdown would take for its own."""
    for escape, command in ((r"\|", r"\Vert "), (r"\,", r"\thinspace "), (r"\{", r"\lbrace "), (r"\}", r"\rbrace ")):
        text = text.replace(escape, command)
    return text.strip()


def _name(node: ast.stmt) -> str:
    if isinstance(node, ast.ClassDef | ast.FunctionDef):
        return node.name
    if isinstance(node, ast.AnnAssign):
        return ast.unparse(node.target)
    return ast.unparse(node.targets[0]) if isinstance(node, ast.Assign) else ""


def _anchor(title: str) -> str:
    return title.lower().replace(" ", "-")


if __name__ == "__main__":
    main(sys.argv[1:])
