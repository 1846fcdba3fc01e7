"""Proves, in float64 and on any machine, that a configuration trains exactly as one process would."""

from tedlab.certify.certificate import Certificate, certify
from tedlab.certify.compare import Row
from tedlab.certify.record import Record

__all__ = ["Certificate", "Record", "Row", "certify"]
