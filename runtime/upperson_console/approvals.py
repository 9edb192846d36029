"""Actions that a second person approves: their requests, kept in the user state.

A request holds the arguments of its action, so that exactly what was asked is carried out.
"""

import json
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, TypeAlias
from urllib.parse import parse_qsl

from upperson_console.accounts import Account, Role
from upperson_console.oversight import Approved, Context, Oversight
from upperson_console.problems import ProblemError, invalid, missing
from upperson_console.search import Search
from upperson_console.user_state import UserState
from upperson_rt.printable import local_time, visible_text
from upperson_rt.strict import read_fields

Decision: TypeAlias = Literal["approve", "refuse"]
ROLES: Mapping[Approved, Role] = {"export": "operator", "delete": "admin", "alert": "operator"}
"""Who may ask for an action, and approve it."""
_MOST_PENDING = 50
"""Of one account."""


@dataclass(frozen=True, kw_only=True)
class Approval:
    """A request for approval."""

    id: str
    user: str
    created: float | None = None
    """When the account that asked was created, see `Token.created`."""
    action: Approved
    arguments: dict[str, Any]
    """Arguments of the action."""
    count: int
    """Number of pictures."""
    context: Context
    added: float
    """Unix seconds, as `expires`."""
    expires: float
    decision: Decision | None = None
    by: str | None = None
    reason: str | None = None
    """Of the decision."""

    @property
    def state(self) -> Literal["pending", "approved", "refused", "expired"]:
        """What became of it; an approved export expires, too.

        So does a request from the future: the clock was set back.
        """
        if self.decision == "refuse":
            return "refused"
        is_open = self.decision is None or self.action == "export"
        if is_open and not self.added <= time.time() < self.expires:
            return "expired"
        return "pending" if self.decision is None else "approved"

    @property
    def about(self) -> dict[str, Any]:
        """What was asked, without ids: a sentence, a search, a reason and conditions."""
        given = {n: value for n, value in self.arguments.items() if value not in (None, "", [])}
        return {n: value for n, value in given.items() if n not in ("ids", "details")}

    def may_decide(self, account: Account) -> bool:
        """Return whether an account is a second person, with rights and older than the request."""
        is_older = account.created is None or account.created < self.added
        is_other = account.name != self.user
        return is_older and is_other and account.cameras is None and account.may(ROLES[self.action])

    def require_approver(self, account: Account | None) -> None:
        """Raise ProblemError unless the account that approved it, as it is now, may decide it."""
        if account is None or not self.may_decide(account):
            what = f"{self.by}, who approved it, was since removed, made anew or limited: ask again"
            raise _outdated(what)

    def requester(self, account: Account | None) -> Account:
        """Return the account that asked as it is now, to act with the approval.

        Raises ProblemError if it was removed, made anew or limited since the request.
        """
        if (
            account is None
            or account.created != self.created
            or not account.may(ROLES[self.action])
            or not all(map(account.sees, self.arguments.get("cameras") or ()))
        ):
            what = f"{self.user} was removed, made anew or limited since the request: ask again"
            raise _outdated(what)
        address = account.context.address or self.context.address
        granted = {"approval": self.id, "approved_by": self.by, "address": address}
        return replace(account, context=replace(self.context, **granted))


