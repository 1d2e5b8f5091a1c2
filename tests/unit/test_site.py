"""What all runs of a user share: asked for once, in a file of their own, below configurations."""

from __future__ import annotations

import errno
import importlib
import json
import os
import pty
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from fake_slurm import SEVEN_B, FakeSlurm, options, submitted

from job.common.config import load_config
from job.common.errors import InputError, run_command
from job.common.nested import filled, to_dict
from job.common.schema import CriticConfig
from slurm.checks import check
from slurm.plan import Plan, describe, make_plan, write_config
from slurm.record import Record
from slurm.site import SiteConfig, find_site, site_file, write_site
from slurm.submission import PROJECT

GAPS = """
run: {name: own, dir: runs/own}
model:
  path: ???
data:
  train: ???
  validation: null
"""
SETUP = "or once, for all your runs:\n  python slurm/submit.py init"
Submit = Callable[..., tuple[int, str, str]]


ROW = '{"prompt": "1+1=", "response": "2", "reward": 1, "is_correct": 1, "ok": true}\n'


@pytest.fixture
def here(tmp_path: Path, slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a trunk, data, an image and a home, in which submit.py is called."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CONFIG_HOME")
    Path("home").mkdir()
    for name in ("trunk", "other"):
        Path(name).mkdir()
        Path(name, "params.json").write_text(json.dumps(SEVEN_B))
    for name in ("train.jsonl", "val.jsonl", "critic.sif"):
        Path(name).write_text(ROW)
    Path("gaps.yaml").write_text(GAPS)
    return tmp_path


@pytest.fixture
def own(here: Path) -> Path:
    """Where the user's own site file is."""
    return here / "home" / ".config" / "critic-job" / "site.yaml"


def _write(file: Path, **changes: Any) -> Path:
    """A site file beside the trunk and the data, with some entries changed."""
    base = Path.cwd()
    data = {"train": f"{base}/train.jsonl", "validation": f"{base}/val.jsonl"}
    content: dict[str, Any] = {"model": {"path": f"{base}/trunk"}, "data": data}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(content | changes))
    return file


def _config(**asked: Any) -> CriticConfig:
    (run,) = make_plan(options(**asked)).runs
    return run.config


