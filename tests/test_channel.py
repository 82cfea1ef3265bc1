"""The channel between a front and its keepers, on real socket pairs."""

from __future__ import annotations

import fcntl
import os
import threading
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hostpart.channel import Channel
from tests.conftest import wait_until

Ends = tuple[Channel, Channel]
PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=20)
    | st.binary(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=10,
)


@pytest.fixture
def ends() -> Iterator[Ends]:
    one, other = Channel.pair()
    yield one, other
    one.close()
    other.close()


def receive(channel: Channel, count: int) -> list[dict[str, object]]:
    found: list[dict[str, object]] = []

    def enough() -> bool:
        found.extend(channel.receive())
        return len(found) >= count

    assert wait_until(enough), f"{len(found)} of {count} messages came"
    return found


@given(st.lists(st.dictionaries(st.text(max_size=5), PLAIN, max_size=3), max_size=4))
@settings(max_examples=50, deadline=None)
def test_messages_arrive_whole_and_in_order(messages: list[dict[str, object]]) -> None:
    one, other = Channel.pair()
    try:
        assert all(one.send(message) for message in messages)
        assert receive(other, len(messages)) == messages
    finally:
        one.close()
        other.close()


def test_reading_does_not_block_where_nothing_has_come(ends: Ends) -> None:
    assert ends[0].receive() == []
    assert not ends[0].ended


def test_a_message_larger_than_the_socket_s_buffer_arrives_whole(ends: Ends) -> None:
    text = "x" * 3_000_000
    sender = threading.Thread(target=ends[0].send, args=({"text": text},))
    sender.start()
    try:
        assert receive(ends[1], 1) == [{"text": text}]
    finally:
        sender.join()


@pytest.mark.parametrize("count", [1, 250, 251, 600])
def test_all_descriptors_arrive_in_order_and_are_closed_on_exec(ends: Ends, count: int) -> None:
    with open("/dev/null", "rb") as null:
        fds = [os.dup(null.fileno()) for _ in range(count)]
    read, write = os.pipe()
    fds[-1:], last = [write], fds[-1]
    os.close(last)
    try:
        ends[0].send({"event": "before"})
        ends[0].send({"event": "leases"}, fds)
        ends[0].send({"event": "after"})
        got = [message["event"] for message in receive(ends[1], 3)]
        assert got == ["before", "leases", "after"]
        assert len(ends[1].fds) == count
        assert all(fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC for fd in ends[1].fds)
        os.write(ends[1].fds[-1], b"the last is the pipe")
        assert os.read(read, 100) == b"the last is the pipe"
    finally:
        for fd in (*fds, read):
            os.close(fd)


def test_closing_closes_the_descriptors_that_came(ends: Ends) -> None:
    read, write = os.pipe()
    ends[0].send({}, [write])
    os.close(write)
    receive(ends[1], 1)
    ends[1].close()
    assert os.read(read, 1) == b"", "somebody still holds the pipe's write end"
    os.close(read)


def test_what_was_sent_before_the_other_end_closed_is_still_read(ends: Ends) -> None:
    ends[0].send({"event": "last word"})
    ends[0].close()
    assert receive(ends[1], 1) == [{"event": "last word"}]
    assert wait_until(lambda: ends[1].receive() == [] and ends[1].ended)


def test_sending_to_a_closed_end_says_so_and_raises_nothing(ends: Ends) -> None:
    ends[1].close()
    assert ends[0].send({"event": "created"}) is False
    assert ends[0].receive() == []
    assert ends[0].ended
    assert ends[0].receive() == []


def test_a_message_cut_off_by_death_is_not_delivered(ends: Ends) -> None:
    ends[0]._socket.send(b"\x40\x00\x00\x00half")
    ends[0].close()
    assert wait_until(lambda: ends[1].receive() == [] and ends[1].ended)


def test_the_last_word_is_read_also_after_an_answer_to_it_could_not_be_sent() -> None:
    here, there = Channel.pair()
    there.send({"event": "ended"})
    there.close()
    assert not here.send({"do": "stop"})
    assert here.receive() == [{"event": "ended"}]
    assert here.ended
    here.close()


def test_the_last_word_is_read_also_where_the_other_end_left_something_unread() -> None:
    here, there = Channel.pair()
    here.send({"do": "stop"})
    there.send({"event": "ended"})
    there.close()
    assert here.receive() == [{"event": "ended"}]
    assert here.ended
    here.close()
