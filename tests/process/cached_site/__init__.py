"""A site whose pages come from a near cache, for gunicorn: settings, pages, and the application."""
