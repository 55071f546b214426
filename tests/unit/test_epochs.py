"""The epoch table: no bump is lost, whoever writes, and no file can do harm."""

from __future__ import annotations

import errno
import logging
import multiprocessing
import os
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from django_pgnotify.epochs import clock, mapped, use
from django_pgnotify.epochs import table as table_module
from django_pgnotify.epochs.clock import NANOSECONDS, WRITERS, node_clock, time_of
from django_pgnotify.epochs.mapped import BOOT_ID, GLOBAL, HEADER_WORDS, LATEST, size_of
from django_pgnotify.epochs.table import EpochTable
from django_pgnotify.exceptions import InvalidArgument, InvalidEpochTable

ROOT = Path(__file__).parents[2]
DEADLINE = 60.0
# Since Python 3.12 a fork beside other threads warns; these children do only what is safe.
FORKS = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "epochs")


@pytest.fixture
def table(path: str) -> Iterator[EpochTable]:
    with EpochTable.open(path, 256) as opened:
        yield opened


@pytest.fixture(params=["file", "memory"])
def either(request: pytest.FixtureRequest, path: str) -> Iterator[EpochTable]:
    made = EpochTable.open(path, 256) if request.param == "file" else EpochTable.in_process(256)
    with made:
        yield made


# -- epochs ------------------------------------------------------------------------------------


def test_what_was_captured_is_current_until_one_of_its_names_is_bumped(either: EpochTable) -> None:
    before = either.capture(["a", "b"])
    assert either.is_current(before)
    either.bump(["somebody else's"])
    assert either.is_current(before)
    either.bump(["b"])
    assert not either.is_current(before)
    assert either.is_current(either.capture(["a", "b"]))


def test_any_number_of_names_can_be_bumped_at_once(either: EpochTable) -> None:
    """However long the stores take, it comes to an end."""
    names = [f"n{number}" for number in range(5000)]
    before = [either.capture([name]) for name in names]
    assert either.bump(names) > 0
    assert not any(either.is_current(snapshot) for snapshot in before)
    with EpochTable.in_process(100_000) as large:
        one = large.capture(names[-1:])
        large.bump(names)
        assert not large.is_current(one)
        assert large.settle(large.lease(), names) is not None
    either.bump([])


def test_everything_is_stale_after_bump_all_also_what_has_no_name(either: EpochTable) -> None:
    named, nameless = either.capture(["a"]), either.capture([])
    assert either.is_current(nameless)
    either.bump_all()
    assert not either.is_current(named)
    assert not either.is_current(nameless)


def test_the_same_name_has_the_same_slot_in_every_process_and_version() -> None:
    with EpochTable.in_process(65_536) as here, EpochTable.in_process(65_536) as there:
        assert here.slot_of("t:model:shop.order") == there.slot_of("t:model:shop.order") == 30685
        assert 0 <= here.slot_of("\ud800 is no Unicode") < 65_536


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("bump"), st.sets(st.sampled_from("abcdefgh"), max_size=3)),
            st.tuples(st.just("bump all"), st.none()),
            st.tuples(st.just("capture"), st.sets(st.sampled_from("abcdefgh"), max_size=4)),
            st.tuples(st.just("lease"), st.none()),
        ),
        max_size=40,
    ),
    st.sampled_from([1, 3, 512]),
)
@settings(deadline=None, max_examples=150)
def test_nothing_stale_is_ever_current_and_with_enough_slots_nothing_current_stale(
    steps: list[tuple[str, Any]], slots: int
) -> None:
    with EpochTable.in_process(slots) as table:
        captured: list[tuple[Any, set[str], set[str]]] = []
        leases: list[tuple[Any, set[str]]] = []
        names = set("abcdefgh")
        apart = len({table.slot_of(name) for name in names}) == len(names)
        for what, argument in steps:
            if what == "bump":
                table.bump(argument)
                gone = argument
            elif what == "bump all":
                table.bump_all()
                gone = names | {""}
            elif what == "capture":
                captured.append((table.capture(argument), argument | {""}, set()))
                continue
            else:
                leases.append((table.lease(), set()))
                continue
            for _, _, bumped in captured:
                bumped.update(gone)
            for _, bumped in leases:
                bumped.update(gone)
        for snapshot, depends_on, bumped in captured:
            stale = not depends_on.isdisjoint(bumped)
            assert not (stale and table.is_current(snapshot))
            if apart and not stale:
                assert table.is_current(snapshot)
        for lease, bumped in leases:
            for depends_on in ({"a"}, {"b", "c"}, set()):
                stale = not (depends_on | {""}).isdisjoint(bumped)
                settled = table.settle(lease, depends_on)
                assert not (stale and settled is not None)
                if apart and not stale:
                    assert settled is not None