@pytest.fixture
def submit(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Submit:
    """The command without a terminal: its code, stdout and stderr."""
    monkeypatch.setattr(sys, "path", ["", *sys.path])  # of which it replaces the first
    main = importlib.import_module("slurm.commands").main
    with Path(os.devnull).open() as nothing:
        monkeypatch.setattr(sys, "stdin", nothing)

        def called(*arguments: str) -> tuple[int, str, str]:
            code = 0
            try:
                run_command(lambda: main(arguments))
            except SystemExit as ending:
                code = int(ending.code or 0)
            return code, *capsys.readouterr()

        yield called


# Filling


@pytest.mark.parametrize(
    ("tree", "whole"),
    [
        ({}, {"a": {"b": 1, "c": 2}, "d": 3}),
        ({"a": None, "d": "???"}, {"a": {"b": 1, "c": 2}, "d": 3}),
        ({"a": {"b": None, "c": "???"}}, {"a": {"b": 1, "c": 2}, "d": 3}),
        ({"a": {"b": 0, "e": None}}, {"a": {"b": 0, "c": 2, "e": None}, "d": 3}),
        ({"a": 5, "d": False, "f": "???"}, {"a": 5, "d": False, "f": "???"}),
        ({"d": {"x": 1}}, {"a": {"b": 1, "c": 2}, "d": {"x": 1}}),
    ],
)
def test_null_and_missing_are_gaps_and_all_else_is_kept(
    tree: dict[str, Any], whole: dict[str, Any]
) -> None:
    below = {"a": {"b": 1, "c": 2}, "d": 3}
    assert filled(tree, below) == whole
    assert below == {"a": {"b": 1, "c": 2}, "d": 3}


# Precedence


def test_the_shipped_configurations_take_what_the_site_has(here: Path, own: Path) -> None:
    _write(own, mlflow={"tracking_uri": "http://mlflow:5000"}, cluster="a100-40gb")
    for gpus, batch_size in ((1, 16), (4, 64)):
        plan = make_plan(options(gpus=gpus, unfreeze=[4]))
        config = plan.runs[0].config
        assert config.model.path == f"{here}/trunk"
        assert config.data.train == f"{here}/train.jsonl"
        assert config.data.validation == f"{here}/val.jsonl"
        assert config.mlflow.tracking_uri == "http://mlflow:5000"
        assert (config.training.batch_size, config.data.max_length) == (batch_size, 2048)
        assert plan.submission.cluster == "a100-40gb"
        assert describe(plan)["site"] == str(own)


def test_the_file_goes_before_the_site_and_overrides_before_the_file(here: Path, own: Path) -> None:
    _write(own, mlflow={"tracking_uri": "of-site"})
    text = "{run: {name: own, dir: runs/own}, model: {path: other}, mlflow: {tracking_uri: null}}"
    Path("own.yaml").write_text(text)
    config = _config(config="own.yaml")
    assert (config.model.path, config.mlflow.tracking_uri) == (f"{here}/other", "of-site")
    asked = ["mlflow.tracking_uri=of-override", "model.path=third", "data.train=x.jsonl"]
    config = _config(config="own.yaml", override=asked)
    assert (config.model.path, config.mlflow.tracking_uri) == (f"{here}/third", "of-override")
    assert config.data.train == f"{here}/x.jsonl"
    assert config.data.validation == f"{here}/val.jsonl"


def test_null_in_an_override_takes_a_value_of_the_site_away(own: Path) -> None:
    _write(own, mlflow={"tracking_uri": "of-site"})
    asked = ["mlflow.tracking_uri=null"]
    assert _config(config="gaps.yaml", override=asked).mlflow.tracking_uri is None


def test_fields_and_template_are_those_of_the_sites_own_data(here: Path, own: Path) -> None:
    data = {"train": f"{here}/train.jsonl", "validation": f"{here}/val.jsonl"}
    _write(own, data=data | {"fields": {"prompt": "q", "reward": "r"}, "template": "chat"})
    config = _config(config="gaps.yaml", override=["data.fields.reward=label"])
    assert config.data.fields == {"prompt": "q", "reward": "label"}
    assert config.data.template == "chat"
    local = _config(config=str(PROJECT / "configs/critic/critic_local.yaml"))
    assert (local.data.train, local.data.fields, local.data.template) == ("embedded", None, None)


@pytest.mark.parametrize(
    ("of_site", "asked", "image"),
    [
        (None, None, "profile.sif"),
        ("critic.sif", None, "critic.sif"),
        ("none", None, None),
        ("critic.sif", "other.sif", "other.sif"),
        ("critic.sif", "none", None),
    ],
)
def test_the_sites_image_and_cluster_are_defaults_of_the_options(
    here: Path, own: Path, of_site: str | None, asked: str | None, image: str | None
) -> None:
    profile = here / "profile.yaml"
    profile.write_text("{gpu: {memory_gb: 85, per_node: 4}, image: profile.sif}")
    whole = f"{here}/{of_site}" if of_site == "critic.sif" else of_site
    _write(own, cluster=str(profile), image=whole)
    plan = make_plan(options(image=asked))
    assert plan.submission.cluster == str(profile)
    assert plan.submission.image == (None if image is None else f"{here}/{image}")
    assert make_plan(options(cluster="localhost")).submission.cluster == "localhost"


def test_what_is_stored_is_resolved(here: Path, own: Path) -> None:
    _write(own)
    (run,) = make_plan(options(config="gaps.yaml")).runs
    write_config(run)
    own.unlink()
    stored = load_config(CriticConfig, Record(run.folder).config)
    assert stored == run.config
    assert stored.model.path == f"{here}/trunk"


# Which file


def test_two_users_of_one_checkout_have_a_file_each(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {}
    for user, trunk in (("ada", "trunk"), ("bob", "other")):
        monkeypatch.setenv("HOME", str(here / user))
        _write(site_file(None) or here, model={"path": f"{here}/{trunk}"})
        found[user] = site_file(None)
    assert found == {name: here / name / ".config/critic-job/site.yaml" for name in ("ada", "bob")}
    for user, trunk in (("ada", "trunk"), ("bob", "other")):
        monkeypatch.setenv("HOME", str(here / user))
        assert _config(config="gaps.yaml").model.path == f"{here}/{trunk}"


def test_an_option_goes_before_the_variable_and_that_before_the_users_own(
    here: Path, own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert site_file(None) == own
    monkeypatch.setenv("XDG_CONFIG_HOME", "relative")
    assert site_file(None) == own
    monkeypatch.setenv("XDG_CONFIG_HOME", str(here / "xdg"))
    assert site_file(None) == here / "xdg" / "critic-job" / "site.yaml"
    monkeypatch.setenv("CRITIC_SITE", "named.yaml")
    assert site_file(None) == here / "named.yaml"
    assert site_file("asked.yaml") == here / "asked.yaml"
    monkeypatch.setenv("CRITIC_SITE", "")
    monkeypatch.delenv("XDG_CONFIG_HOME")
    monkeypatch.delenv("HOME")
    assert site_file(None) is None
    _write(here / "asked.yaml")
    assert _config(site="asked.yaml", config="gaps.yaml").model.path == f"{here}/trunk"


def test_without_a_site_what_is_missing_is_said_with_the_line_that_sets_it_up(here: Path) -> None:
    with pytest.raises(InputError) as refused:
        make_plan(options(gpus=4, unfreeze=[4]))
    text = str(refused.value)
    assert (
        "no value for data.train, data.validation, model.path; give one in the file or with "
        in (text)
    )
    assert text.endswith(f"--override data.train=VALUE\n{SETUP}")


def test_a_site_that_lacks_something_is_said_so_too(here: Path, own: Path) -> None:
    _write(own, data={"train": f"{here}/train.jsonl"})
    with pytest.raises(InputError, match=r"no value for data.validation; give one") as refused:
        make_plan(options(gpus=4))
    assert str(refused.value).endswith(SETUP)


def test_what_no_site_can_give_is_said_without_it(here: Path, own: Path) -> None:
    Path("nameless.yaml").write_text("{run: {dir: runs/own}}")
    _write(own)
    with pytest.raises(InputError, match=r"no value for run.name") as refused:
        make_plan(options(config="nameless.yaml"))
    assert "init" not in str(refused.value)


def test_without_a_home_a_file_must_be_named(
    here: Path, monkeypatch: pytest.MonkeyPatch, submit: Submit
) -> None:
    monkeypatch.delenv("HOME")
    with pytest.raises(InputError, match=r"HOME is not set; name one with --site FILE or CRITIC_S"):
        make_plan(options())
    code, out, err = submit("init", "--trunk", "trunk")
    assert (code, out) == (78, "")
    assert err == "error: HOME is not set: name the site file with --site FILE or CRITIC_SITE\n"
    monkeypatch.setenv("CRITIC_SITE", str(_write(here / "cron.yaml")))
    assert _config(config="gaps.yaml").model.path == f"{here}/trunk"


def test_a_home_of_another_user_is_no_error(
    here: Path, own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(own))

    monkeypatch.setattr(Path, "stat", refused)
    assert find_site(None).file is None


def test_an_empty_file_says_nothing(here: Path, own: Path) -> None:
    _write(own)
    with pytest.raises(InputError, match="no value for"):
        make_plan(options(site=os.devnull))


# Bad files


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"trunk": "/t"},
            r"site.yaml: 1 key\(s\) do not fit\n  trunk: unknown key .*valid here: m",
        ),
        ({"data": {"trian": "/t"}}, r"site.yaml: .*\n  data.trian: unknown key \(nearest: train"),
        ({"data": {"train": ["/t"]}}, "site.yaml: data.train: "),
        ({"model": "/trunk"}, "site.yaml: .*\n  model: a section with path; not '/trunk'"),
        ({"image": {"file": "a"}}, "site.yaml: .*\n  image: a single value, not the section"),
        (
            {"model": {"path": "trunk"}},
            "site.yaml: impossible site\n  model.path: 'trunk' is no w",
        ),
        ({"image": "critic.sif"}, "site.yaml: impossible site\n  image: 'critic.sif' is no w"),
        (
            {"cluster": "mine.yaml"},
            "site.yaml: impossible site\n  cluster: 'mine.yaml' is no w",
        ),
        (
            {"cluster": "mine"},
            "site.yaml: cluster mine: no file .*; there are a100-40gb",
        ),
        ({"data": {"fields": "alpac"}}, "site.yaml: .*\n  data.fields: unknown preset 'alpac'"),
        ({"data": {"template": "{a}"}}, "site.yaml: .*\n  data.template: '{a}' is neither"),
    ],
)
def test_a_bad_file_is_said_with_its_key(
    here: Path, own: Path, changes: dict[str, Any], message: str
) -> None:
    _write(own, **changes)
    with pytest.raises(InputError, match=message):
        make_plan(options())


