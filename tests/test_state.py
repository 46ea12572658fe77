"""The state database, SQLite and PostgreSQL alike: its schema, its lease, and commits that are whole or nothing."""

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import alembic.command
import alembic.config
import pytest
import sqlalchemy as sa
import stack
import virtual
from alembic import autogenerate
from alembic.runtime.migration import MigrationContext

from dicomcast import errors
from dicomcast.state import jobs, operators, schema, store, tables, waiting

FEED = "http://dicom.test"
START = store.Position(0, 0, 0, None)


@pytest.fixture
def clock() -> virtual.Clock:
    return virtual.Clock()


@pytest.fixture
def open_store(database_url: str, clock: virtual.Clock) -> Iterator[Callable[[], store.Store]]:
    """Further workers on the same database."""
    opened: list[store.Store] = []

    def another() -> store.Store:
        opened.append(store.Store(database_url, clock=clock))
        opened[-1].open()
        return opened[-1]

    yield another
    for one in opened:
        one.close()


@pytest.fixture
def state(open_store: Callable[[], store.Store]) -> store.Store:
    return open_store()


@pytest.fixture
def lease(state: store.Store) -> store.Lease:
    return acquire(state)


@pytest.fixture
def engine(database_url: str) -> Iterator[sa.Engine]:
    """A look past the store."""
    made = sa.create_engine(database_url)
    yield made
    made.dispose()


def acquire(state: store.Store, owner: str = "a", *, seconds: float = 20, feed: str = FEED) -> store.Lease:
    return state.acquire(feed, url=FEED, owner=owner, seconds=seconds)


def commit(state: store.Store, lease: store.Lease, position: store.Position = START, **effects: Any) -> int:
    return state.commit(lease, position, store.Effects(**effects)).opened


def a_study(uid: str = "1.2.3", **changes: Any) -> store.Study:
    study = store.Study(
        study_instance_uid=uid,
        outcome="synced",
        imaging_study="s1",
        version="3",
        patient="p1",
        series=2,
        instances=40,
        first_sequence=1,
        last_sequence=41,
        mapping_digest="d" * 64,
        synced_at=virtual.Clock().now(),
    )
    return replace(study, **changes)


def a_failure(**changes: Any) -> store.Failure:
    failure = store.Failure(
        kind="invalid-value",
        stage="map",
        message="m",
        study_instance_uid="1.2.3",
        series_instance_uid="1.2.3.1",
        sop_instance_uid="1.2.3.1.1",
        sequence=7,
        rule="study.started",
        tag="00080020",
    )
    return replace(failure, **changes)


def rows(state: store.Store, lease: store.Lease, *columns: str, **chosen: Any) -> list[tuple[Any, ...]]:
    return [tuple(row[name] for name in columns) for row in state.failures(lease.feed_id, **chosen)]


