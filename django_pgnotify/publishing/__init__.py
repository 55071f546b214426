"""From a changed row, or a call of ``publish()``, to a NOTIFY."""
