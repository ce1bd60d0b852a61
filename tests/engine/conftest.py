"""Data that the tests of training share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.street_folders import make_domains


@pytest.fixture(scope="session")
def domains(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_domains(tmp_path_factory.mktemp("domains"))
