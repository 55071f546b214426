"""The Django project that everything is measured in."""