def test_a_lease_settles_to_what_was_captured_then(either: EpochTable) -> None:
    lease = either.lease()
    settled = either.settle(lease, ["a", "b"])
    assert settled is not None
    assert either.is_current(settled)
    assert settled.at == lease.at
    either.bump(["a"])
    assert not either.is_current(settled)
    assert either.settle(lease, ["a", "b"]) is None
    assert either.settle(lease, ["b"]) is not None


def test_stamps_are_later_each_time_even_when_the_clock_is_set_back(
    either: EpochTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = either.bump(["a"])
    lease = either.lease()
    an_hour_ago = clock.wall_clock() - 3_600_000_000
    monkeypatch.setattr(table_module, "wall_clock", lambda: an_hour_ago)
    second = either.bump(["a"])
    assert time_of(second) > time_of(first)
    assert either.settle(lease, ["a"]) is None


def test_a_writer_that_was_stopped_before_it_stored_does_not_store_an_old_stamp(
    table: EpochTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It reads the clock, is stopped, others bump the same slot and somebody takes a lease."""
    readings = 0
    now = clock.wall_clock()
    stamps: list[int] = []

    def slow_clock() -> int:
        nonlocal readings
        readings += 1
        if readings == 1:
            with EpochTable.open(str(table.path), 256) as other:
                monkeypatch.setattr(table_module, "wall_clock", clock.wall_clock)
                stamps.append(other.bump(["a"]))
                leases.append(other.lease())
                monkeypatch.setattr(table_module, "wall_clock", slow_clock)
            return now
        return clock.wall_clock()

    leases: list[Any] = []
    table.bump(["b"])  # claims its number
    monkeypatch.setattr(table_module, "wall_clock", slow_clock)
    late = table.bump(["a"])
    assert late > stamps[0]
    assert table.words[HEADER_WORDS + table.slot_of("a")] == late
    assert table.settle(leases[0], ["a"]) is None


def test_two_writers_never_store_the_same_stamp(
    path: str, table: EpochTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the very same microsecond: the second one's store would be invisible."""
    with EpochTable.open(path, 256) as other:
        monkeypatch.setattr(table_module, "wall_clock", lambda: 1_700_000_000_000_000)
        stamps = []
        for _ in range(50):
            table.words[LATEST] = 0
            stamps += [table.bump(["a"]), other.bump(["a"])]
        assert len({stamp % WRITERS for stamp in stamps}) == 2


# -- the heartbeat -----------------------------------------------------------------------------


def test_there_is_no_heartbeat_at_first_and_none_goes_back(either: EpochTable) -> None:
    assert either.age() == float("inf")
    now = node_clock()
    either.beat(now)
    either.beat(now - 1_000_000_000)
    assert either.heartbeat == now
    assert 0 <= either.age() < DEADLINE


# -- the file ----------------------------------------------------------------------------------


def test_the_file_is_ours_alone_and_has_its_whole_size(path: str, table: EpochTable) -> None:
    status = os.stat(path)
    assert stat.S_IMODE(status.st_mode) == 0o600
    assert status.st_size == size_of(256)
    assert status.st_blocks * 512 >= size_of(256), "reserved, not only promised"


def test_two_who_open_it_see_each_other(path: str, table: EpochTable) -> None:
    with EpochTable.open(path, 256) as other:
        before = table.capture(["a"])
        other.bump(["a"])
        other.beat(node_clock())
        assert not table.is_current(before)
        assert table.age() < DEADLINE
        assert table.id == other.id


def test_a_table_of_before_the_last_boot_is_kept_and_all_in_it_is_stale(path: str) -> None:
    with EpochTable.open(path, 256) as old:
        before = old.capture(["a"])
        old.beat(node_clock())
        old.words[BOOT_ID] ^= 1
        with EpochTable.open(path, 256) as new:
            assert new.age() == float("inf")
            assert not new.is_current(before)
            assert new.id != before.table


def test_where_there_is_no_boot_id_a_heartbeat_that_is_still_to_come_is_one_of_before(
    path: str,
) -> None:
    with EpochTable.open(path, 256) as old:
        before = old.capture(["a"])
        old.beat(node_clock() + 10 * 86_400 * NANOSECONDS)  # of ten days after the last start
        with EpochTable.open(path, 256) as new:
            assert new.age() == float("inf")
            assert not new.is_current(before)
            assert new.id != before.table
            new.beat(node_clock())
            assert 0 <= new.age() < DEADLINE


@pytest.mark.parametrize(
    ("prepare", "words"),
    [
        (lambda path: path.write_bytes(b"x" * size_of(256)), "does not begin as one"),
        (lambda path: path.write_bytes(b"short"), "5 bytes"),
        (lambda path: path.mkdir(), "cannot be opened"),
        (os.mkfifo, "no regular file"),
        (lambda path: path.symlink_to("elsewhere"), "symbolic link"),
    ],
    ids=["another's content", "too short", "folder", "pipe", "link"],
)
def test_what_is_no_table_is_refused_and_left_alone(
    tmp_path: Path, prepare: Callable[[Path], Any], words: str
) -> None:
    path = tmp_path / "epochs"
    prepare(path)
    before = os.lstat(path)
    with pytest.raises(InvalidEpochTable, match=words) as raised:
        EpochTable.open(path, 256)
    assert str(path) in str(raised.value)
    assert os.lstat(path).st_size == before.st_size
    assert not (tmp_path / "elsewhere").exists()


def test_a_file_that_was_cut_off_grown_or_made_with_other_slots_is_refused(path: str) -> None:
    EpochTable.open(path, 256).close()
    with pytest.raises(InvalidEpochTable, match="256 slots, and PGNOTIFY_EPOCH_SLOTS says 128"):
        EpochTable.open(path, 128)
    os.truncate(path, size_of(255))
    with pytest.raises(InvalidEpochTable, match="256 slots take"):
        EpochTable.open(path, 256)
    os.truncate(path, size_of(300))
    with pytest.raises(InvalidEpochTable, match="256 slots take"):
        EpochTable.open(path, 256)


def test_another_versions_file_is_refused(path: str) -> None:
    with EpochTable.open(path, 256) as table:
        table.words[mapped.VERSION] = 7
        with pytest.raises(InvalidEpochTable, match="format 7"):
            EpochTable.open(path, 256)


def test_the_table_of_another_database_is_refused(path: str) -> None:
    EpochTable.open(path, 256, "shop").close()
    with pytest.raises(InvalidEpochTable, match="another database"):
        EpochTable.open(path, 256, "books")
    EpochTable.open(path, 256, "shop").close()


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_a_file_that_others_may_write_to_is_refused(path: str, mode: int) -> None:
    EpochTable.open(path, 256).close()
    os.chmod(path, mode)
    with pytest.raises(InvalidEpochTable, match="others may write"):
        EpochTable.open(path, 256)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_another_users_file_is_refused(path: str) -> None:
    EpochTable.open(path, 256).close()
    os.chown(path, 4711, -1)
    with pytest.raises(InvalidEpochTable, match="belongs to user 4711"):
        EpochTable.open(path, 256)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (errno.EACCES, "another user's"),
        (errno.EROFS, "Read-only file system"),
        (errno.ENOENT, "does not exist"),
    ],
)
def test_a_place_that_cannot_be_written_to_is_named_with_the_cause(
    path: str, monkeypatch: pytest.MonkeyPatch, error: int, words: str
) -> None:
    def refuse(*args: Any) -> int:
        raise OSError(error, os.strerror(error))

    with monkeypatch.context() as patched:
        patched.setattr(os, "open", refuse)
        with pytest.raises(InvalidEpochTable, match=words) as raised:
            EpochTable.open(path, 256)
    assert path in str(raised.value)
    assert "PGNOTIFY_EPOCH_TABLE" in str(raised.value)


