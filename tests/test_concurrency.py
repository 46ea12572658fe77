"""A worker and operators at one database, at the same time: nobody meets a lock, and nothing is lost."""

import asyncio
import threading
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any

import stack
from hospital import Hospital, a_study, uid, until

from dicomcast import app, operations, reporting
from dicomcast.clock import Clock
from dicomcast.state import reports

ROUNDS = 3


@stack.long
def test_worker_replay_verify_and_reports_share_a_database(clinic: Hospital) -> None:
    studies = [a_study(instances=2) for _ in range(40)]
    for study in studies[::8]:
        study[1].PatientID = ""
    clinic.send(*(one for study in studies[:20] for one in study))
    options, limits = clinic.options(settle={"idle": 0.2}), operations.Limits()

    def at_desk(verb: Any) -> None:
        asyncio.run(operations.at_desk(options, verb))

    every = operations.Selection(everything=True)
    asked: list[Callable[[], object]] = [
        lambda: at_desk(partial(operations.replay, selection=every, limits=limits)),
        lambda: at_desk(partial(operations.verify, limits=limits, repair=True)),
        lambda: [reporting.report(options, name) for name in reports.REPORTS],
        lambda: (app.status(options), app.failures(options), app.issues(options), operations.unfinished(options)),
        lambda: operations.prune(options, before=Clock().now() - timedelta(days=1)),
        lambda: operations.dismiss(options, ids=[10**6], kind=None, study_uid=None, reason="none such"),
    ]
    raised: list[BaseException] = []

    def again_and_again(ask: Callable[[], object]) -> None:
        try:
            for _ in range(ROUNDS):
                ask()
        except BaseException as error:
            raised.append(error)

    with clinic.dicomcast(
        "run", DICOMCAST_WEB__PORT="0", DICOMCAST_DICOM__POLL="0.2", DICOMCAST_SETTLE__IDLE="0.2"
    ) as worker:
        until(lambda: app.status(options)["lease"]["held"])
        threads = [threading.Thread(target=again_and_again, args=(ask,)) for ask in asked]
        for thread in threads:
            thread.start()
        for study in studies[20:]:
            clinic.send(*study)
        for thread in threads:
            thread.join()
        until(lambda: app.status(options)["feed"]["watermark"] == 80)
        worker.terminate()
        _, log = worker.communicate(timeout=30)

    assert raised == []
    assert [line for line in log.splitlines() if "waiting" in line or "standing by" in line or "locked" in line] == []
    for study in studies:
        shown = clinic.study(uid(study[0]))
        assert shown is not None
        assert shown["numberOfInstances"] == sum(bool(one.PatientID) for one in study)
    assert len(clinic.failures()) == 5
