"""Make the source of the documentation's site: `make docs` calls this, and then MkDocs.

Pages of this folder are taken as they are; the README is the first of them. What the code knows
best is written here: a page for each command (from click, with what `benchmarks/record.py` saw it
print), the keys of the policy (from its JSON schema), and which names of `mpq` the pages of the
API have (their text is the docstrings', by mkdocstrings).

    python docs/stage.py build/site
"""

from __future__ import annotations

import html
import itertools
import os
import re
import shutil
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import click

import mpq
import mpq.api
from mpq.cli import COMMANDS, load_command
from mpq.cli.everywhere import with_common
from mpq.keys import schema as policy_schema

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
RENAMED = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md",
           "CHANGELOG.md": "changelog.md"}  # fmt: skip
"""Pages that lie beside this folder, by their names on the site."""
VERBS = tuple(name for name in COMMANDS if name in mpq.api.__all__)
VALUES = ("Analysis", "Quantized", "ExportResult", "Certificate", "Bench", "Policy", "LayerPolicy",
          "Constraints", "QuantSpec", "Run", "trusting")  # fmt: skip
PARTS = ("QuantGraph", "to_float", "score_layers", "Scoring", "Search", "build_policy", "prepare",
         "calibrate", "quantize_graph", "attach_norms", "absorb_norms", "fit", "Recipe",
         "TrainingData", "TrainingPlan", "freeze")  # fmt: skip
OLD = {"__version__", "allocate"}
"""Of the public names, those that need no page."""
API = {
    "verbs": ("Verbs", VERBS, "What the commands do, on modules and loaders."),
    "values": ("Values", VALUES, "What the verbs take and give. Results print themselves, show "
               "tables in a notebook, and are kept by `save` and `load`."),
    "parts": ("Parts", PARTS, "What the verbs are made of, for a pipeline of your own ([the "
              "tour](../tour.md) has one): a module goes in, a graph comes out, and the loop is "
              "yours."),
}  # fmt: skip
"""Pages of the API: title, the names that each has, and what it says first."""
LINK = re.compile(r"\]\(([^)\s#]+)(#[^)]*)?\)")
NAMED = re.compile(r"\[((?:docs/)?[\w-]+\.md)\]\(")
PICTURE = re.compile(r"^!\[([^\]]*)\]\((pictures/[\w-]+\.svg)\)$", re.MULTILINE)
INCLUDED = re.compile(r"^<!-- include (\S+) -->$", re.MULTILINE)
REPOSITORY = os.environ.get("MPQ_REPOSITORY", "")
"""Where files that are no pages can be seen, such as https://github.com/OWNER/NAME."""


def stage(out: Path) -> None:
    """Write the pages, and the package as it is installed, into an empty folder."""
    shutil.rmtree(out, ignore_errors=True)
    pages = out / "pages"
    shutil.copytree(
        DOCS,
        pages,
        ignore=shutil.ignore_patterns("stage.py", "mkdocs.yml", "pictures.py", "__pycache__"),
    )
    for path in DOCS.rglob("*.md"):
        (pages / path.relative_to(DOCS)).write_text(_on_site(path), encoding="utf-8")
    for name, page in RENAMED.items():
        (pages / page).write_text(_on_site(ROOT / name), encoding="utf-8")
    written = {**_commands(), **_api(), "reference/policy.md": _policy_page()}
    for name, text in written.items():
        (pages / name).parent.mkdir(exist_ok=True)
        (pages / name).write_text(text, encoding="utf-8")
    (out / "mkdocs.yml").write_text(_configuration(), encoding="utf-8")
    package = out / "package" / "mpq"
    for source, place in (("mpq", package), ("export", package / "export")):
        shutil.copytree(ROOT / source, place, ignore=shutil.ignore_patterns("__pycache__"))


def _configuration() -> str:
    """The site's, with the pages of commands, and those that nobody has placed at its end."""
    config = (DOCS / "mkdocs.yml").read_text(encoding="utf-8")
    commands = "".join(f"\n      - {name}: commands/{name}.md" for name in COMMANDS)
    named = (path.relative_to(DOCS).as_posix() for path in sorted(DOCS.rglob("*.md")))
    others = "".join(f"\n      - {name}" for name in named if not re.search(rf"\b{name}\b", config))
    return config.replace("\n      - COMMANDS", commands).replace("\n      - OTHERS", others)


