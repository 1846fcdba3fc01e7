"""Finished runs side by side: ``python -m tedlab.compare`` prints tables and writes a report with charts."""
