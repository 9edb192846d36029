"""What the tests of parity feed."""

import pytest

from tests.helpers.toy_parity import toy_parity_inputs


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    return toy_parity_inputs(tmp_path_factory.mktemp("people"))