def _on_site(path: Path) -> str:
    """A page with links as the site has them, and its pictures inside, where CSS reaches them."""
    base = DOCS if path.parent == ROOT else path.parent

    def link(found: re.Match[str]) -> str:
        target, anchor = found[1], found[2] or ""
        if target.startswith(("http", "mailto:")):
            return found[0]
        file = Path(os.path.normpath(path.parent / target))
        if file.parent == ROOT and file.name in RENAMED:
            file = DOCS / RENAMED[file.name]
        if file.is_relative_to(DOCS):
            return f"]({os.path.relpath(file, base)}{anchor})"
        kind = "tree" if file.is_dir() else "blob"
        return f"]({REPOSITORY}/{kind}/main/{file.relative_to(ROOT).as_posix()})"

    text = NAMED.sub(_titled, path.read_text(encoding="utf-8"))
    text = LINK.sub(link, text)
    if not REPOSITORY:
        text = re.sub(r"\[([^\]]+)\]\(/(?:blob|tree)/[^)]*\)", r"\1", text)
    text = INCLUDED.sub(lambda found: _included(found[1]), text)
    if path.name == "tour.md":
        text = _with_output(text)
    return PICTURE.sub(lambda found: _figure(found[2], found[1]), text)


def _titled(found: re.Match[str]) -> str:
    """A link whose text is the path of a page gets the page's title."""
    name = Path(found[1]).name
    page = ((ROOT if name in RENAMED else DOCS) / name).read_text(encoding="utf-8")
    return f"[{page.partition(chr(10))[0].removeprefix('# ')}]("


def _included(name: str) -> str:
    """A file of the repository as a block, folded."""
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    shown = ["```python", *lines, "```"]
    return "\n".join([f'??? example "{name}"', "", *(f"    {line}".rstrip() for line in shown)])


def _with_output(text: str) -> str:
    """The tour with what each of its blocks printed, folded."""
    said = iter(_parts((DOCS / "recorded" / "tour.txt").read_text(encoding="utf-8")))

    def block(found: re.Match[str]) -> str:
        language, lines = found[1], found[2].splitlines()
        if "title=" in language:
            return found[0]
        count = sum(map(bool, lines)) if language == "sh" else 1
        parts = [f"$ {line}\n{shown}\n" for line, shown in itertools.islice(said, count)]
        shown = ["```console", *"\n".join(parts).splitlines(), "```"]
        folded = "\n".join(f"    {line}".rstrip() for line in shown)
        return f'{found[0]}\n??? example "What it prints"\n\n{folded}\n'

    return re.sub(r"^```(sh|python)\n(.*?)^```\n", block, text, flags=re.MULTILINE | re.DOTALL)


def _parts(text: str) -> list[tuple[str, str]]:
    """The commands of a recording, and what each printed."""
    parts = re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]
    return [(line, said.strip("\n")) for line, _, said in (part.partition("\n") for part in parts)]


def _figure(name: str, told: str) -> str:
    drawn = (DOCS / name).read_text(encoding="utf-8")
    drawn = re.sub(r"<style>.*?</style>\n?|<\?xml.*?\?>\n?", "", drawn, flags=re.DOTALL)
    drawn = "\n".join(line for line in drawn.splitlines() if line.strip())
    return f'<figure class="picture" aria-label="{html.escape(told)}">\n{drawn}\n</figure>'


def recorded() -> dict[str, tuple[str, str]]:
    """For each command, the first line that ran it and what was printed, of all recordings."""
    found: dict[str, tuple[str, str]] = {}
    for name in ("more", "demo", "tour"):
        text = (DOCS / "recorded" / f"{name}.txt").read_text(encoding="utf-8")
        for line, said in _parts(text):
            words = line.split()
            if words[0] == "mpq":
                found.setdefault(words[1], (line, said))
    return found


def _commands() -> dict[str, str]:
    examples = recorded()
    rows = [f"| [`mpq {name}`]({name}.md) | {entry.help} |" for name, entry in COMMANDS.items()]
    main = import_module("mpq.cli").cli
    pages = {"commands/index.md": "\n".join([
        "# Commands", "", "In the order of use. A command that is given no file takes that of the "
        "newest run, and says which.", "", "| command | |", "|---|---|", *rows, "",
        "## What every command takes", "", "Before the name of a command:", "",
        *_options(main.params), "After it:", "",
        *_options(p for p in with_common(click.Command("any")).params),
        "## Exit codes", "", main.epilog.removeprefix("Exit codes: "), "",
    ])}  # fmt: skip
    for name in COMMANDS:
        pages[f"commands/{name}.md"] = _command_page(name, examples.get(name))
    return pages


def _command_page(name: str, example: tuple[str, str] | None) -> str:
    command = load_command(name)
    usage = command.get_usage(click.Context(command, info_name=f"mpq {name}"))
    lines = [f"# mpq {name}", "", "```text", usage, "```", "", *_prose(command.help or "")]
    if name in VERBS:
        lines += [f"In Python: [`mpq.{name}`](../api/verbs.md#mpq.{name}).", ""]
    if example:
        lines += ["## Example", "", "```console", f"$ {example[0]}", example[1], "```", ""]
    more = "[What every command takes](index.md#what-every-command-takes) comes on top."
    lines += ["## Options", "", *_options(command.params), more, ""]
    return "\n".join(lines)