def test_a_real_read_only_file_system_is_refused() -> None:
    for line in Path("/proc/mounts").read_text().splitlines():
        _, folder, _, options, *_ = line.split()
        if "ro" in options.split(",") and os.path.isdir(folder):
            break
    else:
        pytest.skip("nothing is mounted read-only here")
    with pytest.raises(InvalidEpochTable, match="cannot be opened"):
        EpochTable.open(f"{folder}/epochs", 256)


def test_a_full_file_system_is_an_error_at_once_and_no_crash_later(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(InvalidEpochTable, match="No space left"):
        EpochTable.open(path, 256)


@pytest.mark.parametrize("slots", [0, -1, True, 1.5, "64", None])
def test_a_number_of_slots_that_cannot_be_is_refused(path: str, slots: Any) -> None:
    with pytest.raises(InvalidArgument, match="slots="):
        EpochTable.open(path, slots)


def test_a_file_that_is_removed_is_made_again_and_all_is_stale(
    path: str, table: EpochTable
) -> None:
    before = table.capture(["a"])
    table.beat(node_clock())
    os.unlink(path)
    table.verify(node_clock())
    assert os.path.exists(path)
    assert not table.is_current(before)
    assert table.age() == float("inf")
    with EpochTable.open(path, 256) as other:
        assert other.id == table.id


def test_a_bump_goes_to_the_file_that_is_there_now(path: str, table: EpochTable) -> None:
    os.unlink(path)
    with EpochTable.open(path, 256) as other:
        before = other.capture(["a"])
        table.bump(["a"])
        assert not other.is_current(before)


def test_threads_that_bump_while_the_file_is_replaced_all_do_so(
    path: str, table: EpochTable
) -> None:
    rounds, threads = 300, 3
    failed: list[BaseException] = []
    stale: list[bool] = []

    def removed() -> None:
        os.unlink(path)

    barrier = threading.Barrier(threads, removed)

    def bump() -> None:
        try:
            for number in range(rounds):
                barrier.wait(DEADLINE)
                table.verify(node_clock())
                before = table.capture(["a"])
                if number % 2:
                    table.bump(["a"])
                else:
                    table.bump_all()
                stale.append(not table.is_current(before))
        except BaseException as exc:
            failed.append(exc)
            barrier.abort()
            raise

    bumping = [threading.Thread(target=bump) for _ in range(threads)]
    for thread in bumping:
        thread.start()
    for thread in bumping:
        thread.join(DEADLINE)
    assert not failed
    assert stale == [True] * rounds * threads


def test_a_table_that_is_cut_off_while_it_is_mapped_is_let_go_of_before_it_is_read(
    path: str, table: EpochTable, caplog: pytest.LogCaptureFixture
) -> None:
    before = table.capture(["a"])
    table.beat(node_clock())
    os.truncate(path, 100)
    with caplog.at_level(logging.ERROR, "django_pgnotify"):
        table.verify(node_clock())
        table.verify(node_clock())
    assert table.problem
    assert table.age() == float("inf")
    assert not table.is_current(before)
    assert table.bump(["a"]) > 0
    assert len(caplog.records) == 1, "said once"
    os.unlink(path)
    table.verify(node_clock() + 2_000_000_000)  # it tries again each second
    assert table.problem == ""
    assert table.is_current(table.capture(["a"]))


def test_a_process_that_dies_while_it_makes_the_file_leaves_one_to_go_on_with(path: str) -> None:
    with open(path, "wb") as made:
        os.posix_fallocate(made.fileno(), 0, size_of(256))  # and no header yet
    os.chmod(path, 0o600)
    with EpochTable.open(path, 256) as table:
        assert table.is_current(table.capture(["a"]))


def test_a_file_that_stays_locked_is_an_error_and_no_hang(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    monkeypatch.setattr(mapped, "LOCK_TIMEOUT", 0.05)
    with open(path, "wb") as other:
        os.fchmod(other.fileno(), 0o600)
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(InvalidEpochTable, match="locked by another process"):
            EpochTable.open(path, 256)


# -- processes ---------------------------------------------------------------------------------


OPEN_AND_BUMP = """
import sys
from django_pgnotify.epochs.table import EpochTable
path, number = sys.argv[1:]
sys.stdin.readline()
with EpochTable.open(path, 256) as table:
    stamps = [table.bump([f"of {number}", "of all"]) for _ in range(200)]
    print(table.id, *stamps)
"""


def test_many_processes_that_begin_at_once_share_one_table(path: str) -> None:
    """Whoever comes first makes it; nobody has one of their own, and no stamp is there twice."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", OPEN_AND_BUMP, path, str(number)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(6)
    ]
    said = [process.communicate("\n", DEADLINE)[0].split() for process in processes]
    assert [process.returncode for process in processes] == [0] * 6
    assert len({words[0] for words in said}) == 1
    stamps = [int(word) for words in said for word in words[1:]]
    assert len(set(stamps)) == len(stamps) == 1200
    with EpochTable.open(path, 256) as table:
        last = {number: int(words[-1]) for number, words in enumerate(said)}
        for number, stamp in last.items():
            assert table.words[HEADER_WORDS + table.slot_of(f"of {number}")] >= stamp
        assert table.words[HEADER_WORDS + table.slot_of("of all")] in stamps
        assert time_of(table.words[LATEST]) >= time_of(max(stamps))


def _bump_on_request(table: EpochTable, requests: Connection) -> None:
    while (name := requests.recv()) is not None:
        requests.send(table.bump([name]))


@FORKS
def test_forked_children_write_to_the_same_table_under_a_number_of_their_own(
    table: EpochTable,
) -> None:
    fork = multiprocessing.get_context("fork")
    mine = table.bump(["a"])
    children = []
    for _ in range(3):
        ours, theirs = fork.Pipe()
        child = fork.Process(target=_bump_on_request, args=(table, theirs))
        child.start()
        children.append((child, ours))
    writers = {mine % WRITERS}
    for child, pipe in children:
        before = table.capture(["a"])
        pipe.send("a")
        assert pipe.poll(DEADLINE)
        writers.add(pipe.recv() % WRITERS)
        assert not table.is_current(before)
        pipe.send(None)
        child.join(DEADLINE)
        assert child.exitcode == 0
    assert len(writers) == 4


@FORKS
def test_a_table_in_memory_begins_anew_in_a_forked_child() -> None:
    with EpochTable.in_process(64) as table:
        before = table.capture(["a"])
        table.beat(node_clock())
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            fresh = not table.is_current(before) and table.age() == float("inf")
            os.write(write, b"1" if fresh else b"0")
            os._exit(0)
        os.waitpid(pid, 0)
        os.close(write)
        assert os.read(read, 1) == b"1"
        os.close(read)
        assert table.is_current(before)


@FORKS
def test_a_fork_while_another_thread_bumps_leaves_no_lock_behind(table: EpochTable) -> None:
    stopped = threading.Event()

    def bump_for_ever() -> None:
        while not stopped.is_set():
            table.bump(["a"])

    thread = threading.Thread(target=bump_for_ever)
    thread.start()
    try:
        for _ in range(20):
            pid = os.fork()
            if pid == 0:
                signal.alarm(int(DEADLINE))
                table.bump(["b"])
                os._exit(0)
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    finally:
        stopped.set()
        thread.join()


READ_WHILE_WRITTEN = """
import sys
from django_pgnotify.epochs.table import EpochTable
with EpochTable.open(sys.argv[1], 256) as table:
    print("ready", flush=True)
    seen = torn = 0
    last = {}
    while (line := sys.stdin.readline().strip()) != "end":
        for _ in range(2000):
            for name in ("a", "b", "c"):
                [_, epoch] = table.capture([name]).epochs
                seen += epoch != last.get(name)
                torn += epoch < last.get(name, 0)
                last[name] = epoch
        print("more", flush=True)
    print(seen, torn)
"""


def test_no_reader_sees_half_a_stamp_or_an_older_one(path: str) -> None:
    with EpochTable.open(path, 256) as table:
        reader = subprocess.Popen(
            [sys.executable, "-c", READ_WHILE_WRITTEN, path],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert reader.stdin is not None
        assert reader.stdout is not None
        assert reader.stdout.readline() == "ready\n"
        for _ in range(10):
            reader.stdin.write("go\n")
            reader.stdin.flush()
            for _ in range(300):
                table.bump(["a", "b"])
                table.bump(["c"])
            assert reader.stdout.readline() == "more\n"
        out, _ = reader.communicate("end\n", DEADLINE)
        seen, torn = map(int, out.split())
        assert seen > 3
        assert torn == 0


def test_the_global_epoch_is_one_of_the_words_of_every_capture(table: EpochTable) -> None:
    assert table.capture(["a"]).epochs[0] == table.words[GLOBAL]


def test_the_package_can_be_imported_where_there_is_no_flock() -> None:
    modules = ["epochs.node", "epochs.counts", "caching"]
    program = "import sys, importlib\nsys.modules['fcntl'] = None\n" + "".join(
        f"importlib.import_module('django_pgnotify.{name}')\n" for name in modules
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT, timeout=DEADLINE)


def test_whether_the_table_is_in_use_is_known_without_an_import(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is asked at each publication, and a child may be forked while another thread imports."""

    def imports(path: str) -> None:
        raise AssertionError(f"{path} is imported")

    monkeypatch.setattr(use, "import_string", imports)
    monkeypatch.setattr(use, "_looked_at", float("-inf"))
    monkeypatch.setattr(use, "_declared", False)
    use.is_in_use()
