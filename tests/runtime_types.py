"""The run-time type checker of the test suite."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
"""beartype that takes an int where a float is asked for, as Python's type system does."""