def test_a_named_file_that_is_not_there_is_an_error(here: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere.yaml: cannot read the configuration: No such"):
        make_plan(options(site="nowhere.yaml"))


def _errors(plan: Plan) -> list[str]:
    return [one.text for one in check(plan) if one.name == "files" and one.state == "error"]


@pytest.mark.slow
def test_a_path_that_leads_nowhere_is_said_with_file_and_key_where_it_is_used(
    here: Path, own: Path
) -> None:
    data = {"train": f"{here}/gone.jsonl", "validation": f"{here}/val.jsonl"}
    _write(own, data=data, image=f"{here}/gone.sif")
    reason = f"{here}/gone.jsonl: cannot read the data: No such file or directory"
    assert _errors(make_plan(options())) == [
        f"{own}: data.train: {reason}",
        f"{own}: image: cannot read {here}/gone.sif",
    ]
    another = make_plan(options(override=["data.train=train.jsonl"], image="none"))
    assert _errors(another) == []
    of_option = make_plan(options(override=["data.train=none.jsonl"], image="none"))
    assert _errors(of_option)[0].startswith(f"data.train: {here}/none.jsonl: ")


# The commands


@pytest.mark.slow
def test_a_dry_run_says_which_file_it_used(own: Path, submit: Submit) -> None:
    _write(own)
    code, _, err = submit("--gpus", "4", "--unfreeze", "4", "--dry-run")
    assert code == 0, err
    assert str(own) in "".join(line.removeprefix(" " * 31).strip() for line in err.splitlines())
    code, out, _ = submit("--gpus", "4", "--unfreeze", "4", "--dry-run", "--json")
    assert (code, json.loads(out)["site"]) == (0, str(own))


def test_a_run_is_resumed_without_the_file(here: Path, own: Path, submit: Submit) -> None:
    given = [f"model.path={here}/trunk", "data.train=train.jsonl", "data.validation=val.jsonl"]
    submitted(here / "runs" / "mine", given)
    own.parent.mkdir(parents=True)
    own.write_text("{broken")
    plan = make_plan(options(resume="runs/mine"))
    assert (plan.site.file, describe(plan)["site"]) == (None, None)
    assert plan.submission.cluster == "a100-80gb"
    code, _, err = submit("--resume", "runs/mine", "--site", "any.yaml")
    assert code == 78
    assert "--resume goes on with the run's own configuration, not --site" in err


def test_without_a_terminal_all_that_is_needed_must_be_given(own: Path, submit: Submit) -> None:
    code, out, err = submit("init", "--train", "train.jsonl", "--image", "none")
    assert (code, out) == (78, "")
    assert err == "error: no terminal to ask on: --trunk, --validation must be given\n"
    assert not own.parent.exists()


NEEDED = ("--trunk", "trunk", "--train", "train.jsonl", "--validation", "val.jsonl")


def test_options_alone_set_a_site_up(here: Path, own: Path, submit: Submit) -> None:
    profile = here / "mine.yaml"
    profile.write_text("{gpu: {memory_gb: 85, per_node: 4}}")
    more = ("--cluster", "mine.yaml", "--image", "critic.sif", "--tracking-uri", "http://m:5000")
    described = ("--fields", "{reward: is_correct}", "--template", "{prompt}\n{response}")
    code, out, err = submit("init", *NEEDED, *more, *described)
    assert (code, out) == (0, ""), err
    assert yaml.safe_load(own.read_text()) == {
        "model": {"path": f"{here}/trunk"},
        "data": {
            "train": f"{here}/train.jsonl",
            "validation": f"{here}/val.jsonl",
            "fields": {"reward": "is_correct"},
            "template": "{prompt}\n{response}",
        },
        "mlflow": {"tracking_uri": "http://m:5000"},
        "cluster": str(profile),
        "image": f"{here}/critic.sif",
    }
    assert f"written: {own}" in err
    assert list(own.parent.iterdir()) == [own]
    config = _config(gpus=4, unfreeze=[4])
    assert config.data.template == "{prompt}\n{response}"
    assert to_dict(config)["training"]["num_unfrozen_layers"] == 4


def test_what_nobody_says_is_left_to_the_profile(own: Path, submit: Submit) -> None:
    assert submit("init", *NEEDED)[0] == 0
    content = yaml.safe_load(own.read_text())
    assert content["cluster"] == "a100-80gb"
    assert content.keys() == {"model", "data", "cluster"}
    assert content["data"].keys() == {"train", "validation"}


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--trunk", "home", "--trunk: HERE/home: cannot read the model: "),
        ("--trunk", "val.jsonl", "--trunk: HERE/val.jsonl: cannot read the model: Not a directory"),
        ("--train", "gone.jsonl", "--train: HERE/gone.jsonl: cannot read the data: No such file"),
        ("--validation", "critic.sif", "--validation: HERE/critic.sif: unknown kind of data file"),
        ("--validation", "embedded", "  data.train and data.validation: both embedded or neither"),
        ("--fields", "{reward", "--fields: {reward: write {prompt: NAME, response: NAME"),
        ("--fields", "{rewards: a}", "--fields: data.fields.rewards: unknown field; valid: prompt"),
        ("--template", "Q", "--template: data.template: 'Q' is neither chat nor a chat template"),
        ("--cluster", "mine", "--cluster: profile mine: no file "),
        ("--image", "gone.sif", "--image: cannot read HERE/gone.sif"),
    ],
)
def test_what_is_wrong_is_said_and_nothing_written(
    here: Path, own: Path, submit: Submit, option: str, value: str, message: str
) -> None:
    code, out, err = submit("init", *NEEDED, option, value)
    assert (code, out) == (78, "")
    assert message.replace("HERE", str(here)) in err
    assert not own.exists()


