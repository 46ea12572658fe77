"""What the worker remembers: positions, studies, patients, failures and issues, in SQLite or PostgreSQL.

No column holds an attribute value of a data set: UIDs, tags, rule names, FHIR ids, counts and times only.
"""
