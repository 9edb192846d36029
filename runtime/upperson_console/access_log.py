"""Lines of the query log for logins, logouts and requests without the rights for them."""

import threading
import time
from collections import Counter

from fastapi import Request

from upperson_console.accounts import Account, address_of, is_of_programs
from upperson_console.connections import log_seldom
from upperson_console.problems import ProblemError
from upperson_log.query_log import QueryLog
from upperson_rt.errors import InputError

_LOG = log_seldom(__name__)
_UNKNOWN = "unknown client"
_MOST_A_MINUTE = 10
"""Lines of one kind of an account, or of all unknown clients: no client may fill the disk."""


class AccessLog:
    """Writes these lines, a few a minute; the next one counts those left out. Thread-safe."""

    def __init__(self, log: QueryLog) -> None:
        self._log = log
        self._lock = threading.Lock()
        self._minute = 0
        self._written: Counter[tuple[str, object]] = Counter()
        self._left_out: Counter[tuple[str, object]] = Counter()

    def note(
        self, action: str, request: Request, account: Account | None, **details: object
    ) -> None:
        """Log an action of an account, None for a client that is not known.

        A log that cannot be written refuses searches; logins and refusals are only reported.
        """
        name = _UNKNOWN if account is None else account.name
        kind = name, details.get("code", action)
        with self._lock:
            if (minute := int(time.monotonic() // 60)) != self._minute:
                self._minute = minute
                self._written.clear()
            self._written[kind] += 1
            if self._written[kind] > _MOST_A_MINUTE:
                self._left_out[kind] += 1
                return
            left_out = self._left_out.pop(kind, 0)
        if left_out:
            details["left_out"] = left_out
        context = {"address": address_of(request) or ""}
        try:
            self._log.write("", [], k=0, action=action, user=name, details=details, context=context)
        except InputError as error:
            _LOG.error("%s of %s is not in the query log: %s", action, name, error)

    def note_problem(
        self, request: Request, account: Account | None, problem: ProblemError
    ) -> None:
        """Log a refusal for want of rights, or a token that is not known.

        A browser that is sent to the page of purposes is not refused.
        """
        if problem.code == "purpose_missing" and not is_of_programs(request):
            return
        details = {"path": request.url.path[:200], "code": problem.code}
        if problem.status == 403:
            self.note("forbidden", request, account, **details)
        elif problem.status == 401 and "authorization" in request.headers:
            self.note("login-failed", request, account, **details)
