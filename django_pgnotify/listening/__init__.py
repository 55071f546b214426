"""From a NOTIFY to decoded events: the connection, its session, and the intake."""
