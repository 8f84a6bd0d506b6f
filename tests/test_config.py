"""The configurations hold exactly the documented fields, and refuse in words what is wrong, alone and together."""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resilience.config import CheckpointConfig, ResiliencyConfig
from resilience.config.setting import Setting, settings_of
from resilience.errors import ConfigError

STRICTNESS = (
    "assume_ok_unexpected",
    "log_unexpected",
    "log_all",
    "raise_unexpected",
    "raise_all",
    "return_unexpected",
    "return_all",
    "ignore_all",
)
#: Name → (type as the source document writes it, default). The document's tables, copied by hand.
CHECKPOINT_FIELDS: dict[str, tuple[str, object]] = {
    "save": ("Optional[str]", None),
    "save_interval": ("Optional[int]", None),
    "save_optim": ("bool", True),
    "save_rng": ("bool", True),
    "save_tokenizer_assets": ("bool", True),
    "async_save": ("bool", False),
    "load": ("Optional[str]", None),
    "load_optim": ("bool", True),
    "load_rng": ("bool", True),
    "load_main_params_from_ckpt": ("bool", False),
    "ckpt_step": ("Optional[int]", None),
    "exit_on_missing_checkpoint": ("bool", False),
    "dist_ckpt_strictness": ("Literal[...]", "assume_ok_unexpected"),
    "pretrained_checkpoint": ("Optional[str]", None),
    "ckpt_format": ('Literal["torch_dist", "zarr", "fsdp_dtensor"]', "torch_dist"),
    "fully_parallel_save": ("bool", True),
    "fully_parallel_load": ("bool", False),
    "ckpt_assume_constant_structure": ("bool", False),
    "non_persistent_save_interval": ("Optional[int]", None),
    "non_persistent_ckpt_type": ('Optional[Literal["global", "local", "in_memory", "None"]]', None),
    "non_persistent_global_ckpt_dir": ("Optional[str]", None),
    "non_persistent_local_ckpt_dir": ("Optional[str]", None),
    "non_persistent_local_ckpt_algo": ('Literal["fully_parallel", "atomic"]', "fully_parallel"),
    "replication": ("bool", False),
    "replication_jump": ("Optional[int]", None),
    "replication_factor": ("int", 2),
    "dist_ckpt_optim_fully_reshardable": ("bool", False),
    "distrib_optim_fully_reshardable_mem_efficient": ("bool", False),
}
RESILIENCY_DEFAULTS: dict[str, object] = {
    "run_id": None,
    "fork_id": None,
    "node_id": None,
    "failure_domain": None,
    "memory_dir": None,
    "keep_last": 2,
    "keep_persistent": None,
    "keep_after_success": False,
    "snapshot_mode": "eager",
    "non_persistent_sync": False,
    "redundancy": "replica",
    "on_save_failure": "warn",
    "on_no_usable_save": "stop",
    "verify_load": "digest",
    "max_restarts_without_progress": 3,
    "elastic": True,
    "cadence": "fixed",
    "mtbf_hours": None,
    "replication_bytes_per_s": None,
    "exchange_timeout_s": 120,
    "hang_timeout_s": None,
    "term_grace_s": 20,
    "stop_before_s": None,
    "events": None,
    "metrics": None,
    "secret_env": None,
}
#: The page says "at least": what was added since.
ADDED_DEFAULTS: dict[str, object] = {"save_frozen": True, "replicas_from": "network", "ft_launcher": False}
RESILIENCY_CHOICES = {
    "snapshot_mode": ("eager", "overlapped"),
    "redundancy": ("replica", "xor", "rs"),
    "on_save_failure": ("warn", "raise"),
    "on_no_usable_save": ("stop", "fresh"),
    "verify_load": ("digest", "off"),
    "cadence": ("fixed", "auto"),
    "replicas_from": ("network", "live"),
}
REPLICATED: dict[str, Any] = {
    "non_persistent_ckpt_type": "local",
    "non_persistent_save_interval": 5,
    "non_persistent_local_ckpt_dir": "/node",
    "replication": True,
}
ALL_SETTINGS = [*settings_of(CheckpointConfig), *settings_of(ResiliencyConfig)]


def setting_named(name: str) -> Setting:
    return next(entry for entry in ALL_SETTINGS if entry.name == name)


def written_as_in_the_document(entry: Setting) -> str:
    choices = "..." if entry.name == "dist_ckpt_strictness" else ", ".join(f'"{choice}"' for choice in entry.choices)
    kind = f"Literal[{choices}]" if entry.choices else entry.kind.__name__
    return f"Optional[{kind}]" if entry.optional else kind


# ---------------------------------------------------------------- fields


def test_checkpoint_config_has_exactly_the_documents_fields_types_and_defaults() -> None:
    found = {entry.name: (written_as_in_the_document(entry), entry.default) for entry in settings_of(CheckpointConfig)}
    assert found == CHECKPOINT_FIELDS
    assert list(found) == list(CHECKPOINT_FIELDS), "in the document's order"
    assert setting_named("dist_ckpt_strictness").choices == STRICTNESS


