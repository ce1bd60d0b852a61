"""What runs are called, and which folder they share."""

from __future__ import annotations

from pathlib import Path

import pytest

from pmm_fast.config import ConfigError
from pmm_fast.config.runs import common_folder, run_names, run_place, unique_ends


def test_what_a_run_is_known_by(tmp_path: Path) -> None:
    # a folder may have a dot in its name; what is not a folder is a file
    folder = tmp_path / "run.v2"
    folder.mkdir()
    assert run_place(folder) == run_place(folder / "checkpoint.pt") == folder
    assert run_place(tmp_path / "best.v2.pt") == tmp_path / "best.v2"


def test_names_are_as_short_as_they_can_be(tmp_path: Path) -> None:
    paths = [str(tmp_path / path) for path in ("one/agg", "two/agg/checkpoint.pt", "two/best.pt")]
    assert run_names(paths) == {
        "one/agg": Path(paths[0]),
        "two/agg": Path(paths[1]),
        "two/best": Path(paths[2]),
    }
    assert list(run_names(paths[:1])) == ["agg"]
    assert unique_ends([]) == []


def test_a_run_given_twice() -> None:
    with pytest.raises(ConfigError, match=r"a run is given twice: /x/agg, /x/agg/checkpoint\.pt"):
        run_names(["/x/agg", "/x/agg/checkpoint.pt"])


def test_the_folder_they_share() -> None:
    folders = [Path("/a/x/agg"), Path("/a/y/agg"), Path("/a/y/agg/deep")]
    assert common_folder(folders) == Path("/a")
    assert common_folder(folders[1:]) == Path("/a/y/agg")
    assert common_folder(folders[:1]) == folders[0]
