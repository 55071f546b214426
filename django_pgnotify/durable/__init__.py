"""Durable topics: the event log, and the cursors of those who read it."""