def test_resiliency_config_has_every_field_of_the_interface_page() -> None:
    config = ResiliencyConfig()
    found = {entry.name: getattr(config, entry.name) for entry in dataclasses.fields(config)}
    assert found == RESILIENCY_DEFAULTS | ADDED_DEFAULTS
    for name, choices in RESILIENCY_CHOICES.items():
        assert setting_named(name).choices == choices


def test_the_hand_made_copy_agrees_with_the_source_documents_tables(repository: Path) -> None:
    document = repository.parent / "shared" / "design" / "megatron-bridge-checkpointing.md"
    if not document.exists():
        pytest.skip("the source document is not beside this checkout; the hand-made copy of its tables is tested")
    rows = re.findall(r"^\| `(\w+)` \| `(.+?)` \| `(.+?)` \|", document.read_text(), flags=re.MULTILINE)
    read = {name: (kind, {"None": None, "True": True, "False": False}.get(value, value)) for name, kind, value in rows}
    read = {name: (kind, value.strip('"') if isinstance(value, str) else value) for name, (kind, value) in read.items()}
    read["replication_factor"] = ("int", int(str(read["replication_factor"][1])))
    assert read == CHECKPOINT_FIELDS
    strictness = re.findall(r"^- \*\*`(\w+)`\*\*: .*(?:keys|mismatch)", document.read_text(), flags=re.MULTILINE)
    assert tuple(strictness) == STRICTNESS


def test_the_hand_made_copy_agrees_with_the_interface_pages_table(repository: Path) -> None:
    page = repository.parent / "shared" / "design" / "interface.md"
    if not page.exists():
        pytest.skip("the interface page is not beside this checkout; the hand-made copy of its table is tested")
    section = page.read_text().split("`ResiliencyConfig` has what is ours", 1)[1].split("Both are dataclasses", 1)[0]
    read: dict[str, str] = {}
    for names, default in re.findall(r"^\| (`.+?`) \| `(.+?)` \|", section, flags=re.MULTILINE):
        read.update(dict.fromkeys(re.findall(r"`(\w+)`", names), default))
    assert read == {
        name: f'"{default}"' if isinstance(default, str) else str(default)
        for name, default in RESILIENCY_DEFAULTS.items()
    }


def test_the_attributes_can_be_told_by_their_annotations() -> None:
    for config in (CheckpointConfig, ResiliencyConfig):
        hints = get_type_hints(config)
        for entry in settings_of(config):
            assert (NoneType in get_args(hints[entry.name])) == entry.optional


# ---------------------------------------------------------------- one field


def wrong_values(entry: Setting) -> list[object]:
    if entry.choices:
        return ["", "nonsense", entry.choices[0].upper(), 1, True]
    if entry.kind is bool:
        return [0, 1, "true", None, 1.0]
    if entry.kind is str:
        return ["", " ", "a\0b", 3, True, b"bytes", ["list"]]
    wrong: list[object] = ["5", True, False, -1, [1], 2**64, -(10**400)]
    return [*wrong, 1.0, 0.5] if entry.kind is int else [*wrong, float("nan"), float("inf"), 10**400]


@pytest.mark.parametrize("entry", ALL_SETTINGS, ids=lambda entry: entry.key)
def test_a_wrong_value_is_refused_with_field_value_and_what_is_allowed(entry: Setting) -> None:
    config: Any = CheckpointConfig if entry.section == "checkpoint" else ResiliencyConfig
    for value in [*wrong_values(entry), *([] if entry.optional else [None])]:
        with pytest.raises(ConfigError) as caught:
            config(**{entry.name: value})
        message = str(caught.value)
        assert entry.key in message
        assert entry.allowed in message
        assert ("null" if value is None else repr(value)) in message


def test_a_config_error_is_a_value_error() -> None:
    with pytest.raises(ValueError, match=r"checkpoint\.save_interval"):
        CheckpointConfig(save_interval=0)


@pytest.mark.parametrize("name", ["save_interval", "non_persistent_save_interval", "replication_jump"])
def test_intervals_and_jump_start_at_one(name: str) -> None:
    for value in (0, -1):
        fields: dict[str, Any] = {name: value}
        with pytest.raises(ConfigError, match="at least 1"):
            CheckpointConfig(**fields)


def test_iteration_zero_may_be_asked_for() -> None:
    assert CheckpointConfig(load="ckpt", ckpt_step=0).ckpt_step == 0


def test_directories_may_be_paths_and_are_kept_as_text(tmp_path: Path) -> None:
    config = CheckpointConfig(save=tmp_path, load=tmp_path)  # type: ignore[arg-type]
    assert config.save == str(tmp_path)
    assert config.load == str(tmp_path)
    assert ResiliencyConfig(events=tmp_path).events == str(tmp_path)  # type: ignore[arg-type]


def test_a_path_of_bytes_is_refused() -> None:
    class BytesPath(os.PathLike[bytes]):
        def __fspath__(self) -> bytes:
            return b"ckpt"

    with pytest.raises(ConfigError, match=r"checkpoint\.save"):
        CheckpointConfig(save=BytesPath())  # type: ignore[arg-type]


