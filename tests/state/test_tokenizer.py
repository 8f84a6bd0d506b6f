"""The files of a tokenizer: real ones of each library, made here from a few sentences and read back by that library."""

from __future__ import annotations

import base64
import io
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sentencepiece
import tiktoken
import tokenizers

from resilience.errors import StoreError, UnsupportedStateError
from resilience.state import tokenizer as module
from resilience.state.tokenizer import tokenizer_files

SENTENCES = ["the quick brown fox jumps over the lazy dog", "a node was lost and a spare took its place"] * 20
TEXT = "the spare fox"
os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported


def files_of(tokenizer: Any) -> dict[str, bytes]:
    return {file.name: file.content for file in tokenizer_files(tokenizer)}


def put(folder: Path, files: Mapping[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture(scope="module")
def bpe() -> Any:
    made = tokenizers.ByteLevelBPETokenizer()
    made.train_from_iterator(SENTENCES, vocab_size=300, special_tokens=["<|end|>"], show_progress=False)
    return made


@pytest.fixture(scope="module")
def word_pieces() -> Any:
    made = tokenizers.BertWordPieceTokenizer()
    made.train_from_iterator(SENTENCES, vocab_size=120, show_progress=False)
    return made


@pytest.fixture(scope="module")
def sentence_pieces() -> Any:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES), model_writer=model, vocab_size=60, hard_vocab_limit=False, minloglevel=2
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


@pytest.fixture(scope="module")
def ranks() -> Any:
    merged = {bytes([byte]): byte for byte in range(256)} | {b"th": 256, b"the": 257}
    return tiktoken.Encoding(
        "mini", pat_str=r"\w+|\s+|[^\w\s]+", mergeable_ranks=merged, special_tokens={"<|end|>": 258}
    )


def test_a_hugging_face_tokenizer_is_loaded_back_by_transformers_from_its_files(bpe: Any, tmp_path: Path) -> None:
    import transformers  # seconds: only where it is needed

    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<|end|>")
    files = files_of(tokenizer)
    expected = {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt"}
    assert expected <= files.keys()
    assert json.loads(files["special_tokens_map.json"]) == {"eos_token": "<|end|>"}
    back = transformers.AutoTokenizer.from_pretrained(put(tmp_path, files))
    assert back(TEXT)["input_ids"] == tokenizer(TEXT)["input_ids"]
    assert back.eos_token == "<|end|>"


def test_a_hugging_face_bert_tokenizer_has_its_vocabulary_as_text(word_pieces: Any, tmp_path: Path) -> None:
    import transformers  # seconds: only where it is needed

    vocabulary = files_of(word_pieces)["vocab.txt"]
    tokenizer = transformers.BertTokenizer(str(put(tmp_path / "made", {"vocab.txt": vocabulary}) / "vocab.txt"))
    files = files_of(tokenizer)
    assert files["vocab.txt"] == vocabulary
    back = transformers.AutoTokenizer.from_pretrained(put(tmp_path / "back", files))
    assert back(TEXT)["input_ids"] == tokenizer(TEXT)["input_ids"]


def test_a_tokenizer_of_the_tokenizers_library_is_its_json_and_its_vocabulary(bpe: Any, tmp_path: Path) -> None:
    files = files_of(bpe._tokenizer)
    assert files == files_of(bpe)
    assert files.keys() == {"tokenizer.json", "vocab.json", "merges.txt"}
    back = tokenizers.Tokenizer.from_file(str(put(tmp_path, files) / "tokenizer.json"))
    assert back.encode(TEXT).ids == bpe.encode(TEXT).ids
    # As GPT-2's own tokenizers are built: from these two files.
    both = tokenizers.ByteLevelBPETokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
    assert both.encode(TEXT).ids == bpe.encode(TEXT).ids


def test_word_pieces_are_one_token_a_line(word_pieces: Any, tmp_path: Path) -> None:
    put(tmp_path, files_of(word_pieces))
    back = tokenizers.BertWordPieceTokenizer(str(tmp_path / "vocab.txt"))
    assert back.encode(TEXT, add_special_tokens=False).ids == word_pieces.encode(TEXT, add_special_tokens=False).ids


def test_sentence_pieces_are_one_model_file(sentence_pieces: Any, tmp_path: Path) -> None:
    files = files_of(sentence_pieces)
    assert files.keys() == {"tokenizer.model"}
    back = sentencepiece.SentencePieceProcessor(model_file=str(put(tmp_path, files) / "tokenizer.model"))
    assert back.encode(TEXT) == sentence_pieces.encode(TEXT)


def test_tiktoken_ranks_are_listed_with_pattern_and_special_tokens_so_that_it_can_be_built_again(ranks: Any) -> None:
    files = files_of(ranks)
    assert files.keys() == {"tokenizer.json", "tokenizer_config.json"}
    listed = json.loads(files["tokenizer.json"])
    assert [entry["rank"] for entry in listed] == list(range(258)), "by rank, as Megatron expects"
    assert listed[257] == {"rank": 257, "token_bytes": base64.b64encode(b"the").decode(), "token_str": "the"}
    config = json.loads(files["tokenizer_config.json"])
    merged = {base64.b64decode(entry["token_bytes"]): entry["rank"] for entry in listed}
    back = tiktoken.Encoding(
        "mini", pat_str=config["pattern"], mergeable_ranks=merged, special_tokens=config["special_tokens"]
    )
    text = f"{TEXT}<|end|>"
    assert back.encode(text, allowed_special="all") == ranks.encode(text, allowed_special="all")


@pytest.mark.parametrize("kind", ["bpe", "sentence_pieces", "ranks"])
def test_a_wrapper_is_looked_into(kind: str, request: pytest.FixtureRequest) -> None:
    inner = request.getfixturevalue(kind)
    library = SimpleNamespace(tokenizer=inner, vocab_file="/nowhere/vocab.json")  # as it was when it was loaded
    assert files_of(SimpleNamespace(_tokenizer=library)) == files_of(inner)


def test_megatrons_own_gpt2_and_bert_tokenizers_are_known_by_their_tables(bpe: Any, word_pieces: Any) -> None:
    files = files_of(bpe)
    table = json.loads(files["vocab.json"])
    pairs = [tuple(line.split()) for line in files["merges.txt"].decode().splitlines()[1:]]
    gpt2 = files_of(SimpleNamespace(encoder=table, bpe_ranks={pair: rank for rank, pair in enumerate(pairs)}))
    assert json.loads(gpt2["vocab.json"]) == table
    assert gpt2["merges.txt"].split() == files["merges.txt"].split()
    vocabulary = word_pieces.get_vocab()
    bert = SimpleNamespace(vocab=vocabulary, wordpiece_tokenizer=object())
    assert files_of(SimpleNamespace(tokenizer=bert)) == {"vocab.txt": files_of(word_pieces)["vocab.txt"]}
    vocabulary["later"] = max(vocabulary.values()) + 2
    with pytest.raises(UnsupportedStateError, match="without a gap"):
        tokenizer_files(bert)


def test_a_folder_gives_what_is_a_tokenizers_and_not_the_model_beside_it(tmp_path: Path) -> None:
    files = {"tokenizer.json": b"{}", "vocab.json": b"{}", "merges.txt": b"", "chat_template.jinja": b"x"}
    files |= {"additional_chat_templates/tool.jinja": b"y", "tokenizer.model": b"\0"}
    put(tmp_path, {**files, "model.safetensors": b"weights", "config.json": b"{}", "runs/vocab.json": b"{}"})
    os.symlink("/etc", tmp_path / "additional_chat_templates" / "etc")
    assert files_of(tmp_path) == files
    assert files_of(str(tmp_path)) == files


@pytest.mark.parametrize(
    ("name", "content", "called"),
    [
        ("llama.model", b"\x0a\x01", "tokenizer.model"),
        ("bert-large-cased-vocab.txt", b"[PAD]\n[UNK]\n", "vocab.txt"),
        ("gpt2-merges.txt", b"#version: 0.2\na b\n", "merges.txt"),
        ("fast.json", b'{"model": {"type": "BPE"}, "version": "1.0"}', "tokenizer.json"),
        ("ranks.vocab.json", b'[{"rank": 0, "token_bytes": "AA=="}]', "tokenizer.json"),
        ("o200k.tiktoken", b"AA== 0\n", "o200k.tiktoken"),
    ],
)
def test_a_file_is_called_by_what_it_holds(name: str, content: bytes, called: str, tmp_path: Path) -> None:
    assert files_of(put(tmp_path, {name: content}) / name) == {called: content}


def test_a_gpt2_vocabulary_brings_the_merges_beside_it(tmp_path: Path) -> None:
    put(tmp_path, {"gpt2-vocab.json": b'{"a": 0}', "gpt2-merges.txt": b"#version: 0.2\n"})
    expected = {"vocab.json": b'{"a": 0}', "merges.txt": b"#version: 0.2\n"}
    assert files_of(tmp_path / "gpt2-vocab.json") == expected
    paths = SimpleNamespace(vocab_file=str(tmp_path / "gpt2-vocab.json"), merge_file=tmp_path / "gpt2-merges.txt")
    assert files_of(paths) == expected


def test_what_is_no_tokenizer_is_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(
        UnsupportedStateError, match=r"builtins\.int is none that is known.*save_tokenizer_assets=False"
    ):
        tokenizer_files(7)
    with pytest.raises(UnsupportedStateError, match="holds no file of a tokenizer"):
        tokenizer_files(put(tmp_path, {"weights.bin": b""}))
    with pytest.raises(StoreError, match="names on a hub are not looked up"):
        tokenizer_files("gpt2-that-is-nowhere")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UnsupportedStateError, match="neither a file nor a folder"):
        tokenizer_files(tmp_path / "pipe")


def test_a_tokenizer_whose_own_code_fails_is_refused_in_words() -> None:
    class Broken:
        def save_pretrained(self, folder: str) -> None:
            raise RuntimeError("no vocabulary was loaded")

    with pytest.raises(UnsupportedStateError, match=r"Broken failed to tell its files .*no vocabulary was loaded"):
        tokenizer_files(Broken())


def test_impossible_names_and_sizes_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedStateError, match="no name below a folder"):
        module._checked({"../latest_train_state.pt": b""}, "tokenizer x")
    for name in ("/etc/passwd", "a//b", "a/..", "a\nb", "a\\b", "x" * 256, ""):
        assert not module._is_inner(name)
    put(tmp_path, {"tokenizer.json": b"12345678", "vocab.txt": b"1234"})
    monkeypatch.setattr(module, "_MAX_BYTES", 11)
    with pytest.raises(UnsupportedStateError, match="12 bytes"):
        tokenizer_files(tmp_path)
    monkeypatch.setattr(module, "_MAX_BYTES", 12)
    monkeypatch.setattr(module, "_MAX_FILES", 1)
    with pytest.raises(UnsupportedStateError, match="2 files"):
        tokenizer_files(tmp_path)
