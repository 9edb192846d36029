"""User names and passwords of cameras, from a file in the format of ``.netrc``, by host."""

import netrc
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import quote, urlsplit

from upperson_rt.camera.source import Source
from upperson_rt.errors import InputError
from upperson_rt.passwords import require_private

__all__ = ["Logins"]


@dataclass(frozen=True, slots=True)
class Logins:
    """Who to be for which host; the empty one knows nobody."""

    _by_host: dict[str, tuple[str, str]] = field(default_factory=dict, repr=False)

    @classmethod
    def read(cls, path: Path) -> "Logins":
        """Read a file with lines such as ``machine 10.0.0.5 login viewer password secret``.

        ``default`` instead of ``machine`` and a host stands for all others.

        Raises:
            InputError: It cannot be read or understood, or others may read it, too.
        """
        require_private(path)
        try:
            hosts = netrc.netrc(path).hosts
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror}") from error
        except netrc.NetrcParseError as error:
            # Not its message: that quotes what it did not understand.
            raise InputError(
                f"{path}, line {error.lineno}: expected  machine HOST login NAME password PASSWORD"
            ) from None
        except UnicodeDecodeError as error:
            raise InputError(f"{path} is no text in UTF-8") from error
        except ValueError as error:  # Of Python 3.10, for quotes without an end.
            raise InputError(f"{path} cannot be understood: {error}") from error
        # Names of hosts are the same in any letters, and addresses give them in small ones.
        return cls(
            {host.lower(): (user, password or "") for host, (user, _, password) in hosts.items()}
        )

    def of(self, host: str) -> tuple[str, str] | None:
        """Return user name and password for a host; None if there are none."""
        return self._by_host.get(host.lower(), self._by_host.get("default"))

    def given_to(self, source: Source) -> Source:
        """Return a network stream with the login for its host, unless its address has one."""
        if source.kind != "network":
            return source
        try:
            parts = urlsplit(source.address)
            host, named = parts.hostname, parts.username is not None
        except ValueError:  # Opening it says what is wrong.
            return source
        login = None if host is None or named else self.of(host)
        if login is None:
            return source
        place = f"{':'.join(quote(part, safe='') for part in login)}@{parts.netloc}"
        return replace(source, address=parts._replace(netloc=place).geturl())
