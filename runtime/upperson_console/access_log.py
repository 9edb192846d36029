"""Lines of the query log for logins, logouts and refused requests."""

import threading
import time
from collections import Counter
from collections.abc import Mapping

from fastapi import Request

from upperson_console.accounts import Access, address_of
from upperson_console.connections import log_seldom
from upperson_console.problems import ProblemError
from upperson_rt.errors import InputError
from upperson_rt.query_log import QueryLog

_LOG = log_seldom(__name__)
_UNKNOWN = "unknown client"
_MOST_A_MINUTE = 10
"""Lines of an account, and of all unknown clients together: no client may fill the disk."""


class AccessLog:
    """Writes these lines, a few a minute; the next one counts those left out. Thread-safe."""

    def __init__(self, log: QueryLog, access: Access) -> None:
        self._log, self._access = log, access
        self._lock = threading.Lock()
        self._minute = 0
        self._written: Counter[str] = Counter()
        self._left_out: Counter[str] = Counter()

    def note(self, action: str, request: Request, details: Mapping[str, object] = {}) -> None:
        """Log an action of the sender of a request; a log that cannot be written is reported."""
        account = self._access.find(request)
        self.note_user(action, request, None if account is None else account.name, details)

    def note_problem(self, request: Request, problem: ProblemError) -> None:
        """Log a refusal for want of rights, and a token that is not known."""
        details = {"path": request.url.path[:200], "code": problem.code}
        if problem.status == 403:
            self.note("forbidden", request, details)
        elif problem.status == 401 and "authorization" in request.headers:
            self.note_user("login-failed", request, None, details)

    def note_user(
        self, action: str, request: Request, user: str | None, details: Mapping[str, object]
    ) -> None:
        """Log an action of a user, None for a client that is not known."""
        name = user or _UNKNOWN
        with self._lock:
            if (minute := int(time.monotonic() // 60)) != self._minute:
                self._minute = minute
                self._written.clear()
            self._written[name] += 1
            if self._written[name] > _MOST_A_MINUTE:
                self._left_out[name] += 1
                return
            left_out = self._left_out.pop(name, 0)
        given = {**details, **({"left_out": left_out} if left_out else {})}
        context = {"address": address} if (address := address_of(request)) else {}
        try:
            self._log.write("", [], k=0, action=action, user=name, details=given, context=context)
        except InputError as error:
            _LOG.error("%s of %s is not in the query log: %s", action, name, error)
