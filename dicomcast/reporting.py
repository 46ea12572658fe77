"""Reports from sync state, and the documentation of the database that they come from."""

from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from dicomcast import app, settings
from dicomcast.clock import Clock
from dicomcast.state import reports, tables

Json = Any


def report(
    options: settings.Settings,
    name: str,
    *,
    since: datetime | None = None,
    limit: int | None = None,
    clock: Clock | None = None,
) -> list[dict[str, Json]]:
    """Rows of the report `name` of `reports.REPORTS`; none where the feed was never synced.

    Raises `Misconfigured` where `outdated` is asked for and the mapping that it compares with can't be used.
    """
    now = (clock or Clock()).now()
    with app.known(options) as (opened, feed):
        if feed is None:
            return []
        digest = app.rules(options).digest if name == "outdated" else None
        return reports.report(opened, feed["id"], name, now=now, since=since, digest=digest, limit=limit)


def shortened(rows: Iterable[dict[str, Json]]) -> list[dict[str, Json]]:
    """The same for people's tables: the beginning of a digest, and times to the minute (UTC)."""
    return [{name: _short(name, value) for name, value in row.items()} for row in rows]


def _short(name: str, value: Json) -> Json:
    if isinstance(value, datetime):
        return f"{value:%Y-%m-%d %H:%M}"
    return value[:12] if name == "mapping_digest" else value


def overview() -> str:
    """The reports, a line about each."""
    width = max(map(len, reports.REPORTS))
    return "\n".join(f"{name:<{width}}  {one.about}" for name, one in reports.REPORTS.items())


# The documentation of the database ------------------------------------------------------------------------------------

_INTRODUCTION = """\
What dicomcast knows of its work is in one database, SQLite or PostgreSQL (`database.url`). FHIR holds the content; this
holds where each change feed stands, what became of each study, what failed, and how long it took. A lost database costs
time, not content.

**What may be relied upon.** The views below and their columns are stable: columns may be added, none goes or changes
its meaning. Read by views wherever you can. Tables are for those who need more: they may grow columns with any version,
and `dicomcast db upgrade` may change them. Nobody but dicomcast may write to any of them; a role that may only read the
views is all that reports need. Most questions have an answer without SQL: `dicomcast report NAME`.

**No values.** UIDs, FHIR ids, tags, names of rules, counts and times are here. No value of an attribute is: no name, no
identifier of a patient or an order, no date of a study.

**Times** are in UTC. PostgreSQL has them as `timestamp with time zone`; SQLite as text, `YYYY-MM-DD HH:MM:SS.ffffff`,
which sorts and compares as times do. In queries write them with `+00`: both databases take that as UTC. Sequences are
those of the change feed.

**It does not grow for ever.** Studies, Patients and issues are as many as there are in the archive. The hourly roll-up
(`flush_hour`, `v_flush`) gets a few dozen rows an hour, and stays: throughput and latency of years ago can be reported.
What is written for each event (`flush`, finished jobs and their `work`, failures that are resolved) and the rows of
deleted studies go with `dicomcast db prune --older-than 90d`; run it once a day. `audit` has a row for each action of
an operator, and keeps it.

## Queries

Studies that failed in a month, by modality:

```sql
SELECT modality, count(*) AS studies, sum(failures) AS failures
FROM v_study
WHERE outcome = 'failed' AND month = '2026-01'
GROUP BY modality ORDER BY studies DESC;
```

What fails now, and since when:

```sql
SELECT feed, kind, rule, tag, modality, count(*) AS failures, min(first_seen) AS since
FROM v_failure
WHERE status IN ('open', 'retrying')
GROUP BY feed, kind, rule, tag, modality ORDER BY failures DESC;
```

The share of a day's entries that were in FHIR within a minute of the feed:

```sql
SELECT 100.0 * sum(CASE WHEN lag_within <= 60 THEN entries ELSE 0 END) / sum(entries) AS percent
FROM v_flush
WHERE lag_within > 0 AND hour >= '2026-01-31 00:00:00+00' AND hour < '2026-02-01 00:00:00+00';
```

How far behind each feed is:

```sql
SELECT feed, lag_entries, gaps, current_at, trouble FROM v_lag;
```"""


def schema() -> list[dict[str, str]]:
    """Every column of the views and tables: `table`, `column`, `type`, `meaning`."""
    shown = [(name, columns, False) for name, (_, columns) in reports.VIEWS.items()]
    shown += [(table.name, list(table.columns), True) for table in tables.metadata.tables.values()]
    return [
        {"table": str(name), "column": str(one.name), "type": _type(one, keys=keys), "meaning": one.comment or ""}
        for name, columns, keys in shown
        for one in columns
    ]


def schema_markdown() -> str:
    """The page on the database: views, tables, and the reports that dicomcast has itself."""
    parts = ["<!-- Generated by `dicomcast db show --format markdown`: change the tables' comments, not this page. -->"]
    parts += ["# The state database", _INTRODUCTION, "## Views"]
    for name, (about, columns) in reports.VIEWS.items():
        parts += [f"### {name}", _sentence(about), _columns(columns, keys=False)]
    parts.append("## Tables")
    for table in tables.metadata.tables.values():
        parts += [f"### {table.name}", _sentence(table.comment or ""), _columns(table.columns, keys=True)]
    parts += ["## Reports", "`dicomcast report NAME` shows them, for the feed that the settings name."]
    for name, one in reports.REPORTS.items():
        parts += [f"### {name}", *_report(one)]
    return "\n\n".join(parts) + "\n"


def _columns(columns: Iterable[sa.Column[Any]], *, keys: bool) -> str:
    rows = ([f"`{one.name}`", _type(one, keys=keys), one.comment or ""] for one in columns)
    return _table(("column", "type", "meaning"), rows)


def _report(one: reports.Report) -> Iterator[str]:
    yield _sentence(one.about)
    default = f"{reports.DAYS} days ago" if one.period else "all"
    takes = [f"`--since` (default: {default}): {one.since}."] if one.since else []
    if parts := takes + ["`--limit`: most rows."] * one.ranked:
        yield " ".join(parts)
    yield _table(("column", "meaning"), ([f"`{name}`", meaning] for name, meaning in one.columns.items()))


_TYPES: dict[type[Any], str] = {
    tables.Instant: "time",
    sa.Text: "text",
    sa.String: "text",
    sa.Boolean: "yes or no",
    sa.Float: "number",
    sa.Integer: "integer",
    sa.BigInteger: "integer",
}


def _type(column: sa.Column[Any], *, keys: bool) -> str:
    length = getattr(column.type, "length", None)
    text = _TYPES[type(column.type)] + (f" ({length})" if length else "")
    if keys and column.primary_key:
        return f"{text}, key"
    return f"{text} or null" if column.nullable else text


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *rows))