@pytest.mark.parametrize("answer", ["none", "{prompt: question}", "alpaca"])
def test_fields_that_the_data_do_not_have_are_refused(
    here: Path, own: Path, submit: Submit, answer: str
) -> None:
    (here / "val.jsonl").write_text('{"query": "1+1=", "response": "2", "reward": 1}\n')
    code, out, err = submit("init", *NEEDED, "--fields", answer)
    file = "train" if answer != "none" else "val"
    assert (code, out) == (78, "")
    assert err.startswith(f"error: --fields: {here}/{file}.jsonl:1: field ")
    assert "is missing; the row has" in err
    assert not own.exists()


def test_a_file_that_is_there_is_changed_only_when_asked_to(
    here: Path, own: Path, submit: Submit
) -> None:
    _write(own, cluster="a100-40gb")
    before = own.read_bytes()
    code, _, err = submit("init", *NEEDED, "--image", "none")
    assert (code, err) == (78, f"error: {own}: is there already; --force changes it\n")
    assert own.read_bytes() == before
    code, _, err = submit("init", "--force", "--trunk", "other", "--image", "none")
    assert code == 0, err
    content = yaml.safe_load(own.read_text())
    assert (content["model"]["path"], content["image"]) == (f"{here}/other", "none")
    assert (content["cluster"], content["data"]["train"]) == ("a100-40gb", f"{here}/train.jsonl")