def test_a_name_is_no_path() -> None:
    with pytest.raises(ConfigError, match="run_id"):
        ResiliencyConfig(run_id=Path("run"))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["run_id", "node_id", "fork_id"])
@pytest.mark.parametrize("value", ["..", ".hidden", "a/b", "a\\b", "a b", "a\n", "ä", "x" * 129, "a:b"])
def test_a_name_that_is_no_safe_file_name_is_refused(name: str, value: str) -> None:
    fields: dict[str, Any] = {name: value}
    with pytest.raises(ConfigError, match=name):
        ResiliencyConfig(**fields)


@given(st.from_regex(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}", fullmatch=True))
def test_every_safe_name_is_accepted_and_kept(name: str) -> None:
    assert ResiliencyConfig(run_id=name, node_id=name, fork_id=name).run_id == name


@given(st.text(max_size=200))
def test_no_accepted_name_can_leave_its_directory(name: str) -> None:
    try:
        ResiliencyConfig(run_id=name)
    except ConfigError:
        return
    assert os.path.normpath(os.path.join("/root-of-run", name)) == f"/root-of-run/{name}"
    assert not name.startswith(".")
    assert len(os.fsencode(name)) <= 128


# ---------------------------------------------------------------- fields of one configuration


@pytest.mark.parametrize(
    ("given_fields", "field", "needed"),
    [
        ({"async_save": True}, "async_save", "directory in save"),
        ({"async_save": True, "save": "s", "ckpt_format": "zarr"}, "async_save", "torch_dist"),
        ({"ckpt_step": 5}, "ckpt_step", "in load"),
        ({"ckpt_step": 5, "save": "s"}, "ckpt_step", "in load"),
        ({"load_main_params_from_ckpt": True}, "load_main_params_from_ckpt", "load_optim=False"),
        ({"non_persistent_ckpt_type": "in_memory"}, "non_persistent_ckpt_type", "non_persistent_save_interval"),
        ({"non_persistent_save_interval": 5}, "non_persistent_save_interval", "non_persistent_ckpt_type"),
        (
            {"non_persistent_save_interval": 5, "non_persistent_ckpt_type": "None"},
            "non_persistent_save_interval",
            "non_persistent_ckpt_type",
        ),
        (
            {"non_persistent_ckpt_type": "local", "non_persistent_save_interval": 5},
            "non_persistent_ckpt_type",
            "non_persistent_local_ckpt_dir",
        ),
        (
            {"non_persistent_ckpt_type": "global", "non_persistent_save_interval": 5},
            "non_persistent_ckpt_type",
            "non_persistent_global_ckpt_dir or in save",
        ),
        (
            {
                "non_persistent_ckpt_type": "global",
                "non_persistent_save_interval": 5,
                "save": "s",
                "non_persistent_global_ckpt_dir": "./s/",
            },
            "non_persistent_global_ckpt_dir",
            "must not be save itself",
        ),
        ({"replication": True}, "replication", '"local" or "in_memory"'),
        (
            {
                "replication": True,
                "non_persistent_ckpt_type": "global",
                "non_persistent_save_interval": 5,
                "save": "s",
            },
            "replication",
            '"local" or "in_memory"',
        ),
        ({**REPLICATED, "replication_factor": 1}, "replication_factor", "at least 2"),
    ],
)
def test_fields_that_need_each_other(given_fields: dict[str, Any], field: str, needed: str) -> None:
    with pytest.raises(ConfigError, match=rf"^checkpoint\.{field}: given .*{re.escape(needed)}"):
        CheckpointConfig(**given_fields)


@pytest.mark.parametrize(
    "given_fields",
    [
        {"async_save": True, "save": "s"},
        {"ckpt_step": 5, "load": "l"},
        {"load_main_params_from_ckpt": True, "load_optim": False},
        {"non_persistent_ckpt_type": "in_memory", "non_persistent_save_interval": 5, "replication": True},
        {"non_persistent_ckpt_type": "global", "non_persistent_save_interval": 5, "save": "s"},
        {
            "non_persistent_ckpt_type": "global",
            "non_persistent_save_interval": 5,
            "non_persistent_global_ckpt_dir": "g",
        },
        {**REPLICATED, "replication_factor": 3, "replication_jump": 8},
        {"replication_factor": 1},
        {"distrib_optim_fully_reshardable_mem_efficient": True},
        {"non_persistent_ckpt_type": "None"},
    ],
)
def test_fields_that_fit_are_accepted(given_fields: dict[str, Any]) -> None:
    config = CheckpointConfig(**given_fields)
    kept = {name: None if value == "None" else value for name, value in given_fields.items()}
    assert {name: getattr(config, name) for name in given_fields} == kept


def test_the_type_none_as_text_means_that_there_is_none() -> None:
    assert CheckpointConfig(non_persistent_ckpt_type="None") == CheckpointConfig(non_persistent_ckpt_type=None)


def test_replacing_a_field_checks_again() -> None:
    config = CheckpointConfig(save="s", async_save=True)
    with pytest.raises(ConfigError, match="async_save"):
        dataclasses.replace(config, save=None)
