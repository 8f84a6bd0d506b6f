"""What every format of persistent checkpoints must keep to, shown on a real disk with ranks that are threads.

class TestMine(FormatContract):
    def form(self) -> CheckpointFormat:
        return Mine()
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch

from resilience.errors import CorruptCopyError, LayoutMismatchError, MissingKeysError, ResilienceError, SaveFailedError
from resilience.formats.protocol import CheckpointFormat, CheckpointReader, Chunk, RankShare, SaveMeta, Target
from resilience.stores.filesystem import PosixFileSystem
from resilience.testing.ranks import ThreadAgreements, on_all_ranks

__all__ = ["DTYPES", "FormatContract"]

_WORLD: Final = 3
_ITERATION: Final = 7
_ROWS: Final = ((0, 3), (3, 4), (4, 11))  # of the large tensor, by rank
#: Those that every format stores.
DTYPES: Final = (
    torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn, torch.int64, torch.int32,
    torch.int16, torch.uint8, torch.int8, torch.bool, torch.complex64, torch.uint16,
)  # fmt: skip
_KEY, _TWIN, _OWN = "model/0/embedding.weight", "model/0/head.weight", "rng/torch"


def _large(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Every byte of it says where it is."""
    count = 11 * 5
    if dtype == torch.bool:
        return (torch.arange(count) % 3 == 0).view(11, 5)
    return torch.arange(count).to(torch.float32).to(dtype).view(11, 5)


def _dtype_key(dtype: torch.dtype) -> str:
    return f"model/0/of.{str(dtype).removeprefix('torch.')}"


def _rows(key: str, tensor: torch.Tensor, rank: int) -> Chunk:
    start, stop = _ROWS[rank]
    return Chunk(key, tensor[start:stop].clone(), tuple(tensor.shape), (start, 0), False)


def _whole(key: str, tensor: torch.Tensor, *, per_rank: bool = False) -> Chunk:
    return Chunk(key, tensor, tuple(tensor.shape), (0,) * tensor.dim(), per_rank)


def _share(rank: int) -> RankShare:
    chunks = [_rows(_KEY, _large(), rank), _rows("optimizer/0/state/embedding.weight/exp_avg", -_large(), rank)]
    chunks.append(_whole(_OWN, torch.full((9,), rank, dtype=torch.uint8), per_rank=True))
    if rank == 1:
        chunks += [_whole(_dtype_key(dtype), _large(dtype)) for dtype in DTYPES]
        chunks += [_whole("model/0/scalar", torch.tensor(2.5)), _whole("model/0/empty", torch.empty(0, 4))]
    common = {"iteration": _ITERATION, "lr": 0.5}
    return RankShare(chunks, json.dumps({"rank": rank}).encode(), aliases={_TWIN: _KEY}, common=common)


class _Refusing(PosixFileSystem):
    """A disk that takes nothing that is written to it."""

    def write_atomic(self, path: Path, content: bytes, *, durable: bool = True) -> None:
        raise OSError(28, f"no room for {path}")

    def write_file(self, path: Path, chunks: Any) -> None:
        raise OSError(28, f"no room for {path}")


