"""The Django project that the listeners of the fault runs serve."""
