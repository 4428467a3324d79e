"""Hooks: what a text names, and what identifies its content."""

from __future__ import annotations

import sys

import pytest

from hv_batch.job.hooks.hook import HookUnavailableError, describe_hook, parse_hook


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "mark.py"
    path.write_text("print('{}')")
    return path


def test_a_text_is_an_import_path_or_a_command():
    assert parse_hook("studio.hooks:mark").is_function
    assert parse_hook("python 'my mark.py' --level 3").arguments == ("python", "my mark.py", "--level", "3")
    assert parse_hook("./mark").arguments == ("./mark",)


@pytest.mark.parametrize("text", ["", "  ", "python 'mark.py", "a\0b"])
def test_a_text_that_names_nothing_is_refused(text):
    with pytest.raises(ValueError, match="command line"):
        parse_hook(text)


def test_the_content_of_every_file_of_a_command_is_identified(script):
    """P3: an edited script is another hook, although its command line is the same."""
    hook = parse_hook(f"{sys.executable} {script} --level 3")
    before = describe_hook(hook)
    assert before == describe_hook(hook)
    script.write_text("print('{ }')")
    assert describe_hook(hook)["name"] == before["name"]
    assert describe_hook(hook)["sha256"] != before["sha256"]


def test_the_source_of_a_function_is_identified_without_importing_it(tmp_path, monkeypatch):
    (tmp_path / "studio_hooks.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    hook = parse_hook("studio_hooks:mark")
    before = describe_hook(hook)
    (tmp_path / "studio_hooks.py").write_text("def mark(path, sample): ...")
    assert describe_hook(hook)["sha256"] != before["sha256"]
    assert "studio_hooks" not in sys.modules


def test_a_hook_that_does_not_exist_is_named(tmp_path):
    """P6: found before a GPU is taken."""
    (tmp_path / "plain").write_text("")
    for text, problem in {
        "no_such_program --x": "the program no_such_program does not exist",
        str(tmp_path / "plain"): "is not executable",
        "no_such_module.hooks:mark": "no_such_module",
    }.items():
        with pytest.raises(HookUnavailableError, match=problem):
            describe_hook(parse_hook(text))


def test_the_name_has_no_secrets():
    hook = parse_hook(f"{sys.executable} https://user:pa55@host/mark?token=abc")
    assert "pa55" not in describe_hook(hook)["name"]
    assert "abc" not in describe_hook(hook)["name"]
