"""What ``fleet run`` and ``fleet experiment`` share: the words for a host's hostpart, signals, resuming."""

from __future__ import annotations

import argparse
import asyncio
import signal

from ..errors import HostpartError, UsageError
from ..front import say
from .options import count as read_count
from .options import seconds as read_seconds
from .table import plain

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Sequence

    from ..fleet.dispatch import Dispatcher, Outcome, Word
    from ..fleet.journal import Journal
    from ..fleet.request import Request

__all__ = ["Session", "add_ways", "resume", "serve", "tell_outcome", "words_of"]

GRACE_S = 5.0  # for what runs, when the user asks for the end
_LEAVE_S = 20.0  # for it to have ended, and to say so


def add_ways(parser: argparse._ActionsContainer) -> None:
    """Add the options that say how requests get to hosts and where results are kept."""
    parser.add_argument(
        "--attempts", type=read_count, default=3, metavar="N",
        help="how often to go elsewhere when a host has become full (default: 3)",
    )  # fmt: skip
    parser.add_argument(
        "--patience", type=read_seconds, default=60.0, metavar="SECONDS",
        help="how long to wait for a host that does not answer (default: 60)",
    )  # fmt: skip
    parser.add_argument("--out", metavar="DIR", help="keep what the hosts say in DIR")
    parser.add_argument("--resume", metavar="DIR", help="finish what is missing in DIR; nothing runs a second time")
    parser.add_argument("--again", action="store_true", help="with --resume: run again what was lost with its host")


def words_of(actions: Iterable[argparse.Action], args: argparse.Namespace, without: Sequence[str]) -> list[str]:
    """Return the options that say again what *args* says of *actions*.

    :param without: destinations that are not told
    """
    words: list[str] = []
    for action in actions:
        value = getattr(args, action.dest, None)
        if not action.option_strings or action.dest in ("help", *without) or value == action.default or value is None:
            continue
        option = action.option_strings[-1]
        if action.nargs == 0:
            words += [option] * (value if isinstance(value, int) and not isinstance(value, bool) else 1)
        elif action.nargs == argparse.REMAINDER:
            words += [option, *value]  # which is the last one
        elif isinstance(value, tuple):
            words.append(f"{option}={','.join(map(str, value))}")
        else:
            words.append(f"{option}={value}")
    return words


class Session:
    """One call of the fleet.

    :ivar stopped_by: the signal that ended it, or 0
    :ivar unknown: how many requests may have run, and are left as they are
    :ivar failed: how many were done before, and not with status 0
    """

    def __init__(self, dispatcher: Dispatcher, journal: Journal | None) -> None:
        self.dispatcher, self.journal = dispatcher, journal
        self.stopped_by = 0
        self.unknown = self.failed = 0
        self.leaving: asyncio.Future[None] | None = None


def serve(
    args: argparse.Namespace,
    journal: Journal | None,
    work: Callable[[Session], Awaitable[None]],
    *,
    hear: Callable[[Word], None],
    ended: Callable[[Outcome], None],
    wait_s: float = 0.0,
) -> int:
    """Connect to ``args.where``, do *work*, and return the signal that stopped it, or 0.

    :param hear: called with each word of a request
    :param ended: called with each outcome
    """
    from ..fleet import cluster
    from ..fleet.dispatch import Dispatcher
    from ..fleet.link import Link

    async def main() -> int:
        loop = asyncio.get_running_loop()
        async with cluster.connect(args.where) as fleet:
            for note in fleet.notes:
                say(note)
            dispatcher = Dispatcher(
                Link(fleet), journal=journal, names=args.hosts, attempts=args.attempts, wait_s=wait_s,
                patience_s=args.patience, hear=hear, ended=ended,
            )  # fmt: skip
            session = Session(dispatcher, journal)
            doing = asyncio.ensure_future(work(session))
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup(1)
                    loop.add_signal_handler(number, _stop, session, int(number), doing)
            try:
                await doing
            except asyncio.CancelledError:
                if not session.stopped_by:
                    raise
            except HostpartError as error:
                if not session.stopped_by:
                    raise
                say(str(error))
            except BrokenPipeError:
                # Whoever read it has enough, which a guest would be told by SIGPIPE if it ran here.
                await asyncio.wait([asyncio.ensure_future(dispatcher.stop(GRACE_S))], timeout=_LEAVE_S)
                raise
            finally:
                await dispatcher.close(0.0 if session.stopped_by else 10.0)
            return session.stopped_by

    return cluster.run(main())


