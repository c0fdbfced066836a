"""What every command takes and how its help looks; completion, the schema, and older names."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from mpq.cli import COMMANDS, cli, main
from mpq.cli.everywhere import RENAMED
from mpq.errors import PolicyError
from mpq.policy import Policy


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_help_fits_80_columns_and_lists_what_every_command_takes(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.get_terminal_size", lambda *_: os.terminal_size((200, 50)))
    done = CliRunner().invoke(cli, [*([name] if name else []), "--help"])
    assert done.exit_code == 0, done.output
    assert max(map(len, done.output.splitlines())) <= 80
    wanted = ["-q, --quiet", "-v, --verbose", *(["--threads"] if name else ["Exit codes: 0 done"])]
    assert [option for option in wanted if option not in done.output] == []


def test_help_is_quick_and_imports_no_command() -> None:
    def seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "mpq", "--help"], check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(seconds() for _ in range(3)) < 0.3


def test_quiet_and_verbose_stand_before_or_after_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs/a").mkdir(parents=True)
    Path("runs/a/policy.yaml").write_text(Policy.uniform(8).to_yaml())
    for argv in (["-q", "report"], ["report", "-q"], ["report", "--quiet", "--json"]):
        assert main(argv) == 0
        assert capsys.readouterr().err == ""
    assert main(["report"]) == 0  # one that is quiet does not silence the next
    assert "no run named: using runs/a" in capsys.readouterr().err
    assert main(["report", "-q", "nothing"]) == 2
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize("name", RENAMED)
def test_older_names_of_options_are_taken_with_a_note(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for old, new in RENAMED[name].items():
        assert main([name, f"{old}=none"]) == 2
        said = capsys.readouterr().err
        assert f"note: {old} is called {new} now\n" in said
        assert new == "--from" or f"Invalid value for '{new}'" in said


OF_EACH_COMMAND = {
    ("recipe", "default"): "what is trained: a float network, or a quantized one",
    ("num_test", "type"): "export may verify on none, which is 0",
    ("metric", "multiple"): "analyze takes one to score layers by, and one of the task",
    ("epochs", "default"): "of a recipe, but rank trains each architecture for as many",
    ("effective_bits", "multiple"): "analyze writes a policy for each, rank compares at one",
    ("effective_bits", "type"): "likewise: a number, or a list of them",
    ("effective_bits", "default"): "likewise",
    ("out", "default"): "train and ensemble write one file, which has a name",
}
"""What may differ between options of one name, and why."""


def test_options_of_one_name_are_one_option() -> None:
    known: dict[str, tuple[str, dict[str, object]]] = {}
    for name in COMMANDS:
        command = cli.get_command(click.Context(cli), name)
        assert command is not None
        for param in command.params:
            if not isinstance(param, click.Option):
                continue
            whole = param.to_info_dict()
            facts = {key: whole[key] for key in ("name", "default", "type", "is_flag", "multiple")}
            first, seen = known.setdefault(param.opts[0], (name, facts))
            told = {k: (seen[k], facts[k]) for k in facts if (param.name, k) not in OF_EACH_COMMAND}
            assert not {k: v for k, v in told.items() if v[0] != v[1]}, (param.opts[0], first, name)
    assert {name for name in known if name.startswith("--num-")} == {"--num-calib", "--num-test"}


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    assert "_MPQ_COMPLETE" in capsys.readouterr().out


def test_a_shell_is_told_the_commands_that_begin_so() -> None:
    env = {**os.environ, "_MPQ_COMPLETE": "bash_complete", "COMP_WORDS": "mpq c", "COMP_CWORD": "1"}
    done = subprocess.run(
        [sys.executable, "-c", "from mpq.cli import main; main()"],
        env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    names = sorted(line.partition(",")[2] for line in done.stdout.splitlines())
    assert names == sorted(name for name in COMMANDS if name.startswith("c"))


def test_the_schema_knows_what_a_policy_may_say(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert schema["properties"].keys() == Policy.model_fields.keys()
    entry = schema["$defs"]["LayerPolicy"]["properties"]["weight"]["anyOf"][0]
    for text in ("int4/channel", "uint8/dynamic", "float"):
        assert re.search(entry["pattern"], text)
    for text in ("int9/channel", "int4", "int8/dynamic"):
        assert not re.search(entry["pattern"], text)
        with pytest.raises(PolicyError):
            Policy.uniform(8).replace(default={"weight": text, "activation": "float"})
