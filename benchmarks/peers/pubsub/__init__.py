"""django-pgpubsub: its triggers, channels and listeners. An app where it is installed."""
