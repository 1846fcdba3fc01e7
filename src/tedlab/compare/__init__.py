"""Compares finished runs: ``tedlab compare`` prints tables and writes a report with charts."""