def test_the_checkout_keeps_no_site(submit: Submit) -> None:
    file = PROJECT / "configs" / "site.yaml"
    code, _, err = submit("init", *NEEDED, "--site", str(file))
    assert code == 78
    assert err.startswith(f"error: {file}: in the checkout, which others may use; choose another")
    assert not file.exists()


def test_a_folder_that_cannot_be_made_is_said(here: Path, submit: Submit) -> None:
    code, _, err = submit("init", *NEEDED, "--site", "val.jsonl/site.yaml")
    assert code == 78
    assert err == f"error: {here}/val.jsonl/site.yaml: cannot write: File exists\n"


def test_the_file_behind_a_link_is_written(here: Path) -> None:
    (here / "link.yaml").symlink_to(here / "dotfiles.yaml")
    write_site(here / "link.yaml", SiteConfig(cluster="a100-40gb"))
    assert (here / "link.yaml").is_symlink()
    assert find_site("dotfiles.yaml").values.cluster == "a100-40gb"


# On a terminal


def _on_terminal(*arguments: str, answers: list[str]) -> tuple[int, str]:
    """Call submit.py as a person would, who answers whenever it has asked."""
    command = [sys.executable, str(PROJECT / "slurm" / "submit.py"), *arguments]
    child, terminal = pty.fork()
    if not child:
        os.execv(sys.executable, command)
    said, left = b"", [f"{answer}\n".encode() for answer in answers]
    while part := _read(terminal):
        said += part
        if said.endswith(b": "):
            os.write(terminal, left.pop(0) if left else b"\x04")
    os.close(terminal)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return code, said.decode().replace("\r\n", "\n")


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 4096)
    except OSError:  # the other end is closed
        return b""


