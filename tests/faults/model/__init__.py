"""The model check of durable topics: random writers, consumers that crash, every event counted."""