class Approvals:
    """The requests. Safe for several threads."""

    def __init__(
        self, user_state: UserState, oversight: Oversight, note: Callable[..., None]
    ) -> None:
        """Keep requests in a user state; ``note`` writes a line of the query log."""
        self._user_state, self._oversight, self._note = user_state, oversight, note
        self._lock = threading.Lock()

    def require(self, account: Account, action: Approved, count: int, **arguments: Any) -> None:
        """Return if an action may be carried out now; else ask for approval, which is a problem."""
        if action not in self._oversight.two_persons:
            return
        if (granted := account.context.approval) is not None:
            one = self.find(account, granted)
            if (one.count, one.arguments) != (count, json.loads(json.dumps(arguments))):
                what = (
                    f"pictures or conditions have changed ({count} pictures now, {one.count} then)"
                )
                raise _outdated(f"{what}: ask again")
            return
        with self._lock:
            made = self._requested(account, action, count, json.loads(json.dumps(arguments)))
        raise ProblemError(
            202,
            f"a second person has to approve this until {local_time(made.expires)}: see /approvals",
            code="approval_pending",
            fields={"approval": made.id},
        )

    def _requested(
        self, account: Account, action: Approved, count: int, arguments: Any
    ) -> Approval:
        """Return an account's request that is pending, or a new one."""
        own = [one for one in self._all() if one.user == account.name and one.state == "pending"]
        for one in own:
            if (one.action, one.arguments) == (action, arguments):
                return one
        if len(own) >= _MOST_PENDING:
            what = f"{_MOST_PENDING} requests of yours wait for approval already"
            raise invalid(what, "too_many_pending")
        now = time.time()
        made = Approval(
            id=secrets.token_hex(8),
            user=account.name,
            created=account.created,
            action=action,
            arguments=arguments,
            count=count,
            context=account.context,
            added=now,
            expires=now + self._oversight.approvals_expire_hours * 3600,
        )
        self._log(account, made, "approval-ask", made.about)
        self._user_state.set_approval(made.id, _text(made))
        return made

    def waiting(self, account: Account) -> int:
        """Return the number of pending requests that an account may decide."""
        return sum(
            one.state == "pending" and one.may_decide(account)
            for one in self.visible(account, undecided=True)
        )

    def visible(self, account: Account, undecided: bool = False) -> list[Approval]:
        """Return the requests that an account may decide or made itself, newest first.

        An account that is limited to cameras decides none: it might not see all pictures.
        """
        sees_all = account.cameras is None
        return [
            one
            for one in self._all(undecided)
            if account.name == one.user or (sees_all and account.may(ROLES[one.action]))
        ]

    def find(self, account: Account, id_: str) -> Approval:
        """Return a request by its id."""
        found = next((one for one in self.visible(account) if one.id == id_), None)
        if found is None:
            raise missing(f"there is no request for approval {id_}", "approval_not_found")
        return found

    def decide(
        self,
        account: Account,
        id_: str,
        decision: Decision,
        reason: str,
        perform: Callable[[Approval], None],
    ) -> None:
        """Carry out, log and keep the decision of a second person.

        A request whose action fails stays pending, and no decision is logged.
        """
        with self._lock:
            one, reason = self.find(account, id_), visible_text(reason)
            if not one.may_decide(account):
                what = (
                    "a second person with the rights for it has to decide, with an account and a "
                    "token that are older than the request"
                )
                raise ProblemError(403, what, code="second_person_needed")
            if decision == "refuse" and not reason:
                raise invalid("a refusal needs a reason: say in a few words why", "reason_missing")
            if one.state != "pending":
                what = f"this request is {one.state} already"
                raise ProblemError(409, what, code="approval_closed")
            one = replace(one, decision=decision, by=account.name, reason=reason or None)
            if decision == "approve":
                perform(one)
                self._user_state.set_approval(one.id, _text(one))  # Also if the log fails now.
            self._log(account, one, f"approval-{decision}", {"reason": reason})
            if decision == "refuse":
                self._user_state.set_approval(one.id, _text(one))

    def granted_export(self, account: Account, id_: str) -> Approval:
        """Return an approved export of an account; see `require_approver` and `requester`."""
        one = self.find(account, id_)
        if (one.user, one.action, one.state) != (account.name, "export", "approved"):
            raise ProblemError(
                403, f"this is no approved export of {account.name}", code="approval_missing"
            )
        return one

    def _all(self, undecided: bool = False) -> list[Approval]:
        return [
            _with_address(read_fields(Approval, json.loads(text), "a request for approval"))
            for text in self._user_state.approvals(undecided)
        ]

    def _log(self, account: Account, one: Approval, action: str, more: dict[str, Any]) -> None:
        details = {"approval": one.id, "for": one.action, "of": one.user, "count": one.count}
        self._note(account, action, [], details | more)


def _with_address(one: Approval) -> Approval:
    """Return a request whose address is as this release makes it."""
    if not (address := one.arguments.get("address")):
        return one
    address = Search.from_address(parse_qsl(address)).address()
    return replace(one, arguments=one.arguments | {"address": address})


def _outdated(what: str) -> ProblemError:
    return ProblemError(409, what, code="approval_outdated")


def _text(one: Approval) -> str:
    return json.dumps(asdict(one))