@pytest.mark.slow
def test_a_person_is_asked_until_the_answers_are_good(here: Path, own: Path) -> None:
    answers = ["", "nowhere", "trunk", "~/../train.jsonl", "", "val.jsonl", "{prompt: q}", ""]
    code, said = _on_terminal("init", answers=[*answers, "a100-40gb", "critic.sif"])
    assert code == 0, said
    assert f"{here}/nowhere: cannot read the model: No such file or directory" in said
    assert "cluster profile, a name or a file [a100-80gb]: a100-40gb\n" in said
    assert said.count("trunk, the folder of a language model: ") == 3
    assert said.count("validation data, a file: ") == 2
    assert "train.jsonl:1: field 'q' is missing; the row has 'prompt', 'response'" in said
    assert said.count("their fields, ") == 2
    content = yaml.safe_load(own.read_text())
    assert content == {
        "model": {"path": f"{here}/trunk"},
        "data": {"train": f"{here}/home/../train.jsonl", "validation": f"{here}/val.jsonl"},
        "cluster": "a100-40gb",
        "image": f"{here}/critic.sif",
    }


@pytest.mark.slow
def test_what_is_there_is_the_default_and_options_are_not_asked_for(here: Path, own: Path) -> None:
    data = {"train": f"{here}/train.jsonl", "validation": f"{here}/val.jsonl"}
    described = {"fields": {"reward": "ok"}, "template": "chat"}
    _write(own, data=data | described, image="none")
    code, said = _on_terminal("init", "--trunk", "other", answers=["y", "", "", "", "", ""])
    assert code == 0, said
    assert f"{own} is there already; change it? [y/N]: y\n" in said
    assert f"training data, a file [{here}/train.jsonl]: \n" in said
    assert 'or none [{"reward": "ok"}]: \n' in said
    assert "trunk, the folder" not in said
    assert "template" not in said.partition("written")[0]
    content = yaml.safe_load(own.read_text())
    assert content["model"]["path"] == f"{here}/other"
    assert content["data"] == data | described
    assert content["image"] == "none"


@pytest.mark.slow
def test_a_person_may_leave_it_as_it_is(here: Path, own: Path) -> None:
    before = _write(own).read_bytes()
    code, said = _on_terminal("init", answers=[""])
    assert (code, own.read_bytes()) == (0, before)
    assert f"{own} stays as it is" in said


@pytest.mark.slow
@pytest.mark.parametrize("leave", ["\x03", "\x04"], ids=["interrupt", "end of file"])
def test_who_leaves_before_the_end_leaves_nothing(here: Path, own: Path, leave: str) -> None:
    code, said = _on_terminal("init", answers=["trunk", leave])
    assert code == 78, said
    assert "error: left before the end" in said
    assert "Traceback" not in said
    assert not own.exists()
