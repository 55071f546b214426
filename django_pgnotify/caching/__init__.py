"""Django caches that are told when what they hold has changed."""
