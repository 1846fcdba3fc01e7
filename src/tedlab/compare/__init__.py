"""Finished runs side by side: ``tedlab compare`` prints tables and writes a report with charts."""