def together(*actions: Callable[[], object]) -> list[BaseException | None]:
    """Run all at once, each in a thread; what each raised."""
    raised: list[BaseException | None] = [None] * len(actions)
    ready = threading.Barrier(len(actions))

    def run(at: int) -> None:
        ready.wait()
        try:
            actions[at]()
        except BaseException as failure:
            raised[at] = failure

    threads = [threading.Thread(target=run, args=(at,)) for at in range(len(actions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised


# The schema


def test_empty_database_is_made_and_found_again(open_store: Callable[[], store.Store], engine: sa.Engine) -> None:
    state = open_store()
    open_store()

    assert {*tables.metadata.tables, "alembic_version"} == set(sa.inspect(engine).get_table_names())
    assert (schema.newest(), schema.newest()) == state.revision()


def test_migrations_make_what_the_code_expects(state: store.Store, engine: sa.Engine) -> None:
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})

        assert autogenerate.compare_metadata(context, tables.metadata) == []


def test_many_workers_open_an_empty_database_at_once(database_url: str, clock: virtual.Clock) -> None:
    stores = [store.Store(database_url, clock=clock) for _ in range(6)]

    raised = together(*(one.open for one in stores))

    assert raised == [None] * 6
    assert {(schema.newest(), schema.newest())} == {one.revision() for one in stores}
    for one in stores:
        one.close()


def set_revision(engine: sa.Engine, revision: str) -> None:
    with engine.begin() as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = :revision"), {"revision": revision})


def test_schema_that_a_newer_version_made_is_refused_and_left_alone(
    open_store: Callable[[], store.Store], engine: sa.Engine
) -> None:
    state = open_store()
    set_revision(engine, "9999")

    for refused in (open_store, state.upgrade):
        with pytest.raises(errors.Incompatible, match="newer dicomcast"):
            refused()
    assert state.revision()[0] == "9999"


def test_schema_that_is_behind_is_refused_and_upgraded_with_all_that_it_holds(
    database_url: str, engine: sa.Engine, clock: virtual.Clock
) -> None:
    config = alembic.config.Config()
    config.set_main_option("script_location", str(Path(str(schema.__file__)).with_name("migrations")))
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        alembic.command.upgrade(config, "0001")
        connection.execute(sa.text("INSERT INTO feed (id, name, url, latest, token) VALUES (1, 'f', 'f', 7, 1)"))
        study = "1, '1.2.3', 'synced', 1, 40, 1, 7, 'abc', '2026-01-01 00:00:00'"
        columns = "feed_id, study_instance_uid, outcome, series, instances, first_sequence, last_sequence"
        connection.execute(sa.text(f"INSERT INTO study ({columns}, mapping_digest, synced_at) VALUES ({study})"))
    state = store.Store(database_url, clock=clock)

    with pytest.raises(errors.Incompatible, match="dicomcast db upgrade"):
        state.open()
    assert state.upgrade() == ("0001", schema.newest())
    state.open()

    assert state.study_row(1, "1.2.3")["instances"] == 40
    state.close()


def test_upgrade_makes_an_empty_database_and_does_nothing_to_a_new_one(database_url: str, clock: virtual.Clock) -> None:
    state = store.Store(database_url, clock=clock)

    assert [(None, schema.newest()), (schema.newest(), schema.newest())] == [state.upgrade(), state.upgrade()]
    state.close()


def test_making_the_tables_is_all_or_nothing(database_url: str, engine: sa.Engine, clock: virtual.Clock) -> None:
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE study (of_somebody_else INTEGER)")
    state = store.Store(database_url, clock=clock)

    with pytest.raises(Exception, match=r"study|be used"):
        state.open()

    assert {"study"} == set(sa.inspect(engine).get_table_names())
    state.close()


@pytest.mark.parametrize("url", ["", "sqlite", "mysql://host/name", "oracle+none://host"])
def test_address_that_is_no_database_of_ours_is_a_misconfiguration(url: str, clock: virtual.Clock) -> None:
    with pytest.raises(errors.Misconfigured, match=r"database\.url"):
        store.Store(url, clock=clock)


# The lease


def test_lease_is_held_by_one_worker_per_feed(open_store: Callable[[], store.Store]) -> None:
    first, second = open_store(), open_store()
    acquire(first, "a")

    with pytest.raises(errors.LeaseHeld):
        acquire(second, "b")
    acquire(second, "b", feed="another feed")


def test_only_one_of_many_gets_the_lease(open_store: Callable[[], store.Store]) -> None:
    stores = [open_store() for _ in range(5)]

    raised = together(*(lambda one=one, at=at: acquire(one, str(at)) for at, one in enumerate(stores)))

    assert {type(None): 1, errors.LeaseHeld: 4} == Counter(map(type, raised))


def test_released_lease_is_free_at_once_and_was_given_back(open_store: Callable[[], store.Store]) -> None:
    first, second = open_store(), open_store()
    before = acquire(first, "a")
    first.release(before)

    after = acquire(second, "b")

    assert (before.token + 1, False) == (after.token, after.expired)


def expire(engine: sa.Engine) -> None:
    """Let all leases run out, on whichever clock they are measured by."""
    with engine.begin() as connection:
        past = datetime.fromisoformat("2020-01-01T00:00:00+00:00")
        connection.execute(sa.update(tables.feed).values(lease_until=past))


def test_expired_lease_is_taken_over_with_a_higher_token(
    open_store: Callable[[], store.Store], engine: sa.Engine
) -> None:
    first, second = open_store(), open_store()
    before = acquire(first, "a")
    expire(engine)

    after = acquire(second, "b")

    assert (before.feed_id, before.token + 1, True) == (after.feed_id, after.token, after.expired)


def test_renewed_lease_is_not_free(open_store: Callable[[], store.Store], engine: sa.Engine) -> None:
    first, second = open_store(), open_store()
    lease = acquire(first, "a")
    expire(engine)
    first.renew(lease, seconds=20)

    with pytest.raises(errors.LeaseHeld):
        acquire(second, "b")


def test_lease_is_measured_by_the_clock_that_its_holders_share(
    state: store.Store, clock: virtual.Clock, database_url: str
) -> None:
    acquire(state, "a", seconds=20)
    clock.advance(21)

    if database_url.startswith("sqlite"):
        assert acquire(state, "b").expired
    else:
        with pytest.raises(errors.LeaseHeld):
            acquire(state, "b")


def test_worker_that_lost_its_lease_changes_nothing(open_store: Callable[[], store.Store], engine: sa.Engine) -> None:
    first, second = open_store(), open_store()
    old = acquire(first, "a")
    commit(first, old, store.Position(0, 5, 5, None))
    expire(engine)
    new = acquire(second, "b")

    with pytest.raises(errors.LeaseLost):
        commit(first, old, store.Position(0, 9, 9, None), studies={"1.2.3": a_study()}, failures=[a_failure()])
    with pytest.raises(errors.LeaseLost):
        first.renew(old, seconds=20)
    first.release(old)

    assert store.Position(0, 5, 5, None) == second.position(new)
    assert (second.studies(new, ["1.2.3"])["1.2.3"], second.failures(new.feed_id)) == ((None, False), [])
    second.renew(new, seconds=20)


def test_worker_that_gave_its_lease_back_may_write_no_more(state: store.Store, lease: store.Lease) -> None:
    state.release(lease)

    with pytest.raises(errors.LeaseLost):
        commit(state, lease)


# What is committed


def test_feed_that_was_never_begun_has_no_position(state: store.Store, lease: store.Lease) -> None:
    assert state.position(lease) is None


@pytest.mark.parametrize("mark", [None, ("1.2.3", "1.2.3.1.1", "2024-01-15T14:30:00.1234567+00:00")])
def test_position_comes_back_as_it_was(
    state: store.Store, lease: store.Lease, mark: tuple[str, str, str] | None
) -> None:
    position = store.Position(3, 2**40, 2**41, mark)
    commit(state, lease, position)

    assert position == state.position(lease)


def test_studies_and_patients_come_back_as_the_last_commit_left_them(state: store.Store, lease: store.Lease) -> None:
    patient = store.Patient("p1", ours=True, version=None, sequence=4)
    commit(state, lease, studies={"1.2.3": a_study()}, patients={"p1": patient})
    changed = a_study(outcome="deleted", imaging_study=None, version=None, patient=None, instances=0)
    moved = replace(patient, ours=False, version="9", sequence=2**40)
    commit(state, lease, studies={"1.2.3": changed, "1.2.4": a_study("1.2.4")}, patients={"p1": moved})

    assert (changed, False) == state.studies(lease, ["1.2.3"])["1.2.3"]
    assert (a_study("1.2.4"), False) == state.studies(lease, ["1.2.4"])["1.2.4"]
    assert (moved, None) == (state.patient(lease, "p1"), state.patient(lease, "p2"))


def test_feeds_do_not_see_each_other(state: store.Store, lease: store.Lease) -> None:
    other = acquire(state, feed="other")
    commit(
        state, lease, studies={"1.2.3": a_study()}, failures=[a_failure(heals=True)], missed={4: virtual.Clock().now()}
    )

    assert (state.studies(other, ["1.2.3"])["1.2.3"], state.gaps(other), state.failures(other.feed_id)) == (
        (None, False),
        {},
        [],
    )
    commit(state, other, reconciled={"1.2.3": ("mapped", 9)}, closed_gaps={4})
    assert (list(state.gaps(lease)), len(state.failures(lease.feed_id))) == ([4], 1)


def test_moments_are_aware_and_to_the_microsecond(state: store.Store, lease: store.Lease) -> None:
    moment = datetime.fromisoformat("2026-03-29T02:30:00.123456+02:00")
    commit(state, lease, studies={"1.2.3": a_study(synced_at=moment)}, missed={4: moment})

    study, _ = state.studies(lease, ["1.2.3"])["1.2.3"]
    assert study is not None
    assert [(moment, timedelta(0))] * 2 == [
        (found, found.utcoffset()) for found in (study.synced_at, state.gaps(lease)[4])
    ]


def test_commit_is_all_or_nothing(state: store.Store, lease: store.Lease) -> None:
    commit(state, lease, store.Position(0, 5, 5, None))
    impossible = a_study("1.2.4", outcome=None)

    with pytest.raises(sa.exc.IntegrityError):
        commit(
            state,
            lease,
            store.Position(0, 9, 9, None),
            studies={"1.2.3": a_study(), "1.2.4": impossible},
            failures=[a_failure()],
            missed={7: virtual.Clock().now()},
        )

    assert store.Position(0, 5, 5, None) == state.position(lease)
    assert (state.studies(lease, ["1.2.3"])["1.2.3"], state.gaps(lease)) == ((None, False), {})
    assert state.failures(lease.feed_id) == []


def test_gaps_keep_the_moment_they_were_first_missed_until_they_are_closed(
    state: store.Store, lease: store.Lease
) -> None:
    first, later = virtual.Clock().now(), virtual.Clock().now() + timedelta(hours=1)
    commit(state, lease, missed={3: first, 4: first, 2**40: first})
    commit(state, lease, missed={4: later, 5: later, 6: later}, closed_gaps={3, 6, 99})

    assert {4: first, 5: later, 2**40: first} == state.gaps(lease)


def test_thousands_of_gaps_are_closed_in_one_commit(state: store.Store, lease: store.Lease) -> None:
    commit(state, lease, missed=dict.fromkeys(range(1, 2001), virtual.Clock().now()))
    commit(state, lease, closed_gaps=set(range(1, 2000)))

    assert list(state.gaps(lease)) == [2000]


def test_feed_is_current_when_nothing_newer_is_known(
    state: store.Store, lease: store.Lease, clock: virtual.Clock
) -> None:
    commit(state, lease, store.Position(0, 5, 5, None))
    then = clock.now()
    clock.advance(60)
    state.commit(lease, store.Position(0, 5, 9, None), store.Effects(), seen_at=clock.now())

    feed = state.feed(FEED)
    assert feed is not None
    assert (then, clock.now(), 9) == (feed["current_at"], feed["seen_at"], feed["latest"])
    assert state.feed("unknown") is None


# Failures


def test_failure_comes_back_with_all_that_is_known(
    state: store.Store, lease: store.Lease, clock: virtual.Clock
) -> None:
    assert commit(state, lease, failures=[a_failure()]) == 1

    (row,) = state.failures(lease.feed_id)
    expected = {
        "feed_id": lease.feed_id,
        "id": row["id"],
        "status": "open",
        "kind": "invalid-value",
        "stage": "map",
        "study_instance_uid": "1.2.3",
        "series_instance_uid": "1.2.3.1",
        "sop_instance_uid": "1.2.3.1.1",
        "sequence": 7,
        "rule": "study.started",
        "tag": "00080020",
        "message": "m",
        "attempts": 1,
        "first_seen": clock.now(),
        "last_seen": clock.now(),
        "next_retry": None,
        "resolution": None,
        "instances": 1,
        "note": None,
    }
    assert expected == row


def test_same_failure_again_is_the_same_row_with_one_more_attempt(
    state: store.Store, lease: store.Lease, clock: virtual.Clock
) -> None:
    first = clock.now()
    opened = [commit(state, lease, failures=[a_failure()])]
    clock.advance(60)
    opened.append(commit(state, lease, failures=[a_failure(sequence=9, message="n", rule="other")]))

    assert opened == [1, 0]
    assert [(2, 9, "n", "other", first, clock.now())] == rows(
        state, lease, "attempts", "sequence", "message", "rule", "first_seen", "last_seen"
    )


@pytest.mark.parametrize(
    "other",
    [
        {"kind": "missing-value"},
        {"stage": "validate"},
        {"sop_instance_uid": "1.2.3.1.2"},
        {"sop_instance_uid": None, "series_instance_uid": None},
        {"study_instance_uid": "1.2.4"},
    ],
    ids=str,
)
def test_failure_of_another_instance_stage_or_kind_is_another_row(
    state: store.Store, lease: store.Lease, other: dict[str, Any]
) -> None:
    assert commit(state, lease, failures=[a_failure(), a_failure(**other)]) == 2
    assert rows(state, lease, "attempts") == [(1,), (1,)]


def test_malformed_entries_are_one_row_per_sequence(state: store.Store, lease: store.Lease) -> None:
    def malformed(sequence: int) -> store.Failure:
        return store.Failure(kind="malformed-entry", stage="read", message="m", sequence=sequence)

    opened = [
        commit(state, lease, failures=[malformed(1), malformed(2)]),
        commit(state, lease, failures=[malformed(2)]),
    ]

    assert opened == [2, 0]
    assert rows(state, lease, "sequence", "attempts") == [(1, 1), (2, 2)]


def test_entries_of_other_partitions_are_one_row_per_sequence_and_no_study_of_ours(
    state: store.Store, lease: store.Lease
) -> None:
    foreign = a_failure(kind="partition", stage="read")
    commit(state, lease, studies={"1.2.3": a_study()}, failures=[foreign, replace(foreign, sequence=8)])
    commit(state, lease, reconciled={"1.2.3": ("mapped", 9)})

    assert rows(state, lease, "sequence", "status") == [(7, "open"), (8, "open")]
    assert (a_study(), False) == state.studies(lease, ["1.2.3"])["1.2.3"]


def test_what_heals_is_tried_again_after_ever_longer_pauses(
    state: store.Store, lease: store.Lease, clock: virtual.Clock
) -> None:
    pauses = []
    for _ in range(7):
        commit(state, lease, failures=[a_failure(heals=True)])
        (status, due) = rows(state, lease, "status", "next_retry")[0]
        assert status == "retrying"
        pauses.append((due - clock.now()).total_seconds())
        commit(state, lease, failures=[a_failure(heals=True)])  # another change of the study is no retry

        assert rows(state, lease, "next_retry")[0] == (due,)
        clock.advance(pauses[-1])

    assert pauses == [60, 300, 1800, 7200, 21600, 21600, 21600]


def test_studies_are_due_when_their_next_retry_has_come_the_longest_waiting_first(
    state: store.Store, lease: store.Lease, clock: virtual.Clock
) -> None:
    commit(state, lease, failures=[a_failure(study_instance_uid="1.9", heals=True)])
    clock.advance(1)
    several = [a_failure(study_instance_uid="1.1", sop_instance_uid=f"1.1.{at}", heals=True) for at in range(3)]
    commit(state, lease, failures=[*several, a_failure(study_instance_uid="1.5")])
    early = state.due(lease)
    clock.advance(60)

    assert (early, state.due(lease), state.due(lease, limit=1)) == ([], ["1.9", "1.1"], ["1.9"])


def test_failure_that_does_not_heal_any_more_is_not_due(
    state: store.Store, lease: store.Lease, clock: virtual.Clock
) -> None:
    commit(state, lease, failures=[a_failure(heals=True)])
    commit(state, lease, failures=[a_failure(heals=False)])
    clock.advance(3600)

    assert state.due(lease) == []
    assert rows(state, lease, "status", "next_retry") == [("open", None)]


def test_reconcile_resolves_all_failures_of_its_study_but_those_it_met(
    state: store.Store, lease: store.Lease, clock: virtual.Clock
) -> None:
    mended, stays = a_failure(heals=True), a_failure(sop_instance_uid="1.2.3.1.2")
    elsewhere = a_failure(study_instance_uid="1.2.4")
    commit(state, lease, failures=[mended, stays, elsewhere])
    clock.advance(5)
    commit(state, lease, failures=[stays], reconciled={"1.2.3": ("mapped", 9)})

    assert [("resolved", "mapped", None, clock.now())] == rows(
        state, lease, "status", "resolution", "next_retry", "last_seen", statuses=["resolved"]
    )
    assert rows(state, lease, "study_instance_uid", "sop_instance_uid", "attempts") == [
        ("1.2.3", "1.2.3.1.2", 2),
        ("1.2.4", "1.2.3.1.1", 1),
    ]


def test_failure_after_its_resolution_is_its_row_opened_again(state: store.Store, lease: store.Lease) -> None:
    commit(state, lease, failures=[a_failure()])
    commit(state, lease, reconciled={"1.2.3": ("deleted", 9)})

    assert commit(state, lease, failures=[a_failure()]) == 1
    assert rows(state, lease, "status", "resolution", "attempts", statuses=["open", "resolved"]) == [
        ("open", None, 1),
    ]


def test_thousands_of_failures_stay_and_go_in_one_commit(state: store.Store, lease: store.Lease) -> None:
    many = [a_failure(sop_instance_uid=f"1.2.3.1.{at}", rule=f"rule.{at}") for at in range(600)]
    commit(state, lease, failures=many)
    commit(state, lease, failures=many[1:-1], reconciled={"1.2.3": ("mapped", 9)})

    assert (len(state.failures(lease.feed_id)), len(state.failures(lease.feed_id, statuses=["resolved"]))) == (598, 2)


def alike(count: int, **changes: Any) -> list[store.Failure]:
    return [a_failure(sop_instance_uid=f"1.2.3.1.{at}", sequence=at + 1, **changes) for at in range(count)]


def test_from_twenty_alike_on_a_study_has_one_row_that_counts_them(state: store.Store, lease: store.Lease) -> None:
    commit(state, lease, failures=[*alike(20), a_failure(rule="other.rule", sop_instance_uid="1.2.3.2.1")])

    assert rows(state, lease, "rule", "instances", "sop_instance_uid", "sequence") == [
        ("study.started", 20, None, 20),
        ("other.rule", 1, "1.2.3.2.1", 7),
    ]


def test_single_rows_become_the_one_that_counts_them_and_are_not_called_resolved(
    state: store.Store, lease: store.Lease
) -> None:
    commit(state, lease, failures=alike(19))
    commit(state, lease, failures=alike(30), reconciled={"1.2.3": ("mapped", 99)})
    commit(state, lease, failures=alike(25), reconciled={"1.2.3": ("mapped", 99)})

    assert rows(state, lease, "instances", "attempts", statuses=[]) == [(25, 2)]


def test_row_that_counts_is_resolved_where_fewer_fail(state: store.Store, lease: store.Lease) -> None:
    commit(state, lease, failures=alike(20))
    commit(state, lease, failures=alike(2), reconciled={"1.2.3": ("mapped", 99)})

    assert rows(state, lease, "status", "instances", statuses=[]) == [("resolved", 20), ("open", 1), ("open", 1)]


def test_row_that_counts_grows_by_what_a_fold_meets_and_is_exact_after_a_reconcile(
    state: store.Store, lease: store.Lease
) -> None:
    first, more = alike(30), [replace(one, sequence=one.sequence + 30) for one in alike(25)]
    commit(state, lease, failures=first)
    commit(state, lease, failures=more)
    commit(state, lease, failures=more)  # read again after a crash
    folded = rows(state, lease, "instances")
    commit(state, lease, failures=alike(52), reconciled={"1.2.3": ("mapped", 99)})

    assert (folded, rows(state, lease, "instances")) == ([(55,)], [(52,)])


def test_what_was_dismissed_as_a_whole_stays_so_one_by_one(
    state: store.Store, lease: store.Lease, clock: virtual.Clock
) -> None:
    commit(state, lease, failures=alike(20))
    operators.dismiss(state, lease.feed_id, kind="invalid-value", reason="phantoms", who="me", now=clock.now())

    opened = commit(state, lease, failures=alike(19), reconciled={"1.2.3": ("mapped", 99)})

    assert (opened, rows(state, lease, "id")) == (0, [])
    assert rows(state, lease, "note", statuses=["dismissed"]) == [("phantoms",)] * 19


def test_what_was_dismissed_one_by_one_stays_beside_the_row_that_counts(
    state: store.Store, lease: store.Lease, clock: virtual.Clock
) -> None:
    commit(state, lease, failures=alike(19))
    operators.dismiss(state, lease.feed_id, kind="invalid-value", reason="phantoms", who="me", now=clock.now())

    commit(state, lease, failures=alike(20), reconciled={"1.2.3": ("mapped", 99)})
    met = rows(state, lease, "instances"), rows(state, lease, "note", statuses=["dismissed"])
    commit(state, lease, reconciled={"1.2.3": ("mapped", 99)})

    assert met == ([(20,)], [("phantoms",)] * 19)
    assert rows(state, lease, "id", statuses=["open", "dismissed"]) == []


@pytest.mark.parametrize("database_url", ["postgres"], indirect=True)
def test_what_an_operator_dismisses_during_a_commit_is_dismissed(
    state: store.Store, lease: store.Lease, engine: sa.Engine
) -> None:
    commit(state, lease, failures=[a_failure()])
    with engine.begin() as connection, ThreadPoolExecutor() as pool:
        values = {"status": "dismissed", "resolution": "dismissed", "note": "phantom"}
        connection.execute(sa.update(tables.failure).values(values))
        meanwhile = pool.submit(commit, state, lease, failures=[a_failure()])
        with pytest.raises(TimeoutError):
            meanwhile.result(timeout=0.5)
        connection.commit()

    assert (meanwhile.result(), rows(state, lease, "status", "note", statuses=[])) == (0, [("dismissed", "phantom")])


@pytest.mark.parametrize("database_url", ["postgres"], indirect=True)
def test_job_that_is_cancelled_during_a_commit_of_its_work_locks_nobody_out(
    state: store.Store, lease: store.Lease, clock: virtual.Clock
) -> None:
    raised: list[BaseException | None] = []
    for number in range(6):
        job = jobs.begin(state, lease.feed_id, "backfill", f"{number}", by="me", now=clock.now())
        jobs.add(state, job, [f"1.2.{at}" for at in range(1500)])
        work = waiting.due(state, lease, now=clock.now(), passing_over=(), only=job.id, limit=1500)
        worked = {one.id: (one.study_instance_uid, "unchanged") for one in reversed(work)}
        raised += together(
            partial(commit, state, lease, worked=worked),
            partial(jobs.cancel, state, lease.feed_id, job.id, by="me", now=clock.now()),
        )

    assert raised == [None] * 12


def test_dismissed_failure_stays_so_while_it_fails_for_the_same_reason(
    state: store.Store, lease: store.Lease, clock: virtual.Clock
) -> None:
    commit(state, lease, failures=[a_failure()])
    (row,) = state.failures(lease.feed_id)
    operators.dismiss(state, lease.feed_id, ids=[row["id"]], reason="phantom", who="me", now=clock.now())

    again = commit(state, lease, failures=[a_failure()])
    during = rows(state, lease, "status", "note", "attempts", statuses=[])
    other = commit(state, lease, failures=[a_failure(tag="00080030")])

    assert (again, during) == (0, [("dismissed", "phantom", 2)])
    assert (other, rows(state, lease, "status", "note", statuses=[])) == (1, [("open", None)])


def test_dismissed_failure_is_resolved_where_its_study_is_mapped(
    state: store.Store, lease: store.Lease, clock: virtual.Clock
) -> None:
    commit(state, lease, failures=[a_failure()])
    operators.dismiss(state, lease.feed_id, kind="invalid-value", reason="no", who="me", now=clock.now())
    commit(state, lease, reconciled={"1.2.3": ("mapped", 99)})

    assert rows(state, lease, "status", "resolution", statuses=[]) == [("resolved", "mapped")]


def test_failures_are_found_by_status_kind_and_study(state: store.Store, lease: store.Lease) -> None:
    commit(
        state, lease, failures=[a_failure(), a_failure(kind="conflict", heals=True), a_failure(study_instance_uid="1")]
    )

    assert len(rows(state, lease, "id")) == 3
    assert rows(state, lease, "kind", statuses=["retrying"]) == [("conflict",)]
    assert rows(state, lease, "study_instance_uid", kind="conflict") == [("1.2.3",)]
    assert rows(state, lease, "kind", study_uid="1") == [("invalid-value",)]
    assert state.counts(lease.feed_id) == ({}, {"invalid-value": 2, "conflict": 1})


def test_study_knows_whether_failures_of_it_are_open(state: store.Store, lease: store.Lease) -> None:
    commit(state, lease, studies={"1.2.3": a_study()}, failures=[a_failure()])
    during = state.studies(lease, ["1.2.3"])["1.2.3"]
    commit(state, lease, reconciled={"1.2.3": ("mapped", 9)})

    assert ((a_study(), True), (a_study(), False)) == (during, state.studies(lease, ["1.2.3"])["1.2.3"])


def test_studies_are_counted_by_outcome(state: store.Store, lease: store.Lease) -> None:
    studies = {
        uid: a_study(uid, outcome=outcome) for uid, outcome in (("1", "synced"), ("2", "synced"), ("3", "failed"))
    }
    commit(state, lease, studies=studies)

    assert state.counts(lease.feed_id) == ({"synced": 2, "failed": 1}, {})
    row = state.study_row(lease.feed_id, "3")
    assert row is not None
    assert (row["outcome"], state.study_row(lease.feed_id, "4")) == ("failed", None)


# Issues


ISSUE: store.IssueKey = ("series.laterality", "00200060", "CS", "instances disagree")


def test_issues_add_up_until_a_reconcile_replaces_them(state: store.Store, lease: store.Lease) -> None:
    def counted() -> list[tuple[str, int]]:
        return [(row["tag"], row["instances"]) for row in state.issues(lease.feed_id, study_uid="1.2.3")]

    other: store.IssueKey = ("study.started", "00080020", "DA", "no date")
    commit(state, lease, issues={"1.2.3": Counter({ISSUE: 2, other: 1}), "1.2.4": Counter({ISSUE: 5})})
    commit(state, lease, issues={"1.2.3": Counter({ISSUE: 3})})
    before = counted()
    commit(state, lease, reconciled={"1.2.3": ("mapped", 9)}, issues={"1.2.3": Counter({ISSUE: 1})})

    assert (before, counted()) == ([("00200060", 5), ("00080020", 1)], [("00200060", 1)])
    assert [row["instances"] for row in state.issues(lease.feed_id)] == [6]


def test_one_issue_under_two_value_representations_is_counted_in_full(state: store.Store, lease: store.Lease) -> None:
    rule, tag, _, reason = ISSUE
    commit(state, lease, issues={"1.2.3": Counter({ISSUE: 2, (rule, tag, "LO", reason): 3})})

    assert sum(row["instances"] for row in state.issues(lease.feed_id)) == 5


# Effects that could not be committed


def test_effects_that_waited_end_as_if_they_had_been_committed_one_by_one(
    state: store.Store, lease: store.Lease
) -> None:
    def steps() -> list[store.Effects]:
        return [
            store.Effects(
                studies={"1.2.3": a_study()},
                failures=[a_failure(), a_failure(study_instance_uid="1.2.4")],
                issues={"1.2.3": Counter({ISSUE: 2}), "1.2.4": Counter({ISSUE: 1})},
                missed={4: virtual.Clock().now(), 5: virtual.Clock().now()},
            ),
            store.Effects(
                studies={"1.2.3": a_study(version="4")},
                failures=[a_failure(sop_instance_uid="1.2.3.1.9")],
                reconciled={"1.2.3": ("mapped", 9)},
                issues={"1.2.3": Counter({ISSUE: 1}), "1.2.4": Counter({ISSUE: 1})},
                closed_gaps={4},
            ),
        ]

    def shown(feed: store.Lease) -> object:
        open_now = rows(state, feed, "study_instance_uid", "sop_instance_uid")
        issues = [state.issues(feed.feed_id, study_uid=uid) for uid in ("1.2.3", "1.2.4")]
        return state.studies(feed, ["1.2.3"])["1.2.3"], open_now, issues, state.gaps(feed)

    for effects in steps():
        state.commit(lease, START, effects)
    waited, last = steps()
    waited.follow(last)
    other = acquire(state, feed="other")
    state.commit(other, START, waited)

    assert shown(lease) == shown(other)


# Company, and absence


def test_readers_beside_a_writer_meet_no_lock(open_store: Callable[[], store.Store]) -> None:
    writer, reader = open_store(), open_store()
    lease = acquire(writer)
    commit(writer, lease)

    def write() -> None:
        for at in range(60):
            studies = {f"1.{at}.{one}": a_study(f"1.{at}.{one}") for one in range(20)}
            commit(writer, lease, store.Position(0, at, at, None), studies=studies, failures=[a_failure()])

    def look() -> None:
        for _ in range(60):
            reader.counts(lease.feed_id)
            reader.failures(lease.feed_id)
            reader.feed(FEED)

    assert together(write, look, look, look) == [None] * 4
    assert reader.counts(lease.feed_id)[0] == {"synced": 1200}


def test_writers_of_different_feeds_wait_for_each_other(open_store: Callable[[], store.Store]) -> None:
    stores = [open_store() for _ in range(3)]
    leases = [acquire(one, feed=str(at)) for at, one in enumerate(stores)]

    def write(at: int) -> None:
        for step in range(30):
            commit(stores[at], leases[at], store.Position(0, step, step, None), failures=[a_failure()])
            stores[at].renew(leases[at], seconds=20)

    assert together(*(lambda at=at: write(at) for at in range(3))) == [None] * 3
    assert [one.position(held).watermark for one, held in zip(stores, leases, strict=True)] == [29] * 3  # type: ignore[union-attr]


def test_reader_sees_the_state_before_or_after_a_commit_and_nothing_between(
    open_store: Callable[[], store.Store], engine: sa.Engine
) -> None:
    writer = open_store()
    lease = acquire(writer)
    commit(writer, lease, store.Position(0, 1, 1, None))
    with engine.connect() as looking:
        before = looking.execute(sa.select(tables.feed.c.watermark)).scalar_one()
        commit(writer, lease, store.Position(0, 2, 2, None))

    assert (before, writer.position(lease).watermark) == (1, 2)  # type: ignore[union-attr]


@pytest.mark.parametrize("url", ["sqlite:////nowhere/state.db", "sqlite://", "mysql://somewhere/db", "state.db"])
def test_database_url_that_cannot_be_right_is_misconfigured(url: str, clock: virtual.Clock) -> None:
    with pytest.raises(errors.Misconfigured) as wrong:
        store.Store(url, clock=clock)

    assert "database.url" in str(wrong.value)


def test_file_that_is_no_database_is_misconfigured(tmp_path: Path, clock: virtual.Clock) -> None:
    (tmp_path / "notes.txt").write_text("no database, however long this text is", encoding="utf-8")
    state = store.Store(f"sqlite:///{tmp_path}/notes.txt", clock=clock)

    with pytest.raises(errors.Misconfigured) as wrong:
        state.open()

    assert "not a database" in str(wrong.value)
    state.close()


def test_database_that_is_away_is_unavailable(clock: virtual.Clock) -> None:
    with stack.free_port() as port:
        state = store.Store(f"postgresql+psycopg://nobody@127.0.0.1:{port}/none", clock=clock)
        with pytest.raises(errors.Unavailable) as away:
            state.open()

    assert away.value.service == "database"
    state.close()


def test_database_that_goes_away_is_unavailable_until_it_is_back(postgres_server: str, clock: virtual.Clock) -> None:
    with stack.database(postgres_server) as url:
        state = store.Store(url, clock=clock)
        state.open()
        lease = acquire(state)
        name = sa.make_url(url).database
        admin = sa.create_engine(postgres_server, isolation_level="AUTOCOMMIT")
        with admin.connect() as connection:
            connection.exec_driver_sql(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
            connection.exec_driver_sql(
                f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'"
            )
            with pytest.raises(errors.Unavailable):
                commit(state, lease)
            connection.exec_driver_sql(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")
        admin.dispose()

        commit(state, lease, store.Position(0, 3, 3, None))

        assert store.Position(0, 3, 3, None) == state.position(lease)
        state.close()