class FormatContract:
    """One checkpoint of three ranks: rows of tensors dealt unevenly, every dtype, what each rank alone has."""

    def form(self) -> CheckpointFormat:
        """A new one for each test."""
        raise NotImplementedError

    def test_every_region_comes_back_bit_for_bit(self, tmp_path: Path) -> None:
        reader = self._saved(tmp_path)
        for start, stop in ((0, 11), (2, 5), (10, 11), (3, 4)):
            out = torch.full((stop - start, 5), -1.0)
            reader.read([Target(_KEY, out, (start, 0), (11, 5))])
            assert torch.equal(out, _large()[start:stop]), (start, stop)
        column = torch.full((11, 2), -1.0)
        reader.read([Target(_KEY, column, (0, 3))])
        assert torch.equal(column, _large()[:, 3:])

    def test_every_dtype_comes_back_bit_for_bit_and_is_told(self, tmp_path: Path) -> None:
        reader = self._saved(tmp_path)
        for dtype in DTYPES:
            key, out = _dtype_key(dtype), torch.zeros(11, 5, dtype=dtype)
            assert reader.index[key].dtype == dtype
            assert reader.index[key].global_shape == (11, 5)
            reader.read([Target(key, out, (0, 0))])
            assert out.view(torch.uint8).equal(_large(dtype).view(torch.uint8)), dtype

    def test_scalars_and_empty_tensors_are_tensors(self, tmp_path: Path) -> None:
        reader = self._saved(tmp_path)
        scalar, empty = torch.zeros(()), torch.zeros(0, 4)
        reader.read([Target("model/0/scalar", scalar, ()), Target("model/0/empty", empty, (0, 0))])
        assert float(scalar) == 2.5
        assert reader.index["model/0/empty"].global_shape == (0, 4)

    def test_another_dtype_is_converted_to(self, tmp_path: Path) -> None:
        out = torch.zeros(11, 5, dtype=torch.float64)
        self._saved(tmp_path).read([Target(_KEY, out, (0, 0))])
        assert torch.equal(out, _large().double())

    def test_what_each_rank_alone_has_is_its_own(self, tmp_path: Path) -> None:
        reader = self._saved(tmp_path)
        for rank in range(_WORLD):
            state = reader.rank_state(rank)
            assert state is not None
            assert json.loads(state.values) == {"rank": rank}
            assert state.tensors[_OWN].tolist() == [rank] * 9
        assert reader.rank_state(_WORLD) is None

    def test_tied_tensors_and_what_is_common_are_kept(self, tmp_path: Path) -> None:
        reader = self._saved(tmp_path)
        assert dict(reader.aliases) == {_TWIN: _KEY}
        assert reader.common["iteration"] == _ITERATION

    def test_what_is_not_there_is_named_before_a_byte_is_read(self, tmp_path: Path) -> None:
        reader, out = self._saved(tmp_path), torch.full((11, 5), -1.0)
        good = Target(_KEY, out, (0, 0))
        for error, bad in (
            (MissingKeysError, Target("model/0/nowhere", torch.zeros(2), (0,))),
            (LayoutMismatchError, Target(_KEY, torch.zeros(2, 5), (0, 0), (12, 5))),
        ):
            try:
                reader.read([good, bad])
            except error as raised:
                assert bad.key in str(raised)  # noqa: PT017 - pytest is no dependency of this package
            else:
                raise AssertionError(f"{bad.key} was read")
            assert torch.all(out == -1.0)

    def test_its_items_are_listed_with_the_files_that_hold_them(self, tmp_path: Path) -> None:
        self._saved(tmp_path)
        form, fs = self.form(), PosixFileSystem()
        items = {item.path: item for item in form.items(tmp_path / "saved", fs) if item.kind == "tensor"}
        assert items[_KEY].global_shape == (11, 5)
        files = form.data_files(tmp_path / "saved", fs)
        assert files
        assert all((tmp_path / "saved" / name).is_file() for name in files)

    def test_a_file_that_is_gone_or_cut_is_no_checkpoint(self, tmp_path: Path) -> None:
        """It is seen by looking, opening or reading; never is something else read in its place."""
        self._saved(tmp_path)
        fs = PosixFileSystem()
        assert self.form().problem(tmp_path / "saved", fs) == ""
        for name in sorted(self.form().data_files(tmp_path / "saved", fs)):
            path = tmp_path / "saved" / name
            content = path.read_bytes()
            for harm in (None, content[: len(content) // 2]):
                path.unlink()
                if harm is not None:
                    path.write_bytes(harm)
                assert self._is_noticed(tmp_path / "saved"), (name, harm is None)
                path.write_bytes(content)
        assert not self._is_noticed(tmp_path / "saved")

    def test_one_rank_that_fails_fails_the_save_on_all(self, tmp_path: Path) -> None:
        for failing in (0, _WORLD - 1):
            outcomes = self._save(tmp_path / f"by{failing}", failing)
            assert all(isinstance(outcome, SaveFailedError) for outcome in outcomes), outcomes

    # -- parts --------------------------------------------------------------------------------------------------------

    def _saved(self, directory: Path) -> CheckpointReader:
        failed = [each for each in self._save(directory / "saved") if isinstance(each, BaseException)]
        if failed:
            raise failed[0]
        return self.form().open(directory / "saved", PosixFileSystem())

    def _save(self, folder: Path, failing: int | None = None) -> Sequence[BaseException | None]:
        folder.mkdir()
        form = self.form()
        about = SaveMeta(_ITERATION, "contract", "c0" * 16, 1, None, None, _WORLD)

        def of_rank(agreements: ThreadAgreements) -> None:
            fs = _Refusing() if agreements.rank == failing else PosixFileSystem()
            form.save(folder, _share(agreements.rank), about, agreements, fs)

        return on_all_ranks(_WORLD, of_rank)

    def _is_noticed(self, folder: Path) -> bool:
        fs = PosixFileSystem()
        if self.form().problem(folder, fs):
            return True
        try:
            reader = self.form().open(folder, fs)
            for key, stored in reader.index.items():
                out = torch.empty(stored.global_shape, dtype=stored.dtype)
                reader.read([Target(key, out, (0,) * out.dim())])
            for rank in range(_WORLD):
                reader.rank_state(rank)
            reader.close()
        except (ResilienceError, OSError, CorruptCopyError):
            return True
        return False
