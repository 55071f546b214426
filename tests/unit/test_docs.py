"""What the documentation says is what the code does, as far as a machine can compare them."""

from __future__ import annotations

import argparse
import ast
import asyncio
import code
import inspect
import json
import logging
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from django.core.cache.backends.base import DEFAULT_TIMEOUT
from django.core.management.base import BaseCommand
from django.dispatch import Signal

import django_pgnotify
from django_pgnotify import (
    caching,
    conf,
    consumers,
    exceptions,
    forwarding,
    signals,
    streams,
    testing,
)
from django_pgnotify.caching.options import _OWN
from django_pgnotify.conf import SETTINGS
from django_pgnotify.events import Event
from django_pgnotify.forwarding import plain_event
from django_pgnotify.management.caches import COLUMNS, HEADINGS
from django_pgnotify.management.commands import (
    pglisten,
    pgnotify_consumers,
    pgnotify_deadletters,
    pgnotify_prune,
    pgnotify_replay,
    pgnotify_status,
)
from django_pgnotify.registry import registry
from django_pgnotify.templatetags import pgnotify
from tests.snippets import DOCS, INSTRUCTIONS, ROOT, Snippet, pages, snippets

PACKAGE = ROOT / "django_pgnotify"
REFERENCE = DOCS / "reference"
README = (ROOT / "README.md").read_text(encoding="utf-8")


