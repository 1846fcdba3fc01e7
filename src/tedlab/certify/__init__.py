"""Proves, in float64 and on any machine, that a configuration trains exactly as one process would."""

from tedlab.certify.certificate import Certificate, certify
from tedlab.certify.compare import Row, compare
from tedlab.certify.record import Record, record, record_reference
from tedlab.certify.shrink import shrink

__all__ = ["Certificate", "Record", "Row", "certify", "compare", "record", "record_reference", "shrink"]
