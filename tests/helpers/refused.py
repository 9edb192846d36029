"""Assert an error of ours by its class, code and fields, never by its prose."""

from contextlib import contextmanager

import pytest

from upperson_rt.errors import UppersonError


@contextmanager
def refused(code, error=UppersonError, **fields):
    """Expect an error of that class with that code, whose fields include those given."""
    with pytest.raises(error) as found:
        yield found
    assert found.value.code == code, f"{found.value.code}: {found.value}"
    given = {name: found.value.fields.get(name) for name in fields}
    assert given == fields, str(found.value)
