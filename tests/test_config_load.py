"""Settings come from a file, the environment and the command line; what is wrong there is refused by its name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resilience.config import CheckpointConfig, ResiliencyConfig, load_config, override_from_env
from resilience.config.setting import Setting, settings_of
from resilience.errors import ConfigError

ALL_SETTINGS = [*settings_of(CheckpointConfig), *settings_of(ResiliencyConfig)]


# ---------------------------------------------------------------- sources


def yaml_file(directory: Path, text: str) -> Path:
    path = directory / "train.yaml"
    path.write_text(text)
    return path


def test_without_sources_there_are_the_defaults() -> None:
    assert load_config(env={}) == (CheckpointConfig(), ResiliencyConfig())


def test_the_command_line_wins_over_the_environment_and_that_over_the_file(tmp_path: Path) -> None:
    path = yaml_file(
        tmp_path, "checkpoint: {save: s, save_interval: 1, ckpt_step: 1, load: l}\nresiliency: {keep_last: 1}"
    )
    env = {"RESILIENCE_CHECKPOINT__SAVE_INTERVAL": "2", "RESILIENCE_CHECKPOINT__CKPT_STEP": "2", "PATH": "/bin"}
    checkpoint, resiliency = load_config(path, env, ["--checkpoint.ckpt_step", "3", "--resiliency.keep_last=3"])
    assert checkpoint == CheckpointConfig(save="s", load="l", save_interval=2, ckpt_step=3)
    assert resiliency == ResiliencyConfig(keep_last=3)


def test_rules_across_fields_look_at_the_sum_of_all_sources(tmp_path: Path) -> None:
    path = yaml_file(tmp_path, "checkpoint:\n  async_save: true\n")
    assert load_config(path, {"RESILIENCE_CHECKPOINT__SAVE": "s"})[0].async_save
    with pytest.raises(ConfigError, match="async_save"):
        load_config(path, {})


def test_an_empty_file_or_section_sets_nothing(tmp_path: Path) -> None:
    for text in ("", "# nothing\n", "checkpoint:\n", "checkpoint: {}\nresiliency:\n"):
        assert load_config(yaml_file(tmp_path, text), {}) == (CheckpointConfig(), ResiliencyConfig())


def test_yaml_values_are_what_they_look_like(tmp_path: Path) -> None:
    text = """
    checkpoint: {save: s, load: null, non_persistent_ckpt_type: None, replication: false, save_interval: 0010}
    resiliency: {verify_load: off, exchange_timeout_s: 1e2, term_grace_s: .5, run_id: "12", node_id: n1}
    """
    checkpoint, resiliency = load_config(yaml_file(tmp_path, text), {})
    assert checkpoint == CheckpointConfig(save="s", save_interval=10)
    assert resiliency == ResiliencyConfig(
        verify_load="off", exchange_timeout_s=100, term_grace_s=0.5, run_id="12", node_id="n1"
    )


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            "checkpoint: {save_intervall: 5}",
            r"checkpoint\.save_intervall is no setting\. Did you mean checkpoint\.save_int",
        ),
        ("checkpoint: {keep_last: 5}", r"Did you mean resiliency\.keep_last\?"),
        ("checkpoint: {qqqqqqq: 5}", r"configuration\.md lists all"),
        ("checkpoint: {3: 5}", r"checkpoint\.3 is no setting"),
        ("checkpoints: {save: s}", r"checkpoints is no section\. Did you mean checkpoint\?"),
        ("train_iters: 5", r"train_iters is no section\. The sections are checkpoint and resiliency"),
        ("[1, 2]", r"expected the sections"),
        ("checkpoint: 5", r"section checkpoint must hold"),
        ("checkpoint: {save: s, save: t}", r"line 1: save is given twice"),
        ("checkpoint: {save: s}\ncheckpoint: {load: s}", r"line 2: checkpoint is given twice"),
        (
            "checkpoint: {replication: yes}",
            r"replication: given 'yes' \(str\) \(from .*train\.yaml\), allowed is true or fal",
        ),
        ("checkpoint: {save_interval: '5'}", r"save_interval: given '5' \(str\)"),
        ("checkpoint: {replication_jump: None}", r"replication_jump: given 'None' \(str\).*null"),
        ("resiliency: {run_id: 12}", r"run_id: given 12 \(int\)"),
        ("checkpoint: {save_interval: !!int x}", r"not YAML"),
        ("checkpoint: !!python/object/apply:os.getcwd []", r"not YAML"),
        ("checkpoint: {[1]: 2}", r"not YAML"),
        ("checkpoint: {", r"not YAML"),
    ],
)
def test_a_wrong_file_is_refused_in_words(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        load_config(yaml_file(tmp_path, text), {})
    assert "train.yaml" in str(caught.value)


def test_a_file_that_is_not_there_or_not_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: the configuration cannot be read"):
        load_config(tmp_path / "none.yaml", {})
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not YAML"):
        load_config(tmp_path / "binary.yaml", {})


@pytest.mark.parametrize(
    ("variable", "text", "says"),
    [
        ("RESILIENCE_CHECKPOINT__SAVEINTERVAL", "3", "Did you mean RESILIENCE_CHECKPOINT__SAVE_INTERVAL?"),
        ("RESILIENCE_CHEKPOINT__SAVE", "s", "Did you mean RESILIENCE_CHECKPOINT__SAVE?"),
        ("RESILIENCE_CHECKPOINT__KEEP_LAST", "3", "Did you mean RESILIENCE_RESILIENCY__KEEP_LAST?"),
        ("RESILIENCE_CHECKPOINT__save", "s", "Did you mean RESILIENCE_CHECKPOINT__SAVE?"),
        ("RESILIENCE_CHECKPOINT__", "s", "is no setting"),
        ("RESILIENCE_CHECKPOINT__SAVE_INTERVAL", "ten", "(from RESILIENCE_CHECKPOINT__SAVE_INTERVAL)"),
        ("RESILIENCE_CHECKPOINT__SAVE_INTERVAL", "1.0", "given '1.0' (str)"),
        ("RESILIENCE_CHECKPOINT__SAVE_INTERVAL", "9" * 5000, "allowed is a whole number"),
        ("RESILIENCE_CHECKPOINT__SAVE", "", "given '' (str)"),
        ("RESILIENCE_CHECKPOINT__REPLICATION", "maybe", "true or false"),
        ("RESILIENCE_RESILIENCY__TERM_GRACE_S", "nan", "allowed is a number"),
        ("RESILIENCE_RESILIENCY__KEEP_LAST", "null", "given 'null'"),
    ],
)
def test_a_wrong_variable_is_refused_by_name(variable: str, text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(says)) as caught:
        load_config(env={variable: text})
    assert variable in str(caught.value)


def test_variables_that_are_no_settings_are_left_alone() -> None:
    env = {"RESILIENCE_NODE_ID": "n", "RESILIENCE_DRILL": "1", "OTHER__SAVE": "s", "XRESILIENCE_CHECKPOINT__A": "b"}
    assert load_config(env=env) == (CheckpointConfig(), ResiliencyConfig())


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--checkpoint.sav", "s"], "Did you mean --checkpoint.save?"),
        (["--checkpoint.sav=s"], "--checkpoint.sav is no setting"),
        (["--save_interval", "5"], "Did you mean --checkpoint.save_interval?"),
        (["--resiliency.save_interval", "5"], "Did you mean --checkpoint.save_interval?"),
        (["stray"], "unrecognized arguments: stray"),
        (["--checkpoint.save"], "expected one argument"),
        (["--checkpoint.save_interval", "a"], "(from --checkpoint.save_interval)"),
    ],
)
def test_a_wrong_command_line_is_refused_in_words(args: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(says)):
        load_config(env={}, args=args)


def test_a_switch_needs_no_value_and_null_unsets(tmp_path: Path) -> None:
    path = yaml_file(tmp_path, "checkpoint: {save: s, load: l}\nresiliency: {hang_timeout_s: 5}")
    args = ["--checkpoint.async_save", "--checkpoint.load", "null", "--resiliency.hang_timeout_s", "None"]
    checkpoint, resiliency = load_config(path, {}, args)
    assert checkpoint == CheckpointConfig(save="s", async_save=True)
    assert resiliency == ResiliencyConfig()


def valid_values(entry: Setting) -> st.SearchStrategy[object]:
    values: st.SearchStrategy[object]
    if entry.choices:
        values = st.sampled_from(entry.choices)
    elif entry.kind is bool:
        values = st.booleans()
    elif entry.kind is int:
        values = st.integers(2, 2**62)
    elif entry.kind is float:
        values = st.floats(1e-9, 1e12)
    else:
        values = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,20}", fullmatch=True).filter(
            lambda text: text.lower() not in ("null", "none")
        )
    return values | st.none() if entry.optional else values


@given(st.data())
def test_what_is_written_as_text_reads_as_the_value_from_environment_and_command_line(data: st.DataObject) -> None:
    entry = data.draw(st.sampled_from(ALL_SETTINGS))
    value = data.draw(valid_values(entry))
    text = "null" if value is None else str(value)
    assert entry.from_text(text, "here") == entry.check(value)
    assert type(entry.from_text(text, "here")) is type(entry.check(value))


@given(st.text(max_size=30))
def test_any_text_is_read_or_refused_as_a_configuration_error(text: str) -> None:
    for entry in ALL_SETTINGS:
        try:
            value = entry.from_text(text, "here")
        except ConfigError:
            continue
        assert entry.check(value) == value


# ---------------------------------------------------------------- the drill's overrides


def test_in_a_drill_the_environment_wins_over_code_and_says_so() -> None:
    given_in_code = CheckpointConfig(save="s", save_interval=10), ResiliencyConfig(keep_last=4)
    env = {
        "RESILIENCE_CHECKPOINT__SAVE_INTERVAL": "20",
        "RESILIENCE_CHECKPOINT__SAVE": "s",
        "RESILIENCE_RESILIENCY__EVENTS": "events",
    }
    checkpoint, resiliency, changed = override_from_env(*given_in_code, env)
    assert checkpoint == CheckpointConfig(save="s", save_interval=20)
    assert resiliency == ResiliencyConfig(keep_last=4, events="events")
    assert [str(change) for change in changed] == [
        "checkpoint.save_interval: 10 was given in code, 20 is used (RESILIENCE_CHECKPOINT__SAVE_INTERVAL)",
        "resiliency.events: None was given in code, 'events' is used (RESILIENCE_RESILIENCY__EVENTS)",
    ]
    assert given_in_code == (CheckpointConfig(save="s", save_interval=10), ResiliencyConfig(keep_last=4))


def test_a_drill_that_sets_what_code_gave_or_nothing_changes_nothing() -> None:
    checkpoint, resiliency = CheckpointConfig(save="s"), ResiliencyConfig()
    env = {"RESILIENCE_CHECKPOINT__SAVE": "s", "RESILIENCE_CHECKPOINT__NON_PERSISTENT_CKPT_TYPE": "None"}
    assert override_from_env(checkpoint, resiliency, env) == (checkpoint, resiliency, [])
    assert override_from_env(checkpoint, resiliency, {"PATH": "/bin"}) == (checkpoint, resiliency, [])


def test_fields_that_need_each_other_may_be_overridden_at_once() -> None:
    env = {
        "RESILIENCE_CHECKPOINT__NON_PERSISTENT_CKPT_TYPE": "in_memory",
        "RESILIENCE_CHECKPOINT__NON_PERSISTENT_SAVE_INTERVAL": "5",
    }
    checkpoint, _, changed = override_from_env(CheckpointConfig(), ResiliencyConfig(), env)
    assert checkpoint == CheckpointConfig(non_persistent_ckpt_type="in_memory", non_persistent_save_interval=5)
    assert len(changed) == 2


def test_what_the_environment_overrides_must_still_fit_what_code_gave() -> None:
    with pytest.raises(ConfigError, match="replication"):
        override_from_env(CheckpointConfig(), ResiliencyConfig(), {"RESILIENCE_CHECKPOINT__REPLICATION": "true"})
