"""What the tests of parity feed."""

import pytest

from tests.helpers.toy_parity import toy_parity_inputs
from upperson_export.parity.inputs import ParityInputs


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> ParityInputs:
    return toy_parity_inputs(tmp_path_factory.mktemp("people"))
