"""A tokenizer that a job has lies in its checkpoints, whole: the library that made it loads it from there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tokenizers import ByteLevelBPETokenizer

from resilience.errors import CorruptCopyError
from resilience.formats.registry import open_checkpoint
from resilience.stores.filesystem import PosixFileSystem
from tests.formats.jobs import Job

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported
TEXT = "the spare takes its place"


def test_transformers_loads_the_tokenizer_out_of_a_checkpoint(tmp_path: Path) -> None:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator([TEXT] * 9, vocab_size=280, special_tokens=["<|end|>"], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, eos_token="<|end|>")
    Job(tmp_path / "save", trainer_arguments={"tokenizer": tokenizer}).run(2)
    folder = tmp_path / "save" / "iter_0000002"
    assert {path.name for path in (folder / "tokenizer").iterdir()} == {
        *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt"),
    }
    back = AutoTokenizer.from_pretrained(folder / "tokenizer")
    assert back(TEXT)["input_ids"] == tokenizer(TEXT)["input_ids"]
    (folder / "tokenizer" / "merges.txt").write_bytes(b"#version: 0.2\n")
    with pytest.raises(CorruptCopyError, match=r"tokenizer/merges\.txt"):
        open_checkpoint(folder, PosixFileSystem()).verify()


def test_a_path_does_for_a_tokenizer_and_none_is_stored_where_none_is_wanted(tmp_path: Path) -> None:
    (tmp_path / "llama.model").write_bytes(b"\x0a\x01a")
    arguments = {"tokenizer": str(tmp_path / "llama.model")}
    Job(tmp_path / "save", trainer_arguments=arguments).run(2)
    assert (tmp_path / "save" / "iter_0000002" / "tokenizer" / "tokenizer.model").read_bytes() == b"\x0a\x01a"
    Job(tmp_path / "other", trainer_arguments=arguments, options={"save_tokenizer_assets": False}).run(2)
    assert not (tmp_path / "other" / "iter_0000002" / "tokenizer").exists()