def page(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def section(text: str, heading: str) -> str:
    """What stands below a heading, up to the next one of the same or a higher level."""
    level = heading.partition(" ")[0]
    found = re.search(
        rf"^{re.escape(heading)}\n(.*?)(?=^#{{1,{len(level)}}} |\Z)", text, re.MULTILINE | re.DOTALL
    )
    assert found is not None, f"there is no heading {heading!r}"
    return found[1]


def first_column(text: str) -> list[str]:
    """The code in the first cell of each row of the tables in ``text``."""
    return re.findall(r"^\| `([^`]+)`", text, re.MULTILINE)


def source_of_package() -> str:
    return "\n".join(path.read_text(encoding="utf-8") for path in sorted(PACKAGE.rglob("*.py")))


# -- blocks -------------------------------------------------------------------------------------


@pytest.mark.parametrize("snippet", snippets(), ids=str)
def test_every_block_is_well_formed(snippet: Snippet) -> None:
    assert snippet.instruction in INSTRUCTIONS | {""}
    if snippet.language == "python":
        flags = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
        compile(snippet.source, str(snippet.path), "exec", flags=flags, dont_inherit=True)
    elif snippet.language == "json":
        json.loads(snippet.text)
    elif snippet.language == "toml":
        tomllib.loads(snippet.text)
    elif snippet.language == "console":
        assert snippet.commands


def test_what_runs_is_what_can_run() -> None:
    languages = {
        "run": "python", "test": "python", "shell": "python", "psql": "sql", "output": "text"
    }  # fmt: skip
    for snippet in snippets():
        expected = languages.get(snippet.instruction)
        assert expected in (None, snippet.language), snippet.place
        assert bool(snippet.argument) is (snippet.instruction in {"write", "append"}), snippet.place


def test_python_blocks_import_only_what_there_is() -> None:
    missing = [
        f"{snippet.place}: {node.module}.{alias.name}"
        for snippet in snippets()
        if snippet.language == "python"
        for node in ast.walk(ast.parse(snippet.source))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("django_pgnotify")
        for alias in node.names
        if not hasattr(sys.modules.get(node.module or "") or _import(node.module), alias.name)
    ]
    assert missing == []


def _import(name: str | None) -> Any:
    import importlib

    assert name is not None
    return importlib.import_module(name)


@pytest.mark.parametrize("snippet", [s for s in snippets() if s.instruction == "shell"], ids=str)
def test_what_is_typed_into_a_shell_can_be_pasted_into_one(snippet: Snippet) -> None:
    run: list[object] = []

    class Shell(code.InteractiveConsole):
        def runcode(self, code: object) -> None:
            run.append(code)

        def showsyntaxerror(self, *args: Any, **kwargs: Any) -> None:
            raise AssertionError(f"{snippet.place}: a shell wants an empty line after a block")

    shell = Shell()
    waits_for_more = [shell.push(line) for line in snippet.text.splitlines()][-1]
    assert run
    assert not waits_for_more


# -- links, words and versions --------------------------------------------------------------------


@pytest.mark.parametrize("path", pages(), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_relative_link_leads_somewhere(path: Path) -> None:
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    targets = [
        target.partition("#")[0]
        for target in re.findall(r"\]\(([^)\s]+)\)", text)
        if not re.match(r"[a-z]+:", target)
    ]
    assert [target for target in targets if target and not (path.parent / target).exists()] == []


@pytest.mark.parametrize("path", pages(), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_setting_that_a_page_names_exists(path: Path) -> None:
    named = set(re.findall(r"PGNOTIFY_[A-Z_]*[A-Z](?!\*|_)\b", path.read_text(encoding="utf-8")))
    assert named - set(SETTINGS) - {"PGNOTIFY_HEARTBEAT"} == set()


@pytest.mark.parametrize("path", pages(), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_option_of_a_command_that_a_page_names_exists(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for name in COMMANDS:
        named = {
            option
            for call in re.findall(rf"{name}((?: +(?:--)?[\w./-]+)*)", text)
            for option in re.findall(r"--[a-z-]+", call)
        }
        assert named <= set(own_options(name))


@pytest.mark.parametrize("path", pages(), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_make_target_that_a_page_names_exists(path: Path) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z][\w-]*):", makefile, re.MULTILINE))
    text = path.read_text(encoding="utf-8")
    assert set(re.findall(r"(?:\$ |`)make ([a-z][\w-]*)", text)) <= targets


def test_the_changelog_begins_with_the_version_of_the_code() -> None:
    versions = re.findall(
        r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert versions[0] == django_pgnotify.__version__


@pytest.mark.parametrize("path", [ROOT / "README.md", DOCS / "index.md"], ids=lambda p: p.name)
def test_the_status_names_the_version_of_the_code(path: Path) -> None:
    [named] = re.findall(r"Status: (?:version )?([\d.]+\d)", path.read_text(encoding="utf-8"))
    assert named == django_pgnotify.__version__


def test_python_and_django_of_the_readme_are_those_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    python = project["requires-python"].removeprefix(">=")
    [django] = [d.partition(">=")[2] for d in project["dependencies"] if d.startswith("django>=")]
    assert f"Python {python} or newer, Django {django} or newer" in README
    extras = set(
        re.findall(r"django-pgnotify\[([\w,]+)\]", "".join(p.read_text() for p in pages()))
    )
    assert {name for extra in extras for name in extra.split(",")} <= set(
        project["optional-dependencies"]
    )


# -- the public names ---------------------------------------------------------------------------


def test_the_readme_lists_what_the_package_exports() -> None:
    assert sorted(first_column(section(README, "## What there is"))) == django_pgnotify.__all__


def test_the_api_reference_has_every_public_name() -> None:
    documented = set(re.findall(r"^\.\. auto\w+:: (\S+)", page("reference/api.md"), re.MULTILINE))
    for names in (
        django_pgnotify.__all__,
        caching.__all__,
        testing.__all__,
        [name for name, _ in errors()],
    ):
        assert set(names) - documented == set()


def errors() -> list[tuple[str, type]]:
    return inspect.getmembers(exceptions, inspect.isclass)


SIGNATURE = re.compile(r"^(async )?(\w+)(\((?:[^\n]|\n    )*\))(?: -> (.+))?$", re.MULTILINE)


def signatures() -> dict[str, tuple[str, str, str]]:
    """What api.md says of each name: ``async`` or nothing, its parameters, what it returns."""
    blocks = re.findall(r"```text\n(.*?)```", page("reference/api.md"), re.DOTALL)
    return {
        name: (word.strip(), re.sub(r"\s+", " ", parameters), returns)
        for word, name, parameters, returns in SIGNATURE.findall("\n".join(blocks))
    }


def public(name: str) -> Any:
    places = (consumers, django_pgnotify, caching, forwarding, streams, testing)
    return next(getattr(place, name) for place in places if hasattr(place, name))


@pytest.mark.parametrize("name", sorted(signatures()))
def test_a_signature_of_the_api_reference_is_that_of_the_code(name: str) -> None:
    word, parameters, returns = signatures()[name]
    found = inspect.signature(public(name))
    bare = found.replace(
        parameters=[
            one.replace(annotation=one.empty)
            for one in found.parameters.values()
            if one.annotation != "Never"  # it is there for a better error
        ],
        return_annotation=found.empty,
    )
    assert parameters == str(bare).replace(repr(DEFAULT_TIMEOUT), "DEFAULT_TIMEOUT")
    assert returns in ("", found.return_annotation)
    assert (word == "async") is inspect.iscoroutinefunction(public(name))


def test_the_api_reference_has_the_signature_of_every_function_it_describes() -> None:
    described = re.findall(
        r"^\.\. autofunction:: (?:\S+\.)?(\w+)$", page("reference/api.md"), re.MULTILINE
    )
    assert set(described) - set(signatures()) == set()


def test_the_options_of_a_receiver_are_listed() -> None:
    options = set(inspect.signature(django_pgnotify.receiver).parameters) - {"source"}
    assert set(first_column(page("how-to/receivers.md"))) == options


def test_the_members_of_a_forwarded_message_are_listed() -> None:
    listed = section(page("how-to/channels.md"), "## 3. A consumer")
    named = {
        name
        for row in re.findall(r"^\| (`.*?) \|", listed, re.MULTILINE)
        for name in re.findall(r"`(\w+)`", row)
    }
    event = Event("1", "jobs", "published", None, None, None, None, "here:1", django_now())
    assert named == set(plain_event(event))


def django_now() -> Any:
    from django.utils import timezone

    return timezone.now()


def test_the_fixtures_of_the_pytest_plugin_are_listed() -> None:
    from django_pgnotify.testing import pytest_plugin

    fixtures = {name for name in vars(pytest_plugin) if name.startswith("pgnotify_")}
    assert set(first_column(section(page("how-to/testing.md"), "## With pytest"))) == fixtures


def test_the_pytest_plugin_is_installed_with_the_package() -> None:
    from django_pgnotify.testing import pytest_plugin

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["entry-points"]["pytest11"] == {"django_pgnotify": pytest_plugin.__name__}


# -- settings -------------------------------------------------------------------------------------

TYPES = {
    "_text": "text",
    "_text_or_empty": "text, may be empty, at most 24 bytes, without NUL",
    "_optional_text": "text or `None`",
    "_flag": "`True` or `False`",
    "_seconds": "seconds (number above 0)",
    "_optional_seconds": "seconds (number above 0) or `None`",
    "_count": "whole number, at least 1",
    "_models": "dict of dicts",
    "_table": '`"auto"`, an absolute path or `None`',
    "check_delivery": " or ".join(f'`"{name}"`' for name in conf.DELIVERIES),
}


def settings_reference() -> dict[str, tuple[str, str]]:
    entry = r"^### `(\w+)`\n\n- Type: (.+)\n- Default: (.+)\n\n\S"
    text = page("reference/settings.md")
    assert len(re.findall(r"^###", text, re.MULTILINE)) == len(
        re.findall(entry, text, re.MULTILINE)
    )
    return {name: (kind, default) for name, kind, default in re.findall(entry, text, re.MULTILINE)}


def test_the_settings_reference_is_complete() -> None:
    assert sorted(settings_reference()) == sorted(SETTINGS)


@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_a_setting_has_the_type_and_default_that_the_reference_says(name: str) -> None:
    setting = SETTINGS[name]
    kind, default = settings_reference()[name]
    assert kind == TYPES[setting._parse.__name__]
    if name == "PGNOTIFY_NODE":
        assert default == "the host name"
        return
    value = setting._default() if callable(setting._default) else setting._default
    documented = ast.literal_eval(default.strip("`"))
    assert documented == value
    assert type(documented) is type(value)


def test_the_options_of_a_model_are_listed() -> None:
    listed = first_column(page("how-to/third-party-models.md"))
    assert set(listed) == conf.MODEL_OPTIONS


# -- commands -------------------------------------------------------------------------------------


COMMANDS = {
    "pglisten": pglisten.Command,
    "pgnotify_consumers": pgnotify_consumers.Command,
    "pgnotify_deadletters": pgnotify_deadletters.Command,
    "pgnotify_prune": pgnotify_prune.Command,
    "pgnotify_replay": pgnotify_replay.Command,
    "pgnotify_status": pgnotify_status.Command,
}


def own_options(name: str) -> dict[str, argparse.Action]:
    """The options of a command that not every command has."""
    parser = COMMANDS[name]().create_parser("manage.py", name)
    inherited = BaseCommand().create_parser("manage.py", name)
    common = {option for action in inherited._actions for option in action.option_strings}
    return {
        option: action
        for action in parser._actions
        for option in action.option_strings
        if option not in common
    }


def test_every_command_is_documented() -> None:
    folder = PACKAGE / "management" / "commands"
    names = {path.stem for path in folder.glob("*.py")} - {"__init__"}
    assert names == set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_the_commands_reference_lists_each_option_and_its_argument(name: str) -> None:
    text = section(page("reference/commands.md"), f"## `manage.py {name}`")
    documented = [entry for entry in first_column(text) if entry.startswith("--")]
    assert sorted(documented) == sorted(
        option if action.nargs == 0 else f"{option} {action.metavar}"
        for option, action in own_options(name).items()
    )


def test_the_commands_reference_lists_the_members_of_the_health_file() -> None:
    from django_pgnotify.dispatching.service import Service

    async def status() -> dict[str, Any]:
        service = Service("default", topics=["jobs"])
        assert await service.dispatcher.drain(1.0)
        return service.status()

    with registry.isolated():
        members = set(asyncio.run(status()))
    text = section(page("reference/commands.md"), "### The health file")
    assert set(first_column(text)) == members
    [example] = [json.loads(block) for block in re.findall(r"```json\n(.*?)```", text, re.DOTALL)]
    assert set(example) == members


def test_the_columns_of_the_status_are_shown() -> None:
    text = section(page("reference/commands.md"), "## `manage.py pgnotify_status`")
    [line] = re.findall(r"^NODE .*$", text, re.MULTILINE)
    assert tuple(re.split(r" {2,}", line)) == pgnotify_status._HEADINGS
    shown = section(page("how-to/cache.md"), "## See what it does")
    [line] = re.findall(r"^CACHE .*$", shown, re.MULTILINE)
    assert tuple(re.split(r" {2,}", line)) == HEADINGS
    assert set(first_column(shown)) == {name for _, name in COLUMNS}


def test_the_options_of_a_near_cache_are_listed() -> None:
    listed = section(page("how-to/cache.md"), "## A near cache")
    named = {
        name
        for row in re.findall(r"^\| (`.*?) \|", listed, re.MULTILINE)
        for name in re.findall(r"`([A-Z_]+)`", row)
    }
    assert named == {*_OWN, "MAX_ENTRIES", "CULL_FREQUENCY"}


def test_the_options_of_the_cached_tag_are_listed() -> None:
    listed = first_column(section(page("how-to/cache.md"), "## Fragments of templates"))
    assert listed == [f"{option}=" for option in pgnotify.OPTIONS]


# -- checks, loggers, signals, counters -----------------------------------------------------------


def test_the_checks_reference_lists_every_check() -> None:
    raised = set(re.findall(r'id="(pgnotify\.[EW]\d{3})"', source_of_package()))
    documented = first_column(page("reference/checks.md"))
    assert len(documented) == len(set(documented))
    assert set(documented) == raised


def test_the_summary_of_the_checks_module_lists_every_check() -> None:
    from django_pgnotify import checks

    assert checks.__doc__ is not None
    summary = re.findall(r"^([EW]\d{3}) ", checks.__doc__, re.MULTILINE)
    assert [f"pgnotify.{number}" for number in summary] == sorted(
        first_column(page("reference/checks.md"))
    )


def test_every_logger_is_listed() -> None:
    used = set(re.findall(r'getLogger\("([\w.]+)"\)', source_of_package()))
    text = section(page("reference/logging-and-signals.md"), "## Loggers")
    assert set(first_column(text)) == used


def test_every_level_that_a_logger_uses_is_listed() -> None:
    calls = {"exception": "ERROR"} | {
        name.lower(): name for name in ("DEBUG", "INFO", "WARNING", "ERROR")
    }
    used: dict[str, set[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        source = path.read_text(encoding="utf-8")
        for logger in re.findall(r'getLogger\("([\w.]+)"\)', source):
            names = re.findall(r"logger\.(\w+)\(", source)
            used.setdefault(logger, set()).update(calls[name] for name in names)
    listed: dict[str, set[str]] = {}
    current = ""
    text = section(page("reference/logging-and-signals.md"), "## Loggers")
    for name, level in re.findall(r"^\| (?:`([\w.]+)`)? ?\| ([A-Z]+) \|", text, re.MULTILINE):
        current = name or current
        listed.setdefault(current, set()).add(level)
        assert hasattr(logging, level)
    # What is said at INFO about a single event or a shutdown is of interest to nobody else.
    assert {name: levels - {"INFO", "DEBUG"} for name, levels in used.items()} == {
        name: levels - {"INFO", "DEBUG"} for name, levels in listed.items()
    }


def test_every_signal_is_listed_with_its_arguments() -> None:
    declared = {name for name, value in vars(signals).items() if isinstance(value, Signal)}
    text = section(page("reference/logging-and-signals.md"), "## Signals")
    assert set(first_column(text)) == declared
    sent: dict[str, set[str]] = {}
    for call in ast.walk(ast.parse(source_of_package())):
        if isinstance(call, ast.Call) and ast.unparse(call.func).startswith("signals."):
            _, name, _ = ast.unparse(call.func).split(".")
            sent.setdefault(name, set()).update(str(keyword.arg) for keyword in call.keywords)
    for name in declared:
        row = re.search(rf"^\| `{name}` \|[^|]*\|([^|]*)\|", text, re.MULTILINE)
        assert row is not None
        assert set(re.findall(r"`(\w+)`", row[1])) - {"None"} == sent[name]


def test_every_counter_is_listed() -> None:
    text = section(page("reference/logging-and-signals.md"), "## Counters")
    used = set(re.findall(r'tats\.add\(\s*"(\w+)"', source_of_package()))
    used |= {"failed", "retried"}  # chosen by an expression
    assert set(first_column(text)) == used


# -- the build ------------------------------------------------------------------------------------


def test_the_documentation_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("furo")
    pytest.importorskip("myst_parser")
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", "-W", "-q", "-b", "html",
         "-d", str(tmp_path / "doctrees"), str(DOCS), str(tmp_path / "html")],
        check=False, capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "html" / "index.html").exists()
