"""Without a shared libpython there is no library to test; with one it must have been built."""

from __future__ import annotations

import pytest

from rmaker_ota import embed
from tests.c_abi.library import WHY_NOT


@pytest.fixture(autouse=True, scope="package")
def the_library() -> None:
    if WHY_NOT is not None:
        pytest.skip(WHY_NOT)
    assert embed.LIBRARY.exists(), "libesp_rmaker_ota is not built: python setup.py build_ext --inplace"
