"""What is measured beside django-pgnotify."""