def _prose(text: str) -> Iterator[str]:
    """The help of a command as Markdown: paragraphs, and its examples as code."""
    for part in re.split(r"\n\s*\n", text.strip()):
        lines = [line.strip() for line in part.splitlines()]
        if lines[0] == "\b":
            yield from ["```sh", *lines[1:], "```", ""]
        else:
            yield from [html.escape(" ".join(lines), quote=False), ""]


def _options(params: Any) -> Iterator[str]:
    """Arguments and options as a list of definitions."""
    context = click.Context(click.Command("any"))
    for param in params:
        if isinstance(param, click.Argument):
            continue
        record = param.get_help_record(context)
        if record is None or param.name == "help":
            continue
        names, told = record
        told, _, default = told.partition("  [")
        default = re.sub(r"x>=(\d+)", r"at least \1", default.rstrip("]"))
        more = f" *{html.escape(default)}.*" if default else ""
        yield from [f"`{names}`", f":   {html.escape(told, quote=False)}{more}", ""]


def _api() -> dict[str, str]:
    return {f"api/{page}.md": _api_page(page) for page in API}


def _api_page(page: str) -> str:
    title, names, about = API[page]
    lines = [f"# {title}", "", about, ""]
    known = {*VERBS, *VALUES, *PARTS, *OLD}
    more = [name for name in mpq.__all__ if name not in known] if page == "values" else []
    for name in (*names, *more):
        lines += [f'<span id="mpq.{name}"></span>', "", f"::: {home(name)}", "    options:",
                  f"      heading: mpq.{name}", f"      toc_label: {name}", ""]  # fmt: skip
    return "\n".join(lines)


def home(name: str) -> str:
    """Where a public name is defined, `module.name`."""
    found = getattr(import_module("mpq.api") if name in VERBS else mpq, name)
    return f"{found.__module__}.{found.__qualname__}"


def _policy_page() -> str:
    schema = policy_schema()
    lines = ["# Policy", "", POLICY_INTRODUCTION, ""]
    models = sorted(schema["$defs"].items(), key=lambda pair: [*SECTIONS].index(pair[0]))
    for title, model in (("Policy", schema), *models):
        lines += [f"## {SECTIONS[title]}", ""]
        for key, value in model["properties"].items():
            kind = f"{_type(value)}{_default(key, model, value)}"
            lines += [f"`{key}` ({kind})", f":   {value['description']}", ""]
    return "\n".join(lines)


SECTIONS = {"Policy": "The file", "ModelInfo": "model", "DataInfo": "data",
            "DefaultSpec": "default", "LayerPolicy": "An entry of layers",
            "Constraints": "constraints", "SearchResult": "result"}  # fmt: skip
POLICY_INTRODUCTION = """\
Every key of `policy.yaml`, from the schema that `mpq schema` prints. `mpq analyze` writes that
schema beside the policy, and the policy's first line names it, so that editors complete and check
what you type. A policy is applied exactly as it stands: `default` first, then the entries of
`layers` from top to bottom, the last match wins, field by field. An unknown key, and a name that
matches no layer, are errors that name the nearest one.

```yaml
version: 1
default: {weight: int8/channel, activation: uint8/tensor}
layers:                       # exact path or glob
  - {name: layer3.*.conv2, weight: int4/channel}
  - {name: conv1, weight: int8/channel, locked: true, reason: "stem, 0.2 % of the bytes"}
```

A number format is `int` or `uint` with a width, and what shares a scale: `int4/channel` for
weights, `uint8/tensor` for activations, `uint8/dynamic` for a range taken at run time, or `float`.
"""


def _type(value: dict[str, Any]) -> str:
    """How a schema's type reads to a person."""
    if "$ref" in value:
        return "a mapping, as below"
    if "anyOf" in value:
        kinds = [_type(v) for v in value["anyOf"] if v.get("type") != "null"]
        return " or ".join(dict.fromkeys(kinds))
    if "enum" in value:
        return " or ".join(f"`{one}`" for one in value["enum"])
    if "const" in value:
        return f"always {value['const']}"
    if value.get("type") == "array":
        inner = value.get("items") or value.get("prefixItems", [{}])[0]
        return f"a list: {_type(inner)}"
    if "pattern" in value:
        return "a number format"
    names = {"string": "text", "boolean": "true or false", "object": "a mapping",
             "integer": "a whole number"}  # fmt: skip
    return names.get(value.get("type", ""), "a number")


def _default(key: str, model: dict[str, Any], value: dict[str, Any]) -> str:
    if key in model.get("required", ()):
        return ", required"
    default = value.get("default")
    plain = "const" not in value and isinstance(default, str | int | float) and default != ""
    return f", `{default}` by default" if plain else ""


if __name__ == "__main__":
    stage(Path(sys.argv[1]))