def _stop(session: Session, number: int, doing: asyncio.Future[None]) -> None:
    if session.stopped_by:
        doing.cancel()
        return
    session.stopped_by = number

    async def leave() -> None:
        stopping = asyncio.ensure_future(session.dispatcher.stop(GRACE_S))
        await asyncio.wait([doing], timeout=GRACE_S + _LEAVE_S)
        stopping.cancel()
        if not doing.done():
            doing.cancel()
            say("not all that runs has ended; it goes on\ntry: 'hostpart fleet ps'")

    session.leaving = asyncio.ensure_future(leave())
    say("stopping what runs; once more leaves at once, and it goes on")


async def resume(
    session: Session,
    requests: Sequence[Request],
    *,
    again: bool,
    gang: bool = False,
    on: Callable[[Request], str] = lambda _: "",
) -> None:
    """Finish what an earlier call has left: follow what runs, begin what never began, say what is not known.

    :param requests: all of that call's
    :param again: whether what was lost is run once more
    :param gang: whether they are to be started together
    :param on: the one host that a request is for; empty: any
    """
    from ..fleet import journal as journals
    from ..fleet import resumption

    dispatcher, journal = session.dispatcher, session.journal
    if journal is None:
        raise UsageError("there is no directory to go on in", "name it: --resume DIR")
    await dispatcher.hosts()
    before = resumption.last(journals.decisions(journal.directory))
    there = await dispatcher.find(str(journal.document.get("run")))
    had = {one.number: before.get(one.number, resumption.Before()) for one in requests}
    if gang and not any(one.begun or one.state == "ended" for one in had.values()):
        # Of those that are held some may be given back soon: all are placed anew.
        await dispatcher.take_back([one for known in there.values() for one in known])
        await dispatcher.gang(requests, {number: one.attempt for number, one in had.items()})
        return
    work = []
    for request in requests:
        earlier = had[request.number]
        known = resumption.chosen(earlier, there.get(request.number, ()), on(request))
        what = resumption.decide(request, earlier, known, again=again)
        if gang and what == resumption.BEGIN and not again:
            say(f"request {request.number} of the gang was not started with the others, and is left out")
            session.unknown += 1
        elif what == resumption.FOLLOW and known is not None:
            work.append(dispatcher.adopt(request, known, journal.offset(known.host, request.id(known.attempt))))
        elif what == resumption.BEGIN:
            attempt = max([earlier.attempt, *(one.attempt for one in there.get(request.number, ()))])
            kept = journal.offset(on(request), request.id(attempt)) if on(request) else 0
            work.append(dispatcher.begin(request, on(request), attempt, kept))
        elif what == resumption.DONE:
            session.failed += earlier.state != "ended" or earlier.status != 0
        elif what == resumption.UNKNOWN:
            say(
                f"request {request.number} was started on host {plain(str(earlier.host))}, which does not say what"
                " became of it: it is not run a second time\n"
                "try: the same command once that host is back, or with --again"
            )
            session.unknown += 1
    await asyncio.gather(*work)


def tell_outcome(outcome: Outcome) -> None:
    """Say what there is to say of an outcome that is no success."""
    who = f"host {plain(outcome.host)}: " if outcome.host else ""
    if outcome.state == "lost":
        say(
            f"{who}it does not answer; what became of the guest is not known, and it is not run a second time\n"
            "try: 'hostpart fleet ps' once it is back; with --out DIR, 'hostpart fleet run --resume DIR'"
        )
    elif outcome.error is not None:
        say(f"{who}{plain(str(outcome.error.get('problem')))}\ntry: {plain(str(outcome.error.get('remedy')))}")
    elif outcome.state == "given-up":
        say(f"{who}it was taken back before it ran")
